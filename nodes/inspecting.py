"""A node that inspects a file, or a loaded model."""

from __future__ import annotations

from collections import Counter

from comfy_api.latest import io

from ..quant.checks import explain
from ..quant.checks.inspect import Inspection, LayerInspection, inspect_file
from ..quant.reports.conversion import KEPT
from ..quant.reports.units import format_size
from ..quant.sources.open import files_of
from .host import paths
from .host.progress import Progress, ending_shown, output
from .runtime.describe import describe
from .widgets import CATEGORY, NO_FILE


class MXFP8InspectFile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8InspectFile",
            display_name="Inspect (MXFP8)",
            category=CATEGORY,
            description=(
                "Shows what any model file is, which ComfyUI and GPUs run it, what is wrong with "
                "it, and its size as MXFP8: safetensors in every quantized format, GGUF, truncated "
                "downloads. Or what a loaded model contains."
            ),
            search_aliases=[
                "mxfp8",
                "inspect",
                "file info",
                "metadata",
                "damaged",
                "gguf",
                "nvfp4",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[*paths.list_any(), NO_FILE],
                    tooltip=(
                        "A file of any kind in a model folder, or a model in several files. It is "
                        "not loaded."
                    ),
                ),
                io.Boolean.Input(
                    "every_byte",
                    default=True,
                    tooltip=(
                        "Read every byte of the file's MXFP8 layers, which finds damage. Off: "
                        "read only the header, which is instant."
                    ),
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="A loaded model to inspect instead of the file."
                ),
            ],
            outputs=[
                io.String.Output(display_name="summary", tooltip="The result as text."),
                io.String.Output(display_name="inspection", tooltip="Every layer, as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file, every_byte, **connected):
        """ComfyUI asks before a run: a file that was replaced is inspected again.

        A model always is: no input shows what is merged into it or loaded. It comes as None here,
        and not at all if none is connected.
        """
        if "model" in connected:
            return float("nan")
        if file == NO_FILE:
            return ""
        path = paths.source_path(file)
        parts = files_of(path) if path.suffix.lower() == ".json" else {path}
        found = [part.stat() for part in sorted(parts) if part.is_file()]
        return " ".join(f"{status.st_size} {status.st_mtime_ns}" for status in found)

    @classmethod
    @ending_shown
    def execute(cls, file, every_byte, model=None) -> io.NodeOutput:
        if model is not None:
            inspection = inspect_model(model)
            first = f"{inspection.file}: {format_size(inspection.bytes)} in memory"
            summary = "\n".join([first, *inspection.contents()])
        elif file == NO_FILE:
            raise ValueError("choose a file, or connect a model to this node")
        else:
            path = paths.source_path(file)
            inspection = inspect_file(path, every_byte=every_byte, progress=Progress(cls))
            summary = inspection.summary()
        text = inspection.to_json()
        return output(cls, summary, summary, text, document=text)


def inspect_model(patcher) -> Inspection:
    """The inspection of a ModelPatcher, with the fields of a file's."""
    report = describe(patcher)
    layers = [
        LayerInspection(
            name=layer.name,
            shape=layer.shape,
            bytes=layer.bytes,
            decision=layer.decision,
            reason=f"{layer.dtype} in the model" if layer.decision == KEPT else layer.reason,
            dtype=layer.dtype,
        )
        for layer in report.layers
    ]
    weights = (report.memory[kind] for kind in ("codes", "scales", "other weights"))
    total = sum(kind.device + kind.offloaded for kind in weights)
    mxfp8 = sum(layer.bytes for layer in report.mxfp8)
    formats = dict(Counter(layer.decision for layer in layers if layer.decision != KEPT))
    return Inspection(
        file=report.model,
        bytes=total,
        tensors=sum(1 for _ in patcher.model.parameters()),
        architecture=report.model,
        formats=formats,
        mxfp8_bytes=mxfp8,
        other_bytes=total - mxfp8,
        metadata=[],
        every_byte=False,
        layers=layers,
        explained=explain.of_names(formats),
    )
