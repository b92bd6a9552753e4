"""What a header cannot tell: scale bytes, codes and padding of a file, and what they give away.

`check_file` is what loading asks for: header, markers and every scale byte, with samples of the
codes. `scan_layer` reads every byte of a layer, in slabs, so memory does not grow with the model.

Two mistakes that stock ComfyUI loads without a word leave traces:

Lost markers. The scale rule leaves every non-zero block of 32 with its largest code at 224 or
above. In a plain cast to FP8 no block has that, in a per-tensor scaled one half of them. So codes
of a matrix without a marker whose blocks nearly all have it are MXFP8; run as weights they are
noise.

Row-major scales. Where no size needs padding, the shape of the scales is the same in row-major and
in tiled order. Where one does, the zeros of the padding lie elsewhere. Failing that, statistics: a
block's magnitude is that of its codes times its scale, and an amax just above a power of two halves
the codes and doubles the scale, so in the right order the logarithms of the two are anticorrelated;
in a wrong one they are independent. With n blocks the correlation of independent values is
1 / sqrt(n) wide. That is evidence, not proof: it gives a warning, and the user decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ...kernels import layout
from ...kernels.layout import BLOCK, E8M0_NAN, TILE_ROWS
from .. import format
from ..container.header import quoted
from ..conversion.policy import TABLES, VOCABULARIES
from ..format import (
    AGAIN,
    FORMATS,
    REPAIR,
    SCALE,
    SCALES,
    WEIGHT,
    FormatError,
    Header,
    Layer,
    TensorInfo,
)
from ..sources import diffusers
from ..sources.file import FileSource

_SLAB = 1 << 22  # codes looked at once
_SAMPLE = 1 << 16  # codes sampled of a tensor when a file is loaded
_RUNS = 64  # places they come from
_SAMPLED_LAYERS = 16  # layers whose order of scales is looked at when a file is loaded
_FEWEST = 64  # non-zero blocks: half of a scaled tensor's have the mark, 2**-64 that all have it
MARKED = 0.99  # share of such blocks with the mark
_FULL = 0x76  # the code of 224
_SIGMAS = 6.0
_ENERGIES = 1 << 15  # blocks whose energy is computed at once

_SMALLEST_VOCABULARY = 16_384  # rows


@dataclass
class LayerScan:
    """What was found in the bytes of one layer.

    Attributes:
        nan_codes: NaN codes within the layer's shape; nan_scales: scale bytes 255.
        padding: bytes of padding, of data or scales, that are not zero.
        blocks, marked: non-zero blocks of 32, and those with a code of 224 or above.
        order: evidence on the order of the scales.
    """

    nan_codes: int = 0
    nan_scales: int = 0
    padding: int = 0
    blocks: int = 0
    marked: int = 0
    order: OrderEvidence | None = None

    @property
    def problems(self) -> list[str]:
        """Sentences on what is wrong, without the layer's name."""
        found = []
        if self.nan_scales:
            found.append(f"{self.nan_scales} scale bytes are 255 (NaN): damaged; {AGAIN}")
        if self.nan_codes:
            found.append(
                f"{self.nan_codes} codes are NaN: damaged, or its source held NaN; {AGAIN}"
            )
        return found

    @property
    def warnings(self) -> list[str]:
        """Sentences on what is suspicious."""
        found = []
        if self.padding:
            found.append(f"{self.padding} bytes of padding are not zero")
        if self.order is not None and self.order.order == "row-major":
            found.append(ROW_MAJOR)
        return found


ROW_MAJOR = (
    "its scales look row-major, and ComfyUI takes them as tiled. If its images are noise, choose "
    f"row-major scales in the loader, or repair the file with {REPAIR}"
)


def check_file(path, formats: Iterable[str] = FORMATS) -> list[str]:
    """As `check_source`, for the file at a path."""
    with FileSource(path) as source:
        return check_source(source, formats)


def check_source(
    source: FileSource, formats: Iterable[str] = FORMATS, order: str = format.AUTO
) -> list[str]:
    """Check what loading relies on: header, markers and every scale byte.

    Args:
        formats: names that a marker may give; other formats than MXFP8 are not looked into.
        order: of the scales, if the caller knows it: then nothing is suspicious about it. Scales
            that are row-major are checked where they are brought into tiled order.

    Returns:
        Warnings, as sentences.

    Raises:
        FormatError: the file is damaged, inconsistent, or MXFP8 whose markers are lost.
        OSError: it cannot be read.
    """
    header = source.header
    header.check_layers(formats)
    if header.layers:
        diffusers.check_names(source.name, header.tensors)
    refuse_tables(source.name, header.layers.values())
    refuse_unmarked(source)
    refuse_nan_experts(source)
    if order != "row-major":
        for layer in header.layers.values():
            for first, scale in _scale_slabs(source, layer):
                refuse_nan_scales(source.name, layer, first, scale)
    return _order_warnings(source) if order == format.AUTO else []


def refuse_tables(file: str, layers: Iterable[Layer]) -> None:
    """Raise FormatError for an MXFP8 layer that is an embedding by its name."""
    for layer in layers:
        leaf = layer.name.rpartition(".")[2]
        if leaf in TABLES or (leaf in VOCABULARIES and layer.shape[0] >= _SMALLEST_VOCABULARY):
            raise FormatError(
                f"{file}: {quoted(layer.name)} {list(layer.shape)} is an embedding in "
                "MXFP8; ComfyUI would look up raw codes. Convert the original again with this "
                "pack, which keeps embeddings as they are"
            )


# ---- scales ----------------------------------------------------------------------------------


def refuse_nan_scales(file: str, layer: Layer, first: int, scale: torch.Tensor) -> None:
    """Raise FormatError where one of the tiled scales in use, from row `first` on, is byte 255."""
    if not (scale == E8M0_NAN).any():
        return
    rows = min(layer.shape[0] - first, scale.shape[0])
    used = layout.untile(scale, max(0, rows), layer.weight.shape[1] // BLOCK) == E8M0_NAN
    if used.any():
        row, block = used.nonzero()[0].tolist()
        raise FormatError(
            f"{file}: scales of MXFP8 layer {quoted(layer.name)} {list(layer.shape)}: the one of "
            f"row {first + row}, block {block} is byte 255 (NaN); the file is damaged, or its "
            f"source held NaN: {AGAIN}"
        )


def refuse_nan_experts(source: FileSource) -> None:
    """Raise FormatError where a scale byte of a bank of experts is 255."""
    for layer in source.header.experts.values():
        for piece in source.pieces(layer.scale.name):
            if (torch.frombuffer(piece, dtype=torch.uint8) == E8M0_NAN).any():
                raise FormatError(
                    f"{source.name}: scales of the MXFP8 experts {quoted(layer.name)} hold byte "
                    f"255 (NaN); the file is damaged, or its source held NaN: {AGAIN}"
                )


def _scale_slabs(source: FileSource, layer: Layer) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, tiled scales) of a layer, in slabs of whole tiles."""
    rows, cols = layer.scale.shape
    for first, last in layout.slabs(rows, cols, _SLAB):
        yield first, source.rows(layer.scale.name, first, last).view(torch.uint8)


# ---- lost markers ----------------------------------------------------------------------------


def refuse_unmarked(source: FileSource, known: Iterable[str] = ()) -> None:
    """Raise FormatError where matrices without a marker hold MXFP8 codes, from a sample.

    Args:
        known: names of layers that are left out.
    """
    header = source.header
    pooled = [0, 0]
    for tensor in unmarked_matrices(header):
        if tensor.name.removesuffix(WEIGHT) in known:
            continue
        blocks, marked = sample_marks(source, tensor)
        if blocks >= _FEWEST and marked >= MARKED * blocks:
            raise _lost(header, tensor)
        if blocks < _FEWEST:  # too few to tell; together they may do
            pooled = [pooled[0] + blocks, pooled[1] + marked]
            if pooled[0] >= _FEWEST and pooled[1] >= MARKED * pooled[0]:
                raise _lost(header, tensor)


def unmarked_matrices(header: Header) -> list[TensorInfo]:
    """FP8 matrices that could be MXFP8 codes, of layers that no marker mentions.

    Those with a scale in floating point are in an older scaled FP8 format, which ComfyUI reads.
    """

    def scaled(layer: str) -> bool:
        scales = (header.tensors.get(layer + suffix) for suffix in (SCALE, ".scale_weight"))
        return any(scale is not None and scale.dtype not in SCALES for scale in scales)

    return [
        tensor
        for tensor in header.tensors.values()
        if tensor.dtype == "F8_E4M3"
        and tensor.name.endswith(WEIGHT)
        and len(tensor.shape) == 2
        and tensor.nbytes
        and tensor.shape[1] % BLOCK == 0
        and tensor.name.removesuffix(WEIGHT) not in header.markers
        and not scaled(tensor.name.removesuffix(WEIGHT))
    ]


def _lost(header: Header, tensor: TensorInfo) -> FormatError:
    scale = header.tensors.get(tensor.name.removesuffix(WEIGHT) + SCALE)
    fits = scale is not None and scale.dtype in SCALES
    way = (
        f"its scales are there: {REPAIR} writes the markers anew"
        if fits
        else "its scales are missing too, so it cannot be repaired: get the file again"
    )
    return FormatError(
        f"{header.path.name}: {quoted(tensor.name)} {list(tensor.shape)} holds MXFP8 codes, but no "
        f"marker says so, and ComfyUI would run them as weights; {way}"
    )


def sample_marks(source: FileSource, tensor: TensorInfo) -> tuple[int, int]:
    """(non-zero blocks, those with a code of 224 or above) in a sample of a matrix of codes."""
    return _marks(_sample(source, tensor))


def _sample(source: FileSource, tensor: TensorInfo) -> torch.Tensor:
    """Runs of whole blocks from all over a matrix of codes. uint8 [runs, codes]."""
    runs, length = _RUNS, _SAMPLE // _RUNS
    if tensor.nbytes <= _SAMPLE:
        runs, length = 1, tensor.nbytes
    parts = []
    with source.header.path.open("rb", buffering=0) as file:
        for index in range(runs):
            file.seek(tensor.begin + tensor.nbytes // BLOCK * index // runs * BLOCK)
            parts.append(torch.frombuffer(bytearray(file.read(length)), dtype=torch.uint8))
    return torch.stack(parts)


def _marks(code: torch.Tensor) -> tuple[int, int]:
    """(non-zero blocks, those with a code of 224 or above) of uint8 codes, blocks along rows."""
    largest = (code & 0x7F).view(-1, BLOCK).amax(-1)
    full = (largest >= _FULL) & (largest < 0x7F)  # 0x7F is NaN: plain casts overflow to it
    return int((largest > 0).sum()), int(full.sum())


# ---- order of the scales ---------------------------------------------------------------------


@dataclass
class _Correlation:
    """Of two variables, from sums over slabs."""

    count: int = 0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.count += x.numel()
        self.x += float(x.sum())
        self.y += float(y.sum())
        self.xx += float((x * x).sum())
        self.yy += float((y * y).sum())
        self.xy += float((x * y).sum())

    @property
    def sigmas(self) -> float:
        """In widths of the correlation that independent variables have; 0 where nothing varies."""
        n = self.count
        if n < _FEWEST:
            return 0.0
        spread = (self.xx - self.x**2 / n) * (self.yy - self.y**2 / n)
        # A variance below the roundings of its sums is none.
        if spread <= 1e-20 * self.xx * self.yy:
            return 0.0
        return (self.xy - self.x * self.y / n) / math.sqrt(spread / n)


class OrderEvidence:
    """What speaks for the scales of a layer being tiled or row-major."""

    def __init__(self, layer: Layer):
        self._rows, self._blocks = layer.weight.shape[0], layer.weight.shape[1] // BLOCK
        self._correlation = {"tiled": _Correlation(), "row-major": _Correlation()}
        self.padding = dict.fromkeys(self._correlation, 0)  # bytes that are not zero

    @property
    def order(self) -> str | None:
        """ "tiled" or "row-major", or None where nothing tells."""
        tiled, row_major = self.padding.values()
        if (tiled == 0) == (row_major == 0):
            tiled, row_major = (c.sigmas for c in self._correlation.values())
            if abs(tiled - row_major) < _SIGMAS or min(tiled, row_major) > -_SIGMAS:
                return None
        return "tiled" if tiled < row_major else "row-major"

    def add_scale(self, first: int, scale: torch.Tensor) -> None:
        """Account for tiled bytes [m, C] of the rows from `first`, a multiple of 128."""
        rows, cols = scale.shape
        used = min(rows, self._rows - first)
        for order, matrix in (("tiled", layout.untile(scale, rows, cols)), ("row-major", scale)):
            outside = int(matrix.count_nonzero() - matrix[:used, : self._blocks].count_nonzero())
            self.padding[order] += outside

    def add(self, code: torch.Tensor, scale: torch.Tensor) -> None:
        """Account for uint8 codes [m, K'] and the scales of their tiles [roundup(m, 128), C]."""
        rows, blocks = code.shape[0], self._blocks
        code = code.reshape(-1, BLOCK)
        parts = code.split(_ENERGIES)  # in float32, wide rows take four times their size
        energy = torch.cat([_energy(part) for part in parts]).view(rows, blocks)
        level = energy.double().log2_()
        for order, matrix in (("tiled", layout.untile(scale, rows, blocks)), ("row-major", scale)):
            byte = matrix[:rows, :blocks]
            use = (energy > 0) & (byte != E8M0_NAN)
            self._correlation[order].add(level[use], byte[use].double().sub_(layout.E8M0_BIAS))


def _energy(code: torch.Tensor) -> torch.Tensor:
    """Sums of squares of uint8 codes [blocks, 32], NaN as zero. float32 [blocks]."""
    value = code.view(torch.float8_e4m3fn).float().nan_to_num_(0.0)
    return value.square_().sum(-1)


def _order_warnings(source: FileSource) -> list[str]:
    """A warning where layers of a sample look as if their scales were row-major."""
    layers = list(source.header.layers.values())
    step = max(1, len(layers) // _SAMPLED_LAYERS)
    sample = layers[::step][:_SAMPLED_LAYERS]
    found = [layer for layer in sample if order_evidence(source, layer).order == "row-major"]
    if not found:
        return []
    share = f" ({len(found)} of {len(sample)} layers looked at)" if len(sample) > 1 else ""
    return [f"{source.name}: {quoted(found[0].name)}{share}: {ROW_MAJOR}"]


def order_evidence(source: FileSource, layer: Layer) -> OrderEvidence:
    """From all scales and the first tile of rows."""
    evidence = OrderEvidence(layer)
    for first, scale in _scale_slabs(source, layer):
        evidence.add_scale(first, scale)
    rows = min(TILE_ROWS, layer.weight.shape[0])
    code = source.rows(layer.weight.name, 0, rows).view(torch.uint8)
    evidence.add(code, source.rows(layer.scale.name, 0, TILE_ROWS).view(torch.uint8))
    return evidence


# ---- every byte ------------------------------------------------------------------------------


def scan_layer(source: FileSource, layer: Layer, progress=None) -> LayerScan:
    """Read every byte of a layer, in slabs.

    Args:
        progress: called with the bytes read since the last call.
    """
    rows, cols = layer.shape
    blocks = -(-cols // BLOCK)
    result = LayerScan(order=OrderEvidence(layer))
    for first, last in layout.slabs(*layer.weight.shape, _SLAB):
        code = source.rows(layer.weight.name, first, last).view(torch.uint8)
        tiles = layout.round_up(last, TILE_ROWS)
        scale = source.rows(layer.scale.name, first, tiles).view(torch.uint8)
        used = max(0, min(last, rows) - first)
        plain = layout.untile(scale, tiles - first, scale.shape[1])
        result.nan_codes += int(((code[:used, :cols] & 0x7F) == 0x7F).sum())
        result.nan_scales += int((plain[:used, :blocks] == E8M0_NAN).sum())
        for matrix, inner in ((code, code[:used, :cols]), (plain, plain[:used, :blocks])):
            result.padding += int(matrix.count_nonzero() - inner.count_nonzero())
        found, marked = _marks(code)
        result.blocks += found
        result.marked += marked
        result.order.add_scale(first, scale)
        result.order.add(code, scale)
        if progress is not None:
            progress(code.numel() + scale.numel())
    return result
