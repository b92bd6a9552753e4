"""A comparison: statistics against known cases, JSON that comes back, numbers, the picture."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from checkpoints import load, matrix
from PIL import Image
from quantized_files import model, save
from safetensors.torch import save_file
from scipy import ndimage, stats

from mxfp8.quant.checks.inspect import inspect_file
from mxfp8.quant.cli import main
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.reports import comparison, metadata, metrics, page, plot
from mxfp8.quant.reports.adapters import AdapterUse
from mxfp8.quant.reports.comparison import (
    Comparison,
    Floor,
    Mean,
    Seed,
    Setting,
    Side,
    Step,
    fingerprint,
    mean_of,
)
from mxfp8.quant.reports.conversion import LayerReport, Report

VALUES = [31.9, 32.0, 31.0, 30.5]
SETTING = Setting(
    "euler", "simple", 3, 1.0, 1.0, (1, 16, 8, 8), "cpu", {"torch": "2.11.0", "ComfyUI": "0.30.0"}
)
COMPARISON = Comparison(
    reference=Side("Flux", {}, "cd" * 32, "BF16", 2.0, 14_000_000_000),
    model=Side("Flux", {"triton, exact": 52}, "ab" * 32, "BF16", 1.0, 8_100_000_000),
    setting=SETTING,
    latent_snr_db=mean_of(VALUES),
    psnr_db=Mean(38.0, 37.0, 39.0, 4),
    ssim=Mean(0.98, 0.97, 0.99, 4),
    floor=Floor(True, False),
    steps=tuple(Step(i + 1, 1 - i / 3, 0.01 * (i + 1), 0.02 * (i + 1)) for i in range(3)),
    seeds=tuple(Seed(i, False, value, 38.0, 0.98) for i, value in enumerate(VALUES)),
)
SAME = replace(
    COMPARISON,
    latent_snr_db=None,
    psnr_db=None,
    ssim=None,
    steps=tuple(Step(i + 1, 1.0, 0.0, 0.0) for i in range(3)),
    seeds=tuple(Seed(i, True) for i in range(4)),
)


# Enough seeds for an interval.
MANY = replace(
    COMPARISON,
    latent_snr_db=mean_of(2 * VALUES),
    seeds=tuple(Seed(i, False, value, 38.0, 0.98) for i, value in enumerate(2 * VALUES)),
)


def test_the_interval_of_equal_values_is_known_and_few_have_none():
    assert mean_of([7.0] * 8 + [None]) == Mean(7.0, 7.0, 7.0, 8)
    assert mean_of([0.0, 1.0, None]) == Mean(0.5, None, None, 2)
    assert mean_of([7.0]) == Mean(7.0, None, None, 1)
    assert mean_of([None]) is None and mean_of([]) is None


def test_the_interval_is_scipys_percentile_bootstrap():
    values = numpy.random.default_rng(3).normal(31, 1, 12)
    mean = mean_of(list(values))
    theirs = stats.bootstrap(
        (values,), numpy.mean, n_resamples=20_000, method="percentile", random_state=1
    ).confidence_interval
    # Quantiles of 10,000 means scatter by about 2% of their deviation, 0.3 here.
    assert (mean.low, mean.high) == pytest.approx(tuple(theirs), abs=0.04)
    assert mean.mean == pytest.approx(values.mean()) and mean == mean_of(list(values))


def test_the_interval_of_the_fewest_seeds_is_as_wide_as_it_says():
    """It holds the true mean of normal values about nine times in ten."""
    drawn = numpy.random.default_rng(5).normal(31, 1, (100, comparison.FEWEST))
    means = [mean_of(list(values)) for values in drawn]
    share = sum(mean.low <= 31 <= mean.high for mean in means) / len(means)
    assert share == pytest.approx(0.89, abs=0.09)  # three deviations of a share of 100
    few, many = mean_of([30.0, 32.0]), Mean(31, 30, 32, 10)
    assert comparison.interval(few, "dB") == "31.00 dB (mean, n = 2)"
    assert comparison.interval(mean_of([31.0]), "dB") == "31.00 dB"
    assert comparison.interval(many, "") == "31.0000 (95% bootstrap CI 30.0000 to 32.0000, n = 10)"


def test_snr_and_relative_difference_are_what_they_say():
    reference = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(2)) / 100
    ratio = float((reference.double() ** 2).sum() / (noise.double() ** 2).sum())
    other = reference.double() + noise.double()
    assert metrics.snr_db(reference, other) == pytest.approx(10 * math.log10(ratio), abs=1e-9)
    assert metrics.relative(reference, other) == pytest.approx(ratio**-0.5)
    assert metrics.snr_db(reference, reference) is None
    assert metrics.snr_db(torch.zeros(4), torch.ones(4)) is None
    assert metrics.relative(reference, reference) == 0


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([1.0, math.nan], "its latent holds NaN (1 of 2 values)"),
        ([math.inf, math.inf], "its latent holds Inf (2 of 2 values)"),
        ([0.0, 0.0], "its latent is all zero"),
        ([0.0, 1.0], None),
    ],
)
def test_a_latent_that_is_no_picture_is_named(values, problem):
    assert metrics.latent_problem(torch.tensor(values)) == problem


def test_a_black_image_is_named():
    assert metrics.image_problem(torch.full((1, 2, 2, 3), 0.001)) == "its image is black"
    assert metrics.image_problem(torch.full((1, 2, 2, 3), 0.1)) is None
    assert metrics.image_problem(torch.full((1, 2, 2, 3), math.nan)) is not None


def test_psnr_and_ssim_are_those_of_their_papers():
    """SSIM with scipy's Gaussian: deviation 1.5, 11 pixels, mirrored edges, per channel."""
    generator = torch.Generator().manual_seed(4)
    image = torch.rand(1, 32, 40, 3, generator=generator)
    other = (image + 0.1 * torch.randn(image.shape, generator=generator)).clamp(0, 1)
    psnr, ssim = metrics.quality(image, other)
    error = float((image - other).double().square().mean())
    assert psnr == pytest.approx(-10 * math.log10(error), abs=1e-6)

    def smooth(x):
        return ndimage.gaussian_filter(x, (1.5, 1.5, 0), truncate=5 / 1.5, mode="mirror")

    x, y = (i[0].double().numpy() for i in (image, other))
    mx, my = smooth(x), smooth(y)
    vx, vy, c = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
    expected = (2 * mx * my + 1e-4) * (2 * c + 9e-4) / (
        (mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)
    )  # fmt: skip
    assert ssim == pytest.approx(expected.mean(), abs=1e-5)
    assert metrics.quality(image, image) == (None, pytest.approx(1.0, abs=1e-6))
    with pytest.raises(ValueError, match="smaller than SSIM's window"):
        metrics.quality(image[:, :8], image[:, :8])


LORAS = (
    AdapterUse(("LoRA", "diff"), (4, 32), 0.5, 30, 6, {"beside the weight: low rank": 30}, 9000),
    AdapterUse(("merged model",), (), None, 36, 0, {"merged by ComfyUI: other weights": 36}, 0),
)
WITH_LORAS = replace(COMPARISON, model=replace(COMPARISON.model, adapters=LORAS))


@pytest.mark.parametrize(
    "record", [COMPARISON, SAME, WITH_LORAS, replace(COMPARISON, floor=None, notes=("a", "b"))]
)
def test_json_comes_back_as_it_was(record):
    assert Comparison.from_json(record.to_json()) == record


def test_a_comparison_from_before_loras_were_listed_is_read():
    data = json.loads(COMPARISON.to_json())
    for side in ("reference", "model"):
        assert data[side].pop("adapters") == []
    assert Comparison.from_json(json.dumps(data)) == COMPARISON


def test_the_loras_of_each_side_are_said():
    lines = WITH_LORAS.summary().splitlines()
    assert lines[1].startswith("Flux (52 MXFP8 layers on triton, exact; BF16; 2 LoRAs) against ")
    said = [line for line in lines if ": changes " in line]
    assert said == [f"model: {use.line()}" for use in LORAS]


def test_on_a_cpu_there_is_no_peak_memory():
    record = replace(COMPARISON, model=replace(COMPARISON.model, peak_bytes=None))
    assert "1.00 s per run, peak memory not available on a CPU" in record.summary()


def test_json_names_its_version_its_steps_and_its_seeds():
    data = json.loads(COMPARISON.to_json())
    assert data.pop("mxfp8_comparison") == 1
    assert data.keys() == Comparison.__dataclass_fields__.keys() | {"verdict"}
    assert data["steps"][1] == {"step": 2, "sigma": 1 - 1 / 3, "divergence": 0.02, "worst": 0.04}
    assert data["seeds"][3]["latent_snr_db"] == 30.5
    assert json.loads(SAME.to_json())["seeds"][0]["latent_snr_db"] is None


def changed(change) -> str:
    data = json.loads(COMPARISON.to_json())
    change(data)
    return json.dumps(data)


DAMAGED = {
    "nothing": "",
    "no object": "[]",
    "another version": changed(lambda d: d.update(mxfp8_comparison=2)),
    "a field less": changed(lambda d: d.pop("steps")),
    "a field more": changed(lambda d: d.update(more=1)),
    "text for a number": changed(lambda d: d["seeds"][0].update(latent_snr_db="31")),
    "true for a number": changed(lambda d: d["setting"].update(steps=True)),
    "an object for a list": changed(lambda d: d.update(seeds={})),
    "a list for an object": changed(lambda d: d.update(model=[])),
    "null for an object": changed(lambda d: d.update(setting=None)),
    "not a number": changed(lambda d: d["setting"].update(cfg=math.nan)),
    "infinite": changed(lambda d: d["setting"].update(cfg=0)).replace('"cfg": 0', '"cfg": 1e999'),
    "deep": '{"mxfp8_comparison": 1, "a": ' + "[" * 100_000 + "]" * 100_000 + "}",
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_comparison_is_an_error_alone_and_a_warning_in_a_file(text):
    with pytest.raises(ValueError):
        Comparison.from_json(text)
    report, comparison, warnings = metadata.read({"mxfp8_comparison": text, "mxfp8_report": text})
    assert (comparison, report) == (None, None)
    assert [w.partition(" in the header cannot be read")[0] for w in warnings] == [
        "mxfp8_report", "mxfp8_comparison",
    ]  # fmt: skip
    assert all(len(warning) < 400 for warning in warnings)


REPORT = Report(
    "a", "b", "flux", "Flux", 10, 5, 1.0, 31.5,
    (LayerReport("x", "mxfp8", "linear layer", "BF16", (32, 32), 10, 5, 31.5),),
)  # fmt: skip


def test_a_report_with_fields_of_other_types_is_a_warning():
    for change in (
        {"layers": [7]},
        {"bytes_before": 10**299},
        {"bytes_before": "x"},
        {"seconds": None},
        {"sqnr_db": math.nan},
    ):
        text = json.dumps({**json.loads(REPORT.to_json()), **change})
        report, _, warnings = metadata.read({"mxfp8_report": text})
        assert report is None and len(warnings) == 1, change
    assert metadata.read({"mxfp8_report": REPORT.to_json()}) == (REPORT, None, [])


def test_an_entry_that_is_too_long_is_an_error_or_a_warning(monkeypatch):
    monkeypatch.setattr(metadata, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="at most 100 fit in a file's header"):
        metadata.check_size("mxfp8_report", "a" * 101)
    report, _, (warning,) = metadata.read({"mxfp8_report": REPORT.to_json()})
    assert report is None and "at most 100" in warning


def test_control_characters_in_a_comparison_are_not_printed():
    hostile = replace(COMPARISON, notes=("\x1b[2J" + "x" * 1000,))
    lines = metadata.lines(None, hostile)
    assert "\x1b" not in "".join(lines) and max(map(len, lines)) < 310
    assert lines[0] == "comparison, as stated in the file:"


RUN = {"first_seed": 2**64 - 1, "seeds": 2, "sampler": "euler"}


@pytest.mark.parametrize(
    ("about", "shared"),
    [
        (RUN, "1 of 4, first 0"),  # seeds follow each other around 2**64
        ({**RUN, "first_seed": 2, "seeds": 9}, "2 of 4, first 2"),
        ({**RUN, "seeds": 1}, None),
        ({**RUN, "first_seed": 4}, None),
        ({**RUN, "sampler": "heun"}, None),
        ({**RUN, "first_seed": "0"}, None),
        ({**RUN, "seeds": [1]}, None),
        ({}, None),
        (None, None),
    ],
)
def test_seeds_that_the_calibration_sampled_are_noted(about, shared):
    report = replace(REPORT, calibration=about)
    note = f"measured on seeds that the calibration sampled ({shared}"
    assert (note in "\n".join(metadata.lines(report, COMPARISON))) == (shared is not None)
    assert "NOTE" not in "".join(metadata.lines(None, COMPARISON) + metadata.lines(report, None))


def test_the_summary_says_what_matters():
    assert COMPARISON.summary().splitlines() == [
        "very close: latent SNR 31.4 dB, 4 seeds; use 8 for an interval",
        "Flux (52 MXFP8 layers on triton, exact; BF16) against Flux (BF16)",
        "4 seeds, 3 steps of euler/simple, cfg 1, denoise 1, latent [1, 16, 8, 8]",
        "latent SNR 31.35 dB (mean, n = 4); lowest 30.50 dB at seed 3",
        "image PSNR 38.00 dB (95% bootstrap CI 37.00 to 39.00, n = 4)",
        "image SSIM 0.9800 (95% bootstrap CI 0.9700 to 0.9900, n = 4)",
        "relative difference of the predictions: 0.01 at step 1, 0.03 at step 3",
        "noise floor: none; a second run of the reference was identical",
        "reference: fingerprint cdcdcdcdcdcd, 2.00 s per run, peak memory 14.0 GB",
        "model: fingerprint abababababab, 1.00 s per run, peak memory 8.10 GB",
        "measured on cpu: torch 2.11.0, ComfyUI 0.30.0",
    ]


def test_the_summary_of_what_is_identical_and_of_what_is_not_on_every_seed():
    assert "latents: identical on every seed, bit for bit" in SAME.summary()
    assert "dB" not in SAME.summary()
    some = replace(COMPARISON, seeds=(Seed(9, True), *COMPARISON.seeds[1:]))
    assert "latents: identical on 1 of 4 seeds" in some.summary()
    noisy = replace(COMPARISON, floor=Floor(False, True, Mean(40, 39, 41, 4), Mean(3, 2, 4, 4)))
    assert "its second run has SNR 40.00 dB (95% bootstrap CI 39.00 to 41.00" in noisy.summary()
    assert "the reference itself has SNR 3.00 dB" in noisy.summary()
    bad = replace(COMPARISON, seeds=(Seed(9, False, problems=("the model: its image is black",)),))
    assert "PROBLEM: seed 9: the model: its image is black" in bad.summary()


def verdict(**changes) -> tuple[str, str]:
    made = replace(COMPARISON, **changes).verdict
    return made.level, made.text


def test_the_verdict_is_one_line():
    assert MANY.verdict.text == (
        f"very close: latent SNR 31.4 dB ({MANY.latent_snr_db.low:.1f} to "
        f"{MANY.latent_snr_db.high:.1f}), 8 seeds"
    )
    for snr, level, word in ((29.9, "good", "close"), (10.0, "notice", "similar"),
                             (-3.0, "bad", "different")):  # fmt: skip
        assert verdict(latent_snr_db=mean_of([snr])) == (
            level, f"{word}: latent SNR {snr:.1f} dB, 4 seeds; use 8 for an interval"
        )  # fmt: skip
    assert SAME.verdict.text == "identical: the same latents, bit for bit, 4 seeds"
    assert verdict(latent_snr_db=None) == ("notice", "not measured, 4 seeds")
    black = Seed(9, False, problems=("the model: its image is black",))
    assert verdict(seeds=(black, black)) == (
        "bad", "not usable: seed 9: the model: its image is black and 1 more"
    )  # fmt: skip


def test_the_verdict_counts_what_the_reference_does_by_itself():
    """Where the difference has at most twice the energy of the floor, 3 dB."""
    floor = Floor(False, False, repeat_snr_db=mean_of([20.0]))
    for snr, text in ((17.1, "as close as BF16 is to itself"), (16.9, "similar")):
        found = replace(COMPARISON, floor=floor, latent_snr_db=mean_of([snr])).verdict
        assert found.text.startswith(f"{text}: latent SNR {snr} dB")


def test_a_fingerprint_knows_names_and_codes_but_no_prefix_and_no_order():
    rows = [("a", b"\x01\x02"), ("b.c", b"\x03")]
    mark = fingerprint(rows)
    assert mark == fingerprint(rows[::-1])
    assert mark == fingerprint((f"model.diffusion_model.{name}", codes) for name, codes in rows)
    others = ([("a", b"\x01\x02")], [("a", b"\x01\x02"), ("b.c", b"\x04")],
              [("a", b"\x01\x02"), ("b.d", b"\x03")])  # fmt: skip
    assert all(fingerprint(other) != mark for other in others)
    assert fingerprint([]) is None


def rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color.removeprefix("#")))


def pixels(image: Image.Image, color: str, near: int = 3) -> numpy.ndarray:
    """Where an image has a color: [n, 2] of row and column."""
    off = numpy.abs(numpy.asarray(image).astype(int) - rgb(color)).max(-1)
    return numpy.argwhere(off <= near)


def test_the_picture_has_the_mean_within_its_band_and_a_line_that_rises():
    image = plot.draw(MANY)
    assert image.width == page.WIDTH
    band, line = pixels(image, page.BAND), pixels(image, page.LINE)
    left, right = (line[(line[:, 1] < 860) == side] for side in (True, False))
    assert band[:, 0].min() < right[:, 0].min() <= right[:, 0].max() < band[:, 0].max()
    first, last = left[left[:, 1].argmin()], left[left[:, 1].argmax()]
    assert first[0] > last[0] + 20, "the divergence grows, so the line rises"
    assert len(pixels(image, "#9fc3f2")) > 500, "the worst seed has a line of its own"
    flat = pixels(plot.draw(replace(COMPARISON, steps=SAME.steps)), page.LINE)
    flat = flat[flat[:, 1] < 860]
    assert numpy.ptp(flat[:, 0]) < 16, "no divergence, no rise"


def test_the_picture_of_an_identical_model_has_no_band():
    image = plot.draw(SAME)
    assert len(pixels(image, page.BAND, 0)) == 0 and len(pixels(image, "#f6f8fa")) > 10_000


@pytest.mark.parametrize("value", [9.5, 31.35, 108.42])
def test_the_interval_fits_beside_its_title(value):
    """The title is dark and the interval pale: between the two there is paper."""
    record = replace(COMPARISON, latent_snr_db=Mean(value, value - 1, value + 1, 4))
    line = numpy.asarray(plot.draw(record).convert("L"))[112:132, 900:]
    title, text = numpy.argwhere(line < 60)[:, 1], numpy.argwhere(line < 130)[:, 1]
    assert (text > title.max() + 1).any()
    gap = text[text > title.max() + 1].min() - title.max()
    assert gap > 8


@pytest.mark.parametrize("count", [1, 4, 64])
def test_any_number_of_seeds_and_steps_is_drawn(count):
    record = replace(
        COMPARISON,
        steps=tuple(Step(i + 1, 1.0, 0.1, 0.2) for i in range(count)),
        seeds=tuple(Seed(2**64 - 1 - i, False, 30.0 + i) for i in range(count)),
        notes=("note",),
    )
    assert len(pixels(plot.draw(record), page.LINE)) > 50
    none = replace(record, latent_snr_db=None, steps=())
    assert len(pixels(plot.draw(none), page.LINE, 0)) == 0


def test_the_strip_shows_both_images_and_their_difference_amplified():
    reference = Image.new("RGB", (64, 64), (100, 100, 100))
    model = Image.new("RGB", (64, 64), (103, 100, 100))
    strip = plot.make_strip(reference, model)
    assert strip.factor == 64 and strip.difference.getpixel((5, 5)) == (192, 0, 0)
    image = plot.draw(COMPARISON, [strip])
    y = plot._TITLES + 100
    third = page.WIDTH // 3
    colors = [image.getpixel((third * i + third // 2, y)) for i in range(3)]
    assert colors == [(100, 100, 100), (103, 100, 100), (192, 0, 0)]
    more = plot.draw(COMPARISON, [strip] * 9)  # of the next three seeds, six smaller pictures
    below = more.crop((0, image.height - plot._CHART, page.WIDTH, image.height - plot._CHART + 200))
    assert more.height > image.height and len(pixels(below, "#676464", 0)) > 10_000
    assert plot.make_strip(reference, Image.new("RGB", (64, 64), (255, 0, 0))).factor == 1
    assert plot.make_strip(reference, reference).difference.getbbox() is None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (30.5, 32), (5, 5), (0, 0), (0, 3e-7)])
def test_ticks_are_round_and_enclose_the_range(low, high):
    ticks = page.ticks_of(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and len(ticks) <= 7
    steps = numpy.diff(ticks)
    assert steps == pytest.approx(steps[0])
    assert f"{steps[0]:.0e}"[0] in "125"


def embedded(folder, text: str):
    """A converted file with a text as its comparison."""
    save_file({"a.weight": matrix(64, 64), "b": matrix(3, 3)}, folder / "source")
    convert_file(folder / "source", folder / "plain", overwrite=True)
    tensors, metadata = load(folder / "plain")
    save_file(tensors, folder / "compared", {**metadata, "mxfp8_comparison": text})
    return folder / "compared", bytes(tensors["a.weight"][0].view(torch.uint8).numpy())


def test_inspect_prints_a_comparison_and_checks_its_fingerprint(tmp_path, capsys):
    path, codes = embedded(tmp_path, COMPARISON.to_json())
    assert inspect_file(path, every_byte=False).warnings == []  # no weights were read
    (warning,) = inspect_file(path).warnings
    assert "measured on weights other than this file's" in warning

    side = replace(COMPARISON.model, fingerprint=fingerprint([("a", codes)]))
    ours = replace(COMPARISON, model=side)
    path, _ = embedded(tmp_path, ours.to_json())
    inspection = inspect_file(path)
    assert inspection.comparison == ours and inspection.warnings == inspection.problems == []
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "comparison, as stated in the file:" in out
    assert "  latent SNR 31.35 dB" in out and "WARNING" not in out
    assert main(["inspect", "--json", str(path)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["comparison"]["seeds"][3]["latent_snr_db"] == 30.5 and data["report"] is None


def test_of_a_checkpoint_the_diffusion_model_was_compared(tmp_path):
    weights = {
        "model.diffusion_model.a": matrix(64, 64),
        "text_encoders.qwen3_4b.transformer.model.layers.0.mlp.down_proj": matrix(32, 64),
    }
    tensors, about = model(weights)
    codes = tensors["model.diffusion_model.a.weight"][0].view(torch.uint8).numpy().tobytes()
    side = replace(COMPARISON.model, fingerprint=fingerprint([("a", codes)]))
    text = replace(COMPARISON, model=side).to_json()
    inspection = inspect_file(save(tmp_path, tensors, {**about, "mxfp8_comparison": text}))
    assert len(inspection.mxfp8) == 2
    assert inspection.warnings == inspection.problems == []


def test_inspect_reads_a_comparison_under_its_former_name(capsys):
    """Commit b709552 wrote the file: a comparison was a certificate then, its paths ways."""
    path = Path(__file__).parent / "fixtures" / "certificate.safetensors"
    _, header = load(path)
    report, certificate = (json.loads(header[f"mxfp8_{key}"]) for key in ("report", "certificate"))
    for side in (certificate["reference"], certificate["model"]):
        side["paths"] = side.pop("ways")
        side["adapters"] = []  # a later field
    certificate["mxfp8_comparison"] = certificate.pop("mxfp8_certificate")
    certificate["predicted_snr_db"] = report["chosen"] = None  # later fields, too
    inspection = inspect_file(path)
    assert inspection.warnings == inspection.problems == []  # nor another fingerprint
    shown = json.loads(inspection.report.to_json())
    assert shown == {**report, "warnings": [], "verdict": shown["verdict"]}
    shown = json.loads(inspection.comparison.to_json())
    assert shown == {**certificate, "verdict": shown["verdict"]}
    assert inspection.comparison.model.paths == {"triton, exact": 52, "fp8, fast": 3}
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "conversion, as stated in the file:" in shown
    assert "comparison, as stated in the file:" in shown


@pytest.mark.parametrize("place", ["top", "side"])
def test_a_comparison_with_a_former_name_beside_todays_is_rejected(place):
    data = json.loads(COMPARISON.to_json())
    if place == "top":
        data["mxfp8_certificate"] = 1
    else:
        data["model"]["ways"] = data["model"]["paths"]
    with pytest.raises(ValueError, match=r"field '(mxfp8_certificate|ways)' of .* unknown"):
        Comparison.from_json(json.dumps(data))


def test_a_former_name_is_read_only_where_it_was_used():
    data = json.loads(COMPARISON.to_json())
    data["model"]["paths"] = {"ways": 3}
    assert Comparison.from_json(json.dumps(data)).model.paths == {"ways": 3}


def test_inspect_warns_of_a_comparison_that_is_damaged(tmp_path, capsys):
    path, _ = embedded(tmp_path, COMPARISON.to_json()[:-40])
    assert main(["inspect", str(path)]) == 0
    assert "WARNING: mxfp8_comparison in the header cannot be read" in capsys.readouterr().out
