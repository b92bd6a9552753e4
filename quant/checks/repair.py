"""Repairs a file: lost markers, row-major scales, scales as F8_E8M0. Codes stay as they are; NaN
among them is a problem of the new file too.

A matrix counts as an MXFP8 layer if it is F8_E4M3 with a shape that fits, has scales as U8 or
F8_E8M0 with a shape that fits, and if its codes have the mark of the format (see `scan`). Existing
markers are kept. A new one leaves out the original shape and dtype, which are no longer known;
readers take the shape from the model.

Scales whose shape can only be row-major are reordered. Where the shape fits both orders, the
padding and statistics decide, or the caller does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch

from ...kernels import layout
from ...kernels.layout import BLOCK
from .. import format
from ..container.header import plain, quoted
from ..container.part_file import would_replace
from ..container.writer import Writer
from ..format import MARKER, SCALE, WEIGHT, FormatError, Header, Layer
from ..progress import VERIFY, Meter, Progress
from ..reports import document
from ..reports.conversion import last_line, listed
from ..sources import diffusers
from ..sources.file import FileSource, as_bytes
from . import scan

KEY = "mxfp8_repair"


@dataclass
class Repair:
    """The repairs that were made, by the names of layers.

    Attributes:
        marked: with new markers; tiled: with scales reordered to tiled; retyped: with scales
            rewritten as U8.
        layers: the number of MXFP8 layers in the new file.
        problems: sentences on what cannot be repaired.
    """

    source: str
    target: str
    marked: list[str] = field(default_factory=list)
    tiled: list[str] = field(default_factory=list)
    retyped: list[str] = field(default_factory=list)
    layers: int = 0
    problems: list[str] = field(default_factory=list)

    def summary(self, warnings: Sequence[str] = ()) -> str:
        """A few lines for a terminal or a node.

        Args:
            warnings: of a check of the new file.
        """
        repairs = [
            f"{repair}: {len(names)} of {self.layers} layers, first {quoted(names[0])}"
            for repair, names in (
                ("markers rebuilt", self.marked),
                ("scales reordered to tiled", self.tiled),
                ("scales rewritten as U8", self.retyped),
            )
            if names
        ]
        sound = f"all {self.layers} MXFP8 layers have both markers and tiled U8 scales"
        return "\n".join([
            f"{plain(self.source)} -> {plain(self.target)}",
            *repairs,
            *listed("WARNING", warnings),
            *listed("PROBLEM", self.problems),
            last_line(sound, self.problems, warnings),
        ])  # fmt: skip

    def to_json(self, warnings: Sequence[str] = ()) -> str:
        """Versioned JSON; `warnings` as for `summary`."""
        return document.write(KEY, {**asdict(self), "warnings": warnings})


def repair_file(
    source,
    target,
    *,
    scales: str = format.AUTO,
    formats: Iterable[str] = format.FORMATS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Repair:
    """Write a copy of an MXFP8 file with complete markers and tiled U8 scales.

    Args:
        source, target: paths; the target appears whole or not at all.
        scales: the order of scales whose shape fits both: "tiled", "row-major", or "auto", which
            goes by the padding and statistics of each layer.
        formats: names that a marker may give; layers in other formats than MXFP8 are copied.
        progress: called after every piece; an exception from it stops the work cleanly.

    Raises:
        FormatError: the file is damaged, a layer's scales are missing or do not fit, or there is
            nothing to repair.
        OSError: reading or writing failed.
    """
    if scales not in format.ORDERS:
        raise ValueError(f"scales is {scales!r}; it must be one of {', '.join(format.ORDERS)}")
    if would_replace(target, source):
        raise ValueError(
            f"{os.path.basename(target)}: writing it would replace the source; give another name"
        )
    with FileSource(source) as opened:
        layers = _layers(opened, formats)
        result = Repair(opened.name, os.path.basename(target), layers=len(layers))
        row_major = _row_major(opened, layers, scales)
        inside = format.header_markers(opened.name, opened.metadata)
        marked = {format.full_name(opened.header, name) for name in inside}
        result.marked = [n for n in layers if n not in marked or n + MARKER not in opened.tensors]
        result.tiled = [name for name in layers if name in row_major]
        result.retyped = [name for name, layer in layers.items() if layer.scale.dtype != "U8"]
        if not (result.marked or result.tiled or result.retyped):
            raise FormatError(
                f"{opened.name}: nothing to repair: {len(layers)} MXFP8 layers, all with both "
                "markers and tiled U8 scales; `mxfp8 inspect` shows other damage, such as NaN "
                "codes, for which only a good copy of the file helps"
            )
        nan_codes = _write(opened, target, layers, row_major, overwrite, progress)
        for name, count in nan_codes.items():
            found = scan.LayerScan(nan_codes=count).problems
            result.problems += [f"{quoted(name)}: {problem}" for problem in found]
        return result


def _layers(source: FileSource, formats: Iterable[str]) -> dict[str, Layer]:
    """Marked and recognized layers by name, in file order; scales in either order and dtype."""
    header, layers = source.header, {}
    header.check_formats(formats)
    _ = header.experts  # checks them
    for name, conf in header.markers.items():
        if conf["format"] == format.MXFP8 and "num_experts" not in conf:
            layers[name] = _candidate(header, name, conf)
    for weight in scan.unmarked_matrices(header):
        name = weight.name.removesuffix(WEIGHT)
        blocks, marked = scan.sample_marks(source, weight)
        if name + SCALE in header.tensors and marked >= scan.MARKED * blocks:
            conf = {"format": format.MXFP8, "group_size": BLOCK}
            layers[name] = _candidate(header, name, conf)
    scan.check_unmarked(source, known=layers)
    scan.check_experts(source)
    scan.check_embeddings(source, layers.values())
    diffusers.check_names(source.name, header.tensors)
    if not layers:
        raise FormatError(
            f"{header.path.name}: nothing to repair: no layer has MXFP8 codes and scales"
        )
    return dict(sorted(layers.items(), key=lambda item: item[1].weight.begin))


def _candidate(header: Header, name: str, conf: Mapping) -> Layer:
    """A layer to be written, with its own marker or a new one.

    Raises:
        FormatError: its weight or scales cannot be MXFP8.
    """
    where = f"{header.path.name}: {quoted(name)}"
    weight = header.tensors.get(name + WEIGHT)
    if weight is None:
        raise FormatError(
            f"{where} is marked as MXFP8, but there is no tensor {quoted(name + WEIGHT)}: the file "
            "is incomplete, get it again"
        )
    if weight.dtype != "F8_E4M3" or len(weight.shape) != 2 or weight.shape[1] % BLOCK:
        raise FormatError(
            f"{where}: its weight is {weight.dtype} {list(weight.shape)}; MXFP8 codes are 2-D "
            "F8_E4M3 with columns a multiple of 32. This cannot be repaired"
        )
    scale = header.tensors.get(name + SCALE)
    if scale is None:
        raise FormatError(f"{where}: its scales are missing, which cannot be repaired")
    tiled, plain = layout.scale_shape(*weight.shape), (weight.shape[0], weight.shape[1] // BLOCK)
    if scale.dtype not in format.SCALES or scale.shape not in (tiled, plain):
        raise FormatError(
            f"{where}: its scales are {scale.dtype} {list(scale.shape)}; weight "
            f"{list(weight.shape)} needs U8 or F8_E8M0 {list(tiled)}, or {list(plain)} row-major"
        )
    return Layer(name, format.layer_shape(where, weight, conf), weight, scale, conf)


def _row_major(source: FileSource, layers: Mapping[str, Layer], scales: str) -> set[str]:
    """Names of the layers whose scales are row-major."""
    orders = {}
    for name, layer in layers.items():
        if layer.scale.shape != layout.scale_shape(*layer.weight.shape):
            orders[name] = "row-major"  # its shape fits nothing else
        elif scales == format.AUTO:
            orders[name] = scan.scale_order(source, layer)
        else:
            orders[name] = scales
    rest = "row-major" if set(orders.values()) - {None} == {"row-major"} else "tiled"
    return {name for name, order in orders.items() if (order or rest) == "row-major"}


def _tiled_scale(source: FileSource, layer: Layer, row_major: bool) -> Iterator[torch.Tensor]:
    """A layer's scales as tiled bytes, in slabs of whole tiles."""
    rows, blocks = layer.weight.shape[0], layer.weight.shape[1] // BLOCK
    for first, last in layout.slabs(layer.scale.shape[0], layer.scale.shape[1], 1 << 22):
        scale = source.rows(layer.scale.name, first, last).view(torch.uint8)
        if row_major:
            scale = layout.tile(scale[: min(last, rows) - first, :blocks])
        scan.check_scales(source.name, layer, first, scale)
        yield scale


def _codes(source: FileSource, layer: Layer) -> Iterator[tuple[torch.Tensor, int]]:
    """A layer's codes, in slabs of rows, and the number of NaN codes in each."""
    for first, last in layout.slabs(*layer.weight.shape, 1 << 22):
        codes = source.rows(layer.weight.name, first, last)
        yield codes, scan.count_nan(layer, first, codes)


def _write(source: FileSource, target, layers, row_major, overwrite, progress) -> dict[str, int]:
    """Write the target: everything is copied but the scales and markers of these layers.

    Returns:
        Layer -> the number of its NaN codes.
    """
    by_scale = {layer.scale.name: layer for layer in layers.values()}
    by_weight = {layer.weight.name: layer for layer in layers.values()}
    nan_codes = dict.fromkeys(layers, 0)
    markers = {name: format.marker_bytes(layer.conf) for name, layer in layers.items()}
    dropped = {name + MARKER for name in layers}
    tensors = []
    for key, (dtype, shape) in source.tensors.items():
        if key in by_scale:
            dtype, shape = "U8", layout.scale_shape(*by_scale[key].weight.shape)
        if key not in dropped:
            tensors.append((key, dtype, shape))
    tensors += [(name + MARKER, "U8", (len(text),)) for name, text in markers.items()]
    advance = Meter(sum(t.nbytes for t in source.header.tensors.values()), progress)
    others = {name: c for name, c in source.header.markers.items() if name not in layers}
    confs = others | {name: layer.conf for name, layer in layers.items()}
    metadata = format.with_markers(source.metadata, confs)
    with Writer(target, tensors, metadata, overwrite, lambda: advance(0, VERIFY)) as writer:
        for key, info in source.header.tensors.items():
            if key in by_scale:
                layer = by_scale[key]
                for scale in _tiled_scale(source, layer, layer.name in row_major):
                    writer.write(key, as_bytes(scale.contiguous()))
                advance(info.nbytes, key)
            elif key in by_weight:
                layer = by_weight[key]
                for codes, nan in _codes(source, layer):
                    writer.write(key, as_bytes(codes))
                    nan_codes[layer.name] += nan
                    advance(codes.nbytes, key)
            elif key not in dropped:
                for piece in source.pieces(key):
                    writer.write(key, piece)
                    advance(len(piece), key)
        for name, text in markers.items():
            writer.write(name + MARKER, text)
    return nan_codes
