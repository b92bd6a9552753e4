"""Two models on the same seeds, through ComfyUI's own KSampler: what a comparison is made of.

A wrapper on a clone of each model notes what the sampler predicts at every step, the noise levels
it was given and the time it took. So models run with whatever is on them: LoRAs, other packs'
wrappers, offloading. Each model runs alone, the other unloaded, so that memory and time are its
own. Seeds are taken in groups whose noted steps fit 1 GB, first all of them on the reference, then
on the model: so large models are not swapped for every seed, and memory does not grow with seeds.

What the reference differs from itself by is found with few runs: one with other noise in the
sampler. If that changes nothing, the sampler draws none and the runs repeat. If it does, a plain
second run tells which of the two it was, and every seed is run again for what was found.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import comfy.model_management
import nodes as comfy_nodes
import torch
from comfy.patcher_extension import WrappersMP

from ...kernels import layout
from ...quant.container.header import quoted
from ...quant.reports import metrics
from ...quant.reports.comparison import Floor, Seed, Side, Step, mean_of
from ..host.progress import Progress
from ..loading import ROWS
from ..runtime.describe import describe, linears, synchronize
from . import fingerprints
from .fingerprints import plain

_KEY = "mxfp8_compare"
_KEPT = 1 << 30  # bytes of noted steps


@dataclass(frozen=True)
class Settings:
    """What KSampler is given, but for model and seed."""

    steps: int
    cfg: float
    sampler: str
    scheduler: str
    positive: list
    negative: list
    latent: dict
    denoise: float


@dataclass(frozen=True)
class Run:
    """One run of the sampler.

    Attributes:
        samples: the latent, as KSampler returns it; predictions: the denoised latent at each step,
            as `comparison.flat` has it; sigmas: of all steps and the end.
        seconds: in the sampler, the device waited for.
    """

    samples: torch.Tensor
    predictions: list[torch.Tensor]
    sigmas: list[float]
    seconds: float

    @property
    def nbytes(self) -> int:
        return sum(prediction.nbytes for prediction in self.predictions)

    @property
    def latent(self) -> torch.Tensor:
        return metrics.flat(self.samples)

    @property
    def shape(self) -> tuple[int, ...]:
        nested = getattr(self.samples, "is_nested", False)
        return tuple((self.samples.unbind()[0] if nested else self.samples).shape)


class Sampler:
    """One of the two models, with the times and the memory of its runs.

    Args:
        tick: called after each step with the number done in this run.
    """

    def __init__(self, name: str, patcher, settings: Settings, tick: Callable[[str, int], None]):
        self.name = name
        self.patcher = patcher
        self._settings = settings
        self._tick = tick
        self._seconds: list[list[float]] = []  # by loading
        self._peak: int | None = None

    def load_alone(self) -> None:
        """Unload every other model before the next run; what was measured so far is kept."""
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        self._seconds.append([])
        if self.patcher.load_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.patcher.load_device)

    def run(self, seed: int, sampler_seed: int | None = None) -> Run:
        """Sample a seed.

        Args:
            sampler_seed: of the noise that the sampler draws itself, if it is another.
        """
        device = self.patcher.load_device
        predictions: list[torch.Tensor] = []
        found: dict = {}

        def sample(executor, guider, sigmas, extra, callback, *args, **options):
            def note(step, prediction, x, total) -> None:
                predictions.append(metrics.flat(prediction))
                self._tick(f"{self.name}, seed {seed}", len(predictions))

            if sampler_seed is not None:
                extra = {**extra, "seed": sampler_seed}
            synchronize(device)
            start = time.perf_counter()
            result = executor(guider, sigmas, extra, note, *args, **options)
            synchronize(device)
            found.update(seconds=time.perf_counter() - start, sigmas=sigmas.tolist())
            return result

        clone = self.patcher.clone()
        clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, _KEY, sample)
        s = self._settings
        (result,) = comfy_nodes.common_ksampler(
            clone, seed, s.steps, s.cfg, s.sampler, s.scheduler, s.positive, s.negative, s.latent,
            denoise=s.denoise,
        )  # fmt: skip
        if not found:
            raise ValueError(
                f"nothing was sampled: {s.steps} steps of {s.scheduler} with denoise {s.denoise:g} "
                "are none"
            )
        self._seconds[-1].append(found["seconds"])
        if device.type == "cuda":
            self._peak = max(self._peak or 0, torch.cuda.max_memory_allocated(device))
        return Run(result["samples"], predictions, found["sigmas"], found["seconds"])

    def side(self, note: Callable[[str], None]) -> Side:
        """What ran, and what it took; while the model is loaded."""
        described = describe(self.patcher, ROWS, folds=False)
        fingerprint = fingerprints.of_mxfp8 if described.mxfp8 else fingerprints.of_linears
        if any(layer.precision == "fast" for layer in described.mxfp8):
            note(f"fast holds for inputs of many rows; of few rows they run {described.small_m}")
        warm = [s for loading in self._seconds for s in loading[1:]]
        return Side(
            model=described.model,
            paths=dict(described.paths()),
            fingerprint=fingerprint(self.patcher),
            dtype=described.dtype,
            seconds=statistics.median(warm or [s for loading in self._seconds for s in loading]),
            peak_bytes=self._peak,
        )


def check_pair(reference, model) -> None:
    """Check that two ModelPatchers are of one architecture.

    Raises:
        ValueError: their classes, their latents or the sizes of layers differ.
    """
    ours, theirs = (type(p.model).__name__ for p in (model, reference))
    if ours != theirs:
        raise ValueError(f"the model is a {ours}, the reference a {theirs}; compare like with like")
    formats = [type(p.get_model_object("latent_format")).__name__ for p in (model, reference)]
    if formats[0] != formats[1]:
        raise ValueError(f"the model's latents are {formats[0]}, the reference's {formats[1]}")
    known = {plain(name): m for name, m in linears(reference.model)}
    for name, module in linears(model.model):
        other = known.get(plain(name))
        if other is None:
            continue
        shapes = [tuple(m.weight.shape) for m in (module, other)]
        if layout.padded_shape(*shapes[0]) != layout.padded_shape(*shapes[1]):
            raise ValueError(
                f"layer {quoted(name)} is {list(shapes[0])} in the model and {list(shapes[1])} in "
                "the reference; they are models of different sizes"
            )


def _check_runs(reference: Run, other: Run) -> None:
    """Raise ValueError for two runs that are no pair."""
    if reference.sigmas != other.sigmas:
        named = [", ".join(f"{s:.4g}" for s in run.sigmas[:4]) for run in (reference, other)]
        raise ValueError(
            f"the model was sampled at the noise levels {named[1]}, ..., the reference at "
            f"{named[0]}, ...; put the same ModelSampling node on both"
        )
    if reference.shape != other.shape:
        raise ValueError(
            f"the model's latent is {list(other.shape)}, the reference's {list(reference.shape)}; "
            "they cannot be compared"
        )


class Paired:
    """Samples both models and adds up what they differ by.

    Args:
        decode: samples -> images [B, H, W, C]; None if there is no VAE.
    """

    def __init__(self, reference, model, settings: Settings, decode, progress: Progress):
        self._steps = settings.steps
        self._progress = progress
        self._done = self._total = 0
        self.reference = Sampler("reference", reference, settings, self._tick)
        self.model = Sampler("model", model, settings, self._tick)
        self._decode = decode
        self._errors: list[list[float]] = []  # by step, then by seed
        self._sigmas: list[float] = []
        self._repeats = self._draws = None
        self.seeds: list[Seed] = []
        self.notes: list[str] = []
        self.images = None  # of the first seed
        self.shape: tuple[int, ...] = ()
        self.sides: tuple[Side, Side] | None = None

    def run(self, seeds: list[int]) -> None:
        """Sample these seeds on both.

        Raises:
            ValueError: the two do not sample at the same noise levels, or make other latents.
        """
        self._total = 2 * len(seeds) + 1
        left, sides = list(seeds), [None, None]
        while left:
            self.reference.load_alone()
            group: list[tuple[int, Run, dict]] = []
            while left and sum(run.nbytes for _, run, _ in group) < _KEPT:
                seed = left.pop(0)
                run = self._count(self.reference.run(seed))
                group.append((seed, run, self._find_floor(seed, run, 1 + len(left))))
            sides[0] = self.reference.side(self._note)
            self.model.load_alone()
            pairs = []
            for seed, run, floor in group:
                other = self._count(self.model.run(seed))
                _check_runs(run, other)
                pairs.append((self._compare(seed, run, other, floor), run, other))
                for noted in (run, other):
                    noted.predictions.clear()
            sides[1] = self.model.side(self._note)
            self.seeds += [self._see(*pair) for pair in pairs]
        self.sides = tuple(sides)

    def _tick(self, key: str, step: int) -> None:
        done = self._done * self._steps + min(step, self._steps)
        self._progress(done, self._total * self._steps, key)

    def _count(self, run: Run) -> Run:
        self._done += 1
        self.shape = self.shape or run.shape
        return run

    def _find_floor(self, seed: int, first: Run, left: int) -> dict[str, float | None]:
        """Run the reference again as far as that tells something; SNR in dB by field of `Seed`.

        Args:
            left: seeds that are yet to come, this one included.
        """
        latent, found = first.latent, {}
        if metrics.latent_problem(latent):
            return found

        def again(name: str, sampler_seed: int | None) -> torch.Tensor:
            other = self._count(self.reference.run(seed, sampler_seed)).latent
            found[name] = metrics.snr_db(latent, other)
            return other

        if self._repeats is None:
            other = again("other_noise_snr_db", (seed + 1) % 2**64)
            if torch.equal(other, latent):
                self._repeats, self._draws = True, False
                return found
            self._total += 1
            same = again("repeat_snr_db", None)
            self._repeats = torch.equal(same, latent)
            # Where runs do not repeat, noise counts if it makes twice the difference, or 6 dB.
            noises = [float((x.double() - latent).norm()) for x in (other, same)]
            self._draws = noises[0] > 2 * noises[1]
            if not self._draws:
                del found["other_noise_snr_db"]
            self._total += (left - 1) * (self._draws + (not self._repeats))
        else:
            if self._draws:
                again("other_noise_snr_db", (seed + 1) % 2**64)
            if not self._repeats:
                again("repeat_snr_db", None)
        return found

    def _compare(self, seed: int, reference: Run, other: Run, floor: dict) -> Seed:
        latents = [run.latent for run in (reference, other)]
        problems = tuple(
            f"the {name}: {problem}"
            for name, latent in zip(("reference", "model"), latents, strict=True)
            if (problem := metrics.latent_problem(latent))
        )
        if not problems:
            self._add_steps(reference, other)
        return Seed(
            seed=seed,
            identical=not problems and torch.equal(*latents),
            latent_snr_db=None if problems else metrics.snr_db(*latents),
            problems=problems,
            **floor,
        )

    def _add_steps(self, reference: Run, other: Run) -> None:
        count = len(reference.predictions)
        if len(other.predictions) != count or count >= len(reference.sigmas):
            self._note("differences by step were not measured: this sampler chooses its own steps")
            return
        self._sigmas = reference.sigmas
        self._errors += [[] for _ in range(count - len(self._errors))]
        pairs = zip(reference.predictions, other.predictions, strict=True)
        for errors, pair in zip(self._errors, pairs, strict=True):
            error = metrics.relative(*pair)
            if math.isfinite(error):
                errors.append(error)

    def _see(self, seed: Seed, reference: Run, other: Run) -> Seed:
        """Add what the decoded images say, if there is a VAE."""
        if self._decode is None:
            return seed
        images = [self._decode(run.samples) for run in (reference, other)]
        self._progress(self._done * self._steps, self._total * self._steps, f"seed {seed.seed}")
        self.images = self.images or tuple(image[:1].cpu() for image in images)
        problems = tuple(
            f"the {name}: {problem}"
            for name, image in zip(("reference", "model"), images, strict=True)
            if (problem := metrics.image_problem(image))
        )
        values: dict = {}
        if all(image.isfinite().all() for image in images):
            try:
                values["psnr_db"], values["ssim"] = metrics.quality(*images)
            except (ImportError, ValueError) as error:
                self._note(f"PSNR and SSIM were not measured: {error}")
        return replace(seed, problems=(*seed.problems, *problems), **values)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def steps(self) -> Iterator[Step]:
        """Relative difference at each step, over the seeds that could be compared."""
        for index, errors in enumerate(self._errors):
            if errors:
                mean = statistics.fmean(errors)
                yield Step(index + 1, self._sigmas[index], mean, max(errors))

    def floor(self) -> Floor | None:
        """What the reference differs from itself by; None where it made nothing to compare."""
        if self._repeats is None:
            return None
        return Floor(
            repeats=self._repeats,
            draws=self._draws,
            repeat_snr_db=mean_of([seed.repeat_snr_db for seed in self.seeds]),
            other_noise_snr_db=mean_of([seed.other_noise_snr_db for seed in self.seeds]),
        )
