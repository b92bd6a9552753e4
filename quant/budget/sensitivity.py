"""How much each layer's rounding changes a model's output, from few runs that perturb all layers.

Rounding a layer to MXFP8 changes its weight by dW and, to first order, the model's output by some
y_l. The layer's damage D_l is the energy of y_l over that of the output. Damages of layers add up,
because changes of so many values are nearly orthogonal. So a set of layers costs the sum of its
damages, and `budget.choice` can compare sets that were never run.

Measuring one layer at a time takes a run of the model per layer. Here every probe run r perturbs
all layers at once, layer l by s_rl dW_l, where the signs s_rl are rows of a Hadamard matrix. The
outputs' changes y_r of the runs of one sample (a prompt and a seed, or a batch) have the inner
products G = S diag(D) S.T on average, and D is what makes G most likely: the covariance problem
that is known from sparse Bayesian learning (https://jmlr.org/papers/v1/tipping01a.html) and from
activity detection (https://arxiv.org/abs/1803.00754). R runs tell R (R + 1) / 2 numbers apart, so
about 2 sqrt(2 L) runs do for L layers. A weak prior says that damage goes with a layer's size.
Noise of the runs themselves, as of BF16, is estimated beside the layers: of 5% and 25% of
all damage, 2 to 7% and 9 to 26% ended up in it.

Each sample has a scale of its own, and D is that of their geometric mean: what is predicted is the
mean SNR in dB over prompts, as a comparison reports it.

Trials against one layer at a time on many samples, as what a choice loses at equal size, in dB
(mean of five sizes; bench/budget.py measures whole choices):

                                      emoji model, 19 layers    MiniLM, 36 layers
    this, on one sample               12 runs: 0.12             16 runs: 0.24, 24: 0.13
    one layer at a time, one sample   19 runs: 0.13             36 runs: 0.13
    nonnegative least squares on the
    products of different runs        12 runs: 0.28             16 runs: 0.33, 24: 0.24
    halving the groups that damage    12 runs: 0.5 to 0.6       16 runs: 0.33 to 0.51

On ViT-S, whose 72 layers' changes have more in common, 16 runs on one crop lost 1.1, and one layer
at a time 0.35: more runs, and batches as samples, are needed there. At equal cost many runs of few
samples were better than few runs of many. With all 27 layers of the emoji model, one of which does
most of the damage, 16 runs on two samples lost 0.7 dB and 30 lost 0.1; so did 32 in two rounds, the
second without that layer.

Rejected as well: a prior that follows the layers' output errors, whose rank correlation with damage
is 0.2, 0.0 and -0.3 on these models; and to multiply each damage by the factor by which calibrated
rounding lowers the error of that layer's output, which takes as long as a conversion. Calibrated
files that were chosen so were -0.5 to +0.3 dB better at equal size on MiniLM, -1.6 to +0.2 on ViT-S
and 0 to 0.4 on the emoji model, and predictions for them up to 4.9 dB too high: calibrated rounding
helps less on other data than on that of the calibration.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

import torch

from ..container.header import FormatError, parse_object, quoted
from ..reports import document

KEY = "mxfp8_sensitivity"
_PRIOR = 0.05  # its weight, in runs: 0.01 to 0.1 were alike on MiniLM, 0 and 0.3 worse
_ITERATIONS = 100  # 30 were as good as 300
_CONVERGED = 1e-3  # relative change of a damage in one iteration
_PARTS = 8  # that the runs are left out in, for the standard error
_LEAST_NOISE = 1e-9  # of the runs' mean energy; keeps the covariance regular
_MOST = 1 << 12  # layers, samples: what a file may claim
# Of all samples, R R (R + L): what `probing.needed_runs` asks for of the most layers on one sample.
# A third of that took 71 s on a core.
_MOST_WORK = 3 << 26
_MOST_ENERGY = 1e30  # of a change, over the output's: far above any, far below what overflows
_ROUNDING = 1e-6  # of inner products, over their trace: what float32 outputs may be off by

Matrices = tuple[torch.Tensor, torch.Tensor]  # signs [R, L], inner products [R, R]; float64


@dataclass(frozen=True)
class Sample:
    """The probe runs of one prompt and seed, or of one batch.

    Attributes:
        signs: of each run, a string of "+" and "-", one for every layer in order.
        gram: inner products of the changes of the output, over the output's energy; [R][R].
    """

    signs: tuple[str, ...]
    gram: tuple[tuple[float, ...], ...]

    def tensors(self) -> Matrices:
        """Signs, 1 or -1, and inner products."""
        signs = [[1 if sign == "+" else -1 for sign in run] for run in self.signs]
        return torch.tensor(signs).double(), torch.tensor(self.gram, dtype=torch.float64)


def check_work(layers: int, runs: Sequence[int]) -> None:
    """Raise FormatError for probe runs whose damages would take more than minutes to compute.

    Args:
        runs: of each sample.
    """
    work = sum(R * R * (R + layers) for R in runs)
    if layers > _MOST or len(runs) > _MOST or work > _MOST_WORK:
        raise FormatError(
            f"{sum(runs)} probe runs on {len(runs)} samples are too many for {layers} layers: "
            "damages would take too long to compute. Measure with fewer samples or runs"
        )


def _are_inner_products(gram: tuple[tuple[float, ...], ...]) -> bool:
    """Whether a square matrix is one of inner products, as no other has damages that fit it."""
    G = torch.tensor(gram, dtype=torch.float64)
    trace = G.diagonal().sum()
    if not (G.abs() <= _MOST_ENERGY).all() or (G - G.t()).abs().max() > _ROUNDING * trace:
        return False
    return bool(torch.linalg.eigvalsh(G).min() >= -_ROUNDING * trace)


@dataclass(frozen=True)
class Damages:
    """Noise energy in the model's output over its own, by layer, when rounded to nearest.

    Attributes:
        values: by layer.
        replicates: the same from all but some of the runs, and from all but some of the samples,
            two or more of each.
    """

    values: Mapping[str, float]
    replicates: tuple[tuple[Mapping[str, float], ...], ...] = field(default=(), repr=False)

    def total(self, layers: Iterable[str]) -> float:
        """Of several layers together."""
        return _sum(self.values, layers)

    def deviation(self, layers: Iterable[str]) -> float:
        """Standard error of `total`, by the jackknife: over runs or samples, which is larger."""
        layers = list(layers)
        return max(
            (_jackknife([_sum(one, layers) for one in some]) for some in self.replicates), default=0
        )


def _sum(values: Mapping[str, float], layers: Iterable[str]) -> float:
    return math.fsum(values[layer] for layer in layers)


def _jackknife(totals: list[float]) -> float:
    """The standard error of a total, from totals without each part of the data."""
    mean = math.fsum(totals) / len(totals)
    spread = math.fsum((total - mean) ** 2 for total in totals)
    return math.sqrt(spread * (len(totals) - 1) / len(totals))


@dataclass(frozen=True)
class Sensitivity:
    """Probe runs of a model, and what they say of its layers.

    Attributes:
        layers: names without the prefix of a diffusion model, in the order of the signs.
        sizes: weights in each layer.
        samples: one for every prompt and seed.
        about: how the model was run, as JSON types.
    """

    layers: tuple[str, ...]
    sizes: tuple[int, ...]
    samples: tuple[Sample, ...]
    about: dict = field(default_factory=dict)

    def __post_init__(self):
        L = len(self.layers)
        check_work(L, [len(sample.signs) for sample in self.samples])
        fits = 0 < L == len(self.sizes) == len(set(self.layers)) and bool(self.samples)
        fits = fits and all(size > 0 for size in self.sizes)
        for sample in self.samples:
            R = len(sample.signs)
            fits = fits and 0 < R == len(sample.gram)
            fits = fits and all(len(s) == L and set(s) <= {"+", "-"} for s in sample.signs)
            fits = fits and all(len(row) == R for row in sample.gram)
            fits = fits and _are_inner_products(sample.gram)
        if not fits:
            raise FormatError("the sensitivities do not fit their layers")

    @property
    def runs(self) -> int:
        """Probe runs of all samples; each sample took one more, without any change."""
        return sum(len(sample.signs) for sample in self.samples)

    def to_json(self) -> str:
        return document.write(KEY, asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """Raises FormatError for anything else."""
        data = parse_object(KEY, text)
        data.pop("rounding", None)  # of earlier versions
        return document.read(cls, KEY, json.dumps(data))

    @cached_property
    def damages(self) -> Damages:
        """From all runs; replicates lack an eighth of the runs, or of the samples."""
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        samples = [sample.tensors() for sample in self.samples]

        def fitted(some: list[Matrices]) -> dict[str, float]:
            return dict(zip(self.layers, fit(some, sizes).tolist(), strict=True))

        number = itertools.count()
        by_run = [[next(number) % _PARTS for _ in signs] for signs, _ in samples]
        by_sample = [[i % _PARTS] * len(signs) for i, (signs, _) in enumerate(samples)]
        replicates = []
        for parts_of in by_run, by_sample:
            parts = sorted(set(itertools.chain(*parts_of)))
            if len(parts) > 1:
                rests = (_without(part, parts_of, samples) for part in parts)
                replicates.append(tuple(map(fitted, rests)))
        return Damages(fitted(samples), tuple(replicates))

    @cached_property
    def together(self) -> float | None:
        """Measured damage of all layers at once over the sum of theirs; 1 if they add up.

        None where no run rounded all of them: where none has plus signs alone.
        """
        energies = [
            sample.gram[i][i]
            for sample in self.samples
            for i, signs in enumerate(sample.signs)
            if "-" not in signs
        ]
        if not energies or min(energies) <= 0:
            return None
        mean = math.exp(math.fsum(map(math.log, energies)) / len(energies))
        total = self.damages.total(self.layers)
        return mean / total if total else None


def _without(part: int, parts_of: list[list[int]], samples: list[Matrices]) -> list[Matrices]:
    """Samples without the runs that are in a part."""
    rest = []
    for (signs, gram), parts in zip(samples, parts_of, strict=True):
        runs = [run for run, its_part in enumerate(parts) if its_part != part]
        if runs:
            rest.append((signs[runs], gram[runs][:, runs]))
    return rest


def fit(samples: list[Matrices], sizes: torch.Tensor) -> torch.Tensor:
    """The damages D that are most likely for these runs.

    Args:
        samples: at least one.
        sizes: of the layers, [L]; the prior says that damage goes with them.

    Returns:
        float64 [L], of the samples' geometric mean.
    """
    alike: dict[int, list] = {}  # runs -> samples with so many, which are computed together
    energies = []
    for signs, gram in samples:
        energy = gram.diagonal().mean()
        if energy > 0:
            energies.append(energy)
            alike.setdefault(len(signs), []).append((signs, gram / energy))
    if not energies:  # no change at all
        return torch.zeros_like(sizes)
    common = torch.stack(energies).log().mean().exp()
    groups = [tuple(map(torch.stack, zip(*group, strict=True))) for group in alike.values()]
    prior = sizes / sizes.sum()
    D = prior
    noise = torch.tensor(0.01, dtype=torch.float64)
    scales = [torch.ones(len(signs), 1, 1, dtype=torch.float64) for signs, _ in groups]
    for _ in range(_ITERATIONS):
        # The gradient of the log-likelihood is (up - down) / 2 for each layer, and for the noise.
        up, down = _PRIOR * prior / D.square(), _PRIOR / D
        noise_up = noise_down = 0.0
        fits = []
        for (signs, gram), scale in zip(groups, scales, strict=True):  # [S, R, L], [S, R, R]
            covariance = signs * D @ signs.mT
            covariance.diagonal(dim1=1, dim2=2).add_(noise)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
            outer = inverse @ (gram / scale) @ inverse
            up += (outer @ signs * signs).sum(1).clamp_min(0).sum(0)  # below by rounding
            down += (inverse @ signs * signs).sum((0, 1))
            noise_up = noise_up + _traces(outer).clamp_min(0).sum()
            noise_down = noise_down + _traces(inverse).sum()
            fits.append((inverse * gram).sum((1, 2), keepdim=True).clamp_min(1e-9) / len(gram[0]))
        common_scale = torch.cat(fits).log().mean().exp()
        scales = [fit / common_scale for fit in fits]  # D has what they have in common
        ratio = (up / down).sqrt()  # a step that never lowers the likelihood
        D = D * ratio
        noise = (noise * (noise_up / noise_down).sqrt()).clamp_min(_LEAST_NOISE)
        if (ratio - 1).abs().max() < _CONVERGED:
            break
    return D * common


def _traces(matrices: torch.Tensor) -> torch.Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(1)


def check_layers(sensitivity: Sensitivity, known: Iterable[str], name: str) -> None:
    """Raise FormatError for layers that a calibration does not have."""
    unknown = sorted(set(sensitivity.layers) - set(known))
    if unknown:
        raise FormatError(
            f"{name} has a sensitivity for {quoted(unknown[0])} and no Hessian; calibrate again"
        )
