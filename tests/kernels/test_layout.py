"""The tiled order of scales against its formula, padding, and slabs."""

import pytest
import torch
from arithmetic import scale_offset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mxfp8 import kernels
from mxfp8.kernels import layout

QUICK = settings(max_examples=100)


def numbered(rows: int, cols: int) -> torch.Tensor:
    """Bytes 1 to 251, neighbors all different, along rows and columns of tiles too."""
    return (torch.arange(rows * cols) % 251 + 1).to(torch.uint8).reshape(rows, cols)


@QUICK
@given(st.integers(0, 400), st.integers(0, 14))
@example(0, 4)
@example(128, 0)
@example(31, 3)
@example(129, 4)
@example(256, 8)
def test_every_scale_is_at_the_published_offset_and_the_rest_is_zero(rows, cols):
    scale = numbered(rows, cols)
    tiled = layout.tile(scale)
    assert tuple(tiled.shape) == (-(-rows // 128) * 128, -(-cols // 4) * 4)
    expected = [0] * tiled.numel()
    for row, values in enumerate(scale.tolist()):
        for col, value in enumerate(values):
            expected[scale_offset(row, col, cols)] = value
    assert tiled.flatten().tolist() == expected
    assert torch.equal(layout.untile(tiled, rows, cols), scale)


@QUICK
@given(st.integers(0, 3), st.integers(0, 4))
def test_whole_tiles_come_back_as_they_were(row_tiles, col_tiles):
    tiled = numbered(row_tiles * 128, col_tiles * 4)
    assert torch.equal(layout.tile(layout.untile(tiled, *tiled.shape)), tiled)


def test_tile_takes_any_strides():
    matrix = numbered(8, 132).t()
    assert torch.equal(layout.tile(matrix), layout.tile(matrix.contiguous()))


def test_128_rows_are_a_slab_of_the_tiled_order():
    matrix = numbered(300, 6)
    assert torch.equal(layout.tile(matrix)[128:256], layout.tile(matrix[128:256]))


@settings(QUICK, max_examples=30)
@given(st.integers(1, 600), st.integers(1, 70), st.integers(0, 1 << 14))
def test_slabs_of_a_matrix_quantize_to_slabs_of_the_file(rows, cols, size):
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    qdata, scale = kernels.quantize(x)
    spans = list(layout.slabs(rows, cols, size))
    assert [span[0] for span in spans] == [0, *(span[1] for span in spans[:-1])]
    assert spans[-1][1] == rows
    parts = [kernels.quantize(x[first:last]) for first, last in spans]
    codes = torch.cat([q.view(torch.uint8) for q, _ in parts])
    assert torch.equal(codes, qdata.view(torch.uint8))
    assert torch.equal(torch.cat([s for _, s in parts]), scale)


@QUICK
@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_shapes_are_the_next_multiples(rows, cols):
    (data_rows, data_cols), (scale_rows, scale_cols) = (
        layout.padded_shape(rows, cols), layout.scale_shape(rows, cols))  # fmt: skip
    assert (data_rows % 32, data_cols % 32, scale_rows % 128, scale_cols % 4) == (0, 0, 0, 0)
    assert 0 <= data_rows - rows < 32
    assert 0 <= data_cols - cols < 32
    assert 0 <= scale_rows - data_rows < 128
    assert 0 <= scale_cols - data_cols // 32 < 4
    assert layout.true_shape((data_rows, data_cols), (rows, cols)) == (rows, cols)
    layout.check_scale((data_rows, data_cols), (scale_rows, scale_cols))
    with pytest.raises(ValueError):
        layout.check_scale((data_rows, data_cols), (scale_rows + 128, scale_cols))


@pytest.mark.parametrize(
    ("shape", "data", "scales"),
    [
        ((1, 1), (32, 32), (128, 4)),
        ((128, 128), (128, 128), (128, 4)),
        ((129, 129), (160, 160), (256, 8)),
        ((64, 4096), (64, 4096), (128, 128)),
        ((0, 33), (0, 64), (0, 4)),
        ((5, 0), (32, 0), (128, 0)),
    ],
)
def test_padded_shapes(shape, data, scales):
    assert layout.padded_shape(*shape) == data
    assert layout.scale_shape(*shape) == scales
    assert layout.scale_shape(*data) == scales


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (1, 32), (32, 32), (33, 64)])
def test_round_up(value, expected):
    assert layout.round_up(value, 32) == expected


def test_true_shape_is_the_stored_one_unless_given():
    assert layout.true_shape([64, 96]) == (64, 96)
    assert layout.true_shape([64, 96], [33, 65]) == (33, 65)


def test_rows_may_be_stored_without_their_padding():
    assert layout.true_shape([33, 96]) == (33, 96)
    assert layout.true_shape([33, 96], [33, 65]) == (33, 65)
    with pytest.raises(ValueError, match=r"pads to \[64, 96\], but the data has shape \[33, 96\]"):
        layout.true_shape([33, 96], [34, 65])


@pytest.mark.parametrize("stored", [(32,), (32, 32, 32), (32, 40)])
def test_data_that_is_no_padded_matrix_is_refused(stored):
    with pytest.raises(ValueError, match="must be 2-D with columns a multiple of 32"):
        layout.true_shape(stored)


@pytest.mark.parametrize("shape", [(32, 96), (65, 96), (64, 64), (64, 97)])
def test_a_shape_that_does_not_pad_to_the_data_is_refused(shape):
    message = rf"shape \[{shape[0]}, {shape[1]}\] pads to .*, but the data has shape \[64, 96\]"
    with pytest.raises(ValueError, match=message):
        layout.true_shape((64, 96), shape)


@pytest.mark.parametrize("shape", [(), (64,), (64, 96, 1)])
def test_a_shape_that_is_no_pair_is_refused(shape):
    with pytest.raises(ValueError):
        layout.true_shape((64, 96), shape)


@pytest.mark.parametrize("size", [(64, 3), (128, 3), (64, 4), (256, 4), (512,), (128, 4, 1)])
def test_scales_of_another_shape_are_refused(size):
    with pytest.raises(ValueError, match=r"data of shape \[64, 96\] needs \[128, 4\]"):
        layout.check_scale((64, 96), size)
