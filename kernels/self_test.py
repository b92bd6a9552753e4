"""A backend's first use on a device: a small problem against the oracle, so that a kernel that a
driver or a card breaks is refused by name, and never runs as noise.

A test returns a sentence on what is wrong, or None. What a kernel raises counts as that: this is
the one place where an exception of a kernel is caught, before anything relies on it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from .backends import fp8_rowwise, reference

ROWS, COLUMNS = 96, 192
_EXACT = 1e-2  # relative error of a linear in bfloat16, whose rounding is 2**-9
_FAST = 6e-2  # of E4M3 on both sides: 4e-2
_DTYPES = (torch.bfloat16, torch.float16)


def _tested(test: Callable[[torch.device], str | None]) -> Callable[[torch.device], str | None]:
    def run(device: torch.device) -> str | None:
        try:
            with torch.inference_mode():
                return test(device)
        except (MemoryError, torch.OutOfMemoryError):  # which says nothing about the kernels
            raise
        except Exception as error:
            said = next(iter(str(error).splitlines()), "")
            return f"its self-test failed ({type(error).__name__}: {said[:200]})"

    return run


def _numbers(rows: int, cols: int, seed: int) -> torch.Tensor:
    """Normal values with a row of zeros, large and tiny ones."""
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    x[1] = 0
    x[2, :40] *= 2.0**20
    x[3] *= 2.0**-130
    return x.bfloat16()


def _normal() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations, a weight and a bias, all of ordinary size."""
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(rows, COLUMNS, generator=generator) for rows in (128, ROWS))
    return x, weight, torch.randn(ROWS, generator=generator)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.cpu().double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm())


@_tested
def exact(device: torch.device) -> str | None:
    """Of Triton's quantize, dequantize and linear."""
    triton_cast = import_module(".backends.triton.cast", __package__)
    weight = _numbers(ROWS, COLUMNS, 0)
    qdata, scale = reference.quantize(weight)
    got = triton_cast.quantize(weight.to(device))
    pairs = zip(got, (qdata, scale), strict=True)
    if not all(torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8)) for a, b in pairs):
        return "it quantizes wrongly"
    stored = qdata.to(device), scale.to(device)
    got = triton_cast.dequantize(*stored, torch.float32, ROWS, COLUMNS)
    if not torch.equal(got.cpu(), reference.dequantize(qdata, scale, torch.float32, ROWS, COLUMNS)):
        return "it dequantizes wrongly"
    linear = import_module(".backends.triton.exact", __package__).linear
    plain = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    qdata, scale = reference.quantize(plain)
    stored = qdata.to(device), scale.to(device)
    for dtype in _DTYPES:
        for rows in (1, 5, 20, 40, 70):
            x = _numbers(80, COLUMNS, rows)[-rows:].to(dtype)
            wanted = reference.linear(x, qdata, scale, None, ROWS, COLUMNS)
            error = _error(linear(x.to(device), *stored, None, ROWS, COLUMNS), wanted)
            if not error <= _EXACT:
                return f"its linear of {rows} rows in {_name(dtype)} is {error:.1e} off"
    return None


def blocks(matmul: Callable) -> Callable[[torch.device], str | None]:
    """A test of a block-scaled matmul; the activations are the oracle's."""

    @_tested
    def test(device: torch.device) -> str | None:
        x, weight, bias = _normal()
        stored = reference.quantize(weight)
        on_device = [part.to(device) for part in stored]
        for dtype in _DTYPES:
            given, added = x.to(dtype), bias.to(dtype)
            wanted = reference.linear(given, *stored, added, ROWS, COLUMNS, "fast")
            tokens = [part.to(device) for part in reference.quantize(given)]
            out = matmul(tokens, on_device, added.to(device), dtype, len(x), ROWS)
            error = _error(out, wanted)
            if not error <= _EXACT:
                return f"its matmul in {_name(dtype)} is {error:.1e} off"
        return None

    return test


@_tested
def fast(device: torch.device) -> str | None:
    """Of the row fold, the quantizer of activations and the FP8 matmul."""
    x, weight, bias = _normal()
    qdata, scale = reference.quantize(weight)
    stored = qdata.to(device), scale.to(device)
    folded = fp8_rowwise.to_rowwise(*stored)
    for got, wanted in zip(folded, reference.to_rowwise(qdata, scale), strict=True):
        if not torch.equal(got.cpu().view(torch.uint8), wanted.view(torch.uint8)):
            return "it folds rows wrongly"
    for dtype in _DTYPES:
        given, added = x.to(dtype), bias.to(dtype)
        wanted = reference.linear(given, qdata, scale, added, ROWS, COLUMNS)
        out = fp8_rowwise.linear(given.to(device), *stored, added.to(device), ROWS, COLUMNS)
        error = _error(out, wanted)
        if not error <= _FAST:
            return f"its linear in {_name(dtype)} is {error:.1e} off"
    return None
