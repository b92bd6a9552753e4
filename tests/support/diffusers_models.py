"""Small random diffusers models, their files under ComfyUI's names, and inputs for them.

Sizes are chosen so that nothing fits by chance: 160 rows are no whole tile of 128, 260 columns no
whole block of 32.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file

from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.sources.diffusers import comfy_names
from mxfp8.quant.sources.file import HEADER_DTYPES

HEAD = 80
WIDTH = 2 * HEAD
TEXT = 48
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Kind:
    """A model class with a small configuration.

    Attributes:
        inputs: makes the keyword arguments of `forward`.
        names: diffusers' state dict -> ComfyUI's.
    """

    cls: type
    config: dict
    inputs: Callable[[], dict]
    names: Callable[[dict], dict]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


def _joined(state: dict) -> dict:
    """By the converter's own tables, which tests/quant/test_diffusers.py checks."""
    infos = {k: (HEADER_DTYPES[v.dtype], tuple(v.shape)) for k, v in state.items()}
    _, parts = comfy_names("model", infos)
    return {
        key: torch.cat([state[p.key][p.first : p.last] for p in joined])
        for key, joined in parts.items()
    }


_WAN = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    (r"^scale_shift_table", "head.modulation"),
    (r"\.scale_shift_table", ".modulation"),
    (r"^proj_out", "head.head"),
    ("attn1", "self_attn"), ("attn2", "cross_attn"), (r"to_out\.0", "o"),
    (r"to_(q|k|v)\.", r"\1."), (r"ffn\.net\.0\.proj", "ffn.0"), (r"ffn\.net\.2", "ffn.2"),
    (r"\.norm2", ".norm3"),
)  # fmt: skip


def _wan_names(state: dict) -> dict:
    result = {}
    for key, value in state.items():
        for pattern, text in _WAN:
            key = re.sub(pattern, text, key)
        result[key] = value
    return result


def _tokens(**more) -> dict:
    return {
        "hidden_states": random(1, 16, 64, seed=1),
        "encoder_hidden_states": random(1, 7, TEXT, seed=2),
        "timestep": torch.tensor([0.5], dtype=DTYPE),
        **more,
    }


def _ids(axes: int) -> dict:
    image = torch.zeros(16, axes)
    image[:, 1], image[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return {"img_ids": image, "txt_ids": torch.zeros(7, axes)}


_HEADS = {"attention_head_dim": HEAD, "num_attention_heads": 2, "num_layers": 1}

KINDS = {
    "Z-Image": Kind(
        diffusers.ZImageTransformer2DModel,
        {"in_channels": 16, "dim": WIDTH, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2,
         "n_kv_heads": 2, "cap_feat_dim": TEXT, "axes_dims": [16, 32, 32],
         "axes_lens": [64, 64, 64]},
        lambda: {
            "x": [random(16, 1, 8, 8, seed=1)],
            "t": torch.tensor([0.5], dtype=DTYPE),
            "cap_feats": [random(7, TEXT, seed=2)],
        },
        _joined,
    ),
    "Flux.1": Kind(
        diffusers.FluxTransformer2DModel,
        # Diffusers splits this model's tensors at the real width, and only there.
        {"attention_head_dim": 128, "num_attention_heads": 24, "num_layers": 1,
         "in_channels": 64, "num_single_layers": 1, "joint_attention_dim": TEXT,
         "pooled_projection_dim": 32, "axes_dims_rope": [16, 56, 56]},
        lambda: _tokens(pooled_projections=random(1, 32, seed=3), **_ids(3)),
        _joined,
    ),
    "Flux.2": Kind(
        diffusers.Flux2Transformer2DModel,
        {**_HEADS, "in_channels": 64, "num_single_layers": 1, "joint_attention_dim": TEXT,
         "axes_dims_rope": [8, 24, 24, 24]},
        lambda: _tokens(guidance=torch.tensor([4.0], dtype=DTYPE), **_ids(4)),
        _joined,
    ),
    "Qwen-Image": Kind(
        diffusers.QwenImageTransformer2DModel,
        {**_HEADS, "in_channels": 64, "out_channels": 16, "joint_attention_dim": TEXT,
         "axes_dims_rope": [16, 32, 32]},
        lambda: _tokens(
            encoder_hidden_states_mask=torch.ones(1, 7, dtype=torch.bool),
            img_shapes=[[(1, 4, 4)]],
        ),
        dict,
    ),
    "Wan": Kind(
        diffusers.WanTransformer3DModel,
        {**_HEADS, "in_channels": 16, "out_channels": 16, "text_dim": TEXT, "ffn_dim": 260},
        lambda: {
            "hidden_states": random(1, 16, 1, 8, 8, seed=1),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": random(1, 7, TEXT, seed=2),
        },
        _wan_names,
    ),
}  # fmt: skip


_POOL = random(1 << 20, seed=5)


def _values(key: str, shape: torch.Size) -> torch.Tensor:
    """Random weights, which keep the size of what they multiply, from one pool of values."""
    count = shape.numel()
    if "norm" in key and len(shape) == 1 and key.endswith("weight"):
        return torch.ones(shape, dtype=DTYPE)
    start = len(key) * 1009 % (1 << 19)
    values = _POOL[start:].repeat(count // (1 << 19) + 1)[:count].reshape(shape)
    return (values * (0.02 if len(shape) < 2 else shape[1:].numel() ** -0.5)).to(DTYPE)


@dataclass(frozen=True)
class Files:
    """A model's files: a folder with its config.json, and ComfyUI's files, BF16 and MXFP8."""

    folder: Path
    original: Path
    mxfp8: Path


def write(kind: Kind, folder: Path, prefix: str = "") -> Files:
    """A random model as ComfyUI has it, and that converted."""
    with torch.device("meta"):
        model = kind.cls.from_config(kind.config)
    state = {key: _values(key, value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.save_config(folder)
    original, target = folder / "original.safetensors", folder / "mxfp8.safetensors"
    names = {prefix + key: value.clone() for key, value in kind.names(state).items()}
    save_file(names, original)
    convert_file(original, target)
    return Files(folder, original, target)


@torch.no_grad()
def output(model, kind: Kind) -> torch.Tensor:
    """What a model makes of the inputs, in float32."""
    result = model(**kind.inputs(), return_dict=False)[0]
    return (result[0] if isinstance(result, list) else result).float()


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative."""
    return float((found - wanted).norm() / wanted.norm())
