"""Block-scaled matmul in Triton against the oracle of activations and weights in MXFP8."""

from __future__ import annotations

import pytest
import torch

from mxfp8.kernels import device_facts
from mxfp8.kernels.backends import reference
from mxfp8.kernels.backends.triton import cast, mx

SUMMING = 2.0**-16  # of a sum, as a share of the sum of its terms' sizes; see `hardware` below
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return (x * torch.exp2(torch.randn(shape[0], generator=generator) * 2)[:, None]).to(dtype)


def operands(M, N, K, dtype):
    """x, the stored weight, a bias, and the float64 values of both stored forms."""
    x, stored = normal(M, K, seed=1, dtype=dtype), reference.quantize(normal(N, K, seed=2) / K**0.5)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(3)).to(dtype)
    x_values = reference.dequantize_exact(*reference.quantize(x), M, K)
    return x, stored, bias, x_values, reference.dequantize_exact(*stored, N, K)


def linear(x, stored, bias, N):
    """The matmul, with activations quantized by Triton wherever this runs."""
    return mx.matmul(cast.quantize(x), stored, bias, x.dtype, len(x), N)


def within_bound(actual, x, stored, bias) -> bool:
    """Within what any implementation may be off, by `reference.block_bound`."""
    bound = reference.block_bound(reference.quantize(x), stored, bias, actual.dtype, *actual.shape)
    return bool(((actual.cpu().double() - bound[0]).abs() <= bound[1]).all())


def close(actual, x_values, weight, bias) -> bool:
    expected = x_values @ weight.t() + (0 if bias is None else bias.double())
    size = x_values.abs() @ weight.abs().t()
    allowed = expected.abs() * ROUNDING[actual.dtype] + size * SUMMING + 1e-7
    return bool(((actual.cpu().double() - expected).abs() <= allowed).all())


@pytest.fixture(params=["sm_100", "sm_120"])
def card(request, device, monkeypatch):
    """Tiles by TMA and by pointers, whatever the interpreter runs on."""
    if device_facts.interpreted():
        major = int(request.param[3:5])
        monkeypatch.setattr(mx, "capability", lambda _: (major, 0))
    elif (device_facts.capability(device)[0] < 12) != (request.param == "sm_100"):
        pytest.skip(f"needs {request.param}")
    elif device_facts.capability(device)[0] < 10:
        pytest.skip("this card has no block-scaled tensor cores")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(1, 33, 100), (17, 256, 256), (64, 130, 160), (65, 70, 31), (200, 300, 416), (257, 129, 128)],
)
def test_the_product_is_that_of_the_oracle(M, N, K, dtype, card, device):
    x, stored, bias, x_values, weight = operands(M, N, K, dtype)
    on_device = [part.to(device) for part in stored]
    for added in (None, bias):
        given = None if added is None else added.to(device)
        actual = linear(x.to(device), on_device, given, N)
        assert actual.dtype == dtype and actual.shape == (M, N)
        assert close(actual, x_values, weight, added)
        assert within_bound(actual, x, stored, added)


@pytest.mark.parametrize("M", [3, 100])
def test_rows_may_be_stored_without_padding(M, card, device):
    x, (qdata, scale), _, x_values, weight = operands(M, 33, 96, torch.float32)
    stored = qdata[:33].contiguous().to(device), scale.to(device)
    actual = linear(x.to(device), stored, None, 33)
    assert close(actual, x_values, weight, None)


def test_no_rows_are_no_trouble(card, device):
    _, stored, bias, *_ = operands(1, 64, 64, torch.float32)
    stored = [part.to(device) for part in stored]
    empty = torch.empty(0, 64, device=device)
    assert linear(empty, stored, bias.to(device), 64).shape == (0, 64)
