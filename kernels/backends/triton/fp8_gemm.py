"""Row-scaled FP8 matmul in Triton: E4M3 times E4M3, a float32 scale per row of either matrix.

Persistent: as many programs as multiprocessors take, each going from tile to tile of the output,
in groups that share rows of both matrices while these are in the L2. On Hopper tiles are fetched by
the tensor memory accelerator (TMA), elsewhere by asynchronous copies.

In place of torch's own (`torch._scaled_mm`) where the platform has none, or not for the dtype of
the result (`fast_linear`). Hopper adds up FP8 products with 14 bits of mantissa, here as there
(`use_fast_accum`); that is far below the rounding of the operands.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ...device_facts import capability, on_device

# Tiles per architecture, by the rows of x up to which they serve. Compiled without spills within
# the architecture's shared memory; chosen by counting, not yet by timing.
_ADA = (
    (64, {"BM": 64, "BN": 64, "BK": 128, "GROUP": 8, "num_warps": 4, "num_stages": 4}),
    (1 << 31, {"BM": 128, "BN": 128, "BK": 128, "GROUP": 8, "num_warps": 8, "num_stages": 3}),
)
_HOPPER = (
    (64, {"BM": 64, "BN": 128, "BK": 128, "GROUP": 8, "num_warps": 4, "num_stages": 5}),
    (256, {"BM": 128, "BN": 128, "BK": 128, "GROUP": 8, "num_warps": 8, "num_stages": 5}),
    (1 << 31, {"BM": 128, "BN": 256, "BK": 128, "GROUP": 8, "num_warps": 8, "num_stages": 4}),
)
CONFIGS = {89: _ADA, 90: _HOPPER}


@triton.jit
def tile_of(index, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(row, column) of a tile, GROUP rows of tiles walked through together."""
    across = tl.cdiv(N, BN)
    group = index // (GROUP * across)
    height = tl.minimum(tl.cdiv(M, BM) - group * GROUP, GROUP)
    inside = index % (GROUP * across)
    return group * GROUP + inside % height, inside // height


@triton.jit
def finish(
    total, a_scale_ptr, b_scale_ptr, bias_ptr, out_ptr, row, column, M, N, columns,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Scale a finished sum, add the bias, round and store it into out [M, columns]."""
    a_scale = tl.load(a_scale_ptr + row, mask=row < M, other=0.0)
    b_scale = tl.load(b_scale_ptr + column, mask=column < N, other=0.0)
    total = total * a_scale[:, None] * b_scale[None, :]
    inside = column < columns
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        total += bias[None, :]
    tl.store(
        out_ptr + row[:, None].to(tl.int64) * columns + column[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(row < M)[:, None] & inside[None, :],
    )


@triton.jit
def copy_kernel(
    a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, out_ptr, M, N, K, columns,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """out [M, columns] = a [M, K] @ b [N, K].T, scaled; columns <= N. Asynchronous copies."""
    for index in range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0)):
        tile_row, tile_column = tile_of(index, M, N, BM, BN, GROUP)
        row = tile_row * BM + tl.arange(0, BM)
        column = tile_column * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        # Rows beyond the end read the last one: their results are not stored.
        a = a_ptr + tl.minimum(row, M - 1)[:, None].to(tl.int64) * K + k[None, :]
        b = b_ptr + tl.minimum(column, N - 1)[:, None].to(tl.int64) * K + k[None, :]
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for first in range(0, K, BK):
            inside = (k < K - first)[None, :]
            x = tl.load(a, mask=inside, other=0.0)
            w = tl.load(b, mask=inside, other=0.0)
            total = tl.dot(x, w.T, total)
            a += BK
            b += BK
        finish(
            total, a_scale_ptr, b_scale_ptr, bias_ptr, out_ptr, row, column, M, N, columns, HAS_BIAS
        )


@triton.jit
def tma_kernel(
    a, b, a_scale_ptr, b_scale_ptr, bias_ptr, out_ptr, M, N, K, columns,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """As `copy_kernel`, a and b as tensor descriptors of [BM, BK] and [BN, BK]."""
    for index in range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0)):
        tile_row, tile_column = tile_of(index, M, N, BM, BN, GROUP)
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for first in range(0, K, BK):
            x = a.load([tile_row * BM, first])
            w = b.load([tile_column * BN, first])
            total = tl.dot(x, w.T, total)
        row = tile_row * BM + tl.arange(0, BM)
        column = tile_column * BN + tl.arange(0, BN)
        finish(
            total, a_scale_ptr, b_scale_ptr, bias_ptr, out_ptr, row, column, M, N, columns, HAS_BIAS
        )


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def config_for(arch: int, M: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and options for an architecture (compute capability times 10) and M rows."""
    table = CONFIGS[90] if arch == 90 else CONFIGS[89]
    if dtype != torch.bfloat16:  # results of the largest tiles would spill
        M = min(M, table[-2][0])
    return next(config for most, config in table if most >= M)


def matmul(a, a_scale, b, b_scale, bias, dtype: torch.dtype, columns: int) -> torch.Tensor:
    """(a @ b.T) * a_scale[:, None] * b_scale[None, :] + bias, rounded once.

    Args:
        a: float8_e4m3fn [M, K]; b: float8_e4m3fn [N, K], both contiguous, K a multiple of 16.
        a_scale, b_scale: float32 [M] and [N].
        bias: [columns] or None.
        columns: of the result, at most N.

    Returns:
        [M, columns] of `dtype`.
    """
    (M, K), N = a.shape, b.shape[0]
    out = torch.empty(M, columns, dtype=dtype, device=a.device)
    if out.numel() == 0:
        return out
    major, minor = capability(a.device) or (0, 0)
    config = config_for(major * 10 + minor, M, dtype)
    tiles = -(-M // config["BM"]) * -(-N // config["BN"])
    grid = (min(tiles, multiprocessors(a.device)),)
    rest = a_scale, b_scale, out if bias is None else bias, out, M, N, K, columns
    with on_device(a):
        if major == 9:
            from triton.tools.tensor_descriptor import TensorDescriptor

            x = TensorDescriptor.from_tensor(a, [config["BM"], config["BK"]])
            w = TensorDescriptor.from_tensor(b, [config["BN"], config["BK"]])
            tma_kernel[grid](x, w, *rest, **config, HAS_BIAS=bias is not None)
        else:
            copy_kernel[grid](a, b, *rest, **config, HAS_BIAS=bias is not None)
    return out
