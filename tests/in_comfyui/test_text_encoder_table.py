"""The table of text encoders against ComfyUI: asked again, and by what small ones put out."""

from __future__ import annotations

import json

import pytest
from comfyui import ROOT, ask, run_script

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


def test_the_table_is_what_comfyui_says(tmp_path):
    """If it fails, run bench/text_encoders.py and read the difference."""
    script, fresh = ROOT / "bench" / "text_encoders.py", tmp_path / "table.json"
    run_script(script, fresh)
    stored = ROOT / "quant" / "conversion" / "text_encoders.json"
    assert json.loads(fresh.read_text()) == json.loads(stored.read_text())


def test_text_encoders_of_converted_checkpoints_put_out_the_same(tmp_path):
    """Where raw codes were run, they were off by 0.5 to 1.1."""
    results = ask("small_encoders.py", tmp_path)
    for kind in ("cast", "scaled", "marked", "marked in the header"):  # FP8 in a BF16 checkpoint
        assert results.pop(kind) == {"difference": 0.0, "quantized": [0, 13]}
    language = results.pop("qwen3_2b")
    assert language["marked"] and 0.003 < language["difference"] < 0.1  # rounding to E4M3
    plain = {"marked": False, "difference": 0.0}
    encoders = ("clip_l", "t5gemma", "hydit_clip", "mt5xl", "qwen3_06b")
    assert results == dict.fromkeys(encoders, plain)
