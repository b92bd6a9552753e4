"""LoRAs that stock ComfyUI cannot merge, where they would be baked into a file: nothing is written,
where stock only logs the error. In the real ComfyUI."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import torch
from comfyui import PromptError
from graphs import Graph, quantized
from safetensors.torch import load_file, save_file

from mxfp8 import kernels
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.conversion.policy import Selection

pytestmark = pytest.mark.comfy

LAYER = "double_blocks.0.img_attn.proj"  # quantized
KEPT = "final_layer.linear"


@pytest.fixture(scope="module", autouse=True)
def file(comfy):
    """An MXFP8 file in which one linear is kept."""
    folder = comfy.base / "models" / "diffusion_models"
    target = folder / "baking-mxfp8.safetensors"
    convert_file(folder / "flux.safetensors", target, Selection(exclude=KEPT))
    yield target.name
    target.unlink()


def adapters(name: str, sizes: tuple[int, int]) -> dict[str, torch.Tensor]:
    """What a file holds of one adapter for a layer with as many outputs and inputs."""
    rows, columns = sizes
    key = f"diffusion_model.{name}"
    return {f"{key}.lora_up.weight": torch.ones(rows, 4) / 64,
            f"{key}.lora_down.weight": torch.ones(4, columns) / 64}  # fmt: skip


def wrong(kind: str) -> dict[str, torch.Tensor]:
    """Adapters of one kind for six layers that they do not fit, and a LoRA that fits a seventh."""
    names = [LAYER, KEPT, "double_blocks.0.txt_attn.proj", "double_blocks.0.img_mlp.0",
             "double_blocks.0.img_mlp.2", "single_blocks.0.linear2"]  # fmt: skip
    state = adapters("single_blocks.0.linear1", (128 * 7, 128))
    for name in names:
        key = f"diffusion_model.{name}"
        state |= {
            "width": adapters(name, (96, 100)),
            "rank": {**adapters(name, (128, 128)), f"{key}.lora_down.weight": torch.ones(8, 128)},
            "diff": {f"{key}.diff": torch.ones(96, 100)},
            "oft": {f"{key}.oft_blocks": torch.zeros(7, 9, 9)},
            "loha": {f"{key}.hada_w{i}_{j}": torch.ones((96, 4) if j == "a" else (4, 100))
                     for i in (1, 2) for j in "ab"},
        }[kind]  # fmt: skip
    return state


def run(comfy, lora, action: str) -> None:
    """Bake the LoRA that `lora` puts on a model, and check that no file appears."""
    folders = [comfy.base / name for name in ("output", "temp", "models")]
    before = {path for folder in folders for path in folder.rglob("*")}
    graph = Graph()
    if action == "quantize":
        model = lora(graph, graph.loader("flux.safetensors"))
        model = quantized(graph, model, exclude=KEPT)
        graph.add("TestConfig", model=model)
    else:
        model = lora(graph, graph.loader("baking-mxfp8.safetensors"))
        graph.add("MXFP8SaveModel", model=model, filename_prefix="diffusion_models/baking")
    try:
        comfy.run(graph)
    finally:
        left = {path for folder in folders for path in folder.rglob("*")}
        assert left <= before


@pytest.mark.parametrize("action", ["quantize", "save"])
@pytest.mark.parametrize("kind", ["width", "rank", "diff", "oft", "loha"])
def test_a_lora_that_does_not_fit(comfy, kind, action):
    path = comfy.base / "models" / "loras" / f"baking-{kind}.safetensors"
    save_file(wrong(kind), path)

    def lora(graph, model):
        return graph.add(
            "LoraLoaderModelOnly", model=model, lora_name=path.name, strength_model=1.0
        )

    shapes = r"tensors \[.* do not fit the shape \[128, 128\]"
    named = rf"into 6 of its weights: '{LAYER}.weight' \({shapes}\).*and 2 more; "
    with pytest.raises(PromptError, match=named):
        run(comfy, lora, action)


def test_a_lora_on_a_quantized_model_is_for_save_model(comfy):
    path = comfy.base / "models" / "loras" / "baking-fits.safetensors"
    save_file(adapters(LAYER, (128, 128)), path)
    graph = Graph()
    model = graph.add(
        "LoraLoaderModelOnly",
        model=graph.loader("baking-mxfp8.safetensors"),
        lora_name=path.name,
        strength_model=1.0,
    )
    graph.add("TestConfig", model=quantized(graph, model))
    with pytest.raises(PromptError, match=r"already quantized as MXFP8 .*, use Save Model"):
        comfy.run(graph)


@pytest.mark.parametrize("action", ["quantize", "save"])
@pytest.mark.parametrize("layer", [LAYER, KEPT])
def test_memory_that_runs_out_in_an_adapter(comfy, action, layer):
    def lora(graph, model):
        key = f"diffusion_model.{layer}.weight"
        return graph.add("TestLora", model=model, key=key, how="memory")

    with pytest.raises(PromptError, match="out of memory"):
        run(comfy, lora, action)


def test_a_weight_that_its_lora_makes_too_large_for_its_dtype(comfy):
    def lora(graph, model):
        model = graph.add("TestClone", model=model, how="force_deepcopy")
        return graph.add("TestLora", model=model, key=f"diffusion_model.{KEPT}.weight", how="large")

    with pytest.raises(PromptError, match=rf"'{KEPT}.weight' \(it gets too large for FP16\)"):
        run(comfy, lora, "save")


def test_a_lora_for_some_layers_is_baked_in(comfy):
    path = comfy.base / "models" / "loras" / "baking-some.safetensors"
    lora = adapters(LAYER, (128, 128)) | adapters(KEPT, (64, 128))
    save_file(lora | adapters("of.another.model", (8, 8)), path)
    graph = Graph()
    model = graph.add(
        "LoraLoaderModelOnly", model=graph.loader("flux.safetensors"), lora_name=path.name,
        strength_model=0.5,
    )  # fmt: skip
    saving = graph.add(
        "MXFP8SaveModel",
        model=quantized(graph, model, exclude=KEPT),
        filename_prefix="diffusion_models/some",
    )
    name = comfy.run(graph)[saving[0]]["text"][0].split(":")[0]
    saved = load_file(comfy.base / "output" / "diffusion_models" / name)
    weights = load_file(comfy.base / "models" / "diffusion_models" / "flux.safetensors")
    for layer in (LAYER, KEPT):
        up, down = (lora[f"diffusion_model.{layer}.lora_{x}.weight"] for x in ("up", "down"))
        wanted = weights[f"{layer}.weight"].float() + 0.5 * up @ down
        if layer == KEPT:
            assert torch.equal(saved[f"{layer}.weight"], wanted)
            continue
        qdata, scale = kernels.quantize(wanted)
        assert torch.equal(saved[f"{layer}.weight"].view(torch.uint8), qdata.view(torch.uint8))
        assert torch.equal(saved[f"{layer}.weight_scale"], scale)


def test_a_lora_that_fits_logs_no_error(comfy):
    """OFT looks at values, so that it cannot be tried on shapes alone, and its error is no news."""
    path = comfy.base / "models" / "loras" / "baking-oft-fits.safetensors"
    key = f"diffusion_model.{LAYER}"
    save_file({f"{key}.oft_blocks": torch.zeros(16, 8, 8), f"{key}.alpha": torch.ones(())}, path)
    logged = comfy.log.stat().st_size
    graph = Graph()
    model = graph.add(
        "LoraLoaderModelOnly", model=graph.loader("flux.safetensors"), lora_name=path.name,
        strength_model=1.0,
    )  # fmt: skip
    graph.add("TestConfig", model=quantized(graph, model))
    comfy.run(graph)
    new = comfy.log.read_bytes()[logged:].decode(errors="replace")
    assert "MXFP8: " in new and "ERROR" not in new


def test_a_warning_of_another_pack_is_no_error_of_stock(comfy):
    graph = Graph()
    key = f"diffusion_model.{LAYER}.weight"
    model = graph.add("TestLora", model=graph.loader("flux.safetensors"), key=key, how="warning")
    graph.add("TestConfig", model=quantized(graph, model))
    comfy.run(graph)


@pytest.mark.parametrize("action", ["save", "quantize the rest"])
def test_a_layer_in_another_format_is_saved_as_it_is(comfy, action):
    """FP8's scale of a tensor has no dimensions."""
    folder = comfy.base / "models" / "diffusion_models"
    state = load_file(folder / "flux.safetensors")
    weight = state[f"{LAYER}.weight"].float()
    scale = weight.abs().max() / 448
    marker = bytearray(b'{"format": "float8_e4m3fn"}')
    stored = {
        f"{LAYER}.weight": (weight / scale).to(torch.float8_e4m3fn),
        f"{LAYER}.weight_scale": scale,
        f"{LAYER}.comfy_quant": torch.frombuffer(marker, dtype=torch.uint8),
    }
    save_file({**state, **stored}, folder / "baking-fp8.safetensors")
    graph = Graph()
    model = graph.loader("baking-fp8.safetensors")
    if action != "save":
        model = quantized(graph, model, exclude=re.escape(LAYER))
    saving = graph.add("MXFP8SaveModel", model=model, filename_prefix="diffusion_models/fp8")
    name = comfy.run(graph)[saving[0]]["text"][0].split(":")[0]
    saved = load_file(comfy.base / "output" / "diffusion_models" / name)
    for part in ("weight", "weight_scale"):
        assert torch.equal(saved[f"{LAYER}.{part}"].float(), stored[f"{LAYER}.{part}"].float())
    formats = Counter(
        json.loads(bytes(value.tolist()))["format"]
        for key, value in saved.items()
        if key.endswith(".comfy_quant")
    )
    assert formats == {"float8_e4m3fn": 1, **({"mxfp8": 12} if action != "save" else {})}


def test_a_layer_in_another_format_is_not_quantized_again(comfy):
    graph = Graph()
    graph.add("TestConfig", model=quantized(graph, graph.loader("baking-fp8.safetensors")))
    with pytest.raises(PromptError, match=rf"already quantized as .*FP8.*'{LAYER}'.*or exclude"):
        comfy.run(graph)
