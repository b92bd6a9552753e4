"""Nodes that run the MXFP8 layers of models from other loaders on our kernels."""

from __future__ import annotations

import os
from pathlib import Path

from comfy_api.latest import io

from ..quant import format
from .host.progress import ending_shown, output
from .models.load import check_file, load_diffusion_model
from .models.raw_codes import check_layers, check_weights
from .runtime.describe import describe
from .runtime.patch import accelerate, accelerate_clip, check_scales
from .widgets import CATEGORY, ModelNode, precision_input

# What may help where an MXFP8 file comes after another one.
_ORDER = (
    "load these files with Load Text Encoder (MXFP8), which puts MXFP8 language models first, or "
)


def check_loaded(patcher) -> list[str]:
    """Check a model from another loader: the files it came from, what became of their layers, and
    the scales of the model's.

    ComfyUI's loaders accept most damaged MXFP8 files silently. They leave the paths on the model,
    for its deep clones.

    Returns:
        Warnings.

    Raises:
        ValueError: a file is damaged or inconsistent, or the scales of a layer are, or the model
            uses the codes of a layer as weights.
    """
    load, arguments, *_ = patcher.cached_patcher_init or (None, ())
    first = arguments[0] if arguments else None
    names = first if isinstance(first, (list, tuple)) else [first]
    paths = [Path(name) for name in names if isinstance(name, str) and os.path.isfile(name)]
    order = arguments[1] if load is load_diffusion_model else format.AUTO
    warnings, remedy = [], ""
    for path in paths:
        header, found = check_file(path, order)
        warnings += found
        if header is not None:
            check_layers(header, patcher.model, remedy)
        if header is None or not header.layers:
            remedy = _ORDER
    if not paths:
        check_weights(patcher.model)
    check_scales(patcher.model)
    return warnings


def loaded(node: type[io.ComfyNode], warnings: list[str], patchers: list, *values):
    """The output of a node that loaded these models: what runs their MXFP8 layers, and warnings."""
    reports = [describe(patcher) for patcher in patchers]
    lines = [r.line() if len(reports) == 1 else f"{r.model}: {r.line()}" for r in reports]
    text = "\n".join([*lines, *(f"WARNING: {warning}" for warning in warnings)])
    return output(node, text, *values)


class MXFP8Accelerate(ModelNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8Accelerate",
            display_name="Accelerate Model (MXFP8)",
            category=CATEGORY,
            description=(
                "Takes a model from any loader and runs its MXFP8 layers on this pack's kernels. "
                "Place it right after the loader."
            ),
            search_aliases=["mxfp8", "accelerate", "speed up", "quantized"],
            inputs=[
                io.Model.Input("model", tooltip="A model with MXFP8 layers."),
                precision_input(),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The same model, its MXFP8 layers on our kernels."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @ending_shown
    def execute(cls, model, precision) -> io.NodeOutput:
        warnings = check_loaded(model)
        model = accelerate(model, precision)
        return loaded(cls, warnings, [model], model)


class MXFP8AccelerateTextEncoder(ModelNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8AccelerateTextEncoder",
            display_name="Accelerate Text Encoder (MXFP8)",
            category=CATEGORY,
            description=(
                "Takes a text encoder from any loader and runs its MXFP8 layers on our kernels. "
                "Activations are never quantized."
            ),
            search_aliases=["mxfp8", "accelerate", "clip", "text encoder"],
            inputs=[io.Clip.Input("clip", tooltip="A text encoder with MXFP8 layers.")],
            outputs=[io.Clip.Output(display_name="clip", tooltip="The same text encoder.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @ending_shown
    def execute(cls, clip) -> io.NodeOutput:
        warnings = check_loaded(clip.patcher)
        clip = accelerate_clip(clip)
        return loaded(cls, warnings, [clip.patcher], clip)
