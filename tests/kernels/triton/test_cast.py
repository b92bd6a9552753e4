"""Triton's quantize and dequantize: the oracle's bits, for whatever a matrix may hold."""

from __future__ import annotations

import pytest
import torch
from arithmetic import all_magnitudes

from mxfp8.kernels import layout
from mxfp8.kernels.backends import reference
from mxfp8.kernels.backends.triton import cast

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 1), (3, 31), (33, 100), (129, 128), (128, 257), (257, 384))


def same(actual, expected) -> bool:
    """Equal values; a NaN is a NaN."""
    actual, expected = actual.cpu().float(), expected.float()
    return bool(((actual == expected) | (actual.isnan() & expected.isnan())).all())


def check_quantize(x, device):
    actual = cast.quantize(x.to(device))
    for got, expected in zip(actual, reference.quantize(x), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_has_the_bits_of_the_oracle(shape, dtype, decoding, device):
    check_quantize(all_magnitudes(*shape, dtype), device)


def test_quantize_takes_any_strides(decoding, device):
    x = all_magnitudes(257, 200, torch.bfloat16)
    check_quantize(x.t(), device)
    check_quantize(x[3::2, 1:98], device)
    check_quantize(x[:1].expand(40, 200), device)


def test_quantize_rounds_every_float_of_16_bits_as_the_oracle(decoding, device):
    """Each beside a value that sets the scale: all codes, ties and subnormals come up."""
    for dtype in (torch.float16, torch.bfloat16):
        bits = torch.arange(1 << 16).to(torch.int32).to(torch.int16)
        x = bits.view(dtype)
        x = x[x.isfinite() & (x.abs() < 2.0**16) & (x.abs() > 2.0**-20)]
        x = x[: len(x) // 31 * 31].view(-1, 31)
        scale = x.abs().amax(-1, keepdim=True)
        check_quantize(torch.cat([scale, x], 1)[:: 2 if dtype == torch.float16 else 1], device)


def test_the_scale_steps_where_the_mantissa_passes_448(decoding, device):
    edge = torch.tensor([448.0, 447.99997, 448.00003, 896.0, 896.0001, 1.75, 1.7500001])
    check_quantize(edge.repeat_interleave(32).view(1, -1), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_has_the_bits_of_the_oracle_for_every_code_and_scale(dtype, decoding, device):
    code = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    byte = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 8)
    stored = code.view(torch.float8_e4m3fn), layout.tile(byte.contiguous())
    actual = cast.dequantize(*(part.to(device) for part in stored), dtype, 256, 256)
    assert same(actual, reference.dequantize(*stored, dtype, 256, 256))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_leaves_padding_out(shape, dtype, decoding, device):
    stored = reference.quantize(all_magnitudes(*shape, torch.float32))
    on_device = [part.to(device) for part in stored]
    out = torch.full(shape, 77.0, dtype=dtype, device=device)
    actual = cast.dequantize(*on_device, dtype, *shape, out=out)
    assert actual is out
    assert same(actual, reference.dequantize(*stored, dtype, *shape))


def test_rows_may_be_stored_without_padding(device):
    qdata, scale = reference.quantize(all_magnitudes(33, 64, torch.float32))
    stored = qdata[:33].contiguous().to(device), scale.to(device)
    actual = cast.dequantize(*stored, torch.float32, 33, 64)
    assert same(actual, reference.dequantize(qdata, scale, torch.float32, 33, 64))


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0)])
def test_empty_matrices_are_no_trouble(shape, device):
    qdata, scale = cast.quantize(torch.empty(shape, device=device))
    assert (tuple(qdata.shape), tuple(scale.shape)) == (
        layout.padded_shape(*shape), layout.scale_shape(*shape),
    )  # fmt: skip
    assert cast.dequantize(qdata, scale, torch.float32, *shape).shape == shape
