"""The server is the ComfyUI that was meant, with the comfy-kitchen and torch that were meant."""

from __future__ import annotations

import importlib.metadata
import os
import re

import pytest
from comfyui import comfyui_path
from versions import VERSIONS

from mxfp8.quant.sources.formats import FORMATS

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


def test_the_table_of_formats_has_those_of_this_comfyui():
    """Each of its `QUANT_ALGOS` has a row, and a row's first version holds."""

    def number(version: str) -> tuple[int, ...]:
        return tuple(map(int, version.split(".")))

    text = (comfyui_path() / "comfy" / "quant_ops.py").read_text(encoding="utf-8")
    found = re.findall(r'\["(\w+)"\] = \{|^    "(\w+)": \{$', text, re.MULTILINE)
    keys = {name for pair in found for name in pair if name}
    text = (comfyui_path() / "comfyui_version.py").read_text(encoding="utf-8")
    version = number(re.search(r'__version__ = "(.+)"', text)[1])
    rows = [row for row in FORMATS if row.marker and row.comfyui]
    assert keys >= {"float8_e4m3fn", "mxfp8"}
    assert keys == {row.marker for row in rows if number(row.comfyui) <= version}
