"""LoRAs on a small text encoder, beside the weights and merged by stock in float32 into what those
stand for.

    python tests/support/lora_encoders.py COMFYUI FOLDER

Prints a JSON object: the relative "difference" of what the encoder makes of eight tokens, by the
way that it was loaded, and the "effect" of the LoRAs.
"""

from __future__ import annotations

import json
import logging
import os

from comfyui_modules import FOLDER

# isort: split
import comfy.lora
import comfy.sd
import torch
from comfy.sd import CLIPType
from graphs import difference
from loaded_modules import options, paths, qwen
from lora_kinds import KINDS, lora_file
from safetensors.torch import load_file, save_file

from mxfp8 import kernels
from mxfp8.nodes.models.load import load_text_encoder
from mxfp8.nodes.runtime.patch import accelerate_clip

KIND = CLIPType.STABLE_DIFFUSION
PART = "qwen3_06b"
WAYS = ("text_encoders.", "lora_te_")


def settings() -> dict:
    return {**options({}), "dtype": torch.float32}


def stock(name: str):
    return comfy.sd.load_clip(paths([name]), None, KIND, settings())


def states(encoder) -> torch.Tensor:
    encoder.load_model()
    transformer = getattr(encoder.cond_stage_model, PART).transformer
    return transformer(torch.arange(8)[None])[0].float()


def file(encoder, way: str, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA file with another kind of adapter on each layer."""
    kinds = [kind for kind in KINDS if kind not in ("diff", "set", "diff_b")]
    state, tensors = encoder.cond_stage_model.state_dict(), {}
    named = comfy.lora.model_lora_keys_clip(encoder.cond_stage_model, {})
    for index, (name, key) in enumerate(named.items()):
        inside = ".layers." in key and state[key].ndim == 2
        if not name.startswith(way) or not inside:
            continue
        kind = kinds[(index + 5 * seed) % len(kinds)]
        made = lora_file({"layer.weight": state[key]}, kind, norm=0.05, seed=100 * seed + index)
        tensors |= {k.replace("diffusion_model.layer", name, 1): v for k, v in made.items()}
    return tensors


@torch.inference_mode()
def main() -> None:
    logging.disable(logging.WARNING)
    os.chdir(FOLDER)
    qwen("qwen", 1024, norms=torch.float32)
    state = load_file("qwen-mxfp8.safetensors")
    for key in [key for key in state if f"{key}_scale" in state]:
        state[key] = kernels.dequantize(state[key], state.pop(f"{key}_scale"), torch.float32)
    save_file(state, "qwen-plain.safetensors")
    exact, quantized = stock("qwen-plain"), stock("qwen-mxfp8")
    ours = accelerate_clip(load_text_encoder(paths(["qwen-mxfp8"]), [], KIND, settings()))
    files = [file(exact, way, seed) for seed, way in enumerate(WAYS)]

    def stacked(encoder):
        for strength, tensors in zip((0.8, -0.5), files, strict=True):
            _, encoder = comfy.sd.load_lora_for_models(None, encoder, tensors, 0, strength)
        return encoder

    before, wanted = states(exact), states(stacked(exact))
    found = {"effect": difference(wanted, before), "difference": {}}
    for how, encoder, expected in (
        ("loaded by ours", stacked(ours), wanted),
        ("accelerated", stacked(accelerate_clip(quantized)), wanted),
        ("accelerated with LoRAs", accelerate_clip(stacked(quantized)), wanted),
        ("without them again", ours, before),
        ("with them again", stacked(ours), wanted),
    ):
        found["difference"][how] = difference(states(encoder), expected)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
