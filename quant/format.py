"""The file format: MXFP8 layers in a safetensors file, whose header `container` reads.

Reading a header needs no torch, and checks everything that can be known without the data. The
layout, for a linear layer X of shape [N, K]:

    X.weight        F8_E4M3 [N', K']                      codes; padding is zero
    X.weight_scale  U8 [roundup(N', 128), roundup(K'/32, 4)]  E8M0 bytes, tiled order
    X.comfy_quant   U8, 1-D                               JSON {"format": "mxfp8", ...}
    __metadata__._quantization_metadata                   {"layers": {X: the same JSON}}

Files in the wild carry either marker or both. We write both, and scales always as U8: ComfyUI's
own save nodes write F8_E8M0, which its dynamic-VRAM loader cannot read. Rows may be stored without
padding, which every reader accepts; columns may not, since a block has 32.

If the two markers of a layer disagree, the file is refused, because readers differ on which one
counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ..kernels import layout
from .container.header import (
    DTYPES,
    Container,
    FormatError,
    TensorInfo,
    advising,
    is_shape,
    parse_object,
    quoted,
    read_container,
    reading,
)

__all__ = ["DTYPES", "FormatError", "Header", "Layer", "TensorInfo", "read_header"]

QUANTIZATION_METADATA = "_quantization_metadata"
MARKER = ".comfy_quant"
SCALE = ".weight_scale"
WEIGHT = ".weight"
# Key prefixes under which a diffusion model's tensors are found; PixelDiT's files have "core.".
PREFIXES = (
    "model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "core.", "model.", "",
)  # fmt: skip
MAX_MARKER = 65_536  # bytes of JSON in one layer's marker

# Formats that a marker may name in ComfyUI 0.30; all but the first are left to stock.
MXFP8 = "mxfp8"
FORMATS = (MXFP8, "float8_e4m3fn", "float8_e5m2", "nvfp4", "int8_tensorwise", "convrot_w4a4")
SCALES = ("U8", "F8_E8M0")  # dtypes of scales
AUTO = "auto"
ORDERS = (AUTO, "tiled", "row-major")  # of scales, as a user may choose
AGAIN = "get the file again, or convert its original"  # what to do about a damaged layer
# The command and the node that restore lost markers and the order of scales.
REPAIR = "`mxfp8 repair FILE NEW` or the node Repair File (MXFP8)"
FLOATS = {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}


def bare(name: str) -> str:
    """A key or a layer's name without the prefix of a diffusion model."""
    return name.removeprefix(next(p for p in PREFIXES if name.startswith(p)))


@dataclass(frozen=True)
class Layer:
    """One MXFP8 linear of a file, markers checked against tensors.

    Attributes:
        name: the key without ".weight".
        shape: unpadded (N, K); for a bank of experts, as stored, (E, N', K').
        conf: the marker's JSON, unknown fields included.
    """

    name: str
    shape: tuple[int, ...]
    weight: TensorInfo
    scale: TensorInfo
    conf: Mapping = field(repr=False)

    def holds(self, shape: Iterable[int]) -> bool:
        """Whether this can be a matrix [N, K]; without a shape in its marker, up to padding."""
        shape = tuple(shape)
        if self.conf.get("orig_shape") is not None:
            return shape == self.shape
        return len(shape) == 2 and layout.padded_shape(*shape) == layout.padded_shape(*self.shape)

    @property
    def full_precision(self) -> bool:
        """Whether the file forbids quantizing this layer's activations."""
        return bool(self.conf.get("full_precision_matrix_mult", False))


@dataclass(frozen=True)
class Header(Container):
    """A checked safetensors header and the MXFP8 layers in it."""

    @cached_property
    def markers(self) -> dict[str, dict]:
        """Layer name -> marker JSON, from the header and the marker tensors together."""
        return _read_markers(self)

    def check_layers(self, formats: Iterable[str] = FORMATS) -> None:
        """Raise FormatError unless markers, tensors and shapes of all layers agree.

        Args:
            formats: names that a marker may give.
        """
        self.check_formats(formats)
        _ = self.layers, self.experts

    def check_formats(self, formats: Iterable[str] = FORMATS) -> None:
        """Raise FormatError unless every marker gives one of these names."""
        for name, conf in self.markers.items():
            if conf["format"] not in formats:
                raise FormatError(
                    f"{self.path.name}: layer {quoted(name)} is marked as "
                    f"{quoted(conf['format'])}; formats that can be read: {', '.join(formats)}; "
                    "update ComfyUI, or convert the file's original"
                )

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The file's MXFP8 linears by name, in the order of their weights."""
        return self._layers_of(_layer, banks=False)

    @cached_property
    def experts(self) -> dict[str, Layer]:
        """Banks of MXFP8 experts, 3-D, which are left to stock."""
        return self._layers_of(_bank, banks=True)

    def _layers_of(self, read: Callable[..., Layer], banks: bool) -> dict[str, Layer]:
        with advising(AGAIN):
            layers = [
                read(self, name, conf)
                for name, conf in self.markers.items()
                if conf["format"] == MXFP8 and ("num_experts" in conf) == banks
            ]
        return {layer.name: layer for layer in sorted(layers, key=lambda x: x.weight.begin)}


def read_header(path: str | os.PathLike) -> Header:
    """Read and check the header of a safetensors file; errors as for `read_container`."""
    return read_container(path, Header)


def header_markers(file: str, metadata: Mapping[str, str]) -> dict[str, dict]:
    """Layer name -> marker JSON, from a file's metadata alone.

    Raises:
        FormatError: the entry is malformed.
    """
    text = metadata.get(QUANTIZATION_METADATA)
    if text is None:
        return {}
    with advising(AGAIN):
        layers = parse_object(f"{file}: {QUANTIZATION_METADATA}", text).get("layers")
        if not isinstance(layers, dict):
            raise FormatError(f"{file}: {QUANTIZATION_METADATA} has no object 'layers'")
        return {
            name: _check_marker(f"{file}: header marker of {quoted(name)}", conf)
            for name, conf in layers.items()
        }


def _read_markers(header: Header) -> dict[str, dict]:
    path = header.path
    markers: dict[str, dict] = {}
    inside = header_markers(path.name, header.metadata)
    tensors = [t for t in header.tensors.values() if t.name.endswith(MARKER)]
    with reading(path) as file, advising(AGAIN):
        for name, conf in inside.items():
            _add_marker(markers, full_name(header, name), conf, f"{path.name}: header marker of")
        for tensor in tensors:
            where = f"{path.name}: {quoted(tensor.name)}"
            if tensor.dtype != "U8" or len(tensor.shape) != 1 or tensor.nbytes > MAX_MARKER:
                raise FormatError(
                    f"{where} is {tensor.dtype} {list(tensor.shape)}; a marker is 1-D U8 of at "
                    f"most {MAX_MARKER} bytes"
                )
            file.seek(tensor.begin)
            text = file.read(tensor.nbytes)
            if text and not text.strip(b"\0"):
                raise FormatError(
                    f"{where} holds only zeros, as a download that was cut short does"
                )
            conf = _check_marker(where, parse_object(where, text))
            _add_marker(markers, tensor.name.removesuffix(MARKER), conf, f"{path.name}: marker of")
    return markers


def _add_marker(markers: dict[str, dict], name: str, conf: dict, where: str) -> None:
    """Add a layer's marker, or merge it with the one there, which must not differ."""
    before = markers.setdefault(name, conf)
    for key in sorted(conf.keys() & before.keys()):
        if conf[key] != before[key]:
            raise FormatError(
                f"{where} {quoted(name)} says {key} {quoted(conf[key])}, another marker of it "
                f"says {quoted(before[key])}"
            )
    markers[name] = {**before, **conf}


def full_name(header: Header, name: str) -> str:
    """A layer's name with its tensors' prefix, which headers often omit."""
    names = (prefix + name for prefix in ("", *PREFIXES))
    return next((n for n in names if n + WEIGHT in header.tensors), name)


def _check_marker(where: str, conf) -> dict:
    if not isinstance(conf, dict) or not isinstance(conf.get("format"), str):
        raise FormatError(
            f'{where} names no format, for which ComfyUI says "Unknown quantization format" '
            "(ComfyUI-INT8-Fast saved INT8 files so; its newest version saves them right)"
        )
    full = conf.get("full_precision_matrix_mult", False)
    if full not in (False, True, None):  # 0 and 1 are equal to the first two
        raise FormatError(
            f"{where} has full_precision_matrix_mult {quoted(full)}; it must be true or false"
        )
    return conf


def _layer(header: Header, name: str, conf: Mapping) -> Layer:
    where = f"{header.path.name}: MXFP8 layer {quoted(name)}"
    weight, scale = _parts(header, where, name, dimensions=2)
    shape = layer_shape(where, weight, conf)
    try:
        layout.check_scale(weight.shape, scale.shape)
    except ValueError as error:
        plain = scale.shape == (weight.shape[0], weight.shape[1] // layout.BLOCK)
        hint = f"; they look row-major, which {REPAIR} corrects" if plain else ""
        raise FormatError(f"{where}: {error}{hint}") from error
    return Layer(name, shape, weight, scale, conf)


def _bank(header: Header, name: str, conf: Mapping) -> Layer:
    where = f"{header.path.name}: bank of MXFP8 experts {quoted(name)}"
    weight, scale = _parts(header, where, name, dimensions=3)
    _check_group(where, conf)
    experts, rows, cols = weight.shape
    expected = (experts, *layout.scale_shape(rows, cols))
    if conf["num_experts"] != experts or scale.shape != expected:
        raise FormatError(
            f"{where} of {quoted(conf['num_experts'])}: weight {list(weight.shape)}, scales "
            f"{list(scale.shape)}; their first sizes must be that number, and the scales "
            f"{list(expected)}"
        )
    return Layer(name, weight.shape, weight, scale, conf)


def _parts(header: Header, where: str, name: str, dimensions: int):
    """The weight and the scales of a marked layer, with their dtypes checked."""
    weight = header.tensors.get(name + WEIGHT)
    scale = header.tensors.get(name + SCALE)
    if weight is None:
        raise FormatError(f"{where} is marked, but there is no tensor {quoted(name + WEIGHT)}")
    if weight.dtype != "F8_E4M3" or len(weight.shape) != dimensions:
        raise FormatError(
            f"{where}: its weight is {weight.dtype} {list(weight.shape)}; it must be "
            f"{dimensions}-D F8_E4M3 (a convolution or an embedding cannot be MXFP8)"
        )
    if scale is None:
        raise FormatError(f"{where} has no scales: there is no tensor {quoted(name + SCALE)}")
    if scale.dtype not in SCALES:
        raise FormatError(f"{where}: its scales are {scale.dtype}; they must be U8 or F8_E8M0")
    return weight, scale


def layer_shape(where: str, weight: TensorInfo, conf: Mapping) -> tuple[int, int]:
    """The unpadded (N, K) of a 2-D weight, from its marker, else as it is stored.

    Raises:
        FormatError: the marker does not fit the weight.
    """
    _check_group(where, conf)
    shape = conf.get("orig_shape")
    if shape is not None and not (is_shape(shape) and len(shape) == 2):
        raise FormatError(f"{where} has orig_shape {quoted(shape)}; it must be two sizes")
    try:
        return layout.true_shape(weight.shape, shape)
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from error


def _check_group(where: str, conf: Mapping) -> None:
    if conf.get("group_size", layout.BLOCK) != layout.BLOCK:
        raise FormatError(f"{where} has group_size {quoted(conf['group_size'])}; MXFP8 has 32")


def marker(shape: tuple[int, int], dtype: str) -> dict:
    """The marker of a layer quantized from an [N, K] tensor of a header dtype ("BF16", ...)."""
    return {
        "format": MXFP8,
        "group_size": layout.BLOCK,
        "orig_dtype": FLOATS[dtype],
        "orig_shape": list(shape),
    }


def marker_bytes(conf: Mapping) -> bytes:
    """A marker as the bytes of its tensor."""
    return json.dumps(conf).encode("utf-8")


def with_markers(metadata: Mapping[str, str], markers: Mapping[str, Mapping]) -> dict[str, str]:
    """File metadata with the markers of all layers added; everything else is kept."""
    layers = {"format_version": "1.0", "layers": markers}
    return {**metadata, QUANTIZATION_METADATA: json.dumps(layers)}
