"""Fast layers in the real ComfyUI, by plain torch on a CPU that the pack takes for a newer card.

What is tested does not depend on the card: which layers are fast, prepared weights that are kept,
dropped and prepared again, inputs shared by siblings, LoRAs, clones, torch.compile.
"""

from __future__ import annotations

import json

import pytest
from graphs import SAME, Graph, difference, fp8_card, latents, with_lora

pytestmark = pytest.mark.comfy

PREPARED = {"flux": 10, "wan": 10}  # layers that are given more than one row


@pytest.fixture(autouse=True)
def off_again(comfy):
    yield
    graph = Graph()
    model = graph.loader("flux.safetensors")
    fp8_card(graph, model, on=False)
    comfy.run(graph)


def fast(graph: Graph, kind: str, lora: bool = False, **options) -> list:
    options = {"keep": True, **options}
    model = fp8_card(graph, graph.loader(f"{kind}-mxfp8.safetensors"), **options)
    model = graph.add("MXFP8Accelerate", model=model, precision="auto")
    return with_lora(graph, model) if lora else model


def sampled(comfy, kind: str, after=lambda graph, model: model, **options):
    """(latent, number of prepared weights that are kept) of a fast model."""
    graph = Graph()
    model = after(graph, fast(graph, kind, **options))
    samples = graph.sample(model, kind)
    saved = graph.save_latent(samples)
    kept = graph.add("TestReuse", model=model, samples=samples)
    outputs = comfy.run(graph)
    return latents(outputs, saved, comfy.base), outputs[kept[0]]["result"][0]


@pytest.fixture(scope="module")
def exact(comfy):
    latent = {}
    for kind in PREPARED:
        graph = Graph()
        saved = graph.save_latent(graph.sample(graph.loader(f"{kind}-mxfp8.safetensors"), kind))
        latent[kind] = latents(comfy.run(graph), saved, comfy.base)
    return latent


@pytest.mark.parametrize("kind", PREPARED)
def test_fast_is_close_to_exact_and_the_same_whether_prepared_weights_are_kept(comfy, exact, kind):
    prepared_each_time, none = sampled(comfy, kind, keep=False)
    kept, count = sampled(comfy, kind)
    assert none == 0
    assert count == PREPARED[kind]
    assert difference(kept, prepared_each_time) == 0
    assert 1e-4 < difference(kept, exact[kind]) < 0.1


def test_a_lora_leaves_prepared_weights_alone(comfy):
    plain, _ = sampled(comfy, "flux")
    beside, count = sampled(comfy, "flux", lora=True)
    again, _ = sampled(comfy, "flux")
    wanted, _ = sampled(comfy, "flux", lora=True, keep=False)
    assert count == PREPARED["flux"]
    assert difference(beside, wanted) == 0
    assert difference(beside, plain) > 1e-3
    assert difference(again, plain) == 0


def test_unloading_drops_prepared_weights_and_loading_makes_them_again(comfy):
    graph = Graph()
    model = fast(graph, "flux")
    first = graph.sample(model, "flux")
    unloaded = graph.add("TestUnload", samples=first)
    kept = graph.add("TestReuse", model=model, samples=unloaded)
    second = graph.sample(model, "flux")
    graph[second[0]]["inputs"]["latent_image"] = graph.add(
        "TestEmptyAfter", samples=unloaded, like=graph[first[0]]["inputs"]["latent_image"]
    )
    again = graph.add("TestReuse", model=model, samples=second)
    saved = [graph.save_latent(samples) for samples in (first, second)]
    outputs = comfy.run(graph)
    assert outputs[kept[0]]["result"][0] == 0
    assert outputs[again[0]]["result"][0] == PREPARED["flux"]
    assert difference(*(latents(outputs, node, comfy.base) for node in saved)) == 0


def test_prepared_weights_outlast_a_run(comfy):
    graph = Graph()
    model = fast(graph, "flux")
    first, second = graph.sample(model, "flux"), graph.sample(model, "flux")
    graph[second[0]]["inputs"]["latent_image"] = graph.add(
        "TestEmptyAfter", samples=first, like=graph[first[0]]["inputs"]["latent_image"]
    )
    counted = graph.add("TestReuse", model=model, samples=second)
    kept, prepared, _ = comfy.run(graph)[counted[0]]["result"]
    assert kept == prepared >= 10


def test_prepared_weights_go_when_stock_takes_the_model_over(comfy):
    graph = Graph()
    stock = fp8_card(graph, graph.loader("flux-mxfp8.safetensors"), keep=True)
    model = graph.add("MXFP8Accelerate", model=stock, precision="auto")
    first = graph.sample(model, "flux")
    second = graph.sample(stock, "flux")
    graph[second[0]]["inputs"]["latent_image"] = graph.add(
        "TestEmptyAfter", samples=first, like=graph[first[0]]["inputs"]["latent_image"]
    )
    kept = graph.add("TestReuse", model=model, samples=second)
    left, prepared, _ = comfy.run(graph)[kept[0]]["result"]
    assert prepared >= 10
    assert left == 0


@pytest.mark.parametrize("lora", [False, True])
def test_prepared_weights_go_with_their_patcher_and_are_not_kept_where_a_lora_is_merged_unseen(
    comfy, lora
):
    """Under dynamic VRAM stock merges a LoRA into what a layer is given, not into its weight."""
    graph = Graph()
    model = fp8_card(graph, graph.loader("flux-mxfp8.safetensors"), keep=True)
    if lora:
        model = with_lora(graph, model)
    node = graph.add("TestKeeping", model=model)
    kept = json.loads(comfy.run(graph)[node[0]]["result"][0])
    assert kept["static"] == 13
    assert kept["dynamic"] == (0 if lora else 13)
    assert kept["static, gone"] == kept["dynamic, gone"] == 0


@pytest.mark.parametrize("how", ["force_deepcopy", "compiled", "low VRAM"])
def test_other_states_of_a_model_compute_the_same(comfy, how):
    def change(graph, model):
        if how == "force_deepcopy":
            return graph.add("TestClone", model=model, how=how)
        if how == "compiled":
            return graph.add("TestCompile", model=model, backend="aot_eager")
        return graph.add("TestLowVRAM", model=model)

    wanted, _ = sampled(comfy, "flux", keep=False)
    latent, _ = sampled(comfy, "flux", change)
    assert difference(latent, wanted) < SAME


def test_layers_that_row_wise_scaling_would_change_too_much_run_exact(comfy, exact):
    latent, kept = sampled(comfy, "flux", most_change=-1.0)
    assert kept == 0
    assert difference(latent, exact["flux"]) < SAME
    log = comfy.log.read_text(errors="replace")
    assert "layers run exact: one scale per row, which FP8 tensor cores need" in log


def test_siblings_quantize_their_input_once(comfy):
    """Of one Wan block: q, k and v share an input, and so do k and v of what it attends to."""
    graph = Graph()
    model = fast(graph, "wan", keep=False)
    samples = graph.sample(model, "wan", steps=2)
    counted = graph.add("TestReuse", model=model, samples=samples)
    kept, prepared, quantized = comfy.run(graph)[counted[0]]["result"]
    assert kept == 0
    assert prepared - quantized == 2 * 3
    assert quantized == 2 * (PREPARED["wan"] - 3)
