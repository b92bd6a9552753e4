"""The figure of LoRAs: its script in small, and its picture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.mark.comfy
def test_beside_the_weight_a_lora_has_its_effect(tmp_path):
    """On a block of MiniLM in the real ComfyUI, beside stock's merge and bypass."""
    found = tmp_path / "lora.json"
    command = [sys.executable, ROOT / "bench" / "lora.py", "--quick", "--check", "--json", found]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    errors = json.loads(found.read_text(encoding="utf-8"))
    assert list(errors) == ["0.005", "0.01", "0.05"]
    for norm, row in errors.items():
        # What float32 rounds in an output, beside an effect of about this norm.
        assert row["ours"] < 2e-6 / float(norm)
        assert row["stock_bypass"] < 2e-6 / float(norm)
        # Rounding to MXFP8 changes a weight by 2.7% of its norm; stock's noise is more.
        assert row["stock_merged"] > 0.01 / float(norm)


def test_the_picture_shows_the_results():
    import lora

    models = json.loads(lora.RESULTS.read_text(encoding="utf-8"))["models"]
    assert lora.PICTURE.read_text(encoding="utf-8") == lora.picture(models)
    assert all(
        lora.holds(found[kind]["float32"]) for found in models.values() for kind in lora.LORAS
    )
