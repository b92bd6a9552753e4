"""MXFP8 in plain torch: runs on every device, with or without Triton.

It works in chunks that stay in the cache and writes into buffers allocated once per call: on a CPU
a fresh temporary costs more in page faults (1 ns per value) than the arithmetic done on it (0.1 ns
per value and pass). Codes are packed and unpacked with integer operations and exact float32
additions, so the device needs no float8 arithmetic and, for values of ordinary size, no float32
subnormals. The bits are those of `reference`.

Packing. With y = |x| / s, the spacing of E4M3 around y is 2**(max(E, -6) - 3), E the exponent of y.
Adding C = 2**20 * 2**max(E, -6) to y puts that spacing at the last bit of a float32, so the
addition itself rounds to nearest even; subtracting C returns the rounded value exactly. Scaled by
2**-8, E4M3 values are float16 values with the same bits seven places up, subnormals included.

Packing bfloat16 takes fewer passes: its 8 significant bits fit a float16, so the low seven bits are
rounded off there, in integers. Only float16 subnormals could be rounded twice, and of those only
the value just above half the smallest code; adding 2**-27 first keeps it on the right side and
changes no other.

Unpacking is the inverse: code << 7 read as float16 is the value times 2**-8. On CUDA and ROCm,
where launches count, torch's own casts unpack the whole matrix at once.

Rejected: those casts elsewhere (on a CPU fast only with AVX-512, missing on MPS), a table of 256
values (one gather per value costs more than the bit operations), float32 with the exponent shifted
by 120 (turns E4M3 subnormals into float32 subnormals, which some devices flush to zero).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import device_facts, layout
from ..layout import BLOCK, E8M0_NAN

_F32_INF = 0x7F800000
_F32_MIN_NORMAL_E4M3 = (127 - 6 - 8) << 23  # bits of 2**-6 * 2**-8
_MAGIC = 2.0**20
_CPU_CHUNK = 1 << 19  # values per chunk: the fastest of 2**16..2**21 on Xeon and EPYC alike
_CHUNK_OF_ONE = 1 << 18  # with a single thread, which has one L2 cache
_GPU_CHUNK = 1 << 22  # 16 MB of float32: fits the L2 of current cards, hides launch overhead


def _chunk(device: torch.device) -> int:
    if device.type != "cpu":
        return _GPU_CHUNK
    return _CPU_CHUNK if torch.get_num_threads() > 1 else _CHUNK_OF_ONE


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
            buffers[size] = _QuantizeBuffers(*size, x.device, energy is not None)
        source = x[r0:r1, c0 : min(c1, cols)]
        blocks = slice(r0, r1), slice(c0 // BLOCK, c1 // BLOCK)
        part = None if energy is None else (energy[0][blocks], energy[1][blocks])
        _quantize_chunk(source, code[r0:r1, c0:c1], scale[blocks], part, buffers[size])
    return code.view(torch.float8_e4m3fn), layout.tile(scale)


class _QuantizeBuffers:
    """Scratch of one chunk size, reused over a call: per value, then per block, then constants.

    Constants are tensors because a Python number is converted on every call, which takes longer
    than the arithmetic on a chunk's blocks.
    """

    def __init__(self, rows: int, cols: int, device: torch.device, energy: bool):
        def empty(dtype, width=cols):
            return torch.empty(rows, width, dtype=dtype, device=device)

        self.y = empty(torch.float32)
        self.rounded = empty(torch.float32) if energy else self.y
        self.magic = empty(torch.float32)
        self.half = empty(torch.float16)
        self.code = empty(torch.int16)
        self.sign = empty(torch.int16)

        blocks = cols // BLOCK
        self.amax = empty(torch.int32, blocks)
        self.biased = empty(torch.int32, blocks)
        self.factor = empty(torch.float32, blocks)
        self.zero = empty(torch.bool, blocks)
        self.bad = empty(torch.bool, blocks)
        self.keep = empty(torch.int16, blocks)

        def constant(value, dtype=torch.int32):
            return torch.tensor(value, dtype=dtype, device="cpu")

        self.none, self.infinity = constant(0), constant(_F32_INF)
        self.to_rceil, self.exponent_shift = constant(0x1FFFFF - (8 << 23)), constant(23)
        self.unit, self.inverse = constant(-1 << 23), constant(254 << 23)
        self.nudge = constant(2.0**-27, torch.float32)
        self.one, self.below_half = constant(1, torch.int16), constant(0x3F, torch.int16)
        self.code_shift = constant(7, torch.int16)


def _quantize_chunk(source, code, scale, energy, buffer: _QuantizeBuffers) -> None:
    """Quantize source [m, k] into code [m, k'] and row-major scale [m, k'/32], both uint8."""
    y, width = buffer.y, source.shape[1]
    y[:, :width].copy_(source)
    if width < y.shape[1]:  # K padding
        y[:, width:] = 0
        buffer.sign[:, width:] = 0
    _signs(source, buffer)
    blocks = (y.shape[0], -1, BLOCK)
    factor, keep = _scales(y.abs_().view(blocks), scale, buffer)
    y.view(blocks).mul_(factor)  # y * 2**-8, at most 1.75
    if source.dtype == torch.bfloat16 and energy is None:
        _pack_bfloat16(buffer)
    else:
        _pack(buffer)
    if energy is not None:
        for total, value in zip(energy, (y, buffer.rounded.sub_(y)), strict=True):
            torch.sum(value.mul_(value).view(blocks), -1, out=total)
            total.mul_(2.0**16)  # y and its rounding were scaled by 2**-8
    buffer.code.add_(buffer.sign, alpha=-128)
    buffer.code.view(blocks).bitwise_and_(keep)
    code.copy_(buffer.code)


def _signs(source, buffer: _QuantizeBuffers) -> None:
    """Fill buffer.sign with -1 where source is negative, -0.0 included, else 0."""
    width = source.shape[1]
    if source.element_size() == 2:
        torch.bitwise_right_shift(source.view(torch.int16), 15, out=buffer.sign[:, :width])
    else:
        bits = buffer.magic.view(torch.int32)[:, :width]
        torch.bitwise_right_shift(source.view(torch.int32), 31, out=bits)
        buffer.sign[:, :width].copy_(bits)


def _scales(blocks, scale, buffer: _QuantizeBuffers) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill scale; return 2**-8 / s and a mask, 0 where a block is cleared, both [m, k'/32, 1]."""
    # Non-negative floats compare as their bits do, and the bits of NaN are above those of infinity.
    amax = torch.amax(blocks.view(torch.int32), -1, out=buffer.amax)
    zero = torch.eq(amax, buffer.none, out=buffer.zero)
    bad = torch.ge(amax, buffer.infinity, out=buffer.bad)
    # RCEIL: the exponent of amax / 448, one more where the mantissa is above 1.75 (0x600000).
    biased = torch.add(amax, buffer.to_rceil, out=buffer.biased)
    biased.bitwise_right_shift_(buffer.exponent_shift).clamp_min_(1)
    factor = buffer.factor  # 2**(127 - biased), from its bits
    torch.mul(biased, buffer.unit, out=factor.view(torch.int32)).add_(buffer.inverse)
    scale.copy_(biased.masked_fill_(zero, 0).masked_fill_(bad, E8M0_NAN))
    keep = buffer.keep.copy_(zero.logical_or_(bad)).sub_(buffer.one)  # all ones, or 0
    return factor.mul_(2.0**-8).unsqueeze(-1), keep.unsqueeze(-1)


def _pack(buffer: _QuantizeBuffers) -> None:
    """Round y into buffer.rounded and its codes, without sign, into buffer.code."""
    magic = buffer.magic.view(torch.int32)
    torch.bitwise_and(buffer.y.view(torch.int32), buffer.infinity, out=magic)
    magic.clamp_min_(_F32_MIN_NORMAL_E4M3)  # 2**max(E, -6) * 2**-8
    torch.add(buffer.y, buffer.magic, alpha=_MAGIC, out=buffer.rounded)
    buffer.half.copy_(buffer.rounded.sub_(buffer.magic, alpha=_MAGIC))
    bits = buffer.half.view(torch.int16)
    torch.bitwise_right_shift(bits, buffer.code_shift, out=buffer.code)


def _pack_bfloat16(buffer: _QuantizeBuffers) -> None:
    """As `_pack`, for values that were bfloat16."""
    bits = buffer.half.copy_(buffer.y.add_(buffer.nudge)).view(torch.int16)
    odd = torch.bitwise_right_shift(bits, buffer.code_shift, out=buffer.code)
    odd.bitwise_and_(buffer.one)  # a tie goes up where the code below is odd
    odd.add_(bits).add_(buffer.below_half).bitwise_right_shift_(buffer.code_shift)


def dequantize(qdata, scale, dtype, rows: int, cols: int) -> torch.Tensor:
    """Unpack (qdata, tiled scale), rounding once to `dtype`. [rows, cols]."""
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
    scale = row_major_scale[first_row : first_row + rows, : padded_cols // BLOCK]
    decode = _decode_by_cast if code.device.type == "cuda" else _decode_by_bits
    decode(code, scale, out)


def _decode_by_cast(code: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """Fill out [m, K] from uint8 codes [m, K'] and scales [m, K'/32] by torch's casts.

    Three launches, or four where K is padded; a chunk takes ten. In 16 bits they move 7.3 bytes a
    weight. Codes are exact in every dtype; the product is computed in float32 and rounded once.
    """
    cols = out.shape[1]
    value = out if cols == code.shape[1] else out.new_empty(code.shape)
    value.copy_(code.view(torch.float8_e4m3fn))
    factor = scale.view(torch.float8_e8m0fnu).float()  # byte 0 is 2**-127, 0xFF is NaN
    value.unflatten(1, (code.shape[1] // BLOCK, BLOCK)).mul_(factor[:, :, None])
    if value is not out:
        out.copy_(value[:, :cols])


def _decode_by_bits(code: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """As `_decode_by_cast`, with integer operations, a chunk at a time."""
    (rows, cols), factor = out.shape, decode_e8m0(scale)
    buffers: dict[tuple[int, int], _DequantizeBuffers] = {}
    for r0, r1, c0, c1 in _spans(rows, code.shape[1], _chunk(code.device)):
        size = (r1 - r0, c1 - c0)
        if size not in buffers:
            buffers[size] = _DequantizeBuffers(*size, code.device)
        value = _decode_chunk(code[r0:r1, c0:c1], buffers[size])
        value.view(r1 - r0, -1, BLOCK).mul_(factor[r0:r1, c0 // BLOCK : c1 // BLOCK, None])
        out[r0:r1, c0 : min(c1, cols)].copy_(value[:, : min(c1, cols) - c0])


class _DequantizeBuffers:
    """Scratch of one chunk size, reused over a call, and constants as tensors."""

    def __init__(self, rows: int, cols: int, device: torch.device):
        self.half = torch.empty(rows, cols, dtype=torch.int16, device=device)
        self.nan = torch.empty_like(self.half)
        self.value = torch.empty(rows, cols, dtype=torch.float32, device=device)
        constants = [128, -0x4080, 0x3F80, 0x80, 0x4000]
        constants = torch.tensor(constants, dtype=torch.int16, device="cpu")
        self.shift, self.layout, self.magnitude, self.carry, self.overflow = constants
        self.unscale = torch.tensor(2.0**8, dtype=torch.float32, device="cpu")


def _decode_chunk(code: torch.Tensor, buffer: _DequantizeBuffers) -> torch.Tensor:
    """uint8 E4M3 codes -> float32 values in buffer.value."""
    half, nan = buffer.half, buffer.nan
    half.copy_(code.view(torch.int8))  # sign-extended: bits 15..7 hold the sign
    half.mul_(buffer.shift).bitwise_and_(buffer.layout)  # sign, 0, then seven bits of magnitude
    # Only magnitude 0x7F carries into bit 14, which makes the float16 exponent all ones: NaN.
    torch.bitwise_and(half, buffer.magnitude, out=nan)
    half.bitwise_or_(nan.add_(buffer.carry).bitwise_and_(buffer.overflow))
    return buffer.value.copy_(half.view(torch.float16)).mul_(buffer.unscale)


def decode_e8m0(scale: torch.Tensor) -> torch.Tensor:
    """uint8 scale bytes -> float32 powers of two; 0 is 2**-127 (a subnormal), 0xFF is NaN."""
    bits = scale.to(torch.int32)
    value = bits.bitwise_left_shift(23).masked_fill_(bits == 0, 1 << 22)
    return value.masked_fill_(bits == E8M0_NAN, 0x7FC00000).view(torch.float32)


def matmul(quantized, prepared, bias, dtype: torch.dtype, N: int) -> torch.Tensor:
    """x [M, K] @ W[N, K].T + bias, exact weights, accumulated in at least float32.

    On a CPU without 16-bit matrix instructions, where such a matmul takes 10 times as long as in
    float32, weights are unpacked to float32 in slabs and the result is rounded once. Elsewhere the
    weight is rounded to x's dtype first, as ComfyUI does: bfloat16 and float32 hold it exactly;
    float16 loses values below 2**-14 or above 65504.

    Args:
        quantized: (x,), of `dtype`.
        prepared: (qdata, tiled scale).
    """
    (x,), (qdata, scale) = quantized, prepared
    if x.device.type != "cpu" or device_facts.cpu_multiplies(x.dtype):
        weight = dequantize(qdata, scale, x.dtype, N, x.shape[1])
        return torch.nn.functional.linear(x, weight, bias)

    factor = layout.untile(scale.view(torch.uint8), *_blocks(qdata))
    return _matmul_in_slabs(
        x, lambda slab, first: dequantize_rows(qdata, factor, slab, first), bias, N
    )


def _matmul_in_slabs(x, fill: Callable, bias, N: int) -> torch.Tensor:
    """x [M, K] @ W[N, K].T + bias in float32, rounded once to x's dtype.

    A slab of W stays in the cache where x does; then it is about as large as x, so that x is
    not read too often. No full-size float32 weight is materialized for a small x.

    Args:
        fill: (float32 [n, K], first row) fills it with rows of W from that one on.
    """
    M, K = x.shape
    out, wide = x.new_empty(M, N), x.float()
    slabs = list(layout.slabs(N, K, max(_CPU_CHUNK, x.numel())))
    weight = wide.new_empty(slabs[0][1] if slabs else 0, K)
    for first, last in slabs:
        slab = weight[: last - first]
        fill(slab, first)
        part = None if bias is None else bias[first:last].float()
        out[:, first:last] = torch.nn.functional.linear(wide, slab, part)
    return out


def prepare_bf16(qdata, scale) -> tuple[torch.Tensor]:
    """The weight unpacked, [N', K'] in bfloat16: what `matmul_bf16` takes."""
    return (dequantize(qdata, scale, torch.bfloat16, *qdata.shape),)


def matmul_bf16(quantized, prepared, bias, dtype: torch.dtype, N: int) -> torch.Tensor:
    """As `matmul`, of a weight that `prepare_bf16` unpacked before."""
    (x,), (weight,) = quantized, prepared
    weight = weight[:N, : x.shape[1]]
    if x.dtype != torch.float32:
        return torch.nn.functional.linear(x, weight.to(x.dtype), bias)
    return _matmul_in_slabs(
        x, lambda slab, first: slab.copy_(weight[first : first + slab.shape[0]]), bias, N
    )


def bf16_unsupported_reason(problem) -> str | None:
    """Why unpacked weights are not kept for a `records.Problem`, or None.

    They take twice the memory of stored ones, which on a GPU is better spent on more layers. In
    float32 a model's BF16 weights are widened on each call as well: ComfyUI does so on CPUs.
    """
    if problem.device.type != "cpu":
        return device_facts.DeviceReason("keeps unpacked weights on CPUs only")
    if problem.weight_form == "bf16" or problem.dtype == torch.float32:
        return None
    if problem.dtype != torch.bfloat16:
        return f"keeps weights in bfloat16; this linear is in {problem.dtype}"
    if not device_facts.cpu_multiplies(problem.dtype):
        return "needs a CPU with bfloat16 matrix instructions (AVX512_BF16, AMX)"
    return None
