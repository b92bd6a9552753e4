"""Damaged files, thousands of them: each loads right or is refused, by file and rule.

Damage comes in two ways: defects that `mutations` makes at random, for everything that takes a
file; and Atheris, which is guided by the branches of the reader that an input takes.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"


def run_mutations(count: int, seeds: range) -> None:
    """Run `count` mutants, spread over processes of one seed each."""
    share = count // len(seeds)
    processes = [
        subprocess.Popen(
            [sys.executable, SUPPORT / "mutations.py", str(share), str(seed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in seeds
    ]
    loaded, refused, rules = 0, 0, set()
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        outcomes = json.loads(out)
        loaded, refused = loaded + outcomes["loaded"], refused + outcomes["refused"]
        rules |= outcomes["rules"].keys()
    assert loaded + refused == share * len(seeds)
    assert loaded > count // 20
    assert refused > count // 2
    assert len(rules) > 40  # so that mutants do not all die of one cause


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_damaged_files_load_right_or_are_refused():
    run_mutations(10_000, range(2))


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_hundred_thousand_damaged_files_load_right_or_are_refused():
    run_mutations(100_000, range(100, 102))


needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris has wheels for Linux on x86-64 with Python 3.10 to 3.13 only",
)
# Faults put into the reader: the fuzzer must find them, or its silence would mean nothing.
FAULTS = {
    "format.is_shape": "lambda value: True",
    "header.is_size": "lambda value: True",
    "format.layout.check_scale": "lambda stored, size: None",
    "header._check_offsets": "lambda *_: None",
}


def fuzz(folder: Path, *options: str, fault: str = "") -> subprocess.CompletedProcess:
    """Run the fuzzer in a process of its own, in an empty folder.

    Args:
        fault: what to replace in the reader; it must be there.
    """
    script = f"""
import sys
sys.path.insert(0, {str(SUPPORT)!r})
import fuzz_header
from mxfp8.quant import format
from mxfp8.quant.container import header
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


@pytest.mark.slow
@needs_atheris
def test_the_fuzzer_finds_nothing_in_a_few_thousand_inputs(tmp_path):
    outcomes = outcomes_of(tmp_path, fuzz(tmp_path, "-runs=4000", "-seed=1"))
    assert outcomes["inputs"] == 4000
    assert outcomes["accepted"] > 100  # it gets through, and not only to the first rule
    assert len(outcomes) > 30


@needs_atheris
@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_fuzzer_finds_nothing_in_three_minutes(tmp_path):
    outcomes = outcomes_of(tmp_path, fuzz(tmp_path, "-max_total_time=180"))
    assert outcomes["inputs"] > 20_000  # 280,000 on a free core
    assert outcomes["accepted"] > 500
    assert len(outcomes) > 50


@needs_atheris
@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_the_fuzzer_finds_a_fault_in_the_reader(tmp_path, fault):
    done = fuzz(tmp_path, "-max_total_time=400", "-seed=1", fault=fault)
    assert done.returncode == 77, done.stderr[-2000:]
    assert [p.name for p in tmp_path.glob("crash-*")]
