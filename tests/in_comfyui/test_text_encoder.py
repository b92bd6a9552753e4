"""An MXFP8 text encoder of real size in the real ComfyUI, against stock on the same file."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import load as load_file
from checkpoints import same
from comfyui import PromptError, make_models
from graphs import SAME, Graph, difference, load_ours, quantized, run, saved_tensor
from safetensors.torch import save_file

from mxfp8 import kernels
from mxfp8.quant.checks.inspect import inspect_file
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.reports.conversion import Report

pytestmark = pytest.mark.comfy

SOURCE = "qwen3.safetensors"
NAME = "qwen3-mxfp8.safetensors"


@pytest.fixture(scope="module")
def encoder(comfy):
    """Qwen3 0.6B with random weights, converted; the BF16 file is kept."""
    make_models(comfy.base, "qwen3")
    source = comfy.base / "models" / "text_encoders" / SOURCE
    yield convert_file(source, source.with_name(NAME))
    source.unlink()
    source.with_name(NAME).unlink()


def test_a_text_encoder_encodes_what_stock_encodes(comfy, encoder):
    assert len(encoder.quantized) == 28 * 7
    assert {layer.name for layer in encoder.layers} - {
        layer.name for layer in encoder.quantized
    } == {"model.embed_tokens"}

    graph = Graph()
    stock = graph.add("CLIPLoader", clip_name=NAME, type="stable_diffusion")
    accelerated = graph.add("MXFP8AccelerateTextEncoder", clip=stock)
    clips = {"stock": stock, "ours": load(graph), "accelerated": accelerated}
    embedding = encoded(comfy, graph, clips)
    assert embedding["stock"].shape[-1] == 1024
    assert embedding["stock"].std() > 0.1
    # 28 layers in float32 with another order of summation
    assert difference(embedding["ours"], embedding["stock"]) < 1e-4
    assert difference(embedding["accelerated"], embedding["stock"]) < 1e-4


def load(graph: Graph) -> list:
    return graph.add("MXFP8LoadTextEncoder", name=NAME, type="stable_diffusion")


def encoded(comfy, graph: Graph, clips: dict[str, list]) -> dict:
    """What each CLIP makes of the same words."""
    for name, clip in clips.items():
        words = graph.add("CLIPTextEncode", clip=clip, text="a lighthouse in fog")
        graph.add("TestSaveTensor", tensor=words, name=f"text {name}")
    comfy.run(graph)
    return {name: saved_tensor(comfy.base, f"text {name}") for name in clips}


def test_a_text_encoder_has_a_backend_report(comfy, encoder):
    graph = Graph()
    node = graph.add("MXFP8BackendReport", clip=load(graph), measure=False, rows=77)
    report = json.loads(comfy.run(graph)[node[0]]["mxfp8_report"][0])
    ours = [layer for layer in report["layers"] if layer["decision"] == "mxfp8"]
    assert len(ours) == 28 * 7
    assert {(layer["backend"], layer["precision"]) for layer in ours} == {("torch_bf16", "exact")}


def test_nobody_chose_that_it_runs_exact(comfy, encoder):
    """Said where the backend is not the slowest, of which the reason would be what it lacks."""
    graph = Graph()
    model = load_ours(graph, "flux")
    forced, free = (graph.add("TestBackend", model=model, name=n) for n in ("reference", ""))
    nodes = {
        "reference: exact was chosen": graph.add(
            "MXFP8BackendReport", model=forced, measure=False, rows=77
        ),
        "reference: text encoders run exact, as in ComfyUI": graph.add(
            "MXFP8BackendReport", clip=load(graph), measure=False, rows=77
        ),
    }
    comfy.run(graph, only=[forced[0]])
    try:
        outputs = comfy.run(graph, only=[node[0] for node in nodes.values()])
    finally:
        comfy.run(graph, only=[free[0]])
    for reason, node in nodes.items():
        layers = json.loads(outputs[node[0]]["mxfp8_report"][0])["layers"]
        assert {x["reason"] for x in layers if x["decision"] == "mxfp8"} == {reason}


def test_a_text_encoder_quantized_and_saved_in_the_graph_is_the_converted_file(comfy, encoder):
    graph = Graph()
    clip = graph.add("CLIPLoader", clip_name=SOURCE, type="stable_diffusion")
    made = graph.add("MXFP8QuantizeTextEncoder", clip=clip, preset="auto")
    saving = graph.add(
        "MXFP8SaveTextEncoder", clip=made, filename_prefix="clip/qwen3", report=[made[0], 1]
    )
    outputs = comfy.run(graph)
    report = Report.from_json(outputs[made[0]]["mxfp8_report"][0])
    assert len(report.quantized) == len(encoder.quantized)
    name = outputs[saving[0]]["text"][0].split(":")[0]
    path = comfy.base / "output" / "clip" / name
    assert (
        name
        in comfy.get("/object_info/CLIPLoader")["CLIPLoader"]["input"]["required"]["clip_name"][0]
    )
    try:
        saved, metadata = load_file(path)
        assert Report.from_json(metadata["mxfp8_report"]) == report
        assert inspect_file(path, every_byte=False).report == report
        converted, _ = load_file(comfy.base / "models" / "text_encoders" / NAME)
        assert saved.keys() == converted.keys()
        assert all(same(saved[key], converted[key]) for key in saved)
    finally:
        path.unlink()


def test_a_report_of_another_text_encoder_is_refused_with_the_file(comfy, encoder):
    graph = Graph()
    model = quantized(graph, graph.loader("flux.safetensors"))
    graph.add(
        "MXFP8SaveTextEncoder", clip=load(graph), filename_prefix="clip/never", report=[model[0], 1]
    )
    with pytest.raises(PromptError, match="the report is another model's: MXFP8 layer"):
        comfy.run(graph)
    assert not list((comfy.base / "output").rglob("never*"))


def test_text_encoders_merge(comfy, encoder):
    """With itself, so that the sum is the stored weight. Requantizing finds the same codes, but
    for ComfyUI before 0.24."""
    graph = Graph()
    clip = load(graph)
    merged = graph.add("CLIPMergeSimple", clip1=clip, clip2=load(graph), ratio=0.5)
    embedding = encoded(comfy, graph, {"one": clip, "merged": merged})
    assert difference(embedding["merged"], embedding["one"]) < 0.02


@pytest.fixture
def partly_plain(comfy, encoder):
    """The encoder with the layer that has the LoRA in float32, for stock to merge it into."""
    folder = comfy.base / "models" / "text_encoders"
    layer = "model.layers.3.mlp.down_proj"
    state, metadata = load_file(folder / NAME)
    markers = json.loads(metadata["_quantization_metadata"])
    del markers["layers"][layer], state[f"{layer}.comfy_quant"]
    weight, scale = f"{layer}.weight", state.pop(f"{layer}.weight_scale")
    state[weight] = kernels.dequantize(state[weight], scale, torch.float32)
    path = folder / "partly-plain.safetensors"
    save_file(state, path, {"_quantization_metadata": json.dumps(markers)})
    yield path.name
    path.unlink()


def test_a_lora_on_a_text_encoder_runs_beside_its_weight_and_as_a_hook(
    comfy, encoder, partly_plain
):
    layer = "qwen3_06b.transformer.model.layers.3.mlp.down_proj"
    generator = torch.Generator().manual_seed(5)
    lora = {
        f"text_encoders.{layer}.lora_{side}.weight": torch.randn(shape, generator=generator) * 0.05
        for side, shape in (("up", (1024, 4)), ("down", (4, 3072)))
    }
    save_file(lora, comfy.base / "models" / "loras" / "text.safetensors")
    graph = Graph()
    stock = graph.add("CLIPLoader", clip_name=partly_plain, type="stable_diffusion")
    clip = load(graph)
    options = {"lora_name": "text.safetensors", "strength_clip": 1.0}
    hooks = graph.add("CreateHookLora", strength_model=0.0, **options)
    flux = graph.loader("flux.safetensors")

    def with_lora(clip: list) -> list:
        node = graph.add("LoraLoader", model=flux, clip=clip, strength_model=0.0, **options)
        return [node[0], 1]

    embedding = encoded(comfy, graph, {
        "plain": clip,
        "stock": with_lora(stock),
        "beside": with_lora(clip),
        "hook": graph.add(
            "SetClipHooks", clip=clip, hooks=hooks, apply_to_conds=True, schedule_clip=False
        ),
        "after": load(graph),
    })  # fmt: skip
    assert difference(embedding["beside"], embedding["plain"]) > 1e-3
    # Stock rounds the sum of weight and LoRA to BF16.
    assert difference(embedding["beside"], embedding["stock"]) < 1e-3
    assert difference(embedding["hook"], embedding["beside"]) < SAME
    assert difference(embedding["after"], embedding["plain"]) < 1e-4

    node = graph.add("MXFP8BackendReport", clip=with_lora(clip), measure=False, rows=77)
    report = json.loads(comfy.run(graph, only=[node[0]])[node[0]]["mxfp8_report"][0])
    (use,) = report["adapters"]
    assert (use["hit"], use["applied"]) == (1, {"beside the weight: low rank": 1})


def test_what_comfyui_saves_as_a_checkpoint_is_whole(comfy, encoder):
    """A diffusion model, a text encoder and a VAE by stock's node; the model loads again."""
    graph = Graph()
    model = load_ours(graph, "flux")
    saved = {"before": graph.save_latent(graph.sample(model, "flux"))}
    vae = graph.add("VAELoader", vae_name="vae.safetensors")
    graph.add("CheckpointSave", model=model, clip=load(graph), vae=vae, filename_prefix="whole")
    latent = run(comfy, graph, saved)

    path = comfy.base / "models" / "checkpoints" / "whole.safetensors"
    (comfy.base / "output" / "whole_00001_.safetensors").rename(path)
    try:
        seen = inspect_file(path)
        assert not seen.problems
        assert seen.formats == {"mxfp8": 13 + 28 * 7}
        graph = Graph()
        again = graph.add("MXFP8LoadCheckpoint", checkpoint_name=path.name, precision="exact")
        saved = {"again": graph.save_latent(graph.sample(again, "flux"))}
        latent |= run(comfy, graph, saved)
    finally:
        path.unlink()
    assert difference(latent["again"], latent["before"]) < SAME


@pytest.mark.parametrize("name", ["../diffusion_models/flux.safetensors", "/etc/passwd", "no.pt"])
def test_a_loader_reaches_only_its_own_folder(comfy, name):
    graph = Graph()
    clip = graph.add("MXFP8LoadTextEncoder", name=name, type="flux")
    graph.add("TestSaveTensor", tensor=clip, name="never")
    with pytest.raises(PromptError, match="not in list"):
        comfy.run(graph)
