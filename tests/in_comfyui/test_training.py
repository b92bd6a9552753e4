"""Stock's LoRA training on MXFP8 models, in the real ComfyUI: it sets forwards of its own."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import load
from graphs import LATENTS, Graph, difference, load_ours, with_lora
from lora_kinds import linears, lora_file
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy


def trained(comfy, model, kind: str, **options) -> dict:
    """A LoRA that stock's node trains on an empty latent, on what `model` adds to a graph."""
    graph = Graph()
    empty, size = LATENTS[kind]
    options = {
        "batch_size": 1, "grad_accumulation_steps": 1, "steps": 2, "learning_rate": 0.01,
        "rank": 4, "optimizer": "AdamW", "loss_function": "MSE", "seed": 3,
        "training_dtype": "none", "lora_dtype": "fp32", "quantized_backward": False,
        "algorithm": "LoRA", "gradient_checkpointing": True, "checkpoint_depth": 1,
        "offloading": False, "existing_lora": "[None]", "bucket_mode": False, **options,
    }  # fmt: skip
    lora = graph.add(
        "TrainLoraNode", model=model(graph), latents=graph.add(empty, **size, batch_size=1),
        positive=graph.add("LotusConditioning"), **options,
    )  # fmt: skip
    graph.add("SaveLoRA", lora=lora, prefix="training/lora")
    comfy.run(graph)
    files = (comfy.base / "output" / "training").glob("lora_*")
    return load(max(files, key=lambda path: path.stat().st_mtime_ns))[0]


def untrained(lora: dict) -> list[str]:
    """Those that still are zero, as all of these are at first."""
    first_zero = [key for key in lora if key.endswith(("lora_down.weight", ".diff", ".diff_b"))]
    assert len(first_zero) > 20
    return [key for key in first_zero if not lora[key].any()]


@pytest.mark.slow
def test_a_lora_is_trained_as_in_stock(comfy):
    """With forwards that stock sets on the layers (bypass_mode), and on what it casts."""

    def stock(graph):
        return graph.loader("flux-mxfp8.safetensors")

    # A LoRA starts from random weights, which this one leaves as the next but one finds them.
    trained(comfy, stock, "flux", bypass_mode=True)
    for bypass_mode in (True, False):
        ours = trained(comfy, lambda g: load_ours(g, "flux"), "flux", bypass_mode=bypass_mode)
        wanted = trained(comfy, stock, "flux", bypass_mode=bypass_mode)
        assert untrained(ours) == []
        assert ours.keys() == wanted.keys()
        for key, value in wanted.items():
            assert (ours[key] - value).abs().max() < 1e-4, key  # of steps of 0.01


@pytest.mark.slow
def test_flux2_is_trained_in_bypass_mode(comfy):
    assert (
        untrained(trained(comfy, lambda g: load_ours(g, "flux2"), "flux2", bypass_mode=True)) == []
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora_rows"])
def test_a_lora_is_trained_on_top_of_another(comfy, kind):
    """Its gradients are those on the dequantized model with the other one merged."""
    folder = comfy.base / "models"
    state = linears(load(folder / "diffusion_models" / "flux-plain.safetensors")[0])
    other = folder / "loras" / f"training-{kind}.safetensors"
    file = lora_file(state, kind, norm=0.3)
    if kind == "dora_rows":
        # Gradients would be four times as large, if what is trained came before it.
        file = {key: value for key, value in file.items() if "double_blocks.0.img_mlp.0" in key}
        file["diffusion_model.double_blocks.0.img_mlp.0.dora_scale"] *= 4
    save_file(file, other)

    def gradients(load, patched: bool, bypass_mode: bool) -> torch.Tensor:
        def model(graph):
            return with_lora(graph, load(graph), other.name) if patched else load(graph)

        lora = trained(
            comfy, model, "flux", bypass_mode=bypass_mode, optimizer="SGD", steps=1,
            learning_rate=1.0,
        )  # fmt: skip
        layer = "double_blocks.0.img_mlp.0" if kind == "dora_rows" else ""
        keys = sorted(key for key in lora if "lora_down" in key and layer in key)
        return torch.cat([lora[key].flatten() for key in keys])

    def ours(graph):
        return load_ours(graph, "flux")

    def exact(graph):
        return graph.loader("flux-plain.safetensors")

    gradients(exact, False, True)  # leaves the random numbers as the others find them
    wanted = gradients(exact, True, True)
    for bypass_mode in (True, False):
        off = difference(gradients(ours, True, bypass_mode), wanted)
        assert off < (0.05 if kind == "lora" else 0.2), bypass_mode  # of BF16; of merging
    assert difference(gradients(ours, False, True), wanted) > 0.2
    other.unlink()


def test_a_forward_set_on_a_loaded_model_outlasts_reloading_it(comfy):
    graph = Graph()
    stock = graph.loader("flux-mxfp8.safetensors")
    model = graph.add("MXFP8Accelerate", model=stock, precision="exact")
    node = graph.add("TestForeignForward", stock=stock, model=model)
    assert json.loads(comfy.run(graph)[node[0]]["result"][0]) == {
        "set, loaded again": "foreign",
        "unloaded": "foreign",
        "loaded again": "foreign",
        "taken back, loaded again": "ours",
        "unloaded without it": "stock",
        "set, unloaded, taken back, loaded in stock": "stock",
        "loaded again in ours": "ours",
        "an object patch": "foreign",
        "loaded after 1 object patches": "ours",
        "loaded after 13 object patches": "ours",
    }
