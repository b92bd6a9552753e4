"""Offsets beyond 2**31 values: rows so far apart in a storage that is never touched in between.

Its pages are given out when they are written, so that 13 GB of addresses cost a few kilobytes. On a
GPU the storage is memory, and half of it has to be free.
"""

from __future__ import annotations

import pytest
import torch

from mxfp8.kernels.backends import reference
from mxfp8.kernels.backends.triton import cast, int8, rowwise, w8a16

APART = (1 << 31) + 96  # values from one row to the next


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture
def spread(device):
    """spread(x): the rows of x, APART values from each other."""

    def copy(x):
        rows, cols = x.shape
        size = (rows - 1) * APART + cols
        if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 2.5 * size:
            pytest.skip(f"needs {2.5 * size / 1e9:.0f} GB of free GPU memory")
        far = torch.empty(size, dtype=x.dtype, device=device).as_strided((rows, cols), (APART, 1))
        return far.copy_(x)

    return copy


def test_quantize_reads_rows_beyond_two_billion_values(spread):
    x = normal(4, 96)
    actual = cast.quantize(spread(x))
    for got, expected in zip(actual, reference.quantize(x), strict=True):
        assert torch.equal(got.cpu().view(torch.uint8), expected.view(torch.uint8))


def test_quantize_reads_columns_beyond_two_billion_values(spread):
    x = normal(3, 40)
    actual = cast.quantize(spread(x).t())
    for got, expected in zip(actual, reference.quantize(x.t()), strict=True):
        assert torch.equal(got.cpu().view(torch.uint8), expected.view(torch.uint8))


def test_quantize_rowwise_reads_beyond_two_billion_values(spread):
    x = normal(4, 96)
    codes, scale = rowwise.quantize_rowwise(spread(x))
    expected = reference.quantize_rowwise(x)
    assert torch.equal(codes.cpu().view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(scale.cpu(), expected[1])


def test_quantize_rotated_reads_beyond_two_billion_values(spread):
    x = normal(4, 96)
    codes, scale = int8.quantize_input(spread(x))
    near = int8.quantize_input(x.to(codes.device))
    assert torch.equal(codes, near[0]) and torch.equal(scale, near[1]) and codes.any(1).all()


def test_few_rows_are_read_beyond_two_billion_values(spread, device):
    x, stored = normal(4, 96), reference.quantize(normal(40, 96, seed=1))
    actual = w8a16.linear(spread(x), *(part.to(device) for part in stored), None, 40, 96)
    near = w8a16.linear(x.to(device), *(part.to(device) for part in stored), None, 40, 96)
    assert torch.equal(actual, near) and actual.abs().sum() > 0
