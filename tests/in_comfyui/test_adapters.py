"""LoRAs beside a weight compute what ComfyUI's merging of them does, in every kind and order."""

from __future__ import annotations

import pytest
from comfyui import ask
from lora_kinds import KINDS

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


@pytest.fixture(scope="module")
def results():
    return ask("side_branches.py")


def test_every_kind_place_strength_and_order_equals_merging(results):
    exact = results["exact"]
    assert len(exact) > 700
    assert all(any(name.startswith(kind) for name in exact) for kind in KINDS)
    assert {name: share for name, share in exact.items() if not share <= 1} == {}


def test_rounding_costs_no_more_than_its_dtype_does(results):
    """In FP16 factors of 1e-10 and deltas of 1e-6 too, which would be zeros or subnormal."""
    rounded = results["rounded"]
    assert sum(name.startswith("small") for name in rounded) == 4
    assert {name: share for name, share in rounded.items() if not share <= 1} == {}


def test_what_does_not_fit_is_named_and_changes_nothing(results):
    for name, problems in results["misfits"].items():
        if name == "bias":
            assert all("[128] do not fit the shape [96]" in problem for problem in problems)
            continue
        before, problem, after = problems
        assert before is None and after is None, name
        assert problem and ("[96, 64]" in problem or "alpha" in problem), name


def test_errors_that_are_not_the_loras_rise(results):
    """A CUDA error, a failed allocation or what a function raises is taken for no misfit."""
    assert results["errors_of_the_machine"]
    assert all(results["errors_of_the_machine"].values()), results["errors_of_the_machine"]


def test_what_has_no_side_form_is_left_to_comfyui_with_all_before_it(results):
    beside = results["left_to_stock"].pop("beside")
    assert beside == 0
    assert set(results["left_to_stock"].values()) == {2}


def test_loras_take_the_bytes_of_their_factors(results):
    sizes = results["sizes"]
    for name in ("eight", "slices"):
        held, own = sizes[name]
        assert held == own
    for held, own, beyond, _ in sizes["own"]:
        assert held == own and beyond == 0
    for held, own, beyond, fits in sizes["larger"]:
        assert held <= 4 * own and beyond == held - own > 0 and fits == [True, False]
    assert sizes["modules"] <= 4  # one `down` and one `up`, and empty lists
    assert sizes["dense"] == [True, False]
