"""LoRAs beside the weights with what else users do to a model, in the real ComfyUI.

Each workflow is run on an MXFP8 model and on the weights that it stands for, in float32, where
stock's merging is exact.
"""

from __future__ import annotations

import json

import pytest
from checkpoints import load
from graphs import SAME, Graph, after, difference, latents, load_ours, run
from lora_kinds import linears, lora_file
from quantized_files import plain
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy

# Name -> kind, norm relative to the weights', seed.
LORAS = {
    "first": ("lora", 0.05, 1), "second": ("lora_alpha_mid", 0.05, 2), "loha": ("loha", 0.05, 3),
    "dora": ("dora_columns", 0.05, 4), "oft": ("oft", 0.05, 5), "bias": ("diff_b", 0.05, 6),
    "small": ("lora", 0.01, 7), "large": ("lora", 0.3, 8),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def files(comfy):
    folder = comfy.base / "models"
    state = linears(load(folder / "diffusion_models" / "flux-plain.safetensors")[0])
    written = [folder / "loras" / f"states-{name}.safetensors" for name in LORAS]
    for path, (kind, norm, seed) in zip(written, LORAS.values(), strict=True):
        save_file(lora_file(state, kind, norm, seed=seed), path)
    written += [folder / "loras" / f"states-rank-32-{i}.safetensors" for i in range(8)]
    for seed, path in enumerate(written[len(LORAS) :]):
        save_file(lora_file(state, "lora", 0.01, rank=32, seed=10 + seed), path)
    yield
    for path in written:
        path.unlink()


def lora(graph: Graph, model: list, *names: str, strength: float = 0.8, bypass=False) -> list:
    node = "LoraLoaderBypassModelOnly" if bypass else "LoraLoaderModelOnly"
    for name in names:
        file = f"states-{name}.safetensors"
        model = graph.add(node, model=model, lora_name=file, strength_model=strength)
    return model


def both(graph: Graph) -> dict[str, list]:
    return {"ours": load_ours(graph, "flux"), "exact": graph.loader("flux-plain.safetensors")}


def compare(comfy, workflows: dict, apart: float = 1e-3) -> None:
    """Workflows (graph, model) -> samples, on both models: the same on both, other than plain."""
    graph = Graph()
    models = both(graph)
    saved = {"plain": graph.save_latent(graph.sample(models["exact"], "flux"))}
    for name, workflow in workflows.items():
        for which, model in models.items():
            saved[f"{which}, {name}"] = graph.save_latent(workflow(graph, model))
    latent = run(comfy, graph, saved)
    for name in workflows:
        exact = latent[f"exact, {name}"]
        assert difference(exact, latent["plain"]) > apart, name
        assert difference(latent[f"ours, {name}"], exact) < SAME, name


def seen(graph: Graph, model: list, samples: list) -> list:
    return graph.add("TestBranches", model=model, samples=samples)


def result(outputs: dict, node: list) -> dict:
    return json.loads(outputs[node[0]]["result"][0])


# Accelerate Model, and stock on the same weights.


def test_a_lora_from_before_accelerating_runs_beside_the_weights_and_is_stocks_in_stock(comfy):
    """Of one loaded model, in turn: stock's own merges the LoRA, ours has it beside."""
    graph = Graph()
    stock, exact = graph.loader("flux-mxfp8.safetensors"), graph.loader("flux-plain.safetensors")
    with_one = lora(graph, stock, "first")
    ours = graph.add("MXFP8Accelerate", model=with_one, precision="exact")
    models = {
        "stock": stock, "stock with one": with_one, "ours": ours,
        "ours with two": lora(graph, ours, "dora"),
    }  # fmt: skip
    saved = {
        "exact": graph.save_latent(graph.sample(lora(graph, exact, "first"), "flux")),
        "exact with two": graph.save_latent(
            graph.sample(lora(graph, exact, "first", "dora"), "flux")
        ),
    }
    # Each of them after each other one.
    order = [0, 1, 2, 3, 1, 0, 2, 0, 3, 2, 1, 3, 0]
    previous = None
    for turn, index in enumerate(order):
        name = list(models)[index]
        samples = graph.sample(models[name], "flux")
        previous = samples if previous is None else after(graph, samples, previous)
        saved[name, turn] = graph.save_latent(samples)
        previous = samples
    latent = run(comfy, graph, saved)
    first = {name: latent[name, order.index(i)] for i, name in enumerate(models)}
    for turn, index in enumerate(order):
        name = list(models)[index]
        assert difference(latent[name, turn], first[name]) == 0, (name, turn)
    assert difference(first["ours"], latent["exact"]) < SAME
    assert difference(first["ours with two"], latent["exact with two"]) < SAME
    assert difference(first["stock with one"], latent["exact"]) > 1e-3  # rounded
    assert difference(first["stock"], latent["exact"]) > 1e-3


# Bypass, and training.


def test_bypass_nodes_above_and_below_a_lora(comfy):
    def above(graph, model):
        return graph.sample(
            lora(graph, lora(graph, model, "first", "bias"), "small", bypass=True), "flux"
        )

    def below(graph, model):
        return graph.sample(
            lora(graph, lora(graph, model, "small", bypass=True), "first", "bias"), "flux"
        )

    def offloaded(graph, model):
        model = lora(graph, lora(graph, model, "first"), "small", bypass=True)
        return graph.sample(graph.add("TestLowVRAM", model=model), "flux")

    compare(comfy, {"above": above, "below": below, "offloaded": offloaded})


# Hooks.


def hook(graph: Graph, name: str, strength: float = 0.8) -> list:
    file = f"states-{name}.safetensors"
    return graph.add("CreateHookLoraModelOnly", lora_name=file, strength_model=strength)


def hooked(graph: Graph, hooks: list, **options) -> list:
    options = {"strength": 1.0, "set_cond_area": "default", "hooks": hooks, **options}
    return graph.add(
        "ConditioningSetProperties", cond_NEW=graph.add("LotusConditioning"), **options
    )


def sampled(graph: Graph, model: list, positive: list, cfg: float = 1.0, steps: int = 3) -> list:
    samples = graph.sample(model, "flux", steps)
    graph[samples[0]]["inputs"] |= {"positive": positive, "cfg": cfg}
    return samples


def keyframes(graph: Graph, *frames: tuple[float, float]) -> list:
    last = None
    for strength, start in frames:
        more = {} if last is None else {"prev_hook_kf": last}
        last = graph.add("CreateHookKeyframe", strength_mult=strength, start_percent=start, **more)
    return last


def scheduled(graph, model):
    frames = keyframes(graph, (1.0, 0.0), (0.3, 0.3), (0.0, 0.6))
    hooks = graph.add("SetHookKeyframes", hooks=hook(graph, "first"), hook_kf=frames)
    return sampled(graph, lora(graph, model, "loha"), hooked(graph, hooks), cfg=1.5)


def masked(graph, model):
    halves = [
        graph.add("MaskComposite", destination=graph.add("SolidMask", value=a, width=64, height=64),
                  source=graph.add("SolidMask", value=b, width=32, height=64),
                  x=0, y=0, operation="add")
        for a, b in ((0.0, 1.0), (1.0, 0.0))
    ]  # fmt: skip
    halves[1] = graph.add("InvertMask", mask=halves[0])
    first = hooked(graph, hook(graph, "first"), mask=halves[0])
    positive = graph.add(
        "ConditioningSetPropertiesAndCombine", cond=first,
        cond_NEW=graph.add("LotusConditioning"), strength=1.0, set_cond_area="default",
        mask=halves[1], hooks=hook(graph, "oft"),
    )  # fmt: skip
    return sampled(graph, lora(graph, model, "second"), positive, cfg=2.0)


def over_the_same(name: str):
    def workflow(graph, model):
        return sampled(graph, lora(graph, model, "first", "bias"), hooked(graph, hook(graph, name)))

    return workflow


def grouped(graph, model):
    hooks = graph.add(
        "CombineHooks2", hooks_A=hook(graph, "first"), hooks_B=hook(graph, "loha", -0.5)
    )
    return sampled(graph, model, hooked(graph, hooks))


@pytest.mark.slow
def test_hooks_on_models_with_loras(comfy):
    compare(comfy, {
        "scheduled": scheduled, "masked": masked, "two in a group": grouped,
        **{f"{n} over a LoRA": over_the_same(n) for n in ("second", "dora", "oft", "bias")},
    })  # fmt: skip


@pytest.mark.slow
def test_after_hooks_a_model_is_as_it_was(comfy):
    graph = Graph()
    model = load_ours(graph, "flux")
    patched = lora(graph, model, "loha")
    before = graph.sample(patched, "flux")
    first = seen(graph, patched, before)
    samples = after(graph, scheduled(graph, model), first)
    samples = after(graph, masked(graph, model), samples)
    hooks = seen(graph, patched, samples)
    again = after(graph, graph.sample(patched, "flux"), hooks)
    last = seen(graph, patched, again)
    plain_again = after(graph, graph.sample(model, "flux"), last)
    bare = seen(graph, model, plain_again)
    saved = {"before": graph.save_latent(before), "again": graph.save_latent(again)}
    outputs = comfy.run(graph)
    first, last, hooks, bare = (result(outputs, node) for node in (first, last, hooks, bare))
    assert hooks["codes"] == first["codes"] == last["codes"] == bare["codes"]
    assert first["branches"] == first["layers"] == last["branches"] == last["alive"] > 10
    assert bare["branches"] == bare["alive"] == 0
    latent = {name: latents(outputs, node, comfy.base) for name, node in saved.items()}
    assert difference(latent["again"], latent["before"]) == 0


# Memory.


@pytest.mark.slow
def test_loras_take_their_own_size_and_give_it_back(comfy):
    """Eight of rank 32, in float32, in which ComfyUI computes on a CPU."""
    graph = Graph()
    model = load_ours(graph, "flux")
    patched = lora(graph, model, *(f"rank-32-{i}" for i in range(8)))
    bare = seen(graph, model, graph.sample(model, "flux", 1))
    first = after(graph, graph.sample(patched, "flux", 1), bare)
    eight = seen(graph, patched, first)
    partly = graph.add("TestPartlyUnloaded", samples=eight)
    second = after(graph, graph.sample(patched, "flux", 1), partly)
    without = after(graph, graph.sample(model, "flux", 1), second)
    removed = seen(graph, model, without)
    saved = {"first": graph.save_latent(first), "second": graph.save_latent(second)}
    comfy.free()
    outputs = comfy.run(graph)

    def adapters(node) -> list:
        return [m for m in result(outputs, node)["loaded"] if m[0] == "MXFP8Adapters"]

    def base(node) -> list:
        return [m for m in result(outputs, node)["loaded"] if m[0] != "MXFP8Adapters"]

    state = linears(load(comfy.base / "models" / "diffusion_models" / "flux-plain.safetensors")[0])
    size = 8 * 32 * 4 * sum(sum(weight.shape) for weight in state.values())
    assert base(bare) == base(eight) == base(removed)
    assert adapters(eight) == [["MXFP8Adapters", size, size]]
    assert adapters(bare) == adapters(removed) == []
    assert result(outputs, removed)["alive"] == 0
    assert 0.5 <= outputs[partly[0]]["result"][0] < 1
    latent = {name: latents(outputs, node, comfy.base) for name, node in saved.items()}
    assert difference(latent["second"], latent["first"]) < SAME


@pytest.mark.slow
def test_changing_strengths_leaks_nothing(comfy):
    graph = Graph()
    model = load_ours(graph, "flux")
    nodes, samples = [], None
    for turn in range(20):
        patched = lora(graph, model, "first", strength=0.1 + 0.05 * turn)
        latest = graph.sample(patched, "flux", 1)
        samples = latest if samples is None else after(graph, latest, samples)
        if turn in (0, 19):
            samples = seen(graph, patched, samples)
            nodes.append(samples)
    outputs = comfy.run(graph)
    first, last = (result(outputs, node) for node in nodes)
    assert first["alive"] == last["alive"] == last["layers"]
    assert first["codes"] == last["codes"]


# Merging and saving.


@pytest.fixture(scope="module")
def other(comfy):
    folder = comfy.base / "models" / "diffusion_models"
    weights, _ = load(folder / "flux-plain.safetensors")
    path = folder / "states-other.safetensors"
    save_file({k: v.roll(1, 0) for k, v in weights.items()}, path)
    yield path.name
    path.unlink()


def test_merged_models_and_loras(comfy, other):
    """A merge of models is stock's, which requantizes it unless a layer is offloaded."""

    def into(graph, model):
        return graph.sample(
            graph.add("ModelMergeSimple", model1=graph.loader(other),
                      model2=lora(graph, model, "first", "dora"), ratio=0.3),
            "flux",
        )  # fmt: skip

    def beside(graph, model):
        merged = graph.add("ModelMergeSimple", model1=model, model2=graph.loader(other), ratio=0.7)
        merged = lora(graph, merged, "first", "oft")
        return graph.sample(graph.add("TestLowVRAM", model=merged), "flux")

    def below(graph, model):
        merged = graph.add(
            "ModelMergeSimple", model1=lora(graph, model, "first"), model2=graph.loader(other),
            ratio=0.7,
        )  # fmt: skip
        return graph.sample(graph.add("TestLowVRAM", model=merged), "flux")

    compare(comfy, {"LoRAs in the second model": into, "on top of a merge": beside,
                    "under a merge": below})  # fmt: skip


def test_what_is_saved_has_each_lora_once(comfy):
    """Of a model that is loaded, and of one that has never been."""
    graph = Graph()
    patched = lora(graph, load_ours(graph, "flux"), "large")
    for node in ("ModelSave", "MXFP8SaveModel"):
        graph.add(node, model=patched, filename_prefix=f"states/before-{node}")
    comfy.run(graph)
    graph = Graph()
    patched = lora(graph, load_ours(graph, "flux"), "large")
    samples = graph.sample(patched, "flux", 1)
    graph.save_latent(samples)
    ready = graph.add("TestAfter", model=patched, samples=samples)
    for node in ("ModelSave", "MXFP8SaveModel"):
        graph.add(node, model=ready, filename_prefix=f"states/loaded-{node}")
    baked = graph.add(
        "MXFP8Quantize", model=lora(graph, graph.loader("flux-plain.safetensors"), "large"),
        preset="auto", precision="exact",
    )  # fmt: skip
    graph.add("ModelSave", model=baked, filename_prefix="states/quantized")
    comfy.run(graph)

    models = comfy.base / "models"
    state = linears(load(models / "diffusion_models" / "flux-plain.safetensors")[0])
    file, _ = load(models / "loras" / "states-large.safetensors")
    # To nearest, where we quantize; stock rounds at random.
    roundings = {
        "before-MXFP8SaveModel": 0.0275, "loaded-MXFP8SaveModel": 0.0275, "quantized": 0.0275,
        "before-ModelSave": 0.05, "loaded-ModelSave": 0.05,
    }  # fmt: skip
    for name, rounding in roundings.items():
        (path,) = (comfy.base / "output" / "states").glob(f"{name}_*")
        saved = {k.removeprefix("model.diffusion_model."): v for k, v in plain(path).items()}
        for key, weight in state.items():
            layer = f"diffusion_model.{key.removesuffix('.weight')}"
            up, down = (file[f"{layer}.lora_{side}.weight"] for side in ("up", "down"))
            wanted = weight + 0.8 * up @ down
            assert (saved[key] - wanted).norm() < rounding * wanted.norm(), (name, key)
        path.unlink()
