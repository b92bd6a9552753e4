"""The example workflows, as the browser would send them, on tiny models in the real ComfyUI."""

from __future__ import annotations

import pytest
from graphs import output_files
from workflows import EXAMPLES, drop_text_encoder, load_example, set_inputs

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.json")))
def test_an_example_runs(comfy, name):
    graph = load_example(name, comfy.get("/object_info"))
    drop_text_encoder(graph)
    set_inputs(graph, "UNETLoader", unet_name="flux.safetensors")
    set_inputs(graph, "MXFP8LoadDiffusionModel", model_name="flux-mxfp8.safetensors")
    set_inputs(graph, "VAELoader", vae_name="vae.safetensors")
    set_inputs(graph, "EmptySD3LatentImage", width=64, height=64)
    outputs = comfy.run(graph)
    saved = [key for key, node in graph.items() if node["class_type"] == "SaveImage"]
    assert saved
    for key in saved:
        (image,) = output_files(outputs, [key], comfy.base, "images")
        assert image.stat().st_size > 0
