"""What ComfyUI and our loaders build of small MXFP8 files; run as a process of its own.

    python tests/support/loaded_modules.py COMFYUI FOLDER

Stock's option for other sizes (`..._model_config`) makes text encoders small. Prints JSON:
{"off": how far a language model is from its BF16 file's, "refused": messages, None if loaded,
"on Apple": the same where the GPU has no float8}.
"""

from __future__ import annotations

import json
import os

from comfyui_modules import FOLDER

# isort: split
import comfy.model_management
import comfy.ops
import comfy.sd
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.sd import CLIPType
from quantized_files import model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mxfp8.nodes.accelerating import check_loaded
from mxfp8.nodes.models.load import load_checkpoint, load_diffusion_model, load_text_encoder
from mxfp8.nodes.models.quantize import quantize_model
from mxfp8.nodes.runtime.patch import accelerate
from mxfp8.quant.conversion.policy import Selection

GENERATOR = torch.Generator().manual_seed(0)
QWEN = {
    "num_hidden_layers": 1, "vocab_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
CLIP = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2,
}  # fmt: skip


def random(*shape: int) -> torch.Tensor:
    return (torch.randn(shape, generator=GENERATOR) * shape[-1] ** -0.5).bfloat16()


def save(name: str, linears: dict, others: dict) -> None:
    """NAME.safetensors in BF16, and NAME-mxfp8.safetensors."""
    plain = {f"{key}.weight": value for key, value in linears.items()} | others
    save_file(plain, f"{name}.safetensors")
    tensors, metadata = model(linears, **others)
    save_file(tensors, f"{name}-mxfp8.safetensors", metadata)


def qwen(
    name: str,
    width: int,
    queries: int = 256,
    norms: torch.dtype = torch.bfloat16,
    **more: torch.Tensor,
) -> None:
    """A Qwen3 of one layer, which ComfyUI tells from others by its width.

    Args:
        norms: their dtype: that of one decides what ComfyUI computes in.
    """
    layer = "model.layers.0"
    linears = {
        "self_attn.q_proj": (queries, width), "self_attn.k_proj": (128, width),
        "self_attn.v_proj": (128, width), "self_attn.o_proj": (width, 256),
        "mlp.gate_proj": (64, width), "mlp.up_proj": (64, width), "mlp.down_proj": (width, 64),
    }  # fmt: skip
    sizes = {
        f"{layer}.self_attn.q_norm": 128, f"{layer}.self_attn.k_norm": 128,
        f"{layer}.input_layernorm": width, f"{layer}.post_attention_layernorm": width,
        "model.norm": width,
    }  # fmt: skip
    others = {f"{key}.weight": torch.ones(size, dtype=norms) for key, size in sizes.items()}
    others["model.embed_tokens.weight"] = random(64, width)
    save(name, {f"{layer}.{key}": random(*shape) for key, shape in linears.items()} | more, others)


def open_clip(name: str, width: int = 64) -> None:
    """A CLIP of two layers with OpenCLIP's names, which ComfyUI replaces."""
    linears, sizes, others = {}, {"ln_final": width}, {}
    rows = torch.arange(width)[:, None] > 0  # the first row of a matrix in each block is zero
    for block in ("transformer.resblocks.0", "transformer.resblocks.1"):
        linears |= {
            f"{block}.attn.out_proj": random(width, width) * rows,
            f"{block}.mlp.c_fc": random(128, width), f"{block}.mlp.c_proj": random(width, 128),
        }  # fmt: skip
        sizes |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
        others[f"{block}.attn.in_proj_weight"] = random(3 * width, width)
        others[f"{block}.attn.in_proj_bias"] = torch.zeros(3 * width)
    others |= {f"{key}.weight": torch.ones(size) for key, size in sizes.items()}
    sizes |= {key: len(weight) for key, weight in linears.items()}
    others |= {f"{key}.bias": torch.zeros(size) for key, size in sizes.items()}
    others["positional_embedding"] = random(77, width)
    others["token_embedding.weight"] = random(49408, width)
    others["text_projection"] = random(width, width)
    save(name, linears, others)


def checkpoint(name: str, linears: dict[str, tuple[int, int]]) -> None:
    """A Stable Diffusion 1 of one block, with these layers of other parts, in MXFP8."""
    unet = UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1],
        channel_mult=[1], transformer_depth=[1], transformer_depth_middle=0,
        transformer_depth_output=[1, 1], use_spatial_transformer=True, context_dim=768, num_heads=8,
        legacy=False, operations=comfy.ops.disable_weight_init, device="meta",
    )  # fmt: skip
    state = {f"model.diffusion_model.{k}": random(*v.shape) for k, v in unet.state_dict().items()}
    inside = {k.removesuffix(".weight"): v for k, v in state.items()
              if "transformer_blocks" in k and k.endswith("weight") and v.ndim == 2}  # fmt: skip
    others = {k: v for k, v in state.items() if k.removesuffix(".weight") not in inside}
    others["first_stage_model.vquantizer.codebook.weight"] = random(8192, 4)
    save(name, inside | {key: random(*shape) for key, shape in linears.items()}, others)


def rename(name: str, source: str, old: str, new: str) -> None:
    """SOURCE-mxfp8.safetensors with another name for a layer."""
    with safe_open(f"{source}-mxfp8.safetensors", "pt") as file:
        metadata = file.metadata()
    state = load_file(f"{source}-mxfp8.safetensors")
    metadata["_quantization_metadata"] = metadata["_quantization_metadata"].replace(old, new)
    save_file(
        {key.replace(old, new): v for key, v in state.items()}, f"{name}.safetensors", metadata
    )


def options(config: dict) -> dict:
    sizes = {f"{name}_model_config": {**QWEN, **config} for name in ("", "qwen3_06b")}
    return {**sizes, "model_config": dict(CLIP)}


def paths(names) -> list[str]:
    return [os.path.abspath(f"{name}.safetensors") for name in names]


def ours(*names: str, kind: CLIPType = CLIPType.ACE, dtype: torch.dtype | None = None, **config):
    """From our loader; the dtype is for plain weights, as --fp8_e5m2-text-enc asks for one."""
    return load_text_encoder(paths(names), [], kind, {"dtype": dtype, **options(config)})


def accelerated(*names: str, kind: CLIPType = CLIPType.ACE, **config):
    """From stock's loader, after the checks of the Accelerate nodes."""
    clip = comfy.sd.load_clip(paths(names), None, kind, options(config))
    check_loaded(clip.patcher)
    return clip


def unknown(name: str) -> None:
    """From a loader that does not say which file it read."""
    clip = comfy.sd.load_clip(paths([name]), None, CLIPType.STABLE_DIFFUSION, options({}))
    clip.patcher.cached_patcher_init = None
    check_loaded(clip.patcher)


def fp8(name: str, source: str, most: float | None) -> None:
    """A file cast to FP8 without scales, after its matrices were scaled to a largest value."""
    state = load_file(f"{source}.safetensors")
    for key, value in state.items():
        if value.ndim == 2 and key.endswith("weight"):
            factor = most / value.float().abs().max() if most else 1.0
            state[key] = (value.float() * factor).to(torch.float8_e4m3fn)
    save_file(state, f"{name}.safetensors")


def diffusion_model(name: str):
    return load_diffusion_model(*paths([name]))


def checkpoint_of(name: str, **parts):
    return load_checkpoint(*paths([name]), [], **parts)


def accelerated_part(name: str, part: int):
    """The diffusion model (0) or the text encoder (1) of a checkpoint."""
    loaded = comfy.sd.load_checkpoint_guess_config(*paths([name]))[part]
    check_loaded(getattr(loaded, "patcher", loaded))


def states(clip) -> torch.Tensor:
    """What ACE-Step's larger language model makes of eight tokens."""
    return clip.cond_stage_model.qwen3_2b.transformer(torch.arange(8)[None])[0].float()


def refusal(load, *names: str, **config) -> str | None:
    try:
        load(*names, **config)
    except ValueError as error:
        return str(error)
    return None


def on_apple() -> dict[str, str | None]:
    """What is refused on an Apple GPU, where ComfyUI runs text encoders on the CPU unless told."""
    mps, alone = torch.device("mps"), {"kind": CLIPType.STABLE_DIFFUSION}
    sd1 = comfy.sd.load_checkpoint_guess_config(*paths(["sd1"]), output_vae=False)[0]
    quantized = accelerate(
        comfy.sd.load_checkpoint_guess_config(*paths(["sd1-mxfp8"]), output_vae=False)[0], "auto"
    )
    sd1.load_device = quantized.load_device = mps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_management, "get_torch_device", lambda: mps)
        found = {
            "diffusion model": refusal(diffusion_model, "sd1-mxfp8"),
            "checkpoint": refusal(checkpoint_of, "sd1-mxfp8"),
            "text encoder on the CPU": refusal(ours, "small-mxfp8", **alone),
            "model from another loader": refusal(lambda: accelerate(quantized, "exact")),
            "model to quantize": refusal(lambda: quantize_model(sd1, Selection())),
        }
        patch.setattr(comfy.model_management, "text_encoder_device", lambda: mps)
        return found | {"text encoder": refusal(ours, "small-mxfp8", **alone)}


@torch.inference_mode()
def main() -> None:
    os.chdir(FOLDER)
    qwen("small", 1024)
    qwen("large", 2048)
    qwen("head", 1024, lm_head=random(64, 1024))
    qwen("padded", 1024, queries=250)
    open_clip("clip")
    fp8("clip fp8", "clip", None)
    fp8("clip fp8 scaled", "clip", 448.0)
    text = "cond_stage_model.transformer.encoder.layers.0"
    checkpoint("sd1", {f"{text}.mlp.fc1": (3072, 768), f"{text}.self_attn.q_proj": (768, 768)})
    checkpoint("vae", {"first_stage_model.down_blocks.0.channelwise.0": (768, 192)})
    rename("small unknown", "small", "mlp.up_proj", "mlp.up")
    rename("sd1 unknown", "sd1", "attn2.to_out.0", "attn2.to_out")
    wanted = states(ours("small", "large"))

    def off(clip) -> float:
        return float((states(clip) - wanted).norm() / wanted.norm())

    alone = {"kind": CLIPType.STABLE_DIFFUSION}
    print(json.dumps({
        "off": {
            "small first": off(ours("small", "large-mxfp8")),
            "large first": off(ours("large-mxfp8", "small")),
            "accelerated": off(accelerated("large-mxfp8", "small")),
        },
        "refused": {
            "order, accelerated": refusal(accelerated, "small", "large-mxfp8"),
            "sibling": refusal(ours, "large-mxfp8", "small-mxfp8"),
            "sibling, accelerated": refusal(accelerated, "large-mxfp8", "small-mxfp8"),
            "renamed": refusal(ours, "clip-mxfp8", **alone),
            "renamed, in E5M2": refusal(ours, "clip-mxfp8", dtype=torch.float8_e5m2, **alone),
            "renamed, accelerated": refusal(accelerated, "clip-mxfp8", **alone),
            "head": refusal(ours, "head-mxfp8", lm_head=True, **alone),
            "unused head": refusal(ours, "head-mxfp8", lm_head=False, **alone),
            "unknown file": refusal(unknown, "clip-mxfp8"),
            "BF16": refusal(accelerated, "clip", **alone),
            "unknown BF16": refusal(unknown, "clip"),
            "unknown FP8": refusal(unknown, "clip fp8"),
            "unknown scaled FP8": refusal(unknown, "clip fp8 scaled"),
            "checkpoint": refusal(checkpoint_of, "sd1-mxfp8"),
            "checkpoint, accelerated": refusal(accelerated_part, "sd1-mxfp8", part=1),
            "VAE": refusal(checkpoint_of, "vae-mxfp8"),
            "model of a checkpoint": refusal(checkpoint_of, "sd1-mxfp8", output_clip=False),
            "model of it, accelerated": refusal(accelerated_part, "sd1-mxfp8", part=0),
            "as a diffusion model": refusal(diffusion_model, "sd1-mxfp8"),
            "shape": refusal(ours, "padded-mxfp8", **alone),
            "unknown name": refusal(ours, "small unknown", **alone),
            "unknown name, accelerated": refusal(accelerated, "small unknown", **alone),
            "unknown name in a UNet": refusal(diffusion_model, "sd1 unknown"),
        },
        "on Apple": on_apple(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
