"""Matmul of 8-bit codes with a float32 scale per row of either matrix, in Triton.

E4M3 x E4M3 (`fp8_rowwise`), summed in float32, and INT8 x INT8 (`int8`), summed in int32. FP8 runs
here where torch has no such matmul (`torch._scaled_mm`) on the platform, or not for the dtype of
the result; torch's INT8 matmul would write its sums to memory for another pass to scale.

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

from ...device_facts import architecture, on_device


def _tiles(largest: int, BM: int, BN: int, BK: int, warps: int, stages: int):
    sizes = {"BM": BM, "BN": BN, "BK": BK, "GROUP": 8}
    return largest, sizes | {"num_warps": warps, "num_stages": stages}


ANY = 1 << 31
# Tiles by architecture: (largest M they serve, configuration). Other GPUs take those of sm_89 for
# FP8, of sm_86 for INT8. They compile without spills within the architecture's shared memory, but
# for float32 from INT8 on sm_80 (12 loads and stores a tile); chosen by counting resources, not yet
# by timing. A fourth stage of the largest tile on sm_90 spills.
FP8 = {
    89: (_tiles(64, 64, 64, 128, 4, 4), _tiles(ANY, 128, 128, 128, 8, 3)),
    90: (
        _tiles(64, 64, 128, 128, 4, 5),
        _tiles(256, 128, 128, 128, 8, 5),
        _tiles(ANY, 128, 256, 128, 8, 3),
    ),
    "gfx9": (_tiles(64, 64, 64, 128, 4, 2), _tiles(ANY, 128, 128, 128, 8, 2)),
}
INT8 = {
    80: (
        _tiles(64, 64, 64, 128, 4, 4),
        _tiles(256, 128, 128, 128, 8, 5),
        _tiles(ANY, 128, 256, 64, 8, 6),
    ),
    86: (_tiles(64, 64, 64, 128, 4, 4), _tiles(ANY, 128, 128, 128, 8, 4)),
    90: FP8[90],
    "gfx9": FP8["gfx9"],
    "gfx1": (_tiles(64, 64, 64, 64, 4, 2), _tiles(ANY, 128, 128, 64, 8, 2)),
}


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
    HAS_BIAS: tl.constexpr, INTEGER: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """out [M, columns] = a [M, K] @ b [N, K].T, scaled; columns <= N.

    INTEGER: whether codes are int8, else E4M3.
    a, b: with TMA, tensor descriptors of [BM, BK] and [BN, BK]; else pointers, which are read by
    asynchronous copies.
    """
    SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
    for index in range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0)):
        tile_row, tile_column = tile_of(index, M, N, BM, BN, GROUP)
        if not TMA:
            # Rows beyond the end read the last one: their results are not stored.
            row = tl.minimum(tile_row * BM + tl.arange(0, BM), M - 1)
            column = tl.minimum(tile_column * BN + tl.arange(0, BN), N - 1)
            k = tl.arange(0, BK)
            a_ptr = a + row[:, None].to(tl.int64) * K + k[None, :]
            b_ptr = b + column[:, None].to(tl.int64) * K + k[None, :]
        total = tl.zeros((BM, BN), dtype=SUM)
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
            total = tl.dot(x, w.T, total, out_dtype=SUM)
        # The epilogue: scale the finished sum, add the bias, round once. Indices are computed here,
        # because with TMA they would take registers during the loop.
        row = tile_row * BM + tl.arange(0, BM)
        column = tile_column * BN + tl.arange(0, BN)
        a_scale = tl.load(a_scale_ptr + row, mask=row < M, other=0.0)
        b_scale = tl.load(b_scale_ptr + column, mask=column < N, other=0.0)
        total = total.to(tl.float32) * a_scale[:, None] * b_scale[None, :]
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


def uses_tma(arch: int | str) -> bool:
    """Whether tiles are fetched by the tensor memory accelerator."""
    return arch == 90


@cache
def configs_for(arch: int | str, codes: torch.dtype) -> tuple:
    """(largest M, tile sizes and options), ascending, for a `device_facts.architecture`."""
    table, other = (INT8, 86) if codes == torch.int8 else (FP8, 89)
    return table.get(arch[:4] if isinstance(arch, str) else arch, table[other])


def matmul(a, a_scale, b, b_scale, bias, dtype: torch.dtype, columns: int) -> torch.Tensor:
    """(a @ b.T) * a_scale[:, None] * b_scale[None, :] + bias, rounded once.

    Args:
        a, b: float8_e4m3fn, float8_e4m3fnuz (on MI300) or int8, [M, K] and [N, K], contiguous, K a
            multiple of 16.
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
    arch, integer = architecture(a.device), a.dtype == torch.int8
    config = next(c for most, c in configs_for(arch, a.dtype) if most >= M)
    tiles = -(-M // config["BM"]) * -(-N // config["BN"])
    grid = (min(tiles, multiprocessors(a.device)),)
    tma = uses_tma(arch)
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        a = TensorDescriptor.from_tensor(a, [config["BM"], config["BK"]])
        b = TensorDescriptor.from_tensor(b, [config["BN"], config["BK"]])
    with on_device(out):
        rowwise_matmul_kernel[grid](
            a, b, a_scale, b_scale, out if bias is None else bias, out, M, N, K, columns,
            HAS_BIAS=bias is not None, INTEGER=integer, TMA=tma, **config,
        )  # fmt: skip
    return out
