"""Calibrated rounding (GPTQ): which of two neighboring codes, when a layer's inputs are known.

Rounding each weight to nearest is best for the weights, not for the layer's output. For a layer's
inputs X [n, K] this uses the Hessian H = X.T X / n: the output's squared error is e H e.T, summed
over the rows e of the difference between the weight and what is stored. Two steps reduce it, in the
stock format and at its size:

1. Error feedback along K (GPTQ, https://arxiv.org/abs/2210.17323, as LDLQ,
   https://arxiv.org/abs/2307.13304): columns are rounded one after the other, and each makes up for
   the errors of the earlier ones. With H = R R.T, R upper triangular, the errors before column j
   times R[:, j] / R[j, j] are added to it: one Cholesky factorization, no inverse. A block's scale
   is chosen by the usual rule when its first column is reached. Blocks with large inputs come
   first, and so do the columns within a block, which the format allows: scales go with the block.
2. Coordinate descent: each column once more, to the code that is best while all others stay. The
   error cannot grow.

Few inputs say little about K directions, and rounding that trusts them is worse on other inputs
than rounding to nearest. So H is damped by 0.3 K / n of its mean diagonal, besides the usual 0.01:
of 0.03 to 1.0 that was best on MiniLM's layers for n of 16, 100, 500 and 2,000 alike. There the
error on other inputs was 0.93, 0.82, 0.70 and 0.62 of plain rounding's (without: 1.02, 1.07, 0.83,
0.64).

A row keeps plain rounding where the result is no better on those inputs, damped or not.

Rejected, after trials on MiniLM with the texts of bench/quality.py: a search over scales, up or
down by a power of two (no gain); no order of blocks and columns (4% worse); layer after layer, each
on the outputs of the rounded layers before it (the layers' error the same, end to end 0.99 of it,
for as many calibrations as the model has steps); and, for the fast path, the original's output as
target on activations that are quantized per token (there, the layers' error 1.01 and end to end
1.04 of it; on plain activations 1.08 and 1.21).

Rejected, after trials on other data than calibrated, on MiniLM, on ViT-S of bench/quality.py and on
the image model of tests/models, there as SNR of the latents of 64 pairs of prompt and seed:

* The inputs' covariance as H, their means made up for in the bias: 0.98 of the layers' error on
  three splits of MiniLM and on a third of ViT-S's layers, end to end 0.92 to 0.96 and 1.08 of it;
  +0.3, -0.3 and 0.0 dB (each +- 0.2) in three calibrations. The bias alone: no change. It would
  change the bias in the file, which is otherwise the original's.
* Eight sweeps for two: MiniLM 0.986 and 0.968, +0.09 dB (+- 0.05), and more time.
* Damping of 0 to 1.2 K / n for 0.3 K / n: the layers' error of ViT-S 1.01 to 0.99, end to end in no
  order.
* The last quarter of a sampler's steps 30 times in H: +1.4, +0.7 and +0.7 dB with 32 pairs of
  prompt and seed to calibrate on, +0.2 (+- 0.3) with 96, where the same weight for all steps gives
  48.8 dB instead of 46.4 to 47.5. Eight times: -0.3 to +1.4 dB. The last half three times: 0.0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ... import kernels
from ...kernels.layout import BLOCK

# Added to H's diagonal, times its mean: a constant, and a factor of K / n.
DAMPING, DAMPING_BY_ROWS = 0.01, 0.3
SWEEPS = 2  # of coordinate descent
_SPAN = 128  # columns whose feedback from all others is computed at once
_HALF = 1024  # columns of H's half that errors are measured with at once
_LARGEST = 448.0


@dataclass(frozen=True)
class Rounded:
    """A rounded weight.

    Attributes:
        qdata, scale: as `kernels.quantize` returns them.
        error, nearest: relative output error of this and of rounding to nearest, the root of
            e H e.T over w H w.T; 0 where the weight or H is zero.
    """

    qdata: torch.Tensor
    scale: torch.Tensor
    error: float
    nearest: float


def round_weight(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    rows: int | None = None,
    *,
    name: str = "this layer",
    tick: Callable[[], None] = lambda: None,
) -> Rounded:
    """Round a weight to MXFP8 for given inputs.

    Args:
        weight: [N, K], float32, float16 or bfloat16, finite, on the device that is to compute.
        hessian: [K, K], X.T X / n of the inputs, any float dtype.
        rows: n; default: enough for K.
        name: the layer's, for errors.
        tick: called before every span of columns, in the feedback, in each sweep and where errors
            are measured: at least once a second on a layer of 3840 x 10240. But the Cholesky
            factorization is a single call, of seconds for 10240 columns. What `tick` raises passes
            through.

    Raises:
        ValueError: sizes that do not fit, or a Hessian that is not finite or not positive definite.
    """
    N, K = weight.shape
    if tuple(hessian.shape) != (K, K):
        raise ValueError(
            f"the Hessian of {name} has shape {list(hessian.shape)}; a weight "
            f"{list(weight.shape)} needs {[K, K]}"
        )
    if not hessian.isfinite().all():
        raise ValueError(f"the Hessian of {name} holds NaN or Inf; calibrate again")
    plain = kernels.quantize(weight)
    if not weight.any() or not hessian.diagonal().any():
        return Rounded(*plain, 0.0, 0.0)

    wide = torch.nn.functional.pad(weight.float(), (0, -K % BLOCK))
    H = _padded(hessian.to(weight.device, torch.float32), wide.shape[1])
    nearest = kernels.dequantize(*plain, torch.float32)[:N]
    ridge = (DAMPING + (DAMPING_BY_ROWS * K / rows if rows else 0.0)) * H.diagonal().mean()
    order = _order(H)
    damped = H[order][:, order]
    damped.diagonal().add_(ridge)
    state = _State(wide, order)
    if not _feed_back(state, damped, tick):
        raise ValueError(f"the Hessian of {name} is not positive definite; calibrate again")
    for _ in range(SWEEPS):
        _descend(state, damped, tick)

    size = _energy(wide, H, tick)
    calibrated = state.value
    del state, damped
    changes = wide - nearest, wide - calibrated
    before, after = (_energy(change, H, tick) for change in changes)
    # Those of the damped H: the ridge adds the change's own square.
    damped_before, damped_after = (
        energy + ridge * change.double().square_().sum(-1)
        for energy, change in zip((before, after), changes, strict=True)
    )
    better = ((after < before) & (damped_after < damped_before))[:, None]
    value = torch.where(better, calibrated, nearest)[:, :K]
    qdata, scale = kernels.quantize(value)  # exact: each is a code of its block's scale
    total = float(size.sum())
    kept = torch.where(better[:, 0], after, before)
    return Rounded(qdata, scale, *(max(0.0, float(e.sum() / total)) ** 0.5 for e in (kept, before)))


def output_error(
    weight: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    hessian: torch.Tensor,
    tick: Callable[[], None] = lambda: None,
) -> float:
    """The relative error of a layer's output: the root of e H e.T over w H w.T.

    Args:
        weight: [N, K]; qdata, scale: what is stored of it, as `kernels.quantize` returns them.
        hessian: H, [K, K], of these inputs or of others than the weight was rounded for.
        tick: as for `round_weight`.
    """
    H = hessian.to(weight.device, torch.float32)
    weight = weight.float()
    error = weight - kernels.dequantize(qdata, scale, torch.float32, tuple(weight.shape))
    lost, size = (float(_energy(part, H, tick).sum()) for part in (error, weight))
    return (max(0.0, lost) / size) ** 0.5 if size > 0 else 0.0


def _padded(hessian: torch.Tensor, size: int) -> torch.Tensor:
    """[K', K'], with a tiny diagonal where all inputs were zero: errors there hardly count."""
    H = torch.zeros(size, size, device=hessian.device)
    H[: len(hessian), : len(hessian)] = hessian
    unseen = H.diagonal() == 0
    H.diagonal()[unseen] = H.diagonal()[~unseen].mean() * 1e-6
    return H


def _energy(error: torch.Tensor, H: torch.Tensor, tick: Callable[[], None]) -> torch.Tensor:
    """e H e.T of each row, from one half of H, which is symmetric. float64 [N]."""
    total = torch.zeros(len(error), dtype=torch.float64, device=error.device)
    for begin in range(0, len(H), _HALF):
        tick()
        span = slice(begin, begin + _HALF)
        part = error[:, span]
        product = part @ H[span, span]
        product.addmm_(error[:, :begin], H[:begin, span], alpha=2)
        total += (product.double() * part.double()).sum(-1)
    return total


class _State:
    """Rounded values and their blocks' scales, in the order in which columns are rounded.

    Matrices are transposed, so that a column is contiguous. Across rows of 40 KB, each of its
    values would be in a cache line of its own.
    """

    def __init__(self, weight: torch.Tensor, order: torch.Tensor):
        self.order = order
        self.weight = weight.t().contiguous()[order]  # [K', N]
        self.rounded = torch.zeros_like(self.weight)
        self.error = torch.zeros_like(self.weight)
        self.unit = torch.ones(len(order) // BLOCK, len(weight), device=weight.device)

    @property
    def value(self) -> torch.Tensor:
        """[N, K'] in the weight's own order."""
        result = torch.empty_like(self.rounded)
        result[self.order] = self.rounded
        return result.t().contiguous()

    def round(self, column: int, target: torch.Tensor) -> torch.Tensor:
        """Round a column to the codes nearest to `target`; returns the change of its error."""
        unit = self.unit[column // BLOCK]
        code = (target / unit).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        rounded = code.float() * unit
        error = self.weight[column] - rounded
        growth = error - self.error[column]
        self.rounded[column], self.error[column] = rounded, error
        return growth


def _order(H: torch.Tensor) -> torch.Tensor:
    """Columns by the size of their inputs, largest first, within blocks likewise. int64 [K']."""
    size = H.diagonal().view(-1, BLOCK)
    blocks = size.sum(-1).argsort(dim=0, descending=True, stable=True)
    columns = size.argsort(dim=-1, descending=True, stable=True)
    return (blocks[:, None] * BLOCK + columns[blocks]).flatten()


def _feed_back(state: _State, H: torch.Tensor, tick: Callable[[], None]) -> bool:
    """Round column after column, each making up for the errors of the earlier ones.

    Returns:
        Whether H is positive definite; if it is not, nothing is done.
    """
    L, failed = torch.linalg.cholesky_ex(H.flip(0, 1).double())
    if failed:
        return False
    feedback = L.div_(L.diagonal().clone()).float().flip(0, 1).t()  # H = R R.T: R.T, divided
    del L
    for begin in range(0, len(H), _SPAN):
        tick()
        end = min(len(H), begin + _SPAN)
        target = state.weight[begin:end] + feedback[begin:end, :begin] @ state.error[:begin]
        for first in range(begin, end, BLOCK):
            last = first + BLOCK
            block = target[first - begin : last - begin]
            block += feedback[first:last, begin:first] @ state.error[begin:first]
            state.unit[first // BLOCK] = _unit(block)
            for column in range(first, last):
                inner = feedback[column, first:column] @ state.error[first:column]
                state.round(column, block[column - first] + inner)
    return True


def _unit(block: torch.Tensor) -> torch.Tensor:
    """The scales of blocks [32, N] by the usual rule, as float32 powers of two."""
    mantissa, exponent = torch.frexp(block.abs().amax(0))
    return torch.exp2((exponent - 9 + (mantissa > 0.875).int()).clamp(-126, 120).float())


def _descend(state: _State, H: torch.Tensor, tick: Callable[[], None]) -> None:
    """Round every column once more, each for the current errors of all others."""
    for begin in range(0, len(H), _SPAN):
        tick()
        end = min(len(H), begin + _SPAN)
        slope = H[begin:end] @ state.error
        for first in range(begin, end, BLOCK):
            last = first + BLOCK
            inside = slope[first - begin : last - begin]
            grown = []
            for column in range(first, last):
                step = slope[column - begin] / H[column, column]
                growth = state.round(column, state.rounded[column] + step)
                inside.addr_(H[column, first:last], growth)
                grown.append(growth)
            if last < end:
                slope[last - begin :].addmm_(H[last:end, first:last], torch.stack(grown))
