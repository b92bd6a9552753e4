"""Nodes that load MXFP8 models through stock ComfyUI."""

from __future__ import annotations

import comfy.sd
import folder_paths
import nodes as comfy_nodes
import torch
from comfy_api.latest import io

from ..quant import format
from .accelerating import loaded
from .host.paths import model_path
from .host.progress import ending_shown
from .models.load import check_file, load_checkpoint, load_diffusion_model, load_text_encoder
from .runtime.patch import accelerate, accelerate_clip
from .widgets import CATEGORY, NO_FILE, ModelNode, precision_input


class MXFP8Load(ModelNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8Load",
            display_name="Load Diffusion Model (MXFP8)",
            category=CATEGORY,
            description=(
                "Loads a diffusion model and runs its MXFP8 layers on this pack's kernels. Other "
                "models load as in the stock loader."
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
                        "Order of the scales in the file. auto: tiled, as in ComfyUI, with a "
                        "warning if they look row-major; tiled: the same without the warning; "
                        "row-major: bring them into tiled order while loading."
                    ),
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The diffusion model.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @ending_shown
    def execute(cls, model_name, precision, scales=format.AUTO) -> io.NodeOutput:
        path = model_path("diffusion_models", model_name)
        header, warnings = check_file(path, scales)
        model = accelerate(load_diffusion_model(str(path), scales, header=header), precision)
        return loaded(cls, warnings, [model], model)


class MXFP8LoadCheckpoint(ModelNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8LoadCheckpoint",
            display_name="Load Checkpoint (MXFP8)",
            category=CATEGORY,
            description=(
                "Loads a checkpoint (diffusion model, text encoder and VAE in one file) and runs "
                "its MXFP8 layers on this pack's kernels."
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
    @ending_shown
    def execute(cls, checkpoint_name, precision) -> io.NodeOutput:
        path = model_path("checkpoints", checkpoint_name)
        header, warnings = check_file(path)
        embeddings = folder_paths.get_folder_paths("embeddings")
        model, clip, vae = load_checkpoint(str(path), embeddings, header=header)
        if model is not None:
            model = accelerate(model, precision)
        if clip is not None:
            clip = accelerate_clip(clip)
        patchers = [patcher for patcher in (model, clip and clip.patcher) if patcher is not None]
        return loaded(cls, warnings, patchers, model, clip, vae)


class MXFP8LoadTextEncoder(ModelNode):
    @classmethod
    def define_schema(cls):
        names = folder_paths.get_filename_list("text_encoders")
        more = [NO_FILE, *names]
        return io.Schema(
            node_id="MXFP8LoadTextEncoder",
            display_name="Load Text Encoder (MXFP8)",
            category=CATEGORY,
            description=(
                "Loads one to four text encoder files as the stock CLIP loaders combine them, and "
                "runs their MXFP8 layers at precision exact: activations of text encoders are "
                "never quantized, as in stock ComfyUI.\n"
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
                    "type", options=text_encoder_types(), tooltip="The model that it encodes for."
                ),
                io.Combo.Input(
                    "name2", options=more, default=NO_FILE, optional=True,
                    tooltip="A second file, for models with two text encoders.",
                ),
                io.Combo.Input(
                    "name3", options=more, default=NO_FILE, optional=True, advanced=True,
                    tooltip="A third file (sd3, hidream).",
                ),
                io.Combo.Input(
                    "name4", options=more, default=NO_FILE, optional=True, advanced=True,
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
    @ending_shown
    def execute(
        cls, name, type, name2=NO_FILE, name3=NO_FILE, name4=NO_FILE, device="default"
    ) -> io.NodeOutput:
        chosen = [n for n in (name, name2, name3, name4) if n != NO_FILE]
        paths = [model_path("text_encoders", n) for n in chosen]
        headers, warnings = zip(*map(check_file, paths), strict=True)
        options = {}
        if device == "cpu":
            options["load_device"] = options["offload_device"] = torch.device("cpu")
        clip = load_text_encoder(
            [str(path) for path in paths],
            folder_paths.get_folder_paths("embeddings"),
            getattr(comfy.sd.CLIPType, type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION),
            options,
            headers=headers,
        )
        clip = accelerate_clip(clip)
        return loaded(cls, [w for of_file in warnings for w in of_file], [clip.patcher], clip)


def _recipes(loader) -> str:
    """The combinations that a stock loader's description lists."""
    return loader.DESCRIPTION.removeprefix("Recipes:").strip()


def text_encoder_types() -> list[str]:
    """The types that stock's loaders offer for one file and for two, without duplicates."""
    types = []
    for loader in (comfy_nodes.CLIPLoader, comfy_nodes.DualCLIPLoader):
        types += loader.INPUT_TYPES()["required"]["type"][0]
    return list(dict.fromkeys(types))
