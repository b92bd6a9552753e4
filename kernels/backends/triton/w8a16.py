"""Exact linear for few rows of x: weights are decoded in registers and never written out.

With 1 to 64 rows (modulations, text encoders) a linear is as fast as its weight can be read, and
an MXFP8 weight has half the bytes of a BF16 one. More rows are faster with the weight unpacked
once for cuBLAS, whose matmul is near the hardware's limit (`linear` in `exact_linear`).

Two kernels. One row is a sum of products on the ordinary units, which keeps up with the memory.
More rows go to the tensor cores, in the dtype of x, accumulated in float32. A weight is its code
times a power of two, which bfloat16 holds exactly; on the tensor cores float16 loses what lies
below 2**-14 or above 65504, as when the weight is unpacked.

A program has a few columns of the output and all of K, so that nothing is added up between
programs: the result does not depend on how they are scheduled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...device_facts import hardware_e4m3, on_device
from .cast import load_scaled

MOST_ROWS = 64


@triton.jit
def one_row_kernel(
    x_ptr, code_ptr, scale_ptr, bias_ptr, out_ptr, rows, cols, stored, tiles,
    N: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """out [rows] = W [rows, cols] @ x [cols] + bias, N rows of W a program, K columns at a time."""
    row = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    total = tl.zeros((N, K), dtype=tl.float32)
    for first in range(0, cols, K):
        column = first + tl.arange(0, K)
        block = first // 32 + tl.arange(0, K // 32)
        x = tl.load(x_ptr + column, mask=column < cols, other=0.0).to(tl.float32)
        weight = load_scaled(
            code_ptr, scale_ptr, row, block, column, rows, stored, tiles, N, K, HARDWARE
        )
        total += weight * x[None, :]
    out = tl.sum(total, axis=1)
    if HAS_BIAS:
        out += tl.load(bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def small_m_kernel(
    x_ptr, code_ptr, scale_ptr, bias_ptr, out_ptr, M, rows, cols, x_stride, stored, tiles,
    BM: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """out [M, rows] = x [M, cols] @ W [rows, cols].T + bias, BM by N a program."""
    row = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    total = tl.zeros((BM, N), dtype=tl.float32)
    for first in range(0, cols, K):
        column = first + tl.arange(0, K)
        block = first // 32 + tl.arange(0, K // 32)
        x = tl.load(
            x_ptr + token[:, None].to(tl.int64) * x_stride + column[None, :],
            mask=(token < M)[:, None] & (column < cols)[None, :],
            other=0.0,
        )
        weight = load_scaled(
            code_ptr, scale_ptr, row, block, column, rows, stored, tiles, N, K, HARDWARE
        )
        total = tl.dot(x, weight.to(x.dtype).T, total)
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + token[:, None].to(tl.int64) * rows + row[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(token < M)[:, None] & (row < rows)[None, :],
    )


# Per number of rows up to which they serve. Compiled for sm_80 to sm_90 without spills; chosen by
# counting, not yet by timing: enough programs for every multiprocessor at N = 3072, and 64 to 128
# bytes of a weight's row per load.
ONE_ROW = {"N": 8, "K": 512, "num_warps": 4, "num_stages": 3}
SMALL_M = (
    (16, {"BM": 16, "N": 32, "K": 128, "num_warps": 4, "num_stages": 4}),
    (32, {"BM": 32, "N": 32, "K": 128, "num_warps": 4, "num_stages": 4}),
    (64, {"BM": 64, "N": 32, "K": 128, "num_warps": 4, "num_stages": 4}),
)


def linear(x, qdata, scale, bias, rows: int, cols: int) -> torch.Tensor:
    """x [M, K] @ W[N, K].T + bias, exact weights, for M of 1 to 64.

    Args:
        x: bfloat16 or float16, [M, K], its rows contiguous.
    """
    M = x.shape[0]
    out = torch.empty(M, rows, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    code, byte = qdata.view(torch.uint8), scale.view(torch.uint8)
    options = {"HAS_BIAS": bias is not None, "HARDWARE": hardware_e4m3(x.device)}
    bias = out if bias is None else bias.contiguous()
    sizes = rows, cols, code.shape[1], byte.shape[1] // 4
    with on_device(x):
        if M == 1:
            grid = (-(-rows // ONE_ROW["N"]),)
            one_row_kernel[grid](x, code, byte, bias, out, *sizes, **ONE_ROW, **options)
        else:
            config = next(c for most, c in SMALL_M if most >= M)
            grid = (-(-rows // config["N"]), -(-M // config["BM"]))
            small_m_kernel[grid](
                x, code, byte, bias, out, M, rows, cols, x.stride(0), *sizes[2:],
                **config, **options,
            )  # fmt: skip
    return out
