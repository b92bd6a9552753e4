"""An MXFP8 matrix as one tensor, for code that renames, splits and joins the tensors of a model.

A single-file loader makes its own layers of a file's: q, k and v from a joined matrix, shift and
scale exchanged. Rows of MXFP8 are independent, since blocks run along K, so all of that is exact on
the codes, if the scales follow. Scales are kept in row order here, because a tile has 128 rows and
a part may have any number; `stored` tiles them again.

Every other operator gets the values, so an unknown change gives a correct plain tensor. Rejected:
the rules of each loader written down here, which change with every version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.utils._pytree import tree_map_only

from .. import kernels
from ..kernels import layout

aten = torch.ops.aten


class MXFP8Rows(torch.Tensor):
    """Rows of MXFP8: a tensor [N, K] of a floating-point dtype, which only shows in `dtype`.

    Attributes:
        codes: uint8 [N, K'], E4M3.
        scales: uint8 [N, K'/32], E8M0 in row order.
        marker: the JSON of the layer it comes from.
    """

    @staticmethod
    def __new__(cls, codes, scales, columns: int, dtype: torch.dtype, marker: Mapping):
        shape = (codes.shape[0], columns)
        result = cls._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)
        result.codes, result.scales, result.marker = codes, scales, marker
        return result

    @classmethod
    def from_stored(cls, weight, scale, shape: tuple[int, int], dtype: torch.dtype, marker):
        """From tensors as a file has them: E4M3 [N' or N, K'], tiled scales, and the real shape."""
        rows, columns = shape
        codes = weight.view(torch.uint8)[:rows]
        scales = layout.untile(scale.view(torch.uint8), rows, codes.shape[1] // layout.BLOCK)
        return cls(codes, scales, columns, dtype, marker)

    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes [N', K'], tiled scales), both uint8."""
        rows = self.codes.shape[0]
        missing = layout.round_up(rows, layout.ROW_PAD) - rows
        codes = torch.nn.functional.pad(self.codes, (0, 0, 0, missing)) if missing else self.codes
        return codes, layout.tile(self.scales)

    def values(self) -> torch.Tensor:
        """The dequantized matrix."""
        codes, scales = self.stored()
        return kernels.dequantize(codes, scales, self.dtype, tuple(self.shape))

    def _of(self, codes: torch.Tensor, scales: torch.Tensor) -> MXFP8Rows:
        return type(self)(codes, scales, self.shape[1], self.dtype, self.marker)

    def _rows(self, first: int, last: int) -> MXFP8Rows:
        return self._of(self.codes[first:last], self.scales[first:last])

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        exact = _EXACT.get(operator)
        result = NotImplemented if exact is None else exact(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        args, kwargs = tree_map_only(cls, cls.values, (args, kwargs or {}))
        return operator(*args, **kwargs)

    def __repr__(self):
        return f"MXFP8Rows(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"


def _same(matrix: MXFP8Rows, **options) -> MXFP8Rows:
    return matrix._of(matrix.codes, matrix.scales)


def _clone(matrix: MXFP8Rows, **options) -> MXFP8Rows:
    return matrix._of(matrix.codes.clone(), matrix.scales.clone())


def _to(matrix: MXFP8Rows, *, dtype=None, device=None, non_blocking=False, **options):
    dtype = matrix.dtype if dtype is None else dtype
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return NotImplemented
    codes, scales = (
        part if device is None else part.to(device, non_blocking=non_blocking)
        for part in (matrix.codes, matrix.scales)
    )
    return MXFP8Rows(codes, scales, matrix.shape[1], dtype, matrix.marker)


def _slice(matrix: MXFP8Rows, dim=0, start=None, end=None, step=1):
    if dim not in (0, -2) or step != 1:
        return NotImplemented
    first, last, _ = slice(start, end).indices(matrix.shape[0])
    return matrix._rows(first, max(first, last))


def _split(matrix: MXFP8Rows, size: int, dim=0):
    if dim not in (0, -2):
        return NotImplemented
    rows = matrix.shape[0]
    return [matrix._rows(first, min(first + size, rows)) for first in range(0, rows, size)]


def _split_with_sizes(matrix: MXFP8Rows, sizes: Sequence[int], dim=0):
    if dim not in (0, -2):
        return NotImplemented
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [matrix._rows(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _cat(parts: Sequence[torch.Tensor], dim=0):
    first = parts[0]
    alike = all(
        isinstance(part, MXFP8Rows)
        and part.shape[1] == first.shape[1]
        and part.dtype == first.dtype
        for part in parts
    )
    if dim not in (0, -2) or not alike:
        return NotImplemented
    # A layer any part of which forbids quantizing its inputs forbids it for all of them.
    strict = next((p for p in parts if p.marker.get("full_precision_matrix_mult")), first)
    codes = torch.cat([part.codes for part in parts])
    return strict._of(codes, torch.cat([part.scales for part in parts]))


_EXACT = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _clone,
    aten._to_copy.default: _to,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.cat.default: _cat,
}
