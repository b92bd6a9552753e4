"""The `mxfp8` command: what it prints, writes and returns, and what `verify` finds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import GOLDEN, flip, load, matrix
from safetensors.torch import save_file

from mxfp8.quant.checks.verify import verify_file
from mxfp8.quant.cli import main
from mxfp8.quant.container import header
from mxfp8.quant.conversion.calibration import calibrate
from mxfp8.quant.format import AGAIN, read_header
from mxfp8.quant.reports.conversion import Report

ZIMAGE = GOLDEN / "zimage_src.safetensors"
MODEL = {
    "a.weight": matrix(40, 64, seed=1),
    "b.weight": matrix(300, 33, torch.float32, seed=2),
    "b.bias": matrix(1, 300)[0],
    "zero.weight": torch.zeros(32, 32),
    "norm.weight": torch.ones(7),
}


@pytest.fixture
def run(capsys):
    """Runs the command in this process: (exit status, stdout, stderr)."""

    def run(*words):
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def source(tmp_path) -> Path:
    save_file(MODEL, tmp_path / "source", {"format": "pt"})
    return tmp_path / "source"


@pytest.fixture
def target(source, run) -> Path:
    assert run("convert", source, source.with_name("target"))[0] == 0
    return source.with_name("target")


def test_convert_prints_a_summary_and_writes_the_file(source, run):
    status, out, _ = run("convert", source, source.with_name("target"))
    assert status == 0
    assert out.startswith("source -> target\n")
    assert "3 layers MXFP8, 0 kept (preset default, architecture not recognized)" in out
    assert read_header(source.with_name("target")).layers.keys() == {"a", "b", "zero"}


def test_convert_options_choose_the_layers(source, run):
    options = ("--preset", "none", "--exclude", "a|b", "--include", "zero")
    assert run("convert", source, source.with_name("target"), *options)[0] == 0
    assert read_header(source.with_name("target")).layers.keys() == {"zero"}


def test_convert_overwrites_only_when_asked(source, target, run):
    before = target.read_bytes()
    status, _, err = run("convert", source, target, "--exclude", "a")
    assert (status, target.read_bytes()) == (1, before)
    assert "overwrite" in err
    assert run("convert", source, target, "--exclude", "a", "--overwrite")[0] == 0
    assert target.read_bytes() != before


def test_the_report_file_is_the_report(source, run):
    path = source.with_name("report.json")
    status, out, _ = run("convert", source, source.with_name("target"), "--report", path)
    report = Report.from_json(path.read_text(encoding="utf-8"))
    assert status == 0
    assert report.summary() in out
    assert [layer.name for layer in report.quantized] == ["b", "zero", "a"]


def test_errors_of_outputs_are_of_held_out_data_if_there_is_any(source, run):
    net = torch.nn.Sequential(torch.nn.Linear(64, 40, bias=False)).eval()
    save_file(net.state_dict(), source)
    paths = [source.with_name(name) for name in ("calibration", "held-out")]
    for path in paths:
        calibrate(net, [torch.randn(70, 64)], lambda module, x: module(x)).save(path)
    words = ("convert", source, source.with_name("target"), "--overwrite")
    words += ("--calibration", paths[0])
    assert "of nearest rounding on average, on the calibration data itself" in run(*words)[1]
    words += ("--held-out", paths[1])
    assert "of nearest rounding on average, on held-out data" in run(*words)[1]
    status, _, err = run(*words, "--report", paths[1])
    assert (status, "would replace the model" in err) == (1, True)


def test_dry_run_prints_every_decision_and_writes_nothing(source, run):
    status, out, _ = run("convert", "--dry-run", ZIMAGE, source.with_name("target"))
    assert status == 0
    lines = out.splitlines()
    assert "mxfp8  layers.0.attention.qkv.weight  BF16 192x32  linear layer" in lines
    kept = "keep   layers.0.adaLN_modulation.0.weight  BF16 128x32  preset zimage keeps "
    assert kept + "'adaLN_modulation'" in lines
    assert len(lines) == len(load(ZIMAGE)[0]) + 2
    assert lines[-1].endswith("tensors would be MXFP8 (preset zimage, Z-Image)")
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_dry_run_gives_the_reasons_where_nothing_would_be_quantized(source, run):
    words = ("convert", "--dry-run", source, source.with_name("target"), "--exclude", ".")
    assert "keep   a.weight  BF16 40x64  excluded by '.'" in run(*words)[1]


def test_inspect_says_what_a_file_holds(target, run):
    status, out, _ = run("inspect", target)
    assert status == 0
    assert out.splitlines()[0].startswith("target: ")
    assert "architecture: not recognized" in out
    assert "mxfp8: 3 layers" in out
    assert "metadata: _quantization_metadata, format" in out


def test_inspect_json_has_the_same_and_every_layer(target, run):
    status, out, _ = run("inspect", target, "--json")
    data = json.loads(out)
    assert status == 0
    assert data["formats"] == {"mxfp8": 3}
    assert data["bytes"] == target.stat().st_size
    assert data["other_bytes"] == 300 * 2 + 7 * 4
    layers = {layer["name"]: layer for layer in data["layers"]}
    assert layers["b"] == {
        "name": "b",
        "shape": [300, 33],
        "bytes": 320 * 64 + 384 * 4,
        "scale_dtype": "U8",
        "full_precision_matrix_mult": False,
        "nan_codes": 0,
        "nan_scales": 0,
        "padding": 0,
        "scale_order": "tiled",
        "decision": "mxfp8",
        "reason": "marked as MXFP8",
        "dtype": "F8_E4M3",
    }
    assert (data["problems"], data["warnings"]) == ([], [])
    size = sum(layer["bytes"] for layer in layers.values() if layer["decision"] == "mxfp8")
    markers = sum(t.numel() for k, t in load(target)[0].items() if k.endswith(".comfy_quant"))
    assert data["mxfp8_bytes"] == size + markers


def test_inspect_finds_what_is_wrong_in_any_byte(target, run):
    content = bytearray(target.read_bytes())
    layer = read_header(target).layers["b"]
    content[layer.weight.begin + 5] = 0x7F
    content[layer.weight.end - 1] = 1  # padding
    content[layer.scale.begin] = 255
    target.write_bytes(content)
    status, out, _ = run("inspect", target)
    assert status == 1
    assert "PROBLEM: 'b': 1 scale bytes are 255" in out
    assert "PROBLEM: 'b': 1 codes are NaN" in out
    assert "WARNING: 'b': 1 bytes of padding are not zero" in out
    status, out, _ = run("inspect", target, "--header")
    assert (status, "PROBLEM" in out) == (0, False)


def test_a_file_without_markers_is_inspected_repaired_and_verified(source, target, run):
    tensors, _ = load(target)
    kept = {k: v.clone() for k, v in tensors.items() if not k.endswith(".comfy_quant")}
    lost, new = target.with_name("lost"), target.with_name("new")
    save_file(kept, lost)
    status, out, _ = run("inspect", lost)
    assert (status, "holds MXFP8 codes" in out) == (1, True)
    status, out, err = run("repair", lost, new)
    assert (status, err) == (0, "")
    assert "markers rebuilt: 3 of 3 layers" in out
    assert run("verify", new, "--source", source)[0] == 0
    status, _, err = run("repair", new, lost, "--overwrite")
    assert (status, "nothing to repair" in err) == (1, True)


def test_inspect_recognizes_an_architecture(run):
    assert "architecture: Z-Image" in run("inspect", ZIMAGE)[1]


def test_inspecting_a_header_needs_no_torch():
    code = (
        "import sys; from mxfp8.quant.cli import main; main(sys.argv[1:]); "
        "print('torch' in sys.modules)"
    )
    path = str(GOLDEN / "a_zimage_simple.safetensors")
    words = [sys.executable, "-c", code, "inspect", path, "--header"]
    out = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "mxfp8: " in out
    assert out.splitlines()[-1] == "False"


def test_backends_are_listed_with_reasons(run):
    status, out, _ = run("backends")
    assert status == 0
    assert "eager: plain torch on any device" in out
    assert "not chosen automatically" in out


BAD_USES = [
    (),
    ("convert", "a"),
    ("inspect",),
    ("inspect", "a", "--nope"),
    ("verify", "a"),
    ("convert", "a", "b", "--preset", "nope"),
    ("convert", "a", "b", "--exclude", "("),
    ("fly",),
]


@pytest.mark.parametrize("words", BAD_USES, ids=" ".join)
def test_wrong_usage_is_2(run, words):
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert "usage: mxfp8" in err


def bad_file(folder) -> Path:
    path = folder / "bad.safetensors"
    path.write_bytes(b"\x02\0\0\0\0\0\0\0[]")
    return path


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("inspect", "nowhere"), "nowhere"),
        (("inspect", "bad"), "bad.safetensors: the header is not a JSON object"),
        (("convert", "bad", "new"), "bad.safetensors: the header is not a JSON object"),
        (("convert", "source", "folder/new"), "folder"),
        (("convert", "source", "new", "--report", "folder/new"), "--report: there is no folder"),
        (("verify", "source", "--source", "bad"), "bad.safetensors"),
    ],
)
def test_errors_are_one_line_on_stderr(source, run, words, error):
    names = {"bad": bad_file(source.parent), "source": source}
    places = {name: source.parent / name for name in ("nowhere", "new", "folder/new")} | names
    status, out, err = run(*(places.get(word, word) for word in words))
    assert status != 0
    assert out == ""
    assert err.splitlines()[-1].startswith("mxfp8: ")
    assert error in err
    assert "Traceback" not in err
    assert not (source.parent / "new").exists()


def test_an_interrupt_is_reported_without_a_traceback(source, run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mxfp8.quant.conversion.convert.convert_file", interrupted)
    status, _, err = run("convert", source, source.with_name("target"))
    assert status == 1
    assert "mxfp8: interrupted" in err


def test_the_console_script_is_the_command(source):
    script = Path(sys.executable).with_name("mxfp8")
    words = [script, "convert", source, source.with_name("target")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "source -> target")
    assert source.with_name("target").exists()
    failed = subprocess.run([script, "inspect", "nowhere"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("mxfp8: ")


def rewrite(path, change, metadata=None) -> Path:
    """Save a file again, by the safetensors library, with its tensors changed."""
    tensors, kept = load(path)
    change(tensors)
    save_file({key: t.clone() for key, t in tensors.items()}, path, metadata or kept)
    return path


def problems(path, source) -> list[str]:
    return verify_file(path, source).problems


def test_verify_measures_every_layer_as_the_conversion_did(source, target, run):
    path = source.with_name("report.json")
    assert run("convert", source, target, "--overwrite", "--report", path)[0] == 0
    report = Report.from_json(path.read_text(encoding="utf-8"))
    result = verify_file(target, source)
    assert result.problems == []
    assert result.sqnr_db == pytest.approx(report.sqnr_db, rel=1e-6)
    assert {name: e.sqnr_db for name, e in result.layers.items()} == {
        layer.name: layer.sqnr_db and pytest.approx(layer.sqnr_db, rel=1e-6)
        for layer in report.quantized
    }
    assert result.worst == report.worst.name


def test_verify_prints_layers_and_returns_0_for_a_sound_file(source, target, run):
    status, out, _ = run("verify", target, "--source", source)
    assert status == 0
    assert "exact  zero\n" in out
    assert " dB  a\n" in out
    assert "3 MXFP8 layers, SQNR " in out


def test_verify_reads_in_slabs_and_its_progress_ends_at_the_total(source, target, monkeypatch):
    whole = verify_file(target, source)
    monkeypatch.setattr("mxfp8.quant.checks.verify._SLAB", 1)
    calls = []
    slabs = verify_file(target, source, lambda *call: calls.append(call))
    assert slabs.problems == []
    assert slabs.sqnr_db == pytest.approx(whole.sqnr_db, rel=1e-12)
    assert slabs.layers["b"].worst == whole.layers["b"].worst
    size = sum(t.nbytes for t in MODEL.values())
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert calls[-1][:2] == (size, size)


def test_verify_sees_one_flipped_code(source, target):
    before = verify_file(target, source)
    flip(target, read_header(target).tensors["a.weight"].begin + 5)
    after = verify_file(target, source)
    assert before.layers["a"].sqnr_db - after.layers["a"].sqnr_db > 1
    assert after.layers["a"].worst.row == after.layers["a"].worst.block == 0
    assert after.layers["b"].sqnr_db == before.layers["b"].sqnr_db


def test_verify_finds_a_damaged_layer(source, target, run):
    def spoil(tensors):
        tensors["b.weight"].view(torch.uint8)[:16] = 0

    rewrite(target, spoil)
    status, out, _ = run("verify", target, "--source", source)
    assert status == 1
    assert "PROBLEM: 'b' has an SQNR of " in out
    assert "rounding alone leaves at least 24.6 dB" in out


def test_verify_says_that_a_file_holds_no_mxfp8(source):
    assert problems(source, source) == ["the file holds no MXFP8 layer"]


@pytest.mark.parametrize("report", ["source", "new"])
def test_a_report_never_replaces_a_model(source, run, report):
    before, new = source.read_bytes(), source.parent / "new"
    path = source if report == "source" else new
    status, _, err = run("convert", source, new, "--report", path)
    assert status == 1
    assert "would replace the model; give a .json name" in err
    assert source.read_bytes() == before
    assert not new.exists()


def test_include_and_exclude_may_be_repeated(source, run):
    _, out, _ = run("convert", source, "new", "--dry-run", "--exclude", "^a", "--exclude", "^b")
    kept = [line.split()[1] for line in out.splitlines() if "excluded by" in line]
    assert {"a.weight", "b.weight"} <= set(kept)


@pytest.mark.parametrize(
    ("part", "value", "sentence"),
    [
        ("weight", 0x7F, f"1 codes are NaN: damaged, or its source held NaN; {AGAIN}"),
        ("weight_scale", 0xFF, f"1 scale bytes are 255 (NaN): damaged; {AGAIN}"),
        ("weight_scale", 0xFE, None),
    ],
)
def test_verify_finds_what_decodes_to_nan_or_infinity(source, target, part, value, sentence):
    def spoil(tensors):
        tensors[f"b.{part}"].view(torch.uint8)[0, 0] = value

    sentence = f": {sentence}" if sentence else " decodes to infinity"
    assert problems(rewrite(target, spoil), source) == [f"'b'{sentence}"]


def test_verify_of_two_files_the_other_way_round_says_so(source, target, run):
    status, _, err = run("verify", source, "--source", target)
    assert status == 1
    assert "source is not quantized, so the two may be swapped: the MXFP8 file comes first" in err


@pytest.mark.parametrize(("part", "index"), [("weight", (319, 63)), ("weight_scale", (383, 3))])
def test_verify_finds_padding_that_is_not_zero(source, target, part, index):
    def spoil(tensors):
        tensors[f"b.{part}"].view(torch.uint8)[index] = 1

    assert problems(rewrite(target, spoil), source) == ["'b': 1 bytes of padding are not zero"]


CHANGES = {
    "a kept value": (lambda t: t["b.bias"].neg_(), "'b.bias' differs from the source"),
    "a kept dtype": (
        lambda t: t.update({"b.bias": t["b.bias"].view(torch.float16)}),
        "'b.bias' differs from the source",
    ),
    "a kept shape": (
        lambda t: t.update({"b.bias": t["b.bias"].view(30, 10)}),
        "'b.bias' differs from the source",
    ),
    "a missing tensor": (lambda t: t.pop("norm.weight"), "'norm.weight' of the source is missing"),
    "a new tensor": (lambda t: t.update(new=torch.ones(1)), "'new' is not in the source"),
}


@pytest.mark.parametrize(("change", "problem"), CHANGES.values(), ids=CHANGES)
def test_verify_finds(source, target, run, change, problem):
    status, out, _ = run("verify", rewrite(target, change), "--source", source)
    assert status == 1
    assert out.splitlines()[-1] == f"PROBLEM: {problem}"


@pytest.mark.parametrize("shape", [(72, 64), (40, 96), (2560,), (40, 8, 8), (39, 64)], ids=str)
def test_verify_finds_a_layer_of_another_shape(source, target, shape):
    def reshape(tensors):
        tensors["a.weight"] = torch.zeros(shape, dtype=torch.bfloat16)

    (problem,) = problems(target, rewrite(source, reshape))
    assert "'a'" in problem
    assert str(list(shape)) in problem


def test_a_marker_without_a_shape_is_no_problem(source, target):
    def forget(tensors):
        for key in [key for key in tensors if key.endswith(".comfy_quant")]:
            del tensors[key]

    layers = {name: {"format": "mxfp8"} for name in ("a", "b", "zero")}
    rewrite(target, forget, {"_quantization_metadata": json.dumps({"layers": layers})})
    result = verify_file(target, source)
    assert (result.problems, result.layers.keys()) == ([], layers.keys())


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "model.", "net."])
@pytest.mark.parametrize("renamed", ["source", "target"])
def test_prefixes_may_differ(source, target, prefix, renamed):
    def rename(tensors):
        for key in list(tensors):
            tensors[prefix + key] = tensors.pop(key)

    before = verify_file(target, source)
    markers = json.loads(load(target)[1]["_quantization_metadata"])
    markers["layers"] = {prefix + name: conf for name, conf in markers["layers"].items()}
    path = {"source": source, "target": target}[renamed]
    metadata = {"_quantization_metadata": json.dumps(markers)} if path == target else None
    rewrite(path, rename, metadata)
    after = verify_file(target, source)
    assert after.problems == []
    assert after.sqnr_db == before.sqnr_db


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "model"],
        ["convert", "source", "new", "--report", "r.json"],
        ["probe", "blocks", "--json", "p.json", "--csv", "p.csv"],
    ],
)
def test_the_header_of_a_model_is_read_once(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    save_file({"a.weight": matrix(64, 64)}, "source")
    save_file({"blocks.0.a.weight": matrix(64, 64)}, "blocks")
    assert main(["convert", "source", "model"]) == 0
    parsed = []
    read = header._read_text
    monkeypatch.setattr(header, "_read_text", lambda p: parsed.append(p.name) or read(p))
    assert main(words) == 0
    assert parsed.count(words[1]) == 1
