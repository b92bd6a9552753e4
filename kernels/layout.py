"""The MXFP8 format's constants and shapes: block size, scale encoding, padding, tiled scale order.

The one place that defines the constants of the specification. It needs no torch, so a checkpoint's
header can be checked without it; `tile` and `untile` use only tensor methods.

Sources: OCP Microscaling Formats (MX) v1.0 (block of 32, E4M3 elements, E8M0 scales) and cuBLAS
"1D block scaling factors layout" (the order of the scales in memory,
https://docs.nvidia.com/cuda/cublas/index.html#d-block-scaling-factors-layout).

The tiled order, for row r and block column c of a matrix with `ncb = ceil(K' / 32 / 4)`:

    byte = ((r // 128) * ncb + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4

Every 128 rows x 4 block columns form one 512-byte tile, so a slab of 128 rows is contiguous. If
N' % 128 == 0 and K' / 32 % 4 == 0 the tiled tensor has the shape of a row-major one, so the shape
does not tell the two apart.
"""

from __future__ import annotations

BLOCK = 32  # values along K that share one scale
ROW_PAD = 32  # stored rows are padded to a multiple of this, as columns are of BLOCK
TILE_ROWS = 128  # rows in one tile of scales
TILE_COLS = 4  # block columns in one tile of scales

E8M0_BIAS = 127  # a scale byte e stands for 2**(e - 127)
E8M0_NAN = 0xFF
E8M0_MAX = 254


def round_up(value: int, multiple: int) -> int:
    """`value` rounded up to a multiple."""
    return -(-value // multiple) * multiple


def padded_shape(rows: int, cols: int) -> tuple[int, int]:
    """Stored shape (N', K') of the data of an [N, K] matrix."""
    return round_up(rows, ROW_PAD), round_up(cols, BLOCK)


def scale_shape(rows: int, cols: int) -> tuple[int, int]:
    """Stored shape of the tiled scales of an [N, K] matrix, padded or not."""
    padded_rows, padded_cols = padded_shape(rows, cols)
    return round_up(padded_rows, TILE_ROWS), round_up(padded_cols // BLOCK, TILE_COLS)


def slabs(rows: int, cols: int, size: int):
    """Spans (first, last) of rows: whole tiles, at most about `size` values each.

    The data and the tiled scales of a span are contiguous in memory and on disk.
    """
    height = max(TILE_ROWS, size // max(cols, 1) // TILE_ROWS * TILE_ROWS)
    for first in range(0, rows, height):
        yield first, min(rows, first + height)


def tile(scale):
    """Row-major scales [R, C] -> tiled order [roundup(R, 128), roundup(C, 4)], padding bytes 0."""
    rows, cols = scale.shape
    row_tiles, col_tiles = -(-rows // TILE_ROWS), -(-cols // TILE_COLS)
    shape = (row_tiles * TILE_ROWS, col_tiles * TILE_COLS)
    if shape != (rows, cols):
        padded = scale.new_zeros(shape)
        padded[:rows, :cols] = scale
        scale = padded
    # [row tile, r // 32, r % 32, col tile, c % 4] -> [row tile, col tile, r % 32, r // 32, c % 4]
    scale = scale.reshape(row_tiles, 4, 32, col_tiles, TILE_COLS).permute(0, 3, 2, 1, 4)
    return scale.reshape(shape)


def untile(scale, rows: int, cols: int):
    """Tiled scales -> row-major [rows, cols]; the inverse of `tile`, cut to the given size."""
    row_tiles, col_tiles = scale.shape[0] // TILE_ROWS, scale.shape[1] // TILE_COLS
    scale = scale.reshape(row_tiles, col_tiles, 32, 4, TILE_COLS).permute(0, 3, 2, 1, 4)
    return scale.reshape(row_tiles * TILE_ROWS, col_tiles * TILE_COLS)[:rows, :cols]


def true_shape(stored, shape=None) -> tuple[int, int]:
    """The unpadded (N, K) of data stored as `stored`, checked against an explicit `shape`.

    Columns are always padded to whole blocks; rows may be stored without their padding.

    Raises:
        ValueError: `stored` is not such a shape, or `shape` does not pad to it.
    """
    stored = tuple(stored)
    if len(stored) != 2 or stored[1] % BLOCK:
        raise ValueError(
            f"MXFP8 data has shape {list(stored)}; it must be 2-D with columns a multiple of 32"
        )
    rows_padded = stored[0] % ROW_PAD == 0
    if shape is None:
        return stored
    shape = tuple(shape)
    if len(shape) != 2:
        raise ValueError(f"shape {list(shape)} must be two sizes, (N, K)")
    rows, cols = padded_shape(*shape)
    if stored != (rows if rows_padded else shape[0], cols):
        raise ValueError(
            f"shape {list(shape)} pads to {[rows, cols]}, but the data has shape {list(stored)}"
        )
    return shape


def check_scale(stored, scale_size) -> None:
    """Raise ValueError unless tiled scales of shape `scale_size` belong to data `stored`."""
    expected = scale_shape(*stored)
    if tuple(scale_size) != expected:
        raise ValueError(
            f"scales have shape {list(scale_size)}; data of shape {list(stored)} "
            f"needs {list(expected)} in the tiled order"
        )
