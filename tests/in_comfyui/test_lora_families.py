"""LoRAs beside the weights of small models of 15 families, by the names that files use for them."""

from __future__ import annotations

import pytest
from comfyui import ask
from graphs import SAME

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


@pytest.fixture(scope="module")
def results():
    return ask("lora_families.py")


def test_loras_compute_what_stock_merges_into_dequantized_weights(results):
    """Two at a time, of all kinds, in every naming."""
    assert len(results) == 15
    for family, result in results.items():
        assert result["without"] < SAME, family
        assert result["stacks"], family
        for stack in result["stacks"]:
            assert stack["effect"] > 0.01, (family, stack)
            assert stack["difference"] < SAME, (family, stack)


def test_slices_and_functions_of_fused_weights_run_beside_them(results):
    """As Diffusers names them; stock merges what is no linear layer, and nothing is left out."""

    def most(family: str, what: str) -> int:
        return max(stack[what] for stack in results[family]["stacks"])

    for family in ("Flux", "Flux.2", "Chroma", "SD 3", "Z-Image"):
        assert most(family, "slices") >= 9, family
    for family in ("Flux", "Flux.2", "SD 3", "AuraFlow"):
        assert most(family, "functions") >= 1, family
    assert most("SDXL", "convolutions") > 20
    merged = {key for r in results.values() for stack in r["stacks"] for key in stack["merged"]}
    assert all(key.endswith("ff_i.gate.weight") for key in merged)  # a matrix without a linear
    assert not any(stack["problems"] for r in results.values() for stack in r["stacks"])


def test_text_encoders_run_them_too(tmp_path):
    """Loaded in each way, two LoRAs on a Qwen3 of one layer."""
    results = ask("lora_encoders.py", tmp_path)
    assert results["effect"] > 0.01
    assert len(results["difference"]) == 5
    assert max(results["difference"].values()) < SAME
