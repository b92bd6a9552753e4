"""Small models of ComfyUI's classes: stock recognizes and runs what was written of their files, and
of the loaded models where files have more, or other names, than the model in memory."""

from __future__ import annotations

import pytest
from comfyui import ask

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

BOTH = ("pixeldit", "stable audio", "stable audio 3")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What became of each model."""
    return ask("small_models.py", tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("name", [*BOTH, "kandinsky 5 video", "wan of width 260", "hunyuan 3d"])
def test_a_converted_file_runs_as_the_original(results, name):
    result = results[name]["converted"]
    assert 0.003 < result["difference"] < 0.1  # rounding to E4M3 in each of a few layers: 3%
    assert result["quantized"] == result["marked"] > 0
    assert result["changed"] == []


@pytest.mark.parametrize("name", BOTH)
def test_a_loaded_model_runs_as_the_original(results, name):
    result = results[name]["loaded"]
    assert 0.003 < result["quantized"] < 0.1
    assert result["saved"] == pytest.approx(result["quantized"], abs=1e-5)
    assert result["unchanged"] == 0


@pytest.mark.parametrize("name", [*BOTH, "causal wan", "flow wan"])
def test_it_is_taken_for_what_it_was(results, name):
    assert len(set(results[name]["loaded"]["classes"])) == 1
    assert results[name]["loaded"]["beside"] is True


def test_a_calibration_goes_by_the_names_in_memory(results):
    result = results["pixeldit"]["loaded"]
    assert result["calibrated"] == result["planned"] > 10


def test_a_model_that_stock_would_take_for_another_is_refused(results):
    """Before any work."""
    assert len(results["unknown"]["errors"]) == 2
    assert all("would take it for WAN21_FlowRVS" in e for e in results["unknown"]["errors"])
    assert results["unknown"]["files"] == 0
