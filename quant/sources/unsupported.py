"""What cannot become MXFP8: files of other kinds, and models that are quantized already.

All are recognized by content, since names can be wrong: files of other formats by their first
bytes, LoRAs, ControlNets, VAEs and the like by a tensor that only they have, quantized models by
markers, dtypes and the tensors that other quantizers put beside a weight. Quantizing codes as if
they were weights makes a file that loads and is silently wrong. Rejected: decoding the known
formats first, which would pass off their loss as that of a new original.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..container.header import FormatError, parse_object, quoted
from ..format import MARKER, PREFIXES, SCALE, WEIGHT, header_markers

if TYPE_CHECKING:
    from .file import Source

_ORIGINAL = "convert the BF16, FP16 or FP32 original"
_TAKE = f"{_ORIGINAL}, as .safetensors"
_START = 512  # bytes that show the kind of a file

# First bytes -> the kind of file, and what to do.
_TORCH = "which can run code when read: take the model as .safetensors"
_KINDS = {
    rb"GGUF": f"a GGUF file, quantized already; {_TAKE}",
    rb"GGML|ggml|lmgg|tjgg|fmgg": f"a GGML file, quantized already; {_TAKE}",
    rb"PK\x03\x04": f"a zip archive, such as a .ckpt, .pt, .pth or .bin of torch, {_TORCH}",
    rb"\x80[\x02-\x05][^\0]": f"a pickle, such as an old .ckpt, .pt or .bin, {_TORCH}",
    rb"\x08[\x01-\x20][\x12\x1a\x22\x2a\x32\x3a\x42]": f"an ONNX file; {_TAKE}",
    rb"\x89HDF\r\n": f"an HDF5 file (.h5); {_TAKE}",
    rb"\x93NUMPY": f"a NumPy array (.npy); {_TAKE}",
    rb"\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd": "an archive; unpack it first",
    rb".{257}ustar": "an archive; unpack it first",
    rb"version https://git-lfs": "a Git LFS pointer, not the model; fetch it with git lfs pull",
    rb"\s*<(!DOCTYPE|!doctype|html|HTML|\?xml)": "a web page, not a model; download it again",
    rb"\s*\{\s*[\"}]": "a JSON file; give the model, or the index of its parts",
    rb"\0{512}": "zeros where the header should be; the download is not complete",
}

_FORMATS = {
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "float8_e4m3fn": "scaled FP8 (E4M3)",
    "float8_e5m2": "scaled FP8 (E5M2)",
    "int8_tensorwise": "INT8",
    "convrot_w4a4": "INT4 with ConvRot",
}
SCALED_FP8 = "scaled FP8"  # of a whole model, which one tensor says
# Tensors that only a quantized model has, by their names.
_TRACES = {
    r"\.quant_state\.bitsandbytes__nf4$": "NF4 (bitsandbytes)",
    r"\.quant_state\.bitsandbytes__fp4$": "FP4 (bitsandbytes)",
    r"\.weight\.(absmax|quant_map)$": "4 bits (bitsandbytes)",
    r"\.(SCB|weight_format)$": "INT8 (bitsandbytes)",
    r"\.wscales$": "SVDQuant (Nunchaku)",
    r"\.(qweight|qzeros)$": "GPTQ or AWQ",
    r"\.W_q$": "HQQ",
    r"\.weight\._data$": "Quanto",
    r"\.weight_packed$": "compressed-tensors",
    r"\.weight_scale_2$": "NVFP4",
    r"\.weight_scale_inv$": "block-scaled FP8",
    r"(^|\.)scaled_fp8$": SCALED_FP8,
}
_CODES = {
    "F8_E4M3": "FP8 (E4M3)",
    "F8_E5M2": "FP8 (E5M2)",
    "F8_E8M0": "E8M0 scales",
    "F6_E2M3": "FP6 (E2M3)",
    "F6_E3M2": "FP6 (E3M2)",
    "F4": "FP4",
    "I8": "INT8",
    "U8": "packed integers",
}


def check_file(path: Path) -> None:
    """Raise FormatError if a file is of another known kind than safetensors.

    What is not a file at all, or of no known kind, is left to the reader of the header.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(_START)
    # A safetensors file begins with its header's length, 8 bytes of any content, and "{".
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32:
        return
    for pattern, text in _KINDS.items():
        if re.match(pattern, start, re.DOTALL):
            raise FormatError(f"{path.name}: not a safetensors file but {text}")


_LORA = re.compile(
    r"(^|[._])lora_(up|down|A|B)(\.(\w+\.)?weight)?$"
    r"|[._](\w*_)?loras?\d*(_linear_layer)?\.(up|down)\.weight$"
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
    return next(filter(_LORA.search, keys), None)


def check_no_lora(source: Source) -> None:
    """Raise FormatError if a source is a LoRA."""
    lora = find_lora(source.tensors)
    if lora is not None:
        raise FormatError(
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
    """Raise FormatError if a source is no model, naming what it is; as `find_kind`."""
    found = find_kind(source.tensors, recognized)
    if found is not None:
        kind, key = found
        raise FormatError(
            f"{source.name}: {kind}, not a diffusion model or text encoder ({quoted(key)}); "
            "ComfyUI runs it only unquantized: use the file as it is"
        )


def _first(pattern: str, keys: Iterable[str]) -> str | None:
    return next(filter(re.compile(pattern).fullmatch, keys), None)


@dataclass(frozen=True)
class Quantized:
    """Evidence that a layer is quantized: its name, the format, and what shows it."""

    layer: str
    format: str
    evidence: str

    def error(self, source: Source, remedy: str = "") -> FormatError:
        advice = _ORIGINAL + remedy
        if self.format == "MXFP8" and not self.evidence.endswith("says so"):
            advice = "its markers are missing, and `mxfp8 repair` puts them back"
        return FormatError(
            f"{source.name}: already quantized as {self.format} ({self.evidence}); {advice}"
        )


def check_unquantized(source: Source, copied: Callable[[str], bool] = lambda layer: False) -> None:
    """Raise FormatError if a layer is quantized, naming format and evidence.

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
        yield Quantized(layer, _marked(conf), f"the header's marker of {quoted(name)} says so")
    for key in tensors:
        if key.endswith(MARKER):
            conf = _read_marker(source, key)
            layer = key.removesuffix(MARKER)
            yield Quantized(layer, _marked(conf), f"the marker {quoted(key)} says so")
    yield from unmarked(tensors)


def unmarked(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Iterator[Quantized]:
    """What dtypes and the tensors beside weights show, as `quantized`."""
    for key, (dtype, shape) in tensors.items():
        if dtype == "F8_E4M3" and _scale(tensors, key) in ("U8", "F8_E8M0"):
            evidence = f"{quoted(key)} is {dtype} {list(shape)} with MXFP8 scales"
            yield Quantized(key.removesuffix(WEIGHT), "MXFP8", evidence)
    for pattern, what in _TRACES.items():
        for key in tensors:
            if match := re.search(pattern, key):
                layer = key[: match.start()].removesuffix(WEIGHT)
                yield Quantized(layer, what, f"{quoted(key)} is there")
    for key, (dtype, shape) in tensors.items():
        evidence = f"{quoted(key)} is {dtype} {list(shape)}"
        if key.endswith(WEIGHT) and len(shape) > 1 and dtype in _CODES:
            what = _codes(dtype, _scale(tensors, key))
            yield Quantized(key.removesuffix(WEIGHT), what, evidence)
    for key, (dtype, shape) in tensors.items():
        if dtype.startswith(("F8_", "F6_", "F4")):
            evidence = f"{quoted(key)} is {dtype} {list(shape)}"
            yield Quantized(key.removesuffix(WEIGHT), _CODES[dtype], evidence)


def _scale(tensors: Mapping[str, tuple[str, tuple[int, ...]]], key: str) -> str | None:
    """The dtype of the scales beside a weight."""
    layer = key.removesuffix(WEIGHT)
    names = (layer + SCALE, layer + ".scale_weight") if key.endswith(WEIGHT) else ()
    return next((tensors[name][0] for name in names if name in tensors), None)


def _codes(dtype: str, scale: str | None) -> str:
    """The format of codes, by their dtype and that of the scales beside them."""
    if dtype == "U8" and scale == "F8_E4M3":
        return "NVFP4"
    scaled = dtype.startswith("F8_") and scale is not None
    return f"scaled {_CODES[dtype]}" if scaled else _CODES[dtype]


def _marked(conf: Mapping) -> str:
    name = conf.get("format")
    if name == "int8_tensorwise" and conf.get("convrot"):
        return "INT8 with ConvRot"
    return _FORMATS.get(name, quoted(name)) if isinstance(name, str) else "an unnamed format"


def _read_marker(source: Source, key: str) -> dict:
    try:
        return parse_object(key, bytes(next(source.pieces(key), b"")))  # no marker has two pieces
    except FormatError:
        return {}
