"""The table of quantized formats: what each library writes is recognized, by the right row."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import other_formats
import pytest

from mxfp8.quant.checks import explain
from mxfp8.quant.container.header import FormatError
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.format import FORMATS as READABLE
from mxfp8.quant.format import read_header
from mxfp8.quant.sources import formats, unsupported

# What each library's files are called.
NAMES = {
    "bitsandbytes 0.50.2: fp4": "FP4 (bitsandbytes)",
    "bitsandbytes 0.50.2: int8": "INT8 (bitsandbytes)",
    "bitsandbytes 0.50.2: nf4": "NF4 (bitsandbytes)",
    "comfy-kitchen 0.2.40: asym_w4a8_int8": "W4A8 (4 bits for INT8 matmuls)",
    "comfy-kitchen 0.2.40: convrot_w4a4": "INT4 with ConvRot",
    "comfy-kitchen 0.2.40: float8_e4m3fn": "scaled FP8 (E4M3)",
    "comfy-kitchen 0.2.40: int8_tensorwise": "INT8",
    "comfy-kitchen 0.2.40: int8_tensorwise, convrot": "INT8 with ConvRot",
    "comfy-kitchen 0.2.40: mxfp8": "MXFP8",
    "comfy-kitchen 0.2.40: nvfp4": "NVFP4",
    "gguf 0.19.0: flux": None,
    "mlx 0.32.4: affine": "MLX's integers",
    "mlx 0.32.4: mxfp4": "MXFP4 in MLX's form",
    "mlx 0.32.4: mxfp8": "MXFP8 in MLX's form",
    "mlx 0.32.4: nvfp4": "NVFP4 in MLX's form",
    "optimum-quanto 0.2.7: qfloat8": "Quanto",
    "optimum-quanto 0.2.7: qint4": "Quanto",
    "optimum-quanto 0.2.7: qint8": "Quanto",
    "torchao 0.18.0: Float8WeightOnlyConfig": "torchao",
    "torchao 0.18.0: Int8WeightOnlyConfig": "torchao",
    "torchao 0.18.0: IntxWeightOnlyConfig": "torchao",
    "torchao 0.18.0: torch.save": None,
}


def test_every_library_s_file_has_its_name():
    assert NAMES.keys() == other_formats.FILES.keys()


@pytest.mark.parametrize("name", NAMES)
def test_what_a_library_writes_is_refused_by_the_name_of_its_format(tmp_path, name):
    source = other_formats.write(tmp_path / "model", name)
    words = NAMES[name] and f"already quantized as {NAMES[name]} ("
    with pytest.raises(FormatError) as error:
        convert_file(source, tmp_path / "target")
    assert (words or "not a safetensors file but") in str(error.value)


def evidence(row: formats.Format, way: dict[str, str]) -> dict:
    """The tensors of one layer that a row is recognized by, and a bias."""
    tensors = {}
    for index, (name, dtypes) in enumerate(way.items()):
        columns = 8 * (row.words or 1) if index == 0 else 8
        key = name if row.whole else f"a.{name}"
        tensors[key] = ((dtypes or "I32").split()[0], (32, columns))
    return tensors | {"a.bias": ("BF16", (32,))}


WAYS = [(row, way) for row in formats.FORMATS for way in row.tensors]


@pytest.mark.parametrize(("row", "way"), WAYS, ids=[f"{r.name}: {', '.join(w)}" for r, w in WAYS])
def test_every_way_to_recognize_a_format_leads_to_it(row, way):
    """And no row before it takes what it is recognized by."""
    found = next(unsupported.unmarked(evidence(row, way)))
    assert (found.layer, found.format) == ("" if row.whole else "a", row.name)
    assert found.codes == next(iter(evidence(row, way)))
    for name in way:  # each of the tensors counts
        rest = {k: v for k, v in evidence(row, way).items() if k.removeprefix("a.") != name}
        assert row.name not in {x.format for x in unsupported.unmarked(rest)} or row.name in (
            "FP8 (E4M3)", "FP8 (E5M2)", "INT8",
        )  # fmt: skip


@pytest.mark.parametrize("row", [r for r in formats.FORMATS if r.marker], ids=lambda r: r.marker)
def test_every_marker_leads_to_its_format(row):
    assert formats.marked({"format": row.marker, "convrot": row.convrot}) is row
    if row.convrot:  # as convert_to_quant's older files have it
        assert formats.marked({"format": row.marker, "params": {"convrot": True}}) is row


def test_the_table_has_what_is_read_and_nothing_twice():
    assert {*READABLE} <= {row.marker for row in formats.FORMATS}
    reached = [r for r in formats.FORMATS if r.marker or r.tensors]
    assert len(reached) == len(formats.FORMATS)
    names = [row.name for row in formats.FORMATS if row.name != "INT8"]  # with scales, and without
    assert len({*names}) == len(names)
    for row in (*formats.FORMATS, formats.GGUF):
        assert dataclasses.asdict(row)["gpus"] and row.made_by
        assert row.source or row.made_by == "unknown"
        assert not (row.comfyui and row.nodes)


@pytest.mark.parametrize("precision", ["F32 F16 BF16", "F8_E4M3"])
def test_nunchaku_s_low_rank_branch_is_no_lora(tmp_path, precision):
    """By the names in Nunchaku's files: it has no wheel on PyPI."""
    dtype = precision.split()[-1]
    tensors = {
        "qweight": ("I8", (256, 128)), "wscales": (dtype, (4, 256)), "smooth": ("BF16", (256,)),
        "lora_down": ("BF16", (256, 32)), "lora_up": ("BF16", (256, 32)), "bias": ("BF16", (256,)),
    }  # fmt: skip
    header, end = {}, 0
    for name, (kind, shape) in tensors.items():
        begin, size = end, {"I8": 1, "F8_E4M3": 1, "BF16": 2}[kind]
        for length in shape:
            size *= length
        end = begin + size
        key = f"single_transformer_blocks.0.mlp_fc1.{name}"
        header[key] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    source = other_formats.write_header(tmp_path / "model", header)
    assert unsupported.find_lora(read_header(source).tensors) is None
    kind = "FP4" if dtype == "F8_E4M3" else "INT4"
    with pytest.raises(FormatError, match=rf"quantized as SVDQuant {kind} \(Nunchaku\)"):
        convert_file(source, tmp_path / "target")


def test_the_docs_have_the_same_facts():
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    lines = [
        f"| {row.name} | {f'{row.bits:g}' if row.bits else ''} | {explain.facts(row, 1).runs} | "
        f"{row.gpus} |"
        for row in (*formats.FORMATS, formats.GGUF)
        if row.made_by != "unknown" and not row.whole
    ]
    assert "\n".join(lines) in page
