"""The `mxfp8` command: what it prints, writes and returns, and what `verify` finds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import GOLDEN, flip, load, matrix
from safetensors.torch import save_file
from tqdm import tqdm

from mxfp8.quant import cli
from mxfp8.quant.budget.probing import probe_module
from mxfp8.quant.checks.verify import _told_apart, verify_file
from mxfp8.quant.cli import main
from mxfp8.quant.commands import terminal
from mxfp8.quant.container import header
from mxfp8.quant.conversion.calibration import calibrate
from mxfp8.quant.format import AGAIN, FormatError, read_header
from mxfp8.quant.reports.conversion import Report, format_size

needs_posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such device or signal")

ZIMAGE = GOLDEN / "zimage_src.safetensors"
MODEL = {
    "a.weight": matrix(40, 64, seed=1),
    "b.weight": matrix(300, 33, torch.float32, seed=2),
    "b.bias": matrix(1, 300)[0],
    "zero.weight": torch.zeros(32, 32),
    "norm.weight": torch.ones(7),
}


@pytest.fixture
def source(tmp_path) -> Path:
    save_file(MODEL, tmp_path / "source", {"format": "pt"})
    return tmp_path / "source"


@pytest.fixture
def target(source, run) -> Path:
    assert run("convert", source, source.with_name("target.safetensors"))[0] == 0
    return source.with_name("target.safetensors")


def test_convert_prints_a_summary_and_writes_the_file(source, run):
    status, out, _ = run("convert", source, source.with_name("target.safetensors"))
    assert status == 0
    verdict, files, *_ = out.splitlines()
    assert " kB, saves " in verdict
    assert files.startswith("source -> target.safetensors, ")
    assert "3 layers MXFP8, 0 not quantized (preset default, architecture not recognized)" in out
    assert read_header(source.with_name("target.safetensors")).layers.keys() == {"a", "b", "zero"}


def test_convert_options_choose_the_layers(source, run):
    options = ("--preset", "none", "--exclude", "a|b", "--include", "zero")
    assert run("convert", source, source.with_name("target.safetensors"), *options)[0] == 0
    assert read_header(source.with_name("target.safetensors")).layers.keys() == {"zero"}


def test_convert_overwrites_only_when_asked(source, target, run):
    before = target.read_bytes()
    status, _, err = run("convert", source, target, "--exclude", "a")
    assert (status, target.read_bytes()) == (1, before)
    assert "overwrite" in err
    assert run("convert", source, target, "--exclude", "a", "--overwrite")[0] == 0
    assert target.read_bytes() != before


def test_the_report_file_is_the_report(source, run):
    path = source.with_name("report.json")
    status, out, _ = run(
        "convert", source, source.with_name("target.safetensors"), "--report", path
    )
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
    words = ("convert", source, source.with_name("target.safetensors"), "--overwrite")
    words += ("--calibration", paths[0])
    assert "of nearest rounding on average, in-sample" in run(*words)[1]
    words += ("--held-out", paths[1])
    assert "of nearest rounding on average, on held-out data" in run(*words)[1]
    status, _, err = run(*words, "--report", paths[1])
    assert (status, "--report" in err, "would replace" in err) == (1, True, True)


def table(out: str) -> dict[str, list[str]]:
    """The rows of a dry run by their tensors."""
    rows = [re.split("  +", line) for line in out.split("\n\n")[0].splitlines()[1:]]
    return {row[1]: row[:1] + row[2:] for row in rows}


def test_dry_run_prints_every_decision_and_writes_nothing(source, run):
    status, out, _ = run("convert", "--dry-run", ZIMAGE, source.with_name("target.safetensors"))
    assert status == 0
    rows = table(out)
    assert rows["layers.0.attention.qkv.weight"] == ["mxfp8", "BF16 192x32", "linear layer"]
    kept = ["keep", "BF16 128x32", "preset zimage keeps 'adaLN_modulation'"]
    assert rows["layers.0.adaLN_modulation.0.weight"] == kept
    assert rows.keys() == load(ZIMAGE)[0].keys()
    total = out.splitlines()[-1]
    assert "tensors would be MXFP8 (preset zimage, Z-Image): " in total
    assert run("convert", ZIMAGE, source.with_name("target.safetensors"))[0] == 0
    sizes = [sum(t.nbytes for t in load(path)[0].values())
             for path in (ZIMAGE, source.with_name("target.safetensors"))]  # fmt: skip
    assert total.endswith(" -> ".join(map(format_size, sizes)))


def test_dry_run_leaves_nothing(source, run):
    assert run("convert", "--dry-run", source, source.with_name("target.safetensors"))[0] == 0
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_dry_run_gives_the_reasons_where_nothing_would_be_quantized(source, run):
    words = (
        "convert",
        "--dry-run",
        source,
        source.with_name("target.safetensors"),
        "--exclude",
        ".",
    )
    assert table(run(*words)[1])["a.weight"] == ["keep", "BF16 40x64", "excluded by '.'"]


def test_inspect_says_what_a_file_holds(target, run):
    status, out, _ = run("inspect", target)
    assert status == 0
    assert out.splitlines()[0].startswith("target.safetensors: ")
    assert "architecture: not recognized" in out
    assert "MXFP8: 3 layers, 8.25 bits per weight\n  written by: " in out
    assert "  runs in: ComfyUI 0.20.1 or later\n  GPUs: " in out
    assert "metadata: _quantization_metadata, format" in out
    assert "not quantized: " not in out
    assert "read: the header, every byte of 3 MXFP8 layers" in out


def test_inspect_says_what_it_read_where_no_layer_is_mxfp8(source, run):
    status, out, _ = run("inspect", source)
    assert status == 0
    assert "not quantized: 1 matrix, BF16 in the file" in out
    assert out.splitlines()[-2:] == ["read: the header; no layer is MXFP8", "OK: no problem found"]
    assert run("inspect", source, "--header")[1].splitlines()[-2] == "read: the header"


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
    assert out.splitlines()[-1] == "NOT OK: 2 problems; do not use this file"
    status, out, _ = run("inspect", target, "--header")
    assert (status, "PROBLEM" in out) == (0, False)
    assert out.splitlines()[-1] == "OK: no problem found in the header"


def test_a_file_without_markers_is_inspected_repaired_and_verified(source, target, run):
    tensors, _ = load(target)
    kept = {k: v.clone() for k, v in tensors.items() if not k.endswith(".comfy_quant")}
    lost, new = (target.with_name(f"{name}.safetensors") for name in ("lost", "new"))
    save_file(kept, lost)
    status, out, _ = run("inspect", lost)
    assert (status, "holds MXFP8 codes" in out) == (1, True)
    status, out, err = run("repair", lost, new)
    assert (status, err) == (0, "")
    assert "markers rebuilt: 3 of 3 layers" in out
    assert out.splitlines()[-1].startswith("OK: all 3 MXFP8 layers have ")
    assert run("verify", new, "--source", source)[0] == 0
    status, _, err = run("repair", new, lost, "--overwrite")
    assert (status, "nothing to repair" in err) == (1, True)
    kept["b.weight"].view(torch.uint8)[0, 0] = 0x7F  # NaN
    save_file(kept, lost)
    status, out, _ = run("repair", lost, new, "--overwrite")
    assert (status, out.splitlines()[-1][:6]) == (1, "NOT OK")


def test_inspect_recognizes_an_architecture(run):
    assert "architecture: Z-Image" in run("inspect", ZIMAGE)[1]


def test_inspecting_a_header_needs_no_torch():
    code = (
        "import sys; from mxfp8.quant.cli import main; main(sys.argv[1:]); "
        "print('torch' in sys.modules)"
    )
    path = str(GOLDEN / "a_zimage_simple.safetensors")
    words = [sys.executable, "-c", code, "inspect", path, "--header"]
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "MXFP8: " in out
    assert out.splitlines()[-1] == "False"


def test_backends_are_listed_with_reasons(run):
    status, out, _ = run("backends")
    assert status == 0
    assert re.search(r"(?m)^eager +available +plain torch on any device", out)
    assert "not chosen automatically" in out


JSON = {
    ("convert", "source", "new.sft"): "mxfp8_report",
    ("convert", "source", "new.sft", "--dry-run"): "mxfp8_plan",
    ("batch", "source", "--to", "new"): "mxfp8_batch",
    ("batch", "source", "--dry-run"): "mxfp8_batch",
    ("inspect", "target.safetensors"): "mxfp8_inspection",
    ("verify", "target.safetensors", "--source", "source"): "mxfp8_verification",
    ("repair", "lost", "new.sft"): "mxfp8_repair",
    ("probe", "blocks"): "mxfp8_probe",
    ("budget", "net", "--calibration", "calibration"): "mxfp8_budget",
    ("export", "target.safetensors", "--mlx", "new"): "mxfp8_export",
    ("card", "target.safetensors"): "mxfp8_card",
    ("backends",): "mxfp8_backends",
    ("recommend", "source"): "mxfp8_recommendation",
    ("completion", "bash"): "mxfp8_completion",
}


@pytest.mark.parametrize(("words", "key"), JSON.items(), ids=map(" ".join, JSON))
def test_json_is_one_document_and_all_of_standard_output(target, run, monkeypatch, words, key):
    monkeypatch.chdir(target.parent)
    save_file({f"blocks.{i}.a.weight": matrix(64, 64, seed=i) for i in range(2)}, "blocks")
    tensors, _ = load(target)
    save_file({k: v.clone() for k, v in tensors.items() if not k.endswith(".comfy_quant")}, "lost")
    net = torch.nn.Sequential(torch.nn.Linear(64, 40)).eval()
    save_file(net.state_dict(), "net")
    inputs, use = [torch.randn(70, 64)], lambda module, x: module(x)
    found = calibrate(net, inputs, use)
    replace(found, sensitivity=probe_module(net, inputs, use, ["0"])).save("calibration")
    status, out, err = run(*words, "--json")
    assert (status, json.loads(out)[key], err) == (0, 1, "")


def test_every_subcommand_has_json():
    (commands,) = (action for action in cli.parser()._actions if action.choices)
    assert {words[0] for words in JSON} == commands.choices.keys()


def test_json_of_an_error_is_a_document_too(target, run):
    status, out, err = run("inspect", "nowhere", "--json")
    assert (status, err) == (1, "mxfp8 inspect: error: nowhere: No such file or directory\n")
    message = "nowhere: No such file or directory"
    assert json.loads(out) == {"mxfp8_error": 1, "message": message, "status": 1}
    status, out, _ = run("convert", target, target.with_name("new.sft"), "--json", "--dry-run")
    assert (status, json.loads(out)["status"]) == (1, 1)
    for words in (("nothing",), ("convert",), ("inspect", ""), ("convert", target, "new.gguf")):
        status, out, err = run(*words, "--json")
        found = json.loads(out)
        assert (status, found["status"], found["mxfp8_error"]) == (2, 2, 1)
        assert err.endswith(f"error: {found['message']}\n")


@pytest.mark.skipif(sys.platform != "linux", reason="a file there that cannot be read")
def test_an_error_of_reading_names_the_file(run):
    status, _, err = run("inspect", "/proc/self/mem")
    assert (status, err) == (1, "mxfp8 inspect: error: /proc/self/mem: Input/output error\n")


def test_json_of_a_bad_file_says_what_is_wrong(source, target, run):
    flip(target, read_header(target).tensors["norm.weight"].begin)
    status, out, _ = run("verify", target, "--source", source, "--json")
    assert (status, json.loads(out)["problems"]) == (1, ["'norm.weight' differs from the source"])
    layers = {layer["name"]: layer["sqnr_db"] for layer in json.loads(out)["layers"]}
    assert layers["zero"] is None
    flip(target, read_header(target).tensors["zero.weight"].begin, 0x38)  # from nothing to 1
    out = run("verify", target, "--source", source, "--json")[1]
    layers = {layer["name"]: layer["sqnr_db"] for layer in json.loads(out)["layers"]}
    assert layers["zero"] == -300.0


def test_batch_prints_each_model_and_a_table(source, run, monkeypatch):
    monkeypatch.chdir(source.parent)
    source.rename("one.safetensors")
    bad_file(source.parent)
    status, out, err = run("batch", ".", "--to", "new")
    lines = out.splitlines()
    assert (status, err) == (1, "")
    reason = "the header is not a JSON object; the file is damaged or incomplete: get it again"
    assert lines[0] == f"1 of 2: bad.safetensors: failed: {reason}"
    assert lines[1].startswith("2 of 2: one.safetensors -> one-mxfp8.safetensors: ")
    assert lines[3].split() == ["model", "before", "after", "SQNR", "time"]
    assert lines[4].split() == ["failed", "bad.safetensors"]
    assert lines[5].startswith("converted  one.safetensors  ")
    assert lines[-1].startswith("1 converted, 1 failed; ")
    Path("bad.safetensors").unlink()
    status, out, _ = run("batch", "*.safetensors", "--to", "new")
    assert (status, out.splitlines()[-1]) == (0, "1 skipped")


def test_batch_dry_run_writes_nothing(source, run):
    source = source.rename(source.with_name("one.safetensors"))
    status, out, _ = run("batch", source, "--dry-run", "--to", source.with_name("new"))
    assert (status, out.splitlines()[-1].partition("; ")[0]) == (0, "1 planned")
    assert [*source.parent.iterdir()] == [source]


BAD_USES = [
    (),
    ("convert", "a"),
    ("inspect",),
    ("inspect", "a", "--nope"),
    ("verify", "a"),
    ("convert", "a", "b.sft", "--preset", "nope"),
    ("convert", "a", "b.sft", "--exclude", "("),
    ("convert", "a", "b.gguf"),
    ("convert", "a", ""),
    ("convert", "a", "/"),
    ("repair", "a", "b"),
    ("batch",),
    ("batch", "a", "--calibration", "b"),
    ("batch", ""),
    ("batch", "a", "--to", ""),
    ("budget", "a", "--calibration", "b", "--device", "cpu"),
    ("export", "a"),
    ("export", "a", "--mlx", ""),
    ("inspect", ""),
    ("fly",),
]


@pytest.mark.parametrize("words", BAD_USES, ids=" ".join)
def test_wrong_usage_is_2(run, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where nothing is lost if it is taken for right
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
        (("batch", "nowhere"), "nowhere"),
        (("inspect", "bad"), "bad.safetensors: the header is not a JSON object"),
        (("convert", "bad", "new.sft"), "bad.safetensors: the header is not a JSON object"),
        (("convert", "source", "folder/new.sft"), "folder"),
        (
            ("convert", "source", "new.sft", "--report", "folder/new"),
            "--report: there is no folder",
        ),
        (("verify", "source", "--source", "bad"), "bad.safetensors"),
    ],
)
def test_errors_are_one_line_on_stderr(source, run, words, error):
    names = {"bad": bad_file(source.parent), "source": source}
    other = ("nowhere", "new.sft", "folder/new", "folder/new.sft")
    places = {name: source.parent / name for name in other} | names
    status, out, err = run(*(places.get(word, word) for word in words))
    assert status != 0
    assert out == ""
    assert err.startswith(f"mxfp8 {words[0]}: error: ")
    assert len(err.splitlines()) == 1
    assert error in err
    assert "Traceback" not in err
    assert not (source.parent / "new.sft").exists()


@pytest.mark.parametrize(
    ("interrupt", "expected"),
    [
        (KeyboardInterrupt(), 130),
        (KeyboardInterrupt(signal.SIGTERM), 143),
    ],
)
def test_an_interrupt_is_reported_without_a_traceback(
    source, run, monkeypatch, interrupt, expected
):
    def interrupted(*_, **__):
        raise interrupt

    monkeypatch.setattr("mxfp8.quant.conversion.convert.convert", interrupted)
    status, _, err = run("convert", source, source.with_name("target.safetensors"))
    assert status == expected
    assert err == "mxfp8 convert: interrupted; nothing unfinished was left behind\n"


def test_the_console_script_is_the_command(source):
    script = Path(sys.executable).with_name("mxfp8")
    words = [script, "convert", source, source.with_name("target.safetensors")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "\nsource -> target.safetensors, " in done.stdout
    assert source.with_name("target.safetensors").exists()
    failed = subprocess.run([script, "inspect", "nowhere"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("mxfp8 inspect: error: ")


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
    assert out.splitlines()[-1].startswith("OK: the file is its source in MXFP8")


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


def test_verify_shows_that_an_sqnr_is_below_the_least():
    assert _told_apart(20.0, 24.6) == ("20.0", "24.6")
    assert _told_apart(24.5996, 24.6) == ("24.5996", "24.6000")


def test_verify_says_that_a_file_holds_no_mxfp8(source):
    assert problems(source, source) == ["the file holds no MXFP8 layer"]


@pytest.mark.parametrize("report", ["source", "new.safetensors"])
def test_a_report_never_replaces_a_model(source, run, report):
    before, new = source.read_bytes(), source.with_name("new.safetensors")
    words = ("convert", source, new, "--report", source.with_name(report), "--overwrite")
    status, _, err = run(*words)
    assert (status, "--report" in err, "would replace" in err) == (1, True, True)
    assert source.read_bytes() == before
    assert not new.exists()


def test_include_and_exclude_may_be_repeated(source, run):
    new = source.with_name("new.safetensors")
    _, out, _ = run("convert", source, new, "--dry-run", "--exclude", "^a", "--exclude", "^b")
    kept = [tensor for tensor, row in table(out).items() if "excluded by" in row[-1]]
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
    last = f"PROBLEM: {problem}", "NOT OK: 1 problem; do not use this file"
    assert tuple(out.splitlines()[-2:]) == last


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


def test_verify_compares_with_an_original(target):
    """Not a file with itself, of which no layer would be compared."""
    with pytest.raises(FormatError, match="already quantized as MXFP8"):
        verify_file(target, target)


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
        ["inspect", "model.sft"],
        ["convert", "source", "new.sft", "--report", "r.json"],
        ["probe", "blocks", "--report", "p.json", "--csv", "p.csv"],
    ],
)
def test_the_header_of_a_model_is_read_once(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    save_file({"a.weight": matrix(64, 64)}, "source")
    save_file({"blocks.0.a.weight": matrix(64, 64)}, "blocks")
    assert main(["convert", "source", "model.sft"]) == 0
    parsed = []
    read = header._read_text
    monkeypatch.setattr(header, "_read_text", lambda p: parsed.append(p.name) or read(p))
    assert main(words) == 0
    assert parsed.count(words[1]) == 1


def test_several_expressions_keep_their_flags_and_groups(source, run):
    words = ("convert", source, source.with_name("new.sft"), "--dry-run")
    words += ("--exclude", "(?i)^(A)", "--exclude", r"z(e)ro\.w\1", "--exclude", "nothing")
    status, out, _ = run(*words)
    excluded = {k: row[-1] for k, row in table(out).items() if "excluded by" in row[-1]}
    assert (status, excluded.keys()) == (0, {"a.weight", "zero.weight"})
    assert excluded["a.weight"] == "excluded by '(?i)^(A)'"
    assert "WARNING: exclude 'nothing' matches no key" in out


REFUSED = {
    "no such device": (("--device", "meta"), "device 'meta' cannot be used here"),
    "no device": (("--device", ""), "device '' cannot be used here"),
    "one CPU": (("--device", "cpu:7"), "device 'cpu:7' cannot be used here"),
    "no held-out": (("--calibration", "calibration", "--held-out", "no"), "no: No such file"),
    "held-out alone": (("--held-out", "calibration"), "give a calibration as well"),
    "the same held-out": (
        ("--calibration", "calibration", "--held-out", "calibration"),
        "held_out is the calibration itself",
    ),
    "a report with a model's name": (
        ("--report", "old.safetensors", "--overwrite"),
        "old.safetensors has a model's name",
    ),
    "another model's held-out": (
        ("--calibration", "calibration", "--held-out", "other"),
        "made with other weights",
    ),
    "a report that exists": (("--report", "old"), "old exists; --overwrite replaces it"),
    "a report that is a folder": (("--report", "folder"), "is a folder"),
    "a report with a name too long": (("--report", "x" * 300), "File name too long"),
    "a report that cannot be made": (("--report", "/proc/report"), "/proc"),
    "nothing to quantize": (("--exclude", "."), "no layer to quantize"),
}


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry run"])
@pytest.mark.parametrize(("options", "error"), REFUSED.values(), ids=REFUSED)
def test_what_would_fail_is_refused_before_the_work(
    tmp_path, run, monkeypatch, options, error, dry
):
    monkeypatch.chdir(tmp_path)
    net = torch.nn.Sequential(torch.nn.Linear(64, 40, bias=False)).eval()
    for name in ("other", "calibration"):
        torch.nn.init.normal_(net[0].weight)
        calibrate(net, [torch.randn(70, 64)], lambda module, x: module(x)).save(name)
    save_file(net.state_dict(), "model")
    Path("old").write_text("kept", encoding="utf-8")
    Path("folder").mkdir()
    before = sorted(tmp_path.iterdir())
    status, _, err = run("convert", "model", "new.sft", *options, *(("--dry-run",) if dry else ()))
    assert (status, error in err) == (1, True), err
    assert sorted(tmp_path.iterdir()) == before
    assert Path("old").read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_a_target_that_cannot_be_written_is_refused_before_the_work(source, target, run, dry):
    folder = source.with_name("folder.sft")
    folder.mkdir()
    before = sorted(source.parent.iterdir())
    for path, error in (
        (target, "exists; --overwrite replaces it"),
        (folder, "this is a folder"),
        (source.parent / "no" / "x.sft", "there is no such folder"),
    ):
        status, _, err = run("convert", source, path, *dry)
        assert (status, error in err) == (1, True), err
    assert sorted(source.parent.iterdir()) == before


def test_a_calibration_is_never_replaced(tmp_path, run):
    net = torch.nn.Sequential(torch.nn.Linear(64, 40, bias=False)).eval()
    save_file(net.state_dict(), tmp_path / "model")
    path = tmp_path / "calibration.safetensors"
    calibrate(net, [torch.randn(70, 64)], lambda module, x: module(x)).save(path)
    before = path.read_bytes()
    words = ("convert", tmp_path / "model", path, "--calibration", path, "--overwrite")
    status, _, err = run(*words)
    assert (status, "DST" in err, path.read_bytes()) == (1, True, before)


def test_probe_replaces_only_what_it_may(tmp_path, run):
    model, old = tmp_path / "model", tmp_path / "old"
    save_file({f"blocks.{i}.a.weight": matrix(64, 64, seed=i) for i in range(2)}, model)
    old.write_text("kept", encoding="utf-8")
    status, out, err = run("probe", model, "--report", old)
    assert (status, out, "old exists; --overwrite replaces it" in err) == (1, "", True)
    assert run("probe", model, "--report", old, "--csv", old, "--overwrite")[0] == 1
    assert old.read_text(encoding="utf-8") == "kept"
    assert run("probe", model, "--report", old, "--overwrite")[0] == 0
    assert json.loads(old.read_text(encoding="utf-8"))["layers"]


def test_names_cannot_write_to_the_terminal(source, run):
    layer = "blocks.0.evil\x1b[31m\nOK: all is well"
    save_file({f"{layer}.weight": matrix(32, 32)}, source)
    new = source.with_name("new.sft")
    for words in (
        ("convert", source, new, "--dry-run"),
        ("convert", source, new),
        ("verify", new, "--source", source),
        ("probe", source),
    ):
        status, out, _ = run(*words)
        assert (status, "\x1b" in out, "\nOK: all is well" in out) == (0, False, False)
        assert repr(layer)[:-1] in out


@needs_posix
def test_a_file_beside_the_model_is_written_whole_or_not_at_all(tmp_path, run):
    """As on a full disk: no file may grow beyond 100 bytes."""
    import resource  # Windows has none

    model, old, new = tmp_path / "model", tmp_path / "old", tmp_path / "new"
    save_file({f"blocks.{i}.a.weight": matrix(64, 64, seed=i) for i in range(2)}, model)
    old.write_text("kept", encoding="utf-8")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        for path in (old, new):
            status, _, err = run("probe", model, "--report", path, "--overwrite")
            assert (status, err) == (1, f"mxfp8 probe: error: {path}: File too large\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert old.read_text(encoding="utf-8") == "kept"
    assert sorted(tmp_path.iterdir()) == [model, old]


@needs_posix
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path, run):
    model, report, loop = (tmp_path / name for name in ("model", "report.json", "loop.json"))
    save_file({"blocks.0.a.weight": matrix(64, 64, seed=1)}, model)
    report.write_text("", encoding="utf-8")
    report.chmod(0o600)
    assert run("probe", model, "--report", report, "--overwrite")[0] == 0
    assert report.stat().st_mode & 0o777 == 0o600 and report.stat().st_size
    loop.symlink_to(loop)
    status, _, err = run("probe", model, "--report", loop, "--overwrite")
    assert (status, err.splitlines()[-1]) == (
        1, f"mxfp8 probe: error: {loop}: Too many levels of symbolic links"
    )  # fmt: skip


@needs_posix
def test_names_of_files_cannot_either(tmp_path, run):
    evil = "a\x1b[31m\nOK: all is well.safetensors"
    (tmp_path / evil).symlink_to("nowhere")
    for words in (("inspect", tmp_path / evil), ("batch", tmp_path)):
        status, out, err = run(*words)
        text = out + err
        assert (status, "\x1b" in text, "\nOK: all is well" in text) == (1, False, False)
        assert repr(evil)[1:-1] in text


@needs_posix
def test_names_of_new_files_cannot_either(source, run):
    evil = source.with_name("a\x1b[31m\nOK: all is well.safetensors")
    report, folder = evil.with_suffix(".json"), evil.with_name(evil.stem)
    lost = source.with_name("lost.sft")
    run("convert", source, lost)
    tensors, _ = load(lost)
    save_file({k: v.clone() for k, v in tensors.items() if not k.endswith(".comfy_quant")}, lost)
    for *words, name in (
        ("convert", source, evil, "--report", report, evil.name),
        ("export", evil, "--mlx", folder, folder.name),
        ("repair", lost, evil, "--overwrite", evil.name),
    ):
        status, out, _ = run(*words)
        assert (status, "\x1b" in out, "\nOK: all is well" in out) == (0, False, False), out
        assert repr(name) in out


SCRIPT = Path(sys.executable).with_name("mxfp8")


def spawn(*words, environment=None, program=(SCRIPT,), **options) -> subprocess.CompletedProcess:
    """Run the console script, whose output Python keeps until it is flushed."""
    ours = {"PYTHONUNBUFFERED": "", "OMP_WAIT_POLICY": None} | (environment or {})
    environment = {k: v for k, v in (os.environ | ours).items() if v is not None}
    options = {"stderr": subprocess.PIPE, "encoding": "utf-8"} | options
    return subprocess.run([*program, *words], env=environment, **options)


@pytest.mark.slow
def test_a_console_that_lacks_letters_costs_nothing(tmp_path):
    source, report = tmp_path / "\u043c\u043e\u0434", tmp_path / "report.json"
    save_file({"w\u00e9ight.\u65e5.weight": matrix(32, 32)}, source)
    done = spawn(
        "convert", source, tmp_path / "new.sft", "--report", report,
        stdout=subprocess.PIPE, environment={"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert r"\u043c\u043e\u0434 -> new.sft" in done.stdout
    assert Report.from_json(report.read_text(encoding="utf-8")).source == source.name


@pytest.mark.slow
@needs_posix
def test_what_cannot_be_printed_costs_no_report(source):
    """Standard output is full, and standard error closed, where a progress bar would go."""
    new, report = source.with_name("new.sft"), source.with_name("report.json")
    with open("/dev/full", "w") as full:
        done = spawn(
            "convert", source, new, "--report", report,
            stdout=full, stderr=None, preexec_fn=lambda: os.close(2),
        )  # fmt: skip
    assert done.returncode == 1
    assert Report.from_json(report.read_text(encoding="utf-8")).target == "new.sft"
    assert new.exists()


@needs_posix
def test_a_pipe_whose_reader_left_ends_the_command_in_silence(target):
    read, write = os.pipe()
    os.close(read)
    done = spawn("inspect", "--header", target, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + 13, "")


@needs_posix
def test_a_signal_that_is_ignored_stays_so():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cli._signals_as_interrupts(pytest.fail):
            signal.raise_signal(signal.SIGHUP)
    except KeyboardInterrupt:
        pytest.fail("it was taken for an interrupt")
    finally:
        signal.signal(signal.SIGHUP, before)


@needs_posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_torch_is_imported_ends_the_command(name):
    """When torch's C++ imports numpy: it would go on without, and the signal be lost."""
    number = getattr(signal, name)
    program = f"""
import os, signal, sys
signal.signal({int(number)}, signal.SIG_DFL)  # a shell's background commands ignore SIGINT
class Finder:
    def find_spec(self, module, path=None, target=None):
        if module == "numpy":
            assert "torch" in sys.modules
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Finder())
from mxfp8.quant.cli import main
sys.exit(main(["backends", "--json"]))
"""
    done = spawn(program=(sys.executable, "-c", program), stdout=subprocess.PIPE)
    assert done.returncode == 128 + number
    message = "interrupted; nothing unfinished was left behind"
    assert done.stderr == f"mxfp8 backends: {message}\n"
    error = json.loads(done.stdout)
    assert (error["message"], error["status"]) == (message, 128 + number)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP there")
@pytest.mark.parametrize(("own", "spins"), [(None, False), ("active", True)])
def test_waiting_threads_sleep_unless_the_user_wants_otherwise(target, own, spins):
    """What torch's OpenMP says that it read; by default, it spins 300,000 times."""
    environment = {"OMP_DISPLAY_ENV": "verbose", "OMP_WAIT_POLICY": own}
    done = spawn("inspect", target, stdout=subprocess.DEVNULL, environment=environment)
    (count,) = re.findall("GOMP_SPINCOUNT *= *'(.*)'", done.stderr)
    assert (count != "0") == spins


def on_a_terminal(*words, columns: int = 60, program=(SCRIPT,), **environment) -> str:
    """What the command, or another program, writes to a terminal of so many columns."""
    import fcntl
    import pty
    import struct
    import termios

    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {"TERM": "xterm-256color", "NO_COLOR": None, "COLUMNS": None} | environment
    reader = ThreadPoolExecutor(1).submit(_all_of, ours)
    done = spawn(
        *words, program=program or (SCRIPT,), stdout=its, stderr=its, environment=environment
    )
    os.close(its)
    assert done.returncode == 0
    return reader.result()


def _all_of(descriptor: int) -> str:
    parts = []
    with contextlib.suppress(OSError):  # Linux ends a terminal with an error
        while part := os.read(descriptor, 1 << 16):
            parts.append(part)
    os.close(descriptor)
    return b"".join(parts).decode()


@needs_posix
def test_a_terminal_gets_colors_and_no_line_that_is_too_long(target, source):
    out = on_a_terminal("verify", target, "--source", source)
    assert "\x1b[1;32mOK: " in out
    out = on_a_terminal("backends", NO_COLOR="1")
    assert "\x1b[3" not in out
    lines = re.sub(r"\x1b\[[\d;]*m", "", out).splitlines()
    assert max(map(len, lines)) == 60
    below = lines.index(next(line for line in lines if line.startswith("eager "))) + 1
    assert [line.rstrip() for line in lines[below : below + 2]] == [
        "  available",
        "  plain torch on any device, weights unpacked on each call",
    ]


@needs_posix
@pytest.mark.parametrize("columns", [40, 60, 80, 140])
def test_a_bar_fits_into_the_terminal(columns):
    template = terminal._bar_format("model.layers.0.attention.{qkv}.weight", columns)
    bar = tqdm.format_meter(
        123_456_789, 9_876_543_210, 12.3, ncols=columns, prefix="calibration", unit="B",
        unit_scale=True, bar_format=template,
    )  # fmt: skip
    assert len(bar) <= columns
    assert "10.0MB/s" in bar
    assert ("weight" in bar) == (columns > 40)


@needs_posix
def test_without_rich_a_terminal_gets_plain_text():
    code = "import sys; sys.modules['rich'] = None; from mxfp8.quant.cli import main; main()"
    out = on_a_terminal("-c", code, "backends", program=(sys.executable,))  # which has no bar
    assert out.replace("\r\n", "\n") == spawn("backends", stdout=subprocess.PIPE).stdout


WORK = """
import time
from mxfp8.quant.commands.terminal import progress, show
with progress("batch") as bar:
    for done in range(8):
        bar(done << 20, 8 << 20, f"model.layers.{done}.weight")
        time.sleep(0.1)
        if done == 5:
            bar.clear()
            show("a line")
    for _ in range(4):
        bar(8 << 20, 8 << 20, "verify")
        time.sleep(0.1)
"""


@needs_posix
@pytest.mark.parametrize("columns", [60, 140])
def test_a_bar_is_drawn_in_one_line_and_gone_at_the_end(columns):
    out = on_a_terminal("-c", WORK, program=(sys.executable,), columns=columns)
    drawn = [frame for line in out.split("\r\n") for frame in line.split("\r")]
    assert max(map(len, drawn)) <= columns
    assert any(frame.startswith("batch") and "MB/s" in frame for frame in drawn)
    assert any("reading the written file back" in frame for frame in drawn)
    assert "a line" in drawn
    assert drawn[-1].strip() == drawn[-2].strip() == ""
