"""Fast layers in the real ComfyUI, by the INT8 of the CPU, where one row counts as few.

What a model holds while it is loaded, patched and unloaded: `test_prepared`. Here it is sampled.
"""

from __future__ import annotations

import pytest
from graphs import SAME, Graph, after, difference, int8_cpu, latents, with_lora

pytestmark = pytest.mark.comfy

PREPARED = {"flux": 10, "wan": 10}  # layers that are given more than one row
# Off exact by these, of what two steps compute. FP8 would be off by three times as much.
BY_INT8 = 1e-4, 0.03


@pytest.fixture(autouse=True)
def off_again(comfy):
    yield
    graph = Graph()
    int8_cpu(graph, graph.loader("flux.safetensors"), on=False)
    comfy.run(graph)


def fast(graph: Graph, kind: str, lora: bool = False, **options) -> list:
    model = int8_cpu(graph, graph.loader(f"{kind}-mxfp8.safetensors"), **options)
    model = graph.add("MXFP8Accelerate", model=model, precision="fast")
    return with_lora(graph, model) if lora else model


def sampled(comfy, kind: str, change=lambda graph, model: model, **options):
    """(latent, how many prepared weights it holds then) of a fast model."""
    graph = Graph()
    model = change(graph, fast(graph, kind, **options))
    samples = graph.sample(model, kind)
    saved = graph.save_latent(samples)
    held = graph.add("TestPrepared", model=model, samples=samples)
    outputs = comfy.run(graph)
    return latents(outputs, saved, comfy.base), outputs[held[0]]["result"][0]


@pytest.fixture(scope="module")
def exact(comfy):
    latent = {}
    for kind in PREPARED:
        for lora in (False, True):
            graph = Graph()
            model = graph.loader(f"{kind}-mxfp8.safetensors")
            model = graph.add("MXFP8Accelerate", model=model, precision="exact")
            model = with_lora(graph, model) if lora and kind == "flux" else model
            saved = graph.save_latent(graph.sample(model, kind))
            latent[kind, lora] = latents(comfy.run(graph), saved, comfy.base)
    return latent


def near(latent, wanted) -> bool:
    return BY_INT8[0] < difference(latent, wanted) < BY_INT8[1]


@pytest.mark.parametrize("kind", PREPARED)
def test_fast_is_close_to_exact_and_few_rows_are_exact(comfy, exact, kind):
    latent, held = sampled(comfy, kind)
    assert held == PREPARED[kind]
    assert near(latent, exact[kind, False])


def test_without_memory_layers_are_exact(comfy, exact):
    latent, held = sampled(comfy, "flux", memory=False)
    assert held == 0
    assert difference(latent, exact["flux", False]) < SAME
    log = comfy.log.read_text(errors="replace")
    assert "13 layers run exact: there is no free memory for prepared weights" in log


def test_layers_that_a_form_would_change_too_much_are_exact(comfy, exact):
    latent, held = sampled(comfy, "flux", most_change=1e-4)
    assert held == 0
    assert difference(latent, exact["flux", False]) < SAME


def test_a_lora_leaves_prepared_weights_alone(comfy, exact):
    """Of another strength, too, and of none."""
    graph = Graph()
    model = fast(graph, "flux")
    plain, patched = graph.sample(model, "flux"), graph.sample(with_lora(graph, model), "flux")
    half = graph.add("LoraLoaderModelOnly", model=model, lora_name="lora.safetensors",
                     strength_model=0.5)  # fmt: skip
    samples = [plain, patched, graph.sample(half, "flux"), graph.sample(model, "flux", 3)]
    counted = [graph.add("TestPrepared", model=model, samples=s) for s in samples]
    for latest, previous in zip(samples[1:], counted, strict=False):
        after(graph, latest, previous)
    saved = {"plain": graph.save_latent(plain), "lora": graph.save_latent(patched)}
    outputs = comfy.run(graph)
    results = [outputs[node[0]]["result"][:2] for node in counted]
    assert results == [[PREPARED["flux"], 13]] * 4  # the modulations got their codes back
    latent = {name: latents(outputs, node, comfy.base) for name, node in saved.items()}
    assert near(latent["plain"], exact["flux", False])
    assert near(latent["lora"], exact["flux", True])
    assert difference(exact["flux", True], exact["flux", False]) > 1e-3


def test_stock_takes_the_model_over_and_gives_it_back(comfy, exact):
    graph = Graph()
    stock = int8_cpu(graph, graph.loader("flux-mxfp8.safetensors"))
    model = graph.add("MXFP8Accelerate", model=stock, precision="fast")
    previous, held, saved = None, [], []
    for turn in (model, stock, model):
        samples = graph.sample(turn, "flux")
        graph[samples[0]]["inputs"]["seed"] = 7 + len(held) // 2
        previous = samples if previous is None else after(graph, samples, previous)
        saved.append(graph.save_latent(samples))
        previous = graph.add("TestPrepared", model=model, samples=samples)
        held.append(previous)
    outputs = comfy.run(graph)
    count = PREPARED["flux"]
    assert [outputs[node[0]]["result"][0] for node in held] == [count, 0, count]
    first, second, _ = (latents(outputs, node, comfy.base) for node in saved)
    assert near(first, exact["flux", False])
    assert difference(second, exact["flux", False]) < SAME


@pytest.mark.parametrize("how", ["force_deepcopy", "compiled"])
def test_other_states_of_a_model_compute_the_same(comfy, how):
    def change(graph, model):
        if how == "force_deepcopy":
            return graph.add("TestClone", model=model, how=how)
        return graph.add("TestCompile", model=model, backend="aot_eager")

    wanted, held = sampled(comfy, "flux")
    latent, changed = sampled(comfy, "flux", change)
    assert changed == held
    assert difference(latent, wanted) < SAME


def test_offloaded_layers_are_exact(comfy, exact):
    latent, held = sampled(
        comfy, "flux", lambda graph, model: graph.add("TestLowVRAM", model=model)
    )
    assert held == 0
    assert difference(latent, exact["flux", False]) < SAME


def test_siblings_quantize_their_input_once(comfy):
    """Of one Wan block: q, k and v share an input, and so do k and v of what it attends to."""
    graph = Graph()
    model = fast(graph, "wan")
    samples = graph.sample(model, "wan", steps=2)
    counted = graph.add("TestPrepared", model=model, samples=samples)
    held, _, quantized = comfy.run(graph)[counted[0]]["result"]
    assert held == PREPARED["wan"]
    assert quantized == 2 * (PREPARED["wan"] - 3)
