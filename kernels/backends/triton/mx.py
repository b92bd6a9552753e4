"""Block-scaled matmul in Triton (`tl.dot_scaled`): MXFP8 times MXFP8, scales read in tiled order.

Both matrices are quantized along K in blocks of 32, and the tensor cores apply the scales: those of
Blackwell, and of CDNA4 (gfx950). One kernel computes tiles of A [rows, K] times B [columns, K].T:

* many tokens: A are the tokens, B the weights;
* up to 64 tokens: A are the weights, B the tokens, and the result is stored transposed. On sm_100
  the matrix instructions are block-scaled only with 128 rows of A or more; below, the compiler
  silently multiplies in bfloat16.

A tile of 128 rows by 4 blocks has its scales in one stretch of 512 bytes, which is the order that
sm_100 copies into its tensor memory (`tcgen05.cp`). The compiler does that where the scales of 128
rows come by a tensor descriptor or as flat stretches, reshaped and permuted afterwards. Loaded by
addresses of five dimensions, they go through registers (`tcgen05.st`); so do those of B with few
tokens, which are fewer than 128 rows. By descriptors the large tile takes 52 KB more of shared
memory and 12 more registers (203 of 232 KB, 240 of 255) and does not spill; the small one takes 8
registers fewer. So compiles Triton 3.6; what it is worth has not been timed.

Which Triton has block-scaled instructions for which card: `launch.BLOCK_SCALED`.

https://docs.nvidia.com/cuda/cublas/#d-block-scaling-factors-layout has the tiled order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import layout
from ...device_facts import capability, on_device
from .cast import scale_offset
from .fp8_gemm import multiprocessors, tile_of

SMALL_M = 64
# Tiles per architecture, compiled without spills, chosen by counting, not by timing: the first up
# to SMALL_M tokens (A are the weights), then more. sm_120 has 99 KiB of shared memory.
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
    scales,
    first,
    first_block,
    rows,
    tiles,
    R: tl.constexpr,
    BLOCKS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Scale bytes [R, BLOCKS] of the rows from `first`; zero beyond the matrix.

    scales: a tensor descriptor of [R / 128, BLOCKS / 4, 2, 256] with TMA and whole tiles of rows
    (a dimension has at most 256 values), else a pointer.
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
    """A [rows, K] times B [columns, K].T, BA by BB a tile; the bias goes with the weights' rows.

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
            x_ptr = a + tl.minimum(row, rows - 1)[:, None].to(tl.int64) * K + k[None, :]
            w_ptr = b + tl.minimum(column, columns - 1)[:, None].to(tl.int64) * K + k[None, :]
        total = tl.zeros((BA, BB), dtype=tl.float32)
        for first in range(0, K, BK):
            if TMA:
                x = a.load([tile_row * BA, first])
                w = b.load([tile_column * BB, first])
            else:
                inside = (k < K - first)[None, :]
                x = tl.load(x_ptr + first, mask=inside, other=0.0)
                w = tl.load(w_ptr + first, mask=inside, other=0.0)
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
    """Tile sizes and options for an architecture (compute capability times 10) and M tokens."""
    small_m, many = CONFIGS[100] if 100 <= arch < 120 else CONFIGS[120]
    return small_m if M <= SMALL_M else many


def uses_tma(arch: int) -> bool:
    """Whether tiles are fetched by the tensor memory accelerator; on sm_120 that spills."""
    return 100 <= arch < 120


def matmul(tokens, weight, bias, dtype: torch.dtype, M: int, N: int) -> torch.Tensor:
    """x [M, K] @ W[N, K].T + bias from their stored forms, rounded once. [M, N] of `dtype`.

    Args:
        tokens, weight: (qdata, tiled scale) as `triton_cast.quantize` returns them.
        bias: [N] or None.
    """
    out = torch.empty(M, N, dtype=dtype, device=tokens[0].device)
    if out.numel() == 0:
        return out
    major, minor = capability(out.device) or (0, 0)
    config = config_for(major * 10 + minor, M)
    small_m = M <= SMALL_M
    (a, a_scale), (b, b_scale) = (weight, tokens) if small_m else (tokens, weight)
    shape, strides = ((N, M), (1, N)) if small_m else ((M, N), (N, 1))
    tma = uses_tma(major * 10 + minor)
    grid = (-(-a.shape[0] // config["BA"]) * -(-b.shape[0] // config["BB"]),)
    sizes = a.shape[0], b.shape[0], a.shape[1], a_scale.shape[1] // 4
    scales = a_scale.view(torch.uint8), b_scale.view(torch.uint8)
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        height, width = (config["BA"], config["BB"]), config["BK"]
        scales = [_descriptor(part, rows, width) for part, rows in zip(scales, height, strict=True)]
        a = TensorDescriptor.from_tensor(a, [config["BA"], width])
        b = TensorDescriptor.from_tensor(b, [config["BB"], width])
    with on_device(out):
        mx_kernel[(min(*grid, multiprocessors(out.device)),)](
            a, b, *scales, out if bias is None else bias, out, *sizes, *strides, *shape,
            HAS_BIAS=bias is not None, TRANSPOSED=small_m, TMA=tma, **config,
        )  # fmt: skip
    return out


def _descriptor(scale: torch.Tensor, rows: int, columns: int):
    """Of tiled scales, `rows` by `columns` values a time; themselves if that is no whole tile."""
    if rows % layout.TILE_ROWS:
        return scale
    from triton.tools.tensor_descriptor import TensorDescriptor

    tiles = scale.view(scale.shape[0] // layout.TILE_ROWS, scale.shape[1] // 4, 2, 256)
    return TensorDescriptor.from_tensor(tiles, [rows // layout.TILE_ROWS, columns // 128, 2, 256])


assert layout.TILE_ROWS == 128
