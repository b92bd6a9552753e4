"""Block-scaled matmul in Triton (`tl.dot_scaled`): MXFP8 x MXFP8, scales read in tiled order.

Both matrices are quantized along K in blocks of 32, and the tensor cores apply the scales: those of
Blackwell, and of CDNA4 (gfx950). One kernel computes tiles of A [rows, K] @ B [columns, K].T:

* for more than 64 rows of x, A is x and B the weight;
* up to 64 rows, A is the weight and B is x, and the result is stored transposed. On sm_100 the
  matrix instructions are block-scaled only with at least 128 rows of A; below that the compiler
  silently multiplies in bfloat16.

A tile of 128 rows by 4 blocks has its scales in 512 contiguous bytes, the order in which sm_100
copies them to tensor memory (`tcgen05.cp`). The compiler emits that copy if the scales of 128 rows
are loaded through a tensor descriptor, or as flat ranges that are reshaped and permuted afterward.
Loaded by five-dimensional addresses they go through registers (`tcgen05.st`), and so do those of B
for small M, which has fewer than 128 rows. With descriptors the large tile takes 52 KB more shared
memory and 12 more registers (203 of 232 KB, 240 of 255) without spilling; the small one takes 8
registers fewer. That is how Triton 3.6 compiles it; the effect on time has not been measured.

Which Triton has block-scaled instructions for which card: `device_facts.BLOCK_SCALED`.

https://docs.nvidia.com/cuda/cublas/#d-block-scaling-factors-layout defines the tiled order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import layout
from ...device_facts import capability, on_device
from .cast import scale_offset
from .gemm import multiprocessors, tile_of

SMALL_M = 64
# Tiles per architecture: up to SMALL_M rows of x (A is the weight), then more. They compile without
# spills; chosen by counting, not by timing. sm_120 has 99 KiB of shared memory.
CONFIGS = {
    100: (
        {"BA": 128, "BB": 64, "BK": 128, "GROUP": 8, "num_warps": 4, "num_stages": 6},
        {"BA": 128, "BB": 256, "BK": 128, "GROUP": 8, "num_warps": 8, "num_stages": 4},
    ),
    120: (
        {"BA": 128, "BB": 32, "BK": 128, "GROUP": 8, "num_warps": 4, "num_stages": 4},
        {"BA": 128, "BB": 128, "BK": 128, "GROUP": 8, "num_warps": 8, "num_stages": 3},
    ),
}


@triton.jit
def load_scales(
    scales, first, first_block, rows, tiles,
    R: tl.constexpr, BLOCKS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Scale bytes [R, BLOCKS] of the rows from `first`; zero beyond the matrix.

    scales: with TMA and whole tiles of rows, a tensor descriptor of [R / 128, BLOCKS / 4, 2, 256]
    (no dimension may exceed 256); else a pointer.
    """
    if R % 128 == 0:
        if TMA:
            scale = scales.load([first // 128, first_block // 4, 0, 0])
        else:
            tile_row = first // 128 + tl.arange(0, R // 128)
            byte = tl.arange(0, BLOCKS * 128)
            start = (tile_row[:, None].to(tl.int64) * tiles + first_block // 4) * 512
            inside = (tile_row * 128 < rows)[:, None]
            inside = inside & (byte < (tiles - first_block // 4) * 512)[None, :]
            scale = tl.load(scales + start + byte[None, :], mask=inside, other=0)
        scale = scale.reshape(R // 128, BLOCKS // 4, 32, 4, 4)
        result = scale.trans(0, 3, 2, 1, 4).reshape(R, BLOCKS)
    else:
        row = (first + tl.arange(0, R)).to(tl.int64)
        block = first_block + tl.arange(0, BLOCKS)
        mask = (row < rows)[:, None] & (block < tiles * 4)[None, :]
        offset = scale_offset(row[:, None], block[None, :], tiles)
        result = tl.load(scales + offset, mask=mask, other=0)
    return result


@triton.jit
def mx_kernel(
    a, b, a_scale, b_scale, bias_ptr, out_ptr, rows, columns, K, tiles,
    row_stride, column_stride, out_rows, out_columns,
    BA: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, TRANSPOSED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A [rows, K] @ B [columns, K].T in tiles of BA x BB; the bias is per row of the weight.

    a, b: tensor descriptors of [BA, BK] and [BB, BK], or pointers; scales: see `load_scales`.
    """
    for index in range(
        tl.program_id(0), tl.cdiv(rows, BA) * tl.cdiv(columns, BB), tl.num_programs(0)
    ):
        tile_row, tile_column = tile_of(index, rows, columns, BA, BB, GROUP)
        row = tile_row * BA + tl.arange(0, BA)
        column = tile_column * BB + tl.arange(0, BB)
        k = tl.arange(0, BK)
        if not TMA:
            # Rows beyond the end read the last one: their results are not stored.
            a_ptr = a + tl.minimum(row, rows - 1)[:, None].to(tl.int64) * K + k[None, :]
            b_ptr = b + tl.minimum(column, columns - 1)[:, None].to(tl.int64) * K + k[None, :]
        total = tl.zeros((BA, BB), dtype=tl.float32)
        for first in range(0, K, BK):
            if TMA:
                x = a.load([tile_row * BA, first])
                w = b.load([tile_column * BB, first])
            else:
                inside = (k < K - first)[None, :]
                x = tl.load(a_ptr + first, mask=inside, other=0.0)
                w = tl.load(b_ptr + first, mask=inside, other=0.0)
            x_scale = load_scales(
                a_scale, tile_row * BA, first // 32, rows, tiles, BA, BK // 32, TMA
            )
            w_scale = load_scales(
                b_scale, tile_column * BB, first // 32, columns, tiles, BB, BK // 32, TMA
            )
            total = tl.dot_scaled(x, x_scale, "e4m3", w.T, w_scale, "e4m3", total)
        if HAS_BIAS:
            if TRANSPOSED:
                bias = tl.load(bias_ptr + row, mask=row < out_rows, other=0.0)
                total += bias.to(tl.float32)[:, None]
            else:
                bias = tl.load(bias_ptr + column, mask=column < out_columns, other=0.0)
                total += bias.to(tl.float32)[None, :]
        offset = (
            row[:, None].to(tl.int64) * row_stride + column[None, :].to(tl.int64) * column_stride
        )
        tl.store(
            out_ptr + offset,
            total.to(out_ptr.dtype.element_ty),
            mask=(row < out_rows)[:, None] & (column < out_columns)[None, :],
        )


def config_for(arch: int, M: int) -> dict[str, int]:
    """Tile sizes and options for an architecture (compute capability times 10) and M rows."""
    small_m, large_m = CONFIGS[100] if 100 <= arch < 120 else CONFIGS[120]
    return small_m if M <= SMALL_M else large_m


def uses_tma(arch: int) -> bool:
    """Whether tiles are fetched by the tensor memory accelerator; on sm_120 that spills."""
    return 100 <= arch < 120


def matmul(quantized_input, weight, bias, dtype: torch.dtype, M: int, N: int) -> torch.Tensor:
    """x [M, K] @ W[N, K].T + bias from their stored forms, rounded once. [M, N] of `dtype`.

    Args:
        quantized_input, weight: (qdata, tiled scale) as `cast.quantize` returns them.
        bias: [N] or None.
    """
    out = torch.empty(M, N, dtype=dtype, device=weight[0].device)
    if out.numel() == 0:
        return out
    major, minor = capability(out.device) or (0, 0)
    config = config_for(major * 10 + minor, M)
    small_m, tma = M <= SMALL_M, uses_tma(major * 10 + minor)
    if small_m:
        (a, a_scale), (b, b_scale) = weight, quantized_input
        shape, strides = (N, M), (1, N)
    else:
        (a, a_scale), (b, b_scale) = quantized_input, weight
        shape, strides = (M, N), (N, 1)
    tiles = -(-a.shape[0] // config["BA"]) * -(-b.shape[0] // config["BB"])
    sizes = a.shape[0], b.shape[0], a.shape[1], a_scale.shape[1] // 4
    a_scale, b_scale = a_scale.view(torch.uint8), b_scale.view(torch.uint8)
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        a_scale = _scale_descriptor(a_scale, config["BA"], config["BK"])
        b_scale = _scale_descriptor(b_scale, config["BB"], config["BK"])
        a = TensorDescriptor.from_tensor(a, [config["BA"], config["BK"]])
        b = TensorDescriptor.from_tensor(b, [config["BB"], config["BK"]])
    with on_device(out):
        mx_kernel[(min(tiles, multiprocessors(out.device)),)](
            a, b, a_scale, b_scale, out if bias is None else bias, out, *sizes, *strides, *shape,
            HAS_BIAS=bias is not None, TRANSPOSED=small_m, TMA=tma, **config,
        )  # fmt: skip
    return out


def _scale_descriptor(scale: torch.Tensor, rows: int, columns: int):
    """A descriptor for the scales of `rows` x `columns` values; the tensor if not whole tiles."""
    if rows % layout.TILE_ROWS:
        return scale
    from triton.tools.tensor_descriptor import TensorDescriptor

    tiles = scale.view(scale.shape[0] // layout.TILE_ROWS, scale.shape[1] // 4, 2, 256)
    return TensorDescriptor.from_tensor(tiles, [rows // layout.TILE_ROWS, columns // 128, 2, 256])


assert layout.TILE_ROWS == 128
