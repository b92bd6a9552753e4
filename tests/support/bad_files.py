"""Files with one defect each, made from a good MXFP8 file, and the rule that the error must name.

`BAD_FILES` is the table: name -> what is done to the good file, and an expression that the error
must match. `write` makes one. Add a row for a defect; every loader is run on it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from checkpoints import load, raw

LAYER = "double_blocks.0.img_attn.proj"  # of a tiny Flux, [128, 128]
WEIGHT, SCALE, MARKER = f"{LAYER}.weight", f"{LAYER}.weight_scale", f"{LAYER}.comfy_quant"
SIBLING = "double_blocks.0.txt_attn.proj.weight"  # of the same shape
BIAS = f"{LAYER}.bias"
HEADER_MARKERS = "_quantization_metadata"
_DTYPES = {
    "torch.bfloat16": "BF16", "torch.float32": "F32", "torch.float16": "F16",
    "torch.uint8": "U8", "torch.float8_e4m3fn": "F8_E4M3",
}  # fmt: skip


@dataclass
class Draft:
    """A file before it is written: name -> [dtype, shape, bytes], and its metadata."""

    tensors: dict[str, list]
    metadata: dict[str, str]

    def header(self) -> dict:
        """What its header says, tensors in their order."""
        result, offset = {"__metadata__": self.metadata}, 0
        for name, (dtype, shape, data) in self.tensors.items():
            end = offset + len(data)
            result[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset = end
        return result

    def data(self) -> bytes:
        return b"".join(data for _, _, data in self.tensors.values())

    def encode(self, header: dict | bytes | None = None) -> bytes:
        """The whole file, with another header than its own if one is given."""
        text = self.header() if header is None else header
        if not isinstance(text, bytes):
            text = json.dumps(text).encode()
        return struct.pack("<Q", len(text)) + text + self.data()

    def mark(self, layer: str = LAYER, **changes) -> None:
        """Change both markers of a layer; a field given as None is left out."""
        conf = json.loads(self.tensors[f"{layer}.comfy_quant"][2])
        conf = {k: v for k, v in {**conf, **changes}.items() if v is not None}
        self.mark_tensor(json.dumps(conf).encode(), layer)
        self.mark_header(conf, layer)

    def mark_tensor(self, text: bytes, layer: str = LAYER) -> None:
        self.tensors[f"{layer}.comfy_quant"] = ["U8", [len(text)], text]

    def mark_header(self, conf, layer: str = LAYER) -> None:
        markers = json.loads(self.metadata[HEADER_MARKERS])
        markers["layers"][layer] = conf
        self.metadata[HEADER_MARKERS] = json.dumps(markers)

    def rename(self, old: str, new: str) -> None:
        """Give a layer, its markers too, another name."""
        self.tensors = {
            new + name.removeprefix(old) if name.startswith(f"{old}.") else name: value
            for name, value in self.tensors.items()
        }
        markers = json.loads(self.metadata[HEADER_MARKERS])
        markers["layers"][new] = markers["layers"].pop(old)
        self.metadata[HEADER_MARKERS] = json.dumps(markers)

    def unmark(self) -> None:
        """Lose all markers."""
        del self.metadata[HEADER_MARKERS]
        for name in [name for name in self.tensors if name.endswith(".comfy_quant")]:
            del self.tensors[name]


@dataclass(frozen=True)
class BadFile:
    """A defect.

    Attributes:
        edit: changes a draft; may return the bytes of the file instead.
        rule: an expression for the error, after the file's name.
        quantized: whether it still looks quantized, which is the error when it is a source.
    """

    edit: Callable[[Draft], bytes | None]
    rule: str
    quantized: bool = True


def draft(good: Path) -> Draft:
    """The good file, taken apart."""
    tensors, metadata = load(good)
    parts = {k: [_DTYPES[str(v.dtype)], list(v.shape), raw(v)] for k, v in tensors.items()}
    return Draft(parts, metadata)


def write(name: str, good: Path, target: Path) -> Path:
    """Write the good file with a defect of the table."""
    whole = draft(good)
    data = BAD_FILES[name].edit(whole)
    target.write_bytes(whole.encode() if data is None else data)
    return target


# ---- layers ----------------------------------------------------------------------------------


def missing_scale(d: Draft) -> None:
    del d.tensors[SCALE]


def scale_shape(d: Draft) -> None:
    d.tensors[SCALE][1] = [64, 8]


def scale_cut(d: Draft) -> None:
    d.tensors[SCALE][1:] = [[64, 4], d.tensors[SCALE][2][:256]]


def scale_flat(d: Draft) -> None:
    d.tensors[SCALE][1] = [512]


def scale_dtype(d: Draft) -> None:
    d.tensors[SCALE] = ["F32", [128, 4], bytes(4 * 512)]


def scale_e4m3(d: Draft) -> None:
    d.tensors[SCALE][0] = "F8_E4M3"


def scale_nan(d: Draft) -> None:
    d.tensors[SCALE][2] = bytes([255]) + d.tensors[SCALE][2][1:]


def all_scales_nan(d: Draft) -> None:
    d.tensors[SCALE][2] = bytes([255]) * 512


def weight_bf16(d: Draft) -> None:
    d.tensors[WEIGHT] = ["BF16", [128, 128], bytes(2 * 128 * 128)]


def weight_e5m2(d: Draft) -> None:
    d.tensors[WEIGHT][0] = "F8_E5M2"


def weight_u8(d: Draft) -> None:
    d.tensors[WEIGHT][0] = "U8"


def weight_1d(d: Draft) -> None:
    d.tensors[WEIGHT][1] = [128 * 128]


def convolution(d: Draft) -> None:
    d.tensors[WEIGHT][1] = [128, 32, 2, 2]


def embedding(d: Draft) -> None:
    d.rename(LAYER, "token_embedding")


def odd_columns(d: Draft) -> None:
    d.tensors[WEIGHT][1:] = [[128, 120], d.tensors[WEIGHT][2][: 128 * 120]]
    d.mark(orig_shape=[128, 120])


def missing_weight(d: Draft) -> None:
    del d.tensors[WEIGHT]


def marked_elsewhere(d: Draft) -> None:
    d.mark_header({"format": "mxfp8"}, "double_blocks.7.img_attn.proj")


# ---- markers ---------------------------------------------------------------------------------


def unknown_format(d: Draft) -> None:
    d.mark(format="mxfp9")


def no_format(d: Draft) -> None:
    d.mark(format=None)


def group_size(d: Draft) -> None:
    d.mark(group_size=16)


def true_shape_larger(d: Draft) -> None:
    d.mark(orig_shape=[4096, 4096])


def true_shape_text(d: Draft) -> None:
    d.mark(orig_shape="128x128")


def full_precision_text(d: Draft) -> None:
    d.mark(full_precision_matrix_mult="no")


def markers_disagree_on_format(d: Draft) -> None:
    d.mark_header({"format": "float8_e4m3fn"})


def markers_disagree_on_shape(d: Draft) -> None:
    d.mark_header({"format": "mxfp8", "orig_shape": [128, 100]})


def marker_json(d: Draft) -> None:
    d.mark_tensor(b'{"format": "mxfp8"')


def marker_list(d: Draft) -> None:
    d.mark_tensor(b'["mxfp8"]')


def marker_nested(d: Draft) -> None:
    d.mark_tensor(b"[" * 20_000)


def marker_oversized(d: Draft) -> None:
    d.mark_tensor(b'{"format": "mxfp8", "x": "' + b"x" * 70_000 + b'"}')


def marker_dtype(d: Draft) -> None:
    d.tensors[MARKER][0] = "I8"


def header_marker_json(d: Draft) -> None:
    d.metadata[HEADER_MARKERS] = "{"


def header_marker_list(d: Draft) -> None:
    d.metadata[HEADER_MARKERS] = '{"layers": []}'


def lost_markers(d: Draft) -> None:
    d.unmark()


def lost_markers_and_scales(d: Draft) -> None:
    d.unmark()
    d.tensors = {k: v for k, v in d.tensors.items() if not k.endswith(".weight_scale")}


# ---- the file --------------------------------------------------------------------------------


def empty(d: Draft) -> bytes:
    return b""


def no_safetensors(d: Draft) -> bytes:
    return b"PK\x03\x04" + bytes(1000)


def truncated(d: Draft) -> bytes:
    return d.encode()[:-1]


def truncated_header(d: Draft) -> bytes:
    return d.encode()[:1000]


def more_bytes(d: Draft) -> bytes:
    return d.encode() + b"\0"


def header_length(d: Draft) -> bytes:
    return struct.pack("<Q", 2**63) + d.encode()[8:]


def header_json(d: Draft) -> bytes:
    return d.encode(json.dumps(d.header()).encode()[:-1])


def header_no_text(d: Draft) -> bytes:
    return d.encode(b"\xff\xfe" + json.dumps(d.header()).encode())


def header_list(d: Draft) -> bytes:
    return d.encode(b"[]")


def header_nested(d: Draft) -> bytes:
    return d.encode(b"[" * 200_000)


def duplicate_key(d: Draft) -> bytes:
    text = json.dumps(d.header())
    entry = json.dumps(d.header()[WEIGHT])
    return d.encode(f'{text[:-1]}, "{WEIGHT}": {entry}}}'.encode())


def metadata_number(d: Draft) -> bytes:
    return d.encode({**d.header(), "__metadata__": {"step": 1000}})


def _entry(**changes) -> Callable[[Draft], bytes]:
    """A file whose header says something else of the weight."""

    def edit(d: Draft) -> bytes:
        header = d.header()
        header[WEIGHT] = {**header[WEIGHT], **changes}
        return d.encode(header)

    return edit


def overlapping(d: Draft) -> bytes:
    header = d.header()
    header[WEIGHT]["data_offsets"] = header[SIBLING]["data_offsets"]
    return d.encode(header)


def out_of_range(d: Draft) -> bytes:
    header = d.header()
    begin = 2**40
    header[WEIGHT]["data_offsets"] = [begin, begin + 128 * 128]
    return d.encode(header)


LAYER_RULE = rf"'{LAYER}'.*"
BAD_FILES: dict[str, BadFile] = {
    "missing scale": BadFile(missing_scale, rf"{LAYER_RULE}has no scales: .*'{SCALE}'"),
    "scale shape": BadFile(scale_shape, rf"{LAYER_RULE}\[64, 8\].*\[128, 4\]"),
    "scale cut": BadFile(scale_cut, rf"{LAYER_RULE}\[64, 4\].*\[128, 4\]"),
    "scale flat": BadFile(scale_flat, rf"{LAYER_RULE}\[512\].*\[128, 4\]"),
    "scale dtype": BadFile(scale_dtype, rf"{LAYER_RULE}scales are F32; they must be U8"),
    "scale e4m3": BadFile(scale_e4m3, rf"{LAYER_RULE}scales are F8_E4M3; they must be U8"),
    "scale nan": BadFile(scale_nan, rf"{LAYER_RULE}row 0, block 0 is byte 255"),
    "all scales nan": BadFile(all_scales_nan, rf"{LAYER_RULE}is byte 255"),
    "weight bf16": BadFile(weight_bf16, rf"{LAYER_RULE}BF16 \[128, 128\]; it must be 2-D F8_E4M3"),
    "weight e5m2": BadFile(weight_e5m2, rf"{LAYER_RULE}F8_E5M2 .* must be 2-D F8_E4M3"),
    "weight u8": BadFile(weight_u8, rf"{LAYER_RULE}U8 .* must be 2-D F8_E4M3"),
    "weight 1-D": BadFile(weight_1d, rf"{LAYER_RULE}F8_E4M3 \[16384\]; it must be 2-D"),
    "convolution": BadFile(convolution, rf"{LAYER_RULE}\[128, 32, 2, 2\]; it must be 2-D"),
    "embedding": BadFile(embedding, r"'token_embedding'.*is an embedding in MXFP8"),
    "odd columns": BadFile(odd_columns, rf"{LAYER_RULE}120.*32"),
    "missing weight": BadFile(missing_weight, rf"{LAYER_RULE}there is no tensor '{WEIGHT}'"),
    "marked elsewhere": BadFile(
        marked_elsewhere, r"'double_blocks.7.img_attn.proj' is marked, but there is no tensor"
    ),
    "unknown format": BadFile(unknown_format, rf"{LAYER_RULE}'mxfp9'; formats that can be read"),
    "no format": BadFile(no_format, rf"{LAYER}.*names no format"),
    "group size": BadFile(group_size, rf"{LAYER_RULE}has group_size 16; MXFP8 has 32"),
    "true shape larger": BadFile(true_shape_larger, rf"{LAYER_RULE}4096"),
    "true shape text": BadFile(true_shape_text, rf"{LAYER_RULE}orig_shape '128x128'; it must be"),
    "full precision text": BadFile(full_precision_text, rf"{LAYER}.*'no'; it must be true or"),
    "markers disagree on format": BadFile(
        markers_disagree_on_format, rf"{LAYER_RULE}format 'mxfp8'.*'float8_e4m3fn'"
    ),
    "markers disagree on shape": BadFile(
        markers_disagree_on_shape, rf"{LAYER_RULE}orig_shape \[128, 128\].*\[128, 100\]"
    ),
    "marker json": BadFile(marker_json, rf"'{MARKER}' is not JSON"),
    "marker list": BadFile(marker_list, rf"'{MARKER}' is not a JSON object"),
    "marker nested": BadFile(marker_nested, rf"'{MARKER}' is not JSON"),
    "marker oversized": BadFile(marker_oversized, rf"'{MARKER}' is U8 .*at most 65536 bytes"),
    "marker dtype": BadFile(marker_dtype, rf"'{MARKER}' is I8 .*a marker is 1-D U8"),
    "header marker json": BadFile(header_marker_json, rf"{HEADER_MARKERS} is not JSON"),
    "header marker list": BadFile(header_marker_list, rf"{HEADER_MARKERS} has no object 'layers'"),
    "lost markers": BadFile(
        lost_markers, r"holds MXFP8 codes, but no marker.*mxfp8 repair"
    ),
    "lost markers and scales": BadFile(
        lost_markers_and_scales, r"holds MXFP8 codes, but no marker.*get the file again"
    ),
    "empty": BadFile(empty, "0 bytes are too few for a safetensors file", quantized=False),
    "no safetensors": BadFile(
        no_safetensors, "truncated: the header needs|zip archive", quantized=False
    ),
    "truncated": BadFile(truncated, "truncated: the header describes", quantized=False),
    "truncated header": BadFile(truncated_header, "truncated: the header needs", quantized=False),
    "more bytes": BadFile(more_bytes, "has bytes after its last tensor", quantized=False),
    "header length": BadFile(header_length, "header would have 9223372036854775808 bytes",
                             quantized=False),
    "header json": BadFile(header_json, "the header is not JSON", quantized=False),
    "header no text": BadFile(header_no_text, "the header is not JSON", quantized=False),
    "header list": BadFile(header_list, "the header is not a JSON object", quantized=False),
    "header nested": BadFile(header_nested, "the header is not JSON", quantized=False),
    "duplicate key": BadFile(duplicate_key, rf"holds the key '{WEIGHT}' twice", quantized=False),
    "metadata number": BadFile(metadata_number, "must map strings to strings", quantized=False),
    "unknown dtype": BadFile(
        _entry(dtype="F8_E9M9"), rf"'{WEIGHT}' has the unknown dtype 'F8_E9M9'", quantized=False
    ),
    "absurd shape": BadFile(
        _entry(shape=[2**62, 2**62]), rf"'{WEIGHT}' has the shape", quantized=False
    ),
    "large shape": BadFile(
        _entry(shape=[2**20, 2**20]), rf"'{WEIGHT}' is F8_E4M3.*offsets span 16384", quantized=False
    ),
    "negative shape": BadFile(
        _entry(shape=[-128, -128]), rf"'{WEIGHT}' has the shape \[-128, -128\]", quantized=False
    ),
    "boolean shape": BadFile(
        _entry(shape=[True, 16384]), rf"'{WEIGHT}' has the shape", quantized=False
    ),
    "offsets missing": BadFile(
        _entry(data_offsets=None), rf"'{WEIGHT}' has the data_offsets None", quantized=False
    ),
    "offsets turned": BadFile(
        _entry(data_offsets=[16384, 0]), rf"'{WEIGHT}' is .*span -16384", quantized=False
    ),
    "overlapping": BadFile(overlapping, "overlaps the one before it|leaves a gap", quantized=False),
    "out of range": BadFile(out_of_range, "leaves a gap", quantized=False),
}  # fmt: skip
