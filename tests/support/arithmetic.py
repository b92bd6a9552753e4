"""The MXFP8 specification in exact rational arithmetic, for tests.

It shares no code with the package, and does not depend on how torch rounds.
"""

from __future__ import annotations

from bisect import bisect_right
from fractions import Fraction
from functools import cache

import torch

BLOCK = 32


@cache
def power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


def magnitude(code: int) -> Fraction:
    """The value of an E4M3 code 0x00..0x7E: 4 exponent bits with bias 7, 3 mantissa bits."""
    exponent, mantissa = divmod(code, 8)
    return Fraction(mantissa, 512) if exponent == 0 else (8 + mantissa) * power(exponent - 10)


MAGNITUDES = [magnitude(code) for code in range(127)]


@cache
def nearest(size: Fraction) -> int:
    """The code of the E4M3 value nearest to a magnitude of at most 448; ties to the even code."""
    low = bisect_right(MAGNITUDES, size) - 1
    high = min(low + 1, 126)
    return min(low, high, key=lambda code: (abs(MAGNITUDES[code] - size), code % 2))


def scale_exponent(amax: Fraction) -> int:
    """ceil(log2(amax / 448))."""
    ratio = amax / 448
    exponent = ratio.numerator.bit_length() - ratio.denominator.bit_length() - 1
    while power(exponent) < ratio:
        exponent += 1
    return exponent


def block_by_hand(values: list[float]) -> tuple[int, list[int]]:
    """Scale byte and codes of a block, by the rules in the oracle's docstring."""
    x = torch.tensor(values, dtype=torch.float64)
    if not x.isfinite().all():
        return 0xFF, [0] * len(values)
    sizes = [abs(Fraction(value)) for value in values]
    if max(sizes) == 0:
        return 0, [0] * len(values)
    byte = max(1, scale_exponent(max(sizes)) + 127)
    codes = [nearest(size / power(byte - 127)) for size in sizes]
    return byte, [c + 128 * s for c, s in zip(codes, x.signbit().tolist(), strict=True)]


def scale_offset(row: int, col: int, blocks: int) -> int:
    """The offset of a scale in the tiled order, as cuBLAS documents it."""
    tiles = -(-blocks // 4)
    tile = (row // 128) * tiles + col // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + col % 4


def all_magnitudes(rows, cols, dtype, seed=0):
    """Values of all magnitudes of a dtype, with blocks of zeros, NaN, Inf, tiny and huge values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator)
    x *= torch.exp2(torch.randint(-40, 12, (rows, cols), generator=generator).float())
    x = x.to(dtype)
    for row, value in enumerate((0.0, -0.0, torch.nan, torch.inf, -torch.inf)):
        x[row % rows, :: row + 1] = value
    x[5 % rows] = (x[5 % rows].float() * 2.0**-120).to(dtype)
    x[6 % rows] = torch.finfo(dtype).max
    x[7 % rows] = torch.finfo(dtype).smallest_normal / 8
    return x
