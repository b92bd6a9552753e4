"""Check an MXFP8 file against the model it was made from, from the bytes on disk."""

from __future__ import annotations

from dataclasses import dataclass, field

from ... import kernels
from ...kernels import layout
from ..container.header import advising, quoted
from ..format import DTYPES, MARKER, SCALE, WEIGHT, bare, numel
from ..progress import Meter
from ..reports.conversion import MIN_SQNR, SqnrAccumulator, total_sqnr
from ..sources.file import FileSource, StoredSource
from ..sources.open import open_source
from .scan import scan_layer

_SLAB = 1 << 23  # values compared at a time


@dataclass
class Verification:
    """What was found.

    Attributes:
        layers: layer -> measured energy, in file order.
        problems: sentences; empty where the file is sound.
    """

    layers: dict[str, SqnrAccumulator] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def sqnr_db(self) -> float | None:
        return total_sqnr(self.layers.values())

    @property
    def worst(self) -> str | None:
        """The layer with the lowest SQNR."""
        lossy = {n: e.sqnr_db for n, e in self.layers.items() if e.sqnr_db is not None}
        return min(lossy, key=lossy.get, default=None)


def verify_file(path, source, progress=None) -> Verification:
    """Dequantize every MXFP8 layer of `path` and compare it with `source`, block by block.

    Tensors that are not quantized must be equal byte for byte. Key prefixes may differ.

    Args:
        source: path of a file, an index of several, or a folder, as for `convert_file`.
        progress: called with (bytes compared, bytes in all, key).

    Raises:
        FormatError: one of the files is damaged.
    """
    result = Verification()
    with FileSource(path) as stored, _open_original(source, stored) as original:
        if not stored.header.layers:
            result.problems.append("there is no MXFP8 layer in it")
        names = _match(stored, original, result)
        layers = stored.header.layers
        total = sum(_nbytes(original, o) for o in names.values())
        advance = Meter(total, progress)
        for key, original_key in names.items():
            layer = layers.get(key.removesuffix(WEIGHT)) if key.endswith(WEIGHT) else None
            if layer is not None:
                energy = _compare_layer(stored, original, layer, original_key, result)
                if energy is not None:
                    result.layers[layer.name] = energy
                    if energy.sqnr_db is not None and energy.sqnr_db < MIN_SQNR:
                        result.problems.append(
                            f"{quoted(layer.name)} is {energy.sqnr_db:.2f} dB from the source; "
                            f"rounding leaves at least {MIN_SQNR:.1f} dB: damaged, or of another "
                            "model"
                        )
            elif not _equal(stored, original, key, original_key):
                result.problems.append(f"{quoted(key)} differs from the source")
            advance(_nbytes(original, original_key), key)
    return result


def _open_original(source, stored: FileSource):
    """`open_source`, with a hint for whoever gave the two the other way round."""
    if stored.header.layers:
        return open_source(source)
    with advising(f"{stored.name} is not: the MXFP8 file comes first, its original is the source"):
        return open_source(source)


def _match(stored: FileSource, original: StoredSource, result: Verification) -> dict[str, str]:
    """Key in the file -> key in the source; what has no partner is a problem."""
    by_name = {bare(key): key for key in original.tensors}
    names, parts = {}, set()
    for name in stored.header.layers:
        parts |= {name + SCALE, name + MARKER}
    for key in stored.tensors:
        if key in parts:
            continue
        partner = key if key in original.tensors else by_name.get(bare(key))
        if partner is None:
            result.problems.append(f"{quoted(key)} is not in the source")
        else:
            names[key] = partner
    for key in sorted(original.tensors.keys() - names.values()):
        result.problems.append(f"{quoted(key)} of the source is missing")
    return names


def _nbytes(source: StoredSource, key: str) -> int:
    dtype, shape = source.tensors[key]
    return numel(shape) * DTYPES[dtype] // 8


def _compare_layer(stored, original, layer, original_key, result) -> SqnrAccumulator | None:
    shape = original.tensors[original_key][1]
    if not layer.holds(shape):
        result.problems.append(
            f"{quoted(layer.name)} has shape {list(layer.shape)}, the source {list(shape)}"
        )
        return None
    found = scan_layer(stored, layer)
    result.problems += [f"{quoted(layer.name)}: {s}" for s in (*found.problems, *found.warnings)]
    rows, cols = shape
    energy = SqnrAccumulator()
    for first, last in layout.slabs(rows, cols, _SLAB):
        end = min(layer.weight.shape[0], layout.round_up(last, layout.ROW_PAD))
        qdata = stored.rows(layer.weight.name, first, end)
        tiles = layout.round_up(last, layout.TILE_ROWS)
        scale = stored.rows(layer.scale.name, first, tiles)
        signal, noise = kernels.signal_and_noise(
            original.rows(original_key, first, last), qdata, scale
        )
        if not noise.isfinite().all():
            if not found.problems:
                result.problems.append(f"{quoted(layer.name)} decodes to infinity")
            return None
        energy.add(first, signal, noise)
    return energy


def _equal(stored: FileSource, original: StoredSource, key: str, original_key: str) -> bool:
    if stored.tensors[key] != original.tensors[original_key]:
        return False
    pairs = zip(stored.pieces(key), original.pieces(original_key), strict=True)
    return all(a == b for a, b in pairs)
