"""A backend's self-test: a small problem against the oracle, before its first use on a device.

A kernel that a driver or a card breaks is ruled out by name instead of returning noise. A test
returns a sentence on what is wrong, or None. An exception in a kernel counts as wrong: this is the
one place where one is caught, before anything relies on the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from .backends import fp8_rowwise, reference

N, K = 96, 192
_EXACT = 1e-2  # relative error allowed in bfloat16, whose rounding is 2**-9
_FAST = 6e-2  # with E4M3 on both sides, whose error is 4e-2
_DTYPES = (torch.bfloat16, torch.float16)
Test = Callable[[torch.device], "str | None"]


def _guarded(test: Test) -> Test:
    def run(device: torch.device) -> str | None:
        try:
            with torch.inference_mode():
                return test(device)
        except (MemoryError, torch.OutOfMemoryError):  # which says nothing about the kernels
            raise
        except Exception as error:
            message = next(iter(str(error).splitlines()), "")
            return f"its self-test failed ({type(error).__name__}: {message[:200]})"

    return run


def _normal(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed))


def _all_sizes(rows: int, seed: int) -> torch.Tensor:
    """Normal values with a row of zeros, some large values and a row of tiny ones."""
    x = _normal(rows, seed)
    x[1] = 0
    x[2, :40] *= 2.0**20
    x[3] *= 2.0**-130
    return x.bfloat16()


def _differs(pair, expected) -> bool:
    """Whether codes or scales have other bits than expected."""
    return not all(
        torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(pair, expected, strict=True)
    )


def _error(out: torch.Tensor, expected: torch.Tensor, bound: float, what: str) -> str | None:
    expected = expected.double()
    error = float((out.cpu().double() - expected).norm() / expected.norm())
    return None if error <= bound else f"its {what} is {error:.1e} off"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@_guarded
def exact(device: torch.device) -> str | None:
    """Of Triton's quantize, dequantize and exact linear."""
    cast = import_module(".backends.triton.cast", __package__)
    linear = import_module(".backends.triton.exact", __package__).linear
    weight = _all_sizes(N, 0)
    stored = reference.quantize(weight)
    if _differs(cast.quantize(weight.to(device)), stored):
        return "it quantizes wrongly"
    on_device = [part.to(device) for part in stored]
    values = cast.dequantize(*on_device, torch.float32, N, K)
    if not torch.equal(values.cpu(), reference.dequantize(*stored, torch.float32, N, K)):
        return "it dequantizes wrongly"
    stored = reference.quantize(_normal(N, 0))
    on_device = [part.to(device) for part in stored]
    for dtype in _DTYPES:
        for rows in (1, 5, 20, 40, 70):
            x = _all_sizes(80, rows)[-rows:].to(dtype)
            expected = reference.linear(x, *stored, None, N, K)
            out = linear(x.to(device), *on_device, None, N, K)
            wrong = _error(out, expected, _EXACT, f"linear of {rows} rows in {_name(dtype)}")
            if wrong:
                return wrong
    return None


def block_scaled(matmul: Callable) -> Test:
    """The test of a block-scaled matmul; the oracle quantizes the activations."""

    def linear(x, weight, bias):
        return matmul(reference.quantize(x), weight, bias, x.dtype, len(x), N)

    return _guarded(lambda device: _check_fast(device, linear, "fast", _EXACT))


@_guarded
def fast(device: torch.device) -> str | None:
    """Of row-wise scaling of weights and activations, and of the FP8 matmul."""
    stored = reference.quantize(_normal(N, 1))
    prepared = fp8_rowwise.to_rowwise(*(part.to(device) for part in stored))
    if _differs(prepared, reference.to_rowwise(*stored)):
        return "it scales weights by row wrongly"

    def linear(x, weight, bias):
        return fp8_rowwise.linear(x, *weight, bias, N, K)

    return _check_fast(device, linear, "exact", _FAST)


def _check_fast(device, linear: Callable, precision: str, bound: float) -> str | None:
    """`linear`: (x, stored weight, bias), all on the device -> x @ W.T + bias."""
    stored = reference.quantize(_normal(N, 1))
    on_device = [part.to(device) for part in stored]
    for dtype in _DTYPES:
        x, bias = _normal(128, 2).to(dtype), _normal(1, 3)[0, :N].to(dtype)
        expected = reference.linear(x, *stored, bias, N, K, precision)
        out = linear(x.to(device), on_device, bias.to(device))
        wrong = _error(out, expected, bound, f"fast linear in {_name(dtype)}")
        if wrong:
            return wrong
    return None
