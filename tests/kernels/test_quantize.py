"""Quantizing: the oracle against the specification, and the fast path against the oracle."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mxfp8 import kernels
from mxfp8.kernels import layout, sqnr
from mxfp8.kernels.backends import eager, reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bit_patterns(*shape, dtype=torch.float32, seed=0):
    """Random bits as floats: every exponent, subnormals, and now and then NaN or Inf."""
    info = torch.iinfo(BITS[dtype])
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(info.min, info.max + 1, shape, generator=generator, dtype=BITS[dtype])
    return bits.view(dtype)


def blocks_led_by(values):
    """One block of 32 per value: the value, and zeros."""
    x = torch.zeros(len(values), 32)
    x[:, 0] = torch.as_tensor(values)
    return x


def stored(x):
    """What eager.quantize makes of x: codes [M', K'] and row-major scale bytes [M', K'/32]."""
    qdata, scale = eager.quantize(x)
    code = qdata.view(torch.uint8)
    return code, layout.untile(scale, code.shape[0], code.shape[1] // 32)


def assert_bits_of_the_oracle(x):
    (qdata, scale), (expected, expected_scale) = eager.quantize(x), reference.quantize(x)
    assert (qdata.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.uint8)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(qdata.view(torch.uint8), expected.view(torch.uint8))


def every_scale_boundary():
    """For each exponent, magnitudes at and beside 1.75 * 2**n (where 448 is) and powers of two."""
    exponent = torch.arange(255, dtype=torch.int32)[:, None] << 23
    mantissa = torch.tensor([0, 1, 0x5FFFFF, 0x600000, 0x600001, 0x7FFFFF], dtype=torch.int32)
    return (exponent + mantissa).flatten()


def every_tie():
    """Blocks of scale 1 holding the midpoints between neighboring codes and their neighbors."""
    magnitude = reference.e4m3_magnitudes()
    middle = ((magnitude[1:] + magnitude[:-1]) / 2).float()
    infinity = torch.tensor(torch.inf)
    values = torch.cat([middle, middle.nextafter(infinity), middle.nextafter(-infinity)])
    values = torch.cat([values, -values])
    values = torch.nn.functional.pad(values, (0, -len(values) % 31)).reshape(-1, 31)
    return torch.cat([torch.full((len(values), 1), 448.0), values], 1)


def test_the_oracle_decodes_e4m3_as_torch_does():
    code = torch.arange(256, dtype=torch.uint8)
    expected = code.view(torch.float8_e4m3fn).double()
    value = reference.decode_e4m3(code)
    assert torch.equal(value.nan_to_num(1e9), expected.nan_to_num(1e9))
    assert torch.equal(value.signbit()[:255], expected.signbit()[:255])


def test_the_oracle_rounds_ties_to_even_as_torch_does():
    x = every_tie()
    expected = x.to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(reference.encode_e4m3(x.double()), expected)


def test_the_oracle_rounds_the_scale_up():
    bits = every_scale_boundary()
    _, scale = reference.quantize(blocks_led_by(bits.view(torch.float32)))
    rule = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).int()
    rule = torch.where(bits == 0, 0, rule.clamp(1, 254))  # byte 0 is for zero blocks only
    assert torch.equal(layout.untile(scale, len(bits), 1).flatten(), rule.to(torch.uint8))


@pytest.mark.parametrize(
    ("first", "second", "scale", "codes"),
    [
        (448.0, 1.0, 127, (0x7E, 0x38)),
        (-448.0, -1.0, 127, (0xFE, 0xB8)),
        (224.0, -0.0, 126, (0x7E, 0x80)),
        (449.0, 1.0, 128, (0x76, 0x30)),
        (1.0, 2.0**-17, 119, (0x78, 0x01)),
        (1.0, 2.0**-18, 119, (0x78, 0x00)),  # half the smallest code, tied to 0
        (1.0, -(2.0**-20), 119, (0x78, 0x80)),
        (0.0, -0.0, 0, (0, 0)),
        (2.0**-118, 0.0, 1, (0x78, 0)),
        (2.0**-126, -(2.0**-149), 1, (0x38, 0x80)),
        (2.0**-149, 0.0, 1, (0, 0)),
        (3.4028234663852886e38, 0.0, 247, (0x78, 0)),
        (torch.inf, 1.0, 255, (0, 0)),
        (-torch.inf, 1.0, 255, (0, 0)),
        (torch.nan, 1.0, 255, (0, 0)),
        (torch.nan, torch.inf, 255, (0, 0)),
    ],
)
@pytest.mark.parametrize("quantize", [eager.quantize, reference.quantize])
def test_blocks_worked_out_by_hand(quantize, first, second, scale, codes):
    x = torch.zeros(1, 32)
    x[0, 3], x[0, 20] = first, second
    qdata, scales = quantize(x)
    expected = torch.zeros(32, 32, dtype=torch.uint8)
    expected[0, 3], expected[0, 20] = codes
    assert torch.equal(qdata.view(torch.uint8), expected)
    assert scales.flatten().tolist() == [scale] + [0] * 511


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 31, 33, 127, 129])
@pytest.mark.parametrize("cols", [0, 1, 31, 33, 127, 129])
def test_any_size_in_any_dtype(rows, cols, dtype):
    assert_bits_of_the_oracle(numbers(rows, cols, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["transposed", "sliced", "strided", "expanded", "column"])
def test_any_strides(name, dtype):
    x = {
        "transposed": numbers(70, 40).t(),
        "sliced": numbers(50, 90)[5:45, 7:77],
        "strided": numbers(80, 140)[::2, ::2],
        "expanded": numbers(1, 70).expand(40, 70),
        "column": numbers(40, 1).expand(40, 70),
    }[name].to(dtype)
    assert x.shape == (40, 70)
    assert_bits_of_the_oracle(x)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_random_bit_patterns(dtype):
    assert_bits_of_the_oracle(bit_patterns(257, 96, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("largest", [1.0, 1.75, 2.0**-14, 60000.0])
def test_every_value_of_16_bits_beside_a_larger_one(dtype, largest):
    """Fewer bits take a shorter way; here it meets all of them, under four scales."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = values[values.abs() <= largest]
    values = torch.nn.functional.pad(values, (0, -len(values) % 31)).reshape(-1, 31)
    leader = torch.full((len(values), 1), largest, dtype=dtype)
    assert_bits_of_the_oracle(torch.cat([leader, values], 1))


@pytest.mark.parametrize("sign", [1, -1])
def test_scale_boundaries_at_every_exponent(sign):
    assert_bits_of_the_oracle(sign * blocks_led_by(every_scale_boundary().view(torch.float32)))


@pytest.mark.parametrize("exponent", [0, 100, -100, -126])
def test_ties_go_to_even_whatever_the_scale(exponent):
    assert_bits_of_the_oracle(every_tie() * 2.0**exponent)


@pytest.mark.parametrize("exponent", [-110, -118, -119, -126, -135, -149])
def test_tiny_and_subnormal_blocks(exponent):
    assert_bits_of_the_oracle(numbers(40, 70) * 2.0**exponent)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_bad_value_spoils_its_block_only(value, dtype):
    x = numbers(33, 100, dtype=dtype)
    x[7, 40] = value
    code, scale = stored(x)
    good_code, good_scale = stored(numbers(33, 100, dtype=dtype))
    good_code[7, 32:64], good_scale[7, 1] = 0, 0xFF
    assert torch.equal(code, good_code)
    assert torch.equal(scale, good_scale)


@pytest.mark.parametrize("chunk", [1, 32, 96, 1000, 4096])
@pytest.mark.parametrize("shape", [(67, 130), (3, 300), (130, 1), (1, 33)])
def test_chunks_do_not_show(chunk, shape, monkeypatch):
    monkeypatch.setattr(eager, "_CPU_CHUNK", chunk)
    assert_bits_of_the_oracle(numbers(*shape))
    assert_bits_of_the_oracle(bit_patterns(*shape))


@pytest.mark.parametrize("chunk", [1, 32, 100, 4096])
@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0), (7, 32), (50, 96), (3, 1024)])
def test_spans_cover_a_matrix_once(chunk, shape):
    seen = torch.zeros(shape)
    for r0, r1, c0, c1 in eager._spans(*shape, chunk):
        assert 0 < (r1 - r0) * (c1 - c0) <= max(chunk, 32)
        seen[r0:r1, c0:c1] += 1
    assert torch.equal(seen, torch.ones(shape))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_block_saturates_and_none_wastes_its_range(dtype):
    x = bit_patterns(256, 256, dtype=dtype, seed=1).nan_to_num(1, 1, 1)
    x[::5] = 0
    code, scale = stored(x)
    size = x.double().reshape(256, 8, 32).abs().amax(-1)
    unit = torch.exp2(scale.double() - 127)
    largest = reference.decode_e4m3(code).abs().reshape(256, 8, 32).amax(-1)  # NaN codes: NaN
    nonzero, clamped = size > 0, size < 2.0**-118
    assert scale.max() <= 254
    assert (size <= 448 * unit).all()
    assert (largest <= 448).all()
    assert (largest >= 224)[nonzero & ~clamped].all()
    assert (size > 224 * unit)[nonzero & ~clamped].all()  # half the scale would saturate
    assert torch.equal(scale[clamped], nonzero[clamped].to(torch.uint8))


def energy_by_oracle(x):
    """Signal and noise per block in float64, from what the oracle stores."""
    qdata, scale = reference.quantize(x)
    value = reference.dequantize_exact(qdata, scale, x.shape[0], qdata.shape[1])
    wide = torch.zeros_like(value)
    wide[:, : x.shape[1]] = x.double()
    return [part.square().reshape(len(x), -1, 32).sum(-1) for part in (wide, value - wide)]


@pytest.mark.parametrize("size", [1.0, 1e-37, 1e-30, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("measured", ["while quantizing", "afterwards"])
def test_energy_is_that_of_float64(measured, dtype, size):
    """32 squares rounded and added in float32 are off by less than 64 * 2**-24 of their sum."""
    x = (numbers(33, 70) * size).to(dtype)
    qdata, scale = eager.quantize(x)
    if measured == "while quantizing":
        got_qdata, got_scale, *energy = kernels.quantize_and_measure(x)
        assert torch.equal(got_qdata.view(torch.uint8), qdata.view(torch.uint8))
        assert torch.equal(got_scale, scale)
    else:
        energy = kernels.signal_and_noise(x, qdata, scale)
    for got, expected in zip(energy, energy_by_oracle(x), strict=True):
        assert (got.dtype, got.shape) == (torch.float64, (33, 3))
        assert ((got - expected).abs() / expected).max() <= 2.0**-18


def test_energy_of_bad_blocks_is_nan_and_of_zero_blocks_zero():
    x = numbers(4, 96)
    x[0, 0], x[1, 40], x[2, 64:] = torch.nan, torch.inf, 0
    expected = torch.zeros(4, 3, dtype=torch.bool)
    expected[0, 0] = expected[1, 1] = True
    for energy in kernels.quantize_and_measure(x)[2:]:
        assert torch.equal(energy.isnan(), expected)
        assert energy[2, 2] == 0


def test_energy_does_not_depend_on_chunks_or_slabs(monkeypatch):
    x = numbers(300, 130)
    whole = kernels.quantize_and_measure(x)
    after = kernels.signal_and_noise(x, *whole[:2])
    monkeypatch.setattr(eager, "_CPU_CHUNK", 96)
    monkeypatch.setattr(sqnr, "_SLAB", 1)
    assert all(map(torch.equal, kernels.quantize_and_measure(x)[2:], whole[2:]))
    assert all(map(torch.equal, kernels.signal_and_noise(x, *whole[:2]), after))


@pytest.mark.parametrize("quantize", [kernels.quantize, kernels.quantize_and_measure])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(32), r"x has shape \[32\]; .* 2-D"),
        (torch.zeros(2, 3, 32), r"x has shape \[2, 3, 32\]; .* 2-D"),
        (torch.zeros(32, 32, dtype=torch.float64), "x is torch.float64; it must be one of float32"),
        (torch.zeros(32, 32, dtype=torch.int8), "x is torch.int8; it must be one of float32"),
        (torch.zeros(32, 32).to(torch.float8_e4m3fn), "x is torch.float8_e4m3fn"),
    ],
)
def test_what_cannot_be_quantized_is_refused(quantize, x, message):
    with pytest.raises(ValueError, match=message):
        quantize(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_s_own_weight_is_quantized(dtype):
    """A parameter, whose gradient autograd would record on the way."""
    weight = torch.nn.Parameter(torch.randn(40, 70).to(dtype))
    expected = reference.quantize(weight.detach())
    measured = kernels.quantize_and_measure(weight)
    for got in (kernels.quantize(weight), measured):
        assert not any(part.requires_grad for part in got)
        for part, wanted in zip(got, expected, strict=False):
            assert torch.equal(part.view(torch.uint8), wanted.view(torch.uint8))
    energies = kernels.signal_and_noise(weight, *expected)
    for ours, wanted in zip(measured[2:], energies, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=0)


def test_the_public_op_gives_the_bits_of_the_oracle():
    x = bit_patterns(70, 130)
    (qdata, scale), (expected, expected_scale) = kernels.quantize(x), reference.quantize(x)
    assert torch.equal(qdata.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("shape", [(33, 70), (0, 64), (128, 128)])
def test_values_are_never_inspected(shape):
    with FakeTensorMode():
        qdata, scale = kernels.quantize(torch.empty(shape, dtype=torch.bfloat16))
    assert (qdata.shape, qdata.dtype) == (layout.padded_shape(*shape), torch.float8_e4m3fn)
    assert (scale.shape, scale.dtype) == (layout.scale_shape(*shape), torch.uint8)
