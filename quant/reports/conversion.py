"""The report of a conversion, layer by layer: JSON for the browser and for scripts.

SQNR, the signal-to-quantization-noise ratio, is 10 log10(sum x^2 / sum (dequantized - x)^2) in dB
over a layer's weights. Higher is better; trained weights have about 31.5 dB in MXFP8. null stands
for a layer without any error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean

from ..container.header import plain
from . import document

KEY = "mxfp8_report"
MXFP8 = "mxfp8"
KEPT = "kept"
# dB, the least that rounding to E4M3 leaves: half a spacing of a value just above a power of two,
# 1 in 17. Trained weights have 31 to 32.
MIN_SQNR = 24.6
_MOST_LISTED = 20  # sentences in a summary; JSON has all


@dataclass(frozen=True)
class Block:
    """The block of 32 with the lowest SQNR."""

    row: int
    block: int
    sqnr_db: float


@dataclass(frozen=True)
class LayerReport:
    """One 2-D weight.

    Attributes:
        decision: "mxfp8" or "kept".
        dtype: of the source ("BF16", ...); shape: unpadded (N, K).
        bytes_before, bytes_after: of the weight with its scales and marker.
        sqnr_db: of a quantized layer; None if it has no error or was kept.
        output_error: relative error of the layer's output on held-out data if the conversion got
            such, else on the calibration data; nearest_error: the same with the weight rounded to
            nearest. None without a calibration.
    """

    name: str
    decision: str
    reason: str
    dtype: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None = None
    worst_block: Block | None = None
    output_error: float | None = None
    nearest_error: float | None = None


@dataclass(frozen=True)
class Report:
    """A whole conversion.

    Attributes:
        bytes_before, bytes_after: of all tensors, layers or not.
        seconds: wall time, writing and verification included.
        sqnr_db: over all quantized weights together.
        min_sqnr_db: the least that a sound layer has, for charts of the report.
        include, exclude: the regular expressions given beside the preset.
        calibration: the fingerprint of the "model" that was run, the number of "layers", their
            "least_rows", how many were quantized with it ("rounded_layers"), what the calibration
            says of itself ("first_seed", "seeds", "steps", "sampler", ...), and the same of the
            data for the output errors under "held_out", if that is other data; None without one.
        warnings: what the user should know of how the layers were chosen.
    """

    source: str
    target: str
    preset: str
    architecture: str | None
    bytes_before: int
    bytes_after: int
    seconds: float
    sqnr_db: float | None
    layers: tuple[LayerReport, ...] = field(repr=False)
    min_sqnr_db: float = MIN_SQNR
    include: str | None = None
    exclude: str | None = None
    calibration: dict | None = None
    warnings: tuple[str, ...] = ()

    @property
    def quantized(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.decision == MXFP8]

    @property
    def worst(self) -> LayerReport | None:
        """The quantized layer with the lowest SQNR."""
        lossy = [layer for layer in self.quantized if layer.sqnr_db is not None]
        return min(lossy, key=lambda layer: layer.sqnr_db, default=None)

    def to_json(self) -> str:
        """Versioned JSON; `from_json` is its inverse."""
        return document.write(KEY, asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report back.

        Raises:
            FormatError: it is no report, one of another version, or a field is of another type.
        """
        return document.read(cls, KEY, text)

    def summary(self) -> str:
        """A few lines for a terminal or a node."""
        kept = len(self.layers) - len(self.quantized)
        lines = [
            f"{self.source} -> {self.target}",
            f"{format_size(self.bytes_before)} -> {format_size(self.bytes_after)} "
            f"({100 * self.bytes_after / max(self.bytes_before, 1):.1f}%) in {self.seconds:.1f} s",
            f"{format_count(len(self.quantized), 'layer')} MXFP8, {kept} kept "
            f"(preset {self.preset}, {self.architecture or 'architecture not recognized'})",
            *(f"WARNING: {warning}" for warning in self.warnings),
        ]
        if self.sqnr_db is not None and self.worst is not None:
            lines.append(
                f"SQNR {self.sqnr_db:.2f} dB; worst layer {plain(self.worst.name)}: "
                f"{self.worst.sqnr_db:.2f} dB"
            )
        lines += self._output_errors()
        if self.calibration is not None:
            lines.append(_calibrated_on(self.calibration))
        return "\n".join(lines)

    def _output_errors(self) -> list[str]:
        """A line on the output errors of calibrated layers, if there are any."""
        about = self.calibration or {}
        measured = [x for x in self.layers if x.output_error is not None]
        count = about.get("rounded_layers")
        if type(count) is not int or count <= len(measured):  # older reports do not count them
            start = f"{len(measured)} layers calibrated"
        else:
            start = f"output error measured on {len(measured)} of {count} calibrated layers"
        ratios = [x.output_error / x.nearest_error for x in measured if x.nearest_error]
        if not ratios:
            return [start] if type(count) is int and count > len(measured) else []
        data = "held-out data" if "held_out" in about else "the calibration data itself"
        return [
            f"{start}: layer output error {fmean(ratios):.2f}x of nearest rounding on average, on "
            f"{data} (weight SQNR is lower in exchange)"
        ]


def _calibrated_on(about: dict) -> str:
    least = f"at least {about.get('least_rows')} rows per layer"
    seeds, steps, first = (about.get(key) for key in ("seeds", "steps", "first_seed"))
    if not all(type(number) is int for number in (seeds, steps, first)):
        return f"calibrated on {least}"  # made from Python, or before calibrations said more
    last = (first + seeds - 1) % 2**64
    run = f"seeds {first} to {last}" if seeds > 1 else f"seed {first}"
    return f"calibrated on {run}, {steps} steps each, {least}"


def listed(label: str, sentences: Sequence[str]) -> list[str]:
    """A line for each of the first sentences, and one for the number of the rest."""
    lines = [f"{label}: {sentence}" for sentence in sentences[:_MOST_LISTED]]
    more = len(sentences) - len(lines)
    return [*lines, f"{label}: {more} more like these"] if more else lines


def verdict(sound: str, problems: Sequence[str] = (), warnings: Sequence[str] = ()) -> str:
    """The last line of a check: whether all is well, for those who read nothing else.

    Args:
        sound: what is so if there are no problems.
    """
    if problems:
        return f"NOT OK: {format_count(len(problems), 'problem')}; do not use this file"
    above = f"; {format_count(len(warnings), 'warning')} above" if warnings else ""
    return f"OK: {sound}{above}"


def format_count(count: int, name: str, plural: str | None = None) -> str:
    return f"{count} {name if count == 1 else plural or f'{name}s'}"


def format_size(count: int) -> str:
    """A size in decimal units, as disks and model pages give it."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def sqnr_db(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise), or None without noise."""
    if noise == 0:
        return None
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


class SqnrAccumulator:
    """Adds up signal and noise over the slabs of one layer and keeps its worst block."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = 0.0
        self.worst: Block | None = None

    def add(self, first_row: int, signal, noise) -> None:
        """Add float64 [m, blocks] energies of the rows from `first_row` on."""
        self.signal += float(signal.sum())
        self.noise += float(noise.sum())
        ratio = (noise / signal.clamp_min(1e-300)).flatten()
        if ratio.any():
            index = int(ratio.argmax())
            row, block = divmod(index, signal.shape[1])
            value = -10 * math.log10(float(ratio[index]))
            self._keep(Block(first_row + row, block, value))

    def merge(self, later: SqnrAccumulator) -> None:
        """Add the sums over rows further down."""
        self.signal += later.signal
        self.noise += later.noise
        if later.worst is not None:
            self._keep(later.worst)

    def _keep(self, block: Block) -> None:
        if self.worst is None or block.sqnr_db < self.worst.sqnr_db:
            self.worst = block

    @property
    def sqnr_db(self) -> float | None:
        return sqnr_db(self.signal, self.noise)


def total_sqnr(layers: Iterable[SqnrAccumulator]) -> float | None:
    """SQNR over several layers together."""
    layers = list(layers)
    return sqnr_db(sum(layer.signal for layer in layers), sum(layer.noise for layer in layers))
