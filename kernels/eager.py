"""MXFP8 on plain torch: the floor that runs on every device, with or without Triton.

It works in chunks that stay in the cache and writes into buffers that are allocated once per
call: on a CPU a fresh temporary costs more in page faults (1 ns per value) than the arithmetic
done on it (0.1 ns per value and pass). Codes are packed and unpacked with integer operations and
exact float32 additions, so the device needs no float8 arithmetic, and no float32 subnormals where
values are of any ordinary size. Bits are those of `reference`.

Packing. With y = |x| / s, the spacing of E4M3 around y is 2**(max(E, -6) - 3), E the exponent of y.
Adding C = 2**(max(E, -6) + 20) to y puts that spacing at the last bit of a float32, so the
addition itself rounds to nearest even; subtracting C returns the rounded value exactly. Scaled by
2**-8, E4M3 values are float16 values with the same bits seven places up, subnormals included.

Unpacking is the same move backwards: code << 7 read as float16 is the value times 2**-8.

Alternatives rejected: torch's own float8 cast (5 times slower here, missing on MPS), a table of
256 values (one gather per value costs more than the whole bit trick), float32 with the exponent
shifted by 120 (leaves E4M3 subnormals to float32 subnormals, which some devices flush to zero).
"""

from __future__ import annotations

import torch

from . import layout
from .layout import BLOCK, E8M0_NAN, TILE_ROWS

_F32_INF = 0x7F800000
_F32_MIN_NORMAL_E4M3 = (127 - 6 - 8) << 23  # bits of 2**-6 * 2**-8
_MAGIC_SHIFT = 20 << 23  # adds 20 to a float32's exponent
_CPU_CHUNK = 1 << 19  # values per chunk: the fastest of 2**16..2**20 on an EPYC with 32 MB of L3
_GPU_CHUNK = 1 << 22  # 16 MB of float32: fits the L2 of current cards, hides launch cost


def _chunk(device: torch.device) -> int:
    return _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK


def _spans(rows: int, cols: int, chunk: int):
    """Cut a [rows, cols] matrix into spans (r0, r1, c0, c1) of at most about `chunk` values."""
    width = max(BLOCK, min(cols, chunk // BLOCK * BLOCK))
    height = max(1, chunk // width)
    for r0 in range(0, rows, height):
        for c0 in range(0, cols, width):
            yield r0, min(rows, r0 + height), c0, min(cols, c0 + width)


def quantize(x: torch.Tensor, energy: tuple | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K] -> (float8_e4m3fn [M', K'], uint8 tiled scales); the bits of `reference.quantize`.

    Args:
        energy: two float32 tensors [M, K'/32] to fill per block with the sum of x**2 and of the
            squared rounding error, both in units of the block's scale squared. Computed while
            the chunk is in the cache, for a third of what a separate pass costs.
    """
    rows, cols = x.shape
    padded_rows, padded_cols = layout.padded_shape(rows, cols)
    code = torch.empty(padded_rows, padded_cols, dtype=torch.uint8, device=x.device)
    scale = torch.empty(padded_rows, padded_cols // BLOCK, dtype=torch.uint8, device=x.device)
    code[rows:] = 0
    scale[rows:] = 0
    buffers: dict[tuple[int, int], _QuantizeBuffers] = {}
    for r0, r1, c0, c1 in _spans(rows, padded_cols, _chunk(x.device)):
        size = (r1 - r0, c1 - c0)
        if size not in buffers:
            buffers[size] = _QuantizeBuffers(*size, x.device)
        source = x[r0:r1, c0 : min(c1, cols)]
        blocks = slice(r0, r1), slice(c0 // BLOCK, c1 // BLOCK)
        part = None if energy is None else (energy[0][blocks], energy[1][blocks])
        _quantize_chunk(source, code[r0:r1, c0:c1], scale[blocks], part, buffers[size])
    return code.view(torch.float8_e4m3fn), layout.tile(scale)


class _QuantizeBuffers:
    """Scratch of one chunk size, reused over a call."""

    def __init__(self, rows: int, cols: int, device: torch.device):
        def empty(dtype, width=cols):
            return torch.empty(rows, width, dtype=dtype, device=device)

        self.x = empty(torch.float32)
        self.y = empty(torch.float32)
        self.rounded = empty(torch.float32)
        self.magic = empty(torch.float32)
        self.half = empty(torch.float16)
        self.code = empty(torch.int16)
        self.sign = empty(torch.int16)
        self.amax = empty(torch.int32, cols // BLOCK)


def _quantize_chunk(source, code, scale, energy, buffer: _QuantizeBuffers) -> None:
    """Quantise source [m, k] into code [m, k'] and row-major scale [m, k'/32], both uint8."""
    x, y, magic, rounded = buffer.x, buffer.y, buffer.magic, buffer.rounded
    width = source.shape[1]
    x[:, :width].copy_(source)
    x[:, width:] = 0  # K padding
    torch.abs(x, out=y)
    blocks = (x.shape[0], -1, BLOCK)

    # Non-negative floats compare as their bits do, and a NaN's bits are above infinity's.
    amax = torch.amax(y.view(torch.int32).view(blocks), -1, out=buffer.amax)
    amax.clamp_max_(_F32_INF)
    zero, bad = amax == 0, amax == _F32_INF
    # RCEIL: the exponent of amax / 448, one more where the mantissa is above 1.75 (0x600000).
    biased = amax.add(0x1FFFFF).bitwise_right_shift_(23).sub_(8).clamp_min_(1)
    factor = (254 - biased).bitwise_left_shift_(23).view(torch.float32)  # 2**(127 - biased)
    scale.copy_(biased.masked_fill_(zero, 0).masked_fill_(bad, E8M0_NAN))
    keep = (zero | bad).to(torch.int16).sub_(1).unsqueeze_(-1)  # all ones, or 0 to clear a block

    y.view(blocks).mul_(factor.mul_(2.0**-8).unsqueeze_(-1))  # y * 2**-8, at most 1.75
    torch.bitwise_and(y.view(torch.int32), _F32_INF, out=magic.view(torch.int32))
    magic.view(torch.int32).clamp_min_(_F32_MIN_NORMAL_E4M3).add_(_MAGIC_SHIFT)
    torch.add(y, magic, out=rounded).sub_(magic)
    buffer.half.copy_(rounded)
    if energy is not None:
        error = rounded.sub_(y)
        for total, value in zip(energy, (y, error), strict=True):
            torch.sum(value.mul_(value).view(blocks), -1, out=total)
            total.mul_(2.0**16)  # y and its rounding were scaled by 2**-8

    torch.bitwise_right_shift(buffer.half.view(torch.int16), 7, out=buffer.code)
    torch.bitwise_right_shift(x.view(torch.int32), 31, out=magic.view(torch.int32))
    buffer.sign.copy_(magic.view(torch.int32))  # -1 where negative, -0.0 included
    buffer.code.add_(buffer.sign, alpha=-128)
    buffer.code.view(blocks).bitwise_and_(keep)
    code.copy_(buffer.code)


def dequantize(qdata, scale, dtype, rows: int, cols: int) -> torch.Tensor:
    """The values behind (qdata, tiled scale), rounded once to `dtype`. [rows, cols]."""
    out = torch.empty(rows, cols, dtype=dtype, device=qdata.device)
    factor = layout.untile(scale.view(torch.uint8), *_blocks(qdata))
    dequantize_rows(qdata, factor, out, 0)
    return out


def _blocks(qdata) -> tuple[int, int]:
    return qdata.shape[0], qdata.shape[1] // BLOCK


def dequantize_rows(qdata, row_major_scale, out: torch.Tensor, first_row: int) -> None:
    """Fill out [m, K] with rows first_row.. of the matrix (qdata, row-major scale bytes)."""
    rows, cols = out.shape
    padded_cols = layout.round_up(cols, BLOCK)
    code = qdata.view(torch.uint8)[first_row : first_row + rows, :padded_cols]
    factor = decode_e8m0(row_major_scale[first_row : first_row + rows, : padded_cols // BLOCK])
    decode = _decode_by_cast if code.device.type == "cuda" else _decode_by_bits
    buffers: dict[tuple[int, int], _DequantizeBuffers] = {}
    for r0, r1, c0, c1 in _spans(rows, padded_cols, _chunk(code.device)):
        size = (r1 - r0, c1 - c0)
        if size not in buffers:
            buffers[size] = _DequantizeBuffers(*size, code.device)
        value = decode(code[r0:r1, c0:c1], buffers[size])
        value.view(r1 - r0, -1, BLOCK).mul_(factor[r0:r1, c0 // BLOCK : c1 // BLOCK, None])
        out[r0:r1, c0 : min(c1, cols)].copy_(value[:, : min(c1, cols) - c0])


class _DequantizeBuffers:
    """Scratch of one chunk size, reused over a call."""

    def __init__(self, rows: int, cols: int, device: torch.device):
        self.half = torch.empty(rows, cols, dtype=torch.int16, device=device)
        self.nan = torch.empty_like(self.half)
        self.value = torch.empty(rows, cols, dtype=torch.float32, device=device)


def _decode_by_bits(code: torch.Tensor, buffer: _DequantizeBuffers) -> torch.Tensor:
    """uint8 E4M3 codes -> float32 values in buffer.value."""
    half, nan = buffer.half, buffer.nan
    half.copy_(code.view(torch.int8))  # sign-extended: bits 15..7 hold the sign
    half.mul_(128).bitwise_and_(-0x4080)  # 0xBF80: sign, 0, then the seven bits of magnitude
    # Only magnitude 0x7F carries into bit 14, which makes the float16 exponent all ones: NaN.
    torch.bitwise_and(half, 0x3F80, out=nan)
    half.bitwise_or_(nan.add_(0x80).bitwise_and_(0x4000))
    return buffer.value.copy_(half.view(torch.float16)).mul_(2.0**8)


def _decode_by_cast(code: torch.Tensor, buffer: _DequantizeBuffers) -> torch.Tensor:
    """As `_decode_by_bits`, by torch's cast: one pass where CUDA has an instruction for it."""
    return buffer.value.copy_(code.view(torch.float8_e4m3fn))


def decode_e8m0(scale: torch.Tensor) -> torch.Tensor:
    """uint8 scale bytes -> float32 powers of two; 0 is 2**-127 (a subnormal), 0xFF is NaN."""
    bits = scale.to(torch.int32)
    value = bits.bitwise_left_shift(23).masked_fill_(bits == 0, 1 << 22)
    return value.masked_fill_(bits == E8M0_NAN, 0x7FC00000).view(torch.float32)


def linear(x, qdata, scale, bias, rows: int, cols: int) -> torch.Tensor:
    """x [M, K] @ W[N, K].T + bias, exact weights, accumulated in at least float32.

    On a CPU, weights are unpacked to float32 in slabs of rows that stay in the cache, and the
    product is rounded once: matmuls in bfloat16 and float16 take 10 times as long as float32 ones
    on CPUs without instructions for them, and no full-size weight is ever materialised.
    Elsewhere the weight is rounded to x's dtype first, as ComfyUI does it: nothing is lost in
    bfloat16 and float32; float16 loses what lies below 2**-14 or above 65504.
    """
    if x.device.type != "cpu" or _cpu_multiplies(x.dtype):
        weight = dequantize(qdata, scale, x.dtype, rows, cols)
        return torch.nn.functional.linear(x, weight, bias)

    out = torch.empty(x.shape[0], rows, dtype=x.dtype)
    wide = x.float()
    factor = layout.untile(scale.view(torch.uint8), *_blocks(qdata))
    height = max(TILE_ROWS, _CPU_CHUNK // max(cols, 1) // TILE_ROWS * TILE_ROWS)
    weight = torch.empty(min(height, rows), cols)
    for r0 in range(0, rows, height):
        r1 = min(rows, r0 + height)
        slab = weight[: r1 - r0]
        dequantize_rows(qdata, factor, slab, r0)
        part = None if bias is None else bias[r0:r1].float()
        out[:, r0:r1] = torch.nn.functional.linear(wide, slab, part)
    return out


def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix instructions for a 16-bit dtype, as oneDNN reports it."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return False
