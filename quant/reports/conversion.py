"""The report of a conversion, layer by layer: JSON for the browser and for scripts.

SQNR, the signal-to-quantization-noise ratio, is 10 log10(sum x^2 / sum (dequantized - x)^2) in dB
over a layer's weights. Higher is better; trained weights have about 31.5 dB in MXFP8. null stands
for a layer without any error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median

from ..container.header import plain
from . import document
from .budget import Chosen
from .units import format_count, format_seconds, format_size
from .verdict import BAD, GOOD, MIN_SQNR, NOTICE, STANDS_OUT, WEIGHTS, Part, Verdict, say, word_for

KEY = "mxfp8_report"
MXFP8 = "mxfp8"
KEPT = "kept"
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
        chosen: what a size or a quality that was asked for came to; None without one.
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
    chosen: Chosen | None = None

    @property
    def quantized(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.decision == MXFP8]

    @property
    def worst(self) -> LayerReport | None:
        """The quantized layer with the lowest SQNR."""
        lossy = [layer for layer in self.quantized if layer.sqnr_db is not None]
        return min(lossy, key=lambda layer: layer.sqnr_db, default=None)

    @property
    def stand_out(self) -> list[LayerReport]:
        """The quantized layers with much more error than the others of their rounding, or more
        than a sound layer can have; worst first."""
        found = []
        for calibrated in (False, True):
            group = [
                (layer.sqnr_db, layer)
                for layer in self.quantized
                if layer.sqnr_db is not None and (layer.output_error is not None) == calibrated
            ]
            if group:
                least = max(median(sqnr for sqnr, _ in group) - STANDS_OUT, self.min_sqnr_db)
                found += [pair for pair in group if pair[0] < least]
        return [layer for _, layer in sorted(found, key=lambda pair: pair[0])]

    @property
    def verdict(self) -> Verdict:
        """Sizes, and whether the result is as it should be."""
        before, after = self.bytes_before, self.bytes_after
        sizes = {"before": format_size(before), "after": format_size(after)}
        if after < before:
            size = say(
                "[before] -> [after], saves [saved]", saved=format_size(before - after), **sizes
            )
        else:
            size = say("[before] -> [after]", **sizes)
        if not self.quantized:
            return Verdict.of(NOTICE, size, say("no layer was quantized"))
        ratio = self._output_ratio
        if ratio is not None:
            level, how = (GOOD if ratio < 1 else NOTICE), self._calibrated(f"{ratio:.2f}")
        elif self.sqnr_db is None:
            level, how = GOOD, say("lossless")
        else:
            word = word_for(self.sqnr_db, WEIGHTS)
            level, how = word.level, Part(word.word)
        names = tuple(plain(layer.name) for layer in self.stand_out)
        if not names:
            return Verdict.of(level, size, how)
        look = say("look at these [count] layers", count=len(names))
        if len(names) == 1:
            look = say("look at this layer")
        return Verdict.of(BAD if level == BAD else NOTICE, size, how, look, layers=names)

    def to_json(self) -> str:
        """Versioned JSON; `from_json` is its inverse."""
        return document.write(KEY, asdict(self), self.verdict)

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Read a report back.

        Raises:
            FormatError: it is no report, one of another version, or a field is of another type.
        """
        return document.read(cls, KEY, text)

    def summary(self) -> str:
        """A few lines for a terminal or a node."""
        lines = [
            self.verdict.line(),
            say(
                "[source] -> [target], [percent]% of the size, in [time]",
                source=plain(self.source),
                target=plain(self.target),
                percent=f"{100 * self.bytes_after / max(self.bytes_before, 1):.1f}",
                time=format_seconds(self.seconds),
            ),
            say(
                "[layers] MXFP8, [others] not quantized (preset [preset], [architecture])",
                layers=format_count(len(self.quantized), "layer"),
                others=len(self.layers) - len(self.quantized),
                preset=self.preset,
                architecture=self.architecture or say("architecture not recognized"),
            ),
            *(f"WARNING: {warning}" for warning in self.warnings),
        ]
        if self.chosen is not None:
            lines.append(self.chosen.summary())
        if self.sqnr_db is not None and self.worst is not None:
            line = say(
                "SQNR [sqnr] dB; worst layer [layer]: [worst] dB",
                sqnr=f"{self.sqnr_db:.2f}",
                layer=plain(self.worst.name),
                worst=f"{self.worst.sqnr_db:.2f}",
            )
            lines.append(line)
        lines += self.output_errors()
        if self.calibration is not None:
            lines.append(self.calibrated_on)
        return "\n".join(map(str, lines))

    def output_errors(self) -> list[str]:
        """A line on the output errors of calibrated layers, if there are any."""
        about = self.calibration or {}
        measured = [x for x in self.layers if x.output_error is not None]
        count = about.get("rounded_layers")
        if type(count) is not int or count <= len(measured):  # older reports do not count them
            start = say("[layers] calibrated", layers=format_count(len(measured), "layer"))
        else:
            start = say(
                "output error measured on [measured] of [count] calibrated layers",
                measured=len(measured),
                count=count,
            )
        if self._output_ratio is None:
            return [str(start)] if type(count) is int and count > len(measured) else []
        line = say(
            "[layers]: layer output error [ratio]x of nearest rounding on average, [data] "
            "(weight SQNR is lower in exchange)",
            layers=start,
            ratio=f"{self._output_ratio:.2f}",
            data=self._measured_on,
        )
        return [str(line)]

    @property
    def calibrated_on(self) -> str | None:
        """The runs that the calibration saw, in words; None without one."""
        return None if self.calibration is None else _calibrated_on(self.calibration)

    @property
    def _output_ratio(self) -> float | None:
        """Output error over that of rounding to nearest, mean of the calibrated layers."""
        ratios = [
            x.output_error / x.nearest_error
            for x in self.layers
            if x.output_error is not None and x.nearest_error
        ]
        return fmean(ratios) if ratios else None

    @property
    def _measured_on(self) -> Part:
        held_out = "held_out" in (self.calibration or {})
        return say("on held-out data") if held_out else say("in-sample")

    def _calibrated(self, ratio: str) -> Part:
        if "held_out" in (self.calibration or {}):
            return say("calibrated, [ratio]x the output error of nearest rounding", ratio=ratio)
        return say(
            "calibrated, [ratio]x the output error of nearest rounding (in-sample)", ratio=ratio
        )


def _calibrated_on(about: dict) -> str:
    least = say("at least [rows] rows per layer", rows=about.get("least_rows"))
    seeds, steps, first = (about.get(key) for key in ("seeds", "steps", "first_seed"))
    if not all(type(number) is int for number in (seeds, steps, first)):
        # Made from Python, or before calibrations said more.
        return str(say("calibrated on [rows]", rows=least))
    run = say("seed [number]", number=first)
    if seeds > 1:
        run = say("seeds [first] to [last]", first=first, last=(first + seeds - 1) % 2**64)
    line = say(
        "calibrated on [seeds], [steps] steps each, [rows]", seeds=run, steps=steps, rows=least
    )
    return str(line)


def listed(label: str, sentences: Sequence[str]) -> list[str]:
    """A line for each of the first sentences, and one for the number of the rest."""
    lines = [f"{label}: {sentence}" for sentence in sentences[:_MOST_LISTED]]
    more = len(sentences) - len(lines)
    return [*lines, f"{label}: {more} more like these"] if more else lines


def last_line(sound: str, problems: Sequence[str] = (), warnings: Sequence[str] = ()) -> str:
    """The last line of a check: whether all is well, for those who read nothing else.

    Args:
        sound: what is so if there are no problems.
    """
    if problems:
        return f"NOT OK: {format_count(len(problems), 'problem')}; do not use this file"
    above = f"; {format_count(len(warnings), 'warning')} above" if warnings else ""
    return f"OK: {sound}{above}"


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
