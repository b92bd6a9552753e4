"""An MXFP8 text encoder of real size in the real ComfyUI, against stock on the same file."""

from __future__ import annotations

import pytest
from conftest import make_models
from graphs import Graph, saved_tensor
from test_comfy_models import difference

from mxfp8.quant.convert import convert_file

pytestmark = pytest.mark.comfy

NAME = "qwen3-mxfp8.safetensors"


@pytest.fixture(scope="module")
def encoder(comfy):
    """Qwen3 0.6B with random weights, converted; the BF16 file is not kept."""
    make_models(comfy.base, "qwen3")
    source = comfy.base / "models" / "text_encoders" / "qwen3.safetensors"
    report = convert_file(source, source.with_name(NAME))
    source.unlink()
    yield report
    source.with_name(NAME).unlink()


def test_a_text_encoder_encodes_what_stock_encodes(comfy, encoder):
    assert len(encoder.quantized) == 28 * 7
    assert {layer.name for layer in encoder.layers} - {
        layer.name for layer in encoder.quantized
    } == {"model.embed_tokens"}

    graph = Graph()
    stock = graph.add("CLIPLoader", clip_name=NAME, type="stable_diffusion")
    models = {
        "stock": stock,
        "ours": graph.add("MXFP8LoadTextEncoder", name=NAME, type="stable_diffusion"),
        "accelerated": graph.add("MXFP8AccelerateTextEncoder", clip=stock),
    }
    for name, clip in models.items():
        encoded = graph.add("CLIPTextEncode", clip=clip, text="a lighthouse in fog")
        graph.add("TestSaveTensor", tensor=encoded, name=f"text {name}")
    comfy.run(graph)

    found = {name: saved_tensor(comfy.base, f"text {name}") for name in models}
    assert found["stock"].shape[-1] == 1024
    assert found["stock"].std() > 0.1
    # 28 layers in float32 with another order of summation
    assert difference(found["ours"], found["stock"]) < 1e-4
    assert difference(found["accelerated"], found["stock"]) < 1e-4


@pytest.mark.parametrize("name", ["../diffusion_models/flux.safetensors", "/etc/passwd", "no.pt"])
def test_a_loader_reaches_only_its_own_folder(comfy, name):
    from comfyui import PromptError

    graph = Graph()
    clip = graph.add("MXFP8LoadTextEncoder", name=name, type="flux")
    graph.add("TestSaveTensor", tensor=clip, name="never")
    with pytest.raises(PromptError, match="not in list"):
        comfy.run(graph)
