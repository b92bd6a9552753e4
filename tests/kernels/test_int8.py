"""Rotated INT8: the oracle's bits, and the plain-torch backend against it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from arithmetic import all_magnitudes
from comfy_kitchen.backends.eager import quantization as kitchen
from distributions import heavy, normal

from mxfp8 import kernels
from mxfp8.kernels import sqnr
from mxfp8.kernels.backends import int8, reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
GROUPS = {768: 256, 3840: 256, 384: 64, 320: 64, 32: 16, 96: 16, 2592: 16}  # K -> group


def relative(actual, expected) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


product = partial(reference.matmul, "rotated_int8", "rotated_int8")  # in float64, rounded once


# ---- the oracle ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 64, 256])
def test_the_rotation_is_that_of_comfy_kitchen(size):
    matrix = reference.hadamard(size)
    assert torch.equal(matrix, kitchen._build_hadamard(size, dtype=torch.float64))
    assert torch.equal(matrix @ matrix, torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("K", GROUPS)
def test_groups_divide_k_and_rotating_twice_changes_nothing(K):
    assert reference.group(K) == GROUPS[K]
    x = normal(3, K).double()
    torch.testing.assert_close(reference.rotate(reference.rotate(x)), x, rtol=0, atol=1e-14)


@pytest.mark.parametrize("K", [256, 384, 96])
@pytest.mark.parametrize("kind", [normal, heavy])
def test_rotated_values_get_the_bits_of_comfy_kitchen(kind, K):
    x = kind(64, K) * torch.exp2(torch.arange(64.0) * 2 - 100)[:, None]  # some scales at 1e-30
    x[7] = 0
    codes, scale = reference.quantize_rotated_int8(x)
    expected, expected_scale = kitchen.quantize_int8_rowwise(reference.rotate(x).float())
    assert torch.equal(codes, expected)
    assert torch.equal(scale, expected_scale.squeeze(-1))


@pytest.mark.parametrize("K", [512, 384, 96])
def test_weights_differ_from_comfy_kitchen_by_ties_alone(K):
    """It sums a group in float32, in an order of its own."""
    qdata, scale = reference.quantize(heavy(64, K, seed=K))
    codes, row_scale = reference.to_rotated_int8(qdata, scale)
    weight = reference.dequantize(qdata, scale, torch.float32, 64, K)
    expected, expected_scale = kitchen.quantize_int8_convrot_weight(weight, reference.group(K))
    torch.testing.assert_close(row_scale, expected_scale.squeeze(-1), rtol=3e-7, atol=0)
    rotated = reference.rotate(weight) / row_scale.double()[:, None]
    off = codes != expected
    tie = (rotated - rotated.trunc()).abs()[off] - 0.5
    assert (tie.abs() < 1e-4).all() and off.double().mean() < 1e-3


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_that_is_not_finite_is_nan_and_the_others_stay(dtype):
    x = all_magnitudes(6, 64, dtype).nan_to_num(1.0, 1.0, 1.0)
    x[1, 5], x[2, 6], x[3, 7] = torch.nan, torch.inf, -torch.inf
    x[4] = 0
    codes, scale = reference.quantize_rotated_int8(x)
    assert scale.isnan().tolist() == [False, True, True, True, False, False]
    assert not codes[1:5].any() and codes[0].any()
    assert scale[4] == torch.tensor(1e-30)
    weight = reference.to_rotated_int8(*reference.quantize(normal(32, 64)))
    out = product((codes, scale), weight, None, torch.float32, 20)
    assert out.shape == (6, 20)
    assert out.isnan().all(-1).tolist() == scale.isnan().tolist()
    assert not out[4].any()


def test_a_weight_with_a_nan_is_nan_in_that_row_alone():
    weight = normal(32, 64)
    weight[3, 40] = torch.nan  # its block of 32
    codes, scale = reference.to_rotated_int8(*reference.quantize(weight))
    assert scale.isnan().nonzero().flatten().tolist() == [3]
    assert not codes[3].any()


@pytest.mark.parametrize("K", [768, 384])
def test_the_error_is_that_of_rounding_to_eight_bits(K):
    """0.29 steps of amax / 127 for either factor; amax is about 3.5 standard deviations."""
    x, weight = normal(50, K, seed=1), normal(64, K, seed=2)
    stored = reference.quantize(weight)
    exact = x.double() @ reference.dequantize_exact(*stored, 64, K).t()
    pair = reference.quantize_rotated_int8(x), reference.to_rotated_int8(*stored)
    error = relative(product(*pair, None, torch.float32, 64), exact)
    assert 0.008 < error < 0.015


# ---- plain torch -----------------------------------------------------------------------------


def multiply(x, stored, bias, N) -> torch.Tensor:
    return int8.matmul(int8.quantize_input(x), int8.prepare_weight(*stored), bias, x.dtype, N)


def exact(x, stored, bias, N) -> torch.Tensor:
    """float64, from the weight as it is stored."""
    weight = reference.dequantize_exact(*stored, N, x.shape[1])
    product = x.double() @ weight.t()
    return product if bias is None else product + bias.double()


def blocks_of_all_scales(N, K):
    """Blocks from E8M0's smallest scale on, in each row 64 powers of two wide."""
    powers = torch.arange(N * K // 32).view(N, K // 32) % 64 + torch.arange(N)[:, None] - 130
    return normal(N, K) * torch.exp2(powers.float()).repeat_interleave(32, 1)


def blocks_at_the_limit(N, K):
    """Blocks of +-448 next to blocks of zeros."""
    return 448.0 * normal(N, K).sign() * (torch.arange(K) // 32 % 2)


@pytest.mark.parametrize("K", GROUPS)
@pytest.mark.parametrize("kind", [normal, heavy, blocks_of_all_scales, blocks_at_the_limit])
def test_a_prepared_weight_differs_from_the_oracle_by_ties_alone(kind, K):
    stored = reference.quantize(kind(70, K))
    codes, scale = int8.prepare_weight(*stored)
    expected, expected_scale = reference.to_rotated_int8(*stored)
    assert codes.is_contiguous() and codes.dtype == torch.int8
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    off = codes.int() - expected.int()
    assert off.abs().max() <= 1 and off.ne(0).double().mean() < 1e-3


def test_a_weight_is_prepared_in_slabs_with_the_bits_of_the_whole(monkeypatch):
    stored = reference.quantize(normal(200, 384))
    stored[1][3, 2] = 0xFF  # a block that is NaN
    whole = int8.prepare_weight(*stored)
    monkeypatch.setattr(int8, "_CHUNK", 37 * 384)
    parts = int8.prepare_weight(*stored)
    assert whole[1].isnan().sum() == 1
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("K", GROUPS)
@pytest.mark.parametrize("kind", [normal, heavy])
def test_a_quantized_input_is_that_of_the_oracle_within_its_rounding(kind, K, dtype):
    """In bfloat16 a rotated value is rounded by at most 2**-9 of it, once: half a code at 127."""
    x = kind(33, K).to(dtype)
    x[5], x[7, 3], x[8, 4] = 0, torch.nan, torch.inf
    codes, scale = int8.quantize_input(x)
    expected, expected_scale = reference.quantize_rotated_int8(x)
    assert scale.isnan().nonzero().flatten().tolist() == [7, 8]
    assert not codes[[5, 7, 8]].any()
    rounding = 2.0**-8 if int8._rotation_dtype(x) == torch.bfloat16 else 1e-6
    torch.testing.assert_close(scale, expected_scale, rtol=rounding, atol=0, equal_nan=True)
    off = (codes.int() - expected.int()).abs()
    assert off.max() <= 1
    if rounding == 1e-6:
        assert off.double().mean() < 1e-3


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", [normal, heavy])
def test_rounding_rotated_values_to_bfloat16_adds_little(kind, dtype):
    x, stored = kind(200, 768, seed=1).to(dtype), reference.quantize(normal(96, 768, seed=2))
    expected = exact(x, stored, None, 96)
    weight = int8.prepare_weight(*stored)
    ours = int8.matmul(int8.quantize_input(x), weight, None, torch.float32, 96)
    oracle = int8.matmul(reference.quantize_rotated_int8(x), weight, None, torch.float32, 96)
    ratio = relative(ours, expected) / relative(oracle, expected)
    assert ratio < 1.03  # 1.0000 in float32 and float16


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [None, 0], ids=["", "bias"])
@pytest.mark.parametrize(
    "M, N, K",
    [
        (1, 1, 32),
        (1, 33, 384),
        (2, 40, 256),
        (7, 70, 96),
        (64, 31, 768),
        (1100, 1000, 64),
        (0, 9, 64),
    ],
)
def test_the_matmul_is_that_of_the_oracle(M, N, K, bias, dtype):
    bias = None if bias is None else normal(N, seed=3).to(dtype)
    x, stored = normal(M, K, seed=1).to(dtype), reference.quantize(normal(N, K, seed=2))
    pair = int8.quantize_input(x), int8.prepare_weight(*stored)
    out = int8.matmul(*pair, bias, dtype, N)
    assert out.shape == (M, N) and out.dtype == dtype and out.is_contiguous()
    expected = product(*pair, bias, torch.float64, N)
    size = product(*pair, None, torch.float64, N).abs() + expected.abs()
    bound = 2.0**-22 * size + torch.finfo(dtype).eps / 2 * expected.abs() + 2.0**-24
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("bias", [None, 0], ids=["", "bias"])
@pytest.mark.parametrize("N, K", [(1, 32), (33, 384), (70, 96), (256, 1024)])
def test_one_row_is_rotated_but_not_quantized(N, K, bias):
    """It rounds rotated values, the sum and the result to bfloat16, and is nearer to exact."""
    bias = None if bias is None else normal(N, seed=3).bfloat16()
    x, stored = normal(1, K, seed=1).bfloat16(), reference.quantize(normal(N, K, seed=2))
    prepared = int8.prepare_weight(*stored)
    out = int8.matmul_one_row((x,), prepared, bias, torch.bfloat16, N)
    assert out.shape == (1, N) and out.dtype == torch.bfloat16
    rotated = (reference.rotate(x),)
    expected = reference.matmul("rotated_int8", None, rotated, prepared, bias, torch.float64, N)
    code, scale = prepared
    terms = rotated[0].abs() @ (code.double().abs() * scale.double()[:, None])[:N].t()
    assert ((out.double() - expected).abs() <= 2.0**-8 * (terms + expected.abs())).all()
    x[0, 0] = torch.nan
    assert int8.matmul_one_row((x,), prepared, bias, torch.bfloat16, N).isnan().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("make", [normal, heavy])
def test_the_error_is_below_two_thirds_of_that_of_mxfp8_inputs(make, dtype):
    x, weight = make(96, 768, seed=1).to(dtype), make(128, 768, seed=2)
    x[:, ::100] *= 30  # outlying channels
    stored = reference.quantize(weight)
    expected = exact(x, stored, None, 128)
    error = relative(multiply(x, stored, None, 128), expected)
    quantized = reference.quantize(x)
    native = reference.matmul("stored", "mxfp8", quantized, stored, None, dtype, 128)
    native = relative(native, expected)
    assert error < 0.6 * native


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_and_small_values_neither_overflow_nor_vanish(dtype):
    """In float16, 65504 times a group of 256 would overflow anywhere but in float32."""
    x, stored = normal(5, 512).to(dtype), reference.quantize(normal(32, 512, seed=1) / 512)
    x[0], x[1] = 60000, torch.where(x[1] > 0, 60000, -60000)
    x[2] *= 1e-4
    expected = exact(x, stored, None, 32)
    assert expected.abs().max() < 65504
    out = multiply(x, stored, None, 32).double()
    assert ((out - expected).norm(dim=-1) < 0.02 * expected.norm(dim=-1)).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_strides_and_modes_change_nothing(mode):
    x, stored = normal(20, 256, seed=1).bfloat16(), reference.quantize(normal(40, 256))
    expected = multiply(x, stored, None, 40)
    wide = torch.empty(20, 300).bfloat16()
    wide[:, 20:276] = x
    for strided in (x.t().contiguous().t(), wide[:, 20:276], torch.stack([x, x], 1)[:, 0]):
        with mode():
            assert torch.equal(multiply(strided, stored, None, 40), expected)


def test_products_are_right_on_the_smallest_tiles(monkeypatch):
    x, stored = normal(50, 256, seed=1), reference.quantize(normal(96, 256))
    bias = normal(90)
    expected = multiply(x, stored, bias, 90)
    monkeypatch.setattr(int8, "_TALLEST", 64)
    monkeypatch.setattr(int8, "_TILE", 16 * 20)
    assert torch.equal(multiply(x, stored, bias, 90), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("M", [1, 7, 100])
def test_a_gpu_has_the_bits_of_the_cpu(M, dtype):
    x, stored = normal(M, 768).to(dtype), reference.quantize(heavy(70, 768, seed=1))
    quantized, prepared = reference.quantize_rotated_int8(x), reference.to_rotated_int8(*stored)
    for ours, oracle in (
        (int8.quantize_input(x.cuda()), quantized),
        (int8.prepare_weight(*(t.cuda() for t in stored)), prepared),
    ):
        torch.testing.assert_close(ours[1].cpu(), oracle[1], rtol=1e-6, atol=0)
        off = (ours[0].cpu().int() - oracle[0].int()).abs()
        assert off.max() <= 1 and off.double().mean() < 1e-3


# ---- what a form changes ---------------------------------------------------------------------


@pytest.mark.parametrize("form", ["rotated_int8", "rowwise_fp8"])
def test_the_change_of_a_weight_is_measured(form, monkeypatch):
    """Of rows whose blocks differ by up to 2**20, in one slab and in several."""
    factor = torch.exp2(-20 * torch.rand(200, 8, generator=torch.Generator().manual_seed(1)))
    weight = normal(200, 256) * factor.repeat_interleave(32, 1)
    qdata, scale = reference.quantize(weight)
    prepare = {
        "rotated_int8": reference.to_rotated_int8, "rowwise_fp8": reference.to_rowwise,
    }[form]  # fmt: skip
    code, row_scale = prepare(qdata, scale)
    value = code.double() * row_scale.double()[:, None]
    if form == "rotated_int8":
        value = reference.rotate(value)
    exact = reference.dequantize_exact(qdata, scale, 224, 256)
    wanted = relative(value, exact)
    assert wanted > 1e-7
    for slab in (1 << 22, 1):
        monkeypatch.setattr(sqnr, "_SLAB", slab)
        change = kernels.weight_change(qdata, scale, (code, row_scale), form)
        assert change == pytest.approx(wanted, rel=1e-2)


def test_a_form_does_not_change_a_zero_weight():
    qdata, scale = reference.quantize(torch.zeros(40, 64))
    prepared = reference.to_rotated_int8(qdata, scale)
    assert kernels.weight_change(qdata, scale, prepared, "rotated_int8") == 0
