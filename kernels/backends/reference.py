"""The oracle: MXFP8 quantize, dequantize and linear, written to be read, in float64.

Every other implementation in this package must produce these bits (quantize, dequantize) or stay
within a stated error of these values (linear). It is slow and materializes everything; nothing
selects it unless asked to by name.

The rules it fixes, where the specification leaves room:

* Scale: the smallest power of two s with amax / s <= 448 ("RCEIL"), so nothing saturates. It is
  also the best E8M0 scale in squared error on weights that were tried; the OCP floor rule loses
  up to 1.5 dB.
* amax == 0: scale byte 0 and codes 0, whatever the signs of the zeros.
* 0 < amax < 2**-118: scale byte 1, never 0, because common readers decode byte 0 as 0.0.
* A block that holds NaN or Inf: scale byte 0xFF (NaN) and codes 0. The whole block decodes to NaN;
  an infinity never turns into a finite number.
* Elsewhere: code = round-to-nearest-even E4M3 of x / s, with the sign of x kept on zeros.

`block_matmul` is the oracle of a block-scaled matmul's arithmetic, and `block_bound` how far from
float64 any implementation may be.
"""

from __future__ import annotations

from functools import cache

import torch

from .. import layout
from ..layout import BLOCK, E8M0_BIAS, E8M0_NAN

# Bits after the point that Blackwell's tensor cores keep of a term beside the largest of 32
# products and the running sum, as others measured them on such cards (arXiv:2511.10909).
FRACTION = 25
_ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@cache
def e4m3_magnitudes() -> torch.Tensor:
    """Values of the codes 0x00..0x7E, ascending. float64 [127]."""
    code = torch.arange(127)
    exponent, mantissa = code >> 3, (code & 7).double()
    subnormal = mantissa * 2.0**-9
    normal = (1 + mantissa / 8) * torch.exp2(exponent.double() - 7)
    return torch.where(exponent == 0, subnormal, normal)


def decode_e4m3(code: torch.Tensor) -> torch.Tensor:
    """uint8 codes -> float64 values; 0x7F and 0xFF are NaN."""
    magnitude = torch.cat([e4m3_magnitudes(), torch.tensor([torch.nan], dtype=torch.float64)])
    value = magnitude[(code & 0x7F).long()]
    return torch.where(code >= 0x80, -value, value)


def encode_e4m3(value: torch.Tensor) -> torch.Tensor:
    """float64 values within +-448 -> uint8 codes, to nearest, ties to the even code."""
    magnitudes = e4m3_magnitudes()
    midpoints = (magnitudes[1:] + magnitudes[:-1]) / 2
    size = value.abs()
    below = torch.bucketize(size, midpoints, right=False)  # a tie stays on the lower code
    above = torch.bucketize(size, midpoints, right=True)  # a tie goes to the upper code
    code = torch.where(below % 2 == 0, below, above)
    return (code + 0x80 * torch.signbit(value)).to(torch.uint8)


def decode_e8m0(scale: torch.Tensor) -> torch.Tensor:
    """uint8 scale bytes -> float64 powers of two; 0 is 2**-127, 0xFF is NaN."""
    value = torch.exp2(scale.double() - E8M0_BIAS)
    return torch.where(scale == E8M0_NAN, torch.nan, value)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K] -> (float8_e4m3fn [M', K'], uint8 tiled scales); see the module docstring."""
    rows, cols = x.shape
    padded_rows, padded_cols = layout.padded_shape(rows, cols)
    padded = torch.zeros(padded_rows, padded_cols, dtype=torch.float64)
    padded[:rows, :cols] = x.double().cpu()
    blocks = padded.reshape(padded_rows, padded_cols // BLOCK, BLOCK)  # [M', K'/32, 32]

    amax = blocks.abs().amax(-1)
    finite, zero = amax.isfinite(), amax == 0
    # amax = m * 2**p with 0.5 <= m < 1, and 448 = 0.875 * 2**9.
    mantissa, exponent = torch.frexp(torch.where(finite, amax, 1.0))
    biased = (exponent - 9 + (mantissa > 0.875).int() + E8M0_BIAS).clamp(1, layout.E8M0_MAX)

    scaled = blocks / torch.exp2(biased.double() - E8M0_BIAS)[..., None]
    usable = (finite & ~zero)[..., None]
    code = encode_e4m3(torch.where(usable, scaled, 0.0))  # at most 448 by the choice of scale
    biased = torch.where(zero, 0, torch.where(finite, biased, E8M0_NAN))

    qdata = code.reshape(padded_rows, padded_cols).to(x.device).view(torch.float8_e4m3fn)
    return qdata, layout.tile(biased.to(torch.uint8)).to(x.device)


def dequantize(qdata, scale, dtype, rows: int, cols: int) -> torch.Tensor:
    """The values behind (qdata, tiled scale), rounded once to `dtype`. [rows, cols]."""
    return dequantize_exact(qdata, scale, rows, cols).to(dtype)


def dequantize_exact(qdata, scale, rows: int, cols: int) -> torch.Tensor:
    """As `dequantize`, in float64, which holds every product of code and scale exactly."""
    padded_rows, padded_cols = qdata.shape
    blocks = padded_cols // BLOCK
    value = decode_e4m3(qdata.view(torch.uint8).cpu()).reshape(padded_rows, blocks, BLOCK)
    factor = layout.untile(scale.view(torch.uint8).cpu(), padded_rows, blocks)
    value = value * decode_e8m0(factor)[..., None]
    return value.reshape(padded_rows, padded_cols)[:rows, :cols].to(qdata.device)


def linear(x, qdata, scale, bias, rows: int, cols: int, precision: str = "exact") -> torch.Tensor:
    """x [M, K] @ W[N, K].T + bias in float64, rounded to x's dtype.

    "fast" quantizes x to MXFP8 too, as block-scaled tensor cores need it: the value that a native
    MX x MX matmul approximates.
    """
    weight = dequantize_exact(qdata, scale, rows, cols)
    value = x.double()
    if precision == "fast":
        value = dequantize_exact(*quantize(x), *x.shape)
    out = value @ weight.t()
    if bias is not None:
        out = out + bias.double()
    return out.to(x.dtype)


def block_matmul(tokens, weight, bias, dtype, M: int, N: int) -> torch.Tensor:
    """x [M, K] @ W[N, K].T + bias from their stored forms, as block-scaled tensor cores compute it.

    Blocks of 32 along K are added one after the other. Products of codes are exact, scales included
    (E4M3 has 4 significant bits); the 32 of them and the running sum are aligned to the largest
    exponent among them, cut off FRACTION bits below it, and added exactly; the new sum is cut to
    float32. A product's exponent is the sum of its factors', before it is normalized. What is added
    in which order outside of that, and how the bias is, is not known: here K ascends, and the bias
    is added in float32, which is then rounded to `dtype`. So this is not a card's every bit, but it
    errs the way that a card does: downwards in size, by as much.

    Args:
        tokens, weight: (qdata, tiled scale) as `quantize` returns them; bias: [N] or None.

    Returns:
        [M, N] of `dtype`.
    """
    (a, a_exponent), (b, b_exponent) = _in_blocks(tokens, M), _in_blocks(weight, N)
    total = torch.zeros(M, N, dtype=torch.float64)
    for k in range(a.shape[1]):
        product = a[:, None, k] * b[None, :, k]  # [M, N, 32], exact in float64
        exponent = a_exponent[:, None, k] + b_exponent[None, :, k]
        exponent = exponent.amax(-1).maximum(_exponent(total)).clamp_min(_NO_EXPONENT)
        unit = torch.exp2((exponent - FRACTION).double())
        kept = (product / unit[..., None]).trunc().sum(-1) + (total / unit).trunc()
        total = _cut_to_float32(kept * unit)
    total = total.float()
    if bias is not None:
        total = total + bias.float().cpu()
    return total.to(dtype).to(tokens[0].device)


def block_bound(tokens, weight, bias, dtype, M: int, N: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(wanted, allowed), both float64 [M, N]: the product, and how far off it a matmul may be.

    S is the sum of the products' sizes, |x| @ |W|.T. A sum of K of them in float32, in any order,
    is off by at most K 2**-24 S. Tensor cores cut 33 terms of at most S by less than 2**-25 of it
    and their sum by 2**-23, once every 32: 37/32 K 2**-25 S, which is less. The bias is one more
    term. The result is rounded to `dtype`, and where a matmul does so before it adds the bias, so
    is the product.
    """
    K = tokens[0].shape[1]
    x, w = dequantize_exact(*tokens, M, K).cpu(), dequantize_exact(*weight, N, K).cpu()
    wanted, size = x @ w.t(), x.abs() @ w.abs().t()
    smallest = torch.finfo(dtype).smallest_normal  # below, a rounding is a share of this
    rounded = _ROUNDING[dtype] * wanted.abs().clamp_min(smallest)
    if bias is not None:
        wanted, size = wanted + bias.double().cpu(), size + bias.double().cpu().abs()
    rounded += _ROUNDING[dtype] * wanted.abs().clamp_min(smallest)
    return wanted, (K + 2) * 2.0**-24 * size + rounded


def _in_blocks(stored, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and exponents [rows, K/32, 32] of a matrix; an exponent is that of code and scale."""
    qdata, scale = stored
    shape = rows, qdata.shape[1] // BLOCK, BLOCK
    value = dequantize_exact(qdata, scale, rows, qdata.shape[1]).cpu().reshape(shape)
    code = (qdata.view(torch.uint8).cpu()[:rows] & 0x7F).reshape(shape)
    factor = layout.untile(scale.view(torch.uint8).cpu(), *shape[:2]).int()[..., None]
    exponent = (code >> 3).int().clamp_min(1) - 7 + factor - E8M0_BIAS
    return value, torch.where(code == 0, _NO_EXPONENT, exponent)


_NO_EXPONENT = -512  # of zero: below that of any product


def _exponent(value: torch.Tensor) -> torch.Tensor:
    return torch.where(value == 0, _NO_EXPONENT, torch.frexp(value).exponent - 1)


def _cut_to_float32(value: torch.Tensor) -> torch.Tensor:
    """Rounded towards zero to what float32 can hold, in float64."""
    unit = torch.exp2((torch.frexp(value).exponent.clamp_min(-125) - 24).double())
    cut = (value / unit).trunc() * unit
    return torch.where(cut.abs() < 2.0**128, cut, cut.sign() * torch.inf)


def to_rowwise(qdata, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewrite an MXFP8 matrix as E4M3 with one power of two per row; see `fp8_rowwise`.

    The row's scale is the largest of its blocks', byte 255 left out, and at least 2**-126. Codes
    are rounded once more where they are shifted down; NaN stays NaN.

    Args:
        qdata, scale: [N', K'] and its tiled scales.

    Returns:
        (codes, scale): float8_e4m3fn [N', K'] and float32 [N'].
    """
    rows, cols = qdata.shape
    byte = layout.untile(scale.view(torch.uint8).cpu(), rows, cols // BLOCK).int()
    largest = torch.where(byte == E8M0_NAN, 0, byte).amax(-1).clamp_min(1)
    row_scale = torch.exp2(largest.double() - E8M0_BIAS)
    value = dequantize_exact(qdata, scale, rows, cols).cpu() / row_scale[:, None]
    code = encode_e4m3(value.nan_to_num(nan=0.0))
    code = torch.where(value.isnan(), 0x7F, code).to(torch.uint8)
    return code.view(torch.float8_e4m3fn).to(qdata.device), row_scale.float().to(qdata.device)


def quantize_rowwise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize every row of x to E4M3 with a float32 scale of its own, amax / 448.

    Where amax is below 2**-100 that counts as amax, so that 448 / amax is finite. A row with NaN or
    Inf has scale NaN and codes 0, and makes NaN of whatever it is multiplied with.

    Args:
        x: [M, K].

    Returns:
        (codes, scale): float8_e4m3fn [M, K'], K' rounded up to 32 and padding zero; float32 [M].
    """
    rows, cols = x.shape
    value = torch.zeros(rows, layout.padded_shape(rows, cols)[1])
    value[:, :cols] = x.float().cpu()
    amax = value.abs().amax(-1, keepdim=True)
    finite = amax.isfinite()
    floor = torch.where(finite, amax, 1.0).clamp_min(2.0**-100)
    inverse = torch.full_like(floor, 448.0) / floor  # float32, rounded once
    scaled = torch.where(finite, value, 0.0) * inverse
    code = encode_e4m3(scaled.double().clamp(-448, 448))
    scale = torch.where(finite, floor / 448.0, torch.nan).squeeze(-1)
    return code.view(torch.float8_e4m3fn).to(x.device), scale.to(x.device)
