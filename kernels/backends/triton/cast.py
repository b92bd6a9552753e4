"""Quantize and dequantize in Triton: one pass over memory, tiled scales read and written in place.

The bits are those of `reference`, NaN, Inf and tiny blocks included. A program handles a tile of
128 rows by 128 columns, so its scales are 512 contiguous bytes of the tiled order. Exponents are
integers taken from float32 bits: no logarithm, no division.

E4M3 is packed and unpacked by the instructions of sm_89 and later where they exist (HARDWARE), and
by integer arithmetic elsewhere. Unpacking: code << 7 read as float16 is the value times 2**-8,
subnormals included. Packing: adding 0x7FFFF and the last kept bit rounds a float32's bits to the
nearest even E4M3; below 2**-6, adding 2**14 leaves the rounded code in the last bits.

Products and scales may be subnormal, so this relies on float32 arithmetic that does not flush
subnormals, which is Triton's default.

Rejected: decoding into bfloat16 with a shift of 4 (exact only for scales up to 2**7), and one
program per row (its scales would be 4 bytes here and there).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import layout
from ...device_facts import hardware_e4m3, on_device
from ...layout import ROW_PAD, TILE_ROWS

ROWS, COLUMNS, WARPS = 128, 128, 8  # per program; a tile of scales is 128 rows by 4 blocks


@triton.jit
def decode_e4m3(code, HARDWARE: tl.constexpr):
    """uint8 codes -> float32 values; 0x7F and 0xFF are NaN."""
    if HARDWARE:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    wide = code.to(tl.int16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def encode_e4m3(value, HARDWARE: tl.constexpr):
    """float32 values within +-448 -> uint8 codes, to nearest even, the sign of zeros kept."""
    if HARDWARE:
        return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    shifted = size.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, subnormal, normal)  # below 2**-6
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def decode_e8m0(scale):
    """uint8 scale bytes -> float32 powers of two; 0 is 2**-127, 0xFF is NaN."""
    byte = scale.to(tl.int32)
    bits = tl.where(byte == 0, 0x400000, tl.where(byte == 255, 0x7FC00000, byte << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def scale_offset(row, block, tiles):
    """Offset of the scale of (row, block) in the tiled order; `tiles` per row of tiles."""
    tile = (row // 128) * tiles + block // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + block % 4


@triton.jit
def load_scaled(
    code_ptr, scale_ptr, row, block, column, rows, stored, tiles,
    R: tl.constexpr, C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """float32 values [R, C] of the rows `row` [R] and columns `column` [C]; zero outside."""
    inside = (row < rows)[:, None]
    code = tl.load(
        code_ptr + row[:, None] * stored + column[None, :],
        mask=inside & (column < stored)[None, :],
        other=0,
    )
    scale = tl.load(
        scale_ptr + scale_offset(row[:, None], block[None, :], tiles),
        mask=inside & (block < tiles * 4)[None, :],
        other=0,
    )
    value = decode_e4m3(code, HARDWARE).reshape(R, C // 32, 32)
    return (value * decode_e8m0(scale)[:, :, None]).reshape(R, C)


@triton.jit
def dequantize_kernel(
    code_ptr, scale_ptr, out_ptr, rows, cols, stored, tiles,
    R: tl.constexpr, C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """qdata [>= rows, stored] and tiled scales -> out [rows, cols]; a tile of R x C per program."""
    across = tl.cdiv(cols, C)
    row = (tl.program_id(0) // across * R + tl.arange(0, R)).to(tl.int64)
    first = tl.program_id(0) % across * C
    column = first + tl.arange(0, C)
    block = first // 32 + tl.arange(0, C // 32)
    value = load_scaled(
        code_ptr, scale_ptr, row, block, column, rows, stored, tiles, R, C, HARDWARE
    )
    inside = (row < rows)[:, None] & (column < cols)[None, :]
    tl.store(
        out_ptr + row[:, None] * cols + column[None, :],
        value.to(out_ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def quantize_kernel(
    x_ptr, code_ptr, scale_ptr, rows, cols, row_stride, column_stride, padded_rows, stored, tiles,
    R: tl.constexpr, C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """x [rows, cols] -> codes [padded_rows, stored] and tiled scales, padding included."""
    across = tl.cdiv(stored, C)
    row = (tl.program_id(0) // across * R + tl.arange(0, R)).to(tl.int64)
    first = tl.program_id(0) % across * C
    column = first + tl.arange(0, C)
    block = first // 32 + tl.arange(0, C // 32)
    x = tl.load(
        x_ptr + row[:, None] * row_stride + column[None, :].to(tl.int64) * column_stride,
        mask=(row < rows)[:, None] & (column < cols)[None, :],
        other=0.0,
    )
    value = x.to(tl.float32).reshape(R, C // 32, 32)
    # Non-negative floats compare as their bits do, and the bits of NaN are above those of infinity.
    amax = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)
    # RCEIL: the exponent of amax / 448, one more where the mantissa is above 1.75 (0x600000).
    byte = tl.maximum(((amax + 0x1FFFFF) >> 23) - 8, 1)
    inverse = ((254 - byte) << 23).to(tl.float32, bitcast=True)
    usable = (amax > 0) & (amax < 0x7F800000)
    code = encode_e4m3(value * inverse[:, :, None], HARDWARE)
    code = tl.where(usable[:, :, None], code, 0).to(tl.uint8).reshape(R, C)
    byte = tl.where(amax == 0, 0, tl.where(usable, byte, 255))
    tl.store(
        code_ptr + row[:, None] * stored + column[None, :],
        code,
        mask=(row < padded_rows)[:, None] & (column < stored)[None, :],
    )
    tl.store(
        scale_ptr + scale_offset(row[:, None], block[None, :], tiles),
        byte.to(tl.uint8),
        mask=(block < tiles * 4)[None, :],
    )


def dequantize(qdata, scale, dtype: torch.dtype, rows: int, cols: int, out=None) -> torch.Tensor:
    """The values behind (qdata, tiled scale), rounded once to `dtype`. [rows, cols].

    Args:
        out: a contiguous tensor of that shape and dtype to write into.
    """
    if out is None:
        out = torch.empty(rows, cols, dtype=dtype, device=qdata.device)
    if out.numel() == 0:
        return out
    programs = -(-rows // ROWS) * -(-cols // COLUMNS)
    with on_device(qdata):
        dequantize_kernel[(programs,)](
            qdata.view(torch.uint8), scale.view(torch.uint8), out, rows, cols,
            qdata.shape[1], scale.shape[1] // 4,
            R=ROWS, C=COLUMNS, HARDWARE=hardware_e4m3(qdata.device), num_warps=WARPS,
        )  # fmt: skip
    return out


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K], any strides -> (float8_e4m3fn [M', K'], uint8 tiled scales)."""
    rows, cols = x.shape
    padded_rows, stored = layout.padded_shape(rows, cols)
    code = torch.empty(padded_rows, stored, dtype=torch.uint8, device=x.device)
    scale = torch.empty(layout.scale_shape(rows, cols), dtype=torch.uint8, device=x.device)
    if code.numel():
        programs = scale.shape[0] // ROWS * -(-stored // COLUMNS)
        with on_device(x):
            quantize_kernel[(programs,)](
                x, code, scale, rows, cols, *x.stride(), padded_rows, stored, scale.shape[1] // 4,
                R=ROWS, C=COLUMNS, HARDWARE=hardware_e4m3(x.device), num_warps=WARPS,
            )  # fmt: skip
    return code.view(torch.float8_e4m3fn), scale


assert TILE_ROWS == ROWS and COLUMNS % (4 * 32) == 0 and ROW_PAD <= ROWS
