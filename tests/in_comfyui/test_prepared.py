"""Weights in a backend's form, in the real ComfyUI."""

from __future__ import annotations

import pytest
from comfyui import ask

pytestmark = pytest.mark.comfy


def test_a_prepared_weight_is_the_stored_one_for_everyone_else():
    results = ask("prepared_weights.py")
    assert len(results) > 25
    assert all(results.values()), results
