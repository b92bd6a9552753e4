"""The main job in other versions of ComfyUI and comfy-kitchen than the pinned ones."""

from __future__ import annotations

import importlib.metadata
import os
import re

import pytest
from comfyui import comfyui_path, releases
from versions import SHORT, VERSIONS, combinations, ends, is_supported, oldest_supported, run

pytestmark = pytest.mark.comfy


def test_the_server_runs_the_versions_that_were_meant(comfy):
    """Also the first test of every run that the ones below start."""
    meant = os.environ.get(VERSIONS)
    if meant is None:
        text = (comfyui_path() / "comfyui_version.py").read_text(encoding="utf-8")
        comfyui = re.search(r'__version__ = "(.+)"', text)[1]
        meant = f"{comfyui} {importlib.metadata.version('comfy-kitchen')}"
    log = comfy.log.read_text(errors="replace")
    (kitchen,) = set(re.findall(r"comfy-kitchen version: (\S+)", log))
    assert f"{comfy.get('/system_stats')['system']['comfyui_version']} {kitchen}" == meant


def test_the_oldest_supported_comfyui_is_one_that_is_run():
    assert ends()[1].release.version == oldest_supported()
    # Without a Flux to sample, a run is no evidence.
    assert not any("unpooled" in r.lacks for r in filter(is_supported, releases()))


@pytest.mark.parametrize("combination", ends(), ids=str)
def test_the_ends_of_what_is_supported(combination):
    outcome = run(combination, SHORT)
    assert outcome.failed == outcome.skipped == 0, outcome.output
    assert outcome.passed > 10


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "combination", [c for c in combinations() if is_supported(c.release)], ids=str
)
def test_every_supported_version_that_can_be_had(combination):
    outcome = run(combination)
    assert outcome.failed == outcome.skipped == 0, outcome.output
    assert outcome.passed > 15
