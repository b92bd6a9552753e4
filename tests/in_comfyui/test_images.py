"""bench/images.py in small: the trained image model, what is measured on it, and its results."""

from __future__ import annotations

import json

import images
import pytest
from comfyui import ask, run_script
from forms import FORMS

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def found():
    return ask("small_images.py")


@pytest.mark.slow
def test_only_what_is_replaced_changes_pictures(found):
    """SNR in dB; None is identical."""
    snr = found["to reference"]
    assert snr["same"] is None  # all layers replaced, by their own weights
    assert found["left on the model"] is None
    assert 35 < snr["nearest"] < 50
    assert snr["wrong"] < 20  # the codes of one layer of 19, moved by a row
    assert snr["another order"] < 5  # pictures are compared with those of their own seeds
    assert len(found["layers"]) == 19
    assert not [name for name in found["layers"] if "block" not in name]


@pytest.mark.slow
def test_exact_is_what_comfyui_samples_of_the_file(found):
    assert found["stock to ours"] > 120  # float32, sums in another order


@pytest.mark.slow
def test_calibration_helps_on_other_prompts_and_seeds(tmp_path):
    rows = "nearest/exact", "calibrated_8_prompts/exact"
    target = tmp_path / "images.json"
    run_script(images.__file__, "--pairs", 8, "--only", *rows, "--json", target)
    measured = json.loads(target.read_text("utf-8"))
    assert tuple(measured) == rows
    for row in measured.values():
        for figure in images.FIGURES:
            low, high = row["interval"][figure]
            assert low < row[figure] < high
    gain = measured[rows[1]]["difference"][rows[0]]
    for figure in images.FIGURES:
        assert gain["interval"][figure][0] > 0, figure
        mean = measured[rows[1]][figure] - measured[rows[0]][figure]
        assert abs(gain[figure] - mean) < 1e-9
    assert gain["latent_snr_db"] > 3


def test_prompts_to_test_on_are_not_those_of_the_calibration():
    assert not set(images.TEST) & set(images.CALIBRATION)
    assert set(images.TEST) | set(images.CALIBRATION) == set(images.NAMES)
    assert len(images.TEST) >= 64


def test_a_bound_that_is_missed_is_named():
    found = json.loads(images.RESULTS.read_text("utf-8"))["figures"]
    assert images.misses(found) == []
    difference = found["calibrated/mxfp8"]["difference"]["nearest/mxfp8"]
    difference["interval"]["latent_snr_db"][0] = 0.99
    (line,) = images.misses(found)
    assert line.startswith("calibrated/mxfp8 - nearest/mxfp8: from +0.99 dB")


def test_the_results_have_every_row():
    found = json.loads(images.RESULTS.read_text("utf-8"))["figures"]
    files = "nearest", "calibrated"
    assert {f"{file}/{form}" for file in files for form in FORMS} <= set(found)
    assert {name.partition("/")[0] for name in found} == {
        *files, "calibrated_8_prompts", "calibrated_8_seeds",
        "bf16", "fp8_scaled", "fp8_cast", "int8_convrot", "q8_0", "nvfp4",
    }  # fmt: skip
