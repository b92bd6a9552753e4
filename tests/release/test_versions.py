"""The main job in other versions of ComfyUI and comfy-kitchen than the pinned ones."""

from __future__ import annotations

import pytest
from comfyui import releases
from versions import SHORT, combinations, ends, is_supported, oldest_supported, run


def test_the_oldest_supported_comfyui_is_one_that_is_run():
    assert ends()[1].release.version == oldest_supported()
    # Without a Flux to sample, a run is no evidence.
    assert not any("unpooled" in r.lacks for r in filter(is_supported, releases()))


@pytest.mark.comfy
@pytest.mark.parametrize("combination", ends(), ids=str)
def test_the_ends_of_what_is_supported(combination):
    outcome = run(combination, SHORT)
    assert outcome.failed == outcome.skipped == 0, outcome.output
    assert outcome.passed > 10


@pytest.mark.comfy
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "combination", [c for c in combinations() if is_supported(c.release)], ids=str
)
def test_every_supported_version_that_can_be_had(combination):
    outcome = run(combination)
    assert outcome.failed == outcome.skipped == 0, outcome.output
    assert outcome.passed > 15
