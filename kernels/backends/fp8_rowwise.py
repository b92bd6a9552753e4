"""Row-wise scaled FP8: fast on FP8 tensor cores that know no block scales (Ada, Hopper).

It computes `x @ W.T` from E4M3 codes with one float32 scale per row of either matrix. Those scales
factor out of the sum, so any FP8 matmul can apply them to the finished accumulator.

* `to_rowwise` rewrites the weight. E8M0 scales are powers of two, so a row's codes can be shifted
  to share the largest of its scales. Values down to 2**-13 of the row's largest keep all their
  bits; smaller ones change by at most 2**-17 of it: 2.3e-7 of a trained weight on average (MiniLM).
* `quantize_rowwise` quantizes activations per token: the scale puts a row's largest value at 448,
  the largest E4M3 value. The output error is about that of MXFP8 activations, which Blackwell
  multiplies: 2.95e-2 against 3.00e-2 on MiniLM's layers.
* Two matmuls: torch's own where the platform has one with row-wise scales (Hopper, and Ada except
  on Windows), and ours in Triton.

Here are the steps in plain torch, which show the rule and prepare weights where Triton is missing.

Rejected: one scale for the whole matrix; the row's largest scale without shifting the codes.
"""

from __future__ import annotations

import sys

import torch

from .. import device_facts, layout
from ..layout import BLOCK, E8M0_NAN
from . import eager

E4M3_MAX = 448.0
SMALLEST_AMAX = 2.0**-100  # of a row of activations: 448 / amax is finite
_SLAB = 1 << 22  # values at a time


def _unsupported_reason(problem) -> str | None:
    """Why a device has no FP8 tensor cores, or None."""
    if (device_facts.capability(problem.device) or (0, 0)) < (8, 9):
        card = "FP8 tensor cores: NVIDIA compute capability 8.9 (RTX 40) or later"
        return device_facts.needs(card, problem.device)
    return None


def torch_unsupported_reason(problem) -> str | None:
    """Why torch's matmul cannot take a `records.Problem`, or None.

    Which dtypes a version of torch returns, and whether it has the matmul for Ada, its self-test
    finds out.
    """
    reason = _unsupported_reason(problem)
    if reason is not None:
        return reason
    capability = device_facts.capability(problem.device)
    if capability[0] > 9:
        return device_facts.DeviceReason("torch's row-wise matmul is for Ada and Hopper")
    if capability == (8, 9) and sys.platform == "win32":
        return "torch for Windows has no row-wise matmul for Ada"
    if problem.dtype == torch.float32:
        return "returns 16-bit results; this linear is in float32"
    if not hasattr(torch, "_scaled_mm"):
        return f"this torch ({torch.__version__}) has no _scaled_mm"
    return None


def triton_unsupported_reason(problem) -> str | None:
    """Why the matmul in Triton cannot take a `records.Problem`, or None."""
    reason = _unsupported_reason(problem)
    return reason or device_facts.descriptors_unsupported_reason(problem.device)


def fnuz_unsupported_reason(problem) -> str | None:
    """Why the matmul of E4M3fnuz in Triton cannot take a `records.Problem`, or None."""
    if device_facts.amd_architecture(problem.device) != "gfx942":
        return device_facts.needs("tensor cores for E4M3fnuz (MI300)", problem.device)
    return device_facts.triton_unsupported_reason()


def quantize_by_triton_unsupported_reason(problem) -> str | None:
    """Why the quantizer in Triton cannot take a `records.Problem`, or None."""
    reason = device_facts.triton_on_unsupported_reason(problem.device)
    if reason is None and problem.shape is not None:
        from .triton import rowwise

        if problem.shape[1] > rowwise.WIDEST:
            return f"holds a row of x in registers, at most {rowwise.WIDEST} values"
    return reason


def to_rowwise(qdata, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """An MXFP8 weight as E4M3 with one scale per row; the bits of `reference.to_rowwise`.

    In slabs that fit a cache.

    Args:
        qdata: float8_e4m3fn (or its bytes as uint8) [N', K'].
        scale: its tiled scales.

    Returns:
        (codes, scale): float8_e4m3fn [N', K'] and float32 [N'].
    """
    rows, cols = qdata.shape
    byte = layout.untile(scale.view(torch.uint8), rows, cols // BLOCK)
    largest = byte.masked_fill(byte == E8M0_NAN, 0).amax(-1).clamp_min(1)
    # A factor of at most 1 for every block, as the scale byte of another MXFP8 matrix.
    shifted = byte.int() - largest[:, None].int() + layout.E8M0_BIAS
    relative = shifted.clamp_min(0).to(torch.uint8).masked_fill(byte == E8M0_NAN, E8M0_NAN)
    code = torch.empty(rows, cols, dtype=torch.float8_e4m3fn, device=qdata.device)
    for first, last in layout.slabs(rows, cols, _SLAB):
        value = torch.empty(last - first, cols, dtype=torch.float32, device=qdata.device)
        eager.dequantize_rows(qdata, relative, value, first)
        value.masked_fill_(value.isnan(), torch.nan)  # one NaN, 0x7F
        code[first:last] = value.to(torch.float8_e4m3fn)
    return code, eager.decode_e8m0(largest)


def quantize_rowwise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x [M, K] with one scale per row; the bits of `reference.quantize_rowwise`.

    Returns:
        (codes, scale): float8_e4m3fn [M, K'], K' rounded up to 32 and padding zero; float32 [M].
    """
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


def matmul_by_torch(quantized, prepared, bias, dtype: torch.dtype, N: int) -> torch.Tensor:
    """(a @ b.T) * a_scale[:, None] * b_scale[None, :] + bias, rounded once; [M, N].

    Args:
        quantized: (a, a_scale), float8_e4m3fn [M, K'] and float32 [M].
        prepared: (b, b_scale), float8_e4m3fn [N', K'] and float32 [N']; rows from N on are padding.
        bias: [N] of `dtype`, or None.
    """
    (a, a_scale), (b, b_scale) = quantized, prepared
    if a.shape[0] == 0:
        return torch.empty(0, N, dtype=dtype, device=a.device)
    missing = -b.shape[0] % 16
    if missing:  # rows were stored without padding
        b = torch.nn.functional.pad(b.view(torch.uint8), (0, 0, 0, missing)).view(b.dtype)
        b_scale = torch.nn.functional.pad(b_scale, (0, missing))
    if bias is not None and b.shape[0] > N:
        bias = torch.nn.functional.pad(bias, (0, b.shape[0] - N))
    out = torch._scaled_mm(
        a, b.t(), scale_a=a_scale[:, None], scale_b=b_scale[None, :],
        bias=bias, out_dtype=dtype, use_fast_accum=True,
    )  # fmt: skip
    return out if out.shape[1] == N else out[:, :N].contiguous()


def matmul_by_triton(quantized, prepared, bias, dtype: torch.dtype, N: int) -> torch.Tensor:
    """As `matmul_by_torch`, also for float32 results."""
    from .triton import gemm

    return gemm.matmul(*quantized, *prepared, bias, dtype, N)
