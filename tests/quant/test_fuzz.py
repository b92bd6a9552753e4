"""The coverage-guided fuzzer over the header reader: a short run always, a long one when asked."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FUZZER = Path(__file__).parents[1] / "support" / "fuzz_header.py"
# Faults put into the reader: the fuzzer must find them, or its silence would mean nothing.
FAULTS = {
    "format.is_shape": "lambda value: True",
    "container.is_size": "lambda value: True",
    "format.layout.check_scale": "lambda stored, size: None",
    "container._check_offsets": "lambda *_: None",
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris has wheels for Linux on x86-64 with Python 3.10 to 3.13 only",
)


def fuzz(folder: Path, *options: str, fault: str = "") -> subprocess.CompletedProcess:
    """Run the fuzzer in a process of its own, in an empty folder.

    Args:
        fault: what to replace in the reader; it must be there.
    """
    script = f"""
import sys
sys.path.insert(0, {str(FUZZER.parent)!r})
import fuzz_header
from mxfp8.quant import container, format
{fault and f"{fault}, _ = {FAULTS[fault]}, {fault}"}
fuzz_header.main(sys.argv[1:])
"""
    command = [sys.executable, "-c", script, folder / "corpus", f"-artifact_prefix={folder}/"]
    return subprocess.run(
        # Through a shell: a child's peak memory, which the fuzzer limits, begins with its parent's.
        ["sh", "-c", '"$@"; exit $?', "sh", *command, *options],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=500,
    )


def outcomes_of(folder: Path, done: subprocess.CompletedProcess) -> dict[str, int]:
    """What came of the inputs of a run that found nothing."""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((folder / "corpus.json").read_text(encoding="ascii"))


def test_a_few_thousand_inputs(tmp_path):
    outcomes = outcomes_of(tmp_path, fuzz(tmp_path, "-runs=4000", "-seed=1"))
    assert outcomes["inputs"] == 4000
    assert outcomes["file accepted"] > 100  # it gets through, and not only to the first rule
    assert len(outcomes) > 30


@pytest.mark.long
@pytest.mark.timeout(900)
def test_three_minutes_of_fuzzing(tmp_path):
    outcomes = outcomes_of(tmp_path, fuzz(tmp_path, "-max_total_time=180"))
    assert outcomes["inputs"] > 20_000  # 280,000 on a free core
    assert outcomes["file accepted"] > 500
    assert len(outcomes) > 50


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_reader_is_found(tmp_path, fault):
    done = fuzz(tmp_path, "-max_total_time=60", "-seed=1", fault=fault)
    assert done.returncode == 77, done.stderr[-2000:]
    assert [p.name for p in tmp_path.glob("crash-*")]
