"""What a conversion did, layer by layer, as data: the one contract with the browser and scripts.

A report is plain JSON with a version. SQNR, the signal-to-quantization-noise ratio, is
10 log10(sum x^2 / sum (dequantized - x)^2) in dB over a layer's weights; higher is better, and
MXFP8 of trained weights has about 31.5. null means that nothing was lost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

VERSION = 1
MXFP8 = "mxfp8"
KEPT = "kept"
# dB. Rounding to E4M3 leaves 31 to 32 of trained weights. The worst is half a spacing of a value
# just above a power of two, 1 in 17.
MIN_SQNR = 24.6


@dataclass(frozen=True)
class Block:
    """The block of 32 that lost most, relative to its own size."""

    row: int
    block: int
    sqnr_db: float


@dataclass(frozen=True)
class LayerReport:
    """One 2-D weight.

    Attributes:
        decision: "mxfp8" or "kept".
        reason: why, in words.
        dtype: of the source ("BF16", ...); shape: unpadded (N, K).
        bytes_before, bytes_after: of the weight with its scales and marker.
        sqnr_db: of a quantized layer; None where nothing was lost or nothing was quantized.
        output_error: relative error of the layer's output on the inputs of a calibration, and
            nearest_error, what rounding to nearest has there; None without one.
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
        min_sqnr_db: what a sound layer has at least; for who draws the report.
        include, exclude: the expressions that were given beside the preset.
        calibration: what the weights were rounded for: the "model" that was run, as its
            fingerprint, the number of "layers", their "least_rows", and whatever the calibration
            says of itself ("first_seed", "seeds", "steps", "sampler", ...); None without one.
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
        return json.dumps({"mxfp8_report": VERSION, **asdict(self)}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report back.

        Raises:
            ValueError: no report, or one of another version.
        """
        data = json.loads(text)
        version = data.pop("mxfp8_report", None) if isinstance(data, dict) else None
        if version != VERSION:
            raise ValueError(f"not an MXFP8 report of version {VERSION} (found {version!r})")
        try:
            layers = tuple(_layer_from(entry) for entry in data.pop("layers"))
            found = cls(**data, layers=layers)
        except (KeyError, TypeError) as error:
            raise ValueError(f"a field of the report is missing or unknown: {error}") from error
        if not isinstance(found.calibration, dict | None):
            raise ValueError("calibration of the report is no object of JSON")
        return found

    def summary(self) -> str:
        """A few lines for a terminal or a node."""
        kept = len(self.layers) - len(self.quantized)
        lines = [
            f"{self.source} -> {self.target}",
            f"{gigabytes(self.bytes_before)} -> {gigabytes(self.bytes_after)} "
            f"({100 * self.bytes_after / max(self.bytes_before, 1):.1f}%) in {self.seconds:.1f} s",
            f"{len(self.quantized)} layers MXFP8, {kept} kept (preset {self.preset}, "
            f"{self.architecture or 'architecture not recognized'})",
        ]
        if self.sqnr_db is not None:
            lines.append(
                f"SQNR {self.sqnr_db:.2f} dB; worst layer {self.worst.name}: "
                f"{self.worst.sqnr_db:.2f} dB"
            )
        calibrated = [layer for layer in self.layers if layer.nearest_error]
        if calibrated:
            ratios = [layer.output_error / layer.nearest_error for layer in calibrated]
            lines.append(
                f"{len(calibrated)} layers calibrated: what they put out is off by "
                f"{sum(ratios) / len(ratios):.2f} of what rounding to nearest leaves, on average "
                "(their weights are off by more, as meant)"
            )
        if self.calibration is not None:
            lines.append(_calibrated_on(self.calibration))
        return "\n".join(lines)


def _calibrated_on(about: dict) -> str:
    least = f"at least {about.get('least_rows')} rows a layer"
    seeds, steps, first = (about.get(key) for key in ("seeds", "steps", "first_seed"))
    if not all(type(number) is int for number in (seeds, steps, first)):
        return f"calibrated on {least}"  # from Python, or saved before calibrations said more
    return f"calibrated on {seeds} seeds of {steps} steps from seed {first}, {least}"


def _layer_from(entry: dict) -> LayerReport:
    block = entry.pop("worst_block")
    shape = tuple(entry.pop("shape"))
    return LayerReport(**entry, shape=shape, worst_block=None if block is None else Block(**block))


def listed(label: str, sentences: Sequence[str], most: int) -> list[str]:
    """Lines with the first of some sentences, and how many there are more."""
    lines = [f"{label}: {sentence}" for sentence in sentences[:most]]
    more = len(sentences) - most
    return [*lines, f"and {more} more of these"] if more > 0 else lines


def gigabytes(count: int) -> str:
    """A size for people: decimal units, as disks and model pages use."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def sqnr_db(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise), or None where there is no noise."""
    if noise == 0:
        return None
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


class SqnrAccumulator:
    """Adds up signal and noise over the slabs of one layer, remembering its worst block."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = 0.0
        self.worst: Block | None = None

    def add(self, first_row: int, signal, noise) -> None:
        """Account for float64 [m, blocks] energies of the rows from `first_row`."""
        self.signal += float(signal.sum())
        self.noise += float(noise.sum())
        ratio = (noise / signal.clamp_min(1e-300)).flatten()
        index = int(ratio.argmax()) if ratio.numel() else 0
        if ratio.numel() and ratio[index] > 0:
            row, block = divmod(index, signal.shape[1])
            value = -10 * math.log10(float(ratio[index]))
            if self.worst is None or value < self.worst.sqnr_db:
                self.worst = Block(first_row + row, block, value)

    def merge(self, later: SqnrAccumulator) -> None:
        """Account for what was added up over rows further down."""
        self.signal += later.signal
        self.noise += later.noise
        if later.worst and (self.worst is None or later.worst.sqnr_db < self.worst.sqnr_db):
            self.worst = later.worst

    @property
    def sqnr_db(self) -> float | None:
        return sqnr_db(self.signal, self.noise)


def total_sqnr(energies: Iterable[SqnrAccumulator]) -> float | None:
    """SQNR over several layers together."""
    energies = list(energies)
    return sqnr_db(sum(e.signal for e in energies), sum(e.noise for e in energies))
