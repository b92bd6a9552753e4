"""Rebuilding what a file lost, bit for bit, or saying why it cannot be."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import load, matrix, same
from quantized_files import model, row_major, save
from safetensors.torch import save_file

from mxfp8.kernels import layout
from mxfp8.quant.checks import scan
from mxfp8.quant.checks.inspect import inspect_file
from mxfp8.quant.checks.repair import repair_file
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.format import FormatError, read_header

WEIGHTS = {
    "blocks.0.lin": matrix(128, 512, torch.bfloat16, seed=1),
    "blocks.1.lin": matrix(200, 96, torch.bfloat16, seed=2),
    "blocks.2.lin": matrix(256, 128, torch.bfloat16, seed=3),
}
OTHERS = {
    "blocks.1.lin.bias": matrix(1, 200)[0],
    "norm.weight": matrix(1, 96)[0],
    "table": matrix(5, 7, torch.float32),
    "empty": torch.zeros(0, 3),
}
MARKER = ".comfy_quant"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Tensors and metadata of a file as the converter writes it."""
    folder = tmp_path_factory.mktemp("sound")
    tensors = {**{f"{name}.weight": w for name, w in WEIGHTS.items()}, **OTHERS}
    save_file(tensors, folder / "source", {"title": "tiny"})
    convert_file(folder / "source", folder / "target")
    return load(folder / "target")


def without_markers(tensors):
    return {k: v for k, v in tensors.items() if not k.endswith(MARKER)}


def in_row_major(tensors):
    changed = dict(tensors)
    for name in WEIGHTS:
        scale, qdata = tensors[f"{name}.weight_scale"], tensors[f"{name}.weight"]
        changed[f"{name}.weight_scale"] = row_major(scale, qdata)
    return changed


def cut_row_major(tensors):
    """Row-major scales without padding, which have a shape of their own."""
    changed = dict(tensors)
    for name in WEIGHTS:
        scale, (rows, cols) = tensors[f"{name}.weight_scale"], tensors[f"{name}.weight"].shape
        changed[f"{name}.weight_scale"] = layout.untile(scale, rows, cols // 32).contiguous()
    return changed


def as_e8m0(tensors):
    return {
        k: v.view(torch.float8_e8m0fnu) if k.endswith("_scale") else v for k, v in tensors.items()
    }


DAMAGES = {
    "no markers": (without_markers, False, "auto"),
    "header markers only": (without_markers, True, "auto"),
    "tensor markers only": (dict, False, "auto"),
    "scales of another dtype": (as_e8m0, True, "auto"),
    "row-major scales": (in_row_major, True, "auto"),
    "row-major scales, by request": (in_row_major, True, "row-major"),
    "row-major scales of their own shape": (cut_row_major, True, "auto"),
    "all at once": (lambda t: as_e8m0(in_row_major(without_markers(t))), False, "auto"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_becomes_what_it_was(tmp_path, sound, kind):
    damage, keep_header, scales = DAMAGES[kind]
    tensors, metadata = sound
    kept = metadata if keep_header else {"title": "tiny"}
    path = save(tmp_path, damage(tensors), kept)
    result = repair_file(path, tmp_path / "new", scales=scales)
    repaired, repaired_metadata = load(tmp_path / "new")
    assert repaired.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if name.endswith(MARKER):
            expected, marker = (json.loads(bytes(t.tolist())) for t in (tensor, repaired[name]))
            if kind in ("no markers", "all at once"):  # what cannot be known is left out
                expected = {key: expected[key] for key in ("format", "group_size")}
            assert marker == expected, name
        else:
            assert same(repaired[name], tensor), name
    assert repaired_metadata["title"] == "tiny"
    assert scan.check_file(tmp_path / "new") == []
    assert result.layers == 3
    layers = read_header(tmp_path / "new").layers
    assert all(layers[name].holds(w.shape) for name, w in WEIGHTS.items())


@pytest.mark.parametrize("name", ["no markers", "row-major scales", "scales of another dtype"])
def test_the_summary_says_what_was_done(tmp_path, sound, name):
    damage, keep_header, scales = DAMAGES[name]
    path = save(tmp_path, damage(sound[0]), sound[1] if keep_header else None)
    summary = repair_file(path, tmp_path / "new", scales=scales).summary()
    assert "model -> new" in summary
    words = {"no markers": "markers rebuilt", "row-major scales": "reordered to tiled"}
    assert f"{words.get(name, 'rewritten as U8')}: 3 of 3 layers" in summary


def test_markers_of_other_formats_and_unknown_fields_stay(tmp_path):
    tensors, metadata = model({"a": matrix(128, 128)})
    layers = json.loads(metadata["_quantization_metadata"])["layers"]
    layers["a"] |= {"full_precision_matrix_mult": True, "note": "mine"}
    layers["fp8"] = {"format": "float8_e4m3fn"}
    tensors |= {"fp8.weight": matrix(32, 32).to(torch.float8_e4m3fn),
                "fp8.weight_scale": torch.tensor(1.0)}  # fmt: skip
    path = save(tmp_path, tensors, {"_quantization_metadata": json.dumps({"layers": layers})})
    repair_file(path, tmp_path / "new")
    header = read_header(tmp_path / "new")
    assert header.markers["fp8"] == {"format": "float8_e4m3fn"}
    assert header.layers["a"].conf == layers["a"]
    assert "fp8.comfy_quant" not in header.tensors


def test_the_order_of_scales_can_be_forced_against_the_evidence(tmp_path):
    tensors, _ = model({"a": matrix(128, 512)})
    path = save(tmp_path, tensors)
    repair_file(path, tmp_path / "tiled", scales="tiled")
    repair_file(path, tmp_path / "rows", scales="row-major")
    assert same(load(tmp_path / "tiled")[0]["a.weight_scale"], tensors["a.weight_scale"])
    assert not same(load(tmp_path / "rows")[0]["a.weight_scale"], tensors["a.weight_scale"])


def test_layers_without_evidence_follow_the_rest_of_the_file(tmp_path):
    """The scales of "flat" and those of "rows" are equal; only "rows" shows their order."""
    weights = {"rows": matrix(128, 512), "flat": torch.ones(128, 512)}
    path = save(tmp_path, *model(weights, order=row_major))
    assert set(repair_file(path, tmp_path / "new").tiled) == {"rows", "flat"}


def test_a_sound_file_has_nothing_to_repair(tmp_path, sound):
    path = save(tmp_path, *sound)
    with pytest.raises(FormatError, match="model: nothing to repair: 3 MXFP8 layers"):
        repair_file(path, tmp_path / "new")


def drop(key):
    return lambda tensors: {k: v for k, v in tensors.items() if k != key}


def put(key, value):
    return lambda tensors: {**tensors, key: value}


NAN = torch.full((128, 16), 255, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("damage", "marked", "words"),
    [
        (drop("blocks.0.lin.weight_scale"), True, "'blocks.0.lin': its scales are missing"),
        (drop("blocks.0.lin.weight_scale"), False, "scales are missing too"),
        (drop("blocks.0.lin.weight"), True, "the file is incomplete, get it again"),
        (put("blocks.0.lin.weight", torch.zeros(128, 512)), True, r"is F32 \[128, 512\]; MXFP8"),
        (put("blocks.0.lin.weight_scale", torch.zeros(4)), True, r"its scales are F32 \[4\]"),
        (
            put("blocks.0.lin.weight_scale", torch.zeros(512, 4, dtype=torch.uint8)),
            True,
            r"needs U8 or F8_E8M0 \[128, 16\]",
        ),
        (put("blocks.0.lin.weight_scale", NAN), False, "row 0, block 0 is byte 255"),
    ],
)
def test_what_cannot_be_repaired_is_refused(tmp_path, sound, damage, marked, words):
    tensors, metadata = sound
    tensors = damage(tensors if marked else without_markers(tensors))
    path = save(tmp_path, tensors, metadata if marked else None)
    with pytest.raises(FormatError, match=words):
        repair_file(path, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_nan_codes_stay_and_are_a_problem_of_the_new_file_too(tmp_path, sound):
    tensors, metadata = dict(sound[0]), sound[1]
    codes = tensors["blocks.1.lin.weight"].view(torch.uint8).clone()
    codes[3, 70], codes[199, 95] = 0x7F, 0xFF
    codes[201, 0] = 0x7F  # padding: no part of the layer
    tensors["blocks.1.lin.weight"] = codes.view(torch.float8_e4m3fn)
    result = repair_file(save(tmp_path, as_e8m0(tensors), metadata), tmp_path / "new")
    assert same(load(tmp_path / "new")[0]["blocks.1.lin.weight"], tensors["blocks.1.lin.weight"])
    assert result.problems == inspect_file(tmp_path / "new").problems
    (problem,) = result.problems
    assert problem.startswith("'blocks.1.lin': 2 codes are NaN")
    *_, line, verdict = result.summary().splitlines()
    assert line == f"PROBLEM: {problem}" and verdict.startswith("NOT OK: 1 problem")


def test_a_plain_fp8_file_is_not_taken_for_mxfp8(tmp_path):
    tensors = {"a.weight": matrix(128, 512).to(torch.float8_e4m3fn),
               "a.weight_scale": torch.zeros(128, 16, dtype=torch.uint8)}  # fmt: skip
    with pytest.raises(FormatError, match="no layer has MXFP8 codes and scales"):
        repair_file(save(tmp_path, tensors), tmp_path / "new")


def test_what_loaders_would_refuse_is_not_written(tmp_path):
    path = save(tmp_path, model({"wte": matrix(128, 512)})[0])
    with pytest.raises(FormatError, match=r"'wte' .* is an embedding in MXFP8"):
        repair_file(path, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_unknown_order_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one of auto, tiled, row-major"):
        repair_file(tmp_path / "any", tmp_path / "new", scales="swizzled")


def test_an_interrupt_leaves_nothing(tmp_path, sound):
    def interrupt(done, total, key):
        if done > total // 2:
            raise KeyboardInterrupt

    path = save(tmp_path, without_markers(sound[0]))
    with pytest.raises(KeyboardInterrupt):
        repair_file(path, tmp_path / "new", progress=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_file_is_not_repaired_onto_itself(tmp_path, sound):
    path = save(tmp_path, without_markers(sound[0]))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="would replace the source"):
        repair_file(path, path, overwrite=True)
    assert path.read_bytes() == before
