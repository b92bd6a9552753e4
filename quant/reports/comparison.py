"""How near one model's output is to another's, as data: what was sampled, on what, what came of it.

Both models sample the same seeds from the same noise, so each seed is a pair. The latent SNR of a
pair is 10 log10(sum r^2 / sum (m - r)^2) in dB, r the reference's latent and m the model's; higher
is nearer, and null means that the two are identical. Means carry a bootstrap interval over seeds,
and what the reference differs from itself by (`Floor`) stands beside them: without it no number
says whether the model or the sampler made the difference.

A comparison is plain JSON with a version, as a conversion's report is. It may come from anyone's
file, so `from_json` checks the type of every field. There are no images in it, and nothing here
needs torch: `inspection` reads it from a header.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass

from ..format import bare
from .conversion import gigabytes

VERSION = 1
KEY = "mxfp8_comparison"
OLD_KEY = "mxfp8_certificate"  # in older files, where paths were "ways"
_CONFIDENCE = 0.95
_RESAMPLES = 10_000
_FEW = 10  # seeds; below, `interval` says that it is narrow


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and its 95% interval, a percentile bootstrap with a fixed seed.

    With few seeds it is too narrow, as any bootstrap is: with four it holds the true mean about
    four times in five.
    """

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Seed:
    """What one seed gave.

    Attributes:
        identical: whether the two latents have the same values, bit for bit.
        latent_snr_db: None where they are identical or could not be compared.
        psnr_db, ssim: of the decoded images, peak 1; None without a VAE or if identical (PSNR).
        repeat_snr_db: of a second run of the reference against its first; other_noise_snr_db: of
            a run whose sampler drew other noise. None where that was not run or made no difference.
        problems: what is wrong with the outputs, in words.
    """

    seed: int
    identical: bool
    latent_snr_db: float | None = None
    psnr_db: float | None = None
    ssim: float | None = None
    repeat_snr_db: float | None = None
    other_noise_snr_db: float | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One sampler step, counted from 1.

    Attributes:
        divergence: |m - r| / |r| of the predictions of the denoised latent, mean over seeds.
        worst: the same of the worst seed.
    """

    step: int
    sigma: float
    divergence: float
    worst: float


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
        paths: "backend, precision" of MXFP8 layers, given many rows -> how many run so.
        fingerprint: of its MXFP8 layers (see `fingerprint`), or, in a model that has none, of all
            its linears (`calibration.fingerprint`); None where LoRAs or patches change weights.
        dtype: that it computes in.
        seconds: median of its runs in the sampler, loading not counted, nor the first run where
            there are others; steps are noted meanwhile.
        peak_bytes: of what torch allocated on the device while it ran, weights included.
    """

    model: str
    paths: dict[str, int]
    fingerprint: str | None
    dtype: str
    seconds: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Setting:
    """What was sampled, and where."""

    sampler: str
    scheduler: str
    steps: int
    cfg: float
    denoise: float
    latent_shape: tuple[int, ...]
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Floor:
    """What two runs of the reference on the same seed and the same first noise differ by.

    Attributes:
        repeats: whether a second run gave the same bits.
        draws: whether the sampler draws noise of its own, so that other noise gives another latent.
        repeat_snr_db, other_noise_snr_db: means over seeds, where there is such a difference.
    """

    repeats: bool
    draws: bool
    repeat_snr_db: Mean | None = None
    other_noise_snr_db: Mean | None = None


@dataclass(frozen=True)
class Comparison:
    """A whole comparison.

    Attributes:
        latent_snr_db, psnr_db, ssim: means over the seeds that have them.
        floor: None where the reference's own output is no number.
        notes: what was not measured, and why.
    """

    reference: Side
    model: Side
    setting: Setting
    latent_snr_db: Mean | None
    psnr_db: Mean | None
    ssim: Mean | None
    floor: Floor | None
    steps: tuple[Step, ...]
    seeds: tuple[Seed, ...]
    notes: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        return bool(self.seeds) and all(seed.identical for seed in self.seeds)

    @property
    def problems(self) -> list[str]:
        return [f"seed {s.seed}: {problem}" for s in self.seeds for problem in s.problems]

    @property
    def lowest(self) -> Seed | None:
        """The seed with the lowest latent SNR."""
        measured = [seed for seed in self.seeds if seed.latent_snr_db is not None]
        return min(measured, key=lambda seed: seed.latent_snr_db, default=None)

    def to_json(self, indent: int | None = 1) -> str:
        """Versioned JSON; `from_json` is its inverse."""
        return json.dumps({KEY: VERSION, **asdict(self)}, indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Read a comparison back, also in its older form.

        Raises:
            ValueError: no comparison, one of another version, or a field is not what it must be.
        """
        try:
            data = json.loads(text, parse_constant=_refuse_constant)
        except RecursionError as error:
            raise ValueError("nested too deeply for an MXFP8 comparison") from error
        if isinstance(data, dict) and OLD_KEY in data:
            _update(data)
        version = data.pop(KEY, None) if isinstance(data, dict) else None
        if version != VERSION:
            raise ValueError(f"not an MXFP8 comparison of version {VERSION} (found {version!r})")
        return _read(cls, data, "comparison")

    def title(self) -> str:
        return f"{named(self.model)} against {named(self.reference)}"

    def summary(self) -> str:
        """Some lines for a terminal or a node."""
        setting = self.setting
        versions = ", ".join(f"{name} {v}" for name, v in setting.versions.items())
        lines = [
            self.title(),
            f"{len(self.seeds)} seeds, {setting.steps} steps of {setting.sampler}/"
            f"{setting.scheduler}, cfg {setting.cfg:g}, denoise {setting.denoise:g}, latent "
            f"{list(setting.latent_shape)}",
            *self._results(),
            *_floor_lines(self.floor),
            *self._sides(),
            f"measured on {setting.device}: {versions}",
            *self.notes,
        ]
        return "\n".join(lines)

    def _results(self) -> list[str]:
        same = sum(seed.identical for seed in self.seeds)
        lines = [f"PROBLEM: {problem}" for problem in self.problems]
        if self.identical:
            lines.append("latents: identical on every seed, bit for bit")
        elif same:
            lines.append(f"latents: identical on {same} of {len(self.seeds)} seeds")
        low = self.lowest
        if self.latent_snr_db is not None and low is not None:
            lines.append(
                f"latent SNR {interval(self.latent_snr_db, 'dB')}; lowest {low.latent_snr_db:.2f} "
                f"dB, seed {low.seed}"
            )
        for name, unit, mean in (("PSNR", "dB", self.psnr_db), ("SSIM", "", self.ssim)):
            if mean is not None:
                lines.append(f"{name} of the images {interval(mean, unit)}")
        if self.steps and not self.identical:
            first, last = self.steps[0], self.steps[-1]
            lines.append(
                f"relative difference of the predictions: {first.divergence:.2g} at step "
                f"{first.step}, {last.divergence:.2g} at step {last.step}"
            )
        return lines

    def _sides(self) -> list[str]:
        lines = []
        for name, side in (("reference", self.reference), ("model", self.model)):
            parts = [] if side.fingerprint is None else [f"fingerprint {side.fingerprint[:12]}"]
            if side.seconds is not None:
                parts.append(f"{side.seconds:.2f} s a run")
            if side.peak_bytes is not None:
                parts.append(f"peak memory {gigabytes(side.peak_bytes)}")
            if parts:
                lines.append(f"{name}: {', '.join(parts)}")
        return lines


def fingerprint(rows: Iterable[tuple[str, bytes]]) -> str | None:
    """A hash by which a model's MXFP8 layers are known again, loaded or in a file; None of none.

    It tells one model from another, and says nothing of damage.

    Args:
        rows: (name, codes of the first row) of each layer.
    """
    digest, count = hashlib.sha256(), 0
    for name, codes in sorted((bare(name), codes) for name, codes in rows):
        digest.update(json.dumps([name, len(codes)]).encode())
        digest.update(codes)
        count += 1
    return digest.hexdigest() if count else None


def named(side: Side) -> str:
    """A model in a few words."""
    if not side.paths:
        return f"{side.model} ({side.dtype})"
    paths = "; ".join(f"{count} MXFP8 layers on {path}" for path, count in side.paths.items())
    return f"{side.model} ({paths}; {side.dtype})"


def interval(mean: Mean, unit: str) -> str:
    """A mean with its interval, for people."""
    digits = 2 if unit else 4
    low, high = f"{mean.low:.{digits}f}", f"{mean.high:.{digits}f}"
    shown = " ".join(filter(None, (f"{mean.mean:.{digits}f}", unit)))
    narrow = ", too narrow" if mean.count < _FEW else ""
    return f"{shown} (bootstrap 95%{narrow} for n = {mean.count}: {low} to {high})"


def _floor_lines(floor: Floor | None) -> list[str]:
    lines = []
    if floor is None:
        return lines
    if floor.repeats:
        lines.append("noise floor: none; a second run of the reference gave the same bits")
    elif floor.repeat_snr_db is not None:
        lines.append(
            "noise floor: the reference does not repeat itself; its second run has an SNR of "
            f"{interval(floor.repeat_snr_db, 'dB')}"
        )
    if floor.draws and floor.other_noise_snr_db is not None:
        lines.append(
            "this sampler draws noise of its own: with other such noise the reference itself has "
            f"an SNR of {interval(floor.other_noise_snr_db, 'dB')}"
        )
    return lines


def mean_of(values: Sequence[float | None]) -> Mean | None:
    """The mean of those values that are there, with its interval; None of none.

    Resampled with the standard library's generator, whose sequence is the same everywhere.
    """
    found = [value for value in values if value is not None]
    if not found:
        return None
    generator = random.Random(0)
    n = len(found)
    means = sorted(math.fsum(generator.choices(found, k=n)) / n for _ in range(_RESAMPLES))
    tail = round((1 - _CONFIDENCE) / 2 * _RESAMPLES)
    return Mean(math.fsum(found) / n, means[tail], means[-1 - tail], n)


def _update(data: dict) -> None:
    """Rename what `OLD_KEY` had under other names."""
    data[KEY] = data.pop(OLD_KEY)
    for side in (data.get("reference"), data.get("model")):
        if isinstance(side, dict) and "ways" in side:
            side["paths"] = side.pop("ways")


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no number of JSON")


def _read(kind, value, where: str):
    """A value of JSON as a field's type, checked.

    Raises:
        ValueError: it is of another type; the message names the field.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # of a type and None
        return None if value is None else _read(arguments[0], value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_read(arguments[0], part, f"{where}[{i}]") for i, part in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _read(arguments[1], part, where) for key, part in value.items()}
    if is_dataclass(kind) and isinstance(value, dict):
        return _read_fields(kind, value, where)
    if kind is float and type(value) in (int, float) and abs(value) <= 1e300:
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise ValueError(f"{where} is not of type {getattr(kind, '__name__', kind)}")


def _read_fields(kind, value: dict, where: str):
    expected = {field.name for field in fields(kind)}
    if value.keys() != expected:
        odd = min(value.keys() ^ expected)
        raise ValueError(f"field {odd[:80]!r} of the {where} is missing or unknown")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _read(hints[name], value[name], name) for name in value})
