"""A node that repairs a file whose markers or scale order were lost."""

from __future__ import annotations

from comfy_api.latest import io

from ..quant import format
from ..quant.checks.repair import repair_file
from .host import paths
from .host.progress import Progress, show
from .loading import CATEGORY
from .models import load


class MXFP8RepairFile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8RepairFile",
            display_name="Repair File (MXFP8)",
            category=CATEGORY,
            description=(
                "Writes a copy of an MXFP8 file whose markers were lost, or whose scales are in "
                "another order or dtype than ComfyUI reads. Weights keep their bits. Files that "
                "need it are refused by the loaders, with this advice."
            ),
            search_aliases=["mxfp8", "repair", "fix file", "markers", "row-major"],
            inputs=[
                io.Combo.Input(
                    "source",
                    options=paths.list_files(),
                    tooltip="An MXFP8 safetensors file in a model folder.",
                ),
                io.String.Input(
                    "target",
                    default="",
                    tooltip=(
                        "Name of the new file in the same model folder; empty: the source's name "
                        "with -repaired."
                    ),
                ),
                io.Combo.Input(
                    "scales",
                    options=list(format.ORDERS),
                    default=format.AUTO,
                    tooltip=(
                        "Order of the scales in the source. auto: what their shape, padding and "
                        "statistics show; tiled: ComfyUI's order; row-major: row after row."
                    ),
                ),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Replace the target if it exists."
                ),
            ],
            outputs=[
                io.String.Output(display_name="summary", tooltip="What was repaired, in words.")
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, source, target, scales, overwrite) -> io.NodeOutput:
        path = paths.source_path(source)
        found = paths.target_beside(path, source, target, "repaired")
        with paths.folder_of(found):
            result = repair_file(
                path,
                found,
                scales=scales,
                formats=load.formats(),
                overwrite=overwrite,
                progress=Progress(cls),
            )
        text = "\n".join([result.summary(), *load.check_file(found)])
        show(cls, text)
        return io.NodeOutput(text, ui={"text": [text]})
