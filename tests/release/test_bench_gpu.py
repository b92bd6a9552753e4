"""The benchmarks for a GPU, tried on a CPU: they run, and write what they say they write."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu import report

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

COLUMNS = [
    "op", "precision", "backend", "cached", "M", "N", "K", "us", "bf16_us", "stock_us",
    "without_us", "added_launches", "roofline_us", "error",
]  # fmt: skip


def run(script: str, out: Path, *arguments: str) -> dict:
    """The results of a script's tiny run."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"  # tiny sizes: more threads only wait for each other
    command = [sys.executable, ROOT / "bench" / script, "--device", "cpu", "--quick", "--out", out]
    ended = subprocess.run(
        [*map(str, command), *arguments], cwd=out, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    (path,) = out.glob("*.json")
    assert path.with_suffix(".md").read_text(encoding="utf-8").startswith("# ")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict:
    return run("gpu", tmp_path_factory.mktemp("kernels"))


def test_every_row_has_the_columns_and_every_section_has_rows(kernels):
    assert [list(row) for row in kernels["rows"]] == [COLUMNS] * len(kernels["rows"])
    ops = {row["op"] for row in kernels["rows"]}
    assert ops == {
        "dequantize", "quantize", "to_rowwise", "quantize_rowwise", "linear",
        "linear, LoRA", "host_us", "scaled_matmul", "block_matmul",
        "Z-Image block", "Flux double block",
    }  # fmt: skip
    linears = {(r["precision"], r["cached"]) for r in kernels["rows"] if r["op"] == "linear"}
    assert linears == {("exact", None), ("fast", None), ("fast", True)}


def test_times_are_times_and_errors_those_of_eight_bits(kernels):
    for row in kernels["rows"]:
        assert row["us"] > 0, row
        if row["op"] == "linear":
            assert min(row["bf16_us"], row["stock_us"], row["roofline_us"]) > 0, row
            # BF16 rounds by 2**-9 at most; activations in E4M3 cost 2 to 3%.
            least, most = (5e-4, 2.5e-3) if row["precision"] == "exact" else (5e-3, 6e-2)
            assert least < row["error"] < most, row


def test_a_lora_beside_a_layer_adds_two_matmuls(kernels):
    rows = [row for row in kernels["rows"] if row["op"] == "linear, LoRA"]
    assert [row["precision"] for row in rows] == ["exact", "fast"]
    for row in rows:
        assert min(row["us"], row["without_us"], row["bf16_us"], row["stock_us"]) > 0
        assert row["added_launches"] == 2
        least, most = (5e-4, 4e-3) if row["precision"] == "exact" else (5e-3, 6e-2)
        assert least < row["error"] < most  # one BF16 rounding more


def test_checks_were_made_and_hold(kernels):
    assert len(kernels["checks"]) > 25
    assert [check for check in kernels["checks"] if check["wrong"]] == []


@pytest.mark.parametrize(
    ("op", "backend", "check", "count"),
    [("block_matmul", "reference_mx", "block matmul", 4),
     ("scaled_matmul", "reference_fp8", "FP8 matmul", 1)],
)  # fmt: skip
def test_matmuls_alone_have_rows_beside_their_rivals_and_checks(kernels, op, backend, check, count):
    """On a CPU by the oracle, which stands in for what needs a card."""
    rows = [row for row in kernels["rows"] if row["op"] == op]
    assert {(r["backend"], r["precision"]) for r in rows} == {(backend, "fast")}
    assert {(r["M"], r["N"], r["K"]) for r in rows} == {
        (r["M"], r["N"], r["K"]) for r in kernels["rows"] if r["op"] == "linear" and r["M"] >= 16
    }
    for row in rows:
        assert min(row["bf16_us"], row["stock_us"], row["roofline_us"]) > 0
        assert 5e-3 < row["error"] < 6e-2
    checks = [c for c in kernels["checks"] if c["check"] == f"{check}, {backend}"]
    assert len(checks) == count


def test_results_tell_no_one_where_they_were_made():
    said = f"{Path.home()}/models: no such file; {ROOT}/kernels and {sys.prefix}/lib"
    assert report.impersonal(said) == ".../models: no such file; .../kernels and .../lib"


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
    found = run("gpu", tmp_path, "--section", "casts")
    assert {row["precision"] for row in found["rows"]} == {None}
    (path,) = tmp_path.glob("*.json")
    assert path.stem.endswith("-casts")


@pytest.mark.comfy
def test_the_models_sample_in_the_real_comfyui(tmp_path):
    found = run("in_comfyui", tmp_path, "--mode", "full load", "dynamic VRAM")
    rows = {row["variant"]: row for row in found["rows"]}
    assert list(rows) == ["bf16", "stock", "exact", "fast"]
    for row in rows.values():
        assert row["wrong"] is None
        assert row["seconds_per_step"] > 0
    # ComfyUI computes in float32 on a CPU: roundings are far below what quantizing changes.
    assert rows["exact"]["difference"] < 1e-5 < 1e-3 < rows["exact"]["quantized_by"]
    assert found["not_run"] == [{"mode": "dynamic VRAM", "reason": "needs a GPU"}]
