"""A node that looks into a file, or into a model that is loaded."""

from __future__ import annotations

from collections import Counter

from comfy_api.latest import io

from ..quant.checks.inspect import Inspection, LayerInspection, inspect_file
from ..quant.reports.conversion import KEPT, gigabytes, listed
from .host import paths
from .host.progress import Progress, show
from .loading import CATEGORY, NO_FILE, ROWS
from .runtime.describe import describe

_MOST_SENTENCES = 20  # shown; the JSON has all


class MXFP8Inspect(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8Inspect",
            display_name="Inspect (MXFP8)",
            category=CATEGORY,
            description=(
                "Says what a file holds and what is wrong with it: formats, sizes, layers that "
                "are kept and why, damaged scales and codes. Or what a loaded model holds."
            ),
            search_aliases=["mxfp8", "inspect", "file info", "layers", "metadata", "damaged"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[*paths.list_files(), NO_FILE],
                    tooltip="A safetensors file in a model folder. Nothing of it is loaded.",
                ),
                io.Boolean.Input(
                    "every_byte",
                    default=True,
                    tooltip=(
                        "Read every byte of the file's MXFP8 layers, which finds damage; off: "
                        "read the header, which takes no time."
                    ),
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="A loaded model to look into, not the file."
                ),
            ],
            outputs=[
                io.String.Output(display_name="summary", tooltip="What was found, in words."),
                io.String.Output(display_name="inspection", tooltip="Every layer: JSON."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file, every_byte, **connected):
        """ComfyUI asks before a run: a file that was replaced is looked into again.

        So is a model, always: what is merged into it or loaded, no input shows. It comes as None
        here, and not at all if none is connected.
        """
        if "model" in connected:
            return float("nan")
        if file == NO_FILE:
            return ""
        status = paths.source_path(file).stat()
        return f"{status.st_size} {status.st_mtime_ns}"

    @classmethod
    def execute(cls, file, every_byte, model=None) -> io.NodeOutput:
        if model is not None:
            found = inspect_model(model)
            summary = _summary_of_model(found)
        elif file == NO_FILE:
            raise ValueError("choose a file, or connect a model to this node")
        else:
            found = inspect_file(
                paths.source_path(file), every_byte=every_byte, progress=Progress(cls)
            )
            summary = _summary_of_file(found)
        show(cls, summary)
        text = found.to_json()
        return io.NodeOutput(summary, text, ui={"text": [summary], "mxfp8_report": [text]})


def inspect_model(patcher) -> Inspection:
    """What a ModelPatcher's linears are, as an inspection of a file has it."""
    described = describe(patcher, ROWS, folds=False)
    layers = [
        LayerInspection(
            name=layer.name,
            shape=layer.shape,
            bytes=layer.bytes,
            decision=layer.decision,
            reason=f"{layer.dtype} in the model" if layer.decision == KEPT else layer.reason,
            dtype=layer.dtype,
        )
        for layer in described.layers
    ]
    weights = (described.memory[kind] for kind in ("codes", "scales", "other weights"))
    total = sum(kind.device + kind.offloaded for kind in weights)
    mxfp8 = sum(layer.bytes for layer in described.mxfp8)
    return Inspection(
        file=described.model,
        bytes=total,
        tensors=sum(1 for _ in patcher.model.parameters()),
        architecture=described.model,
        formats=dict(Counter(layer.decision for layer in layers if layer.decision != KEPT)),
        mxfp8_bytes=mxfp8,
        other_bytes=total - mxfp8,
        metadata=[],
        every_byte=False,
        layers=layers,
    )


def _summary_of_file(found: Inspection) -> str:
    lines = [found.summary()]
    for label, sentences in (("WARNING", found.warnings), ("PROBLEM", found.problems)):
        lines += listed(label, sentences, _MOST_SENTENCES)
    return "\n".join([*lines, *_kept(found)])


def _summary_of_model(found: Inspection) -> str:
    return "\n".join([
        f"{found.file}: {gigabytes(found.bytes)} in memory",
        *(found.counted() or ["no layer is quantized"]),
        f"MXFP8 {gigabytes(found.mxfp8_bytes)}, everything else {gigabytes(found.other_bytes)}",
        *_kept(found),
    ])  # fmt: skip


def _kept(found: Inspection) -> list[str]:
    """How many 2-D weights are not quantized, by the reason."""
    reasons = Counter(layer.reason for layer in found.layers if layer.decision == KEPT)
    return [f"kept: {count} matrices, {reason}" for reason, count in reasons.most_common()]
