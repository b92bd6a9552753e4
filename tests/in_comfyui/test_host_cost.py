"""What a linear costs the host beyond what stock cannot do without, with launches that do nothing.

`bench/host.py` holds it to 25 us, on a machine where that part of stock's takes 22. Here it is a
ratio of the two, each the least of many short turns, which a loaded machine hardly changes.
"""

from __future__ import annotations

import json

import pytest
from comfyui import ROOT, run_script

pytestmark = pytest.mark.comfy

MOST = 25 / 22
LITTLE = 0.5  # of those whose kernels need little preparation
PLAIN = ("exact: triton", "exact: triton_w8a16", "exact: eager", "exact: torch_bf16", "fast: int8")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Way -> a row of the results."""
    found = tmp_path_factory.mktemp("host") / "host.json"
    run_script(ROOT / "bench" / "host.py", "--rounds", "100", "--json", found)
    result = json.loads(found.read_text(encoding="utf-8"))
    return {row["way"]: row for row in result["rows"]}


def test_no_way_costs_the_host_much_more_than_stock_needs(rows):
    unit = min(row["stock_us"] for row in rows.values())
    over = {way: row["over_us"] / unit for way, row in rows.items()}
    assert all(ratio <= MOST for ratio in over.values()), over
    assert all(over[way] <= LITTLE for way in PLAIN), over


def test_siblings_cost_less_than_a_layer_by_itself(rows):
    for backend in ("torch_mx", "torch_fp8"):
        alone, shared = (rows[f"fast: {backend}{more}"] for more in ("", ", 3 siblings"))
        assert shared["us"] < alone["us"], (shared, alone)
