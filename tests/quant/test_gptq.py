"""Calibrated rounding: better on what was seen, never worse, in the stock format."""

from __future__ import annotations

import json
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import load, same
from safetensors.torch import save_file
from torch import nn

from mxfp8 import kernels
from mxfp8.quant.budget.probing import probe_module
from mxfp8.quant.checks import scan
from mxfp8.quant.checks.inspect import inspect_file
from mxfp8.quant.checks.verify import verify_file
from mxfp8.quant.cli import main
from mxfp8.quant.conversion import calibration, gptq
from mxfp8.quant.conversion.calibration import Calibration, Moments, calibrate
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.conversion.gptq import round_weight
from mxfp8.quant.format import FormatError, read_header
from mxfp8.quant.reports.conversion import Report


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """Correlated, and of different sizes, as activations are; the seed only draws other rows."""
    mix = normal(cols, cols, seed=1001) * torch.exp2(normal(cols, seed=1002))
    return normal(rows, max(1, cols // 4), seed=seed) @ mix[: max(1, cols // 4)]


def hessian(x: torch.Tensor) -> torch.Tensor:
    return x.t() @ x / len(x)


def row_errors(weight, stored, x) -> torch.Tensor:
    """Of every row's output. float64 [N]."""
    value = kernels.dequantize(*stored, torch.float32, tuple(weight.shape))
    return ((weight.double() - value.double()) @ x.double().t()).square().sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(33, 64), (40, 300), (8, 31), (64, 256)])
def test_no_row_is_worse_than_rounded_to_nearest_and_the_sum_is_better(shape, dtype):
    weight, x = normal(*shape).to(dtype), inputs(400, shape[1], seed=5)
    rounded = round_weight(weight, hessian(x))
    ours = row_errors(weight, (rounded.qdata, rounded.scale), x)
    plain = row_errors(weight, kernels.quantize(weight), x)
    assert (ours <= plain * 1.001).all()
    assert ours.sum() < 0.7 * plain.sum()
    size = (weight.double() @ x.double().t()).square().sum()
    assert rounded.error == pytest.approx(float(ours.sum() / size) ** 0.5, rel=0.02)
    assert rounded.nearest == pytest.approx(float(plain.sum() / size) ** 0.5, rel=0.02)


@pytest.mark.parametrize("rows", [4, 40])
def test_few_inputs_do_not_make_it_worse_on_others(rows):
    weight, x = normal(64, 256), inputs(rows, 256)
    x += normal(rows, 256, seed=7) * x.std() * 0.3
    rounded = round_weight(weight, hessian(x), rows)
    others = inputs(2000, 256, seed=50)
    others += normal(2000, 256, seed=51) * others.std() * 0.3
    ours = row_errors(weight, (rounded.qdata, rounded.scale), others)
    assert ours.sum() < 1.01 * row_errors(weight, kernels.quantize(weight), others).sum()


def test_coordinate_descent_helps_and_more_of_it_does_not_hurt(monkeypatch):
    weight, x = normal(64, 256), inputs(2000, 256)
    errors = []
    for sweeps in (0, 1, 2, 4):
        monkeypatch.setattr(gptq, "SWEEPS", sweeps)
        errors.append(round_weight(weight, hessian(x)).error)
    assert errors[1] < 0.99 * errors[0]
    assert errors == sorted(errors, reverse=True)


def test_the_result_is_the_stock_format_with_its_mark():
    weight, x = normal(100, 320), inputs(800, 320)
    rounded = round_weight(weight, hessian(x))
    plain = kernels.quantize(weight)
    assert [(t.dtype, t.shape) for t in (rounded.qdata, rounded.scale)] == [
        (t.dtype, t.shape) for t in plain
    ]
    value = kernels.dequantize(rounded.qdata, rounded.scale, torch.float32, (100, 320))
    again = kernels.quantize(value)
    assert same(again[0].view(torch.uint8), rounded.qdata.view(torch.uint8))
    assert same(again[1], rounded.scale)
    blocks, marked = scan._marks(rounded.qdata[:100].view(torch.uint8))
    assert marked >= scan.MARKED * blocks


def test_the_same_inputs_give_the_same_bytes():
    weight, moments = normal(40, 96), hessian(inputs(300, 96))
    first, again = round_weight(weight, moments), round_weight(weight, moments)
    assert same(first.qdata.view(torch.uint8), again.qdata.view(torch.uint8))


def test_columns_that_saw_nothing_and_layers_that_never_fire():
    weight, x = normal(40, 96), inputs(300, 96)
    x[:, 10:50] = 0
    rounded = round_weight(weight, hessian(x))
    assert rounded.error < rounded.nearest
    value = kernels.dequantize(rounded.qdata, rounded.scale, torch.float32, (40, 96))
    assert value.isfinite().all()
    assert ((value - weight).norm() / weight.norm()) < 0.1
    silent = round_weight(weight, torch.zeros(96, 96))
    assert (silent.error, silent.nearest) == (0, 0)
    zero = round_weight(torch.zeros(40, 96), hessian(x))
    assert (zero.error, zero.nearest) == (0, 0)
    assert same(silent.scale, kernels.quantize(weight)[1])


def test_rows_of_zeros_and_huge_values_stay_what_they_are():
    weight = normal(8, 64)
    weight[1], weight[2] = 0, weight[2] * 2.0**100
    rounded = round_weight(weight, hessian(inputs(300, 64)))
    value = kernels.dequantize(rounded.qdata, rounded.scale, torch.float32, (8, 64))
    assert (value[1] == 0).all() and value.isfinite().all()
    assert ((value - weight).norm(dim=-1) <= 0.1 * weight.norm(dim=-1)).all()


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (torch.zeros(64, 32), r"shape \[64, 32\]; a weight \[8, 64\] needs \[64, 64\]"),
        (torch.full((64, 64), torch.nan), "holds NaN or Inf"),
    ],
)
def test_moments_that_do_not_fit_are_refused(moments, message):
    with pytest.raises(ValueError, match=message):
        round_weight(normal(8, 64), moments)


# ---- calibration -----------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 64, bias=False)).eval()


def batches(seed: int, count: int = 8) -> list[torch.Tensor]:
    return [inputs(64, 96, seed=seed + i)[None] for i in range(count)]


def run(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return module(batch)


def test_moments_are_those_of_what_the_layers_are_given():
    model, given = network(), batches(0)
    given[2][0, 5, 3] = torch.nan  # such rows are left out
    statistics = calibrate(model, given, run)
    x = torch.cat([b[0] for b in given])
    x = x[x.isfinite().all(-1)]
    assert {n: m.rows for n, m in statistics.layers.items()} == {"0": 511, "2": 511}
    assert torch.allclose(statistics.of("0").hessian, hessian(x), rtol=1e-4, atol=1e-4)
    hidden = model[1](model[0](x)).detach()
    assert torch.allclose(statistics.of("model.diffusion_model.2").hessian, hessian(hidden),
                          rtol=1e-3, atol=1e-3)  # fmt: skip
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_calibration_is_saved_whole_and_read_back(tmp_path):
    statistics = calibrate(network(), batches(0), run)
    statistics.save(tmp_path / "c.safetensors")
    again = calibration.load(tmp_path / "c.safetensors")
    assert again.model == statistics.model
    assert again.layers.keys() == statistics.layers.keys()
    for name, moments in statistics.layers.items():
        assert same(again.of(name).hessian, moments.hessian)
        assert again.of(name).rows == moments.rows
    assert again.about == {}
    with pytest.raises(FileExistsError):
        statistics.save(tmp_path / "c.safetensors")


def test_how_a_model_was_run_is_kept_in_the_file(tmp_path):
    statistics = calibrate(network(), batches(0), run)
    about = {"first_seed": 2**64 - 1, "cfg": 3.5, "sampler": "euler", "exclude": "\u00e4"}
    Calibration(statistics.layers, statistics.model, about).save(tmp_path / "c.safetensors")
    again = calibration.load(tmp_path / "c.safetensors")
    assert again.about == about
    again.save(tmp_path / "again.safetensors")
    assert calibration.load(tmp_path / "again.safetensors").about == about


def test_saving_and_loading_tell_each_layer_and_stop_where_that_raises(tmp_path):
    statistics, path = calibrate(network(), batches(0), run), tmp_path / "c.safetensors"
    total = sum(4 * K * (K + 2) for K in (96, 128))
    done = [4 * 96 * 98, total]

    def stop(at, _total, key):
        if key == "2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        statistics.save(path, progress=stop)
    assert not list(tmp_path.iterdir())
    saved, loaded = [], []
    statistics.save(path, progress=lambda *call: saved.append(call))
    assert saved[:2] == [(done[0], total, "0"), (total, total, "2")]
    assert set(saved[2:]) == {(total, total, "verify")}
    calibration.load(path, lambda *call: loaded.append(call))
    assert loaded == saved[:2]
    with pytest.raises(KeyboardInterrupt):
        calibration.load(path, stop)


def test_means_and_largest_magnitudes_are_kept_beside_the_moments(tmp_path):
    given = batches(0)
    given[2][0, 5, 3] = torch.nan
    calibrate(network(), given, run).save(tmp_path / "c.safetensors")
    x = torch.cat([b[0] for b in given])
    x = x[x.isfinite().all(-1)]
    moments = calibration.load(tmp_path / "c.safetensors").of("0")
    assert same(moments.amax, x.abs().amax(0))
    assert torch.allclose(moments.mean, x.mean(0), rtol=1e-5, atol=1e-6)


def test_a_sum_that_was_taken_holds_nothing_and_takes_nothing():
    one = calibration.HessianAccumulator()
    one.add(torch.ones(2, 3, 4))
    moments = one.take()
    one.add(torch.ones(2, 3, 4))
    assert (moments.rows, one.rows, one.take()) == (6, 6, None)
    assert torch.equal(moments.hessian, torch.ones(4, 4))


def test_inputs_whose_squares_are_infinite_count_as_nothing():
    one = calibration.HessianAccumulator()
    one.add(torch.full((2, 4), 1e30))
    assert one.take() is None
    assert (one.rows, one.received) == (2, "values whose squares float32 cannot hold")


def test_rows_that_are_not_finite_are_counted():
    one = calibration.HessianAccumulator()
    assert one.received == "no input"
    one.add(torch.full((2, 4), torch.nan))
    assert (one.rows, one.dropped, one.received) == (0, 2, "no finite input")
    one.add(torch.tensor([[1.0, torch.inf, 1, 1], [1, 1, 1, 1], [0, 0, 0, torch.nan]]))
    assert (one.take().rows, one.dropped) == (1, 4)


def test_memory_that_was_reserved_is_what_inputs_are_added_to():
    one = calibration.HessianAccumulator()
    one.reserve(4, torch.device("cpu"))
    place = one._hessian.data_ptr()
    one.add(torch.ones(2, 3, 4, dtype=torch.float16))
    assert one._hessian.data_ptr() == place
    assert torch.equal(one.take().hessian, torch.ones(4, 4))


def test_float64_is_not_asked_of_devices_that_lack_it(monkeypatch):
    assert calibration.has_float64(torch.device("cpu"))
    assert not calibration.has_float64(torch.device("mps"))
    for there in (True, False):
        properties = types.SimpleNamespace(has_fp64=there)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _, p=properties: p)
        assert calibration.has_float64(torch.device("xpu")) == there


def test_layers_that_are_called_by_keyword_are_seen():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()[0]

        def forward(self, x):
            return self.inner(input=x)

    statistics = calibrate(Keyword().eval(), batches(0), run)
    assert same(
        statistics.of("inner").hessian, calibrate(network(), batches(0), run).of("0").hessian
    )


def test_a_module_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="this Sequential is in training mode"):
        calibrate(network().train(), batches(0), run)


def test_a_stored_calibration_is_read_when_it_is_asked_for(tmp_path):
    path = tmp_path / "c.safetensors"
    calibrate(network(), batches(0), run).save(path)
    statistics = calibration.load(path)
    before = statistics.of("2").hessian
    assert same(statistics.of("2").hessian, before)
    calibrate(network(), batches(9), run).save(path, overwrite=True)
    with pytest.raises(OSError, match="changed or replaced"):
        _ = statistics.of("2").hessian


def version_1(statistics: Calibration) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata, as the first version wrote them."""
    tensors = {f"{name}.second": moments.hessian for name, moments in statistics.layers.items()}
    rows = {name: moments.rows for name, moments in statistics.layers.items()}
    about = {"version": 1, "model": statistics.model, "rows": rows}
    return tensors, {"mxfp8_calibration": json.dumps(about)}


FIXTURE = Path(__file__).parent / "fixtures" / "calibration.safetensors"


def test_a_calibration_with_the_former_name_of_the_hessian_is_read(tmp_path):
    """Commit b709552 wrote the file: the Hessian was called `second` then."""
    tensors, metadata = load(FIXTURE)
    assert {key.rpartition(".")[2] for key in tensors} == {"second", "mean", "amax"}
    about = json.loads(metadata["mxfp8_calibration"])
    statistics = calibration.load(FIXTURE)
    assert (statistics.model, statistics.about) == (about["model"], about["about"])
    statistics.save(tmp_path / "new.safetensors")
    stored, _ = load(tmp_path / "new.safetensors")
    assert {key.rpartition(".")[2] for key in stored} == {"hessian", "mean", "amax"}
    for held in (statistics, calibration.load(tmp_path / "new.safetensors")):
        assert {name: moments.rows for name, moments in held.layers.items()} == about["rows"]
        for name, moments in held.layers.items():
            assert same(moments.hessian, tensors[f"{name}.second"])
            assert same(moments.mean, tensors[f"{name}.mean"])
            assert same(moments.amax, tensors[f"{name}.amax"])


def test_a_calibration_of_version_1_rounds_as_it_did(model):
    statistics = calibration.load(model / "calibration.safetensors")
    tensors, metadata = version_1(statistics)
    save_file(tensors, model / "old.safetensors", metadata)
    old = calibration.load(model / "old.safetensors")
    assert all(
        old.of(name).mean is None and old.of(name).amax is None for name in statistics.layers
    )
    convert_file(model / "net.safetensors", model / "new-way", calibration=statistics)
    convert_file(model / "net.safetensors", model / "old-way", calibration=old)
    assert (model / "new-way").read_bytes() == (model / "old-way").read_bytes()
    old.save(model / "again.safetensors")
    assert load(model / "again.safetensors")[0].keys() == tensors.keys()
    again = calibration.load(model / "again.safetensors")
    assert same(again.of("2").hessian, statistics.of("2").hessian) and again.of("2").mean is None


def test_a_calibration_of_a_later_version_is_refused(model):
    tensors, metadata = version_1(calibration.load(model / "calibration.safetensors"))
    metadata["mxfp8_calibration"] = metadata["mxfp8_calibration"].replace(
        '"version": 1', '"version": 4'
    )
    save_file(tensors, model / "later.safetensors", metadata)
    with pytest.raises(FormatError, match="version 4; this pack reads versions 1 to 3, so update"):
        calibration.load(model / "later.safetensors")


def test_means_of_another_width_are_refused_by_layer(model):
    tensors, metadata = load(model / "calibration.safetensors")
    tensors["0.mean"] = torch.zeros(95)
    save_file(tensors, model / "damaged.safetensors", metadata)
    with pytest.raises(FormatError, match=r"'0.mean' is F32 \[95\]; it must be F32 "):
        calibration.load(model / "damaged.safetensors")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("lost", ["0.mean", "2.amax"])
def test_a_calibration_without_its_means_is_refused_by_layer(model, version, lost):
    tensors, metadata = load(model / "calibration.safetensors")
    del tensors[lost]
    if version == 2:
        tensors = {k.replace(".hessian", ".second"): v for k, v in tensors.items()}
    metadata["mxfp8_calibration"] = metadata["mxfp8_calibration"].replace(
        '"version": 3', f'"version": {version}'
    )
    save_file(tensors, model / "half.safetensors", metadata)
    with pytest.raises(FormatError, match=rf"'{lost}' is None \[\]; it must be F32 "):
        calibration.load(model / "half.safetensors")


def test_an_empty_calibration_is_refused():
    with pytest.raises(ValueError, match="no linear layer had a finite input"):
        calibrate(network(), [], run)
    with pytest.raises(ValueError, match="no linear layer had a finite input"):
        calibrate(network(), [torch.full((1, 4, 96), torch.inf)], run)


@pytest.fixture
def model(tmp_path):
    """A saved network, and its calibration."""
    net = network()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    calibrate(net, batches(0), run).save(tmp_path / "calibration.safetensors")
    return tmp_path


def test_a_tick_comes_many_times_within_a_layer_and_changes_nothing():
    weight, moments = normal(40, 512), hessian(inputs(900, 512))
    ticks = []
    rounded = round_weight(weight, moments, tick=lambda: ticks.append(0))
    assert len(ticks) >= 512 // 128 * (1 + gptq.SWEEPS)
    plain = round_weight(weight, moments)
    assert same(rounded.qdata.view(torch.uint8), plain.qdata.view(torch.uint8))
    assert same(rounded.scale, plain.scale) and rounded.error == plain.error


def test_progress_names_a_calibrated_layer_before_it_is_done(model):
    statistics, calls = calibration.load(model / "calibration.safetensors"), []
    convert_file(model / "net.safetensors", model / "out", calibration=statistics,
                 progress=lambda *call: calls.append(call))  # fmt: skip
    layers = [call for call in calls if call[2] in ("0.weight", "2.weight")]
    at, total = layers[0][0], layers[0][1]
    for key, size in (("0.weight", 128 * 96 * 4), ("2.weight", 64 * 128 * 4)):
        amounts = [done for done, _, name in layers if name == key]
        assert len(amounts) > 3 and set(amounts[:-1]) == {at} and amounts[-1] == at + size
        at += size
    assert at == total


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_within_a_calibrated_layer_stops_there_and_leaves_no_file(
    model, monkeypatch, error
):
    seen, done = [], []

    def noted(*arguments, **options):
        rounded = round_weight(*arguments, **options)
        done.append(rounded)
        return rounded

    def stop(_done, _total, key):
        seen.append(key)
        if seen.count("2.weight") == 3:
            raise error

    monkeypatch.setattr("mxfp8.quant.conversion.gptq.round_weight", noted)
    before = sorted(model.iterdir())
    with pytest.raises(error):
        convert_file(model / "net.safetensors", model / "out", progress=stop,
                     calibration=calibration.load(model / "calibration.safetensors"))  # fmt: skip
    assert len(done) == 1 and seen[-3:] == ["2.weight"] * 3
    assert sorted(model.iterdir()) == before


def test_converting_with_a_calibration_is_better_on_inputs_that_were_not_seen(model):
    source, net = model / "net.safetensors", network()
    statistics = calibration.load(model / "calibration.safetensors")
    report = convert_file(source, model / "ours", calibration=statistics)
    convert_file(source, model / "plain")
    assert Report.from_json(report.to_json()) == report
    for layer in report.quantized:
        assert layer.output_error < 0.9 * layer.nearest_error
    assert "2 layers calibrated: layer output error 0." in report.summary()
    assert not verify_file(model / "ours", source).problems
    assert not inspect_file(model / "ours").problems

    def error(path) -> float:
        stored, _ = load(path)
        weight = kernels.dequantize(stored["0.weight"], stored["0.weight_scale"], torch.float32)
        x = torch.cat([b[0] for b in batches(100)])
        return float((x @ (weight - net[0].weight.detach()).t()).norm())

    assert error(model / "ours") < 0.9 * error(model / "plain")
    ours, plain = load(model / "ours"), load(model / "plain")
    assert ours[1] == plain[1] and ours[0].keys() == plain[0].keys()


def test_output_errors_are_measured_on_held_out_data_if_there_is_any(model):
    source, net = model / "net.safetensors", network()
    statistics = calibration.load(model / "calibration.safetensors")
    others = calibrate(net, batches(100), run, select=lambda name, _: name == "0")
    report = convert_file(source, model / "ours", calibration=statistics, held_out=others)
    own = convert_file(source, model / "own", calibration=statistics)
    convert_file(source, model / "plain")
    assert (model / "ours").read_bytes() == (model / "own").read_bytes()
    measured, missing = report.quantized
    assert (missing.output_error, missing.nearest_error) == (None, None)
    x, weight = torch.cat([b[0] for b in batches(100)]), net[0].weight.detach()

    def error(path) -> float:
        stored, _ = load(path)
        ours = kernels.dequantize(stored["0.weight"], stored["0.weight_scale"], torch.float32)
        return float((x @ (ours - weight).t()).norm() / (x @ weight.t()).norm())

    assert measured.output_error == pytest.approx(error(model / "ours"), rel=1e-3)
    assert measured.nearest_error == pytest.approx(error(model / "plain"), rel=1e-3)
    assert measured.output_error > own.quantized[0].output_error
    assert report.calibration["held_out"]["layers"] == 1
    assert Report.from_json(report.to_json()) == report
    assert "measured on 1 of 2 calibrated layers" in report.summary()
    assert "on held-out data" in report.summary() and "in-sample" in own.summary()
    with pytest.raises(ValueError, match="give a calibration as well"):
        convert_file(source, model / "none", held_out=others)


def test_a_layer_that_a_calibration_lacks_is_rounded_to_nearest(model):
    whole = calibration.load(model / "calibration.safetensors")
    net = network()
    only = calibrate(net, batches(0), run, select=lambda name, _: name == "2")
    report = convert_file(model / "net.safetensors", model / "out", calibration=only)
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["0"].output_error is None and by_name["2"].output_error is not None
    convert_file(model / "net.safetensors", model / "whole", calibration=whole)
    convert_file(model / "net.safetensors", model / "plain")
    out, all_of_it, plain = (load(model / name)[0] for name in ("out", "whole", "plain"))
    assert same(out["0.weight"].view(torch.uint8), plain["0.weight"].view(torch.uint8))
    assert same(out["2.weight"].view(torch.uint8), all_of_it["2.weight"].view(torch.uint8))
    assert not same(out["2.weight"].view(torch.uint8), plain["2.weight"].view(torch.uint8))


def test_a_layer_that_would_be_far_from_its_weight_is_rounded_to_nearest(model, monkeypatch):
    """What `verify` takes for damage: only an outlandish calibration leads there."""
    statistics = calibration.load(model / "calibration.safetensors")
    monkeypatch.setattr("mxfp8.quant.conversion.convert.MIN_SQNR", 31.0)
    report = convert_file(model / "net.safetensors", model / "ours", calibration=statistics)
    convert_file(model / "net.safetensors", model / "plain")
    assert (model / "ours").read_bytes() == (model / "plain").read_bytes()
    assert all(layer.output_error == layer.nearest_error for layer in report.quantized)


@pytest.mark.parametrize("name", ["net", "model", "a"])  # two of them prefixes of ComfyUI's files
def test_a_module_may_hold_its_layers_under_any_name(name, model):
    whole = nn.Sequential()
    whole.add_module(name, network())
    save_file(whole.eval().state_dict(), model / "whole.safetensors")
    statistics = calibrate(whole, batches(0), run)
    report = convert_file(model / "whole.safetensors", model / "out", calibration=statistics)
    assert report.calibration["rounded_layers"] == 2
    sensitivity = probe_module(whole, batches(0, 2), run, statistics.layers)
    replace(statistics, sensitivity=sensitivity).save(model / "all.safetensors")
    words = ["convert", str(model / "whole.safetensors"), str(model / "part.safetensors")]
    words += ["--calibration", str(model / "all.safetensors"), "--target", "80%"]
    assert main(words) == 0
    assert len(read_header(model / "part.safetensors").layers) == 1


@pytest.mark.parametrize("prefix", ["", "model.", "model.diffusion_model."])
def test_a_calibration_may_have_another_prefix_than_the_file(prefix, model):
    whole = nn.Sequential()
    whole.add_module("net", network())
    modules = whole.eval(), network()
    statistics, same_data = (calibrate(module, batches(0), run) for module in modules)
    state = {f"{prefix}{name}": value for name, value in network().state_dict().items()}
    save_file(state, model / "inner.safetensors")
    report = convert_file(model / "inner.safetensors", model / "out", calibration=statistics)
    assert report.calibration["rounded_layers"] == 2
    options = {"calibration": statistics, "held_out": same_data}
    with pytest.raises(ValueError, match="held_out is the calibration itself"):
        convert_file(model / "inner.safetensors", model / "never", **options)


def test_another_models_calibration_is_refused(model):
    statistics = calibration.load(model / "calibration.safetensors")
    other = {k: v + 1 for k, v in network().state_dict().items()}
    save_file(other, model / "other.safetensors")
    with pytest.raises(ValueError, match="made with other weights; calibrate this model"):
        convert_file(model / "other.safetensors", model / "out", calibration=statistics)
    save_file({"a.weight": torch.zeros(32, 32)}, model / "small.safetensors")
    with pytest.raises(ValueError, match="has a layer '0', which this model lacks"):
        convert_file(model / "small.safetensors", model / "out", calibration=statistics)
    assert not (model / "out").exists()


def test_a_weight_that_is_not_finite_is_refused_by_row(model):
    state = {k: v.clone() for k, v in network().state_dict().items()}
    state["2.weight"][7, 9] = torch.inf
    save_file(state, model / "bad.safetensors")
    moments = {"2": Moments(torch.eye(128), 1)}
    mark = calibration.fingerprint([("2", (64, 128), state["2.weight"][0])])
    with pytest.raises(ValueError, match=r"'2.weight' holds NaN or Inf in row 7"):
        convert_file(model / "bad.safetensors", model / "out",
                     calibration=Calibration(moments, mark))  # fmt: skip
    assert not (model / "out").exists()


def test_a_value_that_reads_back_as_infinity_is_refused_by_row(model):
    state = {k: v.clone() for k, v in network().state_dict().items()}
    state["2.weight"][7, 9] = torch.finfo(torch.float32).max
    save_file(state, model / "bad.safetensors")
    mark = calibration.fingerprint([("2", (64, 128), state["2.weight"][0])])
    statistics = Calibration({"2": Moments(torch.eye(128), 1)}, mark)
    with pytest.raises(ValueError, match=r"'2.weight' holds a value in row 7 that MXFP8 rounds"):
        convert_file(model / "bad.safetensors", model / "out", calibration=statistics)
    assert not (model / "out").exists()


def test_moments_that_no_inputs_have_are_refused_by_layer(model):
    """Finite, but no X.T X: a square below zero, or a factorization that fails half-way."""
    statistics = calibration.load(model / "calibration.safetensors")
    whole, rows = statistics.of("2").hessian, statistics.of("2").rows
    negative, indefinite = whole.clone(), whole.clone()
    negative[3, 3] = -1
    indefinite[3, 4] = indefinite[4, 3] = 100 * whole.diagonal().max()
    for name, wrong in (("negative", negative), ("indefinite", indefinite)):
        Calibration({**statistics.layers, "2": Moments(wrong, rows)}, statistics.model).save(
            model / name
        )
    with pytest.raises(FormatError, match=r"of '2' \[128, 128\] has negative values on its"):
        calibration.load(model / "negative")
    statistics = calibration.load(model / "indefinite")
    with pytest.raises(ValueError, match=r"'2\.weight' is not positive definite; calibrate again"):
        convert_file(model / "net.safetensors", model / "out", calibration=statistics)
    assert not (model / "out").exists()


def test_devices_without_float64_leave_calibrated_layers_to_the_cpu(model, monkeypatch):
    """Another device's weights would fail in the writer: the meta device stands for it."""
    statistics = calibration.load(model / "calibration.safetensors")
    convert_file(model / "net.safetensors", model / "cpu", device="cpu", calibration=statistics)
    monkeypatch.setattr(
        "mxfp8.quant.conversion.convert.has_float64", lambda device: device.type != "meta"
    )
    monkeypatch.setattr("mxfp8.quant.conversion.convert.find_device", torch.device)
    convert_file(model / "net.safetensors", model / "meta", device="meta", calibration=statistics)
    assert (model / "cpu").read_bytes() == (model / "meta").read_bytes()


@pytest.mark.parametrize("wrong", ["NaN", "no rows"])
def test_a_damaged_calibration_is_refused_by_layer(model, wrong):
    statistics = calibration.load(model / "calibration.safetensors")
    damaged, rows = statistics.of("2").hessian.clone(), statistics.of("2").rows
    if wrong == "NaN":
        damaged[3, 4] = torch.nan
    layers = {**statistics.layers, "2": Moments(damaged, 0 if wrong == "no rows" else rows)}
    Calibration(layers, statistics.model).save(model / "damaged.safetensors")
    with pytest.raises(FormatError, match=r"of '2' \[128, 128\] holds NaN or Inf, or"):
        calibration.load(model / "damaged.safetensors")


def test_moments_of_another_width_are_refused_by_layer(model):
    statistics = calibration.load(model / "calibration.safetensors")
    layers = {**statistics.layers, "2": Moments(torch.eye(96), 5)}
    with pytest.raises(ValueError, match=r"\[96, 96\] for '2.weight' \[64, 128\]; it must be"):
        convert_file(model / "net.safetensors", model / "out",
                     calibration=Calibration(layers, statistics.model))  # fmt: skip
    assert not (model / "out").exists()


def test_what_is_no_calibration_is_refused(model):
    with pytest.raises(FormatError, match=r"net.safetensors is not a calibration file"):
        calibration.load(model / "net.safetensors")


def test_a_dry_run_checks_the_calibration(model, capsys):
    words = ["convert", model / "net.safetensors", model / "out.safetensors", "--dry-run"]
    words += ["--calibration", model / "calibration.safetensors"]
    assert main(list(map(str, words))) == 0
    save_file({k: v + 1 for k, v in network().state_dict().items()}, model / "net.safetensors")
    assert main(list(map(str, words))) == 1
    assert "made with other weights; calibrate this model" in capsys.readouterr().err
    assert not (model / "out.safetensors").exists()


def test_the_command_takes_a_calibration(model, capsys):
    words = ["convert", model / "net.safetensors", model / "out.safetensors"]
    words += ["--calibration", model / "calibration.safetensors"]
    assert main(list(map(str, words))) == 0
    assert "2 layers calibrated" in capsys.readouterr().out
