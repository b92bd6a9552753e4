"""Converting a model: the oracle's bits, everything else untouched, or nothing at all."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from checkpoints import load, matrix, raw, same, write_raw
from quantized_files import LINEARS, MODEL, OTHERS
from safetensors.torch import save_file

from mxfp8.kernels import layout
from mxfp8.kernels.backends import reference
from mxfp8.quant.checks.verify import verify_file
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.conversion.policy import Selection
from mxfp8.quant.format import FormatError, read_header

PARTS = ("weight", "weight_scale", "comfy_quant")


def size(tensors) -> int:
    return sum(len(raw(t)) for t in tensors.values())


def in_slabs(monkeypatch):
    """The smallest slabs there are, 128 rows, and pieces that are no whole element."""
    monkeypatch.setattr("mxfp8.quant.conversion.convert._SLAB", 1)
    monkeypatch.setattr("mxfp8.quant.sources.file._PIECE", 13)


def converted(folder, tensors, **options):
    """Convert tensors; returns the report and what the safetensors library reads."""
    save_file(tensors, folder / "source", options.pop("metadata", None))
    report = convert_file(folder / "source", folder / "target", **options)
    found, metadata = load(folder / "target")
    return SimpleNamespace(report=report, tensors=found, metadata=metadata)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    return converted(folder, MODEL, metadata={"format": "pt", "title": "tiny"})


def test_weights_have_the_oracles_bits_from_their_own_precision(done):
    for name, weight in LINEARS.items():
        qdata, scale = reference.quantize(weight)
        assert same(done.tensors[f"{name}.weight"], qdata), name
        assert same(done.tensors[f"{name}.weight_scale"], scale), name


@pytest.mark.parametrize("key", OTHERS)
def test_everything_else_keeps_its_dtype_and_bytes(done, key):
    assert same(done.tensors[key], OTHERS[key])


def test_the_file_holds_three_tensors_per_layer_and_both_markers(done):
    layers = {f"{name}.{part}" for name in LINEARS for part in PARTS}
    assert done.tensors.keys() == layers | OTHERS.keys()
    header = json.loads(done.metadata["_quantization_metadata"])["layers"]
    assert header.keys() == LINEARS.keys()
    for name, weight in LINEARS.items():
        expected = {
            "format": "mxfp8",
            "group_size": 32,
            "orig_dtype": str(weight.dtype),
            "orig_shape": list(weight.shape),
        }
        assert header[name] == expected
        assert json.loads(raw(done.tensors[f"{name}.comfy_quant"])) == expected


def test_metadata_is_kept(done):
    assert done.metadata.keys() == {"format", "title", "_quantization_metadata"}
    assert (done.metadata["format"], done.metadata["title"]) == ("pt", "tiny")


@pytest.mark.parametrize("step", [in_slabs, None])
def test_two_runs_give_the_same_bytes_whatever_the_slabs(tmp_path, monkeypatch, step):
    save_file(MODEL, tmp_path / "source", {"format": "pt"})
    convert_file(tmp_path / "source", tmp_path / "first")
    if step:
        step(monkeypatch)
    convert_file(tmp_path / "source", tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_progress_comes_after_every_slab_rises_and_ends_at_the_total(tmp_path, monkeypatch):
    in_slabs(monkeypatch)
    calls = []
    converted(tmp_path, MODEL, progress=lambda *call: calls.append(call))
    checks = [call for call in calls if call[2] == "verify"]
    calls = [call for call in calls if call[2] != "verify"]
    amounts = [done for done, _, _ in calls]
    assert amounts == sorted(set(amounts))
    assert amounts[-1] == size(MODEL)
    assert set(checks) == {(size(MODEL), size(MODEL), "verify")}
    assert {total for _, total, _ in calls} == {size(MODEL)}
    assert {key for _, _, key in calls} == {key for key, t in MODEL.items() if t.numel()}
    assert sum(key == "blocks.1.lin.weight" for _, _, key in calls) == 3  # 300 rows


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 200, 299])
def test_a_weight_with_nan_or_inf_is_refused_by_name_and_row(tmp_path, monkeypatch, value, row):
    in_slabs(monkeypatch)
    bad = matrix(300, 40)
    bad[row:, 33] = value
    save_file({"good.weight": matrix(32, 32), "some.weight": bad}, tmp_path / "source")
    with pytest.raises(ValueError, match=f"source: 'some.weight' holds NaN or Inf in row {row};"):
        convert_file(tmp_path / "source", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_value_that_reads_back_as_infinity_is_refused_by_name_and_row(tmp_path):
    bad = matrix(300, 40, torch.float32)
    bad[200, 33] = torch.finfo(torch.float32).max
    save_file({"some.weight": bad}, tmp_path / "source")
    with pytest.raises(ValueError, match=r"'some.weight' holds a value in row 200 that MXFP8 roun"):
        convert_file(tmp_path / "source", tmp_path / "target")
    bad[200, 33] = 3.25e38  # the largest code of the largest scale that float32 holds is 3.19e38
    save_file({"some.weight": bad}, tmp_path / "source")
    convert_file(tmp_path / "source", tmp_path / "target")
    assert not verify_file(tmp_path / "target", tmp_path / "source").problems


def test_a_layer_too_small_for_mxfp8_is_refused_by_name(tmp_path):
    tiny = torch.full((32, 32), 2.0**-140)
    save_file({"some.weight": tiny, "other.weight": matrix(32, 32)}, tmp_path / "source")
    with pytest.raises(ValueError, match=r"'some.weight' would have an SQNR of 0.0 dB, .* exclude"):
        convert_file(tmp_path / "source", tmp_path / "target")
    convert_file(tmp_path / "source", tmp_path / "target", Selection(exclude="some"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("when", ["writing", "verify"])
def test_an_interrupt_leaves_nothing_and_an_old_target_intact(tmp_path, error, when):
    def interrupt(done, total, key):
        if done > total // 2 if when == "writing" else key == when:
            raise error

    save_file(MODEL, tmp_path / "source")
    (tmp_path / "old").write_bytes(b"old")
    for target, overwrite in (("new", False), ("old", True)):
        with pytest.raises(error):
            convert_file(
                tmp_path / "source", tmp_path / target, overwrite=overwrite, progress=interrupt
            )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "source"]
    assert (tmp_path / "old").read_bytes() == b"old"


def test_a_source_that_is_cut_short_meanwhile_is_an_error(tmp_path, monkeypatch):
    def cut(done, total, key):
        with (tmp_path / "source").open("r+b") as file:
            file.truncate(1000)

    monkeypatch.setattr("mxfp8.quant.conversion.convert._BUDGET", 1)  # one slab at a time is read
    save_file(MODEL, tmp_path / "source")
    with pytest.raises(OSError, match="source: the file became shorter"):
        convert_file(tmp_path / "source", tmp_path / "target", progress=cut)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


MARK = {"_quantization_metadata": json.dumps({"layers": {"old": {"format": "int8_tensorwise"}}})}
QUANTIZED = {
    "fp8": ({"old.weight": torch.zeros(32, 32, dtype=torch.float8_e4m3fn)}, None),
    "e5m2": ({"old.weight": torch.zeros(32, 32, dtype=torch.float8_e5m2)}, None),
    "marked": ({"old.comfy_quant": torch.zeros(2, dtype=torch.uint8)}, None),
    "marked in the header only": ({"old.weight": torch.zeros(32, 32, dtype=torch.int8)}, MARK),
}


@pytest.mark.parametrize(("tensors", "metadata"), QUANTIZED.values(), ids=QUANTIZED)
def test_a_source_that_is_quantized_already_is_refused(tmp_path, tensors, metadata):
    save_file({"a.weight": matrix(32, 32), **tensors}, tmp_path / "source", metadata)
    with pytest.raises(FormatError, match=r"source: already quantized .*'old"):
        convert_file(tmp_path / "source", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_our_own_output_is_refused_as_a_source(tmp_path):
    converted(tmp_path, MODEL)
    with pytest.raises(FormatError, match="target: already quantized"):
        convert_file(tmp_path / "target", tmp_path / "again")


@pytest.mark.parametrize(
    ("tensors", "options"),
    [(OTHERS, {}), ({"a.weight": matrix(32, 32)}, {"exclude": "a"}), ({}, {})],
)
def test_nothing_to_quantize_is_refused(tmp_path, tensors, options):
    save_file(tensors, tmp_path / "source")
    with pytest.raises(ValueError, match="source: no layer to quantize: preset 'default'"):
        convert_file(tmp_path / "source", tmp_path / "target", Selection(**options))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tensor_in_the_way_of_a_new_one_is_refused(tmp_path):
    tensors = {"a.weight": matrix(32, 32), "a.weight_scale": torch.ones(4)}
    save_file(tensors, tmp_path / "source")
    with pytest.raises(FormatError, match=r"'a\.weight_scale'"):
        convert_file(tmp_path / "source", tmp_path / "target")


def test_a_damaged_source_is_refused(tmp_path):
    with pytest.raises(FormatError, match="source: the header is not JSON"):
        convert_file(write_raw(tmp_path / "source", b"{"), tmp_path / "target")


def test_no_existing_file_is_replaced_unless_asked(tmp_path):
    save_file(MODEL, tmp_path / "source")
    save_file({}, tmp_path / "other")
    before = (tmp_path / "other").read_bytes()
    with pytest.raises(FileExistsError):
        convert_file(tmp_path / "source", tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == before


@pytest.mark.parametrize("target", ["source", "link"])
def test_a_source_is_never_replaced_by_its_conversion(tmp_path, target):
    save_file(MODEL, tmp_path / "source")
    (tmp_path / "link").symlink_to(tmp_path / "source")
    before = (tmp_path / "source").read_bytes()
    with pytest.raises(ValueError, match=f"{target}: writing it would replace the source"):
        convert_file(tmp_path / "source", tmp_path / target, overwrite=True)
    assert (tmp_path / "source").read_bytes() == before
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"preset": "none"}, {*LINEARS, "norm.lin"}),
        ({"include": "norm"}, {*LINEARS, "norm.lin"}),
        ({"exclude": "blocks"}, {"one", "zero"}),
    ],
)
def test_options_reach_the_plan(tmp_path, options, layers):
    found = converted(tmp_path, MODEL, selection=Selection(**options))
    assert read_header(tmp_path / "target").layers.keys() == layers
    assert {layer.name for layer in found.report.quantized} == layers


def oracle(weight) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 signal and noise per block of 32, from the reference alone."""
    rows, cols = weight.shape
    decoded = reference.dequantize_exact(*reference.quantize(weight), rows, cols)
    x = torch.nn.functional.pad(weight.double(), (0, -cols % 32)).unflatten(1, (-1, 32))
    y = torch.nn.functional.pad(decoded, (0, -cols % 32)).unflatten(1, (-1, 32))
    return x.square().sum(-1), (y - x).square().sum(-1)


def db(signal, noise) -> float:
    return 10 * torch.log10(signal / noise).item()


def test_the_report_has_the_sizes_on_disk(done):
    report = done.report
    assert (report.bytes_before, report.bytes_after) == (size(MODEL), size(done.tensors))
    for layer in report.layers:
        key = f"{layer.name}.weight"
        parts = PARTS if layer.name in LINEARS else ("weight",)
        assert layer.bytes_before == len(raw(MODEL[key]))
        assert layer.bytes_after == sum(len(raw(done.tensors[f"{layer.name}.{p}"])) for p in parts)


def test_the_report_lists_every_matrix_with_its_decision(done):
    found = {layer.name: layer for layer in done.report.layers}
    matrices = {key.removesuffix(".weight") for key, t in MODEL.items()
                if key.endswith(".weight") and t.ndim == 2}  # fmt: skip
    assert found.keys() == matrices
    assert {name for name, layer in found.items() if layer.decision == "mxfp8"} == LINEARS.keys()
    assert {layer.decision for layer in found.values()} == {"mxfp8", "kept"}
    assert (found["double"].reason, found["double"].dtype) == (
        "F64; only BF16, FP16 and FP32 weights are quantized",
        "F64",
    )
    assert found["blocks.0.lin"].shape == (33, 100)


def test_sqnr_is_the_oracles(done):
    energies = {name: oracle(weight) for name, weight in LINEARS.items()}
    for layer in done.report.quantized:
        signal, noise = energies[layer.name]
        if noise.sum() == 0:
            assert layer.sqnr_db is None
        else:
            assert layer.sqnr_db == pytest.approx(db(signal.sum(), noise.sum()), rel=1e-6)
    signal, noise = (sum(e[i].sum() for e in energies.values()) for i in (0, 1))
    assert done.report.sqnr_db == pytest.approx(db(signal, noise), rel=1e-6)
    assert {layer.name for layer in done.report.quantized if layer.sqnr_db is None} == {"zero"}


def test_the_worst_block_is_the_worst_by_the_oracle(done):
    for layer in done.report.quantized:
        signal, noise = oracle(LINEARS[layer.name])
        if layer.sqnr_db is None:
            assert layer.worst_block is None
            continue
        ratio = noise / signal
        row, block = divmod(int(ratio.argmax()), ratio.shape[1])
        assert (layer.worst_block.row, layer.worst_block.block) == (row, block)
        expected = db(signal[row, block], noise[row, block])
        assert layer.worst_block.sqnr_db == pytest.approx(expected, rel=1e-6)


def test_the_worst_block_is_found_in_any_slab(tmp_path, monkeypatch):
    in_slabs(monkeypatch)
    weight = matrix(300, 96)
    weight[250, 32:64] = 1.0625  # halfway between two codes: 16 in 272 is lost
    report = converted(tmp_path, {"a.weight": weight}).report
    worst = report.worst.worst_block
    assert (worst.row, worst.block) == (250, 1)
    assert worst.sqnr_db == pytest.approx(24.609, abs=1e-3)


def test_padding_is_zero(done):
    data = done.tensors["blocks.0.lin.weight"].view(torch.uint8)
    scale = layout.untile(done.tensors["blocks.0.lin.weight_scale"], 128, 4)
    assert data.shape == (64, 128)
    assert not data[33:].any() and not data[:, 100:].any()
    assert scale[:33].all() and not scale[33:].any()
