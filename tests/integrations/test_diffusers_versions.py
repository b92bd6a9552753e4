"""The tests of diffusers and transformers with older versions, each in a process of its own."""

from __future__ import annotations

import pytest
from versions import paths, run_tests

# 0.36 is the first that has Z-Image. Its pipelines import httpx, which the newest huggingface_hub
# does not bring. It cannot read a single file of Qwen-Image, quantized or not, nor one of Z-Image
# with a prefix.
VERSIONS = {
    "0.41.0": ({}, "test"),
    "0.36.0": (
        {"httpx": "0.28.1", "httpcore": "1.0.9"},
        "not Qwen and not (dequantized_weights and Z-Image-model)",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("version", VERSIONS)
def test_older_versions_of_diffusers_give_the_same(version):
    packages, selection = VERSIONS[version]
    chosen = {"PYTHONPATH": paths({"diffusers": version, **packages})}
    files = ["integrations/test_diffusers_models.py"]
    outcome = run_tests(files, chosen, "-m", "not slow", "-k", selection)
    assert outcome.failed == 0, outcome.output
    assert outcome.passed >= 22


@pytest.mark.long
def test_the_oldest_transformers_that_is_supported_gives_the_same():
    """In 5.0 T5 keeps a layer in float32 for BF16, too."""
    packages = {
        "transformers": "5.0.0", "huggingface-hub": "1.33.0", "tokenizers": "0.22.2",
        **VERSIONS["0.36.0"][0],
    }  # fmt: skip
    files = ["integrations/test_text_encoders.py"]
    outcome = run_tests(files, {"PYTHONPATH": paths(packages)})
    assert outcome.failed == 0, outcome.output
    assert outcome.passed >= 17
