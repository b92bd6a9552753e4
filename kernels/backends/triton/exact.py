"""The exact (W8A16) linear by Triton: decoded in registers for few rows, unpacked for many.

Up to 64 rows the time is that of reading the weight, and `w8a16` reads 8 bits a weight instead of
16. With more, the weight is unpacked into memory that the caching allocator reuses, and cuBLAS
multiplies: at M = 4096 unpacking is about 7% of the work.
"""

from __future__ import annotations

import torch

from ...device_facts import capability
from . import cast, w8a16


def linear(x, qdata, scale, bias, rows: int, cols: int, precision: str = "exact") -> torch.Tensor:
    """x [M, K] @ W[N, K].T + bias, exact weights."""
    if x.shape[0] <= _most_rows(x):
        return w8a16.linear(x, qdata, scale, bias, rows, cols)
    weight = cast.dequantize(qdata, scale, x.dtype, rows, cols)
    return torch.nn.functional.linear(x, weight, bias)


def _most_rows(x: torch.Tensor) -> int:
    """The largest M for which weights are decoded in registers."""
    if x.dtype == torch.float32:  # tensor cores would round it
        return 1
    # Triton knows no matrix instructions before Ampere's (sm_80).
    turing = (capability(x.device) or (8, 0)) < (8, 0)
    return 1 if turing else w8a16.MOST_ROWS
