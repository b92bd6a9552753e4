"""Row-wise scaled FP8 matmul in Triton: E4M3 x E4M3, a float32 scale per row of either matrix.

Used where torch has no such matmul (`torch._scaled_mm`) on the platform, or not for the dtype of
the result (`fp8_rowwise`).

The kernel is persistent: at most one program per multiprocessor, each of which walks through tiles
of the output in groups that share rows of both matrices while these are in the L2 cache. On Hopper
the tensor memory accelerator (TMA) fetches the tiles, elsewhere asynchronous copies do. Hopper
accumulates FP8 products with 14 bits of mantissa, here as in torch (`use_fast_accum`); that error
is far below the rounding of the operands.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ...device_facts import capability, on_device

# Tiles per architecture: (largest M they serve, configuration). They compile without spills within
# the architecture's shared memory; chosen by counting resources, not yet by timing.
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
    """(row, column) of a tile; GROUP rows of tiles are walked through together."""
    across = tl.cdiv(N, BN)
    group = index // (GROUP * across)
    height = tl.minimum(tl.cdiv(M, BM) - group * GROUP, GROUP)
    inside = index % (GROUP * across)
    return group * GROUP + inside % height, inside // height


@triton.jit
def rowwise_matmul_kernel(
    a, b, a_scale_ptr, b_scale_ptr, bias_ptr, out_ptr, M, N, K, columns,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """out [M, columns] = a [M, K] @ b [N, K].T, scaled; columns <= N.

    a, b: with TMA, tensor descriptors of [BM, BK] and [BN, BK]; else pointers, which are read by
    asynchronous copies.
    """
    for index in range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0)):
        tile_row, tile_column = tile_of(index, M, N, BM, BN, GROUP)
        if not TMA:
            # Rows beyond the end read the last one: their results are not stored.
            row = tl.minimum(tile_row * BM + tl.arange(0, BM), M - 1)
            column = tl.minimum(tile_column * BN + tl.arange(0, BN), N - 1)
            k = tl.arange(0, BK)
            a_ptr = a + row[:, None].to(tl.int64) * K + k[None, :]
            b_ptr = b + column[:, None].to(tl.int64) * K + k[None, :]
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for first in range(0, K, BK):
            if TMA:
                x = a.load([tile_row * BM, first])
                w = b.load([tile_column * BN, first])
            else:
                inside = (k < K - first)[None, :]
                x = tl.load(a_ptr, mask=inside, other=0.0)
                w = tl.load(b_ptr, mask=inside, other=0.0)
                a_ptr += BK
                b_ptr += BK
            total = tl.dot(x, w.T, total)
        # The epilogue: scale the finished sum, add the bias, round once. Indices are computed here,
        # because with TMA they would take registers during the loop.
        row = tile_row * BM + tl.arange(0, BM)
        column = tile_column * BN + tl.arange(0, BN)
        a_scale = tl.load(a_scale_ptr + row, mask=row < M, other=0.0)
        b_scale = tl.load(b_scale_ptr + column, mask=column < N, other=0.0)
        total = total * a_scale[:, None] * b_scale[None, :]
        inside_columns = column < columns
        if HAS_BIAS:
            bias = tl.load(bias_ptr + column, mask=inside_columns, other=0.0).to(tl.float32)
            total += bias[None, :]
        tl.store(
            out_ptr + row[:, None].to(tl.int64) * columns + column[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=(row < M)[:, None] & inside_columns[None, :],
        )


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def config_for(arch: int, M: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and options for an architecture (compute capability times 10) and M rows."""
    table = CONFIGS[90] if arch == 90 else CONFIGS[89]
    if dtype != torch.bfloat16:  # in other dtypes the largest tiles spill
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
    tma = major == 9
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        a = TensorDescriptor.from_tensor(a, [config["BM"], config["BK"]])
        b = TensorDescriptor.from_tensor(b, [config["BN"], config["BK"]])
    with on_device(out):
        rowwise_matmul_kernel[grid](
            a, b, a_scale, b_scale, out if bias is None else bias, out, M, N, K, columns,
            HAS_BIAS=bias is not None, TMA=tma, **config,
        )  # fmt: skip
    return out
