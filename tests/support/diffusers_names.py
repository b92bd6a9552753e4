"""Small models under ComfyUI's names, and the same under diffusers'.

Written from diffusers' side, one replacement after the other, and without the package under test,
so that both directions stay independent.
"""

from __future__ import annotations

import re

import torch
from checkpoints import matrix

WIDTH = 32


def _fill(shapes) -> dict[str, torch.Tensor]:
    state = {}
    for seed, (key, shape) in enumerate(shapes.items()):
        rows, cols = shape if len(shape) == 2 else (1, *shape)
        state[key] = matrix(rows, cols, seed=seed).reshape(shape)
    return state


def _linear(name, rows, cols, bias=True):
    return {f"{name}.weight": (rows, cols)} | ({f"{name}.bias": (rows,)} if bias else {})


def zimage_state(blocks=2) -> dict[str, torch.Tensor]:
    w = WIDTH
    shapes = {
        "cap_embedder.0.weight": (48,), **_linear("cap_embedder.1", w, 48),
        "cap_pad_token": (1, w), "x_pad_token": (1, w), **_linear("x_embedder", w, 64),
        **_linear("t_embedder.mlp.0", 64, 32), **_linear("t_embedder.mlp.2", 32, 64),
        **_linear("final_layer.linear", 64, w), **_linear("final_layer.adaLN_modulation.1", w, 32),
    }  # fmt: skip
    for block in [
        f"{k}.{i}" for k in ("layers", "noise_refiner", "context_refiner") for i in range(blocks)
    ]:
        shapes |= {
            f"{block}.attention.qkv.weight": (3 * w, w), f"{block}.attention.out.weight": (w, w),
            f"{block}.attention.q_norm.weight": (16,), f"{block}.attention.k_norm.weight": (16,),
            f"{block}.feed_forward.w1.weight": (80, w), f"{block}.feed_forward.w2.weight": (w, 80),
            f"{block}.feed_forward.w3.weight": (80, w),
            f"{block}.attention_norm1.weight": (w,), f"{block}.attention_norm2.weight": (w,),
            f"{block}.ffn_norm1.weight": (w,), f"{block}.ffn_norm2.weight": (w,),
        }  # fmt: skip
        if not block.startswith("context"):
            shapes |= _linear(f"{block}.adaLN_modulation.0", 4 * w, 32)
    return _fill(shapes)


def flux_state(blocks=2) -> dict[str, torch.Tensor]:
    w = WIDTH
    shapes = {
        **_linear("img_in", w, 64), **_linear("txt_in", w, 48),
        **_linear("final_layer.linear", 64, w),
        **_linear("final_layer.adaLN_modulation.1", 2 * w, w),
    }  # fmt: skip
    for name in ("time_in", "vector_in", "guidance_in"):
        shapes |= _linear(f"{name}.in_layer", w, 64) | _linear(f"{name}.out_layer", w, w)
    for i in range(blocks):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            shapes |= {
                **_linear(f"{block}_attn.qkv", 3 * w, w), **_linear(f"{block}_attn.proj", w, w),
                **_linear(f"{block}_mlp.0", 4 * w, w), **_linear(f"{block}_mlp.2", w, 4 * w),
                **_linear(f"{block}_mod.lin", 6 * w, w),
                f"{block}_attn.norm.query_norm.scale": (16,),
                f"{block}_attn.norm.key_norm.scale": (16,),
            }  # fmt: skip
        block = f"single_blocks.{i}"
        shapes |= {
            **_linear(f"{block}.linear1", 7 * w, w), **_linear(f"{block}.linear2", w, 5 * w),
            **_linear(f"{block}.modulation.lin", 3 * w, w),
            f"{block}.norm.query_norm.scale": (16,), f"{block}.norm.key_norm.scale": (16,),
        }  # fmt: skip
    return _fill(shapes)


def flux2_state(blocks=2) -> dict[str, torch.Tensor]:
    state = {k: v for k, v in flux_state(blocks).items() if not k.endswith(".bias")}
    state = {
        k: v for k, v in state.items() if not re.search(r"vector_in|_mod\.lin|modulation\.lin", k)
    }
    for name, rows in (
        ("double_stream_modulation_img", 6),
        ("double_stream_modulation_txt", 6),
        ("single_stream_modulation", 3),
    ):
        state[f"{name}.lin.weight"] = matrix(rows * WIDTH, WIDTH, seed=rows)
    return state


MODELS = {"zimage": zimage_state, "flux": flux_state, "flux2": flux2_state}

_ZIMAGE = (
    (r"^x_embedder", "all_x_embedder.2-1"),
    (r"^final_layer", "all_final_layer.2-1"),
    (r"attention\.out\.", "attention.to_out.0."),
    (r"attention\.(q|k)_norm\.", r"attention.norm_\1."),
)
_ALL_FLUX = (
    (r"^img_in\.", "x_embedder."),
    (r"^txt_in\.", "context_embedder."),
    (r"^final_layer\.linear\.", "proj_out."),
    (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.linear."),
    (r"img_attn\.proj\.", "attn.to_out.0."),
    (r"txt_attn\.proj\.", "attn.to_add_out."),
    (r"img_attn\.norm\.query_norm\.(scale|weight)$", "attn.norm_q.weight"),
    (r"img_attn\.norm\.key_norm\.(scale|weight)$", "attn.norm_k.weight"),
    (r"txt_attn\.norm\.query_norm\.(scale|weight)$", "attn.norm_added_q.weight"),
    (r"txt_attn\.norm\.key_norm\.(scale|weight)$", "attn.norm_added_k.weight"),
    (r"(single_blocks\.\d+)\.norm\.query_norm\.(scale|weight)$", r"\1.attn.norm_q.weight"),
    (r"(single_blocks\.\d+)\.norm\.key_norm\.(scale|weight)$", r"\1.attn.norm_k.weight"),
    (r"in_layer\.", "linear_1."),
    (r"out_layer\.", "linear_2."),
    (r"^single_blocks\.", "single_transformer_blocks."),
    (r"^double_blocks\.", "transformer_blocks."),
)
_FLUX = (
    (r"^time_in\.", "time_text_embed.timestep_embedder."),
    (r"^guidance_in\.", "time_text_embed.guidance_embedder."),
    (r"^vector_in\.", "time_text_embed.text_embedder."),
    (r"img_mod\.lin\.", "norm1.linear."),
    (r"txt_mod\.lin\.", "norm1_context.linear."),
    (r"img_mlp\.0\.", "ff.net.0.proj."),
    (r"img_mlp\.2\.", "ff.net.2."),
    (r"txt_mlp\.0\.", "ff_context.net.0.proj."),
    (r"txt_mlp\.2\.", "ff_context.net.2."),
    (r"modulation\.lin\.", "norm.linear."),
    (r"linear2\.", "proj_out."),
    *_ALL_FLUX,
)
_FLUX2 = (
    (r"^time_in\.", "time_guidance_embed.timestep_embedder."),
    (r"^guidance_in\.", "time_guidance_embed.guidance_embedder."),
    (r"modulation(_img|_txt|)\.lin\.", r"modulation\1.linear."),
    (r"img_mlp\.0\.", "ff.linear_in."),
    (r"img_mlp\.2\.", "ff.linear_out."),
    (r"txt_mlp\.0\.", "ff_context.linear_in."),
    (r"txt_mlp\.2\.", "ff_context.linear_out."),
    (r"linear1\.", "attn.to_qkv_mlp_proj."),
    (r"linear2\.", "attn.to_out."),
    *_ALL_FLUX,
)
_REPLACEMENTS = {"zimage": _ZIMAGE, "flux": _FLUX, "flux2": _FLUX2}


def split_halves(tensor: torch.Tensor) -> torch.Tensor:
    """The second half of the rows before the first."""
    first, second = tensor.chunk(2)
    return torch.cat((second, first))


def rename(name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model of MODELS under diffusers' names: q, k and v apart, shift and scale exchanged."""
    result = {}
    for key, value in state.items():
        new = key
        for pattern, text in _REPLACEMENTS[name]:
            new = re.sub(pattern, text, new)
        layer, leaf = new.rsplit(".", 1) if "." in new else ("", new)
        if key.startswith("final_layer.adaLN") and name != "zimage":
            result[new] = split_halves(value)
        elif layer.endswith("qkv"):
            names = ("to_q", "to_k", "to_v")
            if "txt_attn" in layer:
                names = ("add_q_proj", "add_k_proj", "add_v_proj")
            place = re.sub(r"(img|txt)_attn", "attn", layer.removesuffix("qkv"))
            for part, rows in zip(names, value.chunk(3), strict=True):
                result[f"{place}{part}.{leaf}"] = rows.clone()
        elif layer.endswith("linear1"):  # of Flux
            width = len(value) // 7
            block = layer.removesuffix("linear1")
            for part, rows in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                                  value.split([width] * 3 + [4 * width]), strict=True):  # fmt: skip
                result[f"{block}{part}.{leaf}"] = rows.clone()
        else:
            result[new] = value
    return result
