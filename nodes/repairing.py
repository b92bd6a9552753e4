"""A node that repairs a file whose markers or scale order were lost."""

from __future__ import annotations

from comfy_api.latest import io

from ..quant import format
from ..quant.checks.repair import repair_file
from .host import paths, written
from .host.progress import Progress, ending_shown, output
from .models import load
from .widgets import CATEGORY, overwrite_input, target_input


class MXFP8RepairFile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8RepairFile",
            display_name="Repair File (MXFP8)",
            category=CATEGORY,
            description=(
                "Writes a repaired copy of an MXFP8 file whose markers were lost, or whose scales "
                "are in an order or dtype that ComfyUI does not read. The weights keep their bits. "
                "The loaders reject such files and point here."
            ),
            search_aliases=["mxfp8", "repair", "fix file", "markers", "row-major"],
            inputs=[
                io.Combo.Input(
                    "source",
                    options=paths.list_files(),
                    tooltip="An MXFP8 safetensors file in a model folder.",
                ),
                target_input("repaired"),
                io.Combo.Input(
                    "scales",
                    options=list(format.ORDERS),
                    default=format.AUTO,
                    tooltip=(
                        "Order of the scales in the source. auto: detect it from their shape, "
                        "padding and statistics; tiled: ComfyUI's order; row-major: row by row."
                    ),
                ),
                overwrite_input(),
            ],
            outputs=[
                io.String.Output(display_name="summary", tooltip="What was repaired, as text.")
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls, source=None, target="", **_):
        return written.fingerprint(source, target, "repaired")

    @classmethod
    @ending_shown
    def execute(cls, source, target, scales, overwrite) -> io.NodeOutput:
        path = paths.source_path(source)
        new = paths.target_beside(path, source, target, "repaired")
        with paths.folder_of(new), written.counted(new):
            result = repair_file(
                path,
                new,
                scales=scales,
                formats=load.formats(),
                overwrite=overwrite,
                progress=Progress(cls),
            )
        text = result.summary(load.check_file(new)[1])
        return output(cls, text, text)
