"""A size or a quality beside a preset: what is understood, what is chosen, what is impossible."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor
from safetensors.torch import save_file
from torch import nn

from mxfp8.quant.budget.choice import Problem, choose
from mxfp8.quant.budget.patterns import patterns
from mxfp8.quant.budget.probing import probe_module
from mxfp8.quant.budget.sensitivity import Damages, Sample, Sensitivity
from mxfp8.quant.budget.target import SHARE, SIZE, SNR, parse
from mxfp8.quant.cli import main
from mxfp8.quant.container.header import nbytes
from mxfp8.quant.conversion import policy
from mxfp8.quant.conversion.calibration import calibrate
from mxfp8.quant.conversion.policy import Selection
from mxfp8.quant.conversion.stored import stored_bytes
from mxfp8.quant.format import read_header
from mxfp8.quant.reports import page
from mxfp8.quant.reports.budget import Budget, Chosen, Point
from mxfp8.quant.reports.budget_plot import draw
from mxfp8.quant.reports.conversion import Report, format_size
from mxfp8.quant.sources.open import open_source

# ---- targets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("6.5 GB", SIZE, 6.5e9),
        ("6500 mb", SIZE, 6.5e9),
        (" 6.5GB ", SIZE, 6.5e9),
        ("1 GiB", SIZE, 2**30),
        ("1e6 B", SIZE, 1e6),
        (".5 TB", SIZE, 5e11),
        ("55%", SHARE, 0.55),
        ("99.9 %", SHARE, 0.999),
        ("50 dB", SNR, 50),
        ("50DB", SNR, 50),
        ("0.001 error", SNR, 60),
        ("1e-3 Error", SNR, 60),
        ("0.1% error", SNR, 60),
        ("0.1 % error", SNR, 60),
    ],
)
def test_targets(text, kind, value):
    target = parse(text)
    assert (target.text, target.kind) == (text.strip(), kind)
    assert target.value == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    ["", "6.5", "GB", "-1 GB", "0 GB", "0 dB", "1 2 GB", "6,5 GB", "6.5 GBit", "100%", "250 %",
     "1 error", "100% error", "nan dB", "inf GB", "1e999 GB", "1e308 GB", "1e-323% error", "50 d B",
     "50 dB!", "x" * 10_000, "9" * 5000, None, 50],
)  # fmt: skip
def test_what_is_no_target(text):
    with pytest.raises(ValueError, match=r"6\.5 GB|100%|error"):
        parse(text)


# ---- choices ---------------------------------------------------------------------------------


def model(layers: int, seed: int = 0) -> dict[str, tuple[str, tuple[int, int]]]:
    draw = random.Random(seed)
    tensors = {"norm.weight": ("BF16", (64,))}
    for i in range(layers):
        shape = draw.choice([128, 256, 384]), draw.choice([64, 128, 320])
        tensors[f"layers.{i}.linear.weight"] = "BF16", shape
    return tensors


def problem(layers: int, seed: int = 0, include=None, measured=lambda name: True) -> Problem:
    plan = policy.plan(model(layers, seed), Selection("none", include=include), log=False)
    draw = random.Random(seed)
    values = {f"layers.{i}.linear": 10 ** draw.uniform(-8, -5) for i in range(layers)}
    return Problem(plan, Damages({n: v for n, v in values.items() if measured(n)}))


def all_sets(one: Problem):
    """(bytes, noise) of every set of layers that may be kept."""
    for count in range(len(one.layers) + 1):
        for kept in itertools.combinations(one.layers, count):
            point = one.point("", kept)
            names = {layer.name for layer in kept}
            yield point.bytes, one.damages.total(n for n in one.measured if n not in names)


def reached(one: Problem, kept) -> tuple[int, float]:
    names = {layer.name for layer in kept}
    noise = one.damages.total(name for name in one.measured if name not in names)
    return one.point("", kept).bytes, noise


@pytest.mark.parametrize("seed", range(12))
def test_a_choice_is_the_best_of_all_sets(seed):
    one = problem(10, seed)
    sets = list(all_sets(one))
    for share in (0.1, 0.3, 0.6):
        budget = one.smallest + int(share * (one.bytes_before - one.smallest))
        size, noise = reached(one, one.choose(parse(f"{budget} B")))
        least = min(noise for size, noise in sets if size <= budget)
        assert size <= budget
        assert noise == pytest.approx(least)
        quality = -10 * math.log10(least) - 1e-9
        size, noise = reached(one, one.choose(parse(f"{quality:.12f} dB")))
        assert noise <= least * (1 + 1e-6)
        assert size == min(size for size, noise in sets if noise <= least * (1 + 1e-9))


def test_many_layers():
    """More sets than are kept: nearly as good, and in no time."""
    one = problem(200)
    for target in ("70%", "75 dB"):
        kept = one.choose(parse(target))
        size, noise = reached(one, kept)
        # The curve, whose points next to it bound what any set can do.
        reference = next(p for p in one.curve() if p.bytes > size)
        assert 10 ** (-reference.snr_db / 10) <= noise * 1.001
    assert reached(one, one.choose(parse("75 dB")))[1] <= parse("75 dB").noise


def test_nothing_superfluous_is_kept():
    one = problem(30)
    kept = one.choose(parse("75 dB"))
    for layer in kept:
        fewer = [other for other in kept if other is not layer]
        assert reached(one, fewer)[1] > parse("75 dB").noise


def test_the_order_of_tensors_does_not_matter():
    tensors = list(model(20).items())
    plan = policy.plan(dict(tensors), Selection("none"), log=False)
    found = sensitivity(plan)
    first = choose(plan, found, parse("60%"))[1]
    random.Random(0).shuffle(tensors)
    shuffled = policy.plan(dict(tensors), Selection("none"), log=False)
    second = choose(shuffled, found, parse("60%"))[1]
    assert first.layers == second.layers and first.point == second.point


def sensitivity(plan, leave_out=()) -> Sensitivity:
    layers = [d.layer for d in plan.quantized if d.layer not in leave_out]
    draw = random.Random(1)
    signs = tuple("".join(draw.choice("+-") for _ in layers) for _ in range(8))
    change = [[draw.gauss(0, 1e-3) for _ in range(500)] for _ in layers]
    runs = [
        [sum((1 if s == "+" else -1) * c[i] for s, c in zip(row, change, strict=True))
         for i in range(500)]
        for row in signs
    ]  # fmt: skip
    gram = tuple(tuple(sum(map(float.__mul__, a, b)) for b in runs) for a in runs)
    return Sensitivity(tuple(layers), (1,) * len(layers), (Sample(signs, gram),))


def test_a_plan_with_its_choice():
    plan = policy.plan(model(20), Selection("none"), log=False)
    made, chosen = choose(plan, sensitivity(plan), parse("70%"))
    before = sum(d.nbytes for d in plan.decisions)
    assert stored_bytes(made) == chosen.point.bytes <= 0.7 * before
    kept = {d.layer: d.reason for d in made.decisions if not d.quantize and "linear" in d.key}
    assert set(kept) == set(chosen.layers)
    assert all("70%" in reason and "of the damage" in reason for reason in kept.values())
    # To copy: the same selection by --exclude.
    same = policy.plan(model(20), Selection("none", exclude=chosen.exclude), log=False)
    assert [d.quantize for d in same.decisions] == [d.quantize for d in made.decisions]
    lower, higher = (choose(plan, sensitivity(plan), parse(t))[1] for t in ("65%", "80%"))
    assert lower.point.snr_db < chosen.point.snr_db < higher.point.snr_db


def test_include_and_exclude_bind():
    selection = Selection("none", include=r"layers\.[0-4]\.", exclude=r"layers\.5\.")
    plan = policy.plan(model(20), selection, log=False)
    found = sensitivity(policy.plan(model(20), Selection("none"), log=False))
    made, chosen = choose(plan, found, parse("95%"))
    decided = {d.layer: d.quantize for d in made.decisions}
    assert all(decided[f"layers.{i}.linear"] for i in range(5))
    assert not decided["layers.5.linear"] and "layers.5.linear" not in chosen.layers


def test_layers_that_never_ran():
    plan = policy.plan(model(20), Selection("none"), log=False)
    made, _ = choose(plan, sensitivity(plan, leave_out={"layers.3.linear"}), parse("70%"))
    assert {d.layer: d.quantize for d in made.decisions}["layers.3.linear"]
    assert any("never ran" in text and "layers.3.linear" in text for text in made.warnings)
    # Nothing is known of a file in which only this layer is quantized.
    point = choose(plan, sensitivity(plan, leave_out={"layers.3.linear"}), parse("99%"))[1].point
    assert (point.kept, point.unmeasured, point.snr_db) == (19, 1, None)
    with pytest.raises(ValueError, match=r"what rounding 1 layer does was not measured.* dB"):
        choose(plan, sensitivity(plan, leave_out={"layers.3.linear"}), parse("200 dB"))
    with pytest.raises(ValueError, match="none of the layers"):
        Problem(plan, Damages({"other": 1.0}))


@pytest.mark.parametrize(
    ("target", "include", "why"),
    [
        ("10%", None, "larger"),
        ("1 TB", None, "not larger"),
        ("200 dB", None, "only the original"),
        ("200 dB", r"layers\.0\.", "include"),
    ],
)
def test_what_cannot_be_reached(target, include, why):
    """Says what can."""
    one = problem(10, include=include)
    with pytest.raises(ValueError, match=why) as error:
        one.choose(parse(target))
    assert re.search(r"All MXFP8 is [\d.]+ kB with [\d.]+ dB.*the original is", str(error.value))


def test_what_a_refusal_names_can_be_reached():
    """To the byte, and with the least damaging layer quantized, which is not always the last."""
    one = problem(10, seed=4)
    with pytest.raises(ValueError, match="larger") as error:
        one.choose(parse(f"{one.smallest - 1} B"))
    size = re.search(r"\((\d+ B)\)", str(error.value))[1]
    assert one.choose(parse(size)) == []
    least = min(one.layers, key=lambda layer: layer.damage)
    assert least is not one.layers[-1]
    with pytest.raises(ValueError, match="only the original") as error:
        one.choose(parse("200 dB"))
    most = -10 * math.log10(least.damage)
    assert f"up to {format_size(one.bytes_before - least.cost)} with {most:.1f} dB" in str(
        error.value
    )
    assert len(one.choose(parse(f"{most - 0.01} dB"))) == 9


def test_a_damage_that_others_hide_is_not_overlooked():
    """1e-20 is nothing beside 1, in float64."""
    plan = policy.plan(model(3), Selection("none"), log=False)
    values = {"layers.0.linear": 1.0, "layers.1.linear": 1e-20, "layers.2.linear": 1e-22}
    kept = Problem(plan, Damages(values, ())).choose(parse("210 dB"))
    assert {layer.name for layer in kept} == {"layers.0.linear", "layers.1.linear"}


def test_a_target_needs_layers():
    plan = policy.plan(model(3), Selection("none", exclude="."), log=False)
    with pytest.raises(ValueError, match="none would be quantized"):
        Problem(plan, Damages({"layers.0.linear": 1.0}))


def test_a_quality_below_all_mxfp8_keeps_nothing():
    assert problem(10).choose(parse("1 dB")) == []


def test_curve():
    one = problem(20)
    curve = one.curve()
    assert len(curve) == 21 and curve[0].bytes == one.smallest and curve[0].kept == 0
    assert all(a.bytes < b.bytes and (b.snr_db is None or a.snr_db < b.snr_db)
               for a, b in itertools.pairwise(curve))  # fmt: skip
    assert curve[-1].snr_db is None  # nothing is rounded
    gains = [
        (10 ** (-a.snr_db / 10) - (10 ** (-b.snr_db / 10) if b.snr_db else 0)) / (b.bytes - a.bytes)
        for a, b in itertools.pairwise(curve)
    ]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(gains))


# ---- patterns --------------------------------------------------------------------------------

KEYS = [
    *(f"layers.{i}.{part}.weight" for i in range(30)
      for part in ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2")),
    *(f"refiner.layers.{i}.{part}.weight" for i in range(2)
      for part in ("attention.qkv", "feed_forward.w1")),
    *(f"layers.{i}.attention.qkv.bias" for i in range(30)),
    "x_embedder.weight", "x_embedder.weight_extra", "cap.0.weight", "cap.1.weight",
    "blocks.1.parts.2.a.weight", "blocks.1.parts.3.a.weight", "blocks.11.parts.2.a.weight",
    "odd(name).weight", "odd+.3.weight",
]  # fmt: skip


def matched(expressions) -> set[str]:
    return {key for key in KEYS if any(re.search(e, key) for e in expressions)}


@pytest.mark.parametrize("seed", range(100))
def test_patterns_match_exactly(seed):
    draw = random.Random(seed)
    weights = [key for key in KEYS if not key.endswith("bias")]
    chosen = draw.sample(weights, draw.choice([1, 2, 5, 20, 60, len(weights)]))
    found = patterns(chosen, KEYS)
    assert matched(found) == set(chosen)
    assert len(found) <= len(chosen)


def test_patterns_are_short():
    late = [f"layers.{i}.attention.{part}.weight" for i in (27, 28, 29) for part in ("qkv", "out")]
    whole = [f"layers.{i}.feed_forward.w2.weight" for i in range(30)]
    assert set(patterns([*late, *whole], KEYS)) == {
        r"layers\.(27|28|29)\.attention\.(qkv|out)\.weight",
        r"layers\.\d+\.feed_forward\.w2\.weight",
    }
    assert patterns([], KEYS) == ()


# ---- the document ----------------------------------------------------------------------------


def test_document():
    one = problem(4)
    plan = policy.plan(model(4), Selection("none"), log=False)
    chosen = choose(plan, sensitivity(plan), parse("75%"))[1]
    budget = Budget("m.safetensors", None, "none", 1000, (), tuple(one.curve()), chosen=chosen,
                    together=1.5)  # fmt: skip
    assert Budget.from_json(budget.to_json()) == budget
    assert "1.50 times" in budget.interaction
    assert replace(budget, together=1.1).interaction is None


def test_a_target_close_to_the_original_is_inside_the_picture():
    curve = Point("all MXFP8", 1000, 0, 40.0), Point("a", 1010, 1, 41.0)
    chosen = Chosen("99%", Point("target", 1980, 2, 60.0), ("a", "b"), ())
    budget = Budget("m", None, "none", 2000, (), curve, chosen=chosen)
    picture = draw(budget).convert("RGB")
    red = ImageColor.getrgb(page.RED)
    right = page.WIDTH - page.MARGIN - 400  # of the axes, and the legend is beyond
    found = [x for x in range(right) for y in range(150, picture.height)
             if picture.getpixel((x, y)) == red]  # fmt: skip
    assert found


# ---- the command -----------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path) -> Path:
    """A model, a calibration of it with sensitivities, and one without."""
    torch.manual_seed(0)
    layers = [nn.Linear(64 * (1 + i % 3), 64 * (1 + (i + 1) % 3)) for i in range(9)]
    module = nn.Sequential(*itertools.chain(*((layer, nn.GELU()) for layer in layers))).eval()
    batches = list(torch.randn(4, 64, 64))
    found = calibrate(module, batches, lambda m, x: m(x))
    measured = probe_module(module, batches[:2], lambda m, x: m(x), found.layers)
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    found.save(tmp_path / "plain.safetensors")
    replace(found, sensitivity=measured).save(tmp_path / "calibration.safetensors")
    return tmp_path


def run(capsys, *words) -> tuple[int, str, str]:
    try:
        status = main([str(word) for word in words])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_a_target_of_convert(files, capsys):
    model, calibration, report = (files / f"{name}" for name in ("model.safetensors",
                                  "calibration.safetensors", "report.json"))  # fmt: skip
    words = ["convert", model, files / "new.safetensors", "--calibration", calibration]
    status, out, _ = run(capsys, *words, "--target", "60%", "--report", report)
    assert status == 0 and "target 60%: " in out
    chosen = Report.from_json(report.read_text()).chosen
    found = read_header(files / "new.safetensors")
    assert chosen.layers and not set(chosen.layers) & found.layers.keys()
    assert len(chosen.layers) + len(found.layers) == 9
    with open_source(model) as source:
        original = sum(nbytes(*tensor) for tensor in source.tensors.values())
    assert chosen.point.bytes == sum(t.nbytes for t in found.tensors.values()) <= 0.6 * original
    # Without the calibration, by what the budget gives to copy.
    options = itertools.chain(*(("--exclude", one) for one in chosen.exclude))
    assert run(capsys, "convert", model, files / "same.safetensors", *options)[0] == 0
    assert read_header(files / "same.safetensors").layers.keys() == found.layers.keys()
    words = ["budget", files / "new.safetensors", "--calibration", calibration]
    status, _, err = run(capsys, *words)
    assert status == 1 and "already quantized" in err


def test_budget_command(files, capsys):
    words = ["budget", files / "model.safetensors", "--calibration",
             files / "calibration.safetensors"]  # fmt: skip
    outputs = "--report", files / "b.json", "--png", files / "b.png"
    status, out, _ = run(capsys, *words, "--target", "50 dB", *outputs)
    assert status == 0
    assert "all MXFP8" in out and "preset auto" in out and "--exclude '" in out
    budget = Budget.from_json((files / "b.json").read_text())
    assert budget.chosen.point.snr_db >= 50 > budget.curve[0].snr_db
    assert [layer.name for layer in budget.layers if layer.kept]
    with Image.open(files / "b.png") as picture:
        assert picture.width == page.WIDTH
        colors = {color for _, color in picture.getcolors(1 << 24)}
    assert {ImageColor.getrgb(color) for color in (page.LINE, page.RED)} <= colors
    selection = ["--preset", "none", "--include", r"^1\.w", "--exclude", r"^0\.w"]
    out = run(capsys, *words, "--target", "70%", *selection)[1]
    copied = shlex.split(out.partition("without a calibration:\n")[2].splitlines()[0])
    assert copied[: len(selection)] == selection and len(copied) > len(selection)
    _, out, _ = run(capsys, *words, *selection, "--json")
    assert json.loads(out)["exclude"] == [r"^0\.w"]
    assert run(capsys, *words, *outputs)[0] == 1  # they exist


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--target", "50 dB"], 1, "needs a calibration"),
        (["--target", "50 dB", "--calibration", "plain.safetensors"], 1, "no sensitivities"),
        (["--target", "50 dB", "--calibration", "other.safetensors"], 1, "another model"),
        (["--target", "10%", "--calibration", "calibration.safetensors"], 1, "All MXFP8 is"),
        (["--target", "10", "--calibration", "calibration.safetensors"], 2, "no unit"),
    ],
)
def test_errors_of_a_target(files, capsys, monkeypatch, options, status, message):
    monkeypatch.chdir(files)
    module = nn.Sequential(nn.Linear(32, 64)).eval()
    calibrate(module, [torch.randn(64, 32)], lambda m, x: m(x)).save("other.safetensors")
    found, _, err = run(capsys, "convert", "model.safetensors", "new.safetensors", *options)
    assert found == status and message in err
    assert not Path("new.safetensors").exists()
