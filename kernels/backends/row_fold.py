"""From MXFP8 to what FP8 tensor cores before Blackwell multiply: E4M3 with one scale per row.

**The weight** is folded: E8M0 scales are powers of two, so a row's codes can be shifted to share
the largest of its scales. Only bits that fall below E4M3's subnormals are lost, in blocks that are
2**10 and more smaller than the row's largest: 2.3e-7 of a trained weight on average (MiniLM).

**Activations** are quantized row by row (per token), with a float32 scale that puts the largest
value at 448, the end of E4M3. A product of the two is E4M3 times E4M3, and the scales of its row
and column can be applied to the finished sum: any row-scaled FP8 matmul computes it.

Against quantizing activations in blocks of 32, as Blackwell does, the error of the output is about
the same: 2.95e-2 against 3.00e-2 on MiniLM's layers.

Rejected: one scale for the whole matrix, or the largest scale without shifting the codes.

The functions here are plain torch, in slabs that fit a cache; `triton_fold` has the same bits in
one pass.
"""

from __future__ import annotations

import torch

from .. import layout
from ..layout import BLOCK, E8M0_NAN
from . import eager

E4M3_MAX = 448.0
SMALLEST_AMAX = 2.0**-100  # of a row of activations: 448 / amax is finite
_SLAB = 1 << 22  # values at a time


def to_rowwise(qdata, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, row scales) of an MXFP8 matrix; the bits of `reference.to_rowwise`.

    Args:
        qdata: float8_e4m3fn (or its bytes) [N', K']; scale: its tiled scales.

    Returns:
        float8_e4m3fn [N', K'] and float32 [N'].
    """
    rows, cols = qdata.shape
    byte = layout.untile(scale.view(torch.uint8), rows, cols // BLOCK)
    largest = byte.masked_fill(byte == E8M0_NAN, 0).amax(-1).clamp_min(1)
    # A factor of at most 1 for every block, as the scale byte of another MXFP8 matrix.
    shifted = byte.int() - largest[:, None].int() + layout.E8M0_BIAS
    relative = shifted.clamp_min(0).to(torch.uint8).masked_fill(byte == E8M0_NAN, E8M0_NAN)
    code = torch.empty(rows, cols, dtype=torch.float8_e4m3fn, device=qdata.device)
    for first, last in layout.slabs(rows, cols, _SLAB):
        value = torch.empty(last - first, cols, device=qdata.device)
        eager.dequantize_rows(qdata, relative, value, first)
        value.masked_fill_(value.isnan(), torch.nan)  # one NaN, 0x7F
        code[first:last] = value.to(torch.float8_e4m3fn)
    return code, eager.decode_e8m0(largest)


def quantize_rowwise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) of the rows of x [M, K]; the bits of `reference.quantize_rowwise`.

    Returns:
        float8_e4m3fn [M, K'], K' rounded up to 32 and padding zero, and float32 [M].
    """
    rows, cols = x.shape
    stored = layout.round_up(cols, BLOCK)
    code = torch.zeros(rows, stored, dtype=torch.float8_e4m3fn, device=x.device)
    value = x.float()
    amax = value.abs().amax(-1, keepdim=True) if cols else value.new_zeros(rows, 1)
    finite = amax.isfinite()
    floor = amax.masked_fill(~finite, 1.0).clamp_min_(SMALLEST_AMAX)
    # Not 448.0 / floor: torch multiplies by a reciprocal there, which is rounded twice.
    scaled = value * (torch.full_like(floor, E4M3_MAX) / floor)
    scaled = scaled.masked_fill_(~finite, 0.0).clamp_(-E4M3_MAX, E4M3_MAX)
    code[:, :cols] = scaled.to(torch.float8_e4m3fn)
    scale = floor / torch.full_like(floor, E4M3_MAX)
    return code, scale.masked_fill_(~finite, torch.nan).squeeze(-1)
