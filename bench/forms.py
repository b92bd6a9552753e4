"""The forms in which hardware multiplies an MXFP8 layer, computed by the oracle.

    exact           weights decoded, inputs as they are
    mxfp8           inputs in MXFP8 too
    rowwise_fp8     weights and inputs in E4M3 with a scale per row
    rotated_int8    weights and inputs rotated, then INT8 with a scale per row: in groups of 256
                    along K where K is a multiple of 256, else of 64

The oracle (`kernels/backends/reference.py`) quantizes and multiplies, in float64, so a form's error
is that of its numbers, not of one kernel. `fast_linear_in` is for models that run many steps: up to
15 times as fast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mxfp8.kernels import dequantize
from mxfp8.kernels.dispatch import named
from mxfp8.kernels.records import Backend

EXACT, MXFP8, FP8, INT8 = "exact", "mxfp8", "rowwise_fp8", "rotated_int8"
FORMS: dict[str, Backend] = {
    EXACT: named("reference"),
    MXFP8: named("reference_mx"),
    FP8: named("reference_fp8"),
    INT8: named("reference_int8"),
}
PLAIN_TORCH = {  # backends whose last preparer and quantizer are in plain torch
    EXACT: named("eager"),
    MXFP8: named("torch_mx"),
    FP8: named("torch_fp8"),
    INT8: named("int8"),
}


def linear_in(
    form: Backend,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A linear layer's forward in a form, its weight prepared once.

    Args:
        qdata, scale: as `kernels.quantize` returns them; shape: (N, K) of the weight.
    """
    N, K = shape
    stored = qdata, scale
    prepared = form.preparers[0].run(*stored) if form.preparers else stored

    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, K)
        quantized = form.quantizers[0].run(rows) if form.quantizers else (rows,)
        out = form.matmul(quantized, prepared, bias, x.dtype, N)
        return out[: len(rows)].reshape(*x.shape[:-1], N)  # MXFP8 pads rows

    return forward


def fast_linear_in(
    form: str,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """As `linear_in` by a form's name, in plain torch and float32.

    It quantizes to the oracle's bits (INT8 but for ties) and multiplies the same values: what is
    left is float32's rounding of sums.
    """
    N, K = shape
    steps, stored = PLAIN_TORCH[form], (qdata, scale)
    prepared = steps.preparers[-1].run(*stored) if steps.preparers else stored
    weight = _values(prepared)[:N]

    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, K)
        if steps.quantizers:
            rows = _values(steps.quantizers[-1].run(rows))[: len(rows)]
        out = torch.nn.functional.linear(rows, weight[:, : rows.shape[1]], bias)
        return out.reshape(*x.shape[:-1], N)

    return forward


def _values(tensors: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """float32 values of codes with scales in MXFP8's blocks or by row."""
    codes, scale = tensors
    if scale.dtype == torch.uint8:
        return dequantize(codes, scale, torch.float32)
    return codes.float() * scale[:, None]
