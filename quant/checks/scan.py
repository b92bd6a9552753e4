"""What the bytes of a file show that its header cannot: NaN, lost markers, the order of its scales.

`check_file` is the check before loading: header, markers, every scale byte, and samples of the
codes. `scan_layer` reads every byte of a layer, in slabs, so memory does not grow with the model.

Two defects that stock ComfyUI loads without an error can be detected:

Lost markers. The scale rule leaves every non-zero block of 32 with its largest code at 224 or
above (the mark). A plain cast to FP8 has no such block, and one with a scale per tensor about half.
So a matrix without a marker in which nearly all blocks have the mark holds MXFP8 codes; run as
weights they are noise.

Row-major scales. If no size needs padding, the shape of the scales is the same in row-major and in
tiled order. If one does, the zeros of the padding are in other places. Otherwise statistics tell: a
block's magnitude is that of its codes times its scale, and an amax just above a power of two halves
the codes and doubles the scale, so in the right order the logarithms of the two are anticorrelated;
in the wrong one they are independent, and their correlation over n blocks has a standard deviation
of 1 / sqrt(n). That is evidence and no proof: it gives a warning, and the user decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
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

_SLAB = 1 << 22  # codes read at a time
_SAMPLE = 1 << 16  # codes sampled per tensor before loading
_RUNS = 64  # places they come from
_ORDER_SAMPLE = 1 << 20  # codes that show the order of a layer's scales
_ORDER_TILES = 32  # tiles of rows that they come from
_SAMPLED_LAYERS = 16  # layers whose order of scales is tested before loading
# Fewest non-zero blocks to judge by; 64 of 64 marked happens by chance once in 2**64.
_FEWEST = 64
MARKED = 0.99  # least share of the non-zero blocks with the mark in MXFP8 codes
_FULL = 0x76  # the code of 224
_SIGMAS = 6.0  # standard deviations of the correlation that count as evidence
_SMALLEST_VOCABULARY = 16_384  # rows


@dataclass
class LayerScan:
    """The defects in the bytes of one layer.

    Attributes:
        nan_codes: NaN codes within the layer's shape; nan_scales: scale bytes 255.
        padding: non-zero bytes in the padding of codes and scales.
        order: as `scale_order` returns it.
    """

    nan_codes: int = 0
    nan_scales: int = 0
    padding: int = 0
    order: str | None = None

    @property
    def problems(self) -> list[str]:
        """Sentences on what is wrong, without the layer's name."""
        problems = []
        if self.nan_scales:
            problems.append(f"{self.nan_scales} scale bytes are 255 (NaN): damaged; {AGAIN}")
        if self.nan_codes:
            problems.append(
                f"{self.nan_codes} codes are NaN: damaged, or its source held NaN; {AGAIN}"
            )
        return problems

    @property
    def warnings(self) -> list[str]:
        """Sentences on what is suspicious."""
        warnings = []
        if self.padding:
            warnings.append(f"{self.padding} bytes of padding are not zero")
        if self.order == "row-major":
            warnings.append(ROW_MAJOR)
        return warnings


ROW_MAJOR = (
    "its scales look row-major, and ComfyUI reads them as tiled. If its images are noise, select "
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
        formats: names that a marker may give; layers in other formats than MXFP8 are not checked.
        order: of the scales, or "auto" to be warned if they look row-major. Row-major scales are
            checked where they are reordered.

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
    check_embeddings(source)
    check_unmarked(source)
    check_experts(source)
    if order != "row-major":
        for layer in header.layers.values():
            for first, scale in _scale_slabs(source, layer):
                check_scales(source.name, layer, first, scale)
    return order_warnings(source) if order == format.AUTO else []


def check_embeddings(source: FileSource, layers: Iterable[Layer] | None = None) -> None:
    """Raise FormatError for an MXFP8 layer, by default of the header, named like an embedding."""
    for layer in source.header.layers.values() if layers is None else layers:
        leaf = layer.name.rpartition(".")[2]
        if leaf in TABLES or (leaf in VOCABULARIES and layer.shape[0] >= _SMALLEST_VOCABULARY):
            raise FormatError(
                f"{source.name}: {quoted(layer.name)} {list(layer.shape)} is an embedding in "
                "MXFP8; ComfyUI would look up raw codes. Convert the original again with this "
                "pack, which leaves embeddings as they are"
            )


# ---- scales ----------------------------------------------------------------------------------


def check_scales(file: str, layer: Layer, first: int, scale: torch.Tensor) -> None:
    """Raise FormatError if one of the tiled scales in use, from row `first` on, is byte 255."""
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


def check_experts(source: FileSource) -> None:
    """Raise FormatError if a scale byte of a bank of experts is 255."""
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


def check_unmarked(source: FileSource, known: Iterable[str] = ()) -> None:
    """Raise FormatError if matrices without a marker hold MXFP8 codes, going by a sample.

    Args:
        known: names of layers to skip.
    """
    header = source.header
    few = [0, 0]  # of matrices with too few blocks to tell, which may be enough together
    for tensor in unmarked_matrices(header):
        if tensor.name.removesuffix(WEIGHT) in known:
            continue
        blocks, marked = sample_marks(source, tensor)
        if blocks < _FEWEST:
            blocks, marked = few = [few[0] + blocks, few[1] + marked]
        if blocks >= _FEWEST and marked >= MARKED * blocks:
            raise _lost(header, tensor)


def unmarked_matrices(header: Header) -> list[TensorInfo]:
    """FP8 matrices that could be MXFP8 codes, of layers without a marker.

    Those with a floating-point scale are in an older scaled FP8 format, which ComfyUI reads.
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
    remedy = (
        f"its scales are there: {REPAIR} rebuilds the markers"
        if fits
        else "its scales are missing too, so it cannot be repaired: get the file again"
    )
    return FormatError(
        f"{header.path.name}: {quoted(tensor.name)} {list(tensor.shape)} holds MXFP8 codes, but no "
        f"marker says so, and ComfyUI would run them as weights; {remedy}"
    )


def sample_marks(source: FileSource, tensor: TensorInfo) -> tuple[int, int]:
    """(non-zero blocks, those with a code of 224 or above) in a sample of a matrix of codes."""
    return _marks(_sample(source, tensor))


def is_marked(code: torch.Tensor) -> bool:
    """Whether uint8 codes, blocks along rows, have the mark, and are enough to tell."""
    blocks, marked = _marks(code)
    return blocks >= _FEWEST and marked >= MARKED * blocks


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


def scale_order(source: FileSource, layer: Layer) -> str | None:
    """The order of a layer's scales, from padding, else statistics of a sample: "tiled",
    "row-major", or None.
    """
    outside = (_outside(layer, first, scale) for first, scale in _scale_slabs(source, layer))
    return _order(source, layer, outside)


def _outside(layer: Layer, first: int, scale: torch.Tensor) -> tuple[int, int]:
    """Non-zero bytes where the padding would be in tiled and in row-major order.

    Args:
        scale: whole tiles, from row `first` on.
    """
    rows, cols = layer.weight.shape
    used, blocks = min(len(scale), rows - first), cols // BLOCK
    nonzero = scale.count_nonzero()
    tiled = nonzero - layout.untile(scale, used, blocks).count_nonzero()
    return int(tiled), int(nonzero - scale[:used, :blocks].count_nonzero())


def _order(source: FileSource, layer: Layer, outside: Iterable[tuple[int, int]]) -> str | None:
    """As `scale_order`, from what `_outside` returns for all of the layer's scales."""
    tiled, row_major = map(sum, zip((0, 0), *outside, strict=True))
    if (tiled == 0) == (row_major == 0):
        tiled, row_major = _correlations(source, layer)
        if abs(tiled - row_major) < _SIGMAS or min(tiled, row_major) > -_SIGMAS:
            return None
    return "tiled" if tiled < row_major else "row-major"


def _correlations(source: FileSource, layer: Layer) -> list[float]:
    """Correlation of block magnitude with scale byte in either order, tiled first.

    In units of 1/sqrt(n), where n blocks are from a sample; 0 if one of the two is constant.
    """
    if not layer.weight.nbytes:
        return [0.0, 0.0]
    magnitude, *orders = [
        torch.cat(parts) for parts in zip(*_sample_order(source, layer), strict=True)
    ]
    result = []
    for byte in orders:
        use = (magnitude > 0) & (byte != E8M0_NAN)
        pairs = torch.stack([magnitude[use].double().log2_(), byte[use].double()])
        count = pairs.shape[1]
        known = count >= _FEWEST
        correlation = float(torch.corrcoef(pairs)[0, 1].nan_to_num_(0.0)) if known else 0.0
        result.append(correlation * math.sqrt(count))
    return result


def _sample_order(source: FileSource, layer: Layer) -> Iterator[tuple[torch.Tensor, ...]]:
    """(sums of squared codes, tiled scales, row-major scales) of blocks in each sampled tile.

    The tiles are spread over the whole layer. Of each, as many rows are read as the size of the
    sample allows; of the widest layers, one row in all.
    """
    rows, cols = layer.weight.shape
    tiles = -(-rows // TILE_ROWS)
    count = min(tiles, _ORDER_TILES, max(1, _ORDER_SAMPLE // cols))
    height = max(1, _ORDER_SAMPLE // (count * cols))
    for index in range(count):
        first = (2 * index + 1) * tiles // (2 * count) * TILE_ROWS
        last = min(rows, first + min(TILE_ROWS, height))
        code = source.rows(layer.weight.name, first, last).view(torch.float8_e4m3fn)
        value = code.float().nan_to_num_(0.0).view(last - first, cols // BLOCK, BLOCK)
        squares = value.square_().sum(-1)
        scale = source.rows(layer.scale.name, first, first + TILE_ROWS).view(torch.uint8)
        yield squares, layout.untile(scale, *squares.shape), scale[: last - first, : cols // BLOCK]


def order_warnings(source: FileSource) -> list[str]:
    """A warning if the scales of sampled layers look row-major."""
    layers = list(source.header.layers.values())
    step = max(1, len(layers) // _SAMPLED_LAYERS)
    sample = layers[::step][:_SAMPLED_LAYERS]
    names = [layer.name for layer in sample if scale_order(source, layer) == "row-major"]
    if not names:
        return []
    share = f" ({len(names)} of {len(sample)} sampled layers)" if len(sample) > 1 else ""
    return [f"{source.name}: {quoted(names[0])}{share}: {ROW_MAJOR}"]


# ---- every byte ------------------------------------------------------------------------------


def count_nan(layer: Layer, first: int, codes: torch.Tensor) -> int:
    """How many codes are NaN in these rows of a layer, from row `first` on, without padding."""
    rows, cols = layer.shape
    used = codes.view(torch.uint8)[: max(0, rows - first), :cols]
    return int(((used & 0x7F) == 0x7F).sum())


def scan_layer(
    source: FileSource, layer: Layer, advance: Callable[[int], object] | None = None
) -> LayerScan:
    """Read every byte of a layer, in slabs.

    Args:
        advance: called with the bytes read since the last call.
    """
    rows, cols = layer.shape
    blocks = -(-cols // BLOCK)
    result = LayerScan()
    outside = []
    for first, last in layout.slabs(*layer.weight.shape, _SLAB):
        code = source.rows(layer.weight.name, first, last).view(torch.uint8)
        tiles = layout.round_up(last, TILE_ROWS)
        scale = source.rows(layer.scale.name, first, tiles).view(torch.uint8)
        used = max(0, min(last, rows) - first)
        outside.append(_outside(layer, first, scale))
        plain = layout.untile(scale, tiles - first, scale.shape[1])
        result.nan_codes += count_nan(layer, first, code)
        result.nan_scales += int((plain[:used, :blocks] == E8M0_NAN).sum())
        for matrix, inner in ((code, code[:used, :cols]), (plain, plain[:used, :blocks])):
            result.padding += int(matrix.count_nonzero() - inner.count_nonzero())
        if advance is not None:
            advance(code.numel() + scale.numel())
    result.order = _order(source, layer, outside)
    return result
