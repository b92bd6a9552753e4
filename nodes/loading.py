"""Nodes that load MXFP8 models through stock ComfyUI, and one that takes a loaded model."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import comfy.sd
import folder_paths
import nodes as comfy_nodes
import torch
from comfy_api.latest import io
from server import PromptServer

from ..kernels.dispatch import PRECISIONS
from ..quant import format
from . import files, stock_loading
from .model_patch import accelerate, check_scales

logger = logging.getLogger(__name__)

CATEGORY = "MXFP8"
_NO_FILE = "none"


def precision_input() -> io.Combo.Input:
    """The precision widget that every node with kernels has."""
    return io.Combo.Input(
        "precision",
        options=list(PRECISIONS),
        default="auto",
        tooltip=(
            "exact: stored weights times unquantised activations. "
            "fast: activations are quantised too, for tensor cores that multiply 8-bit values. "
            "auto: fast where the GPU has them (RTX 40 and later, H100), else exact. "
            "Layers that the file marks as full precision are always exact."
        ),
    )


def show(node: type[io.ComfyNode], text: str) -> None:
    """Show a line or more on the node itself, in the browser."""
    if node.hidden.unique_id:
        PromptServer.instance.send_progress_text(text, node.hidden.unique_id)


def check(node: type[io.ComfyNode], *paths: Path, order: str = format.AUTO) -> None:
    """Refuse damaged or inconsistent MXFP8 files; show on the node what is suspicious in them.

    Args:
        order: what the user says of the order of scales; nothing is suspicious about it then.

    Raises:
        FormatError: from `stock_loading.check_file`.
    """
    found = [warning for path in paths for warning in stock_loading.check_file(path, order)]
    if found:
        for warning in found:
            logger.warning("MXFP8: %s", warning)
        show(node, "\n".join(found))


def check_loaded(node: type[io.ComfyNode], patcher) -> None:
    """Check a model from another loader: the files it came from, and what it made of them.

    ComfyUI's loaders take most damaged MXFP8 files without a word. They leave the paths on the
    model, for its deep clones.

    Raises:
        ValueError: a file is damaged or inconsistent, or the scales of a layer are.
    """
    load, arguments, *_ = patcher.cached_patcher_init or (None, ())
    first = arguments[0] if arguments else None
    names = first if isinstance(first, (list, tuple)) else [first]
    paths = [Path(name) for name in names if isinstance(name, str) and os.path.isfile(name)]
    order = arguments[1] if load is stock_loading.load_diffusion_model else format.AUTO
    check(node, *paths, order=order)
    check_scales(patcher.model)


class MXFP8LoadDiffusionModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8LoadDiffusionModel",
            display_name="Load Diffusion Model (MXFP8)",
            category=CATEGORY,
            description=(
                "Loads a diffusion model and runs its MXFP8 layers on the fastest correct path "
                "this machine has. Other models load as the stock loader loads them."
            ),
            search_aliases=["mxfp8", "unet loader", "load diffusion model", "quantized", "fp8"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="A file in models/diffusion_models.",
                ),
                precision_input(),
                io.Combo.Input(
                    "scales",
                    options=list(format.ORDERS),
                    default=format.AUTO,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Order of the scales in the file. auto: tiled, as ComfyUI has it, with a "
                        "warning if they look row-major; tiled: the same without; row-major: they "
                        "are brought into tiled order while loading."
                    ),
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The diffusion model.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model_name, precision, scales=format.AUTO) -> io.NodeOutput:
        path = files.model_path("diffusion_models", model_name)
        check(cls, path, order=scales)
        model = stock_loading.load_diffusion_model(str(path), scales)
        return io.NodeOutput(accelerate(model, precision))


class MXFP8LoadCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8LoadCheckpoint",
            display_name="Load Checkpoint (MXFP8)",
            category=CATEGORY,
            description=(
                "Loads a checkpoint (diffusion model, text encoder and VAE in one file) and runs "
                "its MXFP8 layers on the fastest correct path this machine has."
            ),
            search_aliases=["mxfp8", "checkpoint", "load checkpoint", "quantized"],
            inputs=[
                io.Combo.Input(
                    "checkpoint_name",
                    options=folder_paths.get_filename_list("checkpoints"),
                    tooltip="A file in models/checkpoints.",
                ),
                precision_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The diffusion model."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder."),
                io.Vae.Output(display_name="vae", tooltip="Decodes latents to images."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, checkpoint_name, precision) -> io.NodeOutput:
        path = files.model_path("checkpoints", checkpoint_name)
        check(cls, path)
        model, clip, vae = stock_loading.load_checkpoint(
            str(path), folder_paths.get_folder_paths("embeddings")
        )
        if model is not None:
            model = accelerate(model, precision)
        if clip is not None:
            clip = accelerate_clip(clip)
        return io.NodeOutput(model, clip, vae)


class MXFP8LoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = folder_paths.get_filename_list("text_encoders")
        more = [_NO_FILE, *names]
        return io.Schema(
            node_id="MXFP8LoadTextEncoder",
            display_name="Load Text Encoder (MXFP8)",
            category=CATEGORY,
            description=(
                "Loads one to four text encoder files as the stock CLIP loaders pair them, and "
                "runs their MXFP8 layers exactly. Activations of text encoders are never "
                "quantised, as in stock ComfyUI.\n"
                "One file:\n" + _recipes(comfy_nodes.CLIPLoader) + "\n"
                "Two files:\n" + _recipes(comfy_nodes.DualCLIPLoader) + "\n"
                "Three files: sd3 (clip-l, clip-g, t5). "
                "Four files: hidream (clip-l, clip-g, t5, llama)."
            ),
            search_aliases=["mxfp8", "clip loader", "dual clip", "text encoder", "t5", "qwen"],
            inputs=[
                io.Combo.Input(
                    "name", options=names, tooltip="A file in models/text_encoders."
                ),
                io.Combo.Input(
                    "type", options=text_encoder_types(), tooltip="The model it encodes for."
                ),
                io.Combo.Input(
                    "name2", options=more, default=_NO_FILE, optional=True,
                    tooltip="A second file, for models that pair two text encoders.",
                ),
                io.Combo.Input(
                    "name3", options=more, default=_NO_FILE, optional=True, advanced=True,
                    tooltip="A third file (sd3, hidream).",
                ),
                io.Combo.Input(
                    "name4", options=more, default=_NO_FILE, optional=True, advanced=True,
                    tooltip="A fourth file (hidream).",
                ),
                io.Combo.Input(
                    "device", options=["default", "cpu"], default="default", optional=True,
                    advanced=True, tooltip="cpu: keep and run the text encoder in main memory.",
                ),
            ],
            outputs=[io.Clip.Output(display_name="clip", tooltip="The text encoder.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, name, type, name2=_NO_FILE, name3=_NO_FILE, name4=_NO_FILE, device="default"
    ) -> io.NodeOutput:
        chosen = [n for n in (name, name2, name3, name4) if n != _NO_FILE]
        paths = [files.model_path("text_encoders", n) for n in chosen]
        check(cls, *paths)
        options = {}
        if device == "cpu":
            options["load_device"] = options["offload_device"] = torch.device("cpu")
        clip = stock_loading.load_text_encoder(
            [str(path) for path in paths],
            folder_paths.get_folder_paths("embeddings"),
            getattr(comfy.sd.CLIPType, type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION),
            options,
        )
        return io.NodeOutput(accelerate_clip(clip))


def _recipes(loader) -> str:
    """What a stock loader's description says it pairs."""
    return loader.DESCRIPTION.removeprefix("Recipes:").strip()


def text_encoder_types() -> list[str]:
    """The types that stock's loaders offer for one file and for two, without repeats."""
    types = []
    for loader in (comfy_nodes.CLIPLoader, comfy_nodes.DualCLIPLoader):
        types += loader.INPUT_TYPES()["required"]["type"][0]
    return list(dict.fromkeys(types))


def accelerate_clip(clip):
    """A clone of a CLIP whose MXFP8 linears run our kernels, exact as stock runs them."""
    clone = clip.clone()
    clone.patcher = accelerate(clip.patcher, "exact")
    return clone


class MXFP8Accelerate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8Accelerate",
            display_name="Accelerate Model (MXFP8)",
            category=CATEGORY,
            description=(
                "Takes a model from any loader and runs its MXFP8 layers on the fastest correct "
                "path this machine has. Put it right after the loader."
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
    def execute(cls, model, precision) -> io.NodeOutput:
        check_loaded(cls, model)
        return io.NodeOutput(accelerate(model, precision))


class MXFP8AccelerateTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8AccelerateTextEncoder",
            display_name="Accelerate Text Encoder (MXFP8)",
            category=CATEGORY,
            description=(
                "Takes a text encoder from any loader and runs its MXFP8 layers on our kernels. "
                "Activations are never quantised."
            ),
            search_aliases=["mxfp8", "accelerate", "clip", "text encoder"],
            inputs=[io.Clip.Input("clip", tooltip="A text encoder with MXFP8 layers.")],
            outputs=[io.Clip.Output(display_name="clip", tooltip="The same text encoder.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip) -> io.NodeOutput:
        check_loaded(cls, clip.patcher)
        return io.NodeOutput(accelerate_clip(clip))
