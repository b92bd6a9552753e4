"""The example workflows, as the browser would send them, with tiny models in the real ComfyUI."""

from __future__ import annotations

import pytest
from graphs import output_files
from workflows import EXAMPLES, find, load_example, use_tiny_models

from mxfp8.quant.format import read_header

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.json")))
def test_an_example_runs(comfy, name):
    graph = load_example(name, comfy.get("/object_info"))
    use_tiny_models(graph)
    outputs = comfy.run(graph)
    saved = [key for key, node in graph.items() if node["class_type"] == "SaveImage"]
    assert saved
    for key in saved:
        (image,) = output_files(outputs, [key], comfy.base, "images")
        assert image.stat().st_size > 0
    for key in find(graph, "MXFP8CompareModels"):
        assert "latent SNR" in outputs[key]["text"][0]
    for key in find(graph, "MXFP8SaveModel"):
        named = outputs[key]["text"][0].partition(":")[0]
        metadata = read_header(comfy.base / "output" / "diffusion_models" / named).metadata
        assert ("mxfp8_comparison" in metadata) == bool(find(graph, "MXFP8CompareModels"))
