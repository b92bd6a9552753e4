"""The benchmarks for a GPU, tried on a CPU: they run, and write what they say they write."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import working_copy
from gpu import ceilings, checks, methods, report, rows
from gpu.clock import Clock

from mxfp8.kernels.dispatch import named
from mxfp8.kernels.records import BACKENDS, Problem

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.comfy]

COLUMNS = [
    "op", "precision", "backend", "cached", "chosen", "M", "N", "K", "us", "bf16_us", "stock_us",
    "without_us", "added_launches", "roofline_us", "error", "total_error",
]  # fmt: skip
# By the oracle, which stands in on a CPU for what needs a card.
ORACLES = {"reference_mx", "reference_fp8", "reference_int8"}


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Tiny sizes: more threads only wait for each other.
    return kept | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | changes


def start(out: Path, *arguments: str) -> subprocess.Popen:
    """A tiny run of bench/gpu."""
    command = [sys.executable, ROOT / "bench/gpu", "--device", "cpu", "--quick", "--out", out]
    return subprocess.Popen(
        [*map(str, command), *arguments], cwd=out, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(out: Path, *arguments: str) -> dict:
    """Its results."""
    process = start(out, *arguments)
    output = process.communicate()[0]
    assert process.returncode == 0, output[-3000:]
    return result_in(out)


def result_in(folder: Path) -> dict:
    (path,) = folder.glob("*.json")
    assert path.with_suffix(".md").read_text(encoding="utf-8").startswith("# ")
    return json.loads(path.read_text(encoding="utf-8"))


def first_card(out: Path, *parts: str, **changes: str) -> subprocess.CompletedProcess:
    """What a card's owner runs, without a card."""
    command = [ROOT / "bench" / "first_card.sh", "--device", "cpu", "--quick", *parts]
    changed = environment(OUT=str(out), **changes)
    return subprocess.run(list(map(str, command)), env=changed, capture_output=True, text=True)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """The folder that it leaves."""
    out = tmp_path_factory.mktemp("first_card")
    ended = first_card(out)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def kernels(packed) -> dict:
    return result_in(packed / "kernels")


def test_every_row_has_the_columns_and_every_section_has_rows(kernels):
    assert [list(row) for row in kernels["rows"]] == [COLUMNS] * len(kernels["rows"])
    ops = {row["op"] for row in kernels["rows"]}
    assert ops == {
        "dequantize", "quantize", "to_rowwise", "quantize_rowwise", "to_int8", "quantize_int8",
        "linear", "linear, LoRA", "host_us", "scaled_matmul", "block_matmul", "int8_matmul",
        "Z-Image block", "Flux double block",
    }  # fmt: skip


@pytest.mark.parametrize("op", ["linear", "host_us", "Z-Image block", "Flux double block"])
def test_every_method_has_a_row_of_its_own(kernels, op):
    rows = [row for row in kernels["rows"] if row["op"] == op and row["M"] != 1]
    there = {name for name in ("int8", "torch_bf16") if runs_many_rows(name)}
    wanted = {"bf16", "stock", "stock_int8", "eager", *ORACLES, *there}
    assert {row["backend"] for row in rows} == wanted
    for row in rows:
        assert row["us"] > 0
        assert (row["chosen"] is None) == (row["backend"] in ("bf16", "stock", "stock_int8"))
        assert row["cached"] == (True if row["backend"] in CACHED else None)
    exact = [row["backend"] for row in rows if row["precision"] == "exact" and row["chosen"]]
    assert set(exact) == {"torch_bf16" if "torch_bf16" in there else "eager"}


CACHED = {"int8", "torch_bf16", "reference_fp8", "reference_int8"}


def runs_many_rows(backend: str) -> bool:
    problem = Problem(torch.device("cpu"), torch.bfloat16, "fast", prepare="once")
    return named(backend).unsupported_reason(problem) is None


def test_times_are_times_and_errors_those_of_eight_bits(kernels):
    for row in kernels["rows"]:
        assert row["us"] > 0, row
        if row["op"] == "linear":
            assert min(row["bf16_us"], row["stock_us"]) > 0, row
            if row["backend"] not in ("reference_mx", "reference_fp8"):  # no CPU has a ceiling
                assert row["roofline_us"] > 0, row
            # BF16 rounds by 2**-9 at most; inputs in E4M3 cost 2 to 3%, in INT8 about 1%.
            least, most = (4e-3, 6e-2) if row["precision"] == "fast" else (5e-4, 2.5e-3)
            assert least < row["error"] < most, row
            from_the_original = row["backend"] in ("bf16", "stock_int8")
            assert (row["total_error"] == row["error"]) == from_the_original
            assert row["total_error"] < 6e-2


def test_a_lora_beside_a_layer_adds_two_matmuls(kernels):
    rows = [row for row in kernels["rows"] if row["op"] == "linear, LoRA"]
    fast = ["fast"] if runs_many_rows("int8") else []
    assert [row["precision"] for row in rows] == ["exact", *fast]
    for row in rows:
        assert min(row["us"], row["without_us"], row["bf16_us"], row["stock_us"]) > 0
        assert row["added_launches"] == 2
        least, most = (5e-4, 4e-3) if row["precision"] == "exact" else (4e-3, 6e-2)
        assert least < row["error"] < most  # one BF16 rounding more


def test_checks_were_made_and_hold(kernels):
    assert len(kernels["checks"]) > 60
    assert [check for check in kernels["checks"] if check["wrong"]] == []
    assert {"to_int8, torch", "quantize_int8, torch"} <= {c["check"] for c in kernels["checks"]}


@pytest.mark.parametrize(
    ("op", "backend", "check"),
    [("block_matmul", "reference_mx", "block matmul"),
     ("scaled_matmul", "reference_fp8", "FP8 matmul"),
     ("int8_matmul", "reference_int8", "INT8 matmul")],
)  # fmt: skip
def test_matmuls_alone_have_rows_beside_their_rivals_and_checks(kernels, op, backend, check):
    rows = [row for row in kernels["rows"] if row["op"] == op and row["backend"] == backend]
    assert {(r["M"], r["N"], r["K"]) for r in rows} == {
        (r["M"], r["N"], r["K"]) for r in kernels["rows"] if r["op"] == "linear" and r["M"] >= 16
    }
    for row in rows:
        assert row["precision"] == "fast"
        assert min(row["bf16_us"], row["stock_us"]) > 0
        assert 4e-3 < row["error"] < 6e-2
    assert len([c for c in kernels["checks"] if c["check"] == f"{check}, {backend}"]) >= 4


def test_every_input_form_has_a_name_in_the_rows_and_in_the_checks():
    """No CPU runs some of them, E4M3fnuz for example."""
    forms = {backend.input_form for backend in BACKENDS if backend.quantizers}
    assert forms == report.MATMULS.keys() == checks._KINDS.keys() - {None}


def test_a_wrong_matmul_is_found(monkeypatch):
    """Its scales are those of the rows before."""
    backend = named("reference_int8")

    def shifted(quantized, prepared, *rest):
        return backend.matmul(quantized, (prepared[0], prepared[1].roll(1)), *rest)

    changed = [replace(b, matmul=shifted) if b is backend else b for b in methods.BACKENDS]
    monkeypatch.setattr(methods, "BACKENDS", changed)
    made = [c.result() for c in checks._matmul_checks(torch.device("cpu"), (33, 70, 96))]
    wrong = {check["check"] for check in made if check["wrong"]}
    assert wrong == {"INT8 matmul, reference_int8"}


def test_what_has_no_ceiling_has_no_roofline(monkeypatch):
    """As on a card without the memory for the largest sizes, or without FP8."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(ceilings, "_runs", full)
    left_out: list[str] = []
    clock = Clock(torch.device("cpu"), rounds=1)
    found = ceilings.measure(clock, True, left_out)
    assert set(found.as_dict().values()) == {None}
    assert left_out == ["ceilings, all: OutOfMemoryError: CUDA out of memory."]
    (row, *_) = rows.linears(rows.Bench(clock.device, clock, found, left_out), 16, 32, 256)
    assert row["us"] > 0 and row["roofline_us"] is None
    int8 = ceilings.Ceilings(copy_bytes=1e12, int8_flops=1e12)
    assert int8.fast("rotated_int8", 64, 64, 64) > 0
    assert int8.fast("rowwise_fp8", 64, 64, 64) is None


def test_what_waits_for_a_gpu_is_not_captured(monkeypatch):
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def raises(message: str):
        def run(i):
            if modes[-1] == "error":
                raise RuntimeError(message)

        return run

    clock = Clock(torch.device("cuda"))
    assert clock._synchronizes(raises("called a synchronizing CUDA operation"))
    assert not clock._synchronizes(lambda i: None)
    with pytest.raises(RuntimeError, match="misaligned"):
        clock._synchronizes(raises("misaligned address"))
    assert modes == ["default", *["error", "default"] * 3]


def test_the_host_has_a_goal_for_each_of_our_methods():
    made = [
        {"op": "host_us", "backend": name, "chosen": chosen, "us": us}
        for name, chosen, us in (("bf16", None, 9.0), ("a", True, 20.0), ("b", False, 30.0))
    ]
    found = {g["goal"]: g["state"] for g in report.goals(made) if g["state"] != "not measured"}
    host = "host microseconds per linear"
    assert found == {f"{host}, a": "holds", f"{host}, b": "FAILS"}


def test_the_time_is_kept_and_what_is_left_out_is_named(tmp_path):
    found = run(tmp_path, "--minutes", "0.001")
    assert found["rows"] == found["checks"] == []
    left_out = [line.partition(": no time left")[0] for line in found["left_out"]]
    assert {"host", "Z-Image block", "some checks", "linear (1, 96, 256)"} <= set(left_out)


def test_a_run_that_is_killed_leaves_what_it_measured(tmp_path):
    process = start(tmp_path)
    while not (found := whole_rows(tmp_path)):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert {row["op"] for row in found} >= {"linear"}
    assert whole_rows(tmp_path)


def whole_rows(folder: Path) -> list[dict]:
    """The rows of the results so far; the file can be read at any time."""
    return [r for p in folder.glob("*.json") for r in json.loads(p.read_text("utf-8"))["rows"]]


def test_results_tell_no_one_where_they_were_made():
    said = f"{Path.home()}/models: no such file; {ROOT}/kernels and {sys.prefix}/lib"
    assert working_copy.impersonal(said) == ".../models: no such file; .../kernels and .../lib"


def test_results_name_machine_kernels_and_ceilings(kernels):
    digest = hashlib.sha256()
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        digest.update(path.read_bytes())
    assert kernels["kernels_sha256"] == digest.hexdigest()
    assert kernels["machine"]["torch"]
    assert kernels["ceilings"]["copy_bytes"] > 0
    assert kernels["ceilings"]["bf16_flops"] > 0
    # What a GPU was not there for is not claimed.
    assert {goal["state"] for goal in kernels["goals"]} == {"not measured"}


def test_a_section_alone_does_not_replace_the_whole(tmp_path):
    found = run(tmp_path, "--section", "casts")
    assert {row["op"] for row in found["rows"]} >= {"quantize", "dequantize"}
    assert {row["chosen"] for row in found["rows"]} == {None}
    (path,) = tmp_path.glob("*.json")
    assert path.stem.endswith("-casts")


def test_the_models_sample_in_the_real_comfyui(packed):
    found = result_in(packed / "models")
    rows = {(row["mode"], row["model"], row["variant"]): row for row in found["rows"]}
    assert list(rows) == [
        (mode, model, variant)
        for mode in ("default", "LoRA")
        for model in ("image", "flux")  # one that is trained, one with random weights
        for variant in ("bf16", "stock", "fast", "exact")
    ]
    for row in rows.values():
        assert row["wrong"] is None
        assert row["seconds_per_step"] > 0
        assert row["difference"] <= (row["bound"] or 1)
    # ComfyUI computes in float32 on a CPU: roundings are far below what quantizing changes.
    for model in ("image", "flux"):
        exact = rows["default", model, "exact"]
        assert 1e-3 < exact["quantized_by"] == pytest.approx(exact["difference"], rel=1e-3)
        # Stock rounds a LoRA away that runs beside our weights.
        exact = rows["LoRA", model, "exact"]
        assert exact["difference"] < 0.8 * exact["quantized_by"]
    names = ("TorchCompile", "static VRAM", "offload all")
    assert found["not_run"] == [{"mode": name, "reason": "needs a GPU"} for name in names]


ONE_ROW_THEN_NOTHING = """
import json, sys, time
row = {"mode": "default", "model": "m", "variant": "bf16", "wrong": None, "dynamic_vram": False}
row |= {"seconds_per_step": 1, "difference": 0, "bound": None, "model_bytes": 1, "loaded_bytes": 1}
row |= {"peak_torch_bytes": None, "peak_device_bytes": None}
open(json.load(open(sys.argv[1]))["report"], "w").write(json.dumps([row]))
time.sleep(60)
"""


def test_a_mode_is_left_out_or_stopped_in_time_and_its_rows_are_kept(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("models", ROOT / "bench/in_comfyui/__main__.py")
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "models", bench)  # where dataclasses look for it
    spec.loader.exec_module(bench)

    class Run(bench.Run):
        def __init__(self):
            self.arguments = SimpleNamespace(device="cpu", quick=True, mode=["default", "LoRA"])
            self.work = self.models = tmp_path
            self.comfyui, self.path = "", tmp_path / "out.json"
            self.end = time.monotonic() + 20
            machine = {"comfyui": "0", "gpu": None}
            self.result = {"machine": machine, "date": "", "rows": [], "not_run": []}

        def _child(self, command, name):
            return subprocess.Popen([sys.executable, "-c", ONE_ROW_THEN_NOTHING, command[1]])

    monkeypatch.setattr(bench.shutil, "which", lambda name: None)
    on_gpu = Run()
    on_gpu.arguments.device = "cuda"
    assert on_gpu._reason(bench.MODES[0]) == "torch.compile needs a C compiler, such as gcc"
    assert on_gpu._reason(bench.MODES[1]) is None

    monkeypatch.setattr(bench, "_LEAST", 1)
    monkeypatch.setattr(bench, "_SHARE", 0.2)
    run, start = Run(), time.monotonic()
    run.mode(bench.MODES[1])
    assert time.monotonic() - start < 15
    saved = json.loads(run.path.read_text(encoding="utf-8"))
    assert [row["variant"] for row in saved["rows"]] == ["bf16"]
    reason = "stopped after 1 rows: no time left"
    assert saved["not_run"] == [{"mode": "default", "reason": reason}]


def test_one_folder_has_it_all(packed):
    files = [path for path in packed.rglob("*") if path.is_file()]
    assert len(files) == 8
    summary = (packed / "summary.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in summary if line.startswith("==")] == [
        "== correctness", *(line for line in summary if " passed in " in line),
        "== kernels", "== models", "== nothing is wrong",
    ]  # fmt: skip
    assert any(line.endswith(" checks, 0 failed") for line in summary)
    assert "TorchCompile: not run: needs a GPU" in summary


STUB = """#!/bin/bash
case "$*" in
    *pytest_timeout*) {pytest} ;;
    *"-m pytest"*) {tests} ;;
    *bench/gpu*) {kernels} ;;
    "- cpu") echo torch ;;
    *) exec {python} "$@" ;;
esac
"""


def stub(folder: Path, **commands: str) -> str:
    """A Python that runs other commands in place of tests and of bench/gpu."""
    filled = {"pytest": "true", "tests": "echo 1 passed", "kernels": "echo 3 checks, 0 failed"}
    path = folder / "python"
    path.write_text(STUB.format(python=sys.executable, **filled | commands), encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_a_failed_test_fails_the_run_and_the_rest_runs_all_the_same(tmp_path):
    tests = "head -c 20M /dev/zero | tr '\\0' x; echo; echo FAILED tests/x.py::test_y; exit 1"
    out = tmp_path / "out"
    ended = first_card(out, "correctness", "kernels", PYTHON=stub(tmp_path, tests=tests))
    assert ended.returncode == 1
    summary = (out / "summary.txt").read_text(encoding="utf-8")
    assert "FAILED tests/x.py::test_y\n== kernels\n3 checks, 0 failed\n" in summary
    assert summary.endswith("== something is wrong\n")
    log = out / "correctness" / "log.txt"
    assert log.stat().st_size <= 16 << 20


def test_a_failed_check_of_a_kernel_fails_the_run(tmp_path):
    python = stub(tmp_path, kernels="echo 'WRONG block matmul, x [1, 2, 3]: noise'; exit 1")
    ended = first_card(tmp_path / "out", "kernels", PYTHON=python)
    assert ended.returncode == 1
    assert "WRONG block matmul" in (tmp_path / "out/summary.txt").read_text(encoding="utf-8")


def test_what_takes_too_long_is_stopped_and_named(tmp_path):
    """Found with a `timeout` that does not wait."""
    timeout = tmp_path / "timeout"
    timeout.write_text("#!/bin/bash\nexit 124\n", encoding="utf-8")
    timeout.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    ended = first_card(tmp_path / "out", "kernels", PYTHON=stub(tmp_path), PATH=path)
    assert ended.returncode == 0
    summary = (tmp_path / "out" / "summary.txt").read_text(encoding="utf-8")
    assert "== kernels\nstopped after 355 s\n" in summary


def test_what_is_missing_is_left_out_and_named(tmp_path):
    """No pytest: the checks of bench/gpu stand in. No ComfyUI: no models."""
    python = stub(tmp_path, pytest="echo No module named pytest >&2; exit 1")
    parts = "correctness", "models"
    ended = first_card(tmp_path / "out", *parts, PYTHON=python, COMFYUI_PATH=str(tmp_path))
    assert ended.returncode == 0
    summary = (tmp_path / "out" / "summary.txt").read_text(encoding="utf-8")
    assert "left out: the tests, No module named pytest" in summary
    assert "pip install pytest" in summary and "3 checks, 0 failed" in summary
    assert "left out: no ComfyUI at" in summary


def test_paths_are_relative_to_where_it_is_called(tmp_path, monkeypatch):
    stub(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert first_card(Path("my results"), "kernels", PYTHON="./python").returncode == 0
    assert (tmp_path / "my results" / "summary.txt").is_file()
    assert first_card(tmp_path, "--wheels").returncode == 2


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_what_is_interrupted_ends_at_once_with_all_it_started(ending, tmp_path):
    python = stub(tmp_path, kernels=f"echo $$ > {tmp_path}/started; exec sleep 300")
    (tmp_path / "work").mkdir()
    process = subprocess.Popen(
        [ROOT / "bench" / "first_card.sh", "--device", "cpu", "kernels", "models"],
        env=environment(OUT=str(tmp_path / "out"), PYTHON=python, TMPDIR=str(tmp_path / "work")),
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    started = tmp_path / "started"
    while not started.exists() or not started.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, ending)  # as a terminal does
    assert process.wait(60) == 130
    assert not Path(f"/proc/{started.read_text().strip()}").exists()
    assert not any((tmp_path / "work").iterdir())
    summary = (tmp_path / "out" / "summary.txt").read_text(encoding="utf-8")
    assert "== models" not in summary and summary.endswith("== interrupted\n")


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        ended = first_card(tmp_path, "kernels", PYTHON=stub(tmp_path))
    finally:
        os.close(folder)
    assert ended.returncode == 1 and f"another run writes to {tmp_path}" in ended.stderr
