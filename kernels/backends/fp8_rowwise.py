"""Row-wise scaled FP8: the fast linear on FP8 tensor cores that know no block scales (Ada, Hopper).

It computes `x @ W.T` from E4M3 codes with one float32 scale per row of either matrix. Those scales
factor out of the sum, so any FP8 matmul can apply them to the finished accumulator. Three steps,
each an op of its own:

* `to_rowwise` rewrites the weight. E8M0 scales are powers of two, so a row's codes can be shifted
  to share the largest of its scales. Values down to 2**-13 of the row's largest keep all their
  bits; smaller ones change by at most 2**-17 of it: 2.3e-7 of a trained weight on average (MiniLM).
* `quantize_rowwise` quantizes activations per token: the scale puts a row's largest value at 448,
  the largest E4M3 value. The output error is about that of MXFP8 activations, which Blackwell
  multiplies: 2.95e-2 against 3.00e-2 on MiniLM's layers.
* `scaled_matmul` multiplies the two.

Because they are separate ops, torch.compile shares one quantized input among several layers, and a
caller with memory to spare can keep the prepared weight. Otherwise a weight is rewritten on every
forward, into memory that the caching allocator reuses from layer to layer.

Each step runs as a Triton kernel where Triton is available, else in plain torch. The matmul is
torch's own where the platform has one with row-wise scales: Hopper, and Ada except on Windows.

Rejected: one scale for the whole matrix; the row's largest scale without shifting the codes.
"""

from __future__ import annotations

import sys
from functools import cache

import torch

from .. import device_facts, layout
from ..layout import BLOCK, E8M0_NAN
from . import eager

SMALL_M = 64  # up to this many rows of x the weight's bytes decide, so layers run exact
E4M3_MAX = 448.0
SMALLEST_AMAX = 2.0**-100  # of a row of activations: 448 / amax is finite
_SLAB = 1 << 22  # values at a time


def activations_unsupported_reason(problem) -> str | None:
    """Why a backend that quantizes activations cannot take a `dispatch.Problem`, or None."""
    if problem.op != "linear":
        return "multiplies only"
    if problem.precision != "fast":
        return "quantizes activations, which precision exact rules out"
    if problem.small_m:
        return f"inputs of up to {SMALL_M} rows run exact: reading the weight is the bottleneck"
    return None


def unsupported_reason(problem) -> str | None:
    """Why this cannot take a `dispatch.Problem`, or None."""
    reason = activations_unsupported_reason(problem)
    if reason is not None:
        return reason
    if (device_facts.capability(problem.device) or (0, 0)) < (8, 9):
        actual = device_facts.described(problem.device)
        return f"needs FP8 tensor cores: NVIDIA compute capability 8.9 (RTX 40) or later; {actual}"
    if not torch_multiplies(problem.device, problem.dtype):
        return device_facts.triton_unsupported_reason()
    return None


def torch_multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a row-wise scaled FP8 matmul on a device, for results of `dtype`."""
    capability = device_facts.capability(device) or (0, 0)
    hopper = capability[0] == 9
    ada = capability == (8, 9) and sys.platform != "win32"
    return dtype == torch.bfloat16 and (hopper or ada) and _torch_runs(device)


@cache
def _torch_runs(device: torch.device) -> bool:
    """Whether this version of torch has it: earlier ones have it for Hopper only, or not at all."""
    code = torch.zeros(16, 32, device=device).to(torch.float8_e4m3fn)
    scale = torch.ones(16, 1, device=device)
    try:
        torch._scaled_mm(
            code, code.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError):
        return False
    return True


def to_rowwise(qdata, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """An MXFP8 weight as E4M3 with one scale per row; the bits of `reference.to_rowwise`.

    Args:
        qdata: float8_e4m3fn (or its bytes as uint8) [N', K'].
        scale: its tiled scales.

    Returns:
        (codes, scale): float8_e4m3fn [N', K'] and float32 [N'].
    """
    if device_facts.runs_triton(qdata.device):
        from .triton import rowwise

        return rowwise.to_rowwise(qdata, scale)
    return to_rowwise_eager(qdata, scale)


def quantize_rowwise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x [M, K] with one scale per row; the bits of `reference.quantize_rowwise`.

    Returns:
        (codes, scale): float8_e4m3fn [M, K'], K' rounded up to 32 and padding zero; float32 [M].
    """
    if device_facts.runs_triton(x.device):
        from .triton import rowwise

        if x.shape[1] <= rowwise.WIDEST:
            return rowwise.quantize_rowwise(x)
    return quantize_rowwise_eager(x)


def to_rowwise_eager(qdata, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """`to_rowwise` in plain torch, in slabs that fit a cache."""
    rows, cols = qdata.shape
    byte = layout.untile(scale.view(torch.uint8), rows, cols // BLOCK)
    largest = byte.masked_fill(byte == E8M0_NAN, 0).amax(-1).clamp_min(1)
    # A factor of at most 1 for every block, as the scale byte of another MXFP8 matrix.
    shifted = byte.int() - largest[:, None].int() + layout.E8M0_BIAS
    relative = shifted.clamp_min(0).to(torch.uint8).masked_fill(byte == E8M0_NAN, E8M0_NAN)
    code = torch.empty(rows, cols, dtype=torch.float8_e4m3fn, device=qdata.device)
    for first, last in layout.slabs(rows, cols, _SLAB):
        value = torch.empty(last - first, cols, device=qdata.device)
        eager.dequantize_rows(qdata, relative, value, first)
        value.masked_fill_(value.isnan(), torch.nan)  # one NaN, 0x7F
        code[first:last] = value.to(torch.float8_e4m3fn)
    return code, eager.decode_e8m0(largest)


def quantize_rowwise_eager(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rowwise` in plain torch."""
    rows, cols = x.shape
    stored = layout.round_up(cols, BLOCK)
    code = torch.zeros(rows, stored, dtype=torch.float8_e4m3fn, device=x.device)
    value = x.float()
    amax = value.abs().amax(-1, keepdim=True) if cols else value.new_zeros(rows, 1)
    finite = amax.isfinite()
    floor = amax.masked_fill(~finite, 1.0).clamp_min_(SMALLEST_AMAX)
    # Not 448.0 / floor, for which torch multiplies by a reciprocal and rounds twice.
    scaled = value * (torch.full_like(floor, E4M3_MAX) / floor)
    scaled = scaled.masked_fill_(~finite, 0.0).clamp_(-E4M3_MAX, E4M3_MAX)
    code[:, :cols] = scaled.to(torch.float8_e4m3fn)
    scale = floor / torch.full_like(floor, E4M3_MAX)
    return code, scale.masked_fill_(~finite, torch.nan).squeeze(-1)


def scaled_matmul(a, a_scale, b, b_scale, bias, dtype: torch.dtype, columns: int) -> torch.Tensor:
    """(a @ b.T) * a_scale[:, None] * b_scale[None, :] + bias, rounded once; [M, columns].

    Args:
        a, b: float8_e4m3fn [M, K] and [N, K].
        a_scale, b_scale: float32 [M] and [N].
        bias: [columns] of `dtype`, or None.
        columns: of the result, at most N; the other rows of b are padding.
    """
    if torch_multiplies(a.device, dtype) and a.shape[0]:
        missing = -b.shape[0] % 16
        if missing:  # rows were stored without padding
            b = torch.nn.functional.pad(b.view(torch.uint8), (0, 0, 0, missing)).view(b.dtype)
            b_scale = torch.nn.functional.pad(b_scale, (0, missing))
        N = b.shape[0]
        if bias is not None and columns < N:
            bias = torch.nn.functional.pad(bias, (0, N - columns))
        out = torch._scaled_mm(
            a, b.t(), scale_a=a_scale[:, None], scale_b=b_scale[None, :],
            bias=bias, out_dtype=dtype, use_fast_accum=True,
        )  # fmt: skip
        return out if columns == N else out[:, :columns].contiguous()
    if device_facts.runs_triton(a.device):
        from .triton import fp8_gemm

        return fp8_gemm.matmul(a, a_scale, b, b_scale, bias, dtype, columns)
    out = a.float() @ b[:columns].float().t()
    out *= a_scale[:, None]
    out *= b_scale[None, :columns]
    return (out if bias is None else out + bias.float()).to(dtype)


def linear(x, qdata, scale, bias, rows: int, cols: int, precision: str = "fast") -> torch.Tensor:
    """All three steps: x [M, K] @ W[N, K].T + bias, x quantized."""
    return scaled_matmul(*quantize_rowwise(x), *to_rowwise(qdata, scale), bias, x.dtype, rows)
