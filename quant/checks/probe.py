"""quant_probe's sensitivity scores of a model's layers, next to their measured error in MXFP8.

quant_probe (https://github.com/insecure-erasure/quant_probe) predicts from a weight's values which
layers to keep: excess kurtosis, range and shape make a score, and the top tenth is kept. It
measures no error. This module computes its scores and recommendations, as documented and to the
digits of its table, and measures the error in MXFP8: the SQNR of the weight and, with a
calibration, the error of the layer's output. The rank correlation of the two shows how much the
score is worth for a model.

The tool knows Z-Image and Wan; other models are scored with its settings for Z-Image. Its last,
optional step, which evens out recommendations for a type of layer over the depth of a model, is
left out.

Weights are read whole, one after the other, and their statistics taken in float32 as the tool takes
them, because the layer at the 90% quantile is kept or not depending on the last bit.
Rejected: power sums in float64 over slabs of rows, which take less memory and are as precise, but
do not have the tool's last bits.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from ... import kernels
from ..container.header import FormatError, nbytes, quoted
from ..conversion import gptq, policy, text_encoders
from ..conversion.calibration import Calibration, check_model
from ..format import FLOATS, WEIGHT, bare
from ..progress import Meter, Progress
from ..reports import document
from ..reports.conversion import SqnrAccumulator
from ..sources.file import Source
from ..sources.open import open_source
from ..sources.unsupported import check_unquantized

KEY = "mxfp8_probe"
KEEP, FP8, NVFP4 = "*KEEP*", "FP8", "NVFP4"
_WEIGHTS = 0.6, 0.3, 0.1  # of kurtosis, range and aspect ratio in the score
_FENCE = 1.5  # interquartile ranges beyond the quartiles, where kurtosis is clipped
_MOST_KURTOSIS = 8.0  # from here on a layer is kept whatever its score
_KEEP_QUANTILE = 0.9  # of the scores
_FP8 = {"Wan": (0.75, 0.5)}  # quantile from which a layer is FP8, and the least score
_FP8_ELSE = 0.5, 0.0
_OUTLIER = 3.0  # standard deviations from the mean
_MAIN = ("blocks", "layers")  # left out of layer types


@dataclass(frozen=True)
class ProbedLayer:
    """One weight.

    Attributes:
        layer_type: name without the number of its block; subgraph: name of the list of blocks.
        excess_kurtosis, dynamic_range, std, outlier_pct, aspect_ratio, score, recommendation,
            reason: as in quant_probe.
        sqnr_db: of the weight in MXFP8; None without any error.
        output_error: relative error of the layer's output on the calibration data, with the weight
            rounded to nearest; None without a calibration.
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
    """The layers of a model.

    Attributes:
        weight_correlation, output_correlation: Spearman's, of the scores with the measured errors;
            None if either is constant or was not measured.
    """

    file: str
    architecture: str | None
    weight_correlation: float | None
    output_correlation: float | None
    layers: tuple[ProbedLayer, ...]

    def to_json(self) -> str:
        """Versioned JSON, every layer included."""
        return document.write(KEY, asdict(self))

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
        lines = [f"{len(self.layers)} layers, by score: {shares}"]
        sqnr = [layer.sqnr_db for layer in self.layers if layer.sqnr_db is not None]
        if sqnr:
            lines.append(f"SQNR in MXFP8: {min(sqnr):.2f} to {max(sqnr):.2f} dB")
        correlations = [
            f"{value:+.2f} with {error}"
            for value, error in (
                (self.weight_correlation, "weight error"),
                (self.output_correlation, "layer output error"),
            )
            if value is not None
        ]
        if correlations:
            lines.append(
                f"rank correlation of the score: {', '.join(correlations)} "
                "(+1: sorts layers by error; 0: unrelated)"
            )
        return "\n".join(lines)


# quant_probe's columns and their formats.
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
        calibration: of the model, to measure the error of layer outputs.
        progress: called after every weight.

    Raises:
        FormatError: the file is damaged, quantized, or has no numbered blocks.
        ValueError: a weight holds NaN or Inf, or the calibration is another model's.
        OSError: it cannot be read.
    """
    with open_source(path) as source:
        check_unquantized(source, copied=lambda layer: layer.startswith(text_encoders.PREFIXES))
        if calibration is not None:
            check_model(calibration, source)
        places = {key: place for key in source.tensors if (place := _place(key, source))}
        if not places:
            raise FormatError(
                f"{source.name}: no BF16, FP16 or FP32 matrix in numbered blocks "
                "('layers.0.....weight'); only those are scored"
            )
        sizes = {key: nbytes(*source.tensors[key]) for key in places}
        advance = Meter(sum(sizes.values()), progress)
        architecture, _ = policy.detect_architecture(source.tensors) or (None, None)
        measured = []
        for key, place in places.items():
            measured.append(_measure(source, key, place, calibration))
            advance(sizes[key], key)
        layers = _recommended(_scored(measured), architecture)
    scores = [layer.score for layer in layers]
    noise = [-math.inf if layer.sqnr_db is None else -layer.sqnr_db for layer in layers]
    calibrated = [layer for layer in layers if layer.output_error is not None]
    return Probe(
        source.name,
        architecture,
        rank_correlation(scores, noise),
        rank_correlation([x.score for x in calibrated], [x.output_error for x in calibrated]),
        tuple(layers),
    )


def _place(key: str, source: Source) -> tuple[str, int, str] | None:
    """(layer type, number of the block, name of the list of blocks), or None if not scored."""
    dtype, shape = source.tensors[key]
    if not key.endswith(WEIGHT) or dtype not in FLOATS or len(shape) != 2 or 0 in shape:
        return None
    parts = bare(key).removesuffix(WEIGHT).split(".")
    at = next((i for i, part in enumerate(parts) if i and part.isdecimal()), len(parts))
    blocks, kind = ".".join(parts[:at]), ".".join(parts[at + 1 :])
    if not kind or (blocks.endswith("_refiner") and kind.startswith("adaLN_modulation")):
        return None  # the tool skips the modulations of Z-Image's refiners
    return kind if blocks in _MAIN else f"{blocks}.{kind}", int(parts[at]), blocks


# ---- measuring -------------------------------------------------------------------------------


@torch.inference_mode()
def _measure(
    source: Source, key: str, place: tuple[str, int, str], calibration: Calibration | None
) -> ProbedLayer:
    rows, cols = source.tensors[key][1]
    stored = source.rows(key, 0, rows)
    bad = ~stored.isfinite().all(-1)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise ValueError(f"{source.name}: {quoted(key)} holds NaN or Inf in row {row}")
    qdata, scale, signal, noise = kernels.quantize_and_measure(stored)
    sqnr = SqnrAccumulator()
    sqnr.add(0, signal, noise)
    moments = calibration and calibration.of(key.removesuffix(WEIGHT))
    weight = stored.float()
    error = gptq.output_error(weight, qdata, scale, moments.hessian) if moments else None

    least, most = stored.abs().aminmax()
    # Fourth powers of very large or small values leave float32; scaled by 2**n they do not.
    exponent = math.frexp(float(most))[1]
    unit = 2.0 ** max(-126, min(exponent, 126)) if abs(exponent) > 16 else 1.0
    if unit != 1:
        weight.mul_(1 / unit)
    std = weight.std() if weight.numel() > 1 else torch.zeros(())
    deviation = weight.sub_(weight.mean())  # in place: nothing reads the weight again
    kurtosis = outliers = 0.0
    if std > 0:
        kurtosis = float((deviation**4).mean() / std**4 - 3.0)
        outliers = int((deviation.abs() > _OUTLIER * std).sum())
    layer_type, block, blocks = place
    return ProbedLayer(
        key=key,
        layer_type=layer_type,
        block_idx=block,
        subgraph=blocks,
        shape=(rows, cols),
        excess_kurtosis=kurtosis,
        dynamic_range=float(most.float() - least.float()),
        std=float(std) * unit,
        outlier_pct=100 * outliers / (rows * cols),
        aspect_ratio=max(rows, cols) / min(rows, cols),
        sqnr_db=sqnr.sqnr_db,
        output_error=error,
    )


# ---- scoring, as quant_probe does ------------------------------------------------------------


def _scored(layers: list[ProbedLayer]) -> list[ProbedLayer]:
    """Layers with scores: kurtosis relative to the model, range and shape to the layer type."""
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
    """Where a value lies between the least and the most, 0 to 1; 0 if they are equal."""
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

    advice = [(layer, *recommend(layer)) for layer in layers]
    return [replace(layer, recommendation=what, reason=why) for layer, what, why in advice]


def _quantile(values: Sequence[float], share: float) -> float:
    """A quantile with linear interpolation, in float32 as in the tool."""
    return float(torch.quantile(torch.tensor(values, dtype=torch.float32), share))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None if one of the two is constant."""
    if len(a) < 2 or min(a) == max(a) or min(b) == max(b):
        return None
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]).double())[0, 1])


def _ranks(values: Sequence[float]) -> torch.Tensor:
    _, place, counts = torch.tensor(values, dtype=torch.float64).unique(
        return_inverse=True, return_counts=True
    )
    return (counts.cumsum(0) - (counts - 1) / 2)[place]
