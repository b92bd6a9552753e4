"""The measured limits of a device, and the roofline times of operations that follow from them.

Bandwidth is that of a large copy, bytes read plus bytes written; matmul rates are those of torch on
square random values (zeros run faster, because they take less power). Sizes fit the memory that is
free; what cannot be measured is None, and so are the rooflines that need it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from gpu.clock import Clock, OutOfTimeError, reason
from gpu.shapes import numbers

_MXFP8_BYTES = 1 + 1 / 32  # per weight, its scale included


@dataclass(frozen=True)
class Ceilings:
    """Rates per second; `fp8_by_row_flops` is torch's row-wise scaled FP8 matmul."""

    copy_bytes: float | None = None
    bf16_flops: float | None = None
    fp8_flops: float | None = None
    fp8_by_row_flops: float | None = None
    int8_flops: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)

    def moved(self, nbytes: float) -> float | None:
        """Microseconds to read or write that many bytes."""
        return None if self.copy_bytes is None else nbytes / self.copy_bytes * 1e6

    def cast(self, form: str, rows: int, cols: int, plain: float) -> float | None:
        """To read a matrix with `plain` bytes per value and write it in a form, or the reverse."""
        written = cols * _MXFP8_BYTES if form in ("mxfp8", "stored") else cols + 4
        return self.moved(rows * (cols * plain + written))

    def prepare(self, form: str, N: int, K: int) -> float | None:
        """To read a stored weight and write it in another form."""
        return self.cast(form, N, K, _MXFP8_BYTES)

    def matmul(self, form: str, M: int, N: int, K: int) -> float | None:
        """With both matrices in a form ("plain" is BF16), and BF16 results.

        The time to read both once or to multiply them, whichever is longer.
        """
        rate = {"plain": self.bf16_flops, "rotated_int8": self.int8_flops}.get(form, self.fp8_flops)
        element = {"plain": 2, "mxfp8": _MXFP8_BYTES}.get(form, 1)
        return self._longer(element * (M + N) * K + 2 * M * N, 2 * M * N * K, rate)

    def exact(self, M: int, N: int, K: int, few: bool) -> float | None:
        """For few rows the stored weight is read once; for many it is unpacked, then multiplied."""
        if few:
            moved = N * K * _MXFP8_BYTES + 2 * M * (K + N)
            return self._longer(moved, 2 * M * N * K, self.bf16_flops)
        return total(self.cast("stored", N, K, 2), self.matmul("plain", M, N, K))

    def fast(self, form: str, M: int, N: int, K: int) -> float | None:
        """To quantize x in BF16 to a form, then multiply."""
        return total(self.cast(form, M, K, 2), self.matmul(form, M, N, K))

    def low_rank(self, M: int, N: int, K: int, rank: int) -> float | None:
        """What two thin matmuls in BF16 move that add to an output, in place."""
        first = M * K + rank * K + M * rank
        second = M * rank + N * rank + 2 * M * N
        return self.moved(2 * (first + second))

    def _longer(self, nbytes: float, flops: float, rate: float | None) -> float | None:
        moved = self.moved(nbytes)
        return None if moved is None or rate is None else max(moved, flops / rate * 1e6)


def total(*parts: float | None) -> float | None:
    return None if None in parts else sum(parts)


def measure(clock: Clock, quick: bool, left_out: list[str]) -> Ceilings:
    """
    Args:
        left_out: gets a line for what could not be measured.
    """
    device = clock.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 30
    side = 128 if quick else 8192 if free > 4 << 30 else 4096
    nbytes = min(free // 16, 1 << 30) if not quick else 1 << 16
    flops = 2 * side**3
    spent = {}
    try:
        spent = clock.time(_runs(device, side, nbytes // 16 * 16), sets=2)
    except (torch.OutOfMemoryError, OutOfTimeError) as error:
        clock.failures = {"all": reason(error)}
    left_out += [f"ceilings, {name}: {why}" for name, why in clock.failures.items()]
    rates = {name: flops / us * 1e6 for name, us in spent.items()}
    return Ceilings(
        copy_bytes=2 * nbytes / spent["copy"] * 1e6 if "copy" in spent else None,
        bf16_flops=rates.get("bf16"),
        fp8_flops=rates.get("fp8"),
        fp8_by_row_flops=rates.get("fp8 by row"),
        int8_flops=rates.get("int8"),
    )


def _runs(device: torch.device, side: int, nbytes: int) -> dict:
    source, target = torch.empty(2, 2, nbytes // 4, dtype=torch.int32, device=device)
    source.random_()
    a, b = numbers(device, 2, side, side).unbind(0)
    codes = [(31 * t).clamp(-127, 127).to(torch.int8) for t in (a, b)]
    runs = {
        "copy": lambda i: target[i].copy_(source[i]),
        "bf16": lambda i: torch.nn.functional.linear(a, b),
        "int8": lambda i: torch._int_mm(codes[0], codes[1].t()),
    }
    if device.type == "cuda":
        x, w = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        by_row = torch.ones(side, 1, device=device)
        runs["fp8"] = lambda i: _scaled_mm(x, w, one, one)
        runs["fp8 by row"] = lambda i: _scaled_mm(x, w, by_row, by_row.t())
        for _ in range(50):  # raises the clocks of an idle device
            torch.nn.functional.linear(a, b)
    return runs


def _scaled_mm(x, w, x_scale, w_scale):
    return torch._scaled_mm(
        x, w.t(), scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )
