"""Merging nodes and hook LoRAs of stock on MXFP8 models: in the real ComfyUI."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import load
from comfyui import PromptError
from graphs import SAME, Graph, difference, latents, load_ours, run, with_lora
from quantized_files import plain
from safetensors.torch import save_file

from mxfp8.quant.conversion.convert import convert_file

pytestmark = pytest.mark.comfy

LORA = {"lora_name": "lora.safetensors", "strength_model": 1.0}


@pytest.fixture(scope="module")
def other(comfy):
    """A second Flux: BF16, MXFP8, and what MXFP8 of both holds as plain float32."""
    folder = comfy.base / "models" / "diffusion_models"
    weights, _ = load(folder / "flux.safetensors")
    save_file({k: v.roll(1, 0) for k, v in weights.items()}, folder / "other.safetensors")
    convert_file(folder / "other.safetensors", folder / "other-mxfp8.safetensors")
    save_file(plain(folder / "other-mxfp8.safetensors"), folder / "other-plain.safetensors")
    yield folder
    for name in ("other", "other-mxfp8", "other-plain"):
        (folder / f"{name}.safetensors").unlink()


def ours(graph: Graph, name: str) -> list:
    return graph.add("MXFP8Load", model_name=f"{name}.safetensors", precision="exact")


MERGES = {
    "ModelMergeSimple": {"ratio": 0.7},
    "ModelMergeBlocks": {"input": 0.2, "middle": 0.3, "out": 0.4},
    "ModelMergeSubtract": {"multiplier": 0.5},
    "ModelMergeAdd": {},
}


@pytest.mark.parametrize("node", MERGES)
def test_merges_take_the_weights_that_mxfp8_stands_for(comfy, other, node):
    """Into a float32 model, which loses nothing: as if the second model were float32 too."""
    graph = Graph()
    first = graph.loader("flux-plain.safetensors")
    models = {
        "unmerged": first,
        "stock": graph.add(
            node, model1=first, model2=graph.loader("other-plain.safetensors"), **MERGES[node]
        ),
        "ours": graph.add(node, model1=first, model2=ours(graph, "other-mxfp8"), **MERGES[node]),
    }
    saved = {name: graph.save_latent(graph.sample(m, "flux")) for name, m in models.items()}
    latent = run(comfy, graph, saved)
    assert difference(latent["ours"], latent["stock"]) < SAME
    assert difference(latent["ours"], latent["unmerged"]) > 1e-3


def test_a_merge_on_an_offloaded_layer_is_not_requantized(comfy, other):
    graph = Graph()
    pairs = {
        "ours": (ours, "-mxfp8"),
        "stock": (lambda g, n: g.loader(f"{n}.safetensors"), "-plain"),
    }
    saved = {}
    for name, (loader, kind) in pairs.items():
        merged = graph.add(
            "ModelMergeSimple",
            model1=loader(graph, f"flux{kind}"), model2=loader(graph, f"other{kind}"), ratio=0.8,
        )  # fmt: skip
        offloaded = graph.add("TestLowVRAM", model=merged)
        saved[name] = graph.save_latent(graph.sample(offloaded, "flux"))
    latent = run(comfy, graph, saved)
    assert difference(latent["ours"], latent["stock"]) < SAME


def test_two_mxfp8_models_merge_and_are_saved(comfy, other):
    graph = Graph()
    merged = graph.add(
        "ModelMergeSimple",
        model1=ours(graph, "flux-mxfp8"), model2=ours(graph, "other-mxfp8"), ratio=0.6,
    )  # fmt: skip
    reference = graph.add(
        "ModelMergeSimple",
        model1=graph.loader("flux-plain.safetensors"),
        model2=graph.loader("other-plain.safetensors"), ratio=0.6,
    )  # fmt: skip
    saved = {
        "ours": graph.save_latent(graph.sample(merged, "flux")),
        "stock": graph.save_latent(graph.sample(reference, "flux")),
    }
    files = {
        "MXFP8SaveModel": graph.add(
            "MXFP8SaveModel", model=merged, filename_prefix="diffusion_models/merged"
        ),
        "ModelSave": graph.add(
            "ModelSave", model=merged, filename_prefix="diffusion_models/merged-by-stock"
        ),
    }
    outputs = comfy.run(graph)
    latent = {name: latents(outputs, node, comfy.base) for name, node in saved.items()}
    assert 1e-4 < difference(latent["ours"], latent["stock"]) < 0.1

    a, b = (plain(other / f"{name}-mxfp8.safetensors") for name in ("flux", "other"))
    path = comfy.base / "output" / "diffusion_models" / "merged_00001_.safetensors"
    name = outputs[files["MXFP8SaveModel"][0]]["text"][0].split(":")[0]
    assert path.name == name
    state = plain(path)
    _, metadata = load(path)
    layers = json.loads(metadata["_quantization_metadata"])["layers"]
    assert len(layers) == 13
    for layer in layers:
        key = f"{layer}.weight"
        expected = 0.6 * a[key].double() + 0.4 * b[key].double()
        # 0.0275: rounding to nearest, as for a LoRA that is baked in
        assert (state[key] - expected).norm() / expected.norm() < 0.0275, key

    graph = Graph()
    again = {name: ours(graph, name) for name in ("merged_00001_", "merged-by-stock_00001_")}
    saved = {name: graph.save_latent(graph.sample(m, "flux")) for name, m in again.items()}
    reloaded = run(comfy, graph, saved)
    assert difference(reloaded["merged_00001_"], latent["stock"]) < 0.1
    # Stock's file holds the weights that ran, rounded at random with the same seeds.
    assert difference(reloaded["merged-by-stock_00001_"], latent["ours"]) < SAME


@pytest.mark.parametrize("how", ["loaded", "low VRAM"])
def test_a_lora_extracted_from_an_mxfp8_model_is_that_of_its_values(comfy, other, how):
    """The LoRA that one of two models has."""
    graph = Graph()
    models = {"ours": ours(graph, "flux-mxfp8"), "plain": graph.loader("flux-plain.safetensors")}
    for name, model in models.items():
        first = with_lora(graph, model)
        if how == "low VRAM":
            first = graph.add("TestLowVRAM", model=first)
        subtracted = graph.add("ModelMergeSubtract", model1=first, model2=model, multiplier=1.0)
        for kind in ("full_diff", "standard"):
            graph.add(
                "LoraSave", model_diff=subtracted, filename_prefix=f"{how}/{name}-{kind}",
                rank=4, lora_type=kind, bias_diff=True,
            )  # fmt: skip
    comfy.run(graph)
    for kind in ("full_diff", "standard"):
        extracted, wanted = (
            deltas(load(next((comfy.base / "output" / how).glob(f"{name}-{kind}_*")))[0])
            for name in models
        )
        assert extracted.keys() == wanted.keys()
        assert sum(bool(delta.any()) for delta in wanted.values()) >= 10
        for key, delta in wanted.items():
            # Stock rounds what it merges to MXFP8 at random, and clips the factors of a LoRA.
            assert (extracted[key] - delta).norm() <= 0.1 * delta.norm(), (kind, key)


def deltas(lora: dict) -> dict[str, torch.Tensor]:
    """What a LoRA adds to each weight and bias."""
    lora = {key: value.float() for key, value in lora.items()}
    result = {key: value for key, value in lora.items() if ".diff" in key}
    for key, up in lora.items():
        if key.endswith("lora_up.weight"):
            result[key] = up @ lora[key.replace("lora_up", "lora_down")]
    return result


def test_control_models_are_built_from_the_values_of_the_model_they_control(comfy):
    graph = Graph()
    node = graph.add("TestControl")
    measured = json.loads(comfy.run(graph)[node[0]]["result"][0])
    assert measured["stock"] > 0.05  # it takes codes
    assert measured["without"] > 0.05
    assert measured["ours"] < SAME
    assert measured["embedder"] == 0
    assert measured["stored"] == "torch.float8_e4m3fn"


def test_what_is_saved_of_offloaded_layers_is_what_stock_saves(comfy, other):
    graph = Graph()
    loaders = {"ours": ours(graph, "flux-mxfp8"), "stock": graph.loader("flux-mxfp8.safetensors")}
    for name, model in loaders.items():
        model = graph.add("TestLowVRAM", model=with_lora(graph, model))
        graph.add("ModelSave", model=model, filename_prefix=f"offloaded/{name}")
    comfy.run(graph)
    saved, wanted = (
        load(next((comfy.base / "output" / "offloaded").glob(f"{name}_*")))[0] for name in loaders
    )
    assert saved.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(saved[key].view(torch.uint8), tensor.view(torch.uint8)), key


def hooked(graph: Graph, hooks: list) -> list:
    return graph.add(
        "ConditioningSetProperties", cond_NEW=graph.add("LotusConditioning"), hooks=hooks,
        strength=1.0, set_cond_area="default",
    )  # fmt: skip


def sample(graph: Graph, model: list, positive: list, cfg: float = 1.0, steps: int = 3) -> list:
    """Sampled with `positive`, against a conditioning without hooks if cfg is not 1."""
    samples = graph.sample(model, "flux", steps=steps)
    graph[samples[0]]["inputs"] |= {"positive": positive, "cfg": cfg}
    return samples


@pytest.mark.parametrize("how", ["loaded", "quantized", "deep clone", "low VRAM"])
def test_a_hook_lora_is_the_lora_that_stock_merges_into_dequantized_weights(comfy, how):
    graph = Graph()
    stock, model = graph.loader("flux-mxfp8.safetensors"), load_ours(graph, "flux")
    if how == "quantized":  # the same bits
        model = graph.add(
            "MXFP8Quantize", model=graph.loader("flux.safetensors"),
            preset="auto", precision="exact",
        )  # fmt: skip
    if how == "deep clone":
        model = graph.add("TestClone", model=model, how="force_deepcopy")
    if how == "low VRAM":
        model = graph.add("TestLowVRAM", model=model)
    hooks = graph.add("CreateHookLoraModelOnly", **LORA)
    first = sample(graph, model, hooked(graph, hooks))
    exact = graph.loader("flux-plain.safetensors")
    saved = {
        "hook": graph.save_latent(first),
        "merged": graph.save_latent(
            graph.sample(graph.add("LoraLoaderModelOnly", model=exact, **LORA), "flux", 3)
        ),
        "plain": graph.save_latent(graph.sample(stock, "flux", 3)),
    }
    after = graph.sample(model, "flux", 3)  # the original weights, codes and scales, are back
    graph[after[0]]["inputs"]["latent_image"] = graph.add(
        "TestEmptyAfter", samples=first, like=graph[first[0]]["inputs"]["latent_image"]
    )
    saved["after"] = graph.save_latent(after)
    latent = run(comfy, graph, saved)
    assert difference(latent["hook"], latent["merged"]) < SAME
    assert difference(latent["hook"], latent["plain"]) > 1e-3
    assert difference(latent["after"], latent["plain"]) < SAME


def test_hooks_of_one_prompt_only_switch_within_every_step(comfy):
    """The positive prompt has the LoRA, the negative has not."""
    graph = Graph()
    hooks = graph.add("CreateHookLoraModelOnly", **LORA)
    saved = {
        "hook": graph.save_latent(
            sample(graph, load_ours(graph, "flux"), hooked(graph, hooks), cfg=2.0)
        )
    }
    empty = graph.add("LotusConditioning")
    merged = graph.add("LoraLoaderModelOnly", model=graph.loader("flux-plain.safetensors"), **LORA)
    guider = graph.add(
        "DualModelGuider", model=merged, positive=empty, cfg=2.0,
        model_negative=load_ours(graph, "flux"), negative=empty,
    )  # fmt: skip
    two = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=7),
        guider=guider,
        sampler=graph.add("KSamplerSelect", sampler_name="euler"),
        sigmas=graph.add("BasicScheduler", model=merged, scheduler="simple", steps=3, denoise=1.0),
        latent_image=graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1),
    )
    saved["two models"] = graph.save_latent(two)
    latent = run(comfy, graph, saved)
    assert difference(latent["hook"], latent["two models"]) < SAME


def test_scheduled_hooks_change_between_steps(comfy):
    graph = Graph()
    hooks = graph.add("CreateHookLoraModelOnly", **LORA)
    keyframes = graph.add("CreateHookKeyframe", strength_mult=1.0, start_percent=0.0)
    keyframes = graph.add(
        "CreateHookKeyframe", strength_mult=0.0, start_percent=0.3, prev_hook_kf=keyframes
    )
    scheduled = graph.add("SetHookKeyframes", hooks=hooks, hook_kf=keyframes)
    model = load_ours(graph, "flux")
    saved = {
        name: graph.save_latent(sample(graph, model, positive))
        for name, positive in (
            ("scheduled", hooked(graph, scheduled)),
            ("hook", hooked(graph, hooks)),
            ("plain", graph.add("LotusConditioning")),
        )
    }
    latent = run(comfy, graph, saved)
    assert difference(latent["scheduled"], latent["hook"]) > 1e-3
    assert difference(latent["scheduled"], latent["plain"]) > 1e-3


def test_a_model_as_lora_is_added_or_refused(comfy):
    """The checkpoint has the same weights in BF16: at strength 1 it undoes the quantization."""
    graph = Graph()
    model = load_ours(graph, "flux")
    saved = {"plain": graph.save_latent(graph.sample(model, "flux", 3))}
    hooks = graph.add(
        "CreateHookModelAsLoraModelOnly", ckpt_name="checkpoint.safetensors", strength_model=1.0
    )
    saved["hook"] = graph.save_latent(sample(graph, model, hooked(graph, hooks)))
    latent = run(comfy, graph, saved)
    assert 0 < difference(latent["hook"], latent["plain"]) < 0.1

    graph = Graph()
    hooks = graph.add(
        "CreateHookModelAsLoraModelOnly",
        ckpt_name="checkpoint-mxfp8.safetensors", strength_model=1.0,
    )  # fmt: skip
    graph.save_latent(sample(graph, load_ours(graph, "flux"), hooked(graph, hooks)))
    with pytest.raises(PromptError, match=r"raw codes would be used.*use its BF16 original"):
        comfy.run(graph)
