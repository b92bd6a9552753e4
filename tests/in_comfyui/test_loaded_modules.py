"""Parts of files that ComfyUI builds without quantized layers never run raw codes."""

from __future__ import annotations

import pytest
from comfyui import ask

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return ask("loaded_modules.py", tmp_path_factory.mktemp("encoders"))


def test_files_come_in_the_order_that_comfyui_needs(results):
    """ACE-Step 1.5 has two language models, and ComfyUI asks the first if both are quantized."""
    assert set(results["off"]) == {"small first", "large first", "accelerated"}
    # Seven layers in a row, each off by 0.03.
    assert all(0.01 < off < 0.1 for off in results["off"].values())


QUERIES = "model.layers.0.self_attn.q_proj"
TEXT = "cond_stage_model.transformer.encoder.layers.0."
VAE = "first_stage_model.down_blocks.0.channelwise.0"
ORIGINAL = "use the original of this file"


@pytest.mark.parametrize(
    ("case", "layer", "remedy"),
    [
        ("order, accelerated", QUERIES, "load these files with Load Text Encoder (MXFP8)"),
        ("sibling", QUERIES, ORIGINAL),
        ("sibling, accelerated", QUERIES, ORIGINAL),
        ("renamed", "transformer.resblocks.0.attn.out_proj", ORIGINAL),
        ("renamed, in E5M2", "transformer.resblocks.0.attn.out_proj", ORIGINAL),
        ("renamed, accelerated", "transformer.resblocks.0.attn.out_proj", ORIGINAL),
        ("head", "lm_head", "excluding '^lm_head'"),
        ("checkpoint", f"{TEXT}self_attn.q_proj", f"excluding '^{TEXT}'"),
        ("checkpoint, accelerated", f"{TEXT}self_attn.q_proj", f"excluding '^{TEXT}'"),
        ("VAE", VAE, f"excluding '^{VAE}'"),
    ],
)
def test_raw_codes_are_refused(results, case, layer, remedy):
    message = results["refused"][case]
    assert f"{layer!r}" in message and "raw codes" in message and remedy in message
    assert ("Load Text Encoder" in message) == (case == "order, accelerated")


def test_a_gpu_without_float8_is_refused_before_anything_is_loaded(results):
    """With what works there; a text encoder that ComfyUI keeps on the CPU is loaded."""
    found = results["on Apple"]
    assert found.pop("text encoder on the CPU") is None
    files = {"diffusion model": "sd1", "checkpoint": "sd1", "text encoder": "small"}
    for case, message in found.items():
        name = f"{files[case]}-mxfp8.safetensors" if case in files else "this BaseModel"
        assert message.startswith(f"{name} would be on the device mps in MXFP8"), case
        assert message.endswith("start ComfyUI with --cpu, or use the BF16 or FP16 original")


def test_raw_codes_are_known_without_their_file(results):
    name = "clip_l.transformer.text_model.encoder.layers.0.self_attn.out_proj"
    assert f"{name!r} [64, 64]" in results["refused"]["unknown file"]


def test_another_shape_than_the_marker_says_is_refused(results):
    """The model that ComfyUI takes the padded layer for is not the one that was converted."""
    message = results["refused"]["shape"]
    assert QUERIES in message and "[250, 1024], but [256, 1024]" in message


BLOCK = "diffusion_model.input_blocks.1.1.transformer_blocks.0"


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("unknown name", ("model.layers.0.mlp.up", "model.layers.0.mlp.up_proj")),
        ("unknown name, accelerated", ("model.layers.0.mlp.up", "model.layers.0.mlp.up_proj")),
        ("unknown name in a UNet", (f"{BLOCK}.attn2.to_out", f"{BLOCK}.attn2.to_out.0")),
    ],
)
def test_a_layer_that_leaves_one_of_the_model_without_a_weight_is_refused(results, case, names):
    """ComfyUI would load it, and fail when it samples: 'NoneType' has no attribute 'device'."""
    assert all(f"{name}' " in results["refused"][case] for name in names)


@pytest.mark.parametrize(
    "case",
    ["BF16", "unknown BF16", "unknown FP8", "unknown scaled FP8", "unused head",
     "model of a checkpoint", "model of it, accelerated", "as a diffusion model"],
)  # fmt: skip
def test_plain_weights_and_parts_that_were_not_asked_for_pass(results, case):
    assert results["refused"][case] is None
