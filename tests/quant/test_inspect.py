"""Inspect: what any file is, who runs it, whether it is whole, and what it would be as MXFP8."""

from __future__ import annotations

import json
import os
import random
import struct
import time

import other_formats
import pytest
import torch
from checkpoints import matrix
from quantized_files import model, save
from safetensors.torch import save_file

from mxfp8.quant.checks.inspect import inspect_file
from mxfp8.quant.cli import main
from mxfp8.quant.container.header import FormatError
from mxfp8.quant.conversion.architectures import architectures
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.format import read_header

AS_MXFP8 = 256 * 512 * 33 // 32  # of the layer in `other_formats`
# Bits per weight as the library's files have them, and what is said of them; None if not known.
BITS = {
    "bitsandbytes 0.50.2: nf4": 4.2, "comfy-kitchen 0.2.40: nvfp4": 4.5,
    "comfy-kitchen 0.2.40: asym_w4a8_int8": 4.5, "comfy-kitchen 0.2.40: convrot_w4a4": 4,
    "comfy-kitchen 0.2.40: int8_tensorwise": 8, "comfy-kitchen 0.2.40: float8_e4m3fn": 8,
    "mlx 0.32.4: mxfp8": 8.25, "mlx 0.32.4: mxfp4": 4.25, "mlx 0.32.4: nvfp4": 4.5,
    "optimum-quanto 0.2.7: qint8": None, "torchao 0.18.0: Float8WeightOnlyConfig": None,
}  # fmt: skip


@pytest.mark.parametrize("name", BITS)
def test_a_library_s_file_is_explained(tmp_path, name):
    found = inspect_file(other_formats.write(tmp_path / "model", name), every_byte=False)
    (facts,) = found.explained
    assert (facts.layers, found.problems) == (1, [])
    assert facts.bits == pytest.approx(BITS[name], abs=0.01)
    assert bool(facts.comfyui) == name.startswith("comfy-kitchen")
    if BITS[name] is None:
        assert found.as_mxfp8.bytes is None
    else:
        header = read_header(tmp_path / "model")
        bias = sum(t.nbytes for t in header.tensors.values() if t.name.endswith("bias"))
        stored = sum(t.nbytes for t in header.tensors.values() if "comfy" not in t.name) - bias
        assert facts.bits == pytest.approx(8 * stored / (256 * 512), rel=0.02)
        assert 0 <= found.as_mxfp8.bytes - AS_MXFP8 - bias < 200
    assert "original" in found.as_mxfp8.text
    assert f"{facts.name}: 1 layer" in found.summary()
    data = json.loads(found.to_json())
    assert data["explained"][0]["gpus"] == facts.gpus and data["as_mxfp8"]["text"]


def test_an_mxfp8_file_is_that_already(tmp_path):
    found = inspect_file(save(tmp_path, *model({"a": matrix(64, 64)})))
    assert found.as_mxfp8 is None and found.warnings == []
    assert [facts.name for facts in found.explained] == ["MXFP8"]


def test_the_size_as_mxfp8_is_that_of_the_converted_file(tmp_path):
    flux = next(row for row in architectures() if row.name == "Flux.1").signature
    state = {key: torch.zeros(8) for key in flux if not key.endswith("weight")}
    state |= {key: matrix(64, 64, torch.bfloat16) for key in flux if key.endswith("weight")}
    state["double_blocks.0.img_attn.qkv.weight"] = matrix(200, 100, torch.bfloat16)
    save_file(state, tmp_path / "source")
    found = inspect_file(tmp_path / "source", every_byte=False)
    report = convert_file(tmp_path / "source", tmp_path / "target")
    header = read_header(tmp_path / "target")
    size = sum(tensor.nbytes for tensor in header.tensors.values())
    assert report.quantized
    assert found.as_mxfp8.bytes == size
    assert f"with {len(report.quantized)} layer" in found.as_mxfp8.text


def test_only_of_known_formats_is_it_said_that_they_round(tmp_path):
    tensors, metadata = model({"a": matrix(64, 64)})
    for format, rounds in (("nvfp4", True), ("a_new_one", False)):
        changed = {key: text.replace("mxfp8", format) for key, text in metadata.items()}
        text = inspect_file(save(tmp_path, tensors, changed), every_byte=False).as_mxfp8.text
        assert "from its BF16, FP16 or FP32 original" in text
        assert ("rounded already" in text) == rounds


def test_a_text_encoder_s_size_is_told_too(tmp_path):
    """Of real shapes, by which ComfyUI tells encoders apart; the weights are a hole in the file."""
    key, size = "encoder.block.0.layer.0.SelfAttention.q.weight", 2 * 4096 * 4096
    entry = {"dtype": "BF16", "shape": [4096, 4096], "data_offsets": [0, size]}
    text = json.dumps({key: entry}).encode()
    with (tmp_path / "t5").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    found = inspect_file(tmp_path / "t5", every_byte=False)
    assert found.architecture == "T5"
    assert 0 <= found.as_mxfp8.bytes - 4096 * 4096 * 33 // 32 < 200


def verdict(found) -> tuple[str, str]:
    """As the JSON has it, which the page shows."""
    data = json.loads(found.to_json())["verdict"]
    return data["level"], data["text"]


def test_a_verdict_says_it_in_one_line(tmp_path):
    path = other_formats.write(tmp_path / "model", "comfy-kitchen 0.2.40: convrot_w4a4")
    assert verdict(inspect_file(path)) == (
        "good",
        "66.9 kB, INT4 with ConvRot, 1 layer: runs in ComfyUI 0.28 or later; 135 kB as MXFP8",
    )
    level, text = verdict(inspect_file(other_formats.write(tmp_path / "model", GGUF)))
    assert (level, "GGUF, 3 layers: runs in ComfyUI with ComfyUI-GGUF" in text) == ("notice", True)
    path.write_bytes(path.read_bytes()[:-100])
    level, text = verdict(inspect_file(path))
    assert (level, text.startswith("NOT OK: model: truncated")) == ("bad", True)
    save_file({"a.weight": matrix(8, 8)}, path)
    assert verdict(inspect_file(path)) == ("good", "208 B, not quantized")


def test_a_lora_needs_no_conversion(tmp_path):
    save_file({"a.lora_up.weight": torch.zeros(8, 4)}, tmp_path / "lora")
    assert "no conversion" in inspect_file(tmp_path / "lora").summary()


# ---- whether it is whole ---------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_download_is_explained_by_its_header(tmp_path, share, capsys):
    path = save(tmp_path, *model({"a": matrix(256, 256), "b": matrix(256, 256)}))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    found = inspect_file(path)
    (problem,) = found.problems
    assert f"it has {int(len(content) * share)} of {len(content)} bytes" in problem
    assert found.formats == {"mxfp8": 2} and not found.every_byte
    assert main(["inspect", str(path)]) == 1
    assert "PROBLEM: model: truncated" in capsys.readouterr().out
    path.write_bytes(content[:100])  # not even the header
    with pytest.raises(FormatError, match="truncated: the header needs"):
        inspect_file(path)


def with_marker(folder, text: bytes, metadata=None):
    tensors, _ = model({"a": matrix(64, 64)}, marked=False)
    tensors["a.comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return save(folder, tensors, metadata)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bytes(60), "holds only zeros"),
        (b'{"convrot": true}', 'names no format, for which ComfyUI says "Unknown quantization'),
        (b'{"format": "mxf', "is not JSON"),
    ],
)
def test_a_damaged_marker_is_a_problem(tmp_path, text, words):
    found = inspect_file(with_marker(tmp_path, text))
    (problem,) = found.problems
    assert "'a.comfy_quant'" in problem and words in problem
    assert "NOT OK" in found.summary().splitlines()[-1]
    assert found.formats == {"MXFP8": 1}


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("nvfp4", "weight_scale_2"), ("nvfp4", "weight_scale"), ("int8_tensorwise", "weight_scale"),
        ("asym_w4a8_int8", "weight_s_channel"), ("float8_e4m3fn", "weight_scale"),
    ],
)  # fmt: skip
def test_lost_scales_are_a_problem(tmp_path, name, lost):
    path = other_formats.write(tmp_path / "model", f"comfy-kitchen 0.2.40: {name}", lost)
    (problem,) = inspect_file(path, every_byte=False).problems
    assert f"its scales 'blocks.0.lin.{lost}' are missing" in problem


@pytest.mark.parametrize("name", ["nvfp4", "int8_tensorwise", "float8_e4m3fn"])
def test_codes_without_their_marker_are_warned_of(tmp_path, name):
    """ComfyUI runs these as weights: github.com/Comfy-Org/ComfyUI/issues/15511."""
    path = other_formats.write(tmp_path / "model", f"comfy-kitchen 0.2.40: {name}", "comfy_quant")
    (warning,) = inspect_file(path, every_byte=False).warnings
    assert "no marker says so" in warning and "mat1 and mat2" in warning


def test_mxfp8_without_its_markers_is_warned_of_from_the_header_alone(tmp_path):
    path = save(tmp_path, *model({"a": matrix(64, 64)}, marked=False))
    found = inspect_file(path, every_byte=False)
    (warning,) = found.warnings
    assert "1 layer in MXFP8, but no marker" in warning and "`mxfp8 repair`" in warning
    assert verdict(found)[0] == "notice" and found.as_mxfp8 is None


def test_markers_beyond_the_end_of_a_file_are_not_lost(tmp_path):
    path = other_formats.write(tmp_path / "model", "comfy-kitchen 0.2.40: nvfp4")
    path.write_bytes(path.read_bytes()[:-100])
    found = inspect_file(path)
    assert "truncated" in found.problems[0] and found.warnings == []


def test_an_older_scaled_fp8_model_is_in_order(tmp_path):
    """As ComfyUI wrote them before its markers, and Kijai's files are."""
    state = {
        "a.weight": torch.zeros(32, 32).to(torch.float8_e4m3fn), "a.scale_weight": torch.ones(1),
        "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn), "b.weight": matrix(32, 32),
    }  # fmt: skip
    save_file(state, tmp_path / "model")
    found = inspect_file(tmp_path / "model")
    assert (found.warnings, found.problems) == ([], [])
    assert [(facts.name, facts.layers) for facts in found.explained] == [("scaled FP8 (E4M3)", 1)]


def test_dtypes_that_comfyui_s_loader_does_not_know_are_warned_of(tmp_path):
    path = other_formats.write(tmp_path / "model", "comfy-kitchen 0.2.40: mxfp8")
    (warning,) = inspect_file(path, every_byte=False).warnings
    assert "KeyError: 'F8_E8M0'; `mxfp8 repair`" in warning


def test_a_marker_of_a_format_to_come_is_named(tmp_path):
    found = inspect_file(with_marker(tmp_path, b'{"format": "fp3"}'))
    assert found.warnings == ["1 layer marked as 'fp3', which no ComfyUI up to 0.38.1 knows"]
    assert ", fp3, 1 layer; " in verdict(found)[1]


def test_names_in_a_header_cannot_write_to_the_terminal(tmp_path):
    evil = "\x1b[31m\nOK: all is well"
    path = with_marker(tmp_path, json.dumps({"format": evil}).encode(), {evil: "", "a": ""})
    summary = inspect_file(path).summary()
    assert "\x1b" not in summary and "\nOK: all is well" not in summary
    assert summary.count(repr(evil)) == 3  # its format, its metadata, the warning


# ---- several files, and other kinds of them --------------------------------------------------


def sharded(folder, count: int = 3):
    weight_map = {}
    for index in range(count):
        name = f"model-{index + 1:05}-of-{count:05}.safetensors"
        save_file({f"{index}.weight": matrix(32, 32)}, folder / name)
        weight_map[f"{index}.weight"] = name
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("as_folder", [True, False])
def test_missing_parts_are_named_all_at_once(tmp_path, as_folder):
    index = sharded(tmp_path)
    found = inspect_file(tmp_path if as_folder else index)
    assert (found.problems, len(found.layers)) == ([], 3)
    assert found.container == "safetensors in 3 parts"
    assert inspect_file(tmp_path / "model-00001-of-00003.safetensors").warnings == [
        "one part of a model in several files; inspect its folder or its index"
    ]
    for number in (1, 3):
        (tmp_path / f"model-{number:05}-of-00003.safetensors").unlink()
    (problem,) = inspect_file(index).problems
    assert "2 of its 3 parts are missing: 'model-00001-of-00003" in problem
    assert "'model-00003-of-00003" in problem
    save_file({"other": matrix(2, 2)}, tmp_path / "model-00002-of-00003.safetensors")
    for number in (1, 3):
        save_file(
            {f"{number - 1}.weight": matrix(32, 32)},
            tmp_path / f"model-{number:05}-of-00003.safetensors",
        )
    (problem,) = inspect_file(index).problems
    assert "the index names 1 tensor that is not in its parts: '1.weight'" in problem


@pytest.mark.parametrize("name", ["model.sft.index.json", "MODEL.SafeTensors.Index.fp16.JSON"])
def test_an_index_is_known_by_every_name_that_it_may_have(tmp_path, name):
    index = sharded(tmp_path).rename(tmp_path / name)
    assert inspect_file(index).container == "safetensors in 3 parts"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_a_file_s_name_cannot_forge_a_line(tmp_path):
    save_file({"a.weight": matrix(32, 32)}, tmp_path / "a\nOK: fine.safetensors")
    assert "\nOK: fine" not in inspect_file(tmp_path).summary()


def test_a_folder_s_config_names_the_format(tmp_path):
    sharded(tmp_path)
    conf = {"quantization_config": {"quant_method": "torchao", "quant_type": "int8wo"}}
    (tmp_path / "config.json").write_text(json.dumps(conf))
    (facts,) = inspect_file(tmp_path).explained
    assert (facts.name, facts.layers) == ("torchao", 0)


GGUF = "gguf 0.19.0: flux"


def test_a_gguf_file_is_explained(tmp_path, capsys):
    path = other_formats.write(tmp_path / "model.gguf", GGUF)
    found = inspect_file(path)
    assert (found.container, found.architecture, found.problems) == ("GGUF 3", "flux", [])
    assert found.formats == {"GGUF Q4_0": 1, "GGUF Q8_0": 1, "GGUF Q5_1": 1}
    (facts,) = found.explained
    assert (facts.layers, facts.nodes, facts.made_by) == (3, "ComfyUI-GGUF", "its tests")
    assert facts.bits == pytest.approx((4.5 + 8.5 + 6) / 3)
    assert 0 <= found.as_mxfp8.bytes - (3 * 32 * 64 * 33 // 32 + 256) <= 3 * 120
    assert main(["inspect", str(path)]) == 0
    assert "GGUF: 3 layers, 6.33 bits per weight: 1 Q4_0, 1 Q8_0, 1 Q5_1" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-100])
    (problem,) = inspect_file(path).problems
    assert "truncated: it has 5500 of 5600 bytes (98%)" in problem


def test_a_gguf_file_that_is_not_quantized_has_lost_nothing(tmp_path):
    rest = struct.pack("<QcIQQIQ", 1, b"a", 2, 8, 8, 1, 0)  # F16
    content = gguf_header(tensors=1, rest=rest)
    (tmp_path / "model.gguf").write_bytes(content + bytes(-len(content) % 32 + 8 * 8 * 2))
    found = inspect_file(tmp_path / "model.gguf")
    assert (found.problems, found.explained, found.as_mxfp8.bytes) == ([], [], None)


def gguf_header(version=3, tensors=0, pairs=0, rest=b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


HOSTILE = {
    "version 1": gguf_header(version=1),
    "big-endian": gguf_header(version=3 << 24),
    "many tensors": gguf_header(tensors=2**63),
    "many pairs": gguf_header(pairs=2**63),
    "a long text": gguf_header(pairs=1, rest=struct.pack("<Q", 2**62)),
    "a long array": gguf_header(pairs=1, rest=struct.pack("<QcIIQ", 1, b"a", 9, 12, 2**61)),
    "nested arrays": gguf_header(
        pairs=1, rest=struct.pack("<QcI", 1, b"a", 9) + struct.pack("<IQ", 9, 1) * 9
    ),
    "as many tensors as there is room for": gguf_header(tensors=200_000, rest=bytes(24 * 200_000)),
    "as many entries": gguf_header(
        pairs=200_000,
        rest=b"".join(struct.pack("<QIIB", 4, i, 0, 1) for i in range(200_000)),
    ),
    "as many texts": gguf_header(
        pairs=1, rest=struct.pack("<QcIIQ", 1, b"a", 9, 8, 5_000_000) + bytes(8 * 5_000_000)
    ),
    "as many arrays": gguf_header(
        pairs=1, rest=struct.pack("<QcIIQ", 1, b"a", 9, 9, 200_000) + bytes(12 * 200_000)
    ),
    "an unknown value": gguf_header(pairs=1, rest=struct.pack("<QcI", 1, b"a", 99)),
    "an unknown kind": gguf_header(tensors=1, rest=struct.pack("<QcIQIQ", 1, b"a", 1, 32, 99, 0)),
    "dimensions": gguf_header(tensors=1, rest=struct.pack("<QcI", 1, b"a", 1000)),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_damaged_gguf_header_is_an_error(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content + bytes(16))
    with pytest.raises(FormatError, match=r"model\.gguf: "):
        inspect_file(tmp_path / "model.gguf")


def test_reading_a_gguf_header_can_be_interrupted(tmp_path):
    path = tmp_path / "model.gguf"
    rest = struct.pack("<QcIIQ", 1, b"a", 9, 8, 500_000) + bytes(8 * 500_000)
    path.write_bytes(gguf_header(pairs=1, rest=rest))
    calls = []

    def interrupt(done, total, key):
        calls.append(done)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inspect_file(path, progress=interrupt)
    assert calls == [1 << 20, 2 << 20, 3 << 20]
    path.write_bytes(path.read_bytes() + bytes(32))
    assert inspect_file(path).problems == []


def test_a_gguf_header_cut_anywhere_is_an_error_or_a_problem(tmp_path):
    content = other_formats.write(tmp_path / "whole.gguf", GGUF).read_bytes()
    path = tmp_path / "model.gguf"
    for length in range(8, len(content), 37):
        path.write_bytes(content[:length])
        try:
            assert inspect_file(path).problems
        except FormatError as error:
            assert "truncated or damaged" in str(error)


def test_a_torch_file_is_named_and_never_unpickled(tmp_path, capsys):
    path = other_formats.write(tmp_path / "model.pt", "torchao 0.18.0: torch.save")
    found = inspect_file(path)
    assert [facts.name for facts in found.explained] == ["torchao"]
    assert found.problems == [] and "can run code" in found.summary()
    assert main(["inspect", str(path)]) == 0
    assert "read: its first bytes" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-200])
    (problem,) = inspect_file(path).problems
    assert "truncated: the archive has no end" in problem


# ---- whatever else a file may be -------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(other_formats.FILES))
def test_a_damaged_file_is_explained_or_refused(tmp_path, name):
    """Bytes of the header are changed and the file cut, wherever chance has it."""
    whole = other_formats.write(tmp_path / "whole", name).read_bytes()
    chance, path = random.Random(name), tmp_path / "model"
    for _ in range(20):
        content = bytearray(whole)
        for _ in range(chance.choice([1, 1, 3])):
            content[chance.randrange(min(len(content), 2000))] = chance.randrange(256)
        path.write_bytes(content[: chance.choice([len(content), chance.randrange(len(content))])])
        try:
            found = inspect_file(path, every_byte=False)
        except FormatError as error:
            assert str(error).startswith("model: ")
        else:
            assert json.loads(found.to_json())["file"] == "model" and found.summary()


@pytest.mark.parametrize("name", ["a" + ".a" * 2_000_000, "lora_" * 20_000], ids=["dots", "lora"])
def test_a_long_name_takes_no_time(tmp_path, name):
    """Cutting off one part after another took 28 s of a tenth of the dots."""
    codes = torch.zeros(32, 32, dtype=torch.float8_e4m3fn)
    save_file({"a.weight": codes, name: torch.zeros(1)}, tmp_path / "model")
    started = time.monotonic()
    assert inspect_file(tmp_path / "model", every_byte=False).as_mxfp8.bytes is not None
    assert time.monotonic() - started < 10
