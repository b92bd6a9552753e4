"""bench/emoji: twenty steps of training, in one run and in two; what the trained model draws."""

from __future__ import annotations

import os
import shutil
from statistics import mean

import demo_pictures
import numpy as np
import pictures
import pytest
import torch
from checkpoints import load
from comfyui import ROOT, ask, run_script

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


SCRIPT = ROOT / "bench" / "emoji" / "train.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The weights of an uninterrupted run, and of one that was stopped after 8 steps."""
    folder = tmp_path_factory.mktemp("emoji")
    outs = folder / "whole.safetensors", folder / "parts.safetensors"
    for out, steps in ((outs[0], 20), (outs[1], 8), (outs[1], 20)):
        printed = run_script(SCRIPT, "--out", out, "--steps", steps, "--batch", 4)
        assert f"step {steps}  loss" in printed
    return outs


def state(out) -> dict:
    return torch.load(out.with_name(out.name + ".training"), weights_only=True)


def test_the_loss_falls(runs):
    losses = state(runs[0])["losses"]
    assert len(losses) == 20
    assert mean(losses[-5:]) < 0.93 * mean(losses[:5]), losses  # found: 0.87


def test_a_run_that_was_stopped_goes_on_with_the_same_numbers(runs):
    whole, parts = map(state, runs)
    assert parts["losses"] == whole["losses"]
    for name in ("weights", "average"):
        assert all(map(torch.equal, parts[name], whole[name])), name
    expected, found = (load(out)[0] for out in runs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_another_seed_does_not_go_on_from_this_one(runs):
    with pytest.raises(AssertionError, match="with seed 0, not 1"):
        run_script(SCRIPT, "--out", runs[0], "--batch", 4, "--seed", 1)


@pytest.fixture(scope="module")
def found(runs):
    return ask("emoji_model.py", runs[0])


def test_comfyui_loads_what_was_trained(runs, found):
    weights = load(runs[0])[0]
    assert sum(w.numel() for w in weights.values()) < 6e6
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert runs[0].stat().st_size < 12e6
    assert found["difference"] < 1e-5  # float32, and another rotary embedding


def test_gradients_come_through_comfyuis_blocks(found):
    """Which add in place, and have a rotary embedding of which one version has no gradient."""
    assert len(found["slopes"]) == 4
    for part, slope in found["slopes"].items():
        assert abs(slope - 1) < 0.01, (part, slope)  # the step is not infinitely small: 0.001


def test_a_picture_survives_the_way_to_a_latent_and_back(found):
    assert found["pixels"] < 1 / 255  # rounding of the blend with white


@pytest.fixture(scope="module")
def variants(comfy):
    shutil.copy(demo_pictures.MODEL, comfy.base / "models" / "diffusion_models")
    return demo_pictures.draw_variants(comfy)


def test_the_trained_model_draws_what_the_prompts_name(variants):
    known = pictures.pixels(pictures.latents())
    drawn = variants[0].images
    for image, prompt in zip(drawn, demo_pictures.PROMPTS, strict=True):
        distances = (known - image).square().mean((1, 2, 3))
        assert pictures.NAMES[int(distances.argmin())] == prompt
        assert distances.min() < 0.01  # 20 dB


def test_the_prompts_that_the_benchmark_samples_are_encoded_as_trained():
    found, _ = load(demo_pictures.MODEL.with_name("emoji-prompts.safetensors"))
    wanted = dict(zip(("context", "pooled"), pictures.encode(pictures.NAMES[::16]), strict=True))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)  # sums in another order


def test_prompts_that_calibrate_are_not_drawn():
    assert not set(demo_pictures.PROMPTS) & set(demo_pictures.CALIBRATION)
    assert set(demo_pictures.PROMPTS) | set(demo_pictures.CALIBRATION) <= set(pictures.NAMES)


def test_calibrated_pictures_are_nearer_to_the_originals(variants):
    original, *others = variants
    assert {s.caption()[0] for s in original.similarities(original)} == {"identical"}
    nearest, calibrated, fast = (demo_pictures.mean_of(v.similarities(original)) for v in others)
    assert 35 < nearest.latent_snr_db < calibrated.latent_snr_db - 2
    # Where this CPU multiplies INT8, inputs are rounded too.
    assert nearest.latent_snr_db + 1 < fast.latent_snr_db <= calibrated.latent_snr_db
    assert nearest.psnr_db < calibrated.psnr_db
    assert nearest.ssim < calibrated.ssim <= 1


def test_the_sheet_shows_every_picture(variants):
    drawn = demo_pictures.draw_sheet(variants)
    if os.environ.get("MXFP8_KEEP_PICTURES"):  # for the README: `make gallery`
        drawn.save(ROOT / "docs" / "gallery" / "pictures.png", optimize=True)
    sheet = np.array(drawn)
    for variant in variants:
        for image in variant.images:
            pixels = (image * 255).round().byte().numpy().repeat(4, 0).repeat(4, 1)
            assert contains(sheet, pixels), variant.title


def contains(sheet: np.ndarray, picture: np.ndarray) -> bool:
    """Whether the picture is somewhere in the sheet, pixel by pixel."""
    rows, columns = picture.shape[:2]
    tops, lefts = np.nonzero((sheet == picture[rows // 2, columns // 2]).all(-1))
    return any(
        np.array_equal(sheet[y - rows // 2 :, x - columns // 2 :][:rows, :columns], picture)
        for y, x in zip(tops, lefts, strict=True)
        if y >= rows // 2 and x >= columns // 2
    )
