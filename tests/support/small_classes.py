"""Convert small models of some of ComfyUI's classes, and run them in stock beside their sources.

Run as a process of its own (ComfyUI parses the command line):

    python tests/support/small_classes.py COMFYUI FOLDER

Prints a JSON object: name -> relative difference of the output, the layers that are marked in the
file, those that became quantized modules, and the tensors beside the model that changed.
"""

from __future__ import annotations

import json
from pathlib import Path

from comfyui_modules import FOLDER

# isort: split
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor
from model_configs import BESIDE, CONFIGS, as_stored
from safetensors.torch import load_file, save_file

from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.format import read_header

# Name -> ComfyUI's class, its configuration, prefix in a file, tensors beside the model, inputs.
SMALL = {
    "pixeldit": (
        "PixelDiTT2I",
        {"num_groups": 2, "hidden_size": 128, "pixel_attn_hidden_size": 128, "pixel_num_groups": 2,
         "patch_depth": 1, "pixel_depth": 1, "txt_embed_dim": 64, "txt_max_length": 8},
        "", {}, {"x": (1, 3, 32, 32), "context": (1, 8, 64)},
    ),
    "stable audio": (
        "StableAudio", {"embed_dim": 768, "depth": 1, "num_memory_tokens": 0},
        "model.model.", BESIDE["StableAudio"],
        {"x": (1, 64, 32), "context": (1, 8, 768), "global_embed": (1, 1536)},
    ),
    "stable audio 3": (
        "StableAudio3", {**CONFIGS["StableAudio3"], "embed_dim": 256, "num_heads": 4, "depth": 1},
        "model.model.", BESIDE["StableAudio3"],
        {"x": (1, 256, 32), "context": (1, 8, 768), "global_embed": (1, 768),
         "local_add_cond": (1, 257, 32)},
    ),
    "kandinsky 5 video": (
        "Kandinsky5",
        {"model_dim": 128, "ff_dim": 256, "time_dim": 64, "num_text_blocks": 1,
         "num_visual_blocks": 1, "visual_embed_dim": 132},
        "", {}, {"x": (1, 33, 2, 8, 8), "context": (1, 8, 3584), "y": (1, 768)},
    ),
    "wan of width 260": (
        "WAN21_T2V",
        {"dim": 260, "ffn_dim": 260, "num_heads": 2, "num_layers": 2, "in_dim": 16, "out_dim": 16},
        "", {}, {"x": (1, 16, 2, 8, 8), "context": (1, 8, 4096)},
    ),
    "hunyuan 3d": (
        "Hunyuan3Dv2", {"hidden_size": 256, "depth": 1, "depth_single_blocks": 1},
        "model.",
        {"conditioner.main_image_encoder.model.encoder.layer.0.mlp.fc1.weight": (128, 64)},
        {"x": (1, 64, 16), "context": (1, 8, 1536)},
    ),
}  # fmt: skip


def random(shapes: dict) -> dict[str, torch.Tensor]:
    """Weights whose outputs are about as large as their inputs; norms near 1, biases near 0."""
    state = {}
    for key, shape in shapes.items():
        value = torch.randn(tuple(shape))
        if len(shape) > 1:
            value *= value[0].numel() ** -0.5
        else:
            value = 0.1 * value + ("norm" in key and key.endswith(("weight", "scale", "gamma")))
        state[key] = value.bfloat16()
    return state


def make(name: str) -> Path:
    kind, config, prefix, beside, _ = SMALL[name]
    model = build(kind, config, beside).diffusion_model
    shapes = {key: value.shape for key, value in as_stored(kind, model.state_dict()).items()}
    state = random({**{prefix + key: shape for key, shape in shapes.items()}, **beside})
    path = FOLDER / f"{name}.safetensors"
    save_file(state, path)
    return path


def build(kind: str, config: dict, beside: dict, state: dict | None = None):
    chosen = getattr(comfy.supported_models, kind)
    settings = chosen({**config, **chosen.unet_config})
    settings.quant_config = comfy.utils.detect_layer_quantization(state or {}, "")
    settings.set_inference_dtype(torch.float32, torch.float32 if settings.quant_config else None)
    return settings.get_model({k: torch.empty(shape) for k, shape in beside.items()}, "")


def load(name: str, path: Path):
    kind, config, _, beside, _ = SMALL[name]
    if kind == "PixelDiTT2I":  # known in one size alone, 1.3 billion parameters
        state, _ = comfy.utils.convert_old_quants(load_file(path), "", metadata={})
        model = build(kind, config, beside, state)
        return model.load_model_weights(state)
    if beside:
        patcher = comfy.sd.load_checkpoint_guess_config(
            str(path), output_vae=False, output_clip=False
        )[0]
    else:
        patcher = comfy.sd.load_diffusion_model(str(path))
    return patcher.model


def run(model, inputs: dict) -> torch.Tensor:
    torch.manual_seed(1)
    dtype = model.get_dtype_inference()
    given = {name: torch.randn(shape).to(dtype) for name, shape in inputs.items()}
    with torch.inference_mode():
        return model.diffusion_model(given.pop("x"), torch.tensor([0.5], dtype=dtype), **given)


def main() -> None:
    torch.manual_seed(0)
    results = {}
    for name, (_, _, _, beside, inputs) in SMALL.items():
        source = make(name)
        target = source.with_suffix(".mxfp8.safetensors")
        convert_file(source, target)
        before, after = load(name, source), load(name, target)
        expected, got = (run(model, inputs).float() for model in (before, after))
        stored = load_file(source), load_file(target)
        results[name] = {
            "difference": float((got - expected).norm() / expected.norm()),
            "marked": len(read_header(target).layers),
            "quantized": sum(
                isinstance(getattr(module, "weight", None), QuantizedTensor)
                for module in after.diffusion_model.modules()
            ),
            "changed": [k for k in beside if not torch.equal(*(state[k] for state in stored))],
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
