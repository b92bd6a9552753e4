"""Weights in a backend's form, in the real ComfyUI, by the INT8 of the CPU."""

from __future__ import annotations

import pytest
from comfyui import ask

pytestmark = pytest.mark.comfy


# Off exact by these: MXFP8 inputs and INT8 weights would be off by 0.03.
BY_INT8 = 1e-3, 0.015


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """What a small Flux holds and computes; see the script."""
    return ask("residency.py", tmp_path_factory.mktemp("residency"))


def test_a_prepared_weight_is_the_stored_one_for_everyone_else():
    results = ask("prepared_weights.py")
    assert len(results) > 50
    assert all(results.values()), results


def within(figures: dict, name: str, bounds: tuple[float, float]) -> None:
    low, high = bounds
    assert low < figures.pop(name) < high, name


@pytest.mark.slow
def test_a_model_holds_the_weights_that_its_precision_runs_on(held):
    figures = dict(held["precisions"])
    within(figures, "fast is off exact by", BY_INT8)
    assert set(figures.values()) == {True}, figures


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        "saving",
        "unloading",
        "failing",
        "hooks",
        "other_models",
        "compiled",
        "unpacked",
        "slots",
        "refused",
        "garbage",
        "freed",
    ],
)
def test_prepared_weights_do_not_show(held, part):
    assert held[part] and set(held[part].values()) == {True}, held[part]


@pytest.mark.slow
def test_loras_on_prepared_weights(held):
    figures = dict(held["loras"])
    within(figures, "a LoRA's effect", (0.05, 1))
    within(figures, "fast with a LoRA is off exact by", BY_INT8)
    assert set(figures.values()) == {True}, figures
    figures = dict(held["merging"])
    within(figures, "fast on a merged LoRA is off exact by", BY_INT8)
    assert set(figures.values()) == {True}, figures


@pytest.mark.slow
def test_layers_stay_exact_without_memory_and_where_a_form_would_change_them(held):
    figures = dict(held["limits"])
    smallest, largest = figures.pop("changes")
    assert 1e-3 < smallest <= largest < 0.01
    assert set(figures.values()) == {True}, figures
