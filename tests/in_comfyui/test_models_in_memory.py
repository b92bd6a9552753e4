"""Quantize and save loaded models whose files have more, or other names, than the model in memory:
stock ComfyUI recognizes and runs what was written."""

from __future__ import annotations

import pytest
from comfyui import ask

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What became of each model."""
    return ask("models_in_memory.py", tmp_path_factory.mktemp("memory"))


@pytest.mark.parametrize("name", ["pixeldit", "stable audio", "stable audio 3"])
def test_it_runs_as_the_original(results, name):
    result = results[name]
    assert 0.003 < result["quantized"] < 0.1  # rounding to E4M3 in each of a few layers: 3%
    assert result["saved"] == pytest.approx(result["quantized"], abs=1e-5)
    assert result["unchanged"] == 0


@pytest.mark.parametrize(
    "name", ["pixeldit", "stable audio", "stable audio 3", "causal wan", "flow wan"]
)
def test_it_is_taken_for_what_it_was(results, name):
    assert len(set(results[name]["classes"])) == 1
    assert results[name]["beside"] is True


def test_a_calibration_goes_by_the_names_in_memory(results):
    assert results["pixeldit"]["calibrated"] == results["pixeldit"]["planned"] > 10


def test_a_model_that_stock_would_take_for_another_is_refused(results):
    """Before any work."""
    assert len(results["unknown"]["errors"]) == 2
    assert all("would take it for WAN21_FlowRVS" in e for e in results["unknown"]["errors"])
    assert results["unknown"]["files"] == 0
