"""The server is the ComfyUI that was meant, with the comfy-kitchen and torch that were meant."""

from __future__ import annotations

import importlib.metadata
import os
import re

import pytest
from comfyui import comfyui_path
from versions import VERSIONS

pytestmark = pytest.mark.comfy


def test_the_server_runs_the_versions_that_were_meant(comfy):
    """Also in every run that tests/release/test_versions.py starts."""
    meant = os.environ.get(VERSIONS)
    if meant is None:
        text = (comfyui_path() / "comfyui_version.py").read_text(encoding="utf-8")
        comfyui = re.search(r'__version__ = "(.+)"', text)[1]
        packages = map(importlib.metadata.version, ("comfy-kitchen", "torch"))
        meant = " ".join([comfyui, *packages])
    log = comfy.log.read_text(errors="replace")
    (kitchen,) = set(re.findall(r"comfy-kitchen version: (\S+)", log))
    system = comfy.get("/system_stats")["system"]
    torch = system["pytorch_version"].partition("+")[0]
    assert f"{system['comfyui_version']} {kitchen} {torch}" == meant
