"""Rotated INT8 (`int8`) in Triton: weights and inputs, each rotated and quantized in one pass.

A program holds a whole row in registers, as the row's largest value is known last. ConvRot's matrix
is a Kronecker power of H4 (`reference.hadamard`), so a group is rotated a base-4 digit of its
columns at a time: with four values that differ in that digit alone and their sum s, H4 gives s - 2v
in reversed order. Reversing every digit is reversing the group, which is done once, where the row
is read. Eight neighbors lie in a thread and a group in a warp, so the sums take registers and
shuffles, no shared memory.

All of it is in float32. Values are divided by the group's size before they are summed, so no sum
overflows that the rotated value does not, and multiplied by its root at the end. Results differ
from the oracle's by the order of those sums and by multiplying with 1 / scale instead of dividing:
ties may round to the other code.

`matmul_by_torch` is for Turing, whose matrix instructions Triton does not know: cuBLAS writes sums
in int32, and one more pass scales them.

Rejected: multiplying by the matrix on tensor cores (twice 256 operations a value instead of 7, and
float32 inputs would need three products); `tl.split` on every digit, which goes through shared
memory.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ... import layout
from ...device_facts import hardware_e4m3, on_device
from .. import reference
from . import gemm
from .cast import decode_e4m3, decode_e8m0, scale_offset

WIDEST = 32_768  # values per row that fit registers
SCALING = {"R": 4, "C": 1024, "num_warps": 4}  # of `scale_kernel`: a tile per program


@triton.jit
def reversed_groups(C: tl.constexpr, G: tl.constexpr):
    """The columns to read, [C / 8, 8]: groups in place, chunks of 8 reversed within them."""
    chunk = tl.arange(0, C // 8) ^ (G // 8 - 1)
    return chunk[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def reverse_eights(value, C: tl.constexpr):
    """Every eight neighbors of value [C] in reversed order; they lie in a thread."""
    value = value.reshape(C // 8, 2, 2, 2)
    for _ in tl.static_range(3):  # a binary digit at a time
        low, high = tl.split(value)
        value = tl.join(high, low).trans(0, 3, 1, 2)
    return value.reshape(C)


@triton.jit
def rotate_digit(value, C: tl.constexpr, S: tl.constexpr):
    """s - 2v for the digit of weight S of the columns; value [C]."""
    digit = value.reshape(C // (4 * S), 4, S)
    return (tl.sum(digit, axis=1)[:, None, :] - 2.0 * digit).reshape(C)


@triton.jit
def rotate_and_quantize(value, C: tl.constexpr, G: tl.constexpr):
    """float32 values / G [C / 8, 8] at `reversed_groups` -> int8 codes [C], the row's scale."""
    value = reverse_eights(value, C)
    value = rotate_digit(rotate_digit(value, C, 1), C, 4)
    if G >= 64:
        value = rotate_digit(value, C, 16)
    if G == 256:
        value = rotate_digit(value, C, 64)
    value *= 16.0 if G == 256 else 8.0 if G == 64 else 4.0
    # Non-negative floats compare as their bits do, and the bits of NaN are above those of infinity.
    bits = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    finite = bits < 0x7F800000
    amax = tl.where(finite, bits, 0).to(tl.float32, bitcast=True)
    scale = tl.maximum(tl.div_rn(amax, 127.0), 1e-30)
    # The low bits of a sum with 1.5 * 2**23 are the rounded value.
    code = (value * tl.div_rn(1.0, scale) + 12582912.0).to(tl.int32, bitcast=True)
    return tl.where(finite, code, 0).to(tl.int8), tl.where(finite, scale, float("nan"))


@triton.jit
def rotated_weight_kernel(
    code_ptr, scale_ptr, out_ptr, row_scale_ptr, stored, tiles,
    C: tl.constexpr, G: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """A row of codes [stored] and tiled scales -> int8 codes [stored] and a float32 scale."""
    row = tl.program_id(0).to(tl.int64)
    source = reversed_groups(C, G)
    inside = source < stored
    code = tl.load(code_ptr + row * stored + source, mask=inside, other=0)
    block = (tl.arange(0, C // 8) ^ (G // 8 - 1)) // 4
    byte = tl.load(scale_ptr + scale_offset(row, block, tiles), mask=block < stored // 32, other=0)
    value = decode_e4m3(code, HARDWARE) * (decode_e8m0(byte) * (1.0 / G))[:, None]
    code, scale = rotate_and_quantize(value, C, G)
    column = tl.arange(0, C)
    tl.store(out_ptr + row * stored + column, code, mask=column < stored)
    tl.store(row_scale_ptr + row, scale)


@triton.jit
def rotated_input_kernel(
    x_ptr, code_ptr, scale_ptr, cols, row_stride,
    C: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """A row of x [cols] -> int8 codes [cols] and a float32 scale; C is at least `cols`."""
    row = tl.program_id(0).to(tl.int64)
    source = reversed_groups(C, G)
    x = tl.load(x_ptr + row * row_stride + source, mask=source < cols, other=0.0)
    code, scale = rotate_and_quantize(x.to(tl.float32) * (1.0 / G), C, G)
    column = tl.arange(0, C)
    tl.store(code_ptr + row * cols + column, code, mask=column < cols)
    tl.store(scale_ptr + row, scale)


@triton.jit
def scale_kernel(
    sum_ptr, row_scale_ptr, column_scale_ptr, bias_ptr, out_ptr, rows, columns, stride,
    R: tl.constexpr, C: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """int32 sums, `stride` from row to row -> out [rows, columns], scaled, with the bias added."""
    across = tl.cdiv(columns, C)
    row = (tl.program_id(0) // across * R + tl.arange(0, R)).to(tl.int64)
    column = tl.program_id(0) % across * C + tl.arange(0, C)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    total = tl.load(sum_ptr + row[:, None] * stride + column[None, :], mask=inside, other=0)
    row_scale = tl.load(row_scale_ptr + row, mask=row < rows, other=0.0)
    column_scale = tl.load(column_scale_ptr + column, mask=column < columns, other=0.0)
    value = total.to(tl.float32) * row_scale[:, None] * column_scale[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0)
        value += bias.to(tl.float32)[None, :]
    tl.store(
        out_ptr + row[:, None] * columns + column[None, :],
        value.to(out_ptr.dtype.element_ty),
        mask=inside,
    )


@cache  # Triton's `next_power_of_2` takes 2 us
def config_for(cols: int) -> dict[str, int]:
    """Constants and options of the kernels that hold a row of `cols` values."""
    width = triton.next_power_of_2(cols)
    return {"C": width, "G": reference.group(cols), "num_warps": max(1, min(16, width // 512))}


def prepare_weight(qdata, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """`int8.prepare_weight` in one pass, for K up to `WIDEST`."""
    rows, stored = qdata.shape
    codes = torch.empty(rows, stored, dtype=torch.int8, device=qdata.device)
    row_scale = torch.empty(rows, dtype=torch.float32, device=qdata.device)
    if codes.numel():
        with on_device(qdata):
            rotated_weight_kernel[(rows,)](
                qdata.view(torch.uint8), scale.view(torch.uint8), codes, row_scale,
                stored, scale.shape[1] // 4,
                HARDWARE=hardware_e4m3(qdata.device), **config_for(stored),
            )  # fmt: skip
    return codes, row_scale


def quantize_input(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`int8.quantize_input` in one pass, for K up to `WIDEST`."""
    rows, cols = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    codes = torch.empty(rows, cols, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    if codes.numel():
        with on_device(x):
            rotated_input_kernel[(rows,)](x, codes, scale, cols, x.stride(0), **config_for(cols))
    return codes, scale


def matmul(quantized, prepared, bias, dtype: torch.dtype, N: int) -> torch.Tensor:
    """x @ W.T + bias from rotated INT8 by Triton; see `int8.matmul`."""
    return gemm.matmul(*quantized, *prepared, bias, dtype, N)


def matmul_by_torch(quantized, prepared, bias, dtype: torch.dtype, N: int) -> torch.Tensor:
    """As `matmul`, by cuBLAS, whose sums take one more pass."""
    (a, a_scale), (b, b_scale) = quantized, prepared
    M = a.shape[0]
    out = torch.empty(M, N, dtype=dtype, device=a.device)
    if out.numel() == 0:
        return out
    product = torch._int_mm(_padded(a), _padded(b).t())
    tiles = -(-M // SCALING["R"]) * -(-N // SCALING["C"])
    with on_device(out):
        scale_kernel[(tiles,)](
            product, a_scale, b_scale, out if bias is None else bias, out, M, N,
            product.stride(0), HAS_BIAS=bias is not None, **SCALING,
        )  # fmt: skip
    return out


def _padded(codes: torch.Tensor) -> torch.Tensor:
    """cuBLAS wants more than 16 rows of x, and those of W in 8s, on Turing in 32s."""
    missing = -codes.shape[0] % layout.ROW_PAD
    return torch.nn.functional.pad(codes, (0, 0, 0, missing)) if missing else codes
