"""Two models on the same seeds, through ComfyUI's own KSampler: what a comparison is made of.

A wrapper on a clone of each model records the sampler's prediction at every step, the noise levels
and the time. So models run with everything that is on them: LoRAs, other packs' wrappers,
offloading. Each model runs alone, the other unloaded, so that memory and time are its own. Seeds
are taken in groups whose recorded steps fit 1 GB, each group first on the reference, then on the
model: large models are not swapped for every seed, and memory does not grow with the seeds.

The noise floor, what the reference differs from itself by, takes few more runs: one in which the
sampler draws other noise. If that changes nothing, the sampler draws none, and runs repeat. If it
does, a plain second run shows which of the two it was, and every seed runs again for that.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ...kernels import layout
from ...quant.container.header import quoted
from ...quant.reports import metrics
from ...quant.reports.comparison import Floor, Seed, Side, Step, mean_of
from ..host.progress import RunProgress
from ..runtime.describe import describe, linears, synchronize
from ..widgets import ROWS, SamplerSettings
from . import fingerprints
from .fingerprints import plain

_KEY = "mxfp8_compare"
_KEPT = 1 << 30  # bytes of recorded steps


@dataclass(frozen=True)
class Run:
    """One run of the sampler.

    Attributes:
        samples: the latent, as KSampler returns it.
        predictions: the denoised latent at each step, flat.
        sigmas: the noise levels of all steps, and of the end.
        seconds: in the sampler, until the device has finished.
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


@dataclass(frozen=True)
class Loading:
    """The cost of a model's runs between loading and unloading it."""

    seconds: list[float]  # of each run
    peak_bytes: int | None  # None where the device does not count


@dataclass(frozen=True)
class Noise:
    """Why two runs of the reference on one seed may differ, as `comparison.Floor` has it."""

    repeats: bool
    draws: bool


@dataclass(frozen=True)
class Pair:
    """A seed on both models.

    Attributes:
        sigmas: the noise levels that both were sampled at.
        errors: the relative difference at each step; None where the steps do not match.
        samples: the reference's latent and the model's, until they are decoded.
        images: decoded, the first of each latent; of the first seed only.
        notes: what was not measured, and why.
    """

    seed: Seed
    sigmas: list[float]
    errors: list[float] | None
    samples: tuple = ()
    images: tuple | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PairedResult:
    """What came of all seeds."""

    reference: Side
    model: Side
    seeds: tuple[Seed, ...]
    steps: tuple[Step, ...]
    floor: Floor | None
    latent_shape: tuple[int, ...]
    images: tuple | None  # of the first seed
    notes: tuple[str, ...]


def sample_pairs(
    node: type[io.ComfyNode], reference, model, settings: SamplerSettings, decode: Callable | None
) -> PairedResult:
    """Sample all seeds on both models; `node` shows the progress.

    Args:
        decode: samples -> images [B, H, W, C]; None if there is no VAE.

    Raises:
        ValueError: the two do not sample at the same noise levels, or make other latents.
    """
    progress = RunProgress(node, 2 * settings.seeds + 1, settings.steps)
    run_reference = partial(_run, progress, settings, "reference", reference)
    run_model = partial(_run, progress, settings, "model", model)
    loadings: tuple[list[Loading], list[Loading]] = [], []
    pairs: list[Pair] = []
    noise, left = None, settings.each_seed
    while left:
        _load_alone(reference)
        group, noise, left = _sample_reference(left, noise, run_reference, progress)
        shape = group[0][1].shape
        loadings[0].append(_loading(reference, [first.seconds for _, first, _ in group]))
        sides = [_side(reference, loadings[0])]

        _load_alone(model)
        fresh, seconds = _sample_model(group, run_model)
        loadings[1].append(_loading(model, seconds))
        sides.append(_side(model, loadings[1]))
        for pair in fresh:
            pairs.append(_decoded(pair, decode, progress, keep=not pairs))

    (reference_side, reference_notes), (model_side, model_notes) = sides
    notes = [*reference_notes, *model_notes]
    if any(pair.errors is None for pair in pairs):
        notes.append("differences by step were not measured: this sampler chooses its own steps")
    notes += [note for pair in pairs for note in pair.notes]
    return PairedResult(
        reference=reference_side,
        model=model_side,
        seeds=tuple(pair.seed for pair in pairs),
        steps=tuple(_steps(pairs)),
        floor=_floor(noise, [pair.seed for pair in pairs]),
        latent_shape=shape,
        images=pairs[0].images,
        notes=tuple(dict.fromkeys(notes)),
    )


def _sample_reference(
    left: list[int], noise: Noise | None, run: Callable[..., Run], progress: RunProgress
) -> tuple[list[tuple[int, Run, dict]], Noise | None, list[int]]:
    """The next seeds on the reference: ([seed, run, its noise floor], noise, seeds left)."""
    group: list[tuple[int, Run, dict]] = []
    while left and sum(first.nbytes for _, first, _ in group) < _KEPT:
        seed, *left = left
        first, known = run(seed), noise
        noise, floor = _find_floor(seed, first, noise, run)
        if known is None and noise not in (None, Noise(repeats=True, draws=False)):
            progress.runs += 1 + len(left) * (noise.draws + (not noise.repeats))
        group.append((seed, first, floor))
    return group, noise, left


def _sample_model(
    group: list[tuple[int, Run, dict]], run: Callable[..., Run]
) -> tuple[list[Pair], list[float]]:
    """(pairs, seconds of the runs) of the same seeds on the model; empties the group."""
    pairs, seconds = [], []
    while group:
        seed, first, floor = group.pop(0)
        other = run(seed)
        _check_runs(first, other)
        seconds.append(other.seconds)
        pairs.append(_compare(seed, first, other, floor))
    return pairs, seconds


def _load_alone(patcher) -> None:
    """Unload every other model before the next run."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    if patcher.load_device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(patcher.load_device)


def _loading(patcher, seconds: list[float]) -> Loading:
    cuda = patcher.load_device.type == "cuda"
    return Loading(seconds, torch.cuda.max_memory_allocated(patcher.load_device) if cuda else None)


def _run(
    progress: RunProgress,
    settings: SamplerSettings,
    name: str,
    patcher,
    seed: int,
    sampler_seed: int | None = None,
) -> Run:
    """Sample a seed.

    Args:
        sampler_seed: of the noise that the sampler itself draws, if it is not the seed.
    """
    predictions: list[torch.Tensor] = []
    recorded: dict = {}

    def record(executor, guider, sigmas, extra, callback, *args, **options):
        def on_step(step, prediction, x, total) -> None:
            predictions.append(metrics.flat(prediction))
            progress.step(len(predictions), f"{name}, seed {seed}")

        if sampler_seed is not None:
            extra = {**extra, "seed": sampler_seed}
        synchronize(patcher.load_device)
        start = time.perf_counter()
        result = executor(guider, sigmas, extra, on_step, *args, **options)
        synchronize(patcher.load_device)
        recorded.update(seconds=time.perf_counter() - start, sigmas=sigmas.tolist())
        return result

    clone = patcher.clone()
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, _KEY, record)
    samples = settings.sample(clone, seed)
    if not recorded:
        raise ValueError(
            f"nothing was sampled: {settings.steps} steps of {settings.scheduler} with denoise "
            f"{settings.denoise:g} are none; raise steps or denoise"
        )
    progress.finish_run()
    return Run(samples, predictions, **recorded)


def _find_floor(
    seed: int, first: Run, noise: Noise | None, run: Callable[..., Run]
) -> tuple[Noise | None, dict[str, float | None]]:
    """Run the reference again as far as that shows a difference.

    Args:
        noise: what is known from earlier seeds; None before the first that can be compared.

    Returns:
        What is known now, and SNR in dB by field of `Seed`.
    """
    latent = first.latent
    if metrics.latent_problem(latent):
        return noise, {}
    other = same = None
    if noise is None or noise.draws:
        other = run(seed, (seed + 1) % 2**64).latent
    if noise is None and torch.equal(other, latent):
        noise = Noise(repeats=True, draws=False)
    elif noise is None or not noise.repeats:
        same = run(seed).latent
    if noise is None:
        # Where runs do not repeat, noise counts if it makes twice the difference, or 6 dB.
        distances = [float((x.double() - latent).norm()) for x in (other, same)]
        noise = Noise(repeats=torch.equal(same, latent), draws=distances[0] > 2 * distances[1])
        other = other if noise.draws else None
    again = {"other_noise_snr_db": other, "repeat_snr_db": same}
    return noise, {k: metrics.snr_db(latent, x) for k, x in again.items() if x is not None}


def _floor(noise: Noise | None, seeds: list[Seed]) -> Floor | None:
    """What the reference differs from itself by; None where it made nothing to compare."""
    if noise is None:
        return None
    return Floor(
        repeats=noise.repeats,
        draws=noise.draws,
        repeat_snr_db=mean_of([seed.repeat_snr_db for seed in seeds]),
        other_noise_snr_db=mean_of([seed.other_noise_snr_db for seed in seeds]),
    )


def _side(patcher, loadings: list[Loading]) -> tuple[Side, list[str]]:
    """(what ran and what it took, notes on that), while the model is loaded."""
    report = describe(patcher, ROWS)
    fingerprint = fingerprints.of_mxfp8 if report.mxfp8 else fingerprints.of_linears
    notes = []
    if any(layer.precision == "fast" for layer in report.mxfp8):
        notes.append(
            f"fast holds for inputs of many rows; with few rows, layers run {report.small_m}"
        )
    warm = [seconds for loading in loadings for seconds in loading.seconds[1:]]
    every = [seconds for loading in loadings for seconds in loading.seconds]
    peaks = [loading.peak_bytes for loading in loadings if loading.peak_bytes is not None]
    side = Side(
        model=report.model,
        paths=dict(report.paths()),
        fingerprint=fingerprint(patcher),
        dtype=report.dtype,
        seconds=statistics.median(warm or every),
        peak_bytes=max(peaks, default=None),
    )
    return side, notes


def _compare(seed: int, first: Run, other: Run, floor: dict) -> Pair:
    """The latents and steps of a seed's runs on the reference and on the model."""
    latents = [first.latent, other.latent]
    problems = _problems(latents, metrics.latent_problem)
    compared = Seed(
        seed=seed,
        identical=not problems and torch.equal(*latents),
        latent_snr_db=None if problems else metrics.snr_db(*latents),
        problems=problems,
        **floor,
    )
    errors = [] if problems else _step_errors(first, other)
    return Pair(compared, first.sigmas, errors, (first.samples, other.samples))


def _problems(pair: Iterable, find: Callable[[torch.Tensor], str | None]) -> tuple[str, ...]:
    """What is wrong with the reference's output and with the model's."""
    reasons = zip(("reference", "model"), map(find, pair), strict=True)
    return tuple(f"the {name}: {reason}" for name, reason in reasons if reason)


def _step_errors(first: Run, other: Run) -> list[float] | None:
    """The relative difference of the predictions at each step; None where steps do not match."""
    count = len(first.predictions)
    if len(other.predictions) != count or count >= len(first.sigmas):
        return None
    predictions = zip(first.predictions, other.predictions, strict=True)
    return [metrics.relative(*pair) for pair in predictions]


def _steps(pairs: list[Pair]) -> Iterator[Step]:
    """Mean and largest relative difference at each step, over the seeds that can be compared."""
    errors = [pair.errors for pair in pairs if pair.errors]
    for index, sigma in enumerate(pairs[0].sigmas):
        finite = [e[index] for e in errors if index < len(e) and math.isfinite(e[index])]
        if finite:
            yield Step(index + 1, sigma, statistics.fmean(finite), max(finite))


def _decoded(pair: Pair, decode: Callable | None, progress: RunProgress, keep: bool) -> Pair:
    """A pair without its latents, with what their images show if there is a VAE.

    Args:
        keep: whether to keep the first image of each.
    """
    if decode is None:
        return replace(pair, samples=())
    images = [decode(samples) for samples in pair.samples]
    progress.step(0, f"seed {pair.seed.seed}")
    quality, notes = {}, ()
    if all(image.isfinite().all() for image in images):
        try:
            quality["psnr_db"], quality["ssim"] = metrics.quality(*images)
        except (ImportError, ValueError) as error:
            notes = (f"PSNR and SSIM were not measured: {error}",)
    problems = (*pair.seed.problems, *_problems(images, metrics.image_problem))
    return replace(
        pair,
        seed=replace(pair.seed, problems=problems, **quality),
        samples=(),
        images=tuple(image[:1].cpu() for image in images) if keep else None,
        notes=notes,
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
