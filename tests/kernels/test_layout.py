"""The tiled scale order against its formula, and padding."""

import pytest
import torch

from mxfp8.kernels import layout

SHAPES = [(1, 1), (32, 1), (31, 3), (128, 4), (127, 5), (129, 4), (256, 8), (300, 13)]


def numbered(rows, cols):
    """A matrix of distinct numbers, none of them 0."""
    return torch.arange(1, rows * cols + 1, dtype=torch.int32).reshape(rows, cols)


def tiled_by_formula(matrix):
    """The tiled order written out, byte by byte, as cuBLAS documents it."""
    rows, cols = matrix.shape
    column_tiles = -(-cols // 4)
    flat = [0] * (-(-rows // 128) * column_tiles * 512)
    for r in range(rows):
        for c in range(cols):
            offset = ((r // 128) * column_tiles + c // 4) * 512
            offset += (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
            flat[offset] = int(matrix[r, c])
    return torch.tensor(flat, dtype=matrix.dtype)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_tile_follows_the_formula_and_pads_with_zeros(rows, cols):
    matrix = numbered(rows, cols)
    tiled = layout.tile(matrix)
    assert torch.equal(tiled.flatten(), tiled_by_formula(matrix))
    assert tuple(tiled.shape) == (-(-rows // 128) * 128, -(-cols // 4) * 4)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_untile_inverts_tile(rows, cols):
    matrix = numbered(rows, cols)
    assert torch.equal(layout.untile(layout.tile(matrix), rows, cols), matrix)


def test_tile_inverts_untile_on_whole_tiles():
    tiled = numbered(256, 12)
    assert torch.equal(layout.tile(layout.untile(tiled, 256, 12)), tiled)


def test_tile_takes_any_strides():
    matrix = numbered(8, 132).t()
    assert torch.equal(layout.tile(matrix), layout.tile(matrix.contiguous()))


def test_128_rows_are_a_slab_of_the_tiled_order():
    matrix = numbered(300, 6)
    assert torch.equal(layout.tile(matrix)[128:256], layout.tile(matrix[128:256]))


@pytest.mark.parametrize("shape", [(0, 4), (128, 0), (0, 0)])
def test_an_empty_matrix_stays_empty(shape):
    assert layout.tile(torch.empty(shape)).shape == shape
    assert layout.untile(torch.empty(shape), *shape).shape == shape


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


def test_scales_of_the_right_shape_are_taken():
    assert layout.check_scale((64, 96), torch.Size([128, 4])) is None
