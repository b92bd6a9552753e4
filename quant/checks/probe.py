"""How sensitive a weight is said to be, beside what MXFP8 does to it.

quant_probe (https://github.com/insecure-erasure/quant_probe) guesses from a weight's values which
layers to keep: excess kurtosis, range and shape make a score, and the top tenth is kept. It
measures no error. Here are its scores and recommendations, from its documentation and to the digits
of its table, beside the error that MXFP8 has: SQNR of the weight, and with a calibration the error
of the layer's output. Their rank correlation says what the score is worth for a model.

The tool knows Z-Image and Wan; other models are scored with its settings for Z-Image. Its last
step, which can level what was recommended for a kind of layer over the depth of a model, is left
out.

A weight is read twice, some rows at a time: for its moments, then to count outliers and quantize.
The tool makes float32 copies of whole weights. What fits in one slab is computed as it does that,
to the last bit, because the layer that is itself the quantile of the scores falls on this side or
that by the last bit. Larger weights get power sums in float64, as precise and in little memory;
there the tool's own last bits depend on the number of threads.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from ... import kernels
from ..container.header import FormatError, quoted
from ..conversion import policy
from ..conversion.calibration import Calibration, check_model
from ..format import DTYPES, FLOATS, WEIGHT, bare, numel
from ..progress import Meter, Progress
from ..reports.conversion import SqnrAccumulator
from ..sources.file import Source
from ..sources.open import open_source

VERSION = 1
KEEP, FP8, NVFP4 = "*KEEP*", "FP8", "NVFP4"
_WEIGHTS = 0.6, 0.3, 0.1  # of kurtosis, range and aspect ratio in the score
_FENCE = 1.5  # interquartile ranges around the quartiles, to which kurtosis is clipped
_MOST_KURTOSIS = 8.0  # kept whatever the score
_KEEP_QUANTILE = 0.9  # of the scores
_FP8 = {"Wan": (0.75, 0.5)}  # quantile from which a layer is FP8, and the least score
_FP8_ELSE = 0.5, 0.0
_OUTLIER = 3.0  # standard deviations from the mean
_MAIN = ("blocks", "layers")  # named in no layer type
_SLAB = 1 << 21  # values looked at once


@dataclass(frozen=True)
class ProbedLayer:
    """One weight.

    Attributes:
        layer_type: name without the number of its block; subgraph: what the blocks are called.
        excess_kurtosis, dynamic_range, std, outlier_pct, aspect_ratio, score, recommendation,
            reason: as quant_probe has them.
        sqnr_db: of the weight in MXFP8, None where nothing is lost.
        output_error: relative error of the layer's output on the inputs of a calibration, rounded
            to nearest; None without one.
    """

    key: str
    layer_type: str
    block_idx: int
    subgraph: str
    shape: tuple[int, int]
    excess_kurtosis: float
    dynamic_range: float
    std: float
    outlier_pct: float
    aspect_ratio: float
    sqnr_db: float | None
    output_error: float | None
    score: float = 0.0
    recommendation: str = NVFP4
    reason: str = "default"


@dataclass(frozen=True)
class Probe:
    """A model's layers.

    Attributes:
        weight_correlation, output_correlation: Spearman's, of the scores with the measured errors;
            None where nothing varies or nothing was measured.
    """

    file: str
    architecture: str | None
    weight_correlation: float | None
    output_correlation: float | None
    layers: tuple[ProbedLayer, ...]

    def to_json(self) -> str:
        """Versioned JSON, every layer included."""
        return json.dumps({"mxfp8_probe": VERSION, **asdict(self)}, indent=1, allow_nan=False)

    def to_csv(self) -> str:
        """A table with quant_probe's columns and digits, then ours."""
        out = io.StringIO()
        table = csv.writer(out)
        table.writerow([*_COLUMNS, "sqnr_db", "output_error"])
        for layer in self.layers:
            rows, cols = layer.shape
            cells = asdict(layer) | {"rows": rows, "cols": cols}
            table.writerow([
                *(format(cells[name], spec) for name, spec in _COLUMNS.items()),
                "" if layer.sqnr_db is None else f"{layer.sqnr_db:.2f}",
                "" if layer.output_error is None else f"{layer.output_error:.3e}",
            ])  # fmt: skip
        return out.getvalue()

    def summary(self) -> str:
        """A few lines for a terminal."""
        counts = Counter(layer.recommendation for layer in self.layers)
        shares = ", ".join(f"{counts[name]} {name}" for name in (KEEP, FP8, NVFP4))
        lines = [f"{len(self.layers)} layers, by their scores: {shares}"]
        found = [layer.sqnr_db for layer in self.layers if layer.sqnr_db is not None]
        if found:
            lines.append(f"in MXFP8, SQNR {min(found):.2f} to {max(found):.2f} dB")
        correlations = [
            f"{value:+.2f} with the error of {what}"
            for value, what in (
                (self.weight_correlation, "the weights"),
                (self.output_correlation, "what the layers put out"),
            )
            if value is not None
        ]
        if correlations:
            lines.append(
                f"rank correlation of the score: {', '.join(correlations)} "
                "(+1: it sorts layers by error; 0: it says nothing)"
            )
        return "\n".join(lines)


# quant_probe's columns, and how it writes them.
_COLUMNS = {
    "key": "", "layer_type": "", "block_idx": "", "subgraph": "", "rows": "", "cols": "",
    "excess_kurtosis": ".4f", "dynamic_range": ".4f", "std": ".6f", "outlier_pct": ".2f",
    "aspect_ratio": ".2f", "score": ".4f", "recommendation": "", "reason": "",
}  # fmt: skip


def probe_file(
    path, *, calibration: Calibration | None = None, progress: Progress | None = None
) -> Probe:
    """Score and measure the weights inside a model's numbered blocks.

    Args:
        path: a model that is not quantized, as for `convert_file`.
        calibration: what its layers are given, for the error of their outputs.
        progress: called after every slab, of which there are twice as many as the model has.

    Raises:
        FormatError: the file is damaged, quantized, or has no numbered blocks.
        ValueError: a weight holds NaN or Inf, or the calibration is another model's.
        OSError: it cannot be read.
    """
    with open_source(path) as source:
        if calibration is not None:
            check_model(calibration, source)
        places = {key: place for key in source.tensors if (place := _place(key, source))}
        if not places:
            raise FormatError(
                f"{source.name}: no F32, F16 or BF16 matrix in numbered blocks "
                "('layers.0.....weight'), which are what is scored"
            )
        advance = Meter(2 * sum(_nbytes(source, key) for key in places), progress)
        found = policy.detect_architecture(source.tensors)
        architecture = found[0] if found else None
        measured = [
            _measure(source, key, place, calibration, advance) for key, place in places.items()
        ]
        layers = _recommended(_scored(measured), architecture)
    scores = [layer.score for layer in layers]
    noise = [-math.inf if layer.sqnr_db is None else -layer.sqnr_db for layer in layers]
    heard = [layer for layer in layers if layer.output_error is not None]
    return Probe(
        source.name,
        architecture,
        rank_correlation(scores, noise),
        rank_correlation([la.score for la in heard], [la.output_error for la in heard]),
        tuple(layers),
    )


def _place(key: str, source: Source) -> tuple[str, int, str] | None:
    """(layer type, number of the block, what the blocks are called), None if it is not scored."""
    dtype, shape = source.tensors[key]
    if not key.endswith(WEIGHT) or dtype not in FLOATS or len(shape) != 2 or not numel(shape):
        return None
    parts = bare(key).removesuffix(WEIGHT).split(".")
    at = next((i for i, part in enumerate(parts) if i and part.isdecimal()), len(parts))
    blocks, kind = ".".join(parts[:at]), ".".join(parts[at + 1 :])
    if not kind or (blocks.endswith("_refiner") and kind.startswith("adaLN_modulation")):
        return None  # the tool leaves Z-Image's refiners their modulations
    return kind if blocks in _MAIN else f"{blocks}.{kind}", int(parts[at]), blocks


def _nbytes(source: Source, key: str) -> int:
    dtype, shape = source.tensors[key]
    return numel(shape) * DTYPES[dtype] // 8


# ---- what is measured ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spread:
    """How values are spread.

    Attributes:
        std: with n - 1; kurtosis: excess kurtosis, the fourth central moment over std**4 less 3;
            both 0 where nothing varies. range: largest less smallest magnitude, in float32.
    """

    mean: float
    std: float
    kurtosis: float
    range: float


def _spread_of(weight: torch.Tensor) -> _Spread:
    """Of one slab, with quant_probe's float32 arithmetic."""
    x = weight.float().flatten()
    mean, std, size = x.mean(), x.std() if x.numel() > 1 else x.new_zeros(()), x.abs()
    kurtosis = ((x - mean) ** 4).mean() / std**4 - 3.0 if std > 0 else 0.0
    return _Spread(float(mean), float(std), float(kurtosis), float(size.max() - size.min()))


def _spread_over(slabs: Iterable[torch.Tensor]) -> _Spread:
    """Of several, from sums of powers about the mean of the first, so that nothing cancels."""
    count, about, sums = 0, 0.0, [0.0] * 4
    least, most = torch.tensor(torch.inf), torch.tensor(0.0)
    for weight in slabs:
        least, most = (
            torch.minimum(least, weight.abs().min()),
            torch.maximum(most, weight.abs().max()),
        )
        x = weight.double()
        about = about if count else float(x.mean())
        count += x.numel()
        x -= about
        square = x * x
        found = x.sum(), square.sum(), (x * square).sum(), square.square_().sum()
        sums = [a + float(b) for a, b in zip(sums, found, strict=True)]
    d, second, third, fourth = (value / count for value in sums)
    std = math.sqrt(max(0.0, second - d * d) * count / (count - 1))
    central = fourth - 4 * d * third + 6 * d * d * second - 3 * d**4
    kurtosis = central / std**4 - 3 if std else 0.0
    return _Spread(about + d, std, kurtosis, float(most.float() - least.float()))


@torch.inference_mode()
def _measure(source: Source, key: str, place, calibration, advance: Callable) -> ProbedLayer:
    rows, cols = source.tensors[key][1]
    slabs = (weight for _, weight in _slabs(source, key, advance))
    spread = _spread_of(*slabs) if rows * cols <= _SLAB else _spread_over(slabs)
    energy, outliers = SqnrAccumulator(), 0
    moments = calibration and calibration.of(key.removesuffix(WEIGHT))
    second = moments.second if moments else None
    lost = size = 0.0
    for first, weight in _slabs(source, key, advance):
        outliers += int(((weight.float() - spread.mean).abs_() > _OUTLIER * spread.std).sum())
        qdata, scale, signal, noise = kernels.quantize_and_measure(weight)
        energy.add(first, signal, noise)
        if second is not None:
            weight = weight.float()
            error = weight - kernels.dequantize(qdata, scale, torch.float32, tuple(weight.shape))
            lost += float((error @ second).mul_(error).sum(dtype=torch.float64))
            size += float((weight @ second).mul_(weight).sum(dtype=torch.float64))
    kind, block, blocks = place
    return ProbedLayer(
        key=key,
        layer_type=kind,
        block_idx=block,
        subgraph=blocks,
        shape=(rows, cols),
        excess_kurtosis=spread.kurtosis,
        dynamic_range=spread.range,
        std=spread.std,
        outlier_pct=100 * outliers / (rows * cols) if spread.std else 0.0,
        aspect_ratio=max(rows, cols) / min(rows, cols),
        sqnr_db=energy.sqnr_db,
        output_error=math.sqrt(max(0.0, lost) / size) if size > 0 else None,
    )


def _slabs(source: Source, key: str, advance: Callable):
    """(first row, rows of a weight), finite."""
    rows, cols = source.tensors[key][1]
    step = max(1, _SLAB // cols)
    for first in range(0, rows, step):
        weight = source.rows(key, first, min(rows, first + step))
        bad = ~weight.isfinite().all(-1)
        if bad.any():
            row = first + int(bad.nonzero()[0, 0])
            raise ValueError(f"{source.name}: {quoted(key)} holds NaN or Inf in row {row}")
        yield first, weight
        advance(weight.nbytes, key)


# ---- what quant_probe makes of it ------------------------------------------------------------


def _scored(layers: list[ProbedLayer]) -> list[ProbedLayer]:
    """With scores: kurtosis on a scale for the model, range and shape on one for the layer type."""
    low, high = (_quantile([la.excess_kurtosis for la in layers], q) for q in (0.25, 0.75))
    fences = low - _FENCE * (high - low), high + _FENCE * (high - low)
    alike: dict[str, list[ProbedLayer]] = {}
    for layer in layers:
        alike.setdefault(layer.layer_type, []).append(layer)

    def score(layer: ProbedLayer) -> float:
        group = alike[layer.layer_type]
        parts = (
            _share(layer.excess_kurtosis, fences),
            _share(layer.dynamic_range, [other.dynamic_range for other in group]),
            _share(layer.aspect_ratio, [other.aspect_ratio for other in group]),
        )
        return sum(weight * part for weight, part in zip(_WEIGHTS, parts, strict=True))

    return [replace(layer, score=score(layer)) for layer in layers]


def _share(value: float, of: Iterable[float]) -> float:
    """Where a value lies between the least and the most, 0 to 1; 0 where they are one."""
    least, most = min(of), max(of)
    return (min(most, max(least, value)) - least) / (most - least) if most > least else 0.0


def _recommended(layers: list[ProbedLayer], architecture: str | None) -> list[ProbedLayer]:
    quantile, least = _FP8.get(architecture, _FP8_ELSE)
    scores = [layer.score for layer in layers]
    keep, fp8 = _quantile(scores, _KEEP_QUANTILE), _quantile(scores, quantile)

    def recommend(layer: ProbedLayer) -> tuple[str, str]:
        if layer.excess_kurtosis >= _MOST_KURTOSIS:
            return KEEP, "kurtosis_floor"
        if layer.score >= keep:
            return KEEP, "score_percentile"
        if layer.score < fp8:
            return NVFP4, "default"
        return (FP8, "score_percentile") if layer.score >= least else (NVFP4, "score_below_fp8_min")

    found = [recommend(layer) for layer in layers]
    return [
        replace(layer, recommendation=what, reason=why)
        for layer, (what, why) in zip(layers, found, strict=True)
    ]


def _quantile(values: Sequence[float], share: float) -> float:
    """Between the two nearest, linearly, in float32 as the tool has it."""
    return float(torch.quantile(torch.tensor(values, dtype=torch.float32), share))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's, equal values at their mean rank; None where one of them does not vary."""
    if len(a) < 2 or min(a) == max(a) or min(b) == max(b):
        return None
    pair = torch.tensor([_ranks(a), _ranks(b)], dtype=torch.float64)
    return float(torch.corrcoef(pair)[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    places: dict[float, list[int]] = {}
    for place, value in enumerate(sorted(values)):
        places.setdefault(value, []).append(place)
    mean = {value: sum(found) / len(found) for value, found in places.items()}
    return [mean[value] for value in values]
