"""MXFP8Rows: parts, joins and casts are exact on the codes, and everything else gets the values."""

from __future__ import annotations

import pytest
import torch
from checkpoints import matrix

from mxfp8 import kernels
from mxfp8.integrations.stacked_rows import MXFP8Rows
from mxfp8.quant import format


def rows(count: int, columns: int = 100, seed: int = 0, **marker) -> MXFP8Rows:
    weight = matrix(count, columns, seed=seed)
    marker = {**format.marker((count, columns), "BF16"), **marker}
    return MXFP8Rows.from_stored(
        *kernels.quantize(weight), (count, columns), torch.bfloat16, marker
    )


EXACT = {
    "chunk": lambda m: m.chunk(3),
    "split": lambda m: torch.split(m, (100, 1, 199), dim=0),
    "split alike": lambda m: m.split(128),
    "slice": lambda m: (m[:7], m[250:], m[-3:], m[5:5]),
    "narrow": lambda m: (m.narrow(0, 33, 200),),
    "swapped": lambda m: (torch.cat([m[150:], m[:150]]),),
    "one part": lambda m: (torch.cat([m[10:20]]),),
    "joined": lambda m: (torch.cat((m, m[:1], m)),),
    "clone": lambda m: (m.clone().detach(), m.contiguous(), m.to("cpu")),
    "cast": lambda m: (m.to(torch.float32), m.half()),
}


@pytest.mark.parametrize("change", EXACT.values(), ids=EXACT)
def test_rows_are_changed_as_their_values_are(change):
    matrix_ = rows(300)
    for found, wanted in zip(change(matrix_), change(matrix_.values()), strict=True):
        assert type(found) is MXFP8Rows
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert torch.equal(found.values(), wanted)
        codes, scales = found.stored()  # as a file has them: padded and tiled
        restored = kernels.dequantize(codes, scales, found.dtype, tuple(found.shape))
        assert torch.equal(restored, wanted)


VALUES = {
    "transposed": lambda m: m.T,
    "columns": lambda m: m[:, :32],
    "every other row": lambda m: m[::2],
    "reshaped": lambda m: m.reshape(6, -1),
    "one row": lambda m: m[3],
    "joined with another": lambda m: torch.cat([m, torch.ones(1, 100, dtype=m.dtype)]),
    "of two widths": lambda m: torch.cat([m[:, :64], m[:, 64:]], dim=1),
    "added": lambda m: m + 1,
    "integers": lambda m: m.to(torch.int32),
}


@pytest.mark.parametrize("change", VALUES.values(), ids=VALUES)
def test_any_other_operator_gets_the_values(change):
    found, wanted = change(rows(300)), change(rows(300).values())
    assert type(found) is torch.Tensor and torch.equal(found, wanted)


def test_a_part_that_forbids_quantized_inputs_forbids_them_for_the_whole():
    strict = rows(32, full_precision_matrix_mult=True)
    for joined in (torch.cat([rows(32), strict]), torch.cat([strict, rows(32)])):
        assert joined.marker["full_precision_matrix_mult"]
    assert "full_precision_matrix_mult" not in torch.cat([rows(32), rows(32)]).marker
