"""torch's row-wise FP8 matmul against the oracle, on a CPU, where newer versions of torch have it.

With others this file is not collected (`tests/conftest.py`); `tests/release/test_versions.py` runs
it with the newest. The function is the one that GPUs use; their kernels are others, which
`bench/gpu` checks.
"""

from __future__ import annotations

import functools

import pytest
import torch

from mxfp8.kernels import dispatch
from mxfp8.kernels.backends import fp8_rowwise, reference

ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
oracle = functools.partial(reference.matmul, "rowwise_fp8", "rowwise_fp8")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def largest(codes, scale):
    """The operand with every value positive."""
    return codes.float().abs().to(codes.dtype), scale


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 96, 32), (33, 70, 100), (128, 96, 256), (65, 40, 4096)]
)
def test_the_product_is_the_oracle_s(M, N, K, dtype):
    """Summed in float32 in any order, and rounded once with the bias."""
    x, weight = normal(M, K, seed=1).to(dtype), normal(N, K, seed=2)
    weight *= torch.exp2(torch.arange(N) % 16 - 8.0)[:, None]
    x[0] *= 2.0**-8
    a, b = reference.quantize_rowwise(x), reference.to_rowwise(*reference.quantize(weight))
    for bias in (None, normal(N, seed=3).to(dtype)):
        actual = fp8_rowwise.matmul_by_torch(a, b, bias, dtype, N)
        expected = oracle(a, b, bias, torch.float64, N)
        terms = oracle(
            largest(*a), largest(*b), None if bias is None else bias.abs(), torch.float64, N
        )
        assert (actual.dtype, actual.shape) == (dtype, (M, N))
        bound = expected.abs() * ROUNDING[dtype] + SMALLEST[dtype] / 2 + terms * (K + 3) * 2.0**-24
        assert ((actual.double() - expected).abs() <= bound).all()


def test_nan_stays_in_its_row_and_its_column():
    x, weight = normal(4, 64), normal(32, 64)
    x[1, 5], weight[7, 3] = torch.inf, torch.nan
    a, b = reference.quantize_rowwise(x), reference.to_rowwise(*reference.quantize(weight))
    out = fp8_rowwise.matmul_by_torch(a, b, None, torch.bfloat16, 32)
    expected = torch.zeros(4, 32, dtype=torch.bool)
    expected[1] = expected[:, 7] = True
    assert torch.equal(out.isnan(), expected)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_it_passes_its_self_test(dtype):
    assert dispatch.named("torch_fp8").test(torch.device("cpu"), dtype) is None
