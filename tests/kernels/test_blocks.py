"""MXFP8 x MXFP8: the arithmetic of block-scaled tensor cores, and the arguments of torch's matmul.

No card is needed: `reference.block_matmul` models the cores, `reference.block_bound` bounds the
error of any implementation, and torch checks its arguments on meta tensors.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from arithmetic import all_magnitudes, magnitude

from mxfp8 import kernels
from mxfp8.kernels import layout
from mxfp8.kernels.backends import reference, torch_mx

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
SHAPES = ((1, 1, 1), (5, 33, 31), (65, 20, 100), (9, 24, 416), (33, 130, 64))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operands(M, N, K, dtype=torch.float32, seed=0):
    """An input and a weight in MXFP8, rows of all magnitudes, and a bias."""
    spread = torch.exp2(normal(M, 1, seed=seed) * 3)
    quantized_input = reference.quantize((normal(M, K, seed=seed + 1) * spread).to(dtype))
    weight = reference.quantize(normal(N, K, seed=seed + 2) * K**-0.5)
    return quantized_input, weight, normal(N, seed=seed + 3).to(dtype)


def assert_within_bound(actual, quantized_input, weight, bias, dtype):
    M, N = actual.shape
    expected, allowed = reference.block_bound(quantized_input, weight, bias, dtype, M, N)
    assert actual.dtype == dtype
    assert ((actual.cpu().double() - expected).abs() <= allowed).all()


# ---- the oracle's arithmetic -----------------------------------------------------------------


def stored(codes: list[list[int]], byte: int = 127):
    """A matrix of these codes, every scale `byte`."""
    code = torch.tensor(codes, dtype=torch.uint8)
    scale = torch.full((len(codes), code.shape[1] // 32), byte, dtype=torch.uint8)
    return code.view(torch.float8_e4m3fn), layout.tile(scale)


def product(row: list[int], column: list[int], bytes_=(127, 127)) -> float:
    operands = stored([row], bytes_[0]), stored([column], bytes_[1])
    return reference.block_matmul(*operands, None, torch.float32, 1, 1).item()


ONE, LEAST, MOST = 0x38, 0x01, 0x7E  # 1, 2**-9 and 448


def test_products_are_exact_where_nothing_is_truncated():
    """All codes against all codes, one product at a time."""
    codes = list(range(0, 0x7F, 3))
    rows = [[code] + [0] * 31 for code in codes]
    actual = reference.block_matmul(
        stored(rows), stored(rows, 120), None, torch.float32, len(codes), len(codes)
    )
    for i, a in enumerate(codes):
        for j, b in enumerate(codes):
            expected = magnitude(a) * magnitude(b) * Fraction(1, 128)
            assert Fraction(actual[i, j].item()) == expected


@pytest.mark.parametrize("sign", [0, 0x80])
def test_bits_25_below_the_largest_product_are_truncated(sign):
    """448 * 448 has the exponent 8 + 8, so that 2**-9 is the last bit that counts."""
    rest = [0] * 30
    big, kept, lost = (MOST | sign, MOST), (ONE | sign, LEAST), (LEAST | sign, LEAST)
    exact = float(magnitude(MOST)) ** 2
    side = -1 if sign else 1
    for small, more in ((kept, 2.0**-9), (lost, 0.0)):
        a, b = zip(big, small, strict=True)
        actual = product([*a, *rest], [*b, *rest])
        cut = torch.tensor(exact + more, dtype=torch.float64).float().item()
        assert actual == side * (cut if cut <= exact + more else torch.nextafter(
            torch.tensor(cut), torch.tensor(0.0)).item())  # fmt: skip
    together = product([MOST, MOST | 0x80, LEAST, *rest[1:]], [MOST, MOST, LEAST, *rest[1:]])
    assert together == 0.0  # 2**-18, though the large ones cancel
    apart = product([LEAST, *rest, 0], [LEAST, *rest, 0])
    assert apart == 2.0**-18


def test_sums_are_truncated_not_rounded():
    """1 + 2**-24 * 1.5 in two blocks: rounding to nearest would go up."""
    one = [ONE] + [0] * 31
    codes, factor = stored([one + one]), [127, 127 - 24]
    scale = layout.tile(torch.tensor([factor], dtype=torch.uint8))
    column = stored([[ONE] + [0] * 31 + [0x3C] + [0] * 31])  # 1.5
    for sign in (1, -1):
        row = codes[0].clone()
        row.view(torch.uint8)[row.view(torch.uint8) == ONE] |= 0x80 if sign < 0 else 0
        out = reference.block_matmul((row, scale), column, None, torch.float32, 1, 1)
        assert out.item() == sign * 1.0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_oracle_of_tensor_cores_is_within_the_bound(shape, dtype):
    M, N, K = shape
    quantized_input, weight, bias = operands(M, N, K, dtype)
    for added in (None, bias):
        actual = reference.block_matmul(quantized_input, weight, added, dtype, M, N)
        assert_within_bound(actual, quantized_input, weight, added, dtype)


def test_the_bound_notices_a_lost_block_and_scales_in_another_order():
    quantized_input, weight, _ = operands(40, 50, 256)
    expected, allowed = reference.block_bound(quantized_input, weight, None, torch.float32, 40, 50)
    short = reference.block_matmul(
        tuple(part.clone() for part in quantized_input), weight, None, torch.float32, 40, 50
    )
    byte = layout.untile(quantized_input[1], 64, 8).clone()
    code = quantized_input[0].view(torch.uint8).clone()
    code[:, 32:64] = 0
    lost = code.view(torch.float8_e4m3fn), quantized_input[1]
    mixed = quantized_input[0], layout.tile(byte.roll(1, 0))
    for wrong in (lost, mixed):
        actual = reference.block_matmul(wrong, weight, None, torch.float32, 40, 50)
        assert ((actual.double() - expected).abs() > allowed).double().mean() > 0.5
    assert ((short.double() - expected).abs() <= allowed).all()


def test_truncation_costs_less_than_rounding_in_float32():
    """At K = 4096, against the bound's 2.4e-4: the mean of all sums is about 4e-8 of their size."""
    quantized_input, weight, _ = operands(16, 16, 4096)
    expected, _ = reference.block_bound(quantized_input, weight, None, torch.float32, 16, 16)
    size = reference.dequantize_exact(*quantized_input, 16, 4096).abs() @ (
        reference.dequantize_exact(*weight, 16, 4096).abs().t()
    )
    actual = reference.block_matmul(quantized_input, weight, None, torch.float32, 16, 16)
    error = ((actual.double() - expected) / size).abs()
    assert 0 < error.mean() < 4096 * 2.0**-24 / 100


def test_special_values_reach_the_result():
    x = all_magnitudes(40, 96, torch.float32)
    quantized_input, weight = reference.quantize(x), operands(1, 33, 96)[1]
    actual = reference.block_matmul(quantized_input, weight, None, torch.float32, 40, 33)
    expected, allowed = reference.block_bound(quantized_input, weight, None, torch.float32, 40, 33)
    assert torch.equal(actual.isnan(), expected.isnan())
    huge = expected.abs() >= 2.0**127  # which float32 may not hold
    tiny = 96 * 2.0**-149  # subnormals: each sum is truncated to a multiple of 2**-149
    inside = (actual.double() - expected).abs() <= allowed + tiny
    assert (inside | expected.isnan() | huge).all()
    assert (actual[expected.abs() > 2.0**129].isinf()).all()


# ---- torch's arguments -----------------------------------------------------------------------


def on_meta(value):
    return value.to("meta") if isinstance(value, torch.Tensor) else value


@pytest.fixture(params=["scaled_mm", "_scaled_mm"])
def torch_here(request, monkeypatch):
    """torch's matmul on a CPU: its own checks on the arguments, then the oracle's arithmetic.

    Public (torch 2.10) or private (2.7 to 2.9), as `torch_mx` finds it.
    """
    from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

    private = torch._scaled_mm
    calls = []

    def compute(a, b, a_scale, b_scale, bias, dtype):
        calls.append((tuple(a.shape), tuple(b.shape)))
        for codes, scale in ((a, a_scale), (b.t(), b_scale)):  # both K-major, scales whole tiles
            assert codes.is_contiguous() and codes.dtype == torch.float8_e4m3fn
            assert scale.is_contiguous() and scale.dtype == torch.float8_e8m0fnu
            assert tuple(scale.shape) == layout.scale_shape(*codes.shape)
        assert b.shape[0] % 16 == b.shape[1] % 16 == 0
        assert bias is None or (bias.dtype == dtype and bias.shape == (b.shape[1],))
        pair = (a, a_scale), (b.t(), b_scale)
        return reference.block_matmul(*pair, bias, dtype, a.shape[0], b.shape[1])

    def public(a, b, a_scale, a_recipe, b_scale, b_recipe, a_order, b_order, bias, dtype):
        arguments = (a, b, a_scale, a_recipe, b_scale, b_recipe, a_order, b_order, bias, dtype)
        assert scaled_mm(*map(on_meta, arguments)).shape == (a.shape[0], b.shape[1])
        assert a_recipe == b_recipe == ScalingType.BlockWise1x32
        assert a_order == b_order == SwizzleType.SWIZZLE_32_4_4
        return compute(a, b, a_scale, b_scale, bias, dtype)

    def old(a, b, *, scale_a, scale_b, out_dtype):
        actual = private(
            on_meta(a), on_meta(b), scale_a=on_meta(scale_a), scale_b=on_meta(scale_b),
            out_dtype=out_dtype,
        )  # fmt: skip
        assert actual.shape == (a.shape[0], b.shape[1])
        return compute(a, b, scale_a, scale_b, None, out_dtype)

    if request.param == "scaled_mm":
        monkeypatch.setattr(torch.nn.functional, "scaled_mm", public)
    else:
        monkeypatch.delattr(torch.nn.functional, "scaled_mm")
        monkeypatch.setattr(torch, "_scaled_mm", old)
    return calls


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_accepts_the_arguments_and_the_product_is_right(shape, dtype, torch_here):
    M, N, K = shape
    quantized_input, (qdata, scale), bias = operands(M, N, K, dtype)
    padded, bare = (qdata, scale), (qdata[:N].contiguous(), scale)  # rows without their padding
    for weight in (padded, bare):
        for added in (None, bias):
            actual = torch_mx.matmul(quantized_input, weight, added, dtype, M, N)
            assert actual.is_contiguous() and actual.shape == (M, N)
            assert_within_bound(actual, quantized_input, padded, added, dtype)


@pytest.mark.parametrize(("M", "N"), [(0, 64), (64, 0), (0, 0)])
def test_torch_is_given_no_empty_matrix(M, N, torch_here):
    quantized_input, weight, _ = operands(32, 64, 64)
    out = torch_mx.matmul(quantized_input, weight, None, torch.bfloat16, M, N)
    assert (out.shape, out.dtype, torch_here) == ((M, N), torch.bfloat16, [])


@pytest.fixture
def blackwell(prefer):
    """`torch_mx` chosen for the CPU, with nothing else changed about it."""
    prefer("torch_mx")


@pytest.mark.parametrize("shape", [(70, 100), (5, 13, 100), (2, 3, 12, 100)], ids=str)
def test_a_linear_of_any_rank_is_within_the_bound(shape, torch_here, blackwell):
    """Neither rows, N nor K is a multiple of 128, and the weight has padding in both."""
    x, bias = normal(*shape, seed=5).bfloat16(), normal(70, seed=6).bfloat16()
    weight = reference.quantize(normal(70, 100, seed=7))
    actual = kernels.linear(x, *weight, bias, shape=(70, 100), precision="fast")
    flat = x.reshape(-1, 100)
    if len(flat) > 64:
        assert torch_here == [((layout.round_up(len(flat), 32), 128), (128, 96))]
    assert actual.shape == (*shape[:-1], 70)
    quantized_input = reference.quantize(flat)
    assert_within_bound(actual.reshape(-1, 70), quantized_input, weight, bias, torch.bfloat16)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64)], ids=str)
def test_a_linear_without_rows_multiplies_nothing(shape, torch_here, blackwell):
    weight = reference.quantize(normal(33, 64))
    out = kernels.linear(torch.empty(shape), *weight, shape=(33, 64), precision="fast")
    assert (out.shape, torch_here) == ((*shape[:-1], 33), [])


def test_131072_rows_are_one_matmul(torch_here, blackwell, monkeypatch):
    """By the shapes alone: the arithmetic of so many is left to a card."""
    rows = 1 << 17
    monkeypatch.setattr(
        reference, "block_matmul", lambda a, b, bias, dtype, M, N: torch.zeros(M, N, dtype=dtype)
    )
    x, weight = normal(rows, 32).bfloat16(), reference.quantize(normal(32, 32))
    out = kernels.linear(x, *weight, shape=(32, 32), precision="fast")
    assert torch_here == [((rows, 32), (32, 32))] and out.shape == (rows, 32)
    exact = kernels.linear(x, *weight, shape=(32, 32), precision="exact")
    dense = reference.dequantize_exact(*weight, 32, 32)
    expected = x.double() @ dense.t()
    size = x.double().abs() @ dense.abs().t()
    error = (exact.double() - expected).abs()
    assert (error <= 34 * 2.0**-24 * size + 2.0**-7 * expected.abs()).all()
