"""The file: safetensors headers and the MXFP8 layout inside them (`writer` makes files).

Reading a header needs no torch, and checks everything that can be known without the data: sizes,
offsets, dtypes, markers, shapes. The layout, for a linear layer X of shape [N, K]:

    X.weight        F8_E4M3 [N', K']                      codes; padding is zero
    X.weight_scale  U8 [roundup(N', 128), roundup(K'/32, 4)]  E8M0 bytes, tiled order
    X.comfy_quant   U8, 1-D                               JSON {"format": "mxfp8", ...}
    __metadata__._quantization_metadata                   {"layers": {X: the same JSON}}

Files in the wild carry either marker or both. We write both, and scales always as U8: ComfyUI's
own save nodes write F8_E8M0, which its dynamic-VRAM loader cannot read.

The safetensors library is not used for reading because bounded memory needs rows of a tensor
without mapping the file: its `get_slice` maps, and mapped pages count as resident. Format:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..kernels import layout

QUANTIZATION_METADATA = "_quantization_metadata"
MARKER = ".comfy_quant"
SCALE = ".weight_scale"
WEIGHT = ".weight"
# Key prefixes under which a diffusion model's tensors are found.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "model.", "")
MAX_HEADER = 100_000_000  # bytes; the safetensors library refuses larger headers too
MAX_MARKER = 65_536  # bytes of JSON in one layer's marker

# dtype name in the header -> bits per element
DTYPES = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
FLOATS = {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}


class FormatError(ValueError):
    """A file that is not what it says it is; the message names the file, tensor and rule."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `begin` and `end` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Layer:
    """One MXFP8 linear of a file, markers checked against tensors.

    Attributes:
        name: the key without ".weight".
        shape: unpadded (N, K).
        conf: the marker's JSON, unknown fields included.
    """

    name: str
    shape: tuple[int, int]
    weight: TensorInfo
    scale: TensorInfo
    conf: Mapping = field(repr=False)

    @property
    def full_precision(self) -> bool:
        """Whether the file asks never to quantise this layer's activations."""
        return bool(self.conf.get("full_precision_matrix_mult", False))


@dataclass(frozen=True)
class Header:
    """A safetensors header whose offsets have been checked against the file's size."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    file_size: int

    @cached_property
    def markers(self) -> dict[str, dict]:
        """Layer name -> marker JSON, from the header and the marker tensors together."""
        return _read_markers(self)

    def check_layers(self) -> None:
        """Raise FormatError unless markers, tensors and shapes of all layers agree."""
        _ = self.layers

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The file's MXFP8 linears by name, in the order of their weights.

        Stacks of experts, which are 3-D, are left to stock.
        """
        found = (
            _layer(self, name, conf)
            for name, conf in self.markers.items()
            if conf["format"] == "mxfp8" and "num_experts" not in conf
        )
        return {layer.name: layer for layer in sorted(found, key=lambda x: x.weight.begin)}


def read_header(path: str | os.PathLike) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        FormatError: the file is no safetensors file, is truncated, or has overlapping tensors.
        OSError: it cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if len(start) < 8:
            raise FormatError(f"{path.name}: {size} bytes are too few for a safetensors file")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER:
            raise FormatError(
                f"{path.name}: no safetensors file (.ckpt, .pt and .gguf cannot be read), or a "
                f"damaged one: its header would have {length} bytes; at most {MAX_HEADER} may be"
            )
        if 8 + length > size:
            raise FormatError(
                f"{path.name}: truncated: the header needs {8 + length} bytes, the file has {size}"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except KeyError as error:
        raise FormatError(f"{path.name}: the header holds the key {error} twice") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path.name}: the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise FormatError(f"{path.name}: the header is not a JSON object")

    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{path.name}: __metadata__ must map strings to strings")
    data = 8 + length
    tensors = [_tensor_info(path, name, entry, data) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.begin, t.end))
    _check_offsets(path, tensors, data, size)
    return Header(path, {t.name: t for t in tensors}, metadata, size)


def _no_duplicates(pairs):
    result = {}
    for key, value in pairs:
        if key in result:
            raise KeyError(key)
        result[key] = value
    return result


def numel(shape: Iterable[int]) -> int:
    """The number of elements of a shape."""
    count = 1
    for size in shape:
        count *= size
    return count


def _is_size(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor_info(path: Path, name: str, entry, data: int) -> TensorInfo:
    where = f"{path.name}: tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise FormatError(f"{where} needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{where} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise FormatError(f"{where} has the shape {shape!r}; it must be a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise FormatError(f"{where} has the data_offsets {offsets!r}; they must be two sizes")
    begin, end = offsets
    expected, odd = divmod(numel(shape) * DTYPES[dtype], 8)
    if odd or end - begin != expected:
        raise FormatError(
            f"{where} is {dtype} {shape}, {expected} bytes, but its data_offsets span {end - begin}"
        )
    return TensorInfo(name, dtype, tuple(shape), data + begin, data + end)


def _check_offsets(path: Path, tensors: list[TensorInfo], data: int, size: int) -> None:
    """Tensors in order of offset must fill the file exactly: no gap, no overlap, no remainder."""
    position = data
    for tensor in tensors:
        if tensor.begin != position:
            problem = "overlaps the one before it" if tensor.begin < position else "leaves a gap"
            raise FormatError(
                f"{path.name}: tensor {tensor.name!r} {problem}: it begins at byte {tensor.begin}, "
                f"expected {position}"
            )
        position = tensor.end
    if position != size:
        problem = "truncated" if position > size else "has bytes after its last tensor"
        raise FormatError(
            f"{path.name}: {problem}: the header describes {position} bytes, the file has {size}"
        )


def header_markers(file: str, metadata: Mapping[str, str]) -> dict[str, dict]:
    """Layer name -> marker JSON from a file's metadata alone.

    Raises:
        FormatError: the entry is malformed.
    """
    text = metadata.get(QUANTIZATION_METADATA)
    if text is None:
        return {}
    layers = _parse_json(f"{file}: {QUANTIZATION_METADATA}", text).get("layers")
    if not isinstance(layers, dict):
        raise FormatError(f"{file}: {QUANTIZATION_METADATA} has no object 'layers'")
    return {
        name: _check_marker(f"{file}: header marker of {name!r}", conf)
        for name, conf in layers.items()
    }


def _read_markers(header: Header) -> dict[str, dict]:
    path = header.path
    markers = {
        _full_name(header, name): conf
        for name, conf in header_markers(path.name, header.metadata).items()
    }
    tensors = [t for t in header.tensors.values() if t.name.endswith(MARKER)]
    with path.open("rb") as file:
        for tensor in tensors:
            name = tensor.name.removesuffix(MARKER)
            where = f"{path.name}: {tensor.name!r}"
            if tensor.dtype != "U8" or len(tensor.shape) != 1 or tensor.nbytes > MAX_MARKER:
                raise FormatError(
                    f"{where} is {tensor.dtype} {list(tensor.shape)}; a marker is 1-D U8 of at "
                    f"most {MAX_MARKER} bytes"
                )
            file.seek(tensor.begin)
            conf = _check_marker(where, _parse_json(where, file.read(tensor.nbytes)))
            before = markers.setdefault(name, conf)
            for field_name in ("format", "orig_shape"):
                one, other = conf.get(field_name), before.get(field_name)
                if one != other and None not in (one, other):
                    raise FormatError(
                        f"{where} says {field_name} {one!r}, the header says {other!r}"
                    )
            markers[name] = {**before, **conf}
    return markers


def _full_name(header: Header, name: str) -> str:
    """A layer's name with the prefix that its tensors have; headers often leave it out."""
    names = (prefix + name for prefix in ("", *PREFIXES))
    return next((n for n in names if n + WEIGHT in header.tensors), name)


def _parse_json(where: str, text: str | bytes) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where} is not a JSON object")
    return value


def _check_marker(where: str, conf) -> dict:
    if not isinstance(conf, dict) or not isinstance(conf.get("format"), str):
        raise FormatError(f"{where} names no format")
    return conf


def _layer(header: Header, name: str, conf: Mapping) -> Layer:
    where = f"{header.path.name}: MXFP8 layer {name!r}"
    weight = header.tensors.get(name + WEIGHT)
    scale = header.tensors.get(name + SCALE)
    if weight is None:
        raise FormatError(f"{where} is marked, but there is no tensor {name + WEIGHT!r}")
    if weight.dtype != "F8_E4M3" or len(weight.shape) != 2:
        raise FormatError(
            f"{where}: its weight is {weight.dtype} {list(weight.shape)}; it must be 2-D F8_E4M3"
        )
    if scale is None:
        raise FormatError(f"{where} has no scales: there is no tensor {name + SCALE!r}")
    if scale.dtype not in ("U8", "F8_E8M0"):
        raise FormatError(f"{where}: its scales are {scale.dtype}; they must be U8 or F8_E8M0")
    if conf.get("group_size", layout.BLOCK) != layout.BLOCK:
        raise FormatError(f"{where} has group_size {conf['group_size']!r}; MXFP8 has 32")
    try:
        shape = layout.true_shape(weight.shape, _marked_shape(where, conf))
        layout.check_scale(weight.shape, scale.shape)
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from error
    return Layer(name, shape, weight, scale, conf)


def _marked_shape(where: str, conf: Mapping):
    shape = conf.get("orig_shape")
    if shape is not None and not (
        isinstance(shape, list) and len(shape) == 2 and all(map(_is_size, shape))
    ):
        raise FormatError(f"{where} has orig_shape {shape!r}; it must be two sizes")
    return shape


def marker(shape: tuple[int, int], dtype: str) -> dict:
    """The marker of a layer quantised from an [N, K] tensor of a header dtype ("BF16", ...)."""
    return {
        "format": "mxfp8",
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
