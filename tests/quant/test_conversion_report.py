"""The report: JSON that comes back as it was, versions, and the summary for people."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mxfp8.quant.conversion.calibration import calibrate
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.conversion.policy import Selection
from mxfp8.quant.reports.conversion import (
    Block,
    LayerReport,
    Report,
    SqnrAccumulator,
    format_seconds,
    format_size,
    sqnr_db,
    total_sqnr,
)
from mxfp8.quant.reports.verdict import LATENTS, WEIGHTS, Verdict


def layer(name="a", decision="mxfp8", **changes) -> LayerReport:
    values = {"sqnr_db": 31.5, "worst_block": Block(7, 2, 24.6)} if decision == "mxfp8" else {}
    return LayerReport(
        name, decision, "linear layer", "BF16", (33, 100), 6600, 4700, **{**values, **changes}
    )


LOSSLESS = layer("zero", sqnr_db=None, worst_block=None)
REPORT = Report(
    source="model.safetensors",
    target="model-mxfp8.safetensors",
    preset="zimage",
    architecture="Z-Image",
    bytes_before=12_310_000_000,
    bytes_after=6_360_000_000,
    seconds=12.34,
    sqnr_db=31.25,
    layers=(layer("a"), layer("b", sqnr_db=29.75), LOSSLESS, layer("c", "kept")),
)


@pytest.mark.parametrize(
    "report", [REPORT, replace(REPORT, architecture=None, sqnr_db=None, layers=(LOSSLESS,))]
)
def test_json_comes_back_as_it_was(report):
    assert Report.from_json(report.to_json()) == report


def test_json_names_its_version_and_every_field():
    data = json.loads(REPORT.to_json())
    assert data.pop("mxfp8_report") == 1
    assert data.keys() == Report.__dataclass_fields__.keys() | {"verdict"}
    assert data["layers"][0] == {
        "name": "a",
        "decision": "mxfp8",
        "reason": "linear layer",
        "dtype": "BF16",
        "shape": [33, 100],
        "bytes_before": 6600,
        "bytes_after": 4700,
        "sqnr_db": 31.5,
        "worst_block": {"row": 7, "block": 2, "sqnr_db": 24.6},
        "output_error": None,
        "nearest_error": None,
    }


def test_a_calibration_shows_in_the_summary():
    layers = (layer("a", output_error=0.01, nearest_error=0.02), layer("b"))
    summary = replace(REPORT, layers=layers).summary()
    assert "1 layer calibrated: layer output error 0.50x of nearest rounding" in summary
    assert "calibrated" not in REPORT.summary()


def test_calibrated_layers_without_held_out_data_show_in_the_summary():
    about = {**CALIBRATION, "rounded_layers": 2, "held_out": CALIBRATION}
    layers = (layer("a", output_error=0.01, nearest_error=0.02), layer("b"))
    summary = replace(REPORT, layers=layers, calibration=about).summary()
    assert "output error measured on 1 of 2 calibrated layers: layer output error 0.50x" in summary
    summary = replace(REPORT, layers=layers[1:], calibration=about).summary()
    assert "output error measured on 0 of 2 calibrated layers\n" in summary


CALIBRATION = {"model": "ab", "layers": 2, "least_rows": 64}
RUN = {"first_seed": 100, "seeds": 2, "steps": 8, "sampler": "euler"}


@pytest.mark.parametrize(
    ("about", "line"),
    [
        (RUN, "calibrated on seeds 100 to 101, 8 steps each, at least 64 rows per layer"),
        ({}, "calibrated on at least 64 rows per layer"),
        ({**RUN, "steps": "8\x1b[2J"}, "calibrated on at least 64 rows per layer"),
    ],
)
def test_a_report_says_what_was_sampled_for_it_and_which_layers_were_asked_for(about, line):
    report = replace(REPORT, include="a", exclude="b", calibration={**about, **CALIBRATION})
    assert Report.from_json(report.to_json()) == report
    assert report.summary().splitlines()[-1] == line


def test_a_conversion_says_what_it_was_given(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 32)).eval()
    save_file(net.state_dict(), tmp_path / "source")
    calibration = calibrate(net, [torch.ones(7, 64)], lambda module, batch: module(batch))
    report = convert_file(
        tmp_path / "source", tmp_path / "target", Selection(include="0", exclude="nothing"),
        calibration=replace(calibration, about=RUN),
    )  # fmt: skip
    assert (report.include, report.exclude) == ("0", "nothing")
    expected = {
        **RUN,
        "model": calibration.model,
        "layers": 2,
        "least_rows": 7,
        "rounded_layers": 2,
    }
    assert report.calibration == expected
    assert "calibrated on seeds 100 to 101, 8 steps each, at least 7 rows" in report.summary()
    plain = convert_file(tmp_path / "source", tmp_path / "plain")
    assert (plain.include, plain.exclude, plain.calibration) == (None, None, None)


def test_a_report_from_before_there_were_these_fields_is_read():
    data = json.loads(REPORT.to_json())
    for name in ("include", "exclude", "calibration"):
        del data[name]
    assert Report.from_json(json.dumps(data)) == REPORT
    with pytest.raises(ValueError, match="calibration is not of type dict"):
        Report.from_json(json.dumps({**data, "calibration": ["euler"]}))


def test_lossless_is_null():
    entry = json.loads(REPORT.to_json())["layers"][2]
    assert (entry["sqnr_db"], entry["worst_block"]) == (None, None)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "7", '{"mxfp8_report": 2, "layers": []}', '{"mxfp8_report": null}'],
)
def test_anything_but_a_report_of_this_version_is_refused(text):
    with pytest.raises(ValueError):
        Report.from_json(text)


@pytest.mark.parametrize("drop", ["layers", "source"])
def test_a_report_with_a_field_missing_is_refused(drop):
    data = json.loads(REPORT.to_json())
    del data[drop]
    with pytest.raises(ValueError, match=drop):
        Report.from_json(json.dumps(data))


def test_a_number_json_cannot_hold_is_refused():
    with pytest.raises(ValueError):
        replace(REPORT, sqnr_db=float("inf")).to_json()


def test_the_worst_layer_is_the_lossy_one_with_the_lowest_sqnr():
    assert REPORT.worst.name == "b"
    assert [entry.name for entry in REPORT.quantized] == ["a", "b", "zero"]
    assert replace(REPORT, layers=(LOSSLESS, layer("c", "kept"))).worst is None


def test_the_summary_says_what_matters():
    assert REPORT.summary().splitlines() == [
        "12.3 GB -> 6.36 GB, saves 5.95 GB; typical",
        "model.safetensors -> model-mxfp8.safetensors, 51.7% of the size, in 12.3 s",
        "3 layers MXFP8, 1 not quantized (preset zimage, Z-Image)",
        "SQNR 31.25 dB; worst layer b: 29.75 dB",
    ]


def test_the_summary_of_a_lossless_unrecognized_model():
    report = replace(REPORT, architecture=None, sqnr_db=None, layers=(LOSSLESS,))
    assert report.summary().splitlines()[2:] == [
        "1 layer MXFP8, 0 not quantized (preset zimage, architecture not recognized)"
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (2_340_000, "2.34 MB"), (10**9, "1.00 GB")],
)
def test_sizes_are_in_decimal_units(count, text):
    assert format_size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(6.4e-5, "64.0 us"), (0.643, "643 ms"), (0.9996, "1.00 s"), (12.34, "12.3 s"),
     (125, "2 min 05 s")],
)  # fmt: skip
def test_times_have_the_unit_that_fits(seconds, text):
    assert format_seconds(seconds) == text


def test_layers_that_stand_out_are_in_the_verdict_worst_first():
    """Below the median by 3 dB, each kind of rounding by itself; calibrated layers have less."""
    layers = [layer(f"a{i}", sqnr_db=31.5) for i in range(9)]
    layers += [layer(f"c{i}", sqnr_db=28.0, output_error=0.01, nearest_error=0.02)
               for i in range(5)]  # fmt: skip
    assert replace(REPORT, layers=tuple(layers)).verdict.layers == ()
    layers += [layer("bad", sqnr_db=28.4), layer("worse", sqnr_db=24.0)]
    report = replace(REPORT, layers=tuple(layers[:9] + layers[-2:]))
    assert report.verdict == Verdict(
        "notice",
        "12.3 GB -> 6.36 GB, saves 5.95 GB; typical; look at these 2 layers",
        ("worse", "bad"),
    )
    assert report.summary().splitlines()[0].endswith("look at these 2 layers: worse, bad")
    assert json.loads(report.to_json())["verdict"]["layers"] == ["worse", "bad"]


def test_the_documentation_has_the_words_and_their_reasons():
    root = Path(__file__).resolve().parents[2]
    text = (root / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    for word in (*LATENTS, *WEIGHTS):
        least = f" {word.at_least:g} dB" if word.at_least > 0 else ""
        assert f"| {word.word} |{least} | {word.reason} |" in text


@pytest.mark.parametrize(
    ("changes", "level", "ends"),
    [
        ({"sqnr_db": 29.9}, "notice", "; noisier than usual"),
        ({"sqnr_db": 24.5}, "bad", "; damaged"),
        ({"sqnr_db": None}, "good", "; lossless"),
        ({"layers": ()}, "notice", "; no layer was quantized"),
        ({"bytes_after": 12_400_000_000}, "good", "12.3 GB -> 12.4 GB; typical"),
    ],
)
def test_the_words_of_the_verdict(changes, level, ends):
    verdict = replace(REPORT, **changes).verdict
    assert verdict.level == level and verdict.text.endswith(ends)


def test_a_calibrated_report_says_what_its_error_was_measured_on():
    layers = (layer("a", output_error=0.01, nearest_error=0.02),)
    inside = replace(REPORT, layers=layers, calibration=CALIBRATION)
    text = "calibrated, 0.50x the output error of nearest rounding"
    assert inside.verdict.text.endswith(f"; {text} (in-sample)")
    outside = replace(inside, calibration={**CALIBRATION, "held_out": CALIBRATION})
    assert outside.verdict.text.endswith(f"; {text}") and outside.verdict.level == "good"


@pytest.mark.parametrize(
    ("signal", "noise", "value"),
    [(1000.0, 1.0, 30.0), (1.0, 1.0, 0.0), (5.0, 0.0, None), (0.0, 0.0, None)],
)
def test_sqnr_in_db_is_none_without_noise(signal, noise, value):
    assert sqnr_db(signal, noise) == value


def add(energy, first_row, signal, noise) -> SqnrAccumulator:
    energy.add(first_row, torch.tensor(signal).double(), torch.tensor(noise).double())
    return energy


def test_layers_add_up_by_energy_not_by_db():
    exact = add(SqnrAccumulator(), 0, [[900.0]], [[0.0]])
    lossy = add(SqnrAccumulator(), 0, [[100.0]], [[10.0]])
    assert total_sqnr([exact, lossy]) == pytest.approx(20.0)
    assert total_sqnr([exact]) is None
    assert total_sqnr([]) is None


def test_the_worst_block_is_relative_to_its_own_size_over_all_slabs():
    energy = add(SqnrAccumulator(), 0, [[1e6, 1.0], [1.0, 0.0]], [[10.0, 1e-2], [0.0, 0.0]])
    assert energy.worst == Block(0, 1, pytest.approx(20.0))
    add(energy, 128, [[1.0, 1.0]], [[1e-3, 1e-1]])
    assert energy.worst == Block(128, 1, pytest.approx(10.0))
    add(energy, 256, [[1.0, 1.0]], [[1e-3, 1e-2]])
    assert energy.worst == Block(128, 1, pytest.approx(10.0))
    assert energy.sqnr_db == pytest.approx(sqnr_db(1e6 + 6, 10.122))
