"""Convert checkpoints with small text encoders, and run these in stock beside their sources.

    python tests/support/small_encoders.py COMFYUI FOLDER

Prints a JSON object: encoder -> whether its layers are marked in the file, and the relative
difference of its output. Further, for a BF16 Flux with a T5 in each kind of FP8: the difference of
the T5's output, and how many layers of the model became quantized modules.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from comfyui_modules import FOLDER

# isort: split
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.text_encoders.sa3 as sa3
import comfy.utils
import torch
from comfy.ldm.flux.model import Flux
from comfy.quant_ops import QuantizedTensor
from comfy.text_encoders.flux import flux_clip
from safetensors.torch import load_file, save_file

from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.format import read_header

_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 99}
_HEADS = {"num_attention_heads": 2}
_T5 = {"d_model": 64, "d_ff": 128, "d_kv": 32, "num_heads": 2, "num_layers": 1, "vocab_size": 99}
# Model class -> (prefix of its encoders in a file, their prefix in ComfyUI, sizes).
MODELS = {
    "SD15": (
        "cond_stage_model.transformer.", "clip_l.transformer.text_model.",
        {"clip_l_model_config": {**_SIZES, **_HEADS}},
    ),
    "StableAudio3": ("text_encoders.", "", {}),
    "HunyuanDiT": (
        "text_encoders.", "",
        {"hydit_clip_model_config": {**_SIZES, **_HEADS}, "mt5xl_model_config": _T5},
    ),
    "ACEStep15": (
        "text_encoders.", "", {"_model_config": {**_SIZES, **_HEADS, "num_key_value_heads": 2}},
    ),
}  # fmt: skip
ENCODERS = ("clip_l", "t5gemma", "hydit_clip", "mt5xl", "qwen3_06b", "qwen3_2b")
BESIDE = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"


class T5GemmaConfig(sa3.T5GemmaEncoderConfig):
    def __init__(self):
        super().__init__()
        vars(self).update(_SIZES, **_HEADS, num_key_value_heads=2, head_dim=32)


sa3.T5GemmaEncoderConfig = T5GemmaConfig


def build(name: str, state: dict) -> torch.nn.Module:
    target = object.__new__(getattr(comfy.supported_models, name)).clip_target(state_dict=state)
    return target.clip(device="cpu", dtype=torch.float32, model_options=MODELS[name][2])


def random(like: torch.Tensor) -> torch.Tensor:
    value = torch.randn(like.shape)
    value = value * value[0].numel() ** -0.5 if value.ndim > 1 else 1 + 0.1 * value
    return value.bfloat16()


def make(name: str) -> Path:
    prefix, inside, _ = MODELS[name]
    hint = {"text_encoders.qwen3_2b.transformer.model.norm.weight": torch.ones(1)}
    state = {BESIDE: torch.randn(64, 64).bfloat16()}
    for key, value in build(name, hint).state_dict().items():
        if key.startswith(inside):
            state[prefix + key.removeprefix(inside)] = random(value)
    path = FOLDER / f"{name}.safetensors"
    save_file(state, path)
    return path


def outputs(name: str, path: Path) -> dict[str, torch.Tensor]:
    """What each encoder in a checkpoint makes of the same tokens, loaded as stock does."""
    state, _ = comfy.utils.convert_old_quants(load_file(path), "", metadata={})
    model = build(name, state)
    config = object.__new__(getattr(comfy.supported_models, name))
    model.load_state_dict(config.process_clip_state_dict(state), strict=False)
    tokens = [[token % 97 for token in range(77)]]
    with torch.inference_mode():
        return {
            part: getattr(model, part)(tokens)[0].float()
            for part in ENCODERS
            if hasattr(model, part)
        }


T5 = {"t5xxl_model_config": _T5, "clip_l_model_config": {**_SIZES, **_HEADS}}
FP8 = ("cast", "scaled", "marked", "marked in the header")


def fp8_state(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    """A BF16 Flux with a T5 in a kind of FP8, and the file's metadata."""
    model = Flux(
        image_model="flux", in_channels=16, out_channels=16, vec_in_dim=None, context_in_dim=64,
        hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=1, depth_single_blocks=1,
        axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=False,
        txt_ids_dims=[], operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    encoder = flux_clip()(device="cpu", dtype=torch.float32, model_options=T5)
    state = {f"model.diffusion_model.{key}": value for key, value in model.state_dict().items()}
    state |= {f"text_encoders.{key}": value for key, value in encoder.state_dict().items()}
    state = {key: random(value) for key, value in state.items()}
    conf = {"format": "float8_e4m3fn"}
    layers = [k.removesuffix(".weight") for k in state if re.search(r"t5xxl.*(q|k|v|o|wi_.)\.w", k)]
    for layer in layers:
        value = state[f"{layer}.weight"].float()
        scale = torch.tensor(1.0) if kind == "cast" else value.abs().max() / 448
        state[f"{layer}.weight"] = (value / scale).to(torch.float8_e4m3fn)
        if kind == "scaled":
            state[f"{layer}.scale_weight"] = scale
        elif kind != "cast":
            state[f"{layer}.weight_scale"] = scale
        if kind == "marked":
            marker = list(json.dumps(conf).encode())
            state[f"{layer}.comfy_quant"] = torch.tensor(marker, dtype=torch.uint8)
    if kind == "scaled":
        legacy = torch.zeros(2).to(torch.float8_e4m3fn)
        state["text_encoders.t5xxl.transformer.scaled_fp8"] = legacy
    if kind == "marked in the header":
        marked = json.dumps({"layers": dict.fromkeys(layers, conf)})
        return state, {"_quantization_metadata": marked}
    return state, None


def fp8_outputs(path: Path) -> tuple[torch.Tensor, int]:
    """What stock's T5 of a checkpoint puts out, and the model's quantized layers."""
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(
        str(path), output_vae=False, te_model_options=T5
    )
    modules = model.model.diffusion_model.modules()
    count = sum(isinstance(getattr(m, "weight", None), QuantizedTensor) for m in modules)
    with torch.inference_mode():
        return clip.cond_stage_model.t5xxl([[*range(20)]])[0].float(), count


def main() -> None:
    logging.disable(logging.CRITICAL)
    torch.manual_seed(0)
    results = {}
    for name, (prefix, _, _) in MODELS.items():
        source = make(name)
        target = source.with_suffix(".mxfp8.safetensors")
        convert_file(source, target)
        marked = {layer for layer in read_header(target).layers if layer.startswith(prefix)}
        expected, got = outputs(name, source), outputs(name, target)
        for part in expected:
            difference = (got[part] - expected[part]).norm() / expected[part].norm()
            results[part] = {
                "marked": any(part in layer or prefix[0] == "c" for layer in marked),
                "difference": float(difference),
            }
    for kind in FP8:
        source, target = FOLDER / f"{kind}.safetensors", FOLDER / f"{kind}.mxfp8.safetensors"
        state, metadata = fp8_state(kind)
        save_file(state, source, metadata)
        convert_file(source, target)
        (expected, before), (got, after) = fp8_outputs(source), fp8_outputs(target)
        results[kind] = {
            "difference": float((got - expected).norm() / expected.norm()),
            "quantized": [before, after],
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
