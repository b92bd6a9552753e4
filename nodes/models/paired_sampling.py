"""Two models on the same seeds, through ComfyUI's own KSampler: what a comparison is made of.

A wrapper on a clone of each model records the sampler's prediction at every step, the noise levels
and the time. So models run with everything that is on them: LoRAs, other packs' wrappers,
offloading. Each model runs alone, the other unloaded, so that memory and time are its own. Seeds
are taken in groups whose recorded steps fit 1 GB, each group first on the reference, then on the
model: large models are not swapped for every seed, and memory does not grow with the seeds.

The noise floor (how much the reference differs from itself) needs a few more runs. In the first,
the sampler draws other noise. If that changes nothing, the sampler draws none, and runs repeat. If
it does, a plain second run shows which of the two it was, and every seed runs again for that.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import comfy.model_management
import comfyui_version
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ...kernels import FEW_ROWS, layout
from ...quant.container.header import quoted
from ...quant.reports import metrics
from ...quant.reports.comparison import (
    Comparison,
    Floor,
    Seed,
    Setting,
    Side,
    Step,
    mean_of,
)
from ...quant.version import version
from ..host.progress import RunProgress
from ..host.unloading import unload_all_models
from ..runtime.describe import describe, linears, synchronize
from . import fingerprints
from .budget import prediction
from .fingerprints import plain
from .sampling import SamplerSettings

_KEY = "mxfp8_compare"
_KEPT = 1 << 30  # bytes of recorded steps
_MOST_IMAGES = 16  # seeds whose images are kept


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
class Pair:
    """A seed on both models, whose latents are not decoded yet.

    Attributes:
        samples: the reference's latent and the model's.
        sigmas: the noise levels that both were sampled at.
        errors: the relative difference at each step; None where the steps do not match.
    """

    seed: Seed
    samples: tuple
    sigmas: list[float]
    errors: list[float] | None


def compare_models(
    node: type[io.ComfyNode], reference, model, settings: SamplerSettings, decode: Callable | None
) -> tuple[Comparison, list[tuple]]:
    """Sample all seeds on both models; `node` shows the progress.

    Args:
        decode: samples -> images [B, H, W, C]; None if there is no VAE.

    Returns:
        The comparison, and the decoded images of the first seeds, at most _MOST_IMAGES pairs of
        [1, H, W, C]; none without `decode`.

    Raises:
        ValueError: the two do not sample at the same noise levels, or make other latents.
    """
    progress = RunProgress(node, 2 * settings.seeds + 1, settings.steps)
    run_reference = partial(_run, progress, settings, "reference", reference)
    run_model = partial(_run, progress, settings, "model", model)
    seconds: tuple[list[list[float]], ...] = [], []  # of each model, by loading, of each run
    pairs: list[Pair] = []
    seeds: list[Seed] = []
    images: list[tuple] = []
    notes: list[str] = []
    sides = floor = None
    left = settings.each_seed
    while left:
        before = sides or (None, None)
        _load_alone(reference)
        group, floor, left = _sample_reference(left, floor, run_reference, progress)
        shape = group[0][1].shape
        seconds[0].append([first.seconds for _, first, _ in group])
        reference_side = _side(reference, seconds[0], before[0], notes)
        _load_alone(model)
        fresh, times = _sample_model(group, run_model)
        seconds[1].append(times)
        sides = reference_side, _side(model, seconds[1], before[1], notes)
        for pair in fresh:
            decoded = [decode(samples) for samples in pair.samples] if decode else []
            progress.step(0, f"seed {pair.seed.seed}")
            seeds.append(_with_images(pair.seed, decoded, notes) if decoded else pair.seed)
            pairs.append(replace(pair, samples=()))
            if decoded and len(images) < _MOST_IMAGES:
                images.append(tuple(image[:1].cpu() for image in decoded))

    if any(pair.errors is None for pair in pairs):
        notes.append("differences by step were not measured: this sampler chooses its own steps")
    device = model.load_device
    if device.type != "cuda":
        notes.append(f"peak memory was not measured: {device} does not count it")
    elif model.is_dynamic():
        notes.append("peak memory is torch's count; dynamic VRAM may hold weights outside it")
    if floor is None:
        notes.append("no noise floor was measured: the reference's output cannot be compared")
    comparison = Comparison(
        reference=sides[0],
        model=sides[1],
        setting=_setting(settings, shape, device),
        latent_snr_db=mean_of([seed.latent_snr_db for seed in seeds]),
        psnr_db=mean_of([seed.psnr_db for seed in seeds]),
        ssim=mean_of([seed.ssim for seed in seeds]),
        floor=floor and replace(
            floor,
            repeat_snr_db=mean_of([seed.repeat_snr_db for seed in seeds]),
            other_noise_snr_db=mean_of([seed.other_noise_snr_db for seed in seeds]),
        ),
        steps=tuple(_steps(pairs)),
        seeds=tuple(seeds),
        notes=tuple(dict.fromkeys(notes)),
        predicted_snr_db=prediction(model),
    )  # fmt: skip
    return comparison, images


def _setting(
    settings: SamplerSettings, latent_shape: tuple[int, ...], device: torch.device
) -> Setting:
    return Setting(
        sampler=settings.sampler_name,
        scheduler=settings.scheduler,
        steps=settings.steps,
        cfg=settings.cfg,
        denoise=settings.denoise,
        latent_shape=latent_shape,
        device=comfy.model_management.get_torch_device_name(device),
        versions={
            "torch": torch.__version__,
            "ComfyUI": comfyui_version.__version__,
            "MXFP8": version(),
        },
    )


def _sample_reference(
    left: list[int], floor: Floor | None, run: Callable[..., Run], progress: RunProgress
) -> tuple[list[tuple[int, Run, dict]], Floor | None, list[int]]:
    """The next seeds on the reference: ([seed, run, SNRs of repeated runs], floor, seeds left)."""
    group: list[tuple[int, Run, dict]] = []
    while left and sum(first.nbytes for _, first, _ in group) < _KEPT:
        seed, *left = left
        first, known = run(seed), floor
        floor, again = _find_floor(seed, first, floor, run)
        if known is None and floor is not None and (floor.draws or not floor.repeats):
            progress.runs += 1 + len(left) * (floor.draws + (not floor.repeats))
        group.append((seed, first, again))
    return group, floor, left


def _sample_model(
    group: list[tuple[int, Run, dict]], run: Callable[..., Run]
) -> tuple[list[Pair], list[float]]:
    """(pairs, seconds of the runs) of the same seeds on the model; empties the group."""
    pairs, seconds = [], []
    while group:
        seed, first, again = group.pop(0)
        other = run(seed)
        _check_runs(first, other)
        seconds.append(other.seconds)
        latents = [first.latent, other.latent]
        problems = _problems(latents, metrics.latent_problem)
        compared = Seed(
            seed=seed,
            identical=not problems and torch.equal(*latents),
            latent_snr_db=None if problems else metrics.snr_db(*latents),
            problems=problems,
            **again,
        )
        errors = [] if problems else _step_errors(first, other)
        pairs.append(Pair(compared, (first.samples, other.samples), first.sigmas, errors))
    return pairs, seconds


def _load_alone(patcher) -> None:
    """Unload every other model before the next run."""
    unload_all_models()
    if patcher.load_device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(patcher.load_device)


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
    seed: int, first: Run, floor: Floor | None, run: Callable[..., Run]
) -> tuple[Floor | None, dict[str, float | None]]:
    """Repeat the reference as far as needed to measure the noise floor.

    First with other sampler noise, then unchanged.

    Args:
        floor: what is known from earlier seeds; None before the first that can be compared.

    Returns:
        What is known now, and SNR in dB by field of `Seed`.
    """
    latent = first.latent
    if metrics.latent_problem(latent):
        return floor, {}
    other = same = None
    if floor is None or floor.draws:
        other = run(seed, (seed + 1) % 2**64).latent
    if floor is None and torch.equal(other, latent):
        floor = Floor(repeats=True, draws=False)
    elif floor is None or not floor.repeats:
        same = run(seed).latent
    if floor is None:
        # Where runs do not repeat, noise counts if it makes twice the difference, or 6 dB.
        distances = [float((x.double() - latent).norm()) for x in (other, same)]
        floor = Floor(repeats=torch.equal(same, latent), draws=distances[0] > 2 * distances[1])
        other = other if floor.draws else None
    again = {"other_noise_snr_db": other, "repeat_snr_db": same}
    return floor, {k: metrics.snr_db(latent, x) for k, x in again.items() if x is not None}


def _side(patcher, seconds: list[list[float]], before: Side | None, notes: list[str]) -> Side:
    """What ran and what it took, while the model is loaded.

    Args:
        seconds: of all its runs, by loading.
        before: of its last loading.
    """
    report = describe(patcher)
    fingerprint = fingerprints.of_mxfp8 if report.mxfp8 else fingerprints.of_linears
    if any(layer.precision == "fast" for layer in report.mxfp8):
        small_m = report.small_m.removesuffix(f" (up to {FEW_ROWS})")
        notes.append(
            f"`fast` applies to inputs of more than {FEW_ROWS} rows; smaller ones run {small_m}"
        )
    peak = None
    if patcher.load_device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(patcher.load_device)
        peak = max(peak, before.peak_bytes if before else 0)
    warm = [s for loading in seconds for s in loading[1:]]
    return Side(
        model=report.model,
        paths=dict(report.paths()),
        fingerprint=fingerprint(patcher),
        dtype=report.dtype,
        seconds=statistics.median(warm or [s for loading in seconds for s in loading]),
        peak_bytes=peak,
        adapters=report.adapters,
    )


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


def _with_images(seed: Seed, images: list[torch.Tensor], notes: list[str]) -> Seed:
    """A seed with what its decoded images show."""
    quality = {}
    if all(image.isfinite().all() for image in images):
        try:
            quality["psnr_db"], quality["ssim"] = metrics.quality(*images)
        except (ImportError, ValueError) as error:
            notes.append(f"PSNR and SSIM were not measured: {error}")
    problems = (*seed.problems, *_problems(images, metrics.image_problem))
    return replace(seed, problems=problems, **quality)


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
