"""The exact (W8A16) linear for few rows of x: weights are decoded in registers, never written out.

With 1 to 64 rows (modulations, text encoders) the time is that of reading the weight, and an MXFP8
weight has half the bytes of a BF16 one. With more rows it is faster to unpack the weight once for
cuBLAS, whose matmul is near the hardware's limit (`exact`).

Two kernels. `one_row_kernel` sums products on the ordinary units, which keep up with memory.
`small_m_kernel` uses the tensor cores, in the dtype of x, accumulated in float32. A weight is a
code times a power of two, which bfloat16 holds exactly; float16 loses values below 2**-14 or above
65504, as it does when the weight is unpacked.

A program computes a few columns of the output over all of K, without split-K, so the result does
not depend on how programs are scheduled.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ...device_facts import architecture, hardware_e4m3, on_device
from .cast import load_scaled

MOST_ROWS = 64


@triton.jit
def one_row_kernel(
    x_ptr, code_ptr, scale_ptr, bias_ptr, out_ptr, rows, cols, stored, tiles,
    N: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """out [rows] = W [rows, cols] @ x [cols] + bias; N rows of W a program, K columns a step."""
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
    """out [M, rows] = x [M, cols] @ W [rows, cols].T + bias; a BM x N tile per program."""
    row = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    x_row = tl.program_id(1) * BM + tl.arange(0, BM)
    total = tl.zeros((BM, N), dtype=tl.float32)
    for first in range(0, cols, K):
        column = first + tl.arange(0, K)
        block = first // 32 + tl.arange(0, K // 32)
        x = tl.load(
            x_ptr + x_row[:, None].to(tl.int64) * x_stride + column[None, :],
            mask=(x_row < M)[:, None] & (column < cols)[None, :],
            other=0.0,
        )
        weight = load_scaled(
            code_ptr, scale_ptr, row, block, column, rows, stored, tiles, N, K, HARDWARE
        )
        total = tl.dot(x, weight.to(x.dtype).T, total)
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + x_row[:, None].to(tl.int64) * rows + row[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(x_row < M)[:, None] & (row < rows)[None, :],
    )


# (Largest M they serve, configuration). They compile without spills; chosen by counting, not yet by
# timing: enough programs for every multiprocessor at N = 3072, and 64 to 128 bytes of a row of the
# weight per load.
ONE_ROW = {"N": 8, "K": 512, "num_warps": 4}
SMALL_M = (
    (16, {"BM": 16, "N": 32, "K": 128, "num_warps": 4, "num_stages": 4}),
    (32, {"BM": 32, "N": 32, "K": 128, "num_warps": 4, "num_stages": 4}),
    (64, {"BM": 64, "N": 32, "K": 128, "num_warps": 4, "num_stages": 4}),
)


@cache
def small_m_configs(arch: int | str) -> list[tuple[int, dict[str, int]]]:
    """`SMALL_M` for a `device_facts.architecture`; on RDNA 128 columns do not fit registers."""
    columns = {"K": 64} if isinstance(arch, str) and arch.startswith("gfx1") else {}
    return [(most, config | columns) for most, config in SMALL_M]


def linear(x, qdata, scale, bias, rows: int, cols: int) -> torch.Tensor:
    """x [M, K] @ W[N, K].T + bias, exact weights, for M from 1 to 64.

    Args:
        x: bfloat16 or float16, and with one row also float32.
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
            configs = small_m_configs(architecture(x.device))
            config = next(config for most, config in configs if most >= M)
            grid = (-(-rows // config["N"]), -(-M // config["BM"]))
            small_m_kernel[grid](
                x, code, byte, bias, out, M, rows, cols, x.stride(0), *sizes[2:],
                **config, **options,
            )  # fmt: skip
    return out
