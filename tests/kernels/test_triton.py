"""Triton's kernels without a GPU: run by the interpreter, and compiled to machine code.

The interpreter is that of a newer Triton than torch's, because torch's does not go with numpy 2.4;
so it runs in a process of its own. Compiling needs no GPU: the tools are in Triton's wheel.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from comfyui import fetch_package

from mxfp8.kernels import aot, device_facts

pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parents[1]
COMPILED = TESTS.parent / "bench" / "results" / "compiled.json"
INTERPRETER = "3.9.0"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


def with_triton(version: str) -> dict[str, str]:
    """An environment in which another Triton comes first."""
    paths = [str(fetch_package("triton", version)), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def test_kernels_compute_what_the_oracle_computes(tmp_path):
    """By the interpreter; the tests are those that a GPU runs."""
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
    ended = subprocess.run(
        [*command, TESTS / "kernels" / "triton"],
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
    "small_m_kernel": dict.fromkeys((80, 86, 89, 90, 100, 120), "HMMA"),
    "rowwise_matmul_kernel": {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA", 120: "QMMA"},
    "rowwise_matmul_kernel (INT8)": dict.fromkeys((80, 86, 89, 100, 120), "IMMA") | {90: "IGMMA"},
    "mx_kernel": {100: "UTCQMMA", 120: "QMMA"},
}
# Of the small M kernel at M = 64: instructions of a warp group.
SMALL_M_64 = {90: "HGMMA", 100: "UTCHMMA"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_use_the_matrix_instructions_that_are_meant(arch):
    meant = {kernel: by_arch.get(arch) for kernel, by_arch in MATRIX.items()}
    actual = {name for name, _ in binaries(arch)}
    assert {kernel for kernel, mnemonic in meant.items() if mnemonic} == actual & meant.keys()
    for (name, config), binary in binaries(arch).items():
        expected = meant.get(name)
        if name == "small_m_kernel" and "<= 64" in config:
            expected = SMALL_M_64.get(arch, expected)
        assert binary.matrix.keys() == ({expected} if expected else set()), (name, config)


@pytest.mark.parametrize("arch", [100, 120])
def test_blackwell_applies_block_scales_in_its_matrix_instructions(arch):
    """And multiplies E4M3 in them, nothing unpacked to bfloat16 (UTCHMMA, HMMA: above)."""
    for (name, config), binary in binaries(arch).items():
        assert binary.block_scaled == (name == "mx_kernel"), (name, config)
        scaled = any(i.startswith("QMMA.SF") for i in binary.instructions)
        assert scaled == (name == "mx_kernel" and arch == 120), (name, config)


def test_scales_are_copied_to_tensor_memory_a_tile_at_a_time():
    """On sm_100, for every whole tile of 128 rows of both operands, in the loop and before it."""
    for build in aot.builds(100):
        if build.name == "mx_kernel":
            rows = [build.constants[name] for name in ("BA", "BB")]
            tiles = sum(r // 128 for r in rows if r % 128 == 0)
            copies = binaries(100)[build.name, build.config].scale_copies
            assert copies >= tiles > 0 and copies % tiles == 0, build.config


# AMD architecture -> kernel -> the matrix instruction of its last configuration, if any.
AMD = {
    "gfx942": {
        "small_m_kernel": "v_mfma_f32_32x32x8_f16",
        "rotated_input_kernel": None,
        "rowwise_matmul_kernel (INT8)": "v_mfma_i32_32x32x16_i8",
        "rowwise_matmul_kernel": "v_mfma_f32_32x32x16_fp8_fp8",
    },
    "gfx1100": {
        "small_m_kernel": "v_wmma_f32_16x16x16_f16",
        "rotated_input_kernel": None,
        "rowwise_matmul_kernel (INT8)": "v_wmma_i32_16x16x16_iu8",
    },
}
AMD["gfx1201"] = AMD["gfx1100"]


@pytest.mark.parametrize("arch", AMD)
def test_amd_multiplies_by_matrix_instructions_without_spills(arch):
    """As bench/results/compiled.json has it."""
    (run,) = (r for r in committed() if r["triton"] != INTERPRETER and r["arch"] == arch)
    builds = {b.name: b for b in aot.last_of_each(aot.builds(arch)) if b.name in AMD[arch]}
    assert builds.keys() == AMD[arch].keys()
    for name, build in builds.items():
        binary = aot.inspect(build, arch)
        assert binary.spills == 0 and binary.shared <= aot.SHARED[arch], name
        assert binary.matrix.keys() == {i for i in (AMD[arch][name],) if i}, name
        assert kept(binary) in run["kernels"], name


# Arguments that point to matrices, which may have more values than 2**31.
MATRICES = {"sum_ptr", "x_ptr", "code_ptr", "scale_ptr", "out_ptr", "a", "b", "a_scale", "b_scale"}
ONE_ROW = {("one_row_kernel", "x_ptr"), ("one_row_kernel", "out_ptr")}


def offsets(ttir: str) -> dict[str, list[str]]:
    """Pointer argument -> the types of the offsets that are added to it, in order."""
    operand_of, types_of = {}, {}
    for line in ttir.splitlines():
        if match := re.match(r"\s*(%\w+) = (\S+) (%\w+)", line):
            result, operation, operand = match.groups()
            operand_of[result] = operand
            if operation == "tt.addptr":
                while operand in operand_of:
                    operand = operand_of[operand]
                types = line.partition(" : ")[2]
                types_of.setdefault(operand.lstrip("%"), []).append(types.rpartition(" loc(")[0])
    return {name: [t.rpartition(", ")[2] for t in types] for name, types in types_of.items()}


@pytest.mark.parametrize("arch", [90, 120])
def test_rows_of_matrices_have_addresses_of_64_bits(arch):
    """Tile by tile: what comes after the row's own offset is below the length of a row."""
    seen = set()
    for build in aot.last_of_each(aot.builds(arch)):
        for name, types in offsets(aot.compile_kernel(build, arch).asm["ttir"]).items():
            if name in MATRICES and (build.name, name) not in ONE_ROW:
                seen.add(build.name)
                assert re.search(r"\bi64\b|xi64>", types[0]), (build.name, name, types)
    assert seen == {build.name for build in aot.builds(arch)}


PACKING = {
    "dequantize_kernel", "quantize_kernel", "one_row_kernel", "small_m_kernel",
    "rowwise_weight_kernel", "rowwise_input_kernel", "rotated_weight_kernel",
}  # fmt: skip


@pytest.mark.parametrize("arch", [89, 90, 100, 120])
def test_e4m3_is_converted_by_instructions_where_there_are_some(arch):
    for (name, config), binary in binaries(arch).items():
        packs = sum(
            n for i, n in binary.instructions.items() if i.startswith("F2FP") and "E4M3" in i
        )
        converts = name in PACKING
        assert (packs > 0) == converts, (name, config)


def test_hopper_fetches_tiles_by_its_memory_accelerator():
    for (name, config), binary in binaries(90).items():
        actual = any(i.startswith("UTMALDG") for i in binary.instructions)
        assert actual == name.startswith("rowwise_matmul_kernel"), (name, config)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_memory_is_read_and_written_16_bytes_at_a_time(arch):
    """Codes, activations and results, where a kernel does nothing but move them."""
    for name, config in (
        ("dequantize_kernel", "fp16"),
        ("quantize_kernel", "fp16"),
        ("rotated_input_kernel", "fp16, K = 3840"),
    ):
        instructions = binaries(arch)[name, config].instructions
        wide = [i for i in instructions if i.startswith(("LDG.E.128", "STG.E.128"))]
        assert wide, (name, instructions)


def compile_with_newest(arch: str, *arguments: str) -> list[dict]:
    command = [sys.executable, "-m", "mxfp8.kernels.aot", "--arch", arch, "--json", *arguments]
    return json.loads(
        subprocess.run(
            command, env=with_triton(INTERPRETER), cwd=TESTS.parent, capture_output=True, check=True
        ).stdout
    )


def test_the_newest_triton_compiles_every_kernel_too():
    """In one architecture; others below."""
    actual = compile_with_newest("90")
    assert {(b["kernel"], b["config"]) for b in actual} == set(binaries(90))
    assert set(actual[0]) == {
        "kernel", "config", "registers", "spills", "shared", "block_scaled", "scale_copies",
        "instructions",
    }  # fmt: skip
    for binary in actual:
        assert binary["shared"] <= aot.SHARED[90]
        if binary["kernel"] == "rowwise_matmul_kernel":
            assert any(i.startswith("QGMMA") for i in binary["instructions"])


# What block-scaled matmuls multiply with, by architecture.
SCALED = {"100": "UTCQMMA", "103": "UTCQMMA", "110": "UTCQMMA", "120": "QMMA", "121": "QMMA"}
SCALED["gfx950"] = "v_mfma_scale_f32_32x32x64_f8f6f4"


def test_the_newest_triton_has_block_scales_on_every_card_that_has_them():
    """One configuration of each kernel, and it comes out as bench/results/compiled.json has it."""
    recorded = {r["arch"]: r for r in committed() if r["triton"] == INTERPRETER}
    with ThreadPoolExecutor(2) as pool:
        every = pool.map(lambda arch: compile_with_newest(arch, "--one"), SCALED)
    for (arch, instruction), actual in zip(SCALED.items(), list(every), strict=True):
        run = recorded[arch if arch.startswith("gfx") else f"sm_{arch}"]
        assert all(kept(aot.Binary(**b)) in run["kernels"] for b in actual), arch
        for binary in actual:
            assert binary["spills"] == 0 and binary["shared"] <= aot.SHARED[aot._arch(arch)]
            assert binary["block_scaled"] == (binary["kernel"] == "mx_kernel")
        (scaled,) = (b for b in actual if b["kernel"] == "mx_kernel")
        assert aot.Binary(**scaled).matrix.keys() == {instruction}
        assert (scaled["scale_copies"] > 0) == (instruction == "UTCQMMA")


def committed() -> list[dict]:
    return json.loads(COMPILED.read_text(encoding="utf-8"))["runs"]


def kept(binary: aot.Binary) -> dict:
    """What compiled.json has of a kernel."""
    actual = {n: v for n, v in vars(binary).items() if n != "instructions"}
    return actual | {"matrix": binary.matrix}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_committed_is_what_is_compiled(arch):
    """After a change of kernels: `python bench/proved.py --compile`."""
    runs = [r for r in committed() if r["triton"] != INTERPRETER and r["arch"] == f"sm_{arch}"]
    assert [run["error"] for run in runs] == [None]
    assert runs[0]["kernels"] == [kept(binary) for binary in binaries(arch).values()]


def test_the_committed_results_back_the_versions_of_triton_that_are_required():
    """`device_facts.BLOCK_SCALED`: each card with the first Triton that compiled block scales."""
    natives = {}
    for run in committed():
        scaled = [k for k in run["kernels"] if k["kernel"] == "mx_kernel"]
        number = run["arch"].removeprefix("sm_")
        if scaled and all(k["block_scaled"] for k in scaled) and number.isdigit():
            version = tuple(map(int, run["triton"].split(".")[:2]))
            capability = divmod(int(number), 10)
            natives[capability] = min(natives.get(capability, version), version)
    for capability, oldest in device_facts.BLOCK_SCALED.items():
        assert natives[capability] >= oldest
        # 3.6 compiles for sm_103, but the disassembler in its wheel cannot read that.
        assert natives[capability] == oldest or capability == (10, 3)


def test_the_table_names_every_kernel(capsys):
    assert aot.main(["--arch", "80"]) == 0
    printed = capsys.readouterr().out
    for name, config in binaries(80):
        assert name in printed and config in printed


def test_an_argument_that_a_kernel_does_not_have_raises():
    build = next(aot.builds(90))
    wrong = aot.Build(build.kernel, "", build.types | {"extra": "i32"}, {})
    with pytest.raises(ValueError, match=r"unknown \['extra'\], missing \['C', 'HARDWARE', 'R'\]"):
        aot.compile_kernel(wrong, 90)


def test_the_reason_why_triton_cannot_be_used(monkeypatch):
    device_facts.triton_unsupported_reason.cache_clear()
    assert device_facts.triton_unsupported_reason() is None
    device_facts.triton_unsupported_reason.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    assert device_facts.triton_unsupported_reason() == "needs Triton: pip install triton"
    device_facts.triton_unsupported_reason.cache_clear()
    monkeypatch.setattr("os.name", "nt")
    assert device_facts.triton_unsupported_reason() == "needs Triton: pip install triton-windows"
    device_facts.triton_unsupported_reason.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr("triton.__version__", "2.1.0")
    assert device_facts.triton_unsupported_reason() == "Triton 2.1.0 is too old; 3.3 or later works"
    device_facts.triton_unsupported_reason.cache_clear()
