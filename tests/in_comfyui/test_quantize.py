"""Quantize a model in the graph, save it, load it again: in the real ComfyUI."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from checkpoints import same
from comfyui import PromptError, make_models
from graphs import SAME, Graph, difference, latents, run, saved_tensor, unload
from safetensors.torch import load_file

from mxfp8 import kernels
from mxfp8.quant.checks.inspect import inspect_file
from mxfp8.quant.checks.verify import verify_file
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.format import read_header
from mxfp8.quant.reports.conversion import Report

pytestmark = pytest.mark.comfy


def quantize(graph: Graph, model: list, **options) -> list:
    options = {"preset": "auto", "precision": "exact", **options}
    return graph.add("MXFP8Quantize", model=model, **options)


def save(graph: Graph, model: list, name: str) -> list:
    return graph.add("MXFP8SaveModel", model=model, filename_prefix=f"diffusion_models/{name}")


@pytest.mark.parametrize("kind", ["flux", "flux2", "wan"])
def test_quantized_saved_and_reloaded_models_sample_alike(comfy, kind):
    graph = Graph()
    quantized = quantize(graph, graph.loader(f"{kind}.safetensors"))
    saving = save(graph, quantized, kind)
    sampled = graph.save_latent(graph.sample(quantized, kind))
    outputs = comfy.run(graph)
    first = latents(outputs, sampled, comfy.base)
    report = Report.from_json(outputs[quantized[0]]["mxfp8_report"][0])
    assert report.quantized
    assert report.sqnr_db > 31

    name = outputs[saving[0]]["text"][0].split(":")[0]
    graph = Graph()
    models = {
        "stock": graph.loader(name),
        "ours": graph.add("MXFP8Load", model_name=name, precision="exact"),
    }
    saved = {n: graph.save_latent(graph.sample(m, kind)) for n, m in models.items()}
    latent = run(comfy, graph, saved)
    assert difference(latent["stock"], first) < SAME
    assert difference(latent["ours"], first) < SAME


def test_the_saved_file_is_the_stock_format_with_everything_else_untouched(comfy):
    graph = Graph()
    saving = save(graph, quantize(graph, graph.loader("flux.safetensors")), "format")
    name = comfy.run(graph)[saving[0]]["text"][0].split(":")[0]
    path = comfy.base / "output" / "diffusion_models" / name
    assert name == "format_00001_.safetensors"

    header = read_header(path)
    assert json.loads(header.metadata["prompt"])["1"]["class_type"] == "UNETLoader"
    assert len(header.layers) == 13
    for layer in header.layers.values():
        assert layer.scale.dtype == "U8"
        assert f"{layer.name}.comfy_quant" in header.tensors
        assert layer.name in json.loads(header.metadata["_quantization_metadata"])["layers"]
    source = comfy.base / "models" / "diffusion_models" / "flux.safetensors"
    result = verify_file(path, source)
    assert result.problems == []
    assert len(result.layers) == 13
    converted = load_file(source.with_name("flux-mxfp8.safetensors"))
    saved = load_file(path)
    for layer in header.layers.values():  # in the graph or file to file: the same bits
        for key in (layer.weight.name, layer.scale.name):
            assert torch.equal(saved[key].view(torch.uint8), converted[key].view(torch.uint8)), key


def test_the_next_save_counts_up(comfy):
    graph = Graph()
    kinds = ("flux", "wan")  # ComfyUI runs equal nodes once
    nodes = [save(graph, graph.loader(f"{kind}-mxfp8.safetensors"), "count") for kind in kinds]
    outputs = comfy.run(graph)
    names = sorted(outputs[n[0]]["text"][0].split(":")[0] for n in nodes)
    assert names == ["count_00001_.safetensors", "count_00002_.safetensors"]


def test_the_input_model_stays_as_it_was(comfy):
    graph = Graph()
    model = graph.add("LoraLoaderModelOnly", model=graph.loader("flux.safetensors"),
                      lora_name="lora.safetensors", strength_model=0.5)  # fmt: skip
    before = graph.save_latent(graph.sample(model, "flux"))
    digest = graph.add("TestDigest", model=model)
    outputs = comfy.run(graph)
    first, checksum = latents(outputs, before, comfy.base), outputs[digest[0]]["result"]

    quantized = quantize(graph, model)
    graph.save_latent(graph.sample(quantized, "flux"))
    comfy.run(graph)
    again = graph.sample(model, "flux")
    graph[again[0]]["inputs"]["steps"] = 3  # so that it runs again
    after = graph.save_latent(again)
    outputs = comfy.run(graph)
    assert outputs[digest[0]]["result"] == checksum

    graph = Graph()
    model = graph.add("LoraLoaderModelOnly", model=graph.loader("flux.safetensors"),
                      lora_name="lora.safetensors", strength_model=0.5)  # fmt: skip
    two = graph.save_latent(graph.sample(model, "flux"))
    three = graph.save_latent(graph.sample(model, "flux", steps=3))
    fresh = comfy.run(graph)
    assert difference(first, latents(fresh, two, comfy.base)) < SAME
    assert difference(
        latents(outputs, after, comfy.base), latents(fresh, three, comfy.base)
    ) < SAME  # fmt: skip


def test_loras_are_baked_in_at_full_precision(comfy):
    graph = Graph()
    model = graph.add("LoraLoaderModelOnly", model=graph.loader("flux.safetensors"),
                      lora_name="lora.safetensors", strength_model=1.0)  # fmt: skip
    sampled = graph.sample(model, "flux", steps=1)  # leaves the LoRA merged into the input
    quantized = quantize(graph, model)
    graph.save_latent(sampled)
    saving = save(graph, quantized, "baked")
    name = comfy.run(graph)[saving[0]]["text"][0].split(":")[0]

    models = comfy.base / "models"
    weights = load_file(models / "diffusion_models" / "flux.safetensors")
    lora = load_file(models / "loras" / "lora.safetensors")
    saved = load_file(comfy.base / "output" / "diffusion_models" / name)
    baked = 0
    for key in weights:
        up = lora.get(f"diffusion_model.{key.removesuffix('.weight')}.lora_up.weight")
        if up is None:
            continue
        down = lora[f"diffusion_model.{key.removesuffix('.weight')}.lora_down.weight"]
        merged = weights[key].float() + up @ down
        value = kernels.dequantize(saved[key], saved[f"{key}_scale"], torch.float32, merged.shape)
        error = (value - merged).norm() / merged.norm()
        assert error < 0.0275, key  # rounding to nearest; stock's stochastic merge has 0.045
        baked += 1
    assert baked == len(lora) // 2 > 0


def test_model_sampling_and_deep_clones_carry_over(comfy):
    graph = Graph()
    bf16 = graph.loader("flux.safetensors")
    shifted = graph.add("ModelSamplingAuraFlow", model=bf16, shift=5.0)
    before = quantize(graph, shifted)
    after = graph.add("ModelSamplingAuraFlow", model=quantize(graph, bf16), shift=5.0)
    models = {
        "plain": quantize(graph, bf16),
        "before": before,
        "after": after,
        "clone": graph.add("TestClone", model=before, how="force_deepcopy"),
        "multigpu": graph.add("TestClone", model=before, how="deepclone_multigpu"),
    }
    saved = {name: graph.save_latent(graph.sample(m, "flux")) for name, m in models.items()}
    latent = run(comfy, graph, saved)
    assert difference(latent["before"], latent["after"]) < SAME
    assert difference(latent["clone"], latent["after"]) < SAME
    assert difference(latent["multigpu"], latent["after"]) < SAME
    assert difference(latent["plain"], latent["after"]) > 1e-3


def test_settings_that_only_metadata_tells_reach_the_quantized_model_and_its_file(comfy):
    graph = Graph()
    model = graph.loader("ltxv.safetensors")
    quantized = quantize(graph, model, include="attn|ff")
    saving = save(graph, quantized, "ltxv")
    nodes = [graph.add("TestConfig", model=m) for m in (model, quantized)]
    outputs = comfy.run(graph)
    wanted, config = (json.loads(outputs[n[0]]["result"][0]) for n in nodes)
    assert wanted["causal_temporal_positioning"] is True
    assert wanted["positional_embedding_max_pos"] == [20, 64, 64]
    wanted.pop("dtype", None), config.pop("dtype", None)
    assert config == wanted

    graph = Graph()
    node = graph.add("TestConfig", model=graph.loader(outputs[saving[0]]["text"][0].split(":")[0]))
    reloaded = json.loads(comfy.run(graph)[node[0]]["result"][0])
    reloaded.pop("dtype", None)
    assert reloaded == wanted


def test_methods_patched_by_other_nodes_are_bound_to_the_quantized_model(comfy):
    graph = Graph()
    model = graph.add("TestPatch", model=graph.loader("flux.safetensors"), kind="method")
    quantized = quantize(graph, model)
    node = graph.add("TestConfig", model=quantized)
    graph.save_latent(graph.sample(quantized, "flux"))
    assert comfy.run(graph)[node[0]]["bound"] == [True]


def test_what_cannot_carry_over_is_refused_or_said(comfy):
    graph = Graph()
    model = graph.add("LoraLoaderBypassModelOnly", model=graph.loader("flux.safetensors"),
                      lora_name="lora.safetensors", strength_model=1.0)  # fmt: skip
    save(graph, quantize(graph, model), "bypass")
    with pytest.raises(PromptError, match="'bypass_lora' on this Flux runs beside its layers"):
        comfy.run(graph)
    graph = Graph()
    model = graph.add("LoraLoaderBypassModelOnly", model=graph.loader("flux-mxfp8.safetensors"),
                      lora_name="lora.safetensors", strength_model=1.0)  # fmt: skip
    save(graph, model, "bypass")
    with pytest.raises(PromptError, match="'bypass_lora' on this Flux runs beside its layers"):
        comfy.run(graph)
    assert not list((comfy.base / "output").rglob("bypass*"))

    graph = Graph()
    model = graph.add("TestPatch", model=graph.loader("flux.safetensors"), kind="module")
    save(graph, quantize(graph, model), "patched")
    with pytest.raises(PromptError, match="'diffusion_model' of this Flux was replaced"):
        comfy.run(graph)

    graph = Graph()
    model = graph.add("TestCompile", model=graph.loader("flux.safetensors"), backend="eager")
    plain = graph.save_latent(
        graph.sample(quantize(graph, graph.loader("flux.safetensors")), "flux")
    )
    saved = {"compiled": graph.save_latent(graph.sample(quantize(graph, model), "flux"))}
    latent = run(comfy, graph, {**saved, "plain": plain})
    assert difference(latent["compiled"], latent["plain"]) < SAME
    assert "torch.compile on the input does not carry over" in comfy.log.read_text(errors="replace")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flux-mxfp8", {}, r"Flux: already quantized as MXFP8 \("),
        ("flux", {"exclude": "."}, "no layer to quantize"),
        ("flux", {"include": "("}, "is not a regular expression"),
    ],
)
def test_what_cannot_be_quantized_is_refused(comfy, name, options, message):
    graph = Graph()
    save(graph, quantize(graph, graph.loader(f"{name}.safetensors"), **options), "refused")
    with pytest.raises(PromptError, match=message):
        comfy.run(graph)
    assert not list((comfy.base / "output" / "diffusion_models").glob("refused*"))


def test_a_model_that_was_cast_to_fp8_on_loading(comfy):
    """The original is loaded: what is wrong is how."""
    graph = Graph()
    model = graph.add("UNETLoader", unet_name="flux.safetensors", weight_dtype="fp8_e4m3fn")
    save(graph, quantize(graph, model), "cast")
    with pytest.raises(PromptError, match="Load the BF16, FP16 or FP32 original with weight_dtype"):
        comfy.run(graph)


def test_the_temporary_file_lives_as_long_as_a_model_uses_it(comfy):
    graph = Graph()
    quantized = quantize(graph, graph.loader("wan.safetensors"), include="never")
    clone = graph.add("TestClone", model=quantized, how="force_deepcopy")
    graph.save_latent(graph.sample(clone, "wan"))
    comfy.run(graph)
    temporary = comfy.base / "temp"
    assert list(temporary.glob("mxfp8-*.safetensors"))

    unload(comfy)  # which waits until they are gone


def test_a_clone_needs_no_file_in_the_temp_folder(comfy):
    """A second ComfyUI on the same folders empties it when it starts."""
    graph = Graph()
    quantized = quantize(graph, graph.loader("flux.safetensors"))
    latent = run(comfy, graph, {"before": graph.save_latent(graph.sample(quantized, "flux"))})
    for how in ("force_deepcopy", "deepclone_multigpu"):
        shutil.rmtree(comfy.base / "temp")
        clone = graph.add("TestClone", model=quantized, how=how)
        latent |= run(comfy, graph, {how: graph.save_latent(graph.sample(clone, "flux"))})
        assert difference(latent[how], latent["before"]) < SAME
    unload(comfy)  # which waits until what was written again is gone


@pytest.mark.parametrize("prefix", ["../outside", "/tmp/outside", "a/../../outside"])
def test_saving_stays_inside_the_output_folder(comfy, prefix):
    graph = Graph()
    graph.add(
        "MXFP8SaveModel", model=graph.loader("flux-mxfp8.safetensors"), filename_prefix=prefix
    )
    with pytest.raises(PromptError, match="outside the output folder"):
        comfy.run(graph)


@pytest.fixture
def whole(comfy):
    """A checkpoint of Stable Diffusion 1 with its text encoder, which stays as it is, and a VAE."""
    make_models(comfy.base, "sd15")
    path = comfy.base / "models" / "checkpoints" / "sd15.safetensors"
    yield path
    path.unlink()


def sampling(graph: Graph, clip: list, **options) -> dict:
    positive, negative = (
        graph.add("CLIPTextEncode", clip=clip, text=text) for text in ("a lighthouse in fog", "")
    )
    return {
        "positive": positive, "negative": negative,
        "latent_image": graph.add("EmptyLatentImage", width=64, height=64, batch_size=1),
        "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
        **options,
    }  # fmt: skip


def draw(graph: Graph, name: str, model: list, clip: list, vae: list) -> None:
    samples = graph.add("KSampler", model=model, seed=1, **sampling(graph, clip))
    image = graph.add("VAEDecode", samples=samples, vae=vae)
    graph.add("TestSaveTensor", tensor=image, name=name)


def test_a_saved_checkpoint_draws_the_same_in_stock(comfy, whole):
    graph = Graph()
    node, _ = graph.add("CheckpointLoaderSimple", ckpt_name=whole.name)
    clip, vae = [node, 1], [node, 2]
    made = quantize(graph, [node, 0])
    draw(graph, "original", [node, 0], clip, vae)
    draw(graph, "before", made, clip, vae)
    compared = graph.add(
        "MXFP8CompareModels", reference=[node, 0], model=made, first_seed=1, seeds=1,
        **sampling(graph, clip, steps=1),
    )  # fmt: skip
    saving = graph.add(
        "MXFP8SaveCheckpoint", model=made, clip=clip, vae=vae, report=[made[0], 1],
        comparison=[compared[0], 3], filename_prefix="checkpoints/whole",
    )  # fmt: skip
    outputs = comfy.run(graph)
    report = Report.from_json(outputs[made[0]]["mxfp8_report"][0])
    path = comfy.base / "output" / "checkpoints" / outputs[saving[0]]["text"][0].split(":")[0]
    loaders = {
        "CheckpointLoaderSimple": {"ckpt_name": path.name},
        "MXFP8LoadCheckpoint": {"checkpoint_name": path.name, "precision": "exact"},
    }
    try:
        check_checkpoint(path, whole, report)
        graph = Graph()
        for loader, options in loaders.items():
            node, _ = graph.add(loader, **options)
            draw(graph, loader, [node, 0], [node, 1], [node, 2])
        comfy.run(graph)
    finally:
        path.unlink()
    before = saved_tensor(comfy.base, "before")
    assert before.std() > 0.1
    assert difference(saved_tensor(comfy.base, "original"), before) > 20 * SAME
    for loader in loaders:
        assert difference(saved_tensor(comfy.base, loader), before) < SAME, loader


def check_checkpoint(path, original, report: Report) -> None:
    """Both markers and U8 scales, the bytes of the converted file, the rest of the checkpoint as it
    was, the report and the comparison."""
    header = read_header(path)
    assert len(header.layers) == len(report.quantized) > 10
    markers = json.loads(header.metadata["_quantization_metadata"])["layers"]
    assert markers.keys() == header.layers.keys()
    assert all(f"{name}.comfy_quant" in header.tensors for name in markers)
    assert {layer.scale.dtype for layer in header.layers.values()} == {"U8"}
    seen = inspect_file(path)
    assert seen.report == report and len(seen.comparison.seeds) == 1
    assert seen.warnings == seen.problems == []
    assert verify_file(path, original).problems == []
    converted = original.with_name("converted.safetensors")
    convert_file(original, converted)
    try:
        saved, expected = load_file(path), load_file(converted)
    finally:
        converted.unlink()
    assert saved.keys() == expected.keys()
    assert [key for key in expected if not same(saved[key], expected[key])] == []
