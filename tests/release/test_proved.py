"""The generated sections of docs/hardware.md match the results files, and claim no more."""

from __future__ import annotations

import shutil
from pathlib import Path

import proved
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def results():
    """A copy of all results files."""
    return proved.load_results()


def test_the_committed_page_and_kernels_match_the_results_files(capsys):
    assert proved.main(["--check"]) == 0, capsys.readouterr().out


def test_an_edited_section_is_noticed_and_text_around_it_is_not(tmp_path, monkeypatch, capsys):
    page = proved.PAGE.read_text(encoding="utf-8")
    edited = tmp_path / "hardware.md"
    monkeypatch.setattr(proved, "PAGE", edited)
    for before, after in (("| eager, not run |", "| eager, run |"), ("not run |", "**run** |")):
        edited.write_text(page.replace(before, after, 1), encoding="utf-8")
        assert proved.main(["--check"]) == 1
        assert capsys.readouterr().out.startswith("hardware.md does not match the results files")
    edited.write_text(f"before\n{page}after\n", encoding="utf-8")
    assert proved.main(["--check"]) == 0
    edited.write_text("# Title\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"hardware.md has no markers of the section"):
        proved.main([])


def test_only_a_results_file_from_such_a_card_makes_a_backend_run(results):
    row = {"op": "linear", "backend": "torch_mx", "M": 4096, "N": 1, "K": 1, "us": 1.0}
    results["rtx.json"] = {"machine": {"capability": "12.0"}, "rows": [row], "checks": []}
    reason = proved.unsupported_reasons("sm_120")["torch_mx"]
    cell = proved.cell(results, "torch_mx", "sm_120", reason)
    assert cell == "**run** ([rtx.json](../bench/results/rtx.json))"
    for backend, arch in (("torch_mx", "sm_100"), ("triton", "sm_120")):
        assert "run**" not in proved.cell(results, backend, arch, None)
    results["rtx.json"]["checks"] = [{"check": "block matmul, torch_mx", "wrong": "noise"}]
    assert proved.cell(results, "torch_mx", "sm_120", None) == "library, not run"


def test_a_kernel_that_spills_or_does_not_scale_is_not_called_compiled(results):
    assert proved.tritons(results, "triton_mx", "sm_121") == ["3.9.0"]
    for change in ({"spills": 1}, {"block_scaled": False}):
        changed = proved.load_results()
        for run in changed["compiled.json"]["runs"]:
            for kernel in run["kernels"]:
                kernel.update(change)
        assert proved.cell(changed, "triton_mx", "sm_121", None) == "not compiled"


def without(results, arch: str, kernel: str, config: str) -> None:
    """Drop a kernel's configurations that begin like this from every Triton's results."""
    for run in results["compiled.json"]["runs"]:
        if run["arch"] == arch:
            run["kernels"] = [
                k for k in run["kernels"]
                if k["kernel"] != kernel or not k["config"].startswith(config)
            ]  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "arch", "kernel"),
    [
        ("triton_w8a16", "sm_80", "small_m_kernel"), ("triton_w8a16", "sm_110", "one_row_kernel"),
        ("triton", "gfx950", "quantize_kernel"), ("triton_fp8", "sm_89", "rowwise_weight_kernel"),
        ("triton_fp8", "sm_90", "rowwise_matmul_kernel"),
        ("triton_fp8", "sm_103", "rowwise_input_kernel"), ("triton_mx", "sm_121", "mx_kernel"),
    ],
)  # fmt: skip
def test_every_kernel_of_a_backend_has_to_be_compiled(results, backend, arch, kernel):
    assert proved.cell(results, backend, arch, None).startswith("compiled, Triton ")
    assert proved.proof(results, backend, arch) == "compiled"
    without(results, arch, kernel, "")
    assert proved.cell(results, backend, arch, None) == "not compiled"
    assert proved.proof(results, backend, arch) == proved.MISSING


def test_one_configuration_of_each_kernel_is_stated_as_that(results):
    without(results, "sm_121", "mx_kernel", "bf16")
    state = "one configuration of each kernel compiled"
    assert proved.cell(results, "triton_mx", "sm_121", None) == f"{state}, Triton 3.9.0"
    assert proved.proof(results, "triton_mx", "sm_121") == state


def test_what_cute_compiled_is_stated_with_its_dtype(results):
    cell = proved.cell(results, "cute_mx", "sm_100", None)
    assert cell == "compiled for bfloat16 with a bias, CuTe DSL 4.8.1"
    assert {k["config"] for k in results["compiled.json"]["cute"]} == {"bfloat16, bias"}
    results["compiled.json"]["cute"] = []
    assert proved.cell(results, "cute_mx", "sm_100", None) == "not compiled"


@pytest.mark.parametrize("compiler", proved.SOURCES)
@pytest.mark.parametrize("module", [0, -1])
def test_kernels_that_changed_since_they_were_compiled_are_noticed(
    compiler, module, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "backends" / compiler / f"{proved.SOURCES[compiler][module]}.py"
    code = path.read_text(encoding="utf-8")
    path.write_text(code.replace('"""', '"""Words. ', 1) + "# more\n", encoding="utf-8")
    assert proved.sources(folder) == proved.sources()
    path.write_text(f"{code}\nchanged = True\n", encoding="utf-8")
    changed = proved.sources(folder)
    assert [name for name, code in proved.sources().items() if changed[name] != code] == [compiler]
    monkeypatch.setattr(proved, "sources", lambda: changed)
    assert proved.main(["--check"]) == 1
    message = f"kernels are not those of compiled.json: bench/proved.py --compile {compiler}"
    assert message in capsys.readouterr().out


def test_the_sources_are_all_modules_with_kernels():
    for compiler, modules in proved.SOURCES.items():
        folder = ROOT / "kernels" / "backends" / compiler
        with_kernels = {
            path.stem
            for path in folder.glob("*.py")
            if "@triton.jit" in (text := path.read_text(encoding="utf-8")) or "@cute." in text
        }
        assert with_kernels <= set(modules)


def test_the_error_of_a_compiler_is_its_own_line():
    stderr = "warning: x\nptxas fatal   : Value 'sm_110a' is not defined\n.version 8.8\n}\n"
    assert proved.error_line(stderr) == "ptxas fatal   : Value 'sm_110a' is not defined"
    assert proved.error_line("Traceback\nRuntimeError: nothing\n") == "RuntimeError: nothing"


@pytest.mark.parametrize(
    ("arch", "installed", "expected"),
    [
        ("sm_86", {}, ["triton", "kitchen_int8", "kitchen_int8"]),
        ("sm_86", {"triton": False}, ["eager", "kitchen_int8", "kitchen_int8"]),
        ("sm_86", {"kitchen": False}, ["triton", "triton_int8", "triton_int8"]),
        ("sm_120", {"triton": False, "kitchen": False}, ["eager", "eager", "eager"]),
    ],
)
def test_what_is_chosen_depends_on_what_is_installed(arch, installed, expected):
    assert proved.chosen(arch, **installed) == expected


def test_speeds_are_those_of_results_files(results):
    linear = {"op": "linear", "backend": "int8", "M": 4096, "bf16_ms": 4.0}
    results["cpu.json"] = {
        "machine": {"flags": ["AMX"]},
        "rows": [linear | {"ms": 3.0}, linear | {"ms": 5.0}, linear | {"ms": 9.0, "M": 64}],
    }
    assert proved.speed(results, "int8", "cpu AMX") == "; 0.75 to 1.25 of BF16's time"
    results["cpu.json"]["rows"][0]["vs_bf16"] = 0.7  # of paired rounds
    assert proved.speed(results, "int8", "cpu AMX") == "; 0.70 to 1.25 of BF16's time"
    assert proved.speed(results, "int8", "sm_90") == proved.speed(results, "int8", "cpu") == ""


def test_backends_in_the_cpu_results_show_what_ran_on_such_a_cpu(results):
    del results["cpu_vnni.json"]
    results["cpu.json"] = {"machine": {"flags": ["AMX"]}, "rows": [{"backend": "int8_one_row"}]}
    ran = [arch for arch in proved.CARDS if proved.runs(results, "int8_one_row", arch)]
    assert ran == ["cpu AMX"] and not proved.runs(results, "int8", "cpu AMX")
