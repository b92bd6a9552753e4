"""Triton's kernels without a GPU: run by the interpreter, and compiled to machine code.

The interpreter is that of a newer Triton than torch's, because torch's does not go with numpy 2.4;
so it runs in a process of its own. Compiling needs no GPU: the tools are in Triton's wheel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path

import pytest
from comfyui import fetch_package

from mxfp8.kernels import aot, fp8_gemm, launch

TESTS = Path(__file__).parent
INTERPRETER = "3.9.0"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


def with_triton(version: str) -> dict[str, str]:
    """An environment in which another Triton comes first."""
    return {**os.environ, "PYTHONPATH": str(fetch_package("triton", version))}


def test_kernels_compute_what_the_oracle_computes(tmp_path):
    """By the interpreter; the tests are those that a GPU runs."""
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
    ended = subprocess.run(
        [*command, TESTS / "triton_kernels"],
        env=with_triton(INTERPRETER) | {"TRITON_INTERPRET": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-8000:]
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    assert int(suite.get("skipped")) == 0
    assert int(suite.get("tests")) > 150


@cache
def binaries(arch: int) -> dict[tuple[str, str], aot.Binary]:
    return {(b.name, b.config): aot.inspect(b, arch) for b in aot.builds(arch)}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_spills_or_takes_more_memory_than_there_is(arch):
    assert len(binaries(arch)) >= 9
    for name, binary in binaries(arch).items():
        assert binary.spills == 0, name
        assert binary.registers <= 255, name
        assert binary.shared <= aot.SHARED[arch], name


# Kernel -> the matrix instruction that it must have on an architecture.
MATRIX = {
    "few_rows_kernel": dict.fromkeys((80, 86, 89, 90, 100, 120), "HMMA"),
    "copy_kernel": {89: "QMMA", 100: "UTCQMMA", 120: "QMMA"},
    "tma_kernel": {90: "QGMMA"},
    "mx_kernel": {100: "UTCQMMA", 120: "QMMA"},
}
# Of the kernel for few rows, from 64 rows on: instructions of a group of warps.
FEW = {90: "HGMMA", 100: "UTCHMMA"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_use_the_matrix_instructions_that_are_meant(arch):
    meant = {kernel: by_arch.get(arch) for kernel, by_arch in MATRIX.items()}
    found = {name for name, _ in binaries(arch)}
    assert {kernel for kernel, mnemonic in meant.items() if mnemonic} == found & meant.keys()
    for (name, config), binary in binaries(arch).items():
        wanted = meant.get(name)
        if name == "few_rows_kernel" and "<= 64" in config:
            wanted = FEW.get(arch, wanted)
        assert binary.matrix.keys() == ({wanted} if wanted else set()), (name, config)


@pytest.mark.parametrize("arch", [100, 120])
def test_blackwell_applies_block_scales_in_its_matrix_instructions(arch):
    """And multiplies E4M3 in them, nothing unpacked to bfloat16 (UTCHMMA, HMMA: above)."""
    for build in aot.builds(arch):
        if build.name in ("mx_kernel", "copy_kernel"):
            ptx = aot.compile_kernel(build, arch).asm["ptx"]
            assert ("block_scale" in ptx) == (build.name == "mx_kernel"), build.config


@pytest.mark.parametrize("arch", [89, 90, 100, 120])
def test_e4m3_is_converted_by_instructions_where_there_are_some(arch):
    for (name, config), binary in binaries(arch).items():
        packs = sum(
            n for i, n in binary.instructions.items() if i.startswith("F2FP") and "E4M3" in i
        )
        converts = name not in ("copy_kernel", "tma_kernel", "mx_kernel")
        assert (packs > 0) == converts, (name, config)


def test_hopper_fetches_tiles_by_its_memory_accelerator():
    for (name, config), binary in binaries(90).items():
        found = any(i.startswith("UTMALDG") for i in binary.instructions)
        assert found == (name == "tma_kernel"), (name, config)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_memory_is_read_and_written_16_bytes_at_a_time(arch):
    """Codes, activations and results, where a kernel does nothing but move them."""
    for name in ("dequantize_kernel", "quantize_kernel"):
        instructions = binaries(arch)[name, "fp16"].instructions
        wide = [i for i in instructions if i.startswith(("LDG.E.128", "STG.E.128"))]
        assert wide, (name, instructions)


def test_the_newest_triton_compiles_every_kernel_too():
    """In one architecture; the rest is `make test-long`."""
    command = [sys.executable, "-m", "mxfp8.kernels.aot", "--arch", "90", "--json"]
    said = subprocess.run(
        command, env=with_triton(INTERPRETER), cwd=TESTS.parent, capture_output=True, check=True
    ).stdout
    found = json.loads(said)
    assert {(b["kernel"], b["config"]) for b in found} == set(binaries(90))
    assert {"kernel", "config", "registers", "spills", "shared", "instructions"} == set(found[0])
    for binary in found:
        assert binary["shared"] <= aot.SHARED[90]
        if binary["kernel"] == "tma_kernel":
            assert any(i.startswith("QGMMA") for i in binary["instructions"])


def test_the_table_names_every_kernel(capsys):
    assert aot.main(["--arch", "80"]) == 0
    printed = capsys.readouterr().out
    for name, config in binaries(80):
        assert name in printed and config in printed


def test_an_argument_that_a_kernel_lacks_is_refused():
    build = next(aot.builds(90))
    wrong = aot.Build(build.kernel, "", build.types | {"extra": "i32"}, {})
    with pytest.raises(ValueError, match=r"unknown \['extra'\], missing \['C', 'HARDWARE', 'R'\]"):
        aot.compile_kernel(wrong, 90)


@pytest.mark.parametrize("arch", fp8_gemm.CONFIGS)
def test_every_size_of_matmul_has_tiles(arch):
    import torch

    for M in (1, 64, 65, 256, 257, 1 << 20):
        for dtype in (torch.bfloat16, torch.float32):
            assert fp8_gemm.config_for(arch, M, dtype)["BM"] >= 64


def test_why_there_is_no_triton_is_told(monkeypatch):
    launch.refusal.cache_clear()
    assert launch.refusal() is None
    launch.refusal.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    assert launch.refusal() == "needs Triton: pip install triton"
    launch.refusal.cache_clear()
    monkeypatch.setattr("os.name", "nt")
    assert launch.refusal() == "needs Triton: pip install triton-windows"
    launch.refusal.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr("triton.__version__", "2.1.0")
    assert launch.refusal() == "Triton 2.1.0 is too old; 3.3 or later works"
    launch.refusal.cache_clear()
