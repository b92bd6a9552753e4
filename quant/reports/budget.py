"""What a model's size buys: the damage of every layer, and the curve of size against error.

SNR is of the model's output (of a diffusion model the final latent), the mean over prompts in dB,
as a comparison reports it. Everything is predicted from sensitivities (`budget.sensitivity`) unless
it is said to be measured.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from . import document
from .units import format_count, format_size
from .verdict import say

KEY = "mxfp8_budget"
_ADD_UP = 0.8, 1.25  # measured over predicted energy of all layers, within which damages add up


@dataclass(frozen=True)
class Point:
    """A file that could be made.

    Attributes:
        label: what it is: "all MXFP8", a layer that is kept beside those of the points before it,
            a preset, "quant_probe's advice".
        bytes: of its tensors.
        kept: layers that stay as they are though MXFP8 could hold them.
        snr_db: predicted; None without any error, or where it is not known: see `unmeasured`.
        low, high: one standard error below and above, in dB.
        unmeasured: quantized layers whose damage is not known.
    """

    label: str
    bytes: int
    kept: int
    snr_db: float | None = None
    low: float | None = None
    high: float | None = None
    unmeasured: int = 0

    def __str__(self) -> str:
        return f"{self.label}: {format_size(self.bytes)}, {snr(self)}"


@dataclass(frozen=True)
class LayerDamage:
    """One layer that may be MXFP8.

    Attributes:
        damage: noise energy in the model's output over its own; deviation: its standard error.
        bytes: that keeping it costs, beside MXFP8.
        kept: whether the target keeps it.
    """

    name: str
    damage: float
    deviation: float
    bytes: int
    kept: bool = False


@dataclass(frozen=True)
class Chosen:
    """What a target comes to.

    Attributes:
        target: as it was given.
        point: the file.
        layers: those that are kept for it, without the prefix of a diffusion model.
        exclude: regular expressions that match these keys of the model and no other.
    """

    target: str
    point: Point
    layers: tuple[str, ...]
    exclude: tuple[str, ...]

    def summary(self) -> str:
        """In a line."""
        line = say(
            "target [target]: [layers] kept, [size], predicted [snr]",
            target=self.target, layers=format_count(len(self.layers), "layer"),
            size=format_size(self.point.bytes), snr=snr(self.point),
        )  # fmt: skip
        return str(line)


@dataclass(frozen=True)
class Budget:
    """The curve of a model.

    Attributes:
        preset, exclude: that chose which layers may be MXFP8, a name and regular expressions.
        bytes_before: of the original's tensors.
        layers: that may be MXFP8, most damage per byte first, the order in which the curve keeps
            them.
        curve: all in MXFP8, then each with one more layer kept.
        others: presets and quant_probe's advice.
        chosen: what a target comes to; None without one.
        together: measured damage of all layers at once over the sum of theirs; None if unknown.
        samples, runs: that the damages were measured with.
    """

    file: str
    architecture: str | None
    preset: str
    bytes_before: int
    layers: tuple[LayerDamage, ...] = field(repr=False)
    curve: tuple[Point, ...] = field(repr=False)
    others: tuple[Point, ...] = ()
    chosen: Chosen | None = None
    together: float | None = None
    samples: int = 0
    runs: int = 0
    exclude: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        return document.write(KEY, asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Budget:
        """Raises FormatError for anything else."""
        return document.read(cls, KEY, text)

    @property
    def interaction(self) -> str | None:
        """What to say where damages do not add up; None where they do, or where it is unknown."""
        low, high = _ADD_UP
        if self.together is None or low <= self.together <= high:
            return None
        off = 10 * math.log10(self.together)
        return (
            f"layers interact: rounding all of them does {self.together:.2f} times the sum of "
            f"their damages, so predictions may be off by {off:+.1f} dB"
        )


def snr(point: Point) -> str:
    """A point's SNR in words, with its standard error."""
    if point.unmeasured:
        return f"SNR unknown ({format_count(point.unmeasured, 'layer')} not measured)"
    if point.snr_db is None:
        return "no error"
    text = f"{point.snr_db:.1f} dB"
    if point.low is not None and point.high is not None:
        text += f" ({point.low:.1f} to {point.high:.1f})"
    return text


def make_point(label: str, nbytes: int, kept: int, noise: float, deviation: float = 0.0) -> Point:
    """A point with a predicted noise energy and its standard error."""
    if noise <= 0:
        return Point(label, nbytes, kept)
    db = -10 * math.log10(noise)
    if not 0 < deviation < math.inf:
        return Point(label, nbytes, kept, db)
    # The standard error of the logarithm, which stays finite where the error is large.
    spread = 10 / math.log(10) * deviation / noise
    return Point(label, nbytes, kept, db, db - spread, db + spread)
