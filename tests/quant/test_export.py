"""`mxfp8 export`: what it writes without MLX at hand, what it refuses, and that nothing is left."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from bad_files import draft
from checkpoints import load, matrix, same
from diffusers_names import rename, zimage_state
from safetensors.torch import save_file

from mxfp8.integrations import mlx
from mxfp8.kernels import layout
from mxfp8.quant.cli import main
from mxfp8.quant.container.part_file import create_part_file
from mxfp8.quant.conversion.convert import convert_file

MODEL = {
    "a.weight": matrix(300, 160, seed=1),
    "a.bias": matrix(1, 300)[0],
    "b.weight": matrix(40, 64, seed=2),
    "conv.weight": torch.ones(4, 3, 2, 2),
    "scale": torch.tensor(2.0),
}
EXCLUDED = "b"


@pytest.fixture
def file(tmp_path) -> Path:
    """An MXFP8 file with one layer, in a folder of its own."""
    folder = tmp_path / "models"
    folder.mkdir()
    save_file(MODEL, tmp_path / "source.safetensors")
    words = ["convert", tmp_path / "source.safetensors", folder / "a.safetensors"]
    assert main([*map(str, words), "--exclude", EXCLUDED]) == 0
    return folder / "a.safetensors"


@pytest.fixture
def export(file, capsys):
    """Runs the command: (exit status, stdout, stderr)."""

    def export(*options, source=file, folder=None):
        capsys.readouterr()
        folder = folder or file.with_name("mlx")
        status = main(["export", str(source), "--mlx", str(folder), *map(str, options)])
        return status, *capsys.readouterr()

    return export


def check(folder: Path, file: Path) -> None:
    """Compare an exported folder with its file, bit for bit."""
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    found = {}
    for name in set(index["weight_map"].values()):
        tensors, metadata = load(folder / name)
        assert metadata == {"format": "mlx"}
        assert {index["weight_map"][key] for key in tensors} == {name}
        found |= tensors
    assert found.keys() == index["weight_map"].keys()
    stored, _ = load(file)
    codes = stored["a.weight"].view(torch.uint8)[:300].contiguous().view(torch.uint32)
    scales = layout.untile(stored["a.weight_scale"], 300, 5).contiguous()
    others = {key: MODEL[key] for key in ("a.bias", "b.weight", "conv.weight", "scale")}
    expected = {"a.weight": codes, "a.scales": scales, **others}
    assert found.keys() == expected.keys()
    assert all(same(found[key], tensor) for key, tensor in expected.items())
    size = sum(tensor.nbytes for tensor in expected.values())
    assert index["metadata"] == {
        "total_size": size, "quantization_mode": "mxfp8", "quantization_level": "8",
        "quantization_group_size": "32",
    }  # fmt: skip


def test_export_writes_what_mlx_packs(file, export):
    status, out, _ = export()
    assert status == 0
    assert out.startswith("a.safetensors -> mlx: 1 MXFP8 layer, ")
    assert out.splitlines()[-1] == "OK: written for MLX; no Mac has run this export so far"
    folder = file.with_name("mlx")
    assert sorted(os.listdir(folder)) == [
        "config.json", "model.safetensors", "model.safetensors.index.json"
    ]  # fmt: skip
    check(folder, file)


@pytest.mark.parametrize("slab", [1, 160 * 128])
def test_export_splits_files_as_mlx_does_and_reads_in_slabs(file, export, monkeypatch, slab):
    monkeypatch.setattr(mlx, "_SHARD", 50_000)
    monkeypatch.setattr(mlx, "_SLAB", slab)
    assert export()[0] == 0
    folder = file.with_name("mlx")
    parts = sorted(path.name for path in folder.glob("*.safetensors"))
    assert parts == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    check(folder, file)


def test_export_keeps_the_fields_of_a_config(tmp_path, file, export):
    config = {"model_type": "qwen3", "hidden_size": 64, "quantization": {"bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, out, _ = export("--config", tmp_path / "config.json", "--json")
    assert status == 0
    result = json.loads(out)
    assert next(iter(result.items())) == ("mxfp8_export", 1)
    assert (result["layers"], result["files"], result["renamed"]) == (1, 1, None)
    written = json.loads((file.with_name("mlx") / "config.json").read_text("utf-8"))
    assert written == config | {"quantization": {"group_size": 32, "bits": 8, "mode": "mxfp8"}}


def test_z_image_rows_are_split_wherever_they_lie_in_a_tile(tmp_path):
    """q, k and v of 32 rows each, in a tile of 128; names as mlx-vlm's sanitizer leaves them."""
    state = zimage_state()
    save_file(state, tmp_path / "source.safetensors")
    convert_file(tmp_path / "source.safetensors", tmp_path / "a.safetensors")
    mlx.export_mlx(tmp_path / "a.safetensors", tmp_path / "mlx")
    found, _ = load(tmp_path / "mlx" / "model.safetensors")
    stored, _ = load(tmp_path / "a.safetensors")
    qkv = "layers.0.attention.qkv"
    codes = stored[f"{qkv}.weight"].view(torch.uint8).view(torch.uint32)
    scales = layout.untile(stored[f"{qkv}.weight_scale"], 96, 1)
    for i, part in enumerate("qkv"):
        rows, name = slice(32 * i, 32 * i + 32), f"layers.0.attention.to_{part}"
        assert same(found[f"{name}.weight"], codes[rows].contiguous())
        assert same(found[f"{name}.scales"], scales[rows].contiguous())
    names = {
        name.replace("all_x_embedder.2-1.", "x_embedder.")
        .replace("all_final_layer.2-1.adaLN_modulation.1.", "final_layer.adaLN_modulation.0.")
        .replace("all_final_layer.2-1.", "final_layer.")
        .replace("t_embedder.mlp.0.", "t_embedder.linear1.")
        .replace("t_embedder.mlp.2.", "t_embedder.linear2.")
        for name in rename("zimage", state)
    }
    assert {name for name in found if not name.endswith(".scales")} == names


# What is done to the file's draft -> what the error says.
DEFECTS = {
    "a NaN code": (
        lambda d: d.tensors["a.weight"].__setitem__(2, b"\x7f" + d.tensors["a.weight"][2][1:]),
        r"codes of MXFP8 layer 'a' \[300, 160\] are NaN between rows 0 and 300",
    ),
    "a NaN scale": (
        lambda d: d.tensors["a.weight_scale"].__setitem__(
            2, b"\xff" + d.tensors["a.weight_scale"][2][1:]
        ),
        r"scales of MXFP8 layer 'a' \[300, 160\]: the one of row 0, block 0 is byte 255",
    ),
    "no markers": (lambda d: d.unmark(), "'a.weight' .* holds MXFP8 codes, but no marker says so"),
    "another format": (
        lambda d: d.mark_header({"format": "float8_e4m3fn"}, "b"),
        "layer 'b' is 'float8_e4m3fn', which this export cannot write",
    ),
    "plain FP8": (
        lambda d: d.tensors.update({"c.weight": ["F8_E5M2", [2, 2], b"abcd"]}),
        "'c.weight' is F8_E5M2, which MLX does not load as such",
    ),
    "experts": (
        lambda d: _make_bank(d),
        "'e' is a bank of experts; this export writes linear layers only",
    ),
    "a wrong shape": (lambda d: d.mark("a", orig_shape=[300, 100]), r"shape \[300, 100\] pads to"),
}


def _make_bank(d) -> None:
    d.tensors["e.weight"] = ["F8_E4M3", [1, 32, 32], bytes(1024)]
    d.tensors["e.weight_scale"] = ["U8", [1, 128, 4], bytes(512)]
    conf = {"format": "mxfp8", "num_experts": 1}
    d.mark_tensor(json.dumps(conf).encode(), "e")
    d.mark_header(conf, "e")


@pytest.mark.parametrize(("change", "error"), DEFECTS.values(), ids=DEFECTS)
def test_export_refuses_what_mlx_would_read_wrong_and_leaves_nothing(file, export, change, error):
    bad = draft(file)
    change(bad)
    file.write_bytes(bad.encode())
    status, out, text = export()
    assert (status, out) == (1, "")
    assert re.search(error, text), text
    assert os.listdir(file.parent) == [file.name]


def test_export_refuses_files_of_other_kinds(tmp_path, file, export):
    status, _, text = export(source=tmp_path / "source.safetensors")
    assert status == 1 and "no layer is MXFP8; make an MXFP8 file of the original first" in text
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    status, _, text = export(source=tmp_path / "a.gguf")
    assert status == 1 and "GGUF" in text
    assert export(source=tmp_path / "missing.safetensors")[0] == 1
    (tmp_path / "config.json").write_text("[]")
    status, _, text = export("--config", tmp_path / "config.json")
    assert status == 1 and "config.json is not a JSON object" in text
    assert os.listdir(file.parent) == [file.name]


def test_export_replaces_no_folder_that_holds_something(file, export):
    folder = file.with_name("mlx")
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    status, _, text = export()
    assert status == 1 and "the folder is there and not empty" in text
    assert os.listdir(folder) == ["tokenizer.json"]
    status, _, text = export(folder=file)
    assert status == 1 and "this is a file; give another name for the folder" in text
    status, _, text = export(folder=file.with_name("no") / "mlx")
    assert status == 1 and "there is no such folder; make it first" in text
    (folder / "tokenizer.json").unlink()
    assert export()[0] == 0  # into an empty one
    check(folder, file)
    assert sorted(os.listdir(file.parent)) == ["a.safetensors", "mlx"]


def test_an_interrupt_leaves_nothing_and_a_killed_export_is_cleared_away(file, export):
    folder = file.with_name("mlx")

    def interrupt(done, total, key):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mlx.export_mlx(file, folder, progress=interrupt)
    assert os.listdir(file.parent) == [file.name]

    parts = file.with_name("mlx.mxfp8.parts")
    parts.mkdir()
    (parts / "model.safetensors.mxfp8.part").write_bytes(b"half")
    file.with_name("mlx.mxfp8.part").write_bytes(b"")
    lock, held = create_part_file(file.with_name("other"))
    try:
        status, _, text = export(folder=file.with_name("other"))
        assert status == 1 and "another conversion is writing this file" in text
    finally:
        held.close()
        lock.unlink()
    assert export()[0] == 0
    check(folder, file)
    assert sorted(os.listdir(file.parent)) == ["a.safetensors", "mlx"]


def test_progress_ends_at_the_total(file):
    seen = []
    mlx.export_mlx(file, file.with_name("mlx"), progress=lambda *now: seen.append(now[:2]))
    done, total = seen[-1]
    assert done == total
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_a_layer_that_is_no_whole_number_of_blocks_becomes_bf16(tmp_path):
    weight = matrix(300, 33, torch.float32)
    save_file({"a.weight": weight, "b.weight": MODEL["a.weight"]}, tmp_path / "source.safetensors")
    convert_file(tmp_path / "source.safetensors", tmp_path / "a.safetensors")
    result = mlx.export_mlx(tmp_path / "a.safetensors", tmp_path / "mlx")
    assert result.dequantized == ["a"]
    stored, _ = load(tmp_path / "a.safetensors")
    scales = layout.untile(stored["a.weight_scale"], 320, 2).repeat_interleave(32, dim=1)
    values = stored["a.weight"].double() * torch.exp2(scales.double() - 127)
    found, _ = load(tmp_path / "mlx" / "model.safetensors")
    assert same(found["a.weight"].double(), values[:300, :33].contiguous())
    assert found["a.weight"].dtype == torch.bfloat16
    assert "a.scales" not in found


def test_an_exported_folder_is_known_for_what_it_is(file, export, capsys):
    assert export()[0] == 0
    folder = file.with_name("mlx")
    assert main(["inspect", str(folder)]) == 0
    assert "MXFP8 in MLX's form: 1 layer, 8.25 bits per weight" in capsys.readouterr().out
    assert main(["convert", str(folder), str(file.with_name("b.safetensors"))]) == 1
    assert "MXFP8 in MLX's form" in capsys.readouterr().err
