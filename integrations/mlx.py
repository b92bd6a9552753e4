"""An MXFP8 file as a folder that MLX loads, Apple's array framework.

MLX has MXFP8 among its quantization modes, with the same codes and the same scale bytes, so nothing
is rounded again. A quantized layer X of it is

    X.weight  uint32 [N, K / 4]   four E4M3 codes each, the first in the lowest byte
    X.scales  uint8 [N, K / 32]   E8M0 bytes, row by row

and a config.json names the mode. MLX's loaders quantize the layers for which the file has scales,
so layers that were kept need no list. The rules are those of mlx-lm 0.32.2 (`utils.load_model`) and
mlx-vlm 0.7.10 (`models/z_image/weights.py`, which reads the mode from the files' index). mflux 0.24
builds only affine layers and cannot load MXFP8.

A Z-Image model gets the names that mlx-vlm gives its modules, where q, k and v are separate; other
models keep theirs. Needs torch, not MLX: the command runs where the file was made.
https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from .. import kernels
from ..kernels import layout
from ..kernels.layout import BLOCK, TILE_ROWS
from ..quant.checks import scan
from ..quant.container.folder import new_folder
from ..quant.container.header import nbytes, plain, quoted, read_json
from ..quant.container.writer import Writer
from ..quant.conversion import architectures
from ..quant.format import AGAIN, MARKER, MXFP8, SCALE, WEIGHT, FormatError, Header, Layer
from ..quant.progress import VERIFY, Meter, Progress
from ..quant.reports import document
from ..quant.reports.conversion import last_line, listed
from ..quant.reports.units import format_count, format_size
from ..quant.sources.file import FileSource, as_bytes

KEY = "mxfp8_export"
QUANTIZATION = {"group_size": BLOCK, "bits": 8, "mode": "mxfp8"}
Z_IMAGE = "Z-Image"
_SHARD = 5 << 30  # bytes in a file at most, as mlx-lm splits models
_SLAB = 1 << 22  # codes in memory at a time
_MOST_CONFIG = 1 << 20  # bytes of a config.json
# dtypes that mx.load gives back as what they are; it gives FP8 as integers.
_DTYPES = {
    "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32", "C64",
}  # fmt: skip

# ComfyUI's names of Z-Image's tensors -> mlx-vlm's.
_Z_IMAGE_NAMES = (
    (r"\.attention\.out\.", ".attention.to_out.0."),
    (r"\.attention\.([qk])_norm\.", r".attention.norm_\1."),
    (r"^t_embedder\.mlp\.0\.", "t_embedder.linear1."),
    (r"^t_embedder\.mlp\.2\.", "t_embedder.linear2."),
    (r"^final_layer\.adaLN_modulation\.1\.", "final_layer.adaLN_modulation.0."),
)
_QKV = re.compile(r"(.+\.attention\.)qkv(\.\w+)")
_UNUSED = "norm_final.weight"  # in Z-Image files, but no part of the model


@dataclass
class Export:
    """What was written.

    Attributes:
        layers: MXFP8 layers of the file; dequantized: those that became BF16, since MLX quantizes
            only rows of whole blocks.
        renamed: the model whose names in mlx-vlm the tensors got, or None.
        bytes: of all tensors; files: of safetensors.
        notes: what the user should know; warnings: what looks wrong with the file.
    """

    source: str
    target: str
    layers: int
    dequantized: list[str]
    renamed: str | None
    bytes: int
    files: int
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A few lines for a terminal."""
        names = f"names as in mlx-vlm's {self.renamed}" if self.renamed else "names as in the file"
        return "\n".join([
            f"{plain(self.source)} -> {plain(self.target)}: "
            f"{format_count(self.layers, 'MXFP8 layer')}, "
            f"{format_size(self.bytes)} in {format_count(self.files, 'file')}, {names}",
            *self.notes,
            *listed("WARNING", self.warnings),
            last_line("written for MLX; no Mac has run this export so far", (), self.warnings),
        ])  # fmt: skip

    def to_json(self) -> str:
        """Versioned JSON."""
        return document.write(KEY, asdict(self))


@dataclass(frozen=True)
class _Tensor:
    """A tensor to write: rows first..last of one in the file.

    Attributes:
        key: in the file; of a layer, of its weight.
        layer: the MXFP8 layer that it is made of, or None.
        scales: whether it is the layer's scales, not its codes or values.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    key: str
    first: int
    last: int
    layer: Layer | None = None
    scales: bool = False

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


def export_mlx(
    path, target, *, config: str | Path | None = None, progress: Progress | None = None
) -> Export:
    """Write an MXFP8 file as a folder for MLX: model*.safetensors, their index, config.json.

    Args:
        path: of a safetensors file with MXFP8 layers.
        target: a folder that is not there, or empty; it appears whole or not at all.
        config: the original model's config.json, whose fields the new one keeps. A Z-Image model
            needs none.
        progress: called after every few megabytes; what it raises stops the work cleanly.

    Raises:
        FormatError: the file has no MXFP8 layers, or layers in formats that MLX lacks, is damaged,
            or holds NaN; `config` is no JSON object.
        OSError: the folder is not empty, or reading or writing failed.
    """
    target = Path(target)
    fields = _read_config(config)
    with FileSource(path) as source:
        _check(source)
        tensors, model, notes = _plan(source)
        dequantized = [t.layer.name for t in tensors if t.layer is not None and t.dtype == "BF16"]
        if dequantized:
            count = format_count(len(dequantized), "MXFP8 layer")
            notes.append(
                f"as BF16, without loss: {count} whose rows are no multiple of {BLOCK}, which MLX "
                f"does not quantize; first {quoted(dequantized[0])}"
            )
        warnings = scan.order_warnings(source)
        files = _shards(tensors)
        size = sum(tensor.nbytes for tensor in tensors)
        advance = Meter(size, progress)
        with new_folder(target, size) as folder:
            for name, part in files.items():
                _write(source, folder / name, part, advance)
            _write_json(folder / "model.safetensors.index.json", _index(files, size))
            found = _z_image_config(source.header, tensors) if model else {}
            _write_json(
                folder / "config.json", {**found, **fields, "quantization": {**QUANTIZATION}}
            )
    layers = len(source.header.layers)
    return Export(
        source.name, target.name, layers, dequantized, model, size, len(files), notes, warnings
    )


def _read_config(path: str | Path | None) -> dict:
    if path is None:
        return {}
    return read_json(Path(path), _MOST_CONFIG)


def _check(source: FileSource) -> None:
    """Raise FormatError for a file whose layers MLX cannot take, from its header and a sample."""
    header = source.header
    for name, conf in header.markers.items():
        if conf["format"] != MXFP8:
            raise FormatError(
                f"{source.name}: layer {quoted(name)} is {quoted(conf['format'])}, which this "
                "export cannot write for MLX; convert the original to MXFP8"
            )
    scan.check_unmarked(source)
    if header.experts:
        name = next(iter(header.experts))
        raise FormatError(
            f"{source.name}: {quoted(name)} is a bank of experts; this export writes linear layers "
            "only. Use the file in ComfyUI, or the original in MLX"
        )
    if not header.layers:
        raise FormatError(
            f"{source.name}: no layer is MXFP8; make an MXFP8 file of the original first, with "
            "`mxfp8 convert`"
        )
    parts = {layer.name + part for layer in header.layers.values() for part in (WEIGHT, SCALE)}
    for tensor in header.tensors.values():
        if tensor.name not in parts and tensor.dtype not in _DTYPES:
            raise FormatError(
                f"{source.name}: {quoted(tensor.name)} is {tensor.dtype}, which MLX does not load "
                "as such; convert the BF16, FP16 or FP32 original to MXFP8"
            )


# ---- names -----------------------------------------------------------------------------------


def _plan(source: FileSource) -> tuple[list[_Tensor], str | None, list[str]]:
    """(tensors to write, the model that gets mlx-vlm's names or None, notes)."""
    header = source.header
    found = architectures.detect(header.tensors)
    if (
        found is None
        or found[0].name != Z_IMAGE
        or f"{found[1]}x_embedder.weight" not in header.tensors
    ):  # Z-Image in pixel space has other embedders, and mlx-vlm does not know it
        names = {key: ((key, 0, 1),) for key in header.tensors}
        return [*_tensors(source, names)], None, []
    prefix = found[1]
    inside = {key for key in header.tensors if key.startswith(prefix)}
    names = {key: _z_image_names(key.removeprefix(prefix)) for key in inside}
    outside = len(header.tensors) - len(inside)
    notes = []
    if outside:
        notes.append(
            f"left out: {format_count(outside, 'tensor')} beside the diffusion model, such as a "
            "text encoder or a VAE; MLX takes these from folders of their own"
        )
    return [*_tensors(source, names)], Z_IMAGE, notes


def _z_image_names(key: str) -> tuple[tuple[str, int, int], ...]:
    """(name in mlx-vlm, which part of the rows, of how many) of each part of a Z-Image tensor."""
    if key == _UNUSED:
        return ()
    joined = _QKV.fullmatch(key)
    if joined:
        return tuple((f"{joined[1]}to_{part}{joined[2]}", i, 3) for i, part in enumerate("qkv"))
    for pattern, name in _Z_IMAGE_NAMES:
        key = re.sub(pattern, name, key)
    return ((key, 0, 1),)


def _tensors(
    source: FileSource, names: Mapping[str, Iterable[tuple[str, int, int]]]
) -> Iterator[_Tensor]:
    """The tensors to write, in the order of the file; a layer's scales follow its codes.

    Args:
        names: key -> (new name, which part of the rows, of how many).
    """
    header = source.header
    layers = {layer.weight.name: layer for layer in header.layers.values()}
    dropped = {name + part for name in header.layers for part in (SCALE, MARKER)}
    for key, (dtype, shape) in source.tensors.items():
        if key in dropped:
            continue
        layer = layers.get(key)
        rows = (layer.shape if layer else shape or (1,))[0]
        for name, part, count in names.get(key, ()):
            if rows % count:
                raise FormatError(
                    f"{source.name}: {quoted(key)} {list(shape)} holds q, k and v, but its rows "
                    "are no multiple of 3"
                )
            first, last = rows // count * part, rows // count * (part + 1)
            if layer is None:
                size = (last - first, *shape[1:]) if shape else ()
                yield _Tensor(name, dtype, size, key, first, last)
            elif layer.shape[1] % BLOCK:
                size = (last - first, layer.shape[1])
                yield _Tensor(name, "BF16", size, key, first, last, layer)
            else:
                size, cols = last - first, layer.shape[1]
                yield _Tensor(name, "U32", (size, cols // 4), key, first, last, layer)
                scales = name.removesuffix(WEIGHT) + ".scales"
                size = (size, cols // BLOCK)
                yield _Tensor(scales, "U8", size, key, first, last, layer, scales=True)


# ---- files -----------------------------------------------------------------------------------


def _shards(tensors: list[_Tensor]) -> dict[str, list[_Tensor]]:
    """File name -> its tensors, as MLX names and splits models."""
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if size + tensor.nbytes > _SHARD and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, start=1)}


def _write(source: FileSource, path: Path, tensors: list[_Tensor], advance: Meter) -> None:
    infos = [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    with Writer(path, infos, {"format": "mlx"}, tick=lambda: advance(0, VERIFY)) as writer:
        for tensor in tensors:
            for piece in _pieces(source, tensor):
                writer.write(tensor.name, piece)
                advance(len(piece), tensor.name)


def _pieces(source: FileSource, tensor: _Tensor) -> Iterator[memoryview]:
    """A tensor's bytes, in order."""
    layer = tensor.layer
    if layer is None and tensor.shape == source.tensors[tensor.key][1]:
        yield from source.pieces(tensor.key)
        return
    per_row = max(1, nbytes("U8", source.tensors[tensor.key][1][1:]))
    step = max(TILE_ROWS, _SLAB // per_row // TILE_ROWS * TILE_ROWS)
    for first in range(tensor.first, tensor.last, step):
        last = min(first + step, tensor.last)
        if layer is None:
            rows = source.rows(tensor.key, first, last)
        elif tensor.scales:
            rows = _scales(source, layer, first, last)
        elif tensor.dtype == "U32":
            rows = _codes(source, layer, first, last)
        else:
            codes, scales = (read(source, layer, first, last) for read in (_codes, _scales))
            shape = (last - first, layer.shape[1])
            tiled = layout.tile(scales)
            rows = kernels.dequantize(
                codes.view(torch.float8_e4m3fn), tiled, torch.bfloat16, shape=shape
            )
        yield as_bytes(rows.contiguous())


def _codes(source: FileSource, layer: Layer, first: int, last: int) -> torch.Tensor:
    """uint8 [rows, K']; raises FormatError for NaN, which MLX on a GPU may read as a number."""
    codes = source.rows(layer.weight.name, first, last).view(torch.uint8)
    if scan.count_nan(layer, first, codes):
        raise FormatError(
            f"{source.name}: codes of MXFP8 layer {quoted(layer.name)} {list(layer.shape)} are NaN "
            f"between rows {first} and {last}: damaged, or its source held NaN; {AGAIN}"
        )
    return codes


def _scales(source: FileSource, layer: Layer, first: int, last: int) -> torch.Tensor:
    """uint8 [rows, K' / 32], row-major; raises FormatError for NaN."""
    begin, end = first // TILE_ROWS * TILE_ROWS, layout.round_up(last, TILE_ROWS)
    tiled = source.rows(layer.scale.name, begin, end).view(torch.uint8)
    scan.check_scales(source.name, layer, begin, tiled)
    return layout.untile(tiled, last - begin, layer.weight.shape[1] // BLOCK)[first - begin :]


def _index(files: Mapping[str, list[_Tensor]], size: int) -> dict:
    """The index, with the mode as mlx-vlm's image models read it."""
    return {
        "metadata": {
            "total_size": size,
            "quantization_mode": QUANTIZATION["mode"],
            "quantization_level": str(QUANTIZATION["bits"]),
            "quantization_group_size": str(QUANTIZATION["group_size"]),
        },
        "weight_map": dict(sorted((t.name, name) for name, part in files.items() for t in part)),
    }


def _z_image_config(header: Header, tensors: list[_Tensor]) -> dict:
    """The sizes that mlx-vlm reads, under diffusers' names; it knows Z-Image's constants."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    for layer, tensor in ((t.layer, t) for t in tensors if t.layer and not t.scales):
        shapes[tensor.name] = (tensor.last - tensor.first, layer.shape[1])

    def blocks(name: str) -> int:
        found = (re.match(rf"{name}\.(\d+)\.", key) for key in shapes)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    dim, head = shapes["cap_pad_token"][-1], shapes.get("layers.0.attention.norm_q.weight")
    heads = dim // head[0] if head and head[0] else 0
    hidden = shapes.get("layers.0.feed_forward.w1.weight")
    caption = shapes.get("cap_embedder.0.weight")
    return {
        "_class_name": "ZImageTransformer2DModel",
        "dim": dim,
        "in_channels": shapes["x_embedder.weight"][1] // 4,  # patches of 2 x 2
        "n_layers": blocks("layers"),
        "n_refiner_layers": blocks("noise_refiner"),
        **({"n_heads": heads, "n_kv_heads": heads} if heads else {}),
        **({"intermediate_size": hidden[0]} if hidden else {}),
        **({"cap_feat_dim": caption[0]} if caption else {}),
    }


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
