"""The table of text encoders against ComfyUI, asked again."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from comfyui import ROOT

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


def test_the_table_is_what_comfyui_says(tmp_path):
    """If it fails, run bench/text_encoders.py and read the difference."""
    script, fresh = ROOT / "bench" / "text_encoders.py", tmp_path / "table.json"
    subprocess.run([sys.executable, script, fresh], check=True)
    stored = ROOT / "quant" / "conversion" / "text_encoders.json"
    assert json.loads(fresh.read_text()) == json.loads(stored.read_text())
