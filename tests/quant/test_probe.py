"""`mxfp8 probe`: quant_probe's scores, digit for digit, beside the error that is measured."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from checkpoints import GOLDEN, load, matrix
from safetensors.torch import save_file

from mxfp8 import kernels
from mxfp8.quant.checks.probe import probe_file, rank_correlation
from mxfp8.quant.cli import main
from mxfp8.quant.conversion import calibration
from mxfp8.quant.conversion.calibration import Calibration, Moments
from mxfp8.quant.format import FormatError

ZIMAGE = GOLDEN / "zimage_src.safetensors"
TABLE = GOLDEN / "quant_probe_zimage_src.csv"


def rows(text: str) -> dict[str, dict[str, str]]:
    return {row["key"]: row for row in csv.DictReader(text.splitlines())}


def test_scores_and_recommendations_are_quant_probes_to_the_digit():
    expected = rows(TABLE.read_text(encoding="utf-8"))
    table = rows(probe_file(ZIMAGE).to_csv())
    assert table.keys() == expected.keys()
    for key, row in expected.items():
        assert row.pop("effective_recommendation") == row["recommendation"]
        assert {name: table[key][name] for name in row} == row


def test_the_sqnr_is_that_of_the_weight_as_it_would_be_stored():
    tensors, _ = load(ZIMAGE)
    for layer in probe_file(ZIMAGE).layers:
        weight = tensors[layer.key].double()
        stored = kernels.dequantize(*kernels.quantize(weight.float()), torch.float32, layer.shape)
        noise = (stored.double() - weight).square().sum()
        assert layer.sqnr_db == pytest.approx(
            10 * math.log10(weight.square().sum() / noise), abs=1e-6
        )


@pytest.fixture
def model(tmp_path):
    """Three blocks, of which one has outliers, with a calibration beside it."""
    state = {f"blocks.{i}.ffn.0.weight": matrix(96, 64, torch.float32, seed=i) for i in range(3)}
    state["blocks.1.ffn.0.weight"][5, 7] = 60.0
    state["head.weight"] = matrix(32, 64, torch.float32)
    state["t_embedder.mlp.0.weight"] = matrix(32, 64, torch.float32)
    state["blocks.0.norm.weight"] = torch.ones(64)
    save_file(state, tmp_path / "model.safetensors")
    layers = {}
    for key in state:
        if "ffn" in key:
            x = matrix(200, 64, torch.float32, seed=len(layers) + 10) * (1 + len(layers))
            layers[key.removesuffix(".weight")] = Moments(
                x.t() @ x / len(x), len(x), x.mean(0), x.abs().amax(0)
            )
    mark = calibration.fingerprint((n, (96, 64), state[f"{n}.weight"][0]) for n in layers)
    Calibration(layers, mark).save(tmp_path / "calibration.safetensors")
    return tmp_path


def test_only_matrices_inside_numbered_blocks_are_scored_and_heavy_tails_are_kept(model):
    layers = {layer.key: layer for layer in probe_file(model / "model.safetensors").layers}
    assert sorted(layers) == [f"blocks.{i}.ffn.0.weight" for i in range(3)]
    heavy = layers["blocks.1.ffn.0.weight"]
    assert (heavy.recommendation, heavy.reason) == ("*KEEP*", "kurtosis_floor")
    assert (heavy.layer_type, heavy.block_idx, heavy.subgraph) == ("ffn.0", 1, "blocks")
    assert heavy.excess_kurtosis > 8 and heavy.sqnr_db > 30  # which MXFP8 does not mind


def test_with_a_calibration_the_error_of_the_output_is_measured(model):
    result = probe_file(
        model / "model.safetensors", calibration=calibration.load(model / "calibration.safetensors")
    )
    state, _ = load(model / "model.safetensors")
    moments = calibration.load(model / "calibration.safetensors")
    for layer in result.layers:
        weight = state[layer.key].double()
        stored = kernels.dequantize(*kernels.quantize(weight.float()), torch.float32, layer.shape)
        H, change = moments.of(layer.key.removesuffix(".weight")).hessian.double(), stored - weight
        error = torch.trace(change @ H @ change.t()) / torch.trace(weight @ H @ weight.t())
        assert layer.output_error == pytest.approx(float(error) ** 0.5, rel=1e-4)
    assert result.output_correlation is not None
    assert "with layer output error" in result.summary()


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-6, 1e6, 1e11, 1e37])
def test_statistics_of_very_large_and_very_small_weights_are_finite(tmp_path, scale):
    weight = matrix(64, 64, torch.float32) * scale
    save_file({"blocks.0.a.weight": weight}, tmp_path / "scaled.safetensors")
    result = probe_file(tmp_path / "scaled.safetensors")
    (layer,) = json.loads(result.to_json())["layers"]
    exact = weight.double()
    kurtosis = (exact - exact.mean()).pow(4).mean() / exact.std() ** 4 - 3
    assert layer["excess_kurtosis"] == pytest.approx(float(kurtosis), abs=1e-4)
    assert layer["std"] == pytest.approx(float(exact.std()), rel=1e-5)
    assert layer["dynamic_range"] == pytest.approx(float(exact.abs().max() - exact.abs().min()))


@pytest.mark.parametrize(
    ("a", "b", "value"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 400], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 2, 3], [1, 3, 2, 4], 0.9486833),  # ties at their mean rank
        ([1, 2, 3], [5, 5, 5], None),
        ([1], [2], None),
    ],
)
def test_rank_correlation(a, b, value):
    assert rank_correlation(a, b) == (None if value is None else pytest.approx(value))


def test_the_command_prints_layers_and_writes_what_it_is_asked_for(model, capsys):
    source = str(model / "model.safetensors")
    words = ["probe", source, "--calibration", str(model / "calibration.safetensors")]
    words += ["--report", str(model / "p.json"), "--csv", str(model / "p.csv")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.count("blocks.") == 3 and "rank correlation of the score: " in out
    data = json.loads((model / "p.json").read_text(encoding="utf-8"))
    assert data["mxfp8_probe"] == 1 and len(data["layers"]) == 3
    table = rows((model / "p.csv").read_text(encoding="utf-8"))
    for layer in data["layers"]:
        assert table[layer["key"]]["sqnr_db"] == f"{layer['sqnr_db']:.2f}"
        assert table[layer["key"]]["output_error"] == f"{layer['output_error']:.3e}"


def test_what_cannot_be_probed_is_refused_in_words(model, tmp_path, capsys):
    save_file({"head.weight": torch.ones(32, 32)}, tmp_path / "flat.safetensors")
    with pytest.raises(FormatError, match="no BF16, FP16 or FP32 matrix in numbered blocks"):
        probe_file(tmp_path / "flat.safetensors")
    save_file({"blocks.0.a.weight": torch.full((8, 32), torch.nan)}, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match=r"'blocks.0.a.weight' holds NaN or Inf in row 0"):
        probe_file(tmp_path / "nan.safetensors")
    with pytest.raises(FormatError, match="already quantized as MXFP8"):
        probe_file(GOLDEN / "a_zimage_simple.safetensors")
    with pytest.raises(ValueError, match="belongs to another model"):
        probe_file(ZIMAGE, calibration=calibration.load(model / "calibration.safetensors"))

    source = str(model / "model.safetensors")
    before = (model / "model.safetensors").read_bytes()
    for option, path, message in (
        ("--csv", source, "would replace"),
        ("--report", str(model / "calibration.safetensors"), "would replace"),
        ("--report", str(model), "is a folder"),
        ("--csv", str(model / "none" / "p.csv"), "there is no folder"),
    ):
        words = ["probe", source, option, path]
        words += ["--calibration", str(model / "calibration.safetensors")]
        assert main(words) == 1
        assert message in capsys.readouterr().err
    assert (model / "model.safetensors").read_bytes() == before


def test_weights_without_variance_and_of_one_value_have_no_kurtosis(tmp_path):
    state = {"blocks.0.a.weight": torch.full((4, 32), 2.0), "blocks.0.b.weight": torch.ones(1, 1)}
    state["blocks.0.c.weight"] = torch.zeros(4, 32)
    save_file(state, tmp_path / "flat.safetensors")
    for layer in probe_file(tmp_path / "flat.safetensors").layers:
        assert (layer.excess_kurtosis, layer.outlier_pct, layer.sqnr_db) == (0, 0, None)
