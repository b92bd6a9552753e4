"""MXFP8Recommend in the real ComfyUI."""

from __future__ import annotations

import json

import pytest
from graphs import Graph

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("model", ["none", "diffusion_models/flux.safetensors"])
def test_a_format_is_recommended(comfy, model):
    graph = Graph()
    node = graph.add("MXFP8Recommend", model=model)
    (text,) = comfy.run(graph)[node[0]]["text"]
    assert text.startswith("CPU\ntorch ")
    assert "INT8 with ConvRot: bits 8; error 0.62%" in text
    assert ("flux.safetensors (Flux.1)" in text) == (model != "none")


def test_it_goes_on_as_json(comfy):
    graph = Graph()
    node = graph.add("MXFP8Recommend", model="diffusion_models/flux-mxfp8.safetensors")
    shown = graph.add("PreviewAny", source=[node[0], 1])
    (text,) = comfy.run(graph)[shown[0]]["text"]
    found = json.loads(text)
    sizes = {choice["name"]: choice["bytes"] for choice in found["choices"]}
    assert (found["mxfp8_recommendation"], found["architecture"]) == (1, "Flux.1")
    assert sizes["NVFP4"] < sizes["MXFP8"] < sizes["BF16"]
