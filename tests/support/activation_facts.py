"""What ComfyUI's classes say of the memory that sampling takes: quant/advice/memory.py, as JSON.

    python tests/support/activation_facts.py COMFYUI

For every row: [memory_usage_factor, pixels, frames], and [bytes for one latent of 3 x 4 pixels].
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import comfyui_modules  # noqa: F401

# isort: split
import comfy.model_base
import comfy.model_management
import comfy.supported_models
import torch

from mxfp8.quant.advice.memory import ACTIVATIONS

WIDTHS = {"Flux2": ("hidden_size", 3072), "WAN21_T2V": ("dim", 5120)}


def main() -> None:
    comfy.model_management.xformers_enabled = lambda: False
    comfy.model_management.pytorch_attention_flash_attention = lambda: True
    found = {}
    for name, row in ACTIVATIONS.items():
        kind = getattr(comfy.supported_models, row.kind)
        key, width = WIDTHS.get(row.kind, ("hidden_size", 1024))
        factor = kind({key: width, "image_model": ""}).memory_usage_factor
        latent = kind.latent_format
        frames = latent.temporal_downscale_ratio if latent.latent_dimensions == 3 else None
        model = SimpleNamespace(
            memory_usage_factor=factor, memory_usage_factor_conds=(),
            get_dtype_inference=lambda: torch.bfloat16,
        )  # fmt: skip
        shape = (1, 16, 1, 3, 4) if frames else (1, 16, 3, 4)
        needed = comfy.model_base.BaseModel.memory_required(model, shape)
        found[name] = [factor, latent.spacial_downscale_ratio, frames, needed]
    least = comfy.model_management.minimum_inference_memory()
    print(json.dumps({"rows": found, "least": least}))


main()
