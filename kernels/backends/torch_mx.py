"""The fast linear on Blackwell: block-scaled tensor cores, by torch (cuBLASLt).

Inputs are quantized to MXFP8 in one pass, tiled scales included, and torch multiplies the stored
forms of both. Stock ComfyUI computes the same there; the quantizer is ours. comfy-kitchen has a
CUDA quantizer that may be faster: `bench/gpu` measures both (row "quantize", stock), and it is used
where Triton does not run.

Requirements:

* compute capability 10 or later: tensor cores that apply E8M0 scales per 32 values;
* CUDA 12.8: the first cuBLASLt with this matmul;
* torch 2.10 for `torch.nn.functional.scaled_mm`. From 2.7 on, the private `torch._scaled_mm` takes
  scales of dtype float8_e8m0fnu for the same; 2.7 drops the bias if K is not a multiple of 128
  (https://github.com/pytorch/pytorch/pull/153254), so there it is added afterward;
* E4M3 on both sides, scales in the tiled order, whole tiles, contiguous: what the format stores;
* both matrices K-major (`x @ w.t()`): before cuBLAS 13.6, GeForce cards support no other layout
  (https://github.com/pytorch/pytorch/issues/198126);
* N and K multiples of 16, which padding ensures;
* 16-bit results: with float32 results there is no bias.
"""

from __future__ import annotations

import torch

from .. import device_facts, layout

_ALIGNMENT = 16  # of the rows and columns of a matrix, for cuBLASLt


def unsupported_reason(problem) -> str | None:
    """Why this cannot take a `records.Problem`, or None."""
    if (device_facts.capability(problem.device) or (0, 0)) < (10, 0):
        card = "block-scaled tensor cores: NVIDIA Blackwell (RTX 50, B200)"
        return device_facts.needs(card, problem.device)
    if problem.dtype == torch.float32:
        return "returns 16-bit results; this linear is in float32"
    if not (_public() or _private()):
        needed = "torch 2.10 or later, or the private form of 2.7"
        reason = f"needs {needed}; this is {torch.__version__}"
        return device_facts.InstallReason(reason, "torch", "torch 2.10 or later")
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    if cuda < (12, 8):
        needed = "a torch for CUDA 12.8 or later"
        reason = f"needs {needed}; this one is for {torch.version.cuda}"
        return device_facts.InstallReason(reason, "torch", needed)
    return None


def _public() -> bool:
    return hasattr(torch.nn.functional, "scaled_mm")


def _private() -> bool:
    """Whether `torch._scaled_mm` takes E8M0 scales: it does wherever the dtype exists."""
    return hasattr(torch, "_scaled_mm") and hasattr(torch, "float8_e8m0fnu")


def matmul(quantized_input, weight, bias, dtype: torch.dtype, M: int, N: int) -> torch.Tensor:
    """x [M, K] @ W[N, K].T + bias from their stored forms, rounded once. [M, N] of `dtype`.

    With `torch._scaled_mm` the bias is added to the rounded product, which is rounded again.

    Args:
        quantized_input, weight: (qdata, tiled scale), padded as `ops.quantize` pads; rows of the
            weight may be stored without padding.
        bias: [N] of `dtype`, or None.
    """
    (a, a_scale), (b, b_scale) = quantized_input, weight
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
