"""bench/emoji/train.py: twenty steps, in one run and in two, and what ComfyUI loads of them."""

from __future__ import annotations

from statistics import mean

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
