"""What cannot become MXFP8: files of other kinds, and models that are quantized already.

All are recognized by content, since names can be wrong: files of other formats by their first
bytes, LoRAs, ControlNets, VAEs and the like by a tensor that only they have, quantized models by
markers, dtypes and the tensors that other quantizers put beside a weight. `formats` has a row for
each. Quantizing codes as if they were weights makes a file that loads and is silently wrong.
Rejected: decoding the known formats first, which would pass off their loss as that of a new
original.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..container.header import FormatError, parse_object, quoted, reading
from ..format import MARKER, PREFIXES, WEIGHT, header_markers
from . import formats
from .formats import FORMATS, FileKind, Format

if TYPE_CHECKING:
    from .file import Source

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # key -> dtype, shape


class NothingToConvertError(FormatError):
    """A sound file that is no model to convert: a LoRA, another part, or quantized already."""


_ORIGINAL = "convert the BF16, FP16 or FP32 original"
SCALED_FP8 = next(row.name for row in FORMATS if row.whole)  # of a model, which one tensor says


def check_file(path: Path) -> None:
    """Raise FormatError if a file is of another known kind than safetensors.

    What is not a file at all, or of no known kind, is left to the reader of the header.
    """
    kind = kind_of(path)
    if kind is not None:
        raise FormatError(f"{path.name}: not a safetensors file but {kind.text}")


def kind_of(path: Path) -> FileKind | None:
    """The kind of a file that is no safetensors file; None if it is one, or unknown, or none."""
    if not path.is_file():
        return None
    with reading(path) as file:
        return formats.file_kind(file.read(formats.START))


_LORA = re.compile(
    r"(^|[._])lora_(up|down|A|B)(\.(\w+\.)?weight)?$"
    r"|[._]loras?\d*(_linear_layer)?\.(up|down)\.weight$"
    r"|\.(hada_[wt][12](_[ab])?|lokr_[wt][12](_[ab])?|oft_(blocks|diag|R)|dora_scale|on_input"
    r"|diff(_b)?|set_weight|[wb]_norm|[ab][12]\.weight)$"
)
_CONTROLNET = "a ControlNet"
# Files that are no model to quantize -> expressions for a tensor that only they have. Parts of a
# checkpoint have prefixes, so none of these is found in one that merely contains such a part.
_NO_MODELS = {
    _CONTROLNET: (
        r"controlnet_(cond_embedding\.conv_in|blocks\.0(\.linear|\.y_rms)?|x_embedder"
        r"|patch_embedding)\.weight",
        r"(model\.)?(control_model\.)?(zero_convs\.0\.0|input_hint_block\.0)\.weight",
        r"control_blocks\.0\.after_proj\.weight|control_(img_in|all_x_embedder\.2-1)\.weight",
        r"after_proj_list\.18\.bias|lora_controlnet|lllite_.*",
    ),
    "a T2I-Adapter": (
        r"(adapter\.)?body\.0\.(in_conv|block[12]|resnets\.0\.block1)\.weight",
        r"backbone\.(0\.0|10\.blocks\.0)\.weight",
    ),
    "an IP-Adapter": (
        r"ip_adapter\..*|image_proj\..*|ip_adapter_proj_model\..*|pulid_(ca|encoder)\..*",
        r"(double|single)_blocks\.\d+\.processor\.ip_adapter_.*",
        r"id_encoder\..*",
    ),
    "a style model": (r"redux_(up|down)\.weight|style_embedding",),
    "a motion module (AnimateDiff)": (r"(module\.)?(down|up|mid)_blocks?\..*motion_modules\..*",),
    "a GLIGEN model": (r"position_net\..*|(in|out)put_blocks\..*\.fuser\.linear\.weight",),
    "a model patch": (r"feature_embedder\.mid_layer_norm\.bias|audio_proj\.proj1\.weight",),
    "an embedding (textual inversion)": (r"emb_params|string_to_param\..*|clip_[lg]|t5xxl",),
    "a CLIP vision model": (
        r"vision_model\.encoder\.layers\.0\.layer_norm1\.weight",
        r"visual\.transformer\.resblocks\.0\.attn\.in_proj_weight",
        r"encoder\.layer\.0\.layer_scale2\.lambda1|layer\.0\.mlp\.gate_proj\.weight",
    ),
    "an audio encoder": (
        r"(wav2vec2\.)?encoder\.layers\.0\.final_layer_norm\.bias",
        r"(model\.)?encoder\.embed_positions\.weight",
    ),
    "an upscaler": (
        r"((params(_ema)?|module)\.)?(conv_first|ft_layers\.0\.linear1)\.weight",
        r"model\.1\.sub\.0\..*|body\.0\.rdb1\..*|((params(_ema)?|module)\.)?stylegan_decoder\..*",
    ),
    "a latent upscaler": (
        r"blocks\.0\.block\.0\.conv\.weight|up\.0\.block\.0\.conv1\.conv\.weight",
        r"post_upsample_res_blocks\.0\.conv2\.bias",
    ),
    "a depth model": (r"encoder\.output_projections\.0\.weight|head\.upsample_blocks\..*",),
    "a background removal model": (r"bb\.layers\.\d+\.blocks\.0\.attn\.relative_position.*",),
    "a VAE": (
        r"(decoder|encoder)\.conv_in(\.conv)?\.weight",
        r"(post_quant_conv|taesd_decoder\.1|vquantizer\.codebook)\.weight",
        r"decoder\.(layers\.1\.layers\.0\.beta|middle\.0\.residual\.0\.gamma"
        r"|layers\.3\.transformers\.0\.pre_norm\.alpha|transformer_blocks\.0\.scale1"
        r"|up_blocks\.0\.res(nets|_blocks)\.0\..*|unpatcher3d\.wavelets)",
        r"geo_decoder\.cross_attn_decoder\.ln_1\.bias|vocoder\..*",
        r"student\.dconv_encoder\.proj_out\.weight|pre_block\.attn\.zero_k_bias"
        r"|gs\.base_offset_scale",
        r"((decoder|encoder)\.)?blocks\.2\.blocks\.3\.stack\.5\.weight",
    ),
}
# A file that holds a diffusion model may hold such parts as well, but a ControlNet has layers of
# that model itself.
_CHECKPOINT = re.compile(r"model\.diffusion_model\.(?!project_modules\.)")
_UNLESS = {
    "a CLIP vision model": r"(model\.)?(language_model\.)?layers\..*|text_model\..*",
    "a model patch": r"head\.modulation",
}


def find_lora(keys: Iterable[str]) -> str | None:
    """A key that only LoRAs have, or None."""
    keys = list(keys)
    if any(key.endswith(".qweight") for key in keys):  # Nunchaku names its low-rank branch so
        return None
    return next(filter(_LORA.search, keys), None)


def check_no_lora(source: Source) -> None:
    """Raise NothingToConvertError if a source is a LoRA."""
    lora = find_lora(source.tensors)
    if lora is not None:
        raise NothingToConvertError(
            f"{source.name}: a LoRA, not a model ({quoted(lora)}); a LoRA needs no conversion: "
            "load it on an MXFP8 or any other model"
        )


def find_kind(keys: Collection[str], recognized: bool) -> tuple[str, str] | None:
    """What a file with these keys is, if no model and no LoRA, and the key that shows it, or None.

    Args:
        recognized: whether they show the architecture of a diffusion model.
    """
    if any(map(_CHECKPOINT.match, keys)):
        return None
    for kind in (_CONTROLNET,) if recognized else _NO_MODELS:
        key = _first("|".join(_NO_MODELS[kind]), keys)
        if key is not None and _first(_UNLESS.get(kind, "$."), keys) is None:
            return kind, key
    return None


def check_kind(source: Source, recognized: bool) -> None:
    """Raise NothingToConvertError if a source is no model, naming what it is; as `find_kind`."""
    found = find_kind(source.tensors, recognized)
    if found is not None:
        kind, key = found
        raise NothingToConvertError(
            f"{source.name}: {kind}, not a diffusion model or text encoder ({quoted(key)}); "
            "ComfyUI runs it only unquantized: use the file as it is"
        )


def _first(pattern: str, keys: Iterable[str]) -> str | None:
    return next(filter(re.compile(pattern).fullmatch, keys), None)


@dataclass(frozen=True)
class Quantized:
    """Evidence that a layer is quantized: its name, the format, what shows it, and its codes."""

    layer: str
    format: str
    evidence: str
    codes: str

    def error(self, source: Source, remedy: str = "") -> NothingToConvertError:
        advice = _ORIGINAL + remedy
        if self.format == "MXFP8" and not self.evidence.endswith("says so"):
            advice = "its markers are missing, and `mxfp8 repair` puts them back"
        return NothingToConvertError(
            f"{source.name}: already quantized as {self.format} ({self.evidence}); {advice}"
        )


def check_unquantized(source: Source, copied: Callable[[str], bool] = lambda layer: False) -> None:
    """Raise NothingToConvertError if a layer is quantized, naming format and evidence.

    Args:
        copied: whether a layer does not count, because its bytes stay as they are.
    """
    for found in quantized(source):
        if not copied(found.layer):
            raise found.error(source)


def quantized(source: Source) -> Iterator[Quantized]:
    """What is quantized in a source, most telling first; a layer may come more than once."""
    tensors = source.tensors
    for name, conf in header_markers(source.name, source.metadata).items():
        layer = next((p + name for p in ("", *PREFIXES) if p + name + WEIGHT in tensors), name)
        evidence = f"the header's marker of {quoted(name)} says so"
        yield Quantized(layer, _marked(conf), evidence, layer + WEIGHT)
    for key in tensors:
        if key.endswith(MARKER):
            conf = _read_marker(source, key)
            layer = key.removesuffix(MARKER)
            evidence = f"the marker {quoted(key)} says so"
            yield Quantized(layer, _marked(conf), evidence, layer + WEIGHT)
    yield from unmarked(tensors)


def unmarked(tensors: Tensors) -> Iterator[Quantized]:
    """What dtypes and the tensors beside weights show, as `quantized`."""
    ways = [(row, way, next(iter(way))) for row in FORMATS for way in row.tensors]
    layers: dict[str, list[str]] = {first: [] for _, _, first in ways}
    for key in tensors:
        for first, found in layers.items():
            if key.endswith(first) and (key == first or key[-len(first) - 1] == "."):
                found.append(key[: -len(first)].removesuffix("."))
    seen = set()  # names of layers, and of tensors of codes
    for row, way, first in ways:
        for layer in layers[first]:
            if _fits(row, way, layer, tensors):
                seen |= {layer, _join(layer, first)}
                yield Quantized(
                    layer, row.name, _evidence(way, layer, tensors), _join(layer, first)
                )
    for key, (dtype, shape) in tensors.items():
        layer = key.rpartition(".")[0]
        if (
            dtype.startswith(("F8_", "F6_", "F4"))
            and key not in seen
            and not (layer and layer in seen)
        ):
            evidence = f"{quoted(key)} is {dtype} {list(shape)}"
            yield Quantized(key.removesuffix(WEIGHT), _PLAIN[dtype], evidence, key)


# Dtype -> the format whose codes have it and nothing beside them.
_PLAIN = {
    way["weight"]: row.name
    for row in FORMATS
    for way in row.tensors
    if len(way) == 1 and "weight" in way
}


def _fits(row: Format, way: Mapping[str, str], layer: str, tensors: Tensors) -> bool:
    """Whether a layer has the tensors by which a row is recognized in one way."""
    found = [tensors.get(_join(layer, name)) for name in way]
    for info, dtypes in zip(found, way.values(), strict=True):
        if info is None or (dtypes and info[0] not in dtypes.split()):
            return False
    if "weight" in way and len(found[0][1]) < 2:
        return False
    if row.words is None:
        return True
    codes, scales = (shape[-1] if shape else 0 for _, shape in found)
    return codes == row.words * scales


def _join(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def _evidence(way: Mapping[str, str], layer: str, tensors: Tensors) -> str:
    first, *others = (_join(layer, name) for name in way)
    if "weight" not in way:
        return f"{quoted(first)} is there"
    dtype, shape = tensors[first]
    beside = "".join(f", beside {quoted(name)}" for name in others)
    return f"{quoted(first)} is {dtype} {list(shape)}{beside}"


def _marked(conf: Mapping) -> str:
    row, name = formats.marked(conf), conf.get("format")
    return row.name if row else quoted(name) if isinstance(name, str) else "an unnamed format"


def _read_marker(source: Source, key: str) -> dict:
    try:
        return parse_object(key, bytes(next(source.pieces(key), b"")))  # no marker has two pieces
    except FormatError:
        return {}
