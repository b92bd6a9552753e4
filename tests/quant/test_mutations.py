"""Damaged files, thousands of them: each loads right or is refused, by file and rule."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MUTATIONS = Path(__file__).parents[1] / "support" / "mutations.py"
RULES = 40  # kinds of refusal that must be met, so that mutants do not all die of one cause


def run(count: int, seeds: range) -> None:
    """Run `count` mutants, spread over processes of one seed each."""
    share = count // len(seeds)
    processes = [
        subprocess.Popen(
            [sys.executable, MUTATIONS, str(share), str(seed)],
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
        found = json.loads(out)
        loaded, refused = loaded + found["loaded"], refused + found["refused"]
        rules |= found["rules"].keys()
    assert loaded + refused == share * len(seeds)
    assert loaded > count // 20
    assert refused > count // 2
    assert len(rules) > RULES


@pytest.mark.timeout(1200)
def test_ten_thousand_damaged_files_load_right_or_are_refused():
    run(10_000, range(2))


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_hundred_thousand_damaged_files_load_right_or_are_refused():
    run(100_000, range(100, 102))
