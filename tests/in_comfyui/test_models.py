"""MXFP8 models in the real ComfyUI: each way of loading one against stock's on the same file."""

from __future__ import annotations

import json

import pytest
from comfyui import KINDS
from graphs import SAME, Graph, difference, int8_cpu, latents, load_ours, run, saved_tensor

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_loading_samples_what_stock_samples(comfy, kind):
    graph = Graph()
    stock = graph.loader(f"{kind}-mxfp8.safetensors")
    models = {
        "bf16": graph.loader(f"{kind}.safetensors"),
        "stock": stock,
        "loaded exact": load_ours(graph, kind, "exact"),
        "loaded auto": load_ours(graph, kind, "auto"),
        "loaded fast": load_ours(graph, kind, "fast"),
        "accelerated": graph.add("MXFP8Accelerate", model=stock, precision="exact"),
    }
    saved = {name: graph.save_latent(graph.sample(m, kind)) for name, m in models.items()}
    latent = run(comfy, graph, saved)

    for name in models:
        if name.startswith(("loaded", "accelerated")):
            # By INT8 on CPUs that multiply it, on inputs of more than 64 rows.
            same = 0.03 if name == "loaded fast" else SAME
            assert difference(latent[name], latent["stock"]) < same, name
    # E4M3 keeps 4 significant bits: a rounding of at most 2**-4 per weight, 3% on average.
    assert 1e-4 < difference(latent["stock"], latent["bf16"]) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_agrees_with_stock_within_one_rounding(comfy, kind):
    graph = Graph()
    node = graph.add("TestLayers", model=load_ours(graph, kind))
    layers = json.loads(comfy.run(graph)[node[0]]["result"][0])

    assert len(layers) >= 20
    for name, dtype, forward, bound, roundings in layers:
        assert forward == "_forward_exact", name
        assert bound, f"{name} runs the forward of another module"
        assert roundings <= 1, f"{name} in {dtype} is {roundings} roundings off"


def test_fast_without_hardware_says_so_once(comfy):
    graph = Graph()
    int8_cpu(graph, graph.loader("flux.safetensors"), on=False)
    comfy.run(graph)
    before = warnings(comfy)
    graph = Graph()
    for kind in KINDS:
        graph.save_latent(graph.sample(load_ours(graph, kind, "fast"), kind, steps=1))
    comfy.run(graph)
    assert warnings(comfy) == before + 1


def warnings(comfy) -> int:
    return comfy.log.read_text(errors="replace").count("running exact instead of fast")


def test_a_checkpoint_gives_model_and_vae(comfy):
    graph = Graph()
    name = "checkpoint-mxfp8.safetensors"
    stock = graph.add("CheckpointLoaderSimple", ckpt_name=name)
    ours = graph.add("MXFP8LoadCheckpoint", checkpoint_name=name, precision="exact")
    saved = {}
    for which, loaded in (("stock", stock), ("ours", ours)):
        samples = graph.sample(loaded, "flux")
        saved[which] = graph.save_latent(samples)
        pixels = graph.add("VAEDecode", samples=samples, vae=[loaded[0], 2])
        graph.add("TestSaveTensor", tensor=pixels, name=which)
    latent = run(comfy, graph, saved)
    assert difference(latent["ours"], latent["stock"]) < SAME
    images = [saved_tensor(comfy.base, which) for which in ("ours", "stock")]
    assert difference(*images) < SAME


def test_a_bf16_model_loads_as_stock_loads_it_with_a_notice(comfy):
    graph = Graph()
    ours = graph.add("MXFP8Load", model_name="flux.safetensors", precision="auto")
    stock = graph.loader("flux.safetensors")
    saved = {n: graph.save_latent(graph.sample(m, "flux")) for n, m in
             (("ours", ours), ("stock", stock))}  # fmt: skip
    latent = run(comfy, graph, saved)
    assert difference(latent["ours"], latent["stock"]) == 0
    assert "no layer of this Flux is MXFP8" in comfy.log.read_text(errors="replace")


def with_lora(graph: Graph, model: list, loader: str, then: str | None) -> list:
    """A model with a LoRA from a stock loader, then in the state that a test is about."""
    model = graph.add(loader, model=model, lora_name="lora.safetensors", strength_model=1.0)
    if then == "low VRAM":
        return graph.add("TestLowVRAM", model=model)
    if then is not None:
        return graph.add("TestClone", model=model, how=then)
    return model


@pytest.mark.parametrize("then", [None, "low VRAM", "force_deepcopy", "deepclone_multigpu"])
@pytest.mark.parametrize("loader", ["LoraLoaderModelOnly", "LoraLoaderBypassModelOnly"])
def test_loras_do_what_they_do_in_stock_on_the_dequantized_weights(comfy, loader, then):
    graph = Graph()
    models = {
        "plain": graph.loader("flux-mxfp8.safetensors"),
        "stock": with_lora(graph, graph.loader("flux-plain.safetensors"), loader, None),
        "ours": with_lora(graph, load_ours(graph, "flux"), loader, then),
    }
    saved = {name: graph.save_latent(graph.sample(m, "flux")) for name, m in models.items()}
    latent = run(comfy, graph, saved)
    if "Bypass" in loader and then in ("force_deepcopy", "deepclone_multigpu"):
        # ComfyUI 0.30 leaves bypass LoRAs on the model that was cloned.
        assert difference(latent["ours"], latent["plain"]) < SAME
        return
    assert difference(latent["ours"], latent["stock"]) < SAME
    assert difference(latent["ours"], latent["plain"]) > 1e-3


def test_a_deep_clone_runs_its_own_weights(comfy):
    """The original carries a merged LoRA while its clone, which has none, runs."""
    graph = Graph()
    ours = load_ours(graph, "flux")
    clone = graph.add("TestClone", model=ours, how="force_deepcopy")
    merged = with_lora(graph, ours, "LoraLoaderModelOnly", None)
    first = graph.sample(merged, "flux")
    saved = {
        "merged": graph.save_latent(first),
        "clone": graph.save_latent(graph.sample(clone, "flux")),
        "plain": graph.save_latent(graph.sample(graph.loader("flux-mxfp8.safetensors"), "flux")),
    }
    latent = run(comfy, graph, saved)
    assert difference(latent["merged"], latent["plain"]) > 1e-3
    assert difference(latent["clone"], latent["plain"]) < SAME


def test_unloading_and_reloading_changes_nothing(comfy):
    graph = Graph()
    model = with_lora(graph, load_ours(graph, "flux"), "LoraLoaderModelOnly", None)
    first = graph.sample(model, "flux")
    unloaded = graph.add("TestUnload", samples=first)
    again = graph.sample(model, "flux")
    graph[again[0]]["inputs"]["latent_image"] = graph.add(
        "TestEmptyAfter", samples=unloaded, like=graph[first[0]]["inputs"]["latent_image"]
    )
    saved = {"first": graph.save_latent(first), "again": graph.save_latent(again)}
    latent = run(comfy, graph, saved)
    assert difference(latent["again"], latent["first"]) == 0


def test_torch_compile_breaks_the_graph_no_more_than_stock(comfy):
    """With a LoRA no more than without."""
    counts = {}
    for name in ("stock", "ours", "with a LoRA"):
        graph = Graph()
        model = graph.loader("flux-mxfp8.safetensors") if name == "stock" else load_ours(
            graph, "flux"
        )  # fmt: skip
        if name == "with a LoRA":
            model = with_lora(graph, model, "LoraLoaderModelOnly", None)
        plain = graph.save_latent(graph.sample(model, "flux"))
        compiled = graph.sample(graph.add("TestCompile", model=model, backend="aot_eager"), "flux")
        saved = {"plain": plain, "compiled": graph.save_latent(compiled)}
        breaks = graph.add("TestGraphBreaks", samples=compiled)
        outputs = comfy.run(graph)
        latent = {n: latents(outputs, node, comfy.base) for n, node in saved.items()}
        assert difference(latent["compiled"], latent["plain"]) < SAME
        counts[name] = json.loads(outputs[breaks[0]]["result"][0])
    assert counts["ours"]["frames"] > 0
    assert counts["ours"]["breaks"] <= counts["stock"]["breaks"]
    assert counts["with a LoRA"]["breaks"] <= counts["ours"]["breaks"]
