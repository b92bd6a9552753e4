"""Rotated INT8: the oracle's bits, and the plain-torch backend against it."""

from __future__ import annotations

import pytest
import torch
from arithmetic import all_magnitudes
from comfy_kitchen.backends.eager import quantization as kitchen

from mxfp8.kernels.backends import reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
GROUPS = {768: 256, 3840: 256, 384: 64, 320: 64, 32: 16, 96: 16, 2592: 16}  # K -> group


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy(*shape, seed=0):
    """Student's t with 3 degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)
    squares = torch.randn(3, *shape, generator=generator).square().mean(0)
    return torch.randn(shape, generator=generator) / squares.sqrt()


def relative(actual, expected) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


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
    out = reference.rotated_int8_matmul((codes, scale), weight, None, torch.float32, 20)
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
    error = relative(reference.rotated_int8_matmul(*pair, None, torch.float32, 64), exact)
    assert 0.008 < error < 0.015
