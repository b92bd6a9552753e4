"""LoRAs on small models of many families, named in each way that ComfyUI reads, beside the weights
and merged by stock in float32 into what those stand for.

    python tests/support/lora_families.py COMFYUI FOLDER

Prints a JSON object: family -> how far the model is from its dequantized twin without LoRAs, and
with stacks of two, each named in its own way, with an adapter of another kind on each layer.
"""

from __future__ import annotations

import json
import logging
import re

import comfyui_modules  # noqa: F401

# isort: split
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from graphs import difference
from lora_kinds import KINDS, lora_file
from model_configs import CONFIGS
from quantized_files import model as quantized_file

from mxfp8 import kernels
from mxfp8.nodes.runtime import lora
from mxfp8.nodes.runtime.patch import accelerate

HIDDEN = {"hidden_size": 128, "num_heads": 1, "depth": 1, "depth_single_blocks": 1}
# Family -> ComfyUI's class, its configuration, the inputs of its forward.
FAMILIES = {
    "SDXL": (
        "SDXL",
        {**CONFIGS["SDXL"], "model_channels": 64, "num_res_blocks": [1, 1], "channel_mult": [1, 2],
         "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
         "transformer_depth_middle": 1, "context_dim": 64, "adm_in_channels": 64,
         "num_head_channels": 64},
        {"x": (1, 4, 8, 8), "context": (1, 5, 64), "y": (1, 64)},
    ),
    "SD 3": (
        "SD3",
        {**CONFIGS["SD3"], "depth": 2, "adm_in_channels": 64, "context_size": 64,
         "context_embedder_config": {
             "target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128},
         }},
        {"x": (1, 16, 8, 8), "context": (1, 5, 64), "y": (1, 64)},
    ),
    "Flux": (
        "Flux",
        {**CONFIGS["Flux"], **HIDDEN, "context_in_dim": 64, "vec_in_dim": 64,
         "guidance_embed": True},
        {"x": (1, 16, 8, 8), "context": (1, 5, 64), "y": (1, 64), "guidance": (1,)},
    ),
    "Flux.2": (
        "Flux2", {**CONFIGS["Flux2"], **HIDDEN, "context_in_dim": 64},
        {"x": (1, 128, 4, 4), "context": (1, 5, 64), "guidance": (1,)},
    ),
    "Chroma": (
        "Chroma",
        {**CONFIGS["Chroma"], **HIDDEN, "context_in_dim": 64, "out_dim": 128, "hidden_dim": 128,
         "n_layers": 1},
        {"x": (1, 16, 8, 8), "context": (1, 5, 64), "guidance": (1,)},
    ),
    "Hunyuan Video": (
        "HunyuanVideo",
        {**CONFIGS["HunyuanVideo"], **HIDDEN, "context_in_dim": 64, "vec_in_dim": 64},
        {"x": (1, 16, 2, 4, 4), "context": (1, 5, 64), "y": (1, 64), "guidance": (1,)},
    ),
    "Wan": (
        "WAN21_T2V",
        {"dim": 128, "ffn_dim": 256, "num_heads": 1, "num_layers": 1, "in_dim": 16, "out_dim": 16,
         "text_dim": 64},
        {"x": (1, 16, 2, 4, 4), "context": (1, 5, 64)},
    ),
    "Qwen-Image": (
        "QwenImage",
        {"num_layers": 1, "num_attention_heads": 1, "joint_attention_dim": 64},
        {"x": (1, 16, 1, 4, 4), "context": (1, 5, 64)},
    ),
    "Z-Image": (
        "ZImage",
        {**CONFIGS["ZImage"], "dim": 256, "cap_feat_dim": 64, "n_heads": 2, "n_kv_heads": 2,
         "n_layers": 1, "n_refiner_layers": 1},
        {"x": (1, 16, 4, 4), "context": (1, 5, 64), "num_tokens": 5},
    ),
    "LTX": (
        "LTXV",
        {"cross_attention_dim": 128, "attention_head_dim": 32, "num_attention_heads": 4,
         "num_layers": 1, "caption_channels": 64},
        {"x": (1, 128, 2, 4, 4), "context": (1, 5, 64), "attention_mask": None},
    ),
    "Cosmos 2": (
        "CosmosT2IPredict2",
        {**CONFIGS["CosmosT2IPredict2"], "model_channels": 128, "num_blocks": 1, "num_heads": 2,
         "crossattn_emb_channels": 64, "adaln_lora_dim": 64},
        {"x": (1, 16, 1, 4, 4), "context": (1, 5, 64)},
    ),
    "PixArt": (
        "PixArtSigma",
        {**CONFIGS["PixArtSigma"], "hidden_size": 128, "depth": 1, "num_heads": 2,
         "caption_channels": 64},
        {"x": (1, 4, 64, 64), "context": (1, 5, 64)},
    ),
    "AuraFlow": (
        "AuraFlow",
        {"dim": 128, "n_layers": 2, "n_double_layers": 1, "n_heads": 1, "global_conddim": 128,
         "cond_seq_dim": 64},
        {"x": (1, 4, 8, 8), "context": (1, 5, 64)},
    ),
    "HiDream": (
        "HiDream",
        {**CONFIGS["HiDream"], "num_attention_heads": 1, "caption_channels": [64, 64],
         "llama_layers": [0, 1], "num_layers": 1, "num_single_layers": 1, "text_emb_dim": 64},
        {"x": (1, 16, 8, 8), "y": (1, 64), "context": (1, 5, 64),
         "encoder_hidden_states_llama3": (1, 2, 5, 64)},
    ),
    "Kandinsky 5": (
        "Kandinsky5",
        {"model_dim": 128, "ff_dim": 256, "time_dim": 64, "num_text_blocks": 1,
         "num_visual_blocks": 1, "visual_embed_dim": 132, "in_text_dim": 64, "in_text_dim2": 64},
        {"x": (1, 33, 2, 8, 8), "context": (1, 8, 64), "y": (1, 64)},
    ),
}  # fmt: skip

WAYS = ("diffusion_model.", "lora_unet_", "transformer.", "lycoris_", "lora_transformer_", "unet.")
SMALL_KINDS = [kind for kind in KINDS if kind not in ("diff", "diff_b", "set")]


def build(kind: str, config: dict, state: dict):
    chosen = getattr(comfy.supported_models, kind)
    settings = chosen({**chosen.unet_config, **config})
    settings.quant_config = comfy.utils.detect_layer_quantization(state, "")
    settings.set_inference_dtype(torch.float32, torch.float32 if settings.quant_config else None)
    model = settings.get_model({}, "")
    if state:
        assert not model.diffusion_model.load_state_dict(dict(state), strict=False).missing_keys
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def weights(shapes: dict) -> dict[str, torch.Tensor]:
    """Each layer's output is about as large as its input; norms near 1."""
    generator, state = torch.Generator().manual_seed(0), {}
    for key, shape in shapes.items():
        value = torch.randn(tuple(shape), generator=generator)
        if value.ndim > 1:
            value *= value[0].numel() ** -0.5
        else:
            value = 0.1 * value + ("norm" in key and key.endswith(("weight", "scale")))
        state[key] = value
    return state


def pair(kind: str, config: dict):
    """Patchers of one model, MXFP8 and dequantized, and the weights of the latter."""
    empty = build(kind, config, {}).model.diffusion_model
    plain = weights({key: value.shape for key, value in empty.state_dict().items()})
    linears = {
        name: plain[f"{name}.weight"]
        for name, module in empty.named_modules()
        if isinstance(module, torch.nn.Linear) and re.search(r"block|layers|_in\.", name)
    }
    others = {k: v for k, v in plain.items() if k.removesuffix(".weight") not in linears}
    tensors, metadata = quantized_file(linears, **others)
    tensors, _ = comfy.utils.convert_old_quants(tensors, "", metadata=metadata)
    for name, value in linears.items():
        codes, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        plain[f"{name}.weight"] = kernels.dequantize(
            codes, scale, torch.float32, tuple(value.shape)
        )
    return accelerate(build(kind, config, tensors), "exact"), build(kind, config, plain), plain


def places(model, way: str) -> dict[str, tuple]:
    """Name in a file -> (key of a weight, slice or None): each place once."""
    found = {}
    for name, target in comfy.lora.model_lora_keys_unet(model, {}).items():
        target = (target,) if isinstance(target, str) else target
        place = target[0], target[1] if len(target) > 1 else None
        if name.startswith(way) and place[0].endswith(".weight") and place not in found.values():
            found[name] = place
    return found


def file(plain: dict, places: dict[str, tuple], seed: int) -> dict[str, torch.Tensor]:
    """A LoRA file with another kind of adapter on each layer."""
    tensors, generator = {}, torch.Generator().manual_seed(seed)
    for index, (name, (key, part)) in enumerate(places.items()):
        weight = plain.get(key.removeprefix("diffusion_model."))
        if weight is None or weight.ndim not in (2, 4):
            continue
        weight = weight if part is None else weight.narrow(*part)
        if weight.ndim == 4:
            up = torch.randn(weight.shape[0], 2, 1, 1, generator=generator) * 0.1
            down = torch.randn(2, *weight.shape[1:], generator=generator)
            down /= weight[0].numel() ** 0.5
            tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
            continue
        kind = SMALL_KINDS[(index + 5 * seed) % len(SMALL_KINDS)]
        if kind in ("boft", "oft") and weight.shape[0] % 8:
            kind = "lora"
        made = lora_file({"layer.weight": weight}, kind, norm=0.05, seed=100 * seed + index)
        tensors |= {k.replace("diffusion_model.layer", name, 1): v for k, v in made.items()}
    return tensors


def run(patcher, inputs: dict) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    given = {
        name: torch.randn(shape, generator=generator) if isinstance(shape, tuple) else shape
        for name, shape in inputs.items()
    }
    comfy.model_management.load_models_gpu([patcher])
    with torch.inference_mode():
        return patcher.model.diffusion_model(given.pop("x"), torch.tensor([0.5]), **given)


def check(family: str) -> dict:
    kind, config, inputs = FAMILIES[family]
    ours, exact, plain = pair(kind, config)
    known = {way: found for way in WAYS if (found := places(exact.model, way))}
    before = run(exact, inputs)
    results = {"without": difference(run(ours, inputs), before), "stacks": []}
    for start in range(0, len(known), 2):
        patched, wanted = ours, exact
        ways = list(known)[start : start + 2]
        for seed, way in enumerate(ways):
            made = file(plain, known[way], seed)
            patched, _ = comfy.sd.load_lora_for_models(patched, None, made, 0.8, 0)
            wanted, _ = comfy.sd.load_lora_for_models(wanted, None, made, 0.8, 0)
        expected, got = run(wanted, inputs), run(patched, inputs)
        side = lora.side_branches(patched)
        patches = [patch for on_weight in patched.patches.values() for patch in on_weight]
        merged = [patched.get_model_object(key) for key in side.merged]
        results["stacks"].append({
            "ways": ways,
            "difference": difference(got, expected),
            "effect": difference(expected, before),
            "slices": sum(patch[3] is not None for patch in patches),
            "functions": sum(patch[4] is not None for patch in patches),
            "convolutions": sum(weight.ndim == 4 for weight in merged),
            "merged": [key for key, weight in zip(side.merged, merged, strict=True)
                       if weight.ndim == 2],
            "problems": [a.problem for b in side.branches.values() for a in b.applied if a.problem],
        })  # fmt: skip
    return results


def main() -> None:
    logging.disable(logging.WARNING)
    lora.DENSE_SHARE = 1  # a layer of these is a large part of its model
    with torch.no_grad():
        print(json.dumps({family: check(family) for family in FAMILIES}))


if __name__ == "__main__":
    main()
