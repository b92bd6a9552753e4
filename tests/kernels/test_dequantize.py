"""Dequantizing: every code with every scale, exactly, and the error of a round trip."""

import pytest
import torch
from launches import Launches

from mxfp8 import kernels
from mxfp8.kernels import layout
from mxfp8.kernels.backends import eager, reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
CODES = torch.arange(256, dtype=torch.uint8)


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def every_code_and_scale():
    """Row r holds the 256 codes, each block with scale byte r."""
    qdata = CODES.expand(256, 256).contiguous()
    return qdata, layout.tile(CODES[:, None].expand(256, 8))


def assert_same_bits(got, expected):
    """The same dtype, shape, NaN positions and, elsewhere, bits: -0.0 is not 0.0."""
    assert got.dtype == expected.dtype
    bad = expected.isnan()
    assert torch.equal(got.isnan(), bad)
    bits = [value.masked_fill(bad, 0).view(BITS[value.dtype]) for value in (got, expected)]
    assert torch.equal(*bits)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_code_with_every_scale(dtype):
    qdata, scale = every_code_and_scale()
    got = kernels.dequantize(qdata, scale, dtype)
    assert_same_bits(got, reference.dequantize(qdata, scale, dtype, 256, 256))
    assert got[:255].isnan().nonzero()[:, 1].unique().tolist() == [0x7F, 0xFF]
    assert got[255].isnan().all()


@pytest.mark.parametrize(
    ("code", "scale", "value"),
    [
        (0x38, 127, 1.0),
        (0xB8, 127, -1.0),
        (0x7E, 127, 448.0),
        (0x01, 127, 2.0**-9),
        (0x07, 127, 7 * 2.0**-9),
        (0x08, 127, 2.0**-6),
        (0x38, 0, 2.0**-127),
        (0x01, 0, 2.0**-136),
        (0x38, 254, 2.0**127),
        (0x7E, 254, torch.inf),  # 448 * 2**127 is above every float32
        (0x80, 127, -0.0),
        (0x80, 0, -0.0),
        (0x7F, 127, torch.nan),
        (0xFF, 0, torch.nan),
        (0x00, 255, torch.nan),
    ],
)
@pytest.mark.parametrize("dequantize", [eager.dequantize, reference.dequantize])
def test_values_worked_out_by_hand(dequantize, code, scale, value):
    qdata = torch.full((32, 32), code, dtype=torch.uint8)
    scales = torch.full((128, 4), scale, dtype=torch.uint8)
    expected = torch.full((32, 32), value)
    assert_same_bits(dequantize(qdata, scales, torch.float32, 32, 32), expected)


@pytest.mark.parametrize("chunk", [1, 32, 96, 1000])
@pytest.mark.parametrize("shape", [(67, 130), (3, 300), (130, 1), (1, 33)])
def test_chunks_do_not_show(chunk, shape, monkeypatch):
    qdata, scale = reference.quantize(numbers(*shape))
    monkeypatch.setattr(eager, "_CPU_CHUNK", chunk)
    got = eager.dequantize(qdata, scale, torch.float32, *shape)
    assert_same_bits(got, reference.dequantize(qdata, scale, torch.float32, *shape))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """`eager` decodes by torch's casts, as it does on CUDA and ROCm."""
    monkeypatch.setattr(eager, "_decode_by_bits", eager._decode_by_cast)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_gpu_decodes_every_code_with_every_scale(dtype, as_on_a_gpu):
    qdata, scale = every_code_and_scale()
    got = eager.dequantize(qdata, scale, dtype, 256, 256)
    assert_same_bits(got, reference.dequantize(qdata, scale, dtype, 256, 256))


@pytest.mark.parametrize("shape", [(67, 130), (3, 300), (130, 1), (1, 33), (64, 96), (0, 32)])
def test_a_gpu_decodes_any_shape_and_slab(shape, as_on_a_gpu):
    rows, cols = shape
    qdata, scale = reference.quantize(numbers(*shape))
    expected = reference.dequantize(qdata, scale, torch.bfloat16, *shape)
    got = eager.dequantize(qdata, scale, torch.bfloat16, *shape)
    assert got.is_contiguous()
    assert_same_bits(got, expected)
    slab = torch.empty(rows - rows // 2, cols)
    row_major = layout.untile(scale, qdata.shape[0], qdata.shape[1] // layout.BLOCK)
    eager.dequantize_rows(qdata, row_major, slab, rows // 2)
    assert_same_bits(slab, expected[rows // 2 :].float() if rows else slab)


@pytest.mark.parametrize(("cols", "launches"), [(512, 4), (500, 5)])
def test_a_gpu_decodes_in_few_launches(cols, launches, as_on_a_gpu):
    qdata, scale = reference.quantize(numbers(256, cols))
    with Launches() as count:
        eager.dequantize(qdata, scale, torch.bfloat16, 256, cols)
    assert count.names == ["clone", "copy_", "_to_copy", "mul_", "copy_"][:launches]
    assert count.bytes < (8 if cols == 512 else 12) * 256 * 512


def test_scale_bytes_decode_to_powers_of_two():
    assert_same_bits(eager.decode_e8m0(CODES), reference.decode_e8m0(CODES).float())
    assert_same_bits(eager.decode_e8m0(CODES), CODES.view(torch.float8_e8m0fnu).float())


@pytest.mark.parametrize("data", [torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("scales", [torch.uint8, torch.float8_e8m0fnu], ids=str)
def test_bytes_and_float8_mean_the_same(data, scales):
    qdata, scale = every_code_and_scale()
    got = kernels.dequantize(qdata.view(data), scale.view(scales), torch.bfloat16)
    assert_same_bits(got, kernels.dequantize(qdata, scale, torch.bfloat16))


@pytest.mark.parametrize("shape", [(33, 70), (64, 96), (64, 65), (33, 96), [40, 80]])
def test_shape_cuts_the_padding_off(shape):
    qdata, scale = kernels.quantize(numbers(64, 96))
    whole = kernels.dequantize(qdata, scale, torch.float32)
    assert whole.shape == (64, 96)
    rows, cols = shape
    got = kernels.dequantize(qdata, scale, torch.float32, shape)
    assert_same_bits(got, whole[:rows, :cols])


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0)])
def test_an_empty_matrix_stays_empty(shape):
    stored = reference.quantize(torch.empty(shape))
    assert kernels.dequantize(*stored, torch.float32, shape).shape == shape


def test_stored_matrices_may_have_any_strides():
    qdata, scale = kernels.quantize(numbers(64, 96))
    wide = torch.zeros(64, 192, dtype=torch.uint8)
    wide[:, ::2] = qdata.view(torch.uint8)
    column_major = scale.t().contiguous().t()
    got = kernels.dequantize(wide[:, ::2], column_major, torch.float32)
    assert_same_bits(got, kernels.dequantize(qdata, scale, torch.float32))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        *((torch.float32, size) for size in (1.0, 1e-3, 1e-35, 1e-37, 1e30)),
        *((torch.float16, size) for size in (1.0, 1e-3, 1e4)),
        *((torch.bfloat16, size) for size in (1.0, 1e-3, 1e-35, 1e30)),
    ],
    ids=str,
)
def test_a_round_trip_is_off_by_half_a_spacing_at_most(dtype, size):
    """E4M3 values y = x / s lie 2**(max(E, -6) - 3) apart, E the exponent of y, and rounding to
    nearest is off by half of that at most. No block saturates, so this holds for the largest."""
    x = (numbers(65, 257) * size).to(dtype)
    qdata, scale = kernels.quantize(x)
    rows, cols = qdata.shape
    unit = reference.decode_e8m0(layout.untile(scale, rows, cols // 32))
    unit = unit.repeat_interleave(32, 1)[: x.shape[0], : x.shape[1]]
    _, exponent = torch.frexp(x.double() / unit)  # |y| in [2**(exponent-1), 2**exponent)
    spacing = torch.exp2((exponent - 1).clamp(min=-6).double() - 3)
    back = kernels.dequantize(qdata, scale, torch.float32, x.shape)
    error = (back.double() - x.double()).abs() / unit / spacing
    assert 0.4 < error.max() <= 0.5


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_rows_stored_without_padding_decode_alike(backend):
    qdata, scale = kernels.quantize(numbers(65, 257))
    with kernels.use_backend(backend):
        padded = kernels.dequantize(qdata, scale, torch.float32, (65, 257))
        assert_same_bits(kernels.dequantize(qdata[:65], scale, torch.float32, (65, 257)), padded)
        x = numbers(3, 257)
        expected = kernels.linear(x, qdata, scale, shape=(65, 257))
        assert_same_bits(kernels.linear(x, qdata[:65], scale, shape=(65, 257)), expected)


def zeros(*shape, dtype=torch.uint8):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("qdata", "scale", "dtype", "shape", "message"),
    [
        (zeros(32), zeros(128, 4), torch.float32, None, r"MXFP8 data has shape \[32\]"),
        (zeros(32, 33), zeros(128, 4), torch.float32, None, "columns a multiple of 32"),
        (zeros(32, 32), zeros(32, 1), torch.float32, None, r"scales have shape \[32, 1\]"),
        (zeros(32, 32), zeros(128, 4), torch.float32, (32, 33), r"\[32, 33\] pads to \[32, 64\]"),
        (zeros(32, 32), zeros(128, 4), torch.float64, None, "not torch.float64"),
        (zeros(32, 32), zeros(128, 4), torch.float8_e4m3fn, None, "not torch.float8_e4m3fn"),
        (
            zeros(32, 32, dtype=torch.int8),
            zeros(128, 4),
            torch.float32,
            None,
            "qdata is torch.int8; it must be one of float8_e4m3fn, uint8",
        ),
        (
            zeros(32, 32),
            zeros(128, 4, dtype=torch.float32),
            torch.float32,
            None,
            "scale is torch.float32; it must be one of uint8, float8_e8m0fnu",
        ),
        (
            zeros(32, 32),
            zeros(128, 4).to("meta"),
            torch.float32,
            None,
            "the scales are on meta, the data on cpu",
        ),
    ],
)
def test_what_is_no_mxfp8_matrix_is_refused(qdata, scale, dtype, shape, message):
    with pytest.raises(ValueError, match=message):
        kernels.dequantize(qdata, scale, dtype, shape)
