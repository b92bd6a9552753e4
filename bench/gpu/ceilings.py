"""The measured limits of a device, and the roofline times of operations that follow from them.

Bandwidth is that of a large copy, bytes read plus bytes written; matmul rates are those of torch on
8192 x 8192 random values (zeros run faster, because they take less power).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from gpu.clock import Clock
from gpu.shapes import numbers

_FP8_BYTES = 1 + 1 / 32  # per MXFP8 weight, its scale included


@dataclass(frozen=True)
class Ceilings:
    """Rates per second; `fp8_by_row_flops` is torch's row-wise scaled FP8 matmul."""

    copy_bytes: float
    bf16_flops: float
    fp8_flops: float | None
    fp8_by_row_flops: float | None

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)

    def moved(self, nbytes: float) -> float:
        """Microseconds to read or write that many bytes."""
        return nbytes / self.copy_bytes * 1e6

    def unpack(self, N: int, K: int) -> float:
        """Dequantize or quantize: read one form, write the other."""
        return self.moved(N * K * (2 + _FP8_BYTES))

    def to_rowwise(self, N: int, K: int) -> float:
        return self.moved(N * K * (1 + _FP8_BYTES) + 4 * N)

    def quantize_rowwise(self, M: int, K: int) -> float:
        return self.moved(M * K * 3 + 4 * M)

    def matmul(self, M: int, N: int, K: int, element: float, fp8: bool = False) -> float:
        """A matmul with `element` bytes per value of x and weight, and BF16 results.

        The time to read both once or to multiply them, whichever is longer.
        """
        rate = self.fp8_flops if fp8 else self.bf16_flops
        moved = self.moved(element * (M * K + N * K) + 2 * M * N)
        return max(moved, 2 * M * N * K / rate * 1e6)

    def exact(self, M: int, N: int, K: int, small_m: bool) -> float:
        """For few rows the stored weight is read once; for many it is unpacked, then multiplied."""
        if small_m:
            moved = self.moved(N * K * _FP8_BYTES + 2 * M * (K + N))
            return max(moved, 2 * M * N * K / self.bf16_flops * 1e6)
        return self.unpack(N, K) + self.matmul(M, N, K, 2)

    def low_rank(self, M: int, N: int, K: int, rank: int) -> float:
        """What two thin matmuls in BF16 move that add to an output, in place."""
        first = M * K + rank * K + M * rank
        second = M * rank + N * rank + 2 * M * N
        return self.moved(2 * (first + second))

    def fast(self, M: int, N: int, K: int, cached: bool) -> float:
        spent = self.quantize_rowwise(M, K) + self.matmul(M, N, K, 1, fp8=True)
        return spent if cached else spent + self.to_rowwise(N, K)


def measure(clock: Clock, quick: bool) -> Ceilings:
    device = clock.device
    side = 128 if quick else 8192
    nbytes = 1 << (16 if quick else 30)
    source = numbers(device, 2, nbytes // 2)
    target = torch.empty_like(source)
    a, b = numbers(device, 2, side, side).unbind(0)
    runs = {
        "copy": lambda i: target[i].copy_(source[i]),
        "bf16": lambda i: torch.nn.functional.linear(a, b),
    }
    if device.type == "cuda":
        x, w = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        by_row = torch.ones(side, 1, device=device)
        runs["fp8"] = lambda i: _scaled_mm(x, w, one, one)
        runs["fp8 by row"] = lambda i: _scaled_mm(x, w, by_row, by_row.t())
        for _ in range(50):  # raises the clocks of an idle device
            torch.nn.functional.linear(a, b)
    spent = clock.time(runs, sets=2)
    if clock.failures:
        print(f"ceilings not measured: {clock.failures}")
    flops = 2 * side**3
    rates = {name: flops / us * 1e6 for name, us in spent.items()}
    return Ceilings(
        copy_bytes=2 * nbytes / spent["copy"] * 1e6,
        bf16_flops=rates["bf16"],
        fp8_flops=rates.get("fp8", None if device.type == "cuda" else rates["bf16"]),
        fp8_by_row_flops=rates.get("fp8 by row"),
    )


def _scaled_mm(x, w, x_scale, w_scale):
    return torch._scaled_mm(
        x, w.t(), scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )
