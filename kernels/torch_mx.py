"""The fast linear on Blackwell: block-scaled tensor cores, by torch (cuBLASLt).

Activations are quantised to MXFP8 in one pass, tiled scales included, and
`torch.nn.functional.scaled_mm` multiplies the two as they are stored. That is also what stock
ComfyUI runs there; the quantiser is ours.

What it asks for, and why: compute capability 10 (tensor cores that apply E8M0 scales per 32
values), torch 2.10 (the first with this function), CUDA 12.8 (the first cuBLASLt with this matmul),
results in 16 bits, and rows that are stored in multiples of 16, which padding gives.
"""

from __future__ import annotations

import torch

from . import fast_linear, launch, layout

_ALIGNMENT = 16  # rows and columns of a matrix, for cuBLASLt


def refuse(problem) -> str | None:
    """Why this cannot run, or None (`dispatch.Problem`)."""
    reason = fast_linear.refuse_activations(problem)
    if reason is not None:
        return reason
    found = launch.capability(problem.device)
    if found is None or found < (10, 0):
        have = launch.described(problem.device)
        return f"needs block-scaled tensor cores: NVIDIA Blackwell (RTX 50, B200); {have}"
    if problem.dtype == torch.float32:
        return "gives results in 16 bits; these are to be float32"
    if not hasattr(torch.nn.functional, "scaled_mm"):
        return f"needs torch 2.10 or later; this is {torch.__version__}"
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    if cuda < (12, 8):
        return f"needs a torch for CUDA 12.8 or later; this one is for {torch.version.cuda}"
    return None


def matmul(tokens, weight, bias, dtype: torch.dtype, M: int, N: int) -> torch.Tensor:
    """x [M, K] @ W[N, K].T + bias from their stored forms, rounded once. [M, N] of `dtype`.

    Args:
        tokens, weight: (qdata, tiled scale), padded as `ops.quantize` pads; a weight's rows may be
            stored without padding.
        bias: [N] of `dtype`, or None.
    """
    from torch.nn.functional import ScalingType, SwizzleType, pad, scaled_mm

    (a, a_scale), (b, b_scale) = tokens, weight
    b = b.view(torch.uint8)
    missing = -b.shape[0] % _ALIGNMENT
    if missing:
        b = pad(b, (0, 0, 0, missing))
    if bias is not None and b.shape[0] > N:
        bias = pad(bias, (0, b.shape[0] - N))
    block, tiled = ScalingType.BlockWise1x32, SwizzleType.SWIZZLE_32_4_4
    out = scaled_mm(
        a.view(torch.float8_e4m3fn),
        b.view(torch.float8_e4m3fn).t(),
        a_scale.view(torch.float8_e8m0fnu), block,
        b_scale.view(torch.float8_e8m0fnu), block,
        tiled, tiled, bias, dtype,
    )  # fmt: skip
    return out if tuple(out.shape) == (M, N) else out[:M, :N].contiguous()


assert layout.ROW_PAD % _ALIGNMENT == 0
