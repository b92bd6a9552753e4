"""Models whose tensors have the diffusers library's names.

ComfyUI reads some of them: it renames the tensors while it loads, joins q, k and v into one, and
leaves scales and markers where they are, so an MXFP8 file with such names would silently run raw
codes. So tensors get ComfyUI's own names here, before they are quantized. MXFP8 blocks run along K,
so the stacked rows of q, k and v become the same bytes as a tensor that was joined before.

A table for each model says what ComfyUI's layers are made of. A model without a table whose tensors
ComfyUI would rename is refused. Models with the same names in both (Qwen-Image) need nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..container.header import FormatError, quoted
from ..format import PREFIXES
from .file import Part

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # key -> (dtype, shape)

_NUMBERED = re.compile(r"^([a-z_]+)\.(\d+)\.(.+)$")  # block list, number, layer
_OUTSIDE = ("", "")  # of any block


@dataclass(frozen=True)
class _Names:
    """The names of one model's layers in ComfyUI and in diffusers.

    Attributes:
        signature: keys that only this model has under diffusers' names.
        layers: (ComfyUI's block list, diffusers') -> ComfyUI's layer -> diffusers' layers, whose
            rows are stacked.
        halved: ComfyUI's layers whose two halves, shift and scale, are swapped in diffusers.
        scales: ComfyUI's layers whose weight is called "scale".
        parameters: tensors outside of layers, with the same name in both.
    """

    model: str
    signature: tuple[str, ...]
    layers: Mapping[tuple[str, str], Mapping[str, str]]
    halved: frozenset[str] = frozenset()
    scales: frozenset[str] = frozenset()
    parameters: frozenset[str] = frozenset()


_DOUBLE = ("double_blocks", "transformer_blocks")
_SINGLE = ("single_blocks", "single_transformer_blocks")
_FLUX_DOUBLE = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_attn.proj": "attn.to_add_out",
}
_FLUX_SINGLE = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
_FLUX_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_FLUX_SCALES = frozenset(
    f"{part}norm.{kind}_norm"
    for part in ("img_attn.", "txt_attn.", "")
    for kind in ("query", "key")
)
_HALVED = frozenset({"final_layer.adaLN_modulation.1"})


def _embedder(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.in_layer": f"{theirs}.linear_1", f"{ours}.out_layer": f"{theirs}.linear_2"}


def _same(layers: str) -> dict[str, str]:
    return {layer: layer for layer in layers.split()}


_TABLES = (
    _Names(
        "Flux",
        ("x_embedder.weight", "transformer_blocks.0.norm1_context.linear.weight"),
        {
            _DOUBLE: {
                **_FLUX_DOUBLE,
                "img_mod.lin": "norm1.linear",
                "txt_mod.lin": "norm1_context.linear",
                "img_mlp.0": "ff.net.0.proj",
                "img_mlp.2": "ff.net.2",
                "txt_mlp.0": "ff_context.net.0.proj",
                "txt_mlp.2": "ff_context.net.2",
            },
            _SINGLE: {
                **_FLUX_SINGLE,
                "modulation.lin": "norm.linear",
                "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
                "linear2": "proj_out",
            },
            _OUTSIDE: {
                **_FLUX_OUTSIDE,
                **_embedder("time_in", "time_text_embed.timestep_embedder"),
                **_embedder("vector_in", "time_text_embed.text_embedder"),
                **_embedder("guidance_in", "time_text_embed.guidance_embedder"),
            },
        },
        halved=_HALVED,
        scales=_FLUX_SCALES,
    ),
    _Names(
        "Flux.2",
        ("x_embedder.weight", "double_stream_modulation_img.linear.weight"),
        {
            _DOUBLE: {
                **_FLUX_DOUBLE,
                "img_mlp.0": "ff.linear_in",
                "img_mlp.2": "ff.linear_out",
                "txt_mlp.0": "ff_context.linear_in",
                "txt_mlp.2": "ff_context.linear_out",
            },
            _SINGLE: {
                **_FLUX_SINGLE,
                "linear1": "attn.to_qkv_mlp_proj",
                "linear2": "attn.to_out",
            },
            _OUTSIDE: {
                **_FLUX_OUTSIDE,
                "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
                "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
                "single_stream_modulation.lin": "single_stream_modulation.linear",
                **_embedder("time_in", "time_guidance_embed.timestep_embedder"),
                **_embedder("guidance_in", "time_guidance_embed.guidance_embedder"),
            },
        },
        halved=_HALVED,
        scales=_FLUX_SCALES,
    ),
    _Names(
        "Z-Image",
        ("noise_refiner.0.attention.norm_k.weight", "noise_refiner.0.attention.to_k.weight"),
        {
            **{
                (blocks, blocks): {
                    "attention.qkv": "attention.to_q attention.to_k attention.to_v",
                    "attention.out": "attention.to_out.0",
                    "attention.q_norm": "attention.norm_q",
                    "attention.k_norm": "attention.norm_k",
                    **_same("attention_norm1 attention_norm2 ffn_norm1 ffn_norm2"),
                    **_same("feed_forward.w1 feed_forward.w2 feed_forward.w3 adaLN_modulation.0"),
                }
                for blocks in ("layers", "noise_refiner", "context_refiner", "siglip_refiner")
            },
            _OUTSIDE: {
                "x_embedder": "all_x_embedder.2-1",
                "final_layer.linear": "all_final_layer.2-1.linear",
                "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
                **_same("t_embedder.mlp.0 t_embedder.mlp.2 cap_embedder.0 cap_embedder.1"),
                **_same("siglip_embedder.0 siglip_embedder.1"),
            },
        },
        parameters=frozenset({"x_pad_token", "cap_pad_token", "siglip_pad_token"}),
    ),
)

_RENAMED = "ComfyUI renames its tensors while loading and would run MXFP8 codes raw"
_UNKNOWN = "ComfyUI cannot read these names"
_INSTEAD = "convert the model's file for ComfyUI, or the one by its authors"
# Models that are rejected: name -> the reason, and expressions that must each match a key.
_UNSUPPORTED = {
    "AuraFlow": (_RENAMED, r"^joint_transformer_blocks\.0\.attn\.add_k_proj\.weight$"),
    "PixArt": (
        _RENAMED,
        r"^adaln_single\.emb\.timestep_embedder\.linear_1\.bias$",
        r"^pos_embed\.proj\.bias$",
    ),
    "Stable Diffusion 3": (
        _RENAMED,
        r"^transformer_blocks\.0\.attn\.add_q_proj\.weight$",
        r"^pos_embed\.proj\.weight$",
    ),
    "a UNet": (_RENAMED, r"^conv_in\.weight$", r"^down_blocks\.0\."),
    "a transformer": (_RENAMED, r"^x_embedder\.weight$", r"^(single_)?transformer_blocks\.0\."),
    "Z-Image": (_RENAMED, r"^noise_refiner\.0\.attention\.norm_k\.weight$"),
    "Hunyuan Video": (
        _UNKNOWN,
        r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_1\.weight$",
    ),
    "Wan": (
        _UNKNOWN,
        r"^condition_embedder\.time_embedder\.linear_1\.weight$",
        r"^blocks\.0\.attn1\.to_q\.weight$",
    ),
    "Krea 2": (_UNKNOWN, r"^text_fusion\.projector\.weight$"),
}


def comfy_names(name: str, tensors: Tensors) -> tuple[str, dict[str, tuple[Part, ...]]] | None:
    """(model, ComfyUI's key -> parts) of a model with diffusers' names; None if names may stay.

    Args:
        name: the source's, for errors.

    Raises:
        FormatError: ComfyUI could not use the result, or part of the model is missing.
    """
    for prefix, model, known in _recognized(tensors):
        if isinstance(known, _Names):
            return model, _parts(name, tensors, prefix, known)
        raise FormatError(f"{name}: {model} with diffusers' tensor names: {known}; {_INSTEAD}")
    return None


def check_names(name: str, keys: Iterable[str]) -> None:
    """Raise FormatError if ComfyUI would rename a quantized model's tensors while loading.

    Args:
        name: the file's, for the error; keys: of its tensors.
    """
    for _, model, known in _recognized(keys):
        if known != _UNKNOWN:  # else ComfyUI itself reports that it does not know the model
            raise FormatError(
                f"{name}: MXFP8 layers of {model} with diffusers' tensor names: {_RENAMED}; "
                "convert the original again with this pack, which gives it ComfyUI's names"
            )


def has_diffusers_names(keys: Iterable[str]) -> bool:
    """Whether keys are those of a model that has other names in ComfyUI."""
    return next(_recognized(keys), None) is not None


def _recognized(keys: Iterable[str]) -> Iterator[tuple[str, str, _Names | str]]:
    """(prefix, model, its table or why it is rejected) of models with diffusers' names."""
    keys = list(keys)
    for prefix in PREFIXES:
        bare = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
        for table in _TABLES:
            if bare.issuperset(table.signature):
                yield prefix, table.model, table
        for model, (reason, *signature) in _UNSUPPORTED.items():
            if all(any(map(re.compile(sign).search, bare)) for sign in signature):
                yield prefix, model, reason


def _parts(name: str, tensors: Tensors, prefix: str, table: _Names) -> dict[str, tuple[Part, ...]]:
    """ComfyUI's key -> its parts, of a model that a table knows."""
    places = {  # (diffusers' block list, layer) -> (ComfyUI's, layer, place, of how many)
        (theirs, part): (ours, layer, place, len(parts.split()))
        for (ours, theirs), layers in table.layers.items()
        for layer, parts in layers.items()
        for place, part in enumerate(parts.split())
    }
    joined: dict[str, list[Part | None]] = {}
    for key, (_, shape) in tensors.items():
        target, place, count, halved = _place(key, prefix, table, places)
        if target is None:
            raise FormatError(
                f"{name}: {table.model} with diffusers' tensor names has no {quoted(key)}: "
                f"{_RENAMED}; {_INSTEAD}"
            )
        parts = joined.setdefault(target, [None] * count)
        if len(parts) != count or parts[place] is not None:
            raise FormatError(f"{name}: {quoted(target)} is present under two names")
        parts[place] = Part(key)
        if halved:
            if not shape or shape[0] % 2:
                raise FormatError(f"{name}: {quoted(key)} {list(shape)} has no two halves")
            half = shape[0] // 2
            parts[:] = Part(key, half, shape[0]), Part(key, 0, half)
    for target, parts in joined.items():
        if None in parts:
            raise FormatError(
                f"{name}: {quoted(target)} of {table.model} is joined from {len(parts)} tensors, "
                f"of which {parts.count(None)} are missing"
            )
    return {target: tuple(parts) for target, parts in joined.items()}


def _place(
    key: str, prefix: str, table: _Names, places: Mapping
) -> tuple[str | None, int, int, bool]:
    """(ComfyUI's key or None, which part of it, of how many, whether its halves are swapped)."""
    bare = key.removeprefix(prefix)
    if not key.startswith(prefix) or bare in table.parameters:
        return key, 0, 1, False
    numbered = _NUMBERED.match(bare)
    blocks, number, rest = numbered.groups() if numbered else ("", "", bare)
    layer, _, leaf = rest.rpartition(".")
    if (blocks, layer) not in places:
        layer, blocks = bare.rpartition(".")[0], ""
    if (blocks, layer) not in places:
        return None, 0, 0, False
    ours, target, place, count = places[blocks, layer]
    if target in table.scales and leaf == "weight":
        leaf = "scale"
    block = f"{ours}.{number}." if ours else ""
    return f"{prefix}{block}{target}.{leaf}", place, count, target in table.halved
