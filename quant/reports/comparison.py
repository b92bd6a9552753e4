"""The comparison of two models on the same seeds, as data.

Both models sample the same seeds from the same noise, so each seed is a pair. The latent SNR of a
pair is 10 log10(sum r^2 / sum (m - r)^2) in dB, r the reference's latent and m the model's; higher
is closer, and null means that the two are identical. Means carry a bootstrap interval over seeds,
and the noise floor, how much the reference differs from itself, stands beside them (`Floor`):
without it no number shows whether the model or the sampler made the difference.

There are no images in it, and nothing here needs torch: `checks.inspect` reads it from a header.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean

from ..format import bare
from . import document
from .adapters import AdapterUse
from .units import format_count, format_seconds, format_size
from .verdict import BAD, GOOD, LATENTS, NOTICE, Part, Verdict, say, word_for

KEY = "mxfp8_comparison"
OLD_KEY = "mxfp8_certificate"  # its name in older files
_CONFIDENCE = 0.95
_RESAMPLES = 10_000
# Seeds for an interval. Over 8 normal values the bootstrap holds the mean nine times in ten, over 4
# four times in five.
FEWEST = 8


@dataclass(frozen=True)
class Mean:
    """A mean over `count` seeds with its 95% interval, a percentile bootstrap from a fixed random
    seed; `low` and `high` are None if there are fewer than FEWEST."""

    mean: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Seed:
    """The result of one seed.

    Attributes:
        identical: whether the two latents have the same values, bit for bit.
        latent_snr_db: None if they are identical or could not be compared.
        psnr_db, ssim: of the decoded images, peak 1; None without a VAE or if identical (PSNR).
        repeat_snr_db: of a second run of the reference against its first; other_noise_snr_db: of
            a run whose sampler drew other noise. None if that was not run or made no difference.
        problems: sentences on what is wrong with the outputs.
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
        paths: "backend, precision" for inputs of many rows -> number of MXFP8 layers.
        fingerprint: of its MXFP8 layers (see `fingerprint`), or of all its linears if none is MXFP8
            (`calibration.fingerprint`); None if LoRAs or patches change its weights.
        dtype: that it computes in.
        seconds: median time of a run in the sampler, recording of the steps included, without
            loading and, if there are others, without the first run.
        peak_bytes: the most that torch had allocated on the device during a run, with weights.
        adapters: the LoRAs on it.
    """

    model: str
    paths: dict[str, int] = field(metadata={"old_name": "ways"})
    fingerprint: str | None
    dtype: str
    seconds: float | None = None
    peak_bytes: int | None = None
    adapters: tuple[AdapterUse, ...] = ()

    def title(self) -> str:
        parts = [f"{count} MXFP8 layers on {path}" for path, count in self.paths.items()]
        parts.append(self.dtype)
        if self.adapters:
            parts.append("1 LoRA" if len(self.adapters) == 1 else f"{len(self.adapters)} LoRAs")
        return f"{self.model} ({'; '.join(parts)})"


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

    def __str__(self) -> str:
        return (
            f"{self.steps} steps of {self.sampler}/{self.scheduler}, cfg {self.cfg:g}, denoise "
            f"{self.denoise:g}, latent {list(self.latent_shape)}"
        )


@dataclass(frozen=True)
class Floor:
    """The noise floor: how much two runs of the reference on the same seed and noise differ.

    Attributes:
        repeats: whether a second run gave the same bits.
        draws: whether the sampler draws noise of its own, so that the latent depends on it.
        repeat_snr_db, other_noise_snr_db: means over seeds; None without such a difference.
    """

    repeats: bool
    draws: bool
    repeat_snr_db: Mean | None = None
    other_noise_snr_db: Mean | None = None

    def lines(self) -> list[str]:
        lines = []
        if self.repeats:
            lines.append("noise floor: none; a second run of the reference was identical")
        elif self.repeat_snr_db is not None:
            lines.append(
                "noise floor: the reference is not deterministic; its second run has SNR "
                f"{interval(self.repeat_snr_db, 'dB')}"
            )
        if self.draws and self.other_noise_snr_db is not None:
            lines.append(
                "this sampler draws noise of its own: with other noise the reference itself has "
                f"SNR {interval(self.other_noise_snr_db, 'dB')}"
            )
        return lines


@dataclass(frozen=True)
class Comparison:
    """A whole comparison.

    Attributes:
        latent_snr_db, psnr_db, ssim: means over the seeds that have them.
        floor: None if the reference's own output is not finite.
        notes: sentences on what was not measured, and why.
        predicted_snr_db: of the latents, by the budget that the model was made for; None without.
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
    predicted_snr_db: float | None = None

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

    @property
    def labels(self) -> tuple[str, str]:
        """What the reference and the model are, in a word each: "BF16" and "MXFP8"."""
        dtypes = {"F32": "FP32", "F16": "FP16"}
        first, second = (
            "MXFP8" if side.paths else dtypes.get(side.dtype, side.dtype)
            for side in (self.reference, self.model)
        )
        return (first, second) if first != second else ("reference", "model")

    @property
    def verdict(self) -> Verdict:
        """How close the two are."""
        count = len(self.seeds)
        seeds = say("1 seed") if count == 1 else say("[count] seeds", count=count)
        if self.problems:
            first, more = self.problems[0], len(self.problems) - 1
            if more:
                part = say("not usable: [problem] and [count] more", problem=first, count=more)
            else:
                part = say("not usable: [problem]", problem=first)
            return Verdict.of(BAD, part)
        if self.identical:
            part = say("identical: the same latents, bit for bit, [seeds]", seeds=seeds)
            return Verdict.of(GOOD, part)
        snr = self.latent_snr_db
        if snr is None:
            return Verdict.of(NOTICE, say("not measured, [seeds]", seeds=seeds))
        word = word_for(snr.mean, LATENTS)
        level, name = word.level, Part(word.word)
        repeat = self.floor.repeat_snr_db if self.floor else None
        if repeat is not None and snr.mean >= repeat.mean - 10 * math.log10(2):
            # What the model adds is no more than what the reference does by itself.
            level, name = GOOD, say("as close as [label] is to itself", label=self.labels[0])
        predicted = []
        if self.predicted_snr_db is not None:
            predicted.append(say("[snr] dB was predicted", snr=f"{self.predicted_snr_db:.1f}"))
        values = {"word": name, "snr": f"{snr.mean:.1f}", "seeds": seeds}
        if snr.low is not None and snr.high is not None:
            values |= {"low": f"{snr.low:.1f}", "high": f"{snr.high:.1f}"}
            part = say("[word]: latent SNR [snr] dB ([low] to [high]), [seeds]", **values)
            return Verdict.of(level, part, *predicted)
        return Verdict.of(
            level,
            say("[word]: latent SNR [snr] dB, [seeds]", **values),
            *predicted,
            say("use [count] for an interval", count=FEWEST),
        )

    def to_json(self) -> str:
        """Versioned JSON; `from_json` is its inverse."""
        return document.write(KEY, asdict(self), self.verdict)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Read a comparison back, also in its older form.

        Raises:
            FormatError: it is no comparison, one of another version, or a field is of another type.
        """
        return document.read(cls, KEY, text, OLD_KEY)

    def title(self) -> str:
        return f"{self.model.title()} against {self.reference.title()}"

    def summary(self) -> str:
        """A few lines for a terminal or a node."""
        versions = ", ".join(f"{name} {v}" for name, v in self.setting.versions.items())
        return "\n".join([
            self.verdict.text,
            self.title(),
            f"{format_count(len(self.seeds), 'seed')}, {self.setting}",
            *self._results(),
            *(self.floor.lines() if self.floor else []),
            *self._sides(),
            f"measured on {self.setting.device}: {versions}",
            *self.notes,
        ])  # fmt: skip

    def _results(self) -> list[str]:
        same = sum(seed.identical for seed in self.seeds)
        lines = [f"PROBLEM: {problem}" for problem in self.problems]
        if self.identical:
            lines.append("latents: identical on every seed, bit for bit")
        elif same:
            lines.append(f"latents: identical on {same} of {len(self.seeds)} seeds")
        low = self.lowest
        if self.latent_snr_db is not None and low is not None and len(self.seeds) > 1:
            lines.append(
                f"latent SNR {interval(self.latent_snr_db, 'dB')}; lowest {low.latent_snr_db:.2f} "
                f"dB at seed {low.seed}"
            )
        for name, unit, mean in (("PSNR", "dB", self.psnr_db), ("SSIM", "", self.ssim)):
            if mean is not None:
                lines.append(f"image {name} {interval(mean, unit)}")
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
                parts.append(f"{format_seconds(side.seconds)} per run")
            if side.peak_bytes is not None:
                parts.append(f"peak memory {format_size(side.peak_bytes)}")
            elif side.seconds is not None and self.setting.device.startswith("cpu"):
                parts.append("peak memory not available on a CPU")
            if parts:
                lines.append(f"{name}: {', '.join(parts)}")
            lines += [f"{name}: {adapter.line()}" for adapter in side.adapters]
        return lines


def fingerprint(rows: Iterable[tuple[str, bytes]]) -> str | None:
    """A hash that identifies a model's MXFP8 layers, loaded or in a file; None if there are none.

    It tells one model from another and does not detect damage.

    Args:
        rows: (name, codes of the first row) of each layer.
    """
    digest, count = hashlib.sha256(), 0
    for name, codes in sorted((bare(name), codes) for name, codes in rows):
        digest.update(json.dumps([name, len(codes)]).encode())
        digest.update(codes)
        count += 1
    return digest.hexdigest() if count else None


def interval(mean: Mean, unit: str) -> str:
    """A mean with its interval, if it has one, in words."""
    digits = 2 if unit else 4
    center = f"{mean.mean:.{digits}f} {unit}".rstrip()
    if mean.low is None or mean.high is None:
        return center if mean.count == 1 else f"{center} (mean, n = {mean.count})"
    low, high = (f"{value:.{digits}f}" for value in (mean.low, mean.high))
    return f"{center} (95% bootstrap CI {low} to {high}, n = {mean.count})"


def mean_of(values: Sequence[float | None]) -> Mean | None:
    """The mean of the values that are not None, with its interval if there are enough; None if
    all are None.

    Resampled with the standard library's generator, whose sequence is the same everywhere.
    """
    sample = [value for value in values if value is not None]
    if not sample:
        return None
    n = len(sample)
    if n < FEWEST:
        return Mean(fmean(sample), None, None, n)
    generator = random.Random(0)
    means = sorted(fmean(generator.choices(sample, k=n)) for _ in range(_RESAMPLES))
    tail = round((1 - _CONFIDENCE) / 2 * _RESAMPLES)
    return Mean(fmean(sample), means[tail], means[-1 - tail], n)
