"""Row-wise scaling (`fp8_rowwise`) in Triton: of weights and of activations, one pass each.

A program of `rowwise_weight_kernel` takes a few rows: it reads all their scales, which are 1/32 of
the bytes, then their codes. A program of `rowwise_input_kernel` holds a whole row in registers, so
that x is read once.

MI300 multiplies E4M3fnuz, in which each byte is half of what it is in E4M3, except for three: 0x80
is NaN, 0x7F and 0xFF are not. So FNUZ writes 0 for negative zeros, 0x80 for NaN, and row scales
twice as large; 0x7F does not occur as a number, as 448 is 0x7E.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ... import layout
from ...device_facts import hardware_e4m3, on_device
from ...layout import BLOCK
from .cast import decode_e4m3, decode_e8m0, encode_e4m3, scale_offset

WIDEST = 32_768  # values per row that fit registers
FNUZ = torch.float8_e4m3fnuz
WEIGHT_CONFIG = {"R": 8, "C": 1024, "num_warps": 8}


@triton.jit
def without_negative_zeros(code, FNUZ: tl.constexpr):
    """E4M3 codes, not NaN, as E4M3fnuz of half the value."""
    if FNUZ:
        code = tl.where(code == 0x80, 0, code)
    return code


@triton.jit
def rowwise_weight_kernel(
    code_ptr, scale_ptr, out_ptr, row_scale_ptr, rows, stored, tiles,
    R: tl.constexpr, C: tl.constexpr, HARDWARE: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """codes [rows, stored], tiled scales -> codes, a float32 scale per row; R rows a program."""
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    inside = (row < rows)[:, None]
    largest = tl.full((R,), 1, tl.int32)
    for first in range(0, stored // 32, C // 32):
        block = first + tl.arange(0, C // 32)
        byte = tl.load(
            scale_ptr + scale_offset(row[:, None], block[None, :], tiles),
            mask=inside & (block < stored // 32)[None, :],  # padding may hold anything
            other=0,
        ).to(tl.int32)
        largest = tl.maximum(largest, tl.max(tl.where(byte == 255, 0, byte), axis=1))
    row_scale = decode_e8m0(largest) * (2.0 if FNUZ else 1.0)
    tl.store(row_scale_ptr + row, row_scale, mask=row < rows)
    for first in range(0, stored, C):
        column = first + tl.arange(0, C)
        block = first // 32 + tl.arange(0, C // 32)
        mask = inside & (column < stored)[None, :]
        code = tl.load(code_ptr + row[:, None] * stored + column[None, :], mask=mask, other=0)
        byte = tl.load(
            scale_ptr + scale_offset(row[:, None], block[None, :], tiles),
            mask=inside & (block < stored // 32)[None, :],
            other=0,
        ).to(tl.int32)
        # At most 1; below 2**-126 every code becomes zero anyway.
        shifted = tl.maximum(byte - largest[:, None] + 127, 1)
        factor = decode_e8m0(tl.where(byte == 255, 255, shifted))
        value = decode_e4m3(code, HARDWARE).reshape(R, C // 32, 32) * factor[:, :, None]
        out = without_negative_zeros(encode_e4m3(value, HARDWARE).to(tl.int32), FNUZ)
        out = tl.where(value == value, out, 0x80 if FNUZ else 0x7F).to(tl.uint8).reshape(R, C)
        tl.store(out_ptr + row[:, None] * stored + column[None, :], out, mask=mask)


@triton.jit
def rowwise_input_kernel(
    x_ptr, code_ptr, scale_ptr, cols, row_stride, stored,
    C: tl.constexpr, HARDWARE: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """One row of x [cols] -> its codes [stored] and its scale; C is at least `stored`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, C)
    x = tl.load(x_ptr + row * row_stride + column, mask=column < cols, other=0.0).to(tl.float32)
    # Non-negative floats compare as their bits do, and the bits of NaN are above those of infinity.
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    finite = bits < 0x7F800000
    amax = tl.maximum(bits, 27 << 23).to(tl.float32, bitcast=True)  # at least 2**-100
    inverse = tl.where(finite, tl.div_rn(448.0, amax), 0.0)
    code = without_negative_zeros(encode_e4m3(x * inverse, HARDWARE).to(tl.int32), FNUZ)
    code = tl.where(finite, code, 0).to(tl.uint8)
    tl.store(code_ptr + row * stored + column, code, mask=column < stored)
    scale = tl.div_rn(amax, 224.0 if FNUZ else 448.0)
    tl.store(scale_ptr + row, tl.where(finite, scale, float("nan")))


@cache  # Triton's `next_power_of_2` takes 2 us
def rowwise_input_config(stored: int) -> dict[str, int]:
    """Constants and options of `rowwise_input_kernel` for rows of `stored` values."""
    width = triton.next_power_of_2(stored)
    return {"C": width, "num_warps": max(1, min(16, width // 512))}


def to_rowwise(
    qdata, scale, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fp8_rowwise.to_rowwise` by Triton; codes are of `dtype`, E4M3 or E4M3fnuz."""
    rows, stored = qdata.shape
    code = torch.empty(rows, stored, dtype=torch.uint8, device=qdata.device)
    row_scale = torch.empty(rows, dtype=torch.float32, device=qdata.device)
    if code.numel():
        with on_device(qdata):
            rowwise_weight_kernel[(-(-rows // WEIGHT_CONFIG["R"]),)](
                qdata.view(torch.uint8), scale.view(torch.uint8), code, row_scale,
                rows, stored, scale.shape[1] // 4,
                HARDWARE=hardware_e4m3(qdata.device), FNUZ=dtype == FNUZ, **WEIGHT_CONFIG,
            )  # fmt: skip
    return code.view(dtype), row_scale


def to_rowwise_fnuz(qdata, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """As `to_rowwise`, in E4M3fnuz."""
    return to_rowwise(qdata, scale, FNUZ)


def quantize_rowwise(
    x: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fp8_rowwise.quantize_rowwise` by Triton, for K up to `WIDEST`; codes are of `dtype`."""
    rows, cols = x.shape
    stored = layout.round_up(cols, BLOCK)
    if x.stride(1) != 1:
        x = x.contiguous()
    code = torch.empty(rows, stored, dtype=torch.uint8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        with on_device(x):
            rowwise_input_kernel[(rows,)](
                x, code, scale, cols, x.stride(0), stored,
                HARDWARE=hardware_e4m3(x.device), FNUZ=dtype == FNUZ,
                **rowwise_input_config(max(stored, BLOCK)),
            )  # fmt: skip
    return code.view(dtype), scale


def quantize_rowwise_fnuz(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_rowwise`, in E4M3fnuz."""
    return quantize_rowwise(x, FNUZ)
