"""Compares an MXFP8 file with the model that it was made from, from the bytes on disk."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

from ... import kernels
from ...kernels import layout
from ..container.header import advising, nbytes, plain, quoted
from ..format import FLOATS, MARKER, SCALE, WEIGHT, Layer, bare
from ..progress import Meter, Progress
from ..reports import document
from ..reports.conversion import MIN_SQNR, SqnrAccumulator, last_line, listed, total_sqnr
from ..reports.units import format_count
from ..sources.diffusers import has_diffusers_names
from ..sources.file import FileSource, StoredSource
from ..sources.open import open_source, open_stored
from ..sources.unsupported import check_unquantized
from .scan import scan_layer

KEY = "mxfp8_verification"
_LEAST = -300.0  # dB
_SLAB = 1 << 23  # values compared at a time


@dataclass
class Verification:
    """The result of `verify_file`.

    Attributes:
        layers: layer -> its signal and noise, in file order.
        problems: sentences; empty if the file is sound.
    """

    layers: dict[str, SqnrAccumulator] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def sqnr_db(self) -> float | None:
        return total_sqnr(self.layers.values())

    @property
    def worst(self) -> str | None:
        """The layer with the lowest SQNR."""
        lossy = {n: s.sqnr_db for n, s in self.layers.items() if s.sqnr_db is not None}
        return min(lossy, key=lossy.get, default=None)

    def summary(self) -> str:
        """The SQNR of all layers together, the problems, and whether all is well, a line each."""
        lines = []
        if self.worst is not None:
            lines.append(
                f"{format_count(len(self.layers), 'MXFP8 layer')}, SQNR {self.sqnr_db:.2f} dB; "
                f"worst layer {plain(self.worst)}: {self.layers[self.worst].sqnr_db:.2f} dB"
            )
        sound = "the file is its source in MXFP8: layers within rounding, all else equal"
        return "\n".join([
            *lines, *listed("PROBLEM", self.problems), last_line(sound, self.problems)
        ])  # fmt: skip

    def to_json(self) -> str:
        """Versioned JSON, every layer included."""
        layers = [
            {"name": name, "sqnr_db": _finite(sqnr.sqnr_db)} for name, sqnr in self.layers.items()
        ]
        fields = {
            "sqnr_db": _finite(self.sqnr_db),
            "worst": self.worst,
            "problems": self.problems,
            "layers": layers,
        }
        return document.write(KEY, fields)


def _finite(sqnr_db: float | None) -> float | None:
    """An SQNR as JSON can have it: that of nothing but noise, -Inf, becomes the least."""
    return None if sqnr_db is None else max(sqnr_db, _LEAST)


def verify_file(path, source, progress: Progress | None = None) -> Verification:
    """Dequantize every MXFP8 layer of `path` and compare it with `source`, block by block.

    Tensors that are not quantized must be equal byte for byte. Key prefixes may differ.

    Args:
        source: path of a file, an index of several, or a folder, as for `convert_file`.
        progress: called after every tensor.

    Raises:
        FormatError: one of the files is damaged.
    """
    result = Verification()
    with FileSource(path) as stored, _open_original(source, stored) as original:
        if not stored.header.layers:
            result.problems.append("the file holds no MXFP8 layer")
        partners = _match(stored, original, result)
        layers = {name + WEIGHT: layer for name, layer in stored.header.layers.items()}
        sizes = {key: nbytes(*original.tensors[partner]) for key, partner in partners.items()}
        advance = Meter(sum(sizes.values()), progress)
        for key, partner in partners.items():
            if key in layers and original.tensors[partner][0] in FLOATS:
                _compare_layer(stored, original, layers[key], partner, result)
            elif not _equal(stored, original, key, partner):
                result.problems.append(f"{quoted(key)} differs from the source")
            advance(sizes[key], key)
    return result


def _open_original(source, stored: FileSource):
    """`open_source`, with a hint if the two files seem to be swapped.

    A file with diffusers' names was made from these names.
    """
    opened = open_stored if has_diffusers_names(stored.tensors) else open_source
    swapped = f"{stored.name} is not quantized, so the two may be swapped"
    hint = f"{swapped}: the MXFP8 file comes first, its original is the source"
    with contextlib.nullcontext() if stored.header.layers else advising(hint):
        original = opened(source)
        try:
            _check_original(stored, original)
        except BaseException:
            original.close()
            raise
    return original


def _check_original(stored: FileSource, original: StoredSource) -> None:
    """Raise FormatError if a layer is quantized in the source and another one in the file.

    Quantized layers that are the same in both were copied, unless nothing but those is in the file.
    """
    same = {(bare(key), *info) for key, info in stored.tensors.items()}
    changed = {
        bare(key).removesuffix(WEIGHT)
        for key, info in original.tensors.items()
        if (bare(key), *info) not in same
    }
    made = changed.intersection(map(bare, stored.header.layers))
    check_unquantized(original, copied=lambda layer: bool(made) and bare(layer) not in changed)


def _match(stored: FileSource, original: StoredSource, result: Verification) -> dict[str, str]:
    """Key in the file -> key in the source; a key without a partner is a problem."""
    by_name = {bare(key): key for key in original.tensors}
    parts = {name + part for name in stored.header.layers for part in (SCALE, MARKER)}
    partners = {}
    for key in stored.tensors:
        partner = key if key in original.tensors else by_name.get(bare(key))
        if partner is None and key in parts:
            continue
        if partner is None:
            result.problems.append(f"{quoted(key)} is not in the source")
        else:
            partners[key] = partner
    for key in sorted(original.tensors.keys() - partners.values()):
        result.problems.append(f"{quoted(key)} of the source is missing")
    return partners


def _compare_layer(
    stored: FileSource, original: StoredSource, layer: Layer, key: str, result: Verification
) -> None:
    """Add a layer's SQNR against a tensor of the source, and its problems, to the result."""
    name = quoted(layer.name)
    shape = original.tensors[key][1]
    if not layer.holds(shape):
        result.problems.append(f"{name} has shape {list(layer.shape)}, the source {list(shape)}")
        return
    scanned = scan_layer(stored, layer)
    result.problems += [f"{name}: {text}" for text in (*scanned.problems, *scanned.warnings)]
    rows, cols = shape
    sqnr = SqnrAccumulator()
    for first, last in layout.slabs(rows, cols, _SLAB):
        end = min(layer.weight.shape[0], layout.round_up(last, layout.ROW_PAD))
        qdata = stored.rows(layer.weight.name, first, end)
        tiles = layout.round_up(last, layout.TILE_ROWS)
        scale = stored.rows(layer.scale.name, first, tiles)
        signal, noise = kernels.signal_and_noise(original.rows(key, first, last), qdata, scale)
        if not noise.isfinite().all():
            if not scanned.problems:
                result.problems.append(f"{name} decodes to infinity")
            return
        sqnr.add(first, signal, noise)
    result.layers[layer.name] = sqnr
    if sqnr.sqnr_db is not None and sqnr.sqnr_db < MIN_SQNR:
        found, least = _told_apart(sqnr.sqnr_db, MIN_SQNR)
        result.problems.append(
            f"{name} has an SQNR of {found} dB against the source; rounding alone leaves at least "
            f"{least} dB: it is damaged or from another model, or a LoRA was baked in"
        )


def _told_apart(a: float, b: float) -> tuple[str, str]:
    """Two different numbers with as many digits as show that they differ."""
    digits = next(d for d in range(1, 18) if f"{a:.{d}f}" != f"{b:.{d}f}")
    return f"{a:.{digits}f}", f"{b:.{digits}f}"


def _equal(stored: FileSource, original: StoredSource, key: str, partner: str) -> bool:
    if stored.tensors[key] != original.tensors[partner]:
        return False
    pairs = zip(stored.pieces(key), original.pieces(partner), strict=True)
    return all(a == b for a, b in pairs)
