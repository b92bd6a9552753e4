"""docs/proved.md and the README's table are what results files say, and no more."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "bench"))

import proved  # noqa: E402
import proved_page  # noqa: E402


@pytest.fixture
def found():
    """A copy of all results files."""
    return proved_page.results()


def test_the_committed_page_and_table_are_what_results_files_say(capsys):
    assert proved.main(["--check"]) == 0, capsys.readouterr().out


def test_a_page_or_a_table_that_was_edited_is_noticed(tmp_path, monkeypatch, capsys):
    for name, path in (("PAGE", proved_page.PAGE), ("README", proved_page.README)):
        edited = tmp_path / path.name
        edited.write_text(path.read_text(encoding="utf-8").replace("not run |", "**run** |"))
        with monkeypatch.context() as patch:
            patch.setattr(proved_page, name, edited)
            patch.setattr(proved, "ROOT", tmp_path)
            assert proved.main(["--check"]) == 1
        assert capsys.readouterr().out.startswith(f"{path.name} is not what results files say")


def test_only_a_results_file_from_such_a_card_makes_a_backend_run(found):
    row = {"op": "linear", "backend": "torch_mx", "M": 4096, "N": 1, "K": 1, "us": 1.0}
    found["rtx.json"] = {"machine": {"capability": "12.0"}, "rows": [row], "checks": []}
    refused = proved_page.refusals("sm_120")
    cell = proved_page.cell(found, "torch_mx", "sm_120", refused["torch_mx"])
    assert cell == "**run** ([rtx.json](../bench/results/rtx.json))"
    for backend, arch in (("torch_mx", "sm_100"), ("triton", "sm_120")):
        assert "run**" not in proved_page.cell(found, backend, arch, None)
    found["rtx.json"]["checks"] = [{"check": "block matmul, torch_mx", "wrong": "noise"}]
    assert proved_page.cell(found, "torch_mx", "sm_120", None) == "library, not run"


def test_a_kernel_that_spills_or_does_not_scale_is_not_called_compiled(found):
    assert proved_page.compiled(found, "triton_mx", "sm_121") == ["3.9.0"]
    for change in ({"spills": 1}, {"block_scaled": False}):
        changed = proved_page.results()
        for run in changed["compiled.json"]["runs"]:
            for kernel in run["kernels"]:
                kernel.update(change)
        assert proved_page.cell(changed, "triton_mx", "sm_121", None) == "not compiled"


def without(found, arch: str, kernel: str, config: str) -> dict[str, dict]:
    """Results files in which no Triton compiled a kernel in configurations that begin like this."""
    for run in found["compiled.json"]["runs"]:
        if run["arch"] == arch:
            run["kernels"] = [
                k for k in run["kernels"]
                if k["kernel"] != kernel or not k["config"].startswith(config)
            ]  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("backend", "arch", "kernel"),
    [
        ("triton", "sm_80", "small_m_kernel"), ("triton", "sm_110", "one_row_kernel"),
        ("triton", "gfx950", "quantize_kernel"), ("fp8", "sm_89", "rowwise_weight_kernel"),
        ("fp8", "sm_90", "tma_kernel"), ("fp8", "sm_103", "rowwise_input_kernel"),
        ("triton_mx", "sm_121", "mx_kernel"),
    ],
)  # fmt: skip
def test_every_kernel_of_a_backend_has_to_be_compiled(found, backend, arch, kernel):
    assert proved_page.cell(found, backend, arch, None).startswith("compiled, Triton ")
    assert proved_page.proof(found, backend, arch) == "compiled"
    without(found, arch, kernel, "")
    assert proved_page.cell(found, backend, arch, None) == "not compiled"
    assert proved_page.proof(found, backend, arch) == proved_page.MISSING


def test_one_configuration_of_each_kernel_is_told_as_that(found):
    without(found, "sm_121", "mx_kernel", "bf16")
    told = "one configuration of each kernel compiled"
    assert proved_page.cell(found, "triton_mx", "sm_121", None) == f"{told}, Triton 3.9.0"
    assert proved_page.proof(found, "triton_mx", "sm_121") == told


def test_what_cute_compiled_is_told_with_its_type(found):
    cell = proved_page.cell(found, "cute_mx", "sm_100", None)
    assert cell == "compiled for bfloat16 with a bias, CuTe DSL 4.8.1"
    assert {k["config"] for k in found["compiled.json"]["cute"]} == {"bfloat16, bias"}
    found["compiled.json"]["cute"] = []
    assert proved_page.cell(found, "cute_mx", "sm_100", None) == "not compiled"


@pytest.mark.parametrize("compiler", proved.SOURCES)
def test_kernels_that_changed_since_they_were_compiled_are_noticed(
    compiler, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / f"{proved.SOURCES[compiler][-1]}.py"
    code = path.read_text(encoding="utf-8")
    path.write_text(code.replace('"""', '"""Words. ', 1) + "# more\n", encoding="utf-8")
    assert proved.sources(folder) == proved.sources()
    path.write_text(code.replace(" - 1", " - 2", 1), encoding="utf-8")
    changed = proved.sources(folder)
    assert [name for name, made in proved.sources().items() if changed[name] != made] == [compiler]
    monkeypatch.setattr(proved, "sources", lambda: changed)
    assert proved.main(["--check"]) == 1
    said = f"kernels are not those of compiled.json: bench/proved.py --compile {compiler}"
    assert said in capsys.readouterr().out


def test_a_readme_without_markers_stays_as_it_is():
    assert proved_page.with_table("# Title\n") == "# Title\n"
    marked = f"before\n{proved_page.START}\nold\n{proved_page.END}\nafter\n"
    table = proved_page.with_table(marked)
    assert "old" not in table and table.startswith("before\n") and table.endswith("\nafter\n")
    assert proved_page.with_table(table) == table


def test_what_a_compiler_lacks_is_told_in_its_own_line():
    said = "warning: x\nptxas fatal   : Value 'sm_110a' is not defined\n.version 8.8\n}\n"
    assert proved.refusal(said) == "ptxas fatal   : Value 'sm_110a' is not defined"
    assert proved.refusal("Traceback\nRuntimeError: nothing\n") == "RuntimeError: nothing"
