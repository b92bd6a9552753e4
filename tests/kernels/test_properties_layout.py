"""What holds for every size: the tiled order of scales, padding and slabs."""

from __future__ import annotations

import pytest
import torch
from arithmetic import scale_offset
from hypothesis import given, settings
from hypothesis import strategies as st

from mxfp8 import kernels
from mxfp8.kernels import layout

QUICK = settings(max_examples=100)


def numbered(rows: int, cols: int) -> torch.Tensor:
    """Bytes 1 to 251, neighbors all different, along rows and columns of tiles too."""
    return (torch.arange(rows * cols) % 251 + 1).to(torch.uint8).reshape(rows, cols)


@QUICK
@given(st.integers(0, 400), st.integers(0, 14))
def test_every_scale_is_at_the_published_offset_and_the_rest_is_zero(rows, cols):
    scale = numbered(rows, cols)
    flat = layout.tile(scale).flatten()
    expected = [0] * len(flat)
    for row, values in enumerate(scale.tolist()):
        for col, value in enumerate(values):
            expected[scale_offset(row, col, cols)] = value
    assert flat.tolist() == expected
    assert torch.equal(layout.untile(layout.tile(scale), rows, cols), scale)


@QUICK
@given(st.integers(0, 3), st.integers(0, 4))
def test_whole_tiles_come_back_as_they_were(row_tiles, col_tiles):
    tiled = numbered(row_tiles * 128, col_tiles * 4)
    assert torch.equal(layout.tile(layout.untile(tiled, *tiled.shape)), tiled)


@settings(QUICK, max_examples=30)
@given(st.integers(1, 600), st.integers(1, 70), st.integers(0, 1 << 14))
def test_slabs_of_a_matrix_quantize_to_slabs_of_the_file(rows, cols, size):
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    qdata, scale = kernels.quantize(x)
    spans = list(layout.slabs(rows, cols, size))
    assert [span[0] for span in spans] == [0, *(span[1] for span in spans[:-1])]
    assert spans[-1][1] == rows
    found = [kernels.quantize(x[first:last]) for first, last in spans]
    codes = torch.cat([q.view(torch.uint8) for q, _ in found])
    assert torch.equal(codes, qdata.view(torch.uint8))
    assert torch.equal(torch.cat([s for _, s in found]), scale)


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
