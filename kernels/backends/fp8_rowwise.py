"""The fast linear before Blackwell: FP8 tensor cores through the row fold (`row_fold`).

Three steps, each an op of its own: `to_rowwise` rewrites the weight, `quantize_rowwise` the
activations, `scaled_matmul` multiplies. So torch.compile shares one quantization of activations
among several layers, and who has memory to spare keeps a folded weight.

Folding on every forward goes into memory that the caching allocator hands out anew each time: one
block, reused from layer to layer, and safe on every stream.

For each step Triton's kernel runs where there is Triton, else plain torch. The matmul is torch's
own where the platform has it for scales by row: Hopper, and Ada but for Windows.
"""

from __future__ import annotations

import sys
from functools import cache

import torch

from .. import device_facts
from . import row_fold

SMALL_M = 64  # up to which the weight's bytes decide, and the exact kernel reads as few


def activations_unsupported_reason(problem) -> str | None:
    """Why activations are not quantized for a problem (`dispatch.Problem`), or None."""
    if problem.op != "linear":
        return "multiplies only"
    if problem.precision != "fast":
        return "quantizes activations, which precision exact rules out"
    if problem.small_m:
        return f"up to {SMALL_M} rows run exact, bound by the weight's bytes as they are"
    return None


def unsupported_reason(problem) -> str | None:
    """Why this cannot run, or None (`dispatch.Problem`)."""
    reason = activations_unsupported_reason(problem)
    if reason is not None:
        return reason
    found = device_facts.capability(problem.device)
    if found is None or found < (8, 9):
        have = device_facts.described(problem.device)
        return f"needs FP8 tensor cores: NVIDIA compute capability 8.9 (RTX 40) or later; {have}"
    if not torch_multiplies(problem.device, problem.dtype):
        return device_facts.triton_unsupported_reason()
    return None


def torch_multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has an FP8 matmul with a scale per row here, for results of `dtype`."""
    found = device_facts.capability(device)
    hopper = found is not None and found[0] == 9
    ada = found == (8, 9) and sys.platform != "win32"
    return dtype == torch.bfloat16 and (hopper or ada) and _torch_runs(device)


@cache
def _torch_runs(device: torch.device) -> bool:
    """Whether this torch does: earlier ones have it for Hopper alone, or not at all."""
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


def _triton(tensor: torch.Tensor) -> bool:
    return device_facts.triton_unsupported_reason() is None and (
        tensor.device.type == "cuda" or device_facts.interpreted()
    )


def to_rowwise(qdata, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """`row_fold.to_rowwise`, by whatever is here."""
    if _triton(qdata):
        from .triton import rowwise

        return rowwise.to_rowwise(qdata, scale)
    return row_fold.to_rowwise(qdata, scale)


def quantize_rowwise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`row_fold.quantize_rowwise`, by whatever is here."""
    if _triton(x):
        from .triton import rowwise

        if x.shape[1] <= rowwise.WIDEST:
            return rowwise.quantize_rowwise(x)
    return row_fold.quantize_rowwise(x)


def scaled_matmul(a, a_scale, b, b_scale, bias, dtype: torch.dtype, columns: int) -> torch.Tensor:
    """(a @ b.T) * a_scale[:, None] * b_scale[None, :] + bias, rounded once; [M, columns].

    Args:
        a, b: float8_e4m3fn [M, K] and [N, K]; a_scale, b_scale: float32 [M] and [N].
        bias: [columns] of `dtype`, or None; columns: at most N, the rest is padding.
    """
    if torch_multiplies(a.device, dtype) and a.shape[0]:
        missing = -b.shape[0] % 16
        if missing:  # rows that were stored without padding
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
    if _triton(a):
        from .triton import fp8_gemm

        return fp8_gemm.matmul(a, a_scale, b, b_scale, bias, dtype, columns)
    out = a.float() @ b[:columns].float().t()
    out *= a_scale[:, None]
    out *= b_scale[None, :columns]
    return (out if bias is None else out + bias.float()).to(dtype)


def linear(x, qdata, scale, bias, rows: int, cols: int, precision: str = "fast") -> torch.Tensor:
    """All three steps: x [M, K] @ W[N, K].T + bias, activations quantized."""
    tokens, token_scale = quantize_rowwise(x)
    folded, row_scale = to_rowwise(qdata, scale)
    return scaled_matmul(tokens, token_scale, folded, row_scale, bias, x.dtype, rows)
