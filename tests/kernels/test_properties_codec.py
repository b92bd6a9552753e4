"""What holds for every matrix that is quantized: the codec, against arithmetic with fractions."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import torch
from arithmetic import BLOCK, MAGNITUDES, block_by_hand, magnitude, nearest, power, scale_offset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mxfp8 import kernels
from mxfp8.kernels import layout
from mxfp8.kernels.backends import reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
QUICK = settings(max_examples=100)

# ---- any values --------------------------------------------------------------------------------


def bits(value: int) -> float:
    """The float32 of a pattern of 32 bits."""
    return torch.tensor(value - 2**31, dtype=torch.int32).view(torch.float32).item()


def edge(size: Fraction, exponent: int, step: int, sign: int) -> float:
    """A float32 at, just above or just below size * 2**exponent."""
    value = torch.tensor(float(size * power(exponent)), dtype=torch.float32)
    return sign * value.nextafter(torch.tensor(step * torch.inf) if step else value).item()


MIDPOINTS = [(a + b) / 2 for a, b in pairwise(MAGNITUDES)]
anything = st.one_of(
    st.floats(width=32),
    st.floats(-4, 4, width=32),
    st.builds(bits, st.integers(0, 2**32 - 1)),
    st.builds(
        edge,
        st.sampled_from([*MIDPOINTS, *MAGNITUDES]),
        st.integers(-140, 110),
        st.sampled_from([-1, 0, 1]),
        st.sampled_from([-1, 1]),
    ),
)
# Binary exponents far enough from the ends of float32 that products with 2**-40..2**40 are exact.
moderate = st.builds(
    lambda m, e: float(m * power(e)), st.integers(-(2**24), 2**24), st.integers(-50, 20)
)


@st.composite
def matrices(draw, values=anything, rows=3, cols=70, dtypes=FLOATS):
    """[rows, cols], at least [1, 1]; a few values of interest among few others."""
    shape = draw(st.integers(1, rows)), draw(st.integers(1, cols))
    size = shape[0] * shape[1]
    found = draw(st.lists(values, min_size=1, max_size=min(size, 40)))
    places = draw(st.randoms(use_true_random=False))
    flat = [places.choice(found) for _ in range(size)]
    return torch.tensor(flat).reshape(shape).to(draw(st.sampled_from(dtypes)))


def normal(rows: int, cols: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parts(x) -> tuple[torch.Tensor, torch.Tensor]:
    """What `kernels.quantize` makes of x: codes [M', K'] and row-major bytes [M', K'/32]."""
    qdata, scale = kernels.quantize(x)
    code = qdata.view(torch.uint8)
    return code, layout.untile(scale, code.shape[0], code.shape[1] // BLOCK)


def value_of(x) -> torch.Tensor:
    return kernels.dequantize(*kernels.quantize(x), torch.float32, x.shape)


# ---- the codec ---------------------------------------------------------------------------------


@QUICK
@given(st.integers(0, 255))
def test_every_code_decodes_to_its_fraction_and_back(code):
    value = reference.decode_e4m3(torch.tensor([code], dtype=torch.uint8))
    if code & 0x7F == 0x7F:
        assert value.isnan().all()
        return
    assert abs(Fraction(value.item())) == magnitude(code & 0x7F)
    assert value.signbit().item() == (code >= 0x80)
    assert reference.encode_e4m3(value).item() == code


@QUICK
@given(st.lists(st.floats(-448, 448), min_size=1, max_size=64))
def test_encoding_takes_the_nearest_value_and_of_two_the_even_code(values):
    x = torch.tensor(values, dtype=torch.float64)
    expected = [nearest(abs(Fraction(v))) for v in values]
    code = reference.encode_e4m3(x)
    assert (code & 0x7F).tolist() == expected
    assert torch.equal(code >= 0x80, x.signbit())


@QUICK
@given(matrices())
@example(torch.full((1, 1), 2.0**-149))
@example(torch.full((1, 1), 448.0).nextafter(torch.tensor(torch.inf)))
def test_a_matrix_becomes_what_arithmetic_says_at_the_published_places(x):
    rows, cols = x.shape
    qdata, scale = kernels.quantize(x)
    blocks = -(-cols // BLOCK)
    code, flat = qdata.view(torch.uint8), scale.flatten().tolist()
    expected = torch.zeros(-(-rows // 32) * 32, blocks * BLOCK, dtype=torch.uint8)
    expected_flat = [0] * (-(-rows // 128) * -(-blocks // 4) * 512)
    for row in range(rows):
        for block in range(blocks):
            values = x[row, block * BLOCK : (block + 1) * BLOCK].tolist()
            byte, codes = block_by_hand(values)
            expected[row, block * BLOCK : block * BLOCK + len(codes)] = torch.tensor(codes)
            expected_flat[scale_offset(row, block, blocks)] = byte
    assert torch.equal(code, expected)
    assert flat == expected_flat
    oracle, oracle_scale = reference.quantize(x)
    assert torch.equal(oracle.view(torch.uint8), expected)
    assert oracle_scale.flatten().tolist() == expected_flat


@QUICK
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.binary(min_size=96, max_size=96),
    st.binary(min_size=9, max_size=9),
    st.sampled_from(FLOATS),
)
def test_stored_bytes_decode_to_the_product_of_code_and_scale(rows, blocks, codes, bytes_, dtype):
    codes = list(codes[: blocks * BLOCK])
    code = torch.tensor(codes, dtype=torch.uint8).repeat(rows, 1)
    scale = torch.zeros(layout.scale_shape(rows, len(codes)), dtype=torch.uint8)
    expected = []
    for row in range(rows):
        for col, c in enumerate(codes):
            byte = bytes_[row * blocks + col // BLOCK]
            scale.view(-1)[scale_offset(row, col // BLOCK, blocks)] = byte
            if byte == 255 or c & 0x7F == 0x7F:
                expected.append(float("nan"))
                continue
            value = float(magnitude(c & 0x7F) * power(byte - 127))
            expected.append(-value if c >= 0x80 else value)
    wanted = torch.tensor(expected, dtype=torch.float64).reshape(rows, -1).to(dtype)
    got = kernels.dequantize(code, scale, dtype)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(0, 9e3, -9e3), wanted.nan_to_num(0, 9e3, -9e3))
    assert torch.equal(got.signbit() & ~got.isnan(), wanted.signbit() & ~wanted.isnan())


@QUICK
@given(matrices(st.floats(-(2.0**127), 2.0**127, width=32)))
def test_what_is_stored_is_stored_again_without_loss(x):
    """A largest code of 224 becomes 448 under half the scale; after that not a bit changes."""
    x = x.float().clamp(-(2.0**127), 2.0**127)
    once = value_of(x)
    again = value_of(once)
    assert torch.equal(once, again)
    code, scale = parts(once)
    code_again, scale_again = parts(again)
    assert torch.equal(code_again, code)
    assert torch.equal(scale_again, scale)


@QUICK
@given(matrices(anything, cols=100))
def test_an_error_is_half_the_distance_of_its_neighbors_at_most(x):
    code, scale = parts(x)
    rows, cols = x.shape
    blocks = scale[:rows].repeat_interleave(BLOCK, 1)[:, :cols]
    good = blocks != 0xFF
    unit = torch.exp2(blocks.double() - 127)
    scaled = torch.where(good, x.double() / unit, 0.0)
    stored = reference.decode_e4m3(code[:rows, :cols])
    _, exponent = torch.frexp(scaled)  # |scaled| in [2**(e-1), 2**e)
    spacing = torch.exp2((exponent - 1).clamp_min(-6).double() - 3)
    assert ((scaled - stored).abs()[good] <= (spacing / 2)[good]).all()


@QUICK
@given(matrices(moderate, dtypes=(torch.float32,)), st.integers(-40, 40))
def test_a_power_of_two_moves_scale_bytes_alone(x, shift):
    code, scale = parts(x)
    moved_code, moved_scale = parts(x * 2.0**shift)
    assert torch.equal(moved_code, code)
    assert torch.equal(moved_scale.int(), torch.where(scale > 0, scale.int() + shift, 0))


@QUICK
@given(matrices())
def test_the_sign_is_a_bit_of_the_code(x):
    code, scale = parts(x)
    negated, negated_scale = parts(-x)
    rows, cols = x.shape
    used = ((scale > 0) & (scale < 0xFF)).repeat_interleave(BLOCK, 1)
    used[rows:], used[:, cols:] = False, False
    assert torch.equal(negated, torch.where(used, code ^ 0x80, 0))
    assert torch.equal(negated_scale, scale)


@QUICK
@given(st.integers(1, 300), st.integers(1, 100), st.sampled_from(FLOATS), st.randoms())
def test_rows_change_places_with_their_codes_and_scales(rows, cols, dtype, places):
    x = normal(rows, cols, rows, dtype)
    order = list(range(rows))
    places.shuffle(order)
    code, scale = parts(x)
    moved_code, moved_scale = parts(x[order])
    assert torch.equal(moved_code[:rows], code[order])
    assert torch.equal(moved_scale[:rows], scale[order])


@QUICK
@given(matrices(rows=5, cols=130), st.data())
def test_a_block_depends_on_its_own_values_alone(x, data):
    """NaN and infinity included, on either side."""
    row = data.draw(st.integers(0, x.shape[0] - 1))
    block = data.draw(st.integers(0, (x.shape[1] - 1) // BLOCK))
    span = slice(block * BLOCK, min((block + 1) * BLOCK, x.shape[1]))
    other = x.clone()
    size = span.stop - span.start
    other[row, span] = torch.tensor(data.draw(st.lists(anything, min_size=size, max_size=size)))
    code, scale = parts(x)
    other_code, other_scale = parts(other)
    for found in (code, other_code):
        found[row, block * BLOCK : (block + 1) * BLOCK] = 0
    for found in (scale, other_scale):
        found[row, block] = 0
    assert torch.equal(other_code, code)
    assert torch.equal(other_scale, scale)


@QUICK
@given(matrices(rows=6, cols=90), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_strides_do_not_show(x, row_step, col_step, transposed):
    view = (x.t() if transposed else x)[::row_step, ::col_step]
    whole = view.clone(memory_format=torch.contiguous_format)
    for expected in (kernels.quantize(whole), reference.quantize(view)):
        for got, wanted in zip(kernels.quantize(view), expected, strict=True):
            assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))
