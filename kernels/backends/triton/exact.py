"""The exact (W8A16) matmuls by Triton: decoded in registers for few rows, unpacked for many.

Up to 64 rows the time is that of reading the weight, and `w8a16` reads 8 bits a weight instead of
16. With more, the weight is unpacked into memory that the caching allocator reuses, and cuBLAS
multiplies: at M = 4096 unpacking is about 7% of the work.
"""

from __future__ import annotations

import torch

from . import cast, w8a16


def decoding(quantized, prepared, bias, dtype: torch.dtype, N: int) -> torch.Tensor:
    """x [M, K] @ W[N, K].T + bias, exact weights, for M up to `w8a16.MOST_ROWS`."""
    (x,), (qdata, scale) = quantized, prepared
    return w8a16.linear(x, qdata, scale, bias, N, x.shape[1])


def unpacking(quantized, prepared, bias, dtype: torch.dtype, N: int) -> torch.Tensor:
    """As `decoding`, for any M."""
    (x,), (qdata, scale) = quantized, prepared
    weight = cast.dequantize(qdata, scale, dtype, N, x.shape[1])
    return torch.nn.functional.linear(x, weight, bias)
