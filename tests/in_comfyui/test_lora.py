"""LoRAs beside the weights, in the real ComfyUI.

Against what stock merges, in float32, into the weights that MXFP8 stands for: the file dequantized.
"""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import load
from comfyui import KINDS
from graphs import SAME, Graph, after, difference, load_ours, run
from lora_kinds import KINDS as ADAPTERS
from lora_kinds import linears, lora_file
from quantized_files import plain
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy

# Kinds without a small form; on all layers of these models they would take more than a model may.
DENSE = ("diff", "set")


def lora(graph: Graph, model: list, name: str, strength: float = 1.0) -> list:
    return graph.add(
        "LoraLoaderModelOnly", model=model, lora_name=f"{name}.safetensors", strength_model=strength
    )


@pytest.fixture(scope="module")
def files(comfy):
    """LoRAs of every kind, of 5% of the weights' norm, on every linear of every model."""
    folder = comfy.base / "models"
    written = []
    for kind in KINDS:
        state = linears(load(folder / "diffusion_models" / f"{kind}-plain.safetensors")[0])
        key = min((k for k in state if "blocks." in k), key=lambda k: state[k].numel())
        small = {key: state[key]}  # quantized, and small enough for a dense delta
        for index, adapter in enumerate(ADAPTERS):
            layers = small if adapter in DENSE else state
            path = folder / "loras" / f"{kind}-{adapter}.safetensors"
            save_file(lora_file(layers, adapter, norm=0.05, seed=index), path)
            written.append(path)
    yield
    for path in written:
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lora_is_what_stock_merges_into_dequantized_weights(comfy, files, kind):
    graph = Graph()
    models = {"ours": load_ours(graph, kind), "exact": graph.loader(f"{kind}-plain.safetensors")}
    saved = {"plain": graph.save_latent(graph.sample(models["ours"], kind))}
    adapters = [a for a in ADAPTERS if a != "diff_b" or kind != "flux2"]  # it has no biases
    for adapter in adapters:
        for name, model in models.items():
            patched = lora(graph, model, f"{kind}-{adapter}", 0.8)
            saved[f"{name} {adapter}"] = graph.save_latent(graph.sample(patched, kind))
    latent = run(comfy, graph, saved)
    for adapter in adapters:
        exact = latent[f"exact {adapter}"]
        assert difference(exact, latent["plain"]) > 1e-4, adapter
        assert difference(latent[f"ours {adapter}"], exact) < SAME, adapter


@pytest.mark.parametrize("names", [("lora", "lokr", "loha"), ("dora_rows", "oft", "lora", "glora")])
def test_stacked_loras_follow_the_order_of_loading(comfy, files, names):
    graph = Graph()
    models = {"ours": load_ours(graph, "flux"), "exact": graph.loader("flux-plain.safetensors")}
    saved = {}
    for which, order in (("one way", names), ("the other", names[::-1])):
        for name, model in models.items():
            for strength, adapter in enumerate(order, 1):
                model = lora(graph, model, f"flux-{adapter}", 0.3 * strength)
            saved[f"{name}, {which}"] = graph.save_latent(graph.sample(model, "flux"))
    latent = run(comfy, graph, saved)
    for which in ("one way", "the other"):
        assert difference(latent[f"ours, {which}"], latent[f"exact, {which}"]) < SAME


def test_another_strength_moves_no_module_and_changes_no_code(comfy, files):
    """Through the ordinary nodes; the LoRA is on kept layers too."""
    graph = Graph()
    model = load_ours(graph, "flux")
    first = graph.sample(lora(graph, model, "flux-lora", 1.0), "flux")
    seen = graph.add("TestMoved", model=model, samples=first)
    saved = {"1.0": graph.save_latent(first)}
    for strength in (0.3, 0.0, 1.0):
        second = graph.sample(lora(graph, model, "flux-lora", strength), "flux")
        if strength == 1.0:  # again
            second = graph.sample(lora(graph, model, "flux-lora", strength), "flux")
        after(graph, second, seen)
        seen = graph.add("TestMoved", model=model, samples=second)
        saved[f"{strength}, later"] = graph.save_latent(second)
    outputs = comfy.run(graph)
    moved = json.loads(outputs[seen[0]]["result"][0])
    assert moved == {"moved": [0, 0, 0], "codes changed": [0, 0, 0], "modules": moved["modules"]}
    assert moved["modules"] > 30


def test_a_reloaded_run_gives_the_same_image(comfy, files):
    graph = Graph()
    model = lora(graph, load_ours(graph, "flux"), "flux-loha", 0.7)
    first = graph.sample(model, "flux")
    unloaded = graph.add("TestUnload", samples=first)
    again = after(graph, graph.sample(model, "flux"), unloaded)
    saved = {"first": graph.save_latent(first), "again": graph.save_latent(again)}
    latent = run(comfy, graph, saved)
    assert difference(latent["first"], latent["again"]) == 0


def test_clones_run_their_own_loras_one_after_the_other(comfy, files):
    graph = Graph()
    model, exact = load_ours(graph, "flux"), graph.loader("flux-plain.safetensors")
    saved, previous = {}, None
    for index, adapter in enumerate(("lora", None, "lokr", "lora")):
        ours = model if adapter is None else lora(graph, model, f"flux-{adapter}")
        samples = graph.sample(ours, "flux")
        if previous is not None:
            after(graph, samples, previous)
        previous = samples
        wanted = exact if adapter is None else lora(graph, exact, f"flux-{adapter}")
        saved[f"ours {index}"] = graph.save_latent(samples)
        saved[f"exact {index}"] = graph.save_latent(graph.sample(wanted, "flux"))
    latent = run(comfy, graph, saved)
    for index in range(4):
        assert difference(latent[f"ours {index}"], latent[f"exact {index}"]) < SAME, index


@pytest.mark.parametrize("how", ["low VRAM", "loras offloaded", "force_deepcopy"])
def test_other_states_of_a_model_compute_the_same(comfy, files, how):
    def change(graph: Graph, model: list) -> list:
        if how == "force_deepcopy":
            return graph.add("TestClone", model=model, how=how)
        node = "TestLowVRAM" if how == "low VRAM" else "TestOffloadedLoras"
        return graph.add(node, model=model)

    graph = Graph()
    saved = {}
    for name, adapters in (
        ("low rank", ["lora", "loha"]),
        ("all", ["dora_columns", "lokr", "oft"]),
    ):
        model = load_ours(graph, "flux")
        for adapter in adapters:
            model = lora(graph, model, f"flux-{adapter}")
        saved[name] = graph.save_latent(graph.sample(model, "flux"))
        saved[f"{name}, {how}"] = graph.save_latent(graph.sample(change(graph, model), "flux"))
    latent = run(comfy, graph, saved)
    for name in ("low rank", "all"):
        assert difference(latent[f"{name}, {how}"], latent[name]) < SAME


def test_what_is_saved_has_the_loras(comfy, files):
    """Of a loaded model, by stock's node and by ours."""
    graph = Graph()
    model = load_ours(graph, "flux")
    for adapter in ("lora", "dora_rows"):
        model = lora(graph, model, f"flux-{adapter}")
    samples = graph.sample(model, "flux")
    graph.save_latent(samples)
    ready = graph.add("TestAfter", model=model, samples=samples)
    for node in ("ModelSave", "MXFP8SaveModel"):
        graph.add(node, model=ready, filename_prefix=f"diffusion_models/lora-{node}")
    comfy.run(graph)

    folder = comfy.base / "models" / "diffusion_models"
    state, _ = load(folder / "flux-plain.safetensors")
    for node in ("ModelSave", "MXFP8SaveModel"):
        (path,) = (comfy.base / "output" / "diffusion_models").glob(f"lora-{node}_*")
        saved = {k.removeprefix("model.diffusion_model."): v for k, v in plain(path).items()}
        changes = [
            float((saved[key] - weight).norm() / weight.norm())
            for key, weight in linears(state).items()
        ]
        assert min(changes) > 0.04, node  # two of 5%, rounded
        path.unlink()


def test_a_hook_lora_of_parts_of_fused_weights_is_the_lora(comfy):
    """By the names of Diffusers: to_q and to_v are parts of one weight here."""
    draw = torch.Generator().manual_seed(4)
    file = {
        f"transformer.transformer_blocks.0.attn.{part}.lora_{side}.weight": torch.randn(
            shape, generator=draw
        ) * 0.1
        for part in ("to_q", "to_v")
        for side, shape in (("B", (128, 4)), ("A", (4, 128)))
    }  # fmt: skip
    save_file(file, comfy.base / "models" / "loras" / "parts.safetensors")
    graph = Graph()
    model = load_ours(graph, "flux")
    hooks = graph.add("CreateHookLoraModelOnly", lora_name="parts.safetensors", strength_model=1.0)
    hooked = graph.sample(model, "flux")
    graph[hooked[0]]["inputs"]["positive"] = graph.add(
        "ConditioningSetProperties", cond_NEW=graph.add("LotusConditioning"), hooks=hooks,
        strength=1.0, set_cond_area="default",
    )  # fmt: skip
    saved = {
        "hook": graph.save_latent(hooked),
        "lora": graph.save_latent(graph.sample(lora(graph, model, "parts"), "flux")),
        "plain": graph.save_latent(graph.sample(model, "flux")),
    }
    latent = run(comfy, graph, saved)
    assert difference(latent["hook"], latent["lora"]) < SAME
    assert difference(latent["hook"], latent["plain"]) > 1e-4


def test_a_layer_whose_forward_is_from_elsewhere_is_left_to_stock(comfy, files):
    """It was there before the model was loaded, so ours is not set, and no branch would run."""
    graph = Graph()
    clone = graph.add("TestClone", model=load_ours(graph, "flux"), how="force_deepcopy")
    model = graph.add("TestForeignForwards", model=clone)
    saved = {
        "ours": graph.save_latent(graph.sample(lora(graph, model, "flux-lora"), "flux")),
        "exact": graph.save_latent(
            graph.sample(lora(graph, graph.loader("flux-plain.safetensors"), "flux-lora"), "flux")
        ),
        "plain": graph.save_latent(graph.sample(graph.loader("flux-plain.safetensors"), "flux")),
    }
    latent = run(comfy, graph, saved)
    off, effect = (difference(latent[name], latent["exact"]) for name in ("ours", "plain"))
    assert off < 0.8 * effect  # requantized: without the LoRA it would be 1


def test_the_setting_gives_loras_back_to_comfyui(comfy, files):
    latent = {}
    for beside in (True, False):
        comfy.post("/api/settings", {"MXFP8.LoRAsBesideWeights": beside})
        try:
            graph = Graph()
            models = {
                "ours": load_ours(graph, "flux"), "stock": graph.loader("flux-mxfp8.safetensors")
            }  # fmt: skip
            saved = {
                (beside, name): graph.save_latent(
                    graph.sample(lora(graph, model, "flux-lora"), "flux")
                )
                for name, model in models.items()
            }
            latent |= run(comfy, graph, saved)
        finally:
            comfy.post("/api/settings", {"MXFP8.LoRAsBesideWeights": True})
    assert difference(latent[True, "ours"], latent[True, "stock"]) > 1e-3  # not from the cache
    assert difference(latent[False, "ours"], latent[False, "stock"]) < SAME


def test_what_is_too_large_is_merged_and_what_does_not_fit_is_left_out(comfy, files):
    """Both are said in the log."""
    folder = comfy.base / "models"
    state = linears(load(folder / "diffusion_models" / "flux-plain.safetensors")[0])
    save_file(lora_file(state, "diff", norm=0.05), folder / "loras" / "large.safetensors")
    key, weight = next((k, v) for k, v in state.items() if "double_blocks.0.img_mlp.0" in k)
    other = {key: torch.randn(weight.shape[0] + 32, weight.shape[1])}
    save_file(lora_file(other, "lora"), folder / "loras" / "other.safetensors")
    graph = Graph()
    model = load_ours(graph, "flux")
    saved = {
        "plain": graph.save_latent(graph.sample(model, "flux")),
        "large": graph.save_latent(graph.sample(lora(graph, model, "large"), "flux")),
        "other": graph.save_latent(graph.sample(lora(graph, model, "other"), "flux")),
        "exact": graph.save_latent(
            graph.sample(lora(graph, graph.loader("flux-plain.safetensors"), "large"), "flux")
        ),
    }
    latent = run(comfy, graph, saved)
    assert difference(latent["other"], latent["plain"]) == 0
    assert 1e-4 < difference(latent["large"], latent["exact"]) < 0.05
    log = comfy.log.read_text(errors="replace")
    assert "their deltas would take more than a quarter of the model's size" in log
    assert "do not fit and are left out: 'diffusion_model.double_blocks.0.img_mlp.0" in log
