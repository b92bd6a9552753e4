"""A file is the same model in diffusers and in ComfyUI, whose code for it is another."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from checkpoints import load
from comfyui import ask
from diffusers_models import DTYPE, KINDS, distance, random, write
from safetensors.torch import save_file
from torch.utils._pytree import tree_map_only

from mxfp8.integrations.diffusers import MXFP8Config
from mxfp8.integrations.layers import LoadedLinear
from mxfp8.quant.format import read_header


def to_image(tokens: torch.Tensor, side: int = 2) -> torch.Tensor:
    """Of 4 x 4 tokens, each of `side` x `side` pixels, as ComfyUI cuts it."""
    pixels = tokens.reshape(1, 4, 4, -1, side, side).permute(0, 3, 1, 4, 2, 5)
    return pixels.reshape(1, -1, 4 * side, 4 * side)


@dataclass(frozen=True)
class Twin:
    """How ComfyUI runs a kind.

    Attributes:
        splits: how many layers diffusers makes more of a file's.
        sizes: of the configuration, which ComfyUI assumes. Flux.1 has its real ones already.
        image: diffusers' input or output -> ComfyUI's.
        given: other arguments in ComfyUI -> in diffusers.
        inputs: for these sizes.
    """

    splits: int
    sizes: dict
    image: Callable[[torch.Tensor], torch.Tensor]
    given: dict[str, str]
    inputs: dict = field(default_factory=dict)


HEADS = {"attention_head_dim": 128, "num_attention_heads": 2}
GIVEN = {"timestep": "timestep", "context": "encoder_hidden_states"}
FLUX2_TEXT = torch.zeros(7, 4)
FLUX2_TEXT[:, 3] = torch.arange(7)
TWINS = {
    "Flux.1": Twin(2 * 2 + 3, {}, to_image, {**GIVEN, "y": "pooled_projections"}),
    "Flux.2": Twin(
        2 * 2,
        {**HEADS, "in_channels": 128, "axes_dims_rope": [32] * 4},
        functools.partial(to_image, side=1),
        {**GIVEN, "guidance": "guidance"},
        {"hidden_states": random(1, 16, 128, seed=1), "txt_ids": FLUX2_TEXT},
    ),
    "Wan": Twin(0, HEADS, lambda image: image, GIVEN),
    "Qwen-Image": Twin(
        0,
        {**HEADS, "num_attention_heads": 24, "joint_attention_dim": 3584,
         "axes_dims_rope": [16, 56, 56]},
        lambda tokens: to_image(tokens).unsqueeze(2),
        GIVEN,
        {"encoder_hidden_states": random(1, 7, 3584, seed=2)},
    ),
    "Z-Image": Twin(
        5 * 2,
        {"dim": 3840, "n_heads": 30, "n_kv_heads": 30, "n_refiner_layers": 2,
         "axes_dims": [32, 48, 48]},
        lambda images: images[0].squeeze(1)[None],
        {"timesteps": "t", "context": "cap_feats"},
    ),
}  # fmt: skip
WIDE = ("Qwen-Image", "Z-Image")


@pytest.mark.slow
@pytest.mark.comfy
@pytest.mark.parametrize("name", [
    *(n for n in TWINS if n not in WIDE), *(pytest.param(n, marks=pytest.mark.long) for n in WIDE),
])  # fmt: skip
def test_a_file_is_the_same_model_in_both(name, tmp_path):
    """In float32 both compute the same up to the order of sums, some 1e-7 each, over 2 to 5 blocks
    and up to 3840 channels."""
    kind, twin = KINDS[name], TWINS[name]
    kind = replace(kind, config={**kind.config, **twin.sizes})
    found = write(kind, tmp_path)
    model = kind.cls.from_single_file(
        str(found.mxfp8),
        config=str(found.folder),
        quantization_config=MXFP8Config(precision="exact"),
        torch_dtype=torch.float32,
    )
    layers = sum(isinstance(layer, LoadedLinear) for layer in model.modules())
    assert layers == len(read_header(found.mxfp8).layers) + twin.splits >= 6
    inputs = tree_map_only(
        torch.Tensor,
        lambda tensor: tensor.float() if tensor.dtype == DTYPE else tensor,
        {**kind.inputs(), **twin.inputs},
    )
    with torch.no_grad():
        ours = twin.image(model(**inputs, return_dict=False)[0])

    given = {theirs: inputs[name] for theirs, name in twin.given.items()}
    given["x"] = twin.image(inputs["x" if name == "Z-Image" else "hidden_states"])
    if name == "Z-Image":  # in ComfyUI, time and output have the other direction
        given |= {"timesteps": 1 - given["timesteps"], "context": given["context"][0][None]}
        given["num_tokens"] = torch.tensor(7)
        ours = -ours
    save_file({k: v.contiguous() for k, v in given.items()}, tmp_path / "inputs.safetensors")
    ask("diffusers_twin.py", tmp_path)
    theirs = load(tmp_path / "output.safetensors")[0]["output"]
    assert distance(ours, theirs) < 1e-4
