"""Other versions of ComfyUI, comfy-kitchen, torch and Triton than the pinned ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui import ROOT, fetch_package, newest, releases
from versions import (
    RESULTS,
    SHORT,
    combinations,
    ends,
    is_supported,
    oldest_supported,
    run,
    run_by_row,
    run_units,
    version_key,
    with_newest,
)  # fmt: skip

NEEDS_PYTHON = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="the newest Triton needs Python 3.11"
)


def test_the_oldest_supported_comfyui_is_one_that_is_run():
    assert ends()[1].release.version == oldest_supported()
    # Without a Flux to sample, a run is no evidence.
    assert not any("unpooled" in r.lacks for r in filter(is_supported, releases()))


@pytest.mark.comfy
@pytest.mark.parametrize("combination", ends(), ids=str)
def test_the_ends_of_what_is_supported(combination):
    outcome = run(combination, SHORT)
    assert outcome.failed == outcome.skipped == 0, outcome.output
    assert outcome.passed > 10


@pytest.mark.comfy
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "combination", [c for c in combinations() if is_supported(c.release)], ids=str
)
def test_every_supported_version_that_can_be_had(combination):
    outcome = run(combination)
    assert outcome.failed == outcome.skipped == 0, outcome.output
    assert outcome.passed > 15


def test_packages_are_fetched_as_the_user_s_pip_is_set(tmp_path, monkeypatch):
    """Its index and its constraints hold: pip gets neither another environment nor such options."""
    calls = []

    def record(command, **options):
        calls.append((command, options))
        Path(command[command.index("--target") + 1]).mkdir()

    monkeypatch.setenv("MXFP8_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", record)
    assert fetch_package("torch", "3.0").is_dir()
    ((command, options),) = calls
    assert options == {"check": True}
    given = {argument for argument in command if argument.startswith("-")}
    assert given == {"-m", "-q", "--disable-pip-version-check", "--no-deps", "--target"}


# ---- the newest torch, Triton and comfy-kitchen ------------------------------------------------


@NEEDS_PYTHON
@pytest.mark.long
@pytest.mark.timeout(1800)  # the first time torch is downloaded
def test_torch_multiplies_fp8_by_row_as_the_oracle_does():
    """On the CPU, by the function that runs on GPUs; the pinned torch has it on GPUs only."""
    outcome = run_by_row()
    assert outcome.failed == outcome.skipped == 0, outcome.output
    assert outcome.passed > 10


@NEEDS_PYTHON
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_kernels_and_files_with_the_newest():
    for name, outcome in run_units().items():
        assert outcome.failed == 0, outcome.output
        assert outcome.passed > {"kernels and files": 2000, "interpreter": 200}[name]


@NEEDS_PYTHON
@pytest.mark.comfy
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_main_job_with_the_newest():
    outcome = run(with_newest())
    assert outcome.failed == outcome.skipped == 0, outcome.output
    assert outcome.passed > 50


def test_the_table_tells_what_was_run():
    """In docs/benchmarks.md, from the results file."""
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    section = text.partition("## Versions of ComfyUI")[2].partition("\n## ")[0]
    head, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    torches = [re.search(r"torch ([\d.]+)", cell)[1] for cell in head[1:3]]
    table = {
        (re.search(r"[\d.]+$", line[0])[0], torch, kitchen)
        for line in lines
        for torch, cell in zip(torches, line[1:3], strict=True)
        for kitchen in re.findall(r"[\d.]+", cell)
    }
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert all(run["failed"] == run["skipped"] == 0 for run in results["runs"])
    passed = {(r["ComfyUI"], r["torch"], r["comfy-kitchen"]) for r in results["runs"]}
    assert table == passed
    measured = results["newest"]
    assert measured["packages"] == newest()
    for part in ("kernels and files", "interpreter"):
        assert measured[part]["failed"] == 0
        assert f"{measured[part]['passed']:,}" in section
    assert f"torch {newest()['torch']} and Triton {newest()['triton']}" in section


def test_the_newest_is_what_the_other_tests_run_too():
    assert newest()["comfy-kitchen"] == max(releases()[0].kitchens, key=version_key)
    compiled = json.loads(RESULTS.with_name("compiled.json").read_text(encoding="utf-8"))
    assert newest()["triton"] == compiled["interpreter"]["triton"]
    by_newest = {r["arch"] for r in compiled["runs"] if r["triton"] == newest()["triton"]}
    assert by_newest == {run["arch"] for run in compiled["runs"]}


@pytest.mark.parametrize(
    "command",
    [
        "versions.py --newest 0.30.0",
        "versions.py --newest --fetch",
        "host.py --check --only nothing",
        "host.py --check --rounds 0",
    ],
)
def test_arguments_that_would_run_something_else_are_refused(command):
    script, *arguments = command.split()
    ended = subprocess.run(
        [sys.executable, ROOT / "bench" / script, *arguments], capture_output=True, timeout=60
    )
    assert ended.returncode == 2
