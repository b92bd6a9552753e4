"""The oracle: MXFP8 quantize, dequantize and matmul in float64, written to be read.

Every other implementation in this package must produce these bits (quantize, dequantize) or stay
within a stated error of these values (matmul). It is slow and materializes everything, and runs
only when it is named.

Where the specification leaves room, it fixes these rules:

* Scale: the smallest power of two s with amax / s <= 448 ("RCEIL"), so nothing saturates. It also
  had the smallest squared error of all E8M0 scales on the weights tried; the OCP floor rule loses
  up to 1.5 dB.
* amax == 0: scale byte 0 and codes 0, whatever the signs of the zeros.
* 0 < amax < 2**-118: scale byte 1, never 0, because common readers decode byte 0 as 0.0.
* A block with NaN or Inf: scale byte 0xFF (NaN) and codes 0. The whole block decodes to NaN; an
  infinity never becomes a finite number.
* Otherwise: code = round-to-nearest-even E4M3 of x / s, with the sign of x kept on zeros.

The forms with a scale per row, FP8 and rotated INT8, have their rules in `to_rowwise`,
`quantize_rowwise` and `quantize_rotated_int8`. `matmul` multiplies any of the forms in float64.

`block_matmul` models the arithmetic of a block-scaled matmul, and `block_bound` bounds the error of
any implementation against float64.
"""

from __future__ import annotations

from functools import cache

import torch

from .. import layout
from ..layout import BLOCK, E8M0_BIAS, E8M0_NAN

# Fraction bits that Blackwell's tensor cores keep when they align 32 products and the running sum
# to the largest of them, as measured on such cards (arXiv:2511.10909).
FRACTION = 25
_ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@cache
def e4m3_magnitudes() -> torch.Tensor:
    """Values of the codes 0x00..0x7E, ascending. float64 [127]."""
    code = torch.arange(127, device="cpu")
    exponent, mantissa = code >> 3, (code & 7).double()
    subnormal = mantissa * 2.0**-9
    normal = (1 + mantissa / 8) * torch.exp2(exponent.double() - 7)
    return torch.where(exponent == 0, subnormal, normal)


def decode_e4m3(code: torch.Tensor) -> torch.Tensor:
    """uint8 codes -> float64 values; 0x7F and 0xFF are NaN."""
    magnitude = torch.nn.functional.pad(e4m3_magnitudes(), (0, 1), value=torch.nan)
    value = magnitude[(code & 0x7F).long()]
    return torch.where(code >= 0x80, -value, value)


def decode_e4m3fnuz(code: torch.Tensor) -> torch.Tensor:
    """uint8 codes -> float64 values; 0x80 is NaN, and 0x7F is 240."""
    half = decode_e4m3(code) / 2
    half = torch.where(code == 0x80, torch.nan, half)
    return torch.where(code & 0x7F == 0x7F, torch.where(code >= 0x80, -240.0, 240.0), half)


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
    padded = torch.zeros(padded_rows, padded_cols, dtype=torch.float64, device="cpu")
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
    """Unpack (qdata, tiled scale), rounding once to `dtype`. [rows, cols]."""
    return dequantize_exact(qdata, scale, rows, cols).to(dtype)


def dequantize_exact(qdata, scale, rows: int, cols: int) -> torch.Tensor:
    """As `dequantize`, in float64, which holds every product of code and scale exactly."""
    padded_rows, padded_cols = qdata.shape
    blocks = padded_cols // BLOCK
    value = decode_e4m3(qdata.view(torch.uint8).cpu()).reshape(padded_rows, blocks, BLOCK)
    factor = layout.untile(scale.view(torch.uint8).cpu(), padded_rows, blocks)
    value = value * decode_e8m0(factor)[..., None]
    return value.reshape(padded_rows, padded_cols)[:rows, :cols].to(qdata.device)


def matmul(
    weight_form: str, input_form: str | None, quantized, prepared, bias, dtype, N: int
) -> torch.Tensor:
    """x [M, K] @ W[N, K].T + bias in float64 from any of the forms of `records`, rounded once.

    Rotated inputs and weights are multiplied as they are: the rotation cancels.

    Returns:
        [M, N] of `dtype`.
    """
    weight = _weight_value(weight_form, prepared)[:N]
    value = _input_value(input_form, quantized)
    out = value @ weight[:, : value.shape[1]].t()
    return (out if bias is None else out + bias.double()).to(dtype)


def _weight_value(form: str, tensors) -> torch.Tensor:
    if form == "bf16":
        return tensors[0].double()
    if form == "stored":
        return dequantize_exact(*tensors, *tensors[0].shape)
    return _rowwise_value(*tensors)


def _input_value(form: str | None, tensors) -> torch.Tensor:
    if form is None:
        return tensors[0].double()
    if form == "mxfp8":
        return dequantize_exact(*tensors, *tensors[0].shape)
    return _rowwise_value(*tensors)


def _rowwise_value(code: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float64 values of INT8, E4M3 or E4M3fnuz codes with a scale per row."""
    if code.dtype == torch.float8_e4m3fnuz:
        code = decode_e4m3fnuz(code.view(torch.uint8).cpu()).to(code.device)
    elif code.dtype != torch.int8:
        code = decode_e4m3(code.view(torch.uint8).cpu()).to(code.device)
    return code.double() * scale.double()[:, None]


def block_matmul(quantized_input, weight, bias, dtype, M: int, N: int) -> torch.Tensor:
    """x [M, K] @ W[N, K].T + bias from their stored forms, as block-scaled tensor cores compute it.

    Blocks of 32 along K are accumulated in turn. Products of codes are exact, scales included (E4M3
    has 4 significant bits); the 32 products and the running sum are aligned to the largest exponent
    among them, truncated FRACTION bits below it, and added exactly; the new sum is truncated to
    float32. The exponent of a product is the sum of its factors' exponents, before normalization.
    The order of accumulation beyond that, and how the bias is added, is not known: here K ascends,
    and the bias is added in float32, which is then rounded to `dtype`. So this does not reproduce
    every bit of a card, but its errors have the same direction (toward zero) and size.

    Args:
        quantized_input, weight: (qdata, tiled scale) as `quantize` returns them.
        bias: [N] or None.

    Returns:
        [M, N] of `dtype`.
    """
    (a, a_exponent), (b, b_exponent) = _in_blocks(quantized_input, M), _in_blocks(weight, N)
    total = torch.zeros(M, N, dtype=torch.float64, device="cpu")
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
    return total.to(dtype).to(weight[0].device)


def block_bound(
    quantized_input, weight, bias, dtype, M: int, N: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(product, bound), both float64 [M, N]: the exact result, and the error a matmul may have.

    Let S = |x| @ |W|.T. A float32 sum of the K products, in any order, has an error of at most
    K 2**-24 S. Tensor cores truncate 33 terms of at most S by less than 2**-25 S and their sum by
    2**-23 S, once every 32 products: 37/32 K 2**-25 S, which is less. The bias is one more term.
    The result is rounded to `dtype`, and so is the product if it is rounded before adding the bias.
    """
    K = weight[0].shape[1]
    x, w = dequantize_exact(*quantized_input, M, K).cpu(), dequantize_exact(*weight, N, K).cpu()
    product, size = x @ w.t(), x.abs() @ w.abs().t()
    smallest = torch.finfo(dtype).smallest_normal  # below it, rounding is relative to it
    rounding = _ROUNDING[dtype] * product.abs().clamp_min(smallest)
    if bias is not None:
        product, size = product + bias.double().cpu(), size + bias.double().cpu().abs()
    rounding += _ROUNDING[dtype] * product.abs().clamp_min(smallest)
    return product, (K + 2) * 2.0**-24 * size + rounding


def _in_blocks(stored, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and exponents [rows, K/32, 32] of a matrix; exponents include the scale."""
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
    """Truncate to float32 precision, in float64."""
    unit = torch.exp2((torch.frexp(value).exponent.clamp_min(-125) - 24).double())
    cut = (value / unit).trunc() * unit
    return torch.where(cut.abs() < 2.0**128, cut, cut.sign() * torch.inf)


def to_rowwise(qdata, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewrite an MXFP8 matrix as E4M3 with one power of two per row; see `fp8_rowwise`.

    A row's scale is the largest of its blocks' scales, NaN (byte 255) excluded, and at least
    2**-126. Codes that are shifted down are rounded once more; NaN stays NaN.

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

    amax is taken to be at least 2**-100, so that 448 / amax is finite. A row with NaN or Inf has
    scale NaN and codes 0, so its products are NaN.

    Args:
        x: [M, K].

    Returns:
        (codes, scale): float8_e4m3fn [M, K'], K' rounded up to 32 and padding zero; float32 [M].
    """
    rows, cols = x.shape
    stored = layout.round_up(cols, BLOCK)
    value = torch.zeros(rows, stored, dtype=torch.float32, device="cpu")
    value[:, :cols] = x.float().cpu()
    amax = value.abs().amax(-1, keepdim=True)
    finite = amax.isfinite()
    floor = torch.where(finite, amax, 1.0).clamp_min(2.0**-100)
    inverse = torch.full_like(floor, 448.0) / floor  # float32, rounded once
    scaled = torch.where(finite, value, 0.0) * inverse
    code = encode_e4m3(scaled.double().clamp(-448, 448))
    scale = torch.where(finite, floor / 448.0, torch.nan).squeeze(-1)
    return code.view(torch.float8_e4m3fn).to(x.device), scale.to(x.device)


def to_rowwise_fnuz(qdata, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """`to_rowwise` in float8_e4m3fnuz, of the same values."""
    return _fnuz(*to_rowwise(qdata, scale))


def quantize_rowwise_fnuz(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rowwise` in float8_e4m3fnuz, of the same values."""
    return _fnuz(*quantize_rowwise(x))


def _fnuz(codes, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """A byte is half of what it is in E4M3; 0x80 is NaN there, and 0x7F here."""
    byte = codes.view(torch.uint8).int()
    byte = torch.where(byte == 0x80, 0, torch.where(byte & 0x7F == 0x7F, 0x80, byte))
    return byte.to(torch.uint8).view(torch.float8_e4m3fnuz), scale * 2


def group(K: int) -> int:
    """Values along K that are rotated together: 256, else 64, else 16, whichever divides K."""
    sizes = [size for size in (256, 64, 16) if K % size == 0]
    assert sizes, f"K = {K} is not a multiple of 16"
    return sizes[0]


def hadamard(size: int) -> torch.Tensor:
    """ConvRot's regular Hadamard matrix over sqrt(size): symmetric, its own inverse.

    A Kronecker power of a matrix with equal row sums, so that a constant stays one; Sylvester's
    would gather it in a single value (arXiv:2512.03673).

    Args:
        size: a power of 4, for which the entries are exact.

    Returns:
        float64 [size, size].
    """
    signs = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]
    quarter = torch.tensor(signs, dtype=torch.float64, device="cpu")
    matrix = quarter
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, quarter)
    return matrix / size**0.5


def rotate(value: torch.Tensor) -> torch.Tensor:
    """Multiply every group along K by the Hadamard matrix, in float64; its own inverse."""
    rows, cols = value.shape
    size = group(cols)
    groups = value.double().reshape(rows, cols // size, size)
    return (groups @ hadamard(size).to(value.device)).reshape(rows, cols)


def quantize_rotated_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate x in groups along K, then quantize every row to INT8 with a float32 scale of its own.

    The rotated value is rounded to float32 once. From there on all is float32, and the bits are
    those of comfy-kitchen: scale = max(amax / 127, 1e-30), code = value / scale rounded to nearest
    even. A row with NaN or Inf, or whose rotated values overflow float32, has scale NaN and codes
    0, so its products are NaN. A row of zeros has the smallest scale.

    Args:
        x: [M, K], K a multiple of 16.

    Returns:
        (codes, scale): int8 [M, K] and float32 [M].
    """
    value = rotate(x.cpu()).float()
    finite = value.isfinite().all(-1, keepdim=True)
    value = torch.where(finite, value, 0.0)
    amax = value.abs().amax(-1, keepdim=True)
    scale = (amax / torch.full_like(amax, 127.0)).clamp_min(1e-30)
    code = (value / scale).round().clamp(-128, 127).to(torch.int8)
    return code.to(x.device), torch.where(finite, scale, torch.nan).squeeze(-1).to(x.device)


def to_rotated_int8(qdata, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewrite an MXFP8 matrix as rotated INT8 with a scale per row; see `quantize_rotated_int8`.

    A row that holds a NaN becomes NaN as a whole, as its products are anyway.

    Args:
        qdata, scale: [N', K'] and its tiled scales.

    Returns:
        (codes, scale): int8 [N', K'] and float32 [N'].
    """
    return quantize_rotated_int8(dequantize_exact(qdata, scale, *qdata.shape))
