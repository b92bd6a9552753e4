"""The fast linear on Blackwell: block-scaled tensor cores, by torch (cuBLASLt).

Activations are quantized to MXFP8 in one pass, tiled scales included, and torch multiplies the two
as they are stored. That is also what stock ComfyUI runs there; the quantizer is ours. comfy-kitchen
has one in CUDA: whether it is faster is for `bench/gpu.py` to say (row "quantize", stock); until a
results file does, it is not used.

What it asks for, and why:

* compute capability 10: tensor cores that apply E8M0 scales per 32 values;
* CUDA 12.8: the first cuBLASLt with this matmul;
* torch 2.10 for `torch.nn.functional.scaled_mm`; from 2.7 on, the private `torch._scaled_mm` takes
  scales of the dtype float8_e8m0fnu as the same thing. 2.7 drops a bias where K is no multiple of
  128 (https://github.com/pytorch/pytorch/pull/153254), so there it is added afterwards;
* E4M3 on both sides, scales in the tiled order, whole tiles, contiguous: what the format is;
* both matrices K-major (`x @ w.t()`): before cuBLAS 13.6, GeForce cards have no other
  (https://github.com/pytorch/pytorch/issues/198126);
* N and K multiples of 16, for cuBLASLt, which padding gives;
* results in 16 bits: a bias cannot be had with float32 ones.
"""

from __future__ import annotations

import torch

from .. import device_facts, layout
from . import fp8_rowwise

_ALIGNMENT = 16  # rows and columns of a matrix, for cuBLASLt


def unsupported_reason(problem) -> str | None:
    """Why this cannot run, or None (`dispatch.Problem`)."""
    reason = fp8_rowwise.activations_unsupported_reason(problem)
    if reason is not None:
        return reason
    found = device_facts.capability(problem.device)
    if found is None or found < (10, 0):
        have = device_facts.described(problem.device)
        return f"needs block-scaled tensor cores: NVIDIA Blackwell (RTX 50, B200); {have}"
    if problem.dtype == torch.float32:
        return "gives results in 16 bits; these are to be float32"
    if not (_public() or _private()):
        return f"needs torch 2.10 or later, or the private form of 2.7; this is {torch.__version__}"
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    if cuda < (12, 8):
        return f"needs a torch for CUDA 12.8 or later; this one is for {torch.version.cuda}"
    return None


def _public() -> bool:
    return hasattr(torch.nn.functional, "scaled_mm")


def _private() -> bool:
    """Whether `torch._scaled_mm` knows E8M0 scales: it does wherever the dtype is."""
    return hasattr(torch, "_scaled_mm") and hasattr(torch, "float8_e8m0fnu")


def matmul(tokens, weight, bias, dtype: torch.dtype, M: int, N: int) -> torch.Tensor:
    """x [M, K] @ W[N, K].T + bias from their stored forms, rounded once. [M, N] of `dtype`.

    By `torch._scaled_mm` the bias is added to rounded values, which are rounded again.

    Args:
        tokens, weight: (qdata, tiled scale), padded as `ops.quantize` pads; a weight's rows may be
            stored without padding.
        bias: [N] of `dtype`, or None.
    """
    (a, a_scale), (b, b_scale) = tokens, weight
    if M == 0 or N == 0:  # cuBLASLt takes no empty matrix
        return torch.empty(M, N, dtype=dtype, device=a.device)
    b = b.view(torch.uint8)
    missing = -b.shape[0] % _ALIGNMENT
    if missing:
        b = torch.nn.functional.pad(b, (0, 0, 0, missing))
    if bias is not None and b.shape[0] > N:
        bias = torch.nn.functional.pad(bias, (0, b.shape[0] - N))
    codes = a.view(torch.float8_e4m3fn), b.view(torch.float8_e4m3fn).t()
    scales = a_scale.view(torch.float8_e8m0fnu), b_scale.view(torch.float8_e8m0fnu)
    out = (_by_scaled_mm if _public() else _by_private)(*codes, *scales, bias, dtype)
    return out if tuple(out.shape) == (M, N) else out[:M, :N].contiguous()


def _by_scaled_mm(a, b, a_scale, b_scale, bias, dtype):
    from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

    block, tiled = ScalingType.BlockWise1x32, SwizzleType.SWIZZLE_32_4_4
    return scaled_mm(a, b, a_scale, block, b_scale, block, tiled, tiled, bias, dtype)


def _by_private(a, b, a_scale, b_scale, bias, dtype):
    out = torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype)
    return out if bias is None else out.add_(bias)


assert layout.ROW_PAD % _ALIGNMENT == 0
