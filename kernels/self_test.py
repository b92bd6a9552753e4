"""Self-tests: a small problem against the oracle, before a step's first use on a device.

What a small problem does not reach, second tiles and long pipelines, `at_shape` does: a linear of
a model's own shape, against torch's of the unpacked weight.

A kernel that a driver or a card breaks is ruled out by name instead of returning noise. There is
one verdict per step, device and dtype, and everyone who asks gets it: Triton may import where it
cannot compile, and a matmul of torch may exist for bfloat16 alone.

A test returns a sentence on what is wrong, or None. An exception in a kernel counts as wrong: this
is the one place where one is caught, before anything relies on the kernel. What says nothing about
the kernel is not kept: there is no verdict without memory, nor while a CUDA graph is captured.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import device_facts, layout, memory
from .backends import reference

logger = logging.getLogger(__name__)

N, K = 96, 256  # K of exact tests is 192: scales that do not fill their tiles
_EXACT = 1e-2  # relative error allowed in bfloat16, whose rounding is 2**-9
# With inputs that are rounded otherwise than by the oracle: comfy-kitchen rounds rotated values,
# their scale and their quotient to bfloat16, which in an emulation is 0.9e-2 off.
_OTHERWISE = 1.5e-2
Test = Callable[[torch.device, torch.dtype], "str | None"]

_verdicts: dict[tuple[Test, torch.device, torch.dtype], str | None] = {}


def verdict(
    name: str, test: Test, device: torch.device, dtype: torch.dtype
) -> tuple[str | None, bool]:
    """(what is wrong with a step on a device, or None; whether that is known).

    Raises:
        torch.OutOfMemoryError, MemoryError: the test needs memory that there is not.
    """
    key = test, device, dtype
    if key not in _verdicts:
        if device_facts.capturing():  # nothing can be read back
            return None, False
        reason = run(test, device, dtype)
        if reason is not None:
            logger.warning("MXFP8: %s is not used on %s: %s.", name, device, reason)
        _verdicts[key] = reason
    return _verdicts[key], True


def forget() -> None:
    """Test anew."""
    _verdicts.clear()


def run(test: Test, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong, an exception included, or None.

    Raises:
        as `verdict`.
    """
    try:
        # Whoever asks first may have a default device, or trace with tensors without values.
        with torch.device("cpu"), _disable_current_modes(), torch.inference_mode():
            return test(device, dtype)
    except Exception as error:
        message = next(iter(str(error).splitlines()), "")
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        if memory.is_out_of_memory(error):
            raise torch.OutOfMemoryError(message) from error
        return f"its self-test failed ({type(error).__name__}: {message[:200]})"


def _normal(rows: int, seed: int, cols: int = K) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator, dtype=torch.float32)


def _all_sizes(rows: int, seed: int, dtype: torch.dtype, cols: int = K) -> torch.Tensor:
    """Normal values with a row of zeros, some large values and a row of tiny ones."""
    large, tiny = (2.0**8, 2.0**-14) if dtype == torch.float16 else (2.0**20, 2.0**-130)
    x = _normal(rows, seed, cols)
    x[1] = 0
    x[2, :40] *= large
    x[3] *= tiny
    return x.to(dtype)


def _differ(tensors, expected) -> bool:
    """Whether codes or scales have other bits than expected."""
    return not all(
        torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(tensors, expected, strict=True)
    )


def _wrong(out: torch.Tensor, expected: torch.Tensor, bound: float = _EXACT) -> str | None:
    expected = expected.double()
    error = float((out.cpu().double() - expected).norm() / expected.norm())
    return None if error <= bound else f"its result is {error:.1e} off"


def quantizer(run: Callable, tiny: bool = True) -> Test:
    """The test of a quantizer to MXFP8.

    Args:
        tiny: whether blocks below 2**-118, whose scale the specification leaves open, count.
    """

    def test(device, dtype):
        x = _all_sizes(N, 0, dtype)
        if not tiny:
            x[3] = 1
        wrong = _differ(run(x.to(device)), reference.quantize(x))
        return "it quantizes wrongly" if wrong else None

    return test


def rowwise_quantizer(run: Callable, oracle: Callable) -> Test:
    """The test of a quantizer of inputs to E4M3 with a scale per row: the bits of the oracle."""

    def test(device, dtype):
        x = _all_sizes(N, 0, dtype)
        wrong = _differ(run(x.to(device)), oracle(x))
        return "it quantizes wrongly" if wrong else None

    return test


def dequantizer(run: Callable) -> Test:
    """The test of what unpacks MXFP8, to every dtype; its `dtype` is that of the codes."""

    def test(device, dtype):
        stored = reference.quantize(_all_sizes(N, 0, torch.bfloat16, 192))
        on_device = [part.to(device) for part in stored]
        for result in (torch.float32, torch.bfloat16, torch.float16):
            expected = reference.dequantize(*stored, result, N, 192)
            if not torch.equal(run(*on_device, result, N, 192).cpu(), expected):
                return "it dequantizes wrongly"
        return None

    return test


def _tied_codes_differ(tensors, expected) -> bool:
    """As `_differ`, for rotated INT8: sums in another order move codes at ties."""
    (codes, scale), (wanted, wanted_scale) = [part.cpu() for part in tensors], expected
    off = (codes.int() - wanted.int()).abs()
    right = torch.allclose(scale, wanted_scale, rtol=1e-5, atol=0)
    return not (right and off.max() <= 1 and off.double().mean() < 1e-3)


def int8_quantizer(run: Callable) -> Test:
    """The test of what rotates inputs and quantizes them to INT8 with a scale per row."""

    def test(device, dtype):
        x = _all_sizes(N, 0, dtype)
        wrong = _tied_codes_differ(run(x.to(device)), reference.quantize_rotated_int8(x))
        return "it quantizes wrongly" if wrong else None

    return test


def preparer(run: Callable, oracle: Callable) -> Test:
    """The test of what prepares weights in a form: the bits of the oracle."""

    def test(device, dtype):
        stored = reference.quantize(_all_sizes(N, 0, torch.bfloat16))
        wrong = _differ(run(*(part.to(device) for part in stored)), oracle(*stored))
        return "it prepares weights wrongly" if wrong else None

    return test


def int8_preparer(run: Callable) -> Test:
    """The test of what rewrites weights as rotated INT8."""

    def test(device, dtype):
        stored = reference.quantize(_all_sizes(N, 0, torch.bfloat16))
        prepared = run(*(part.to(device) for part in stored))
        wrong = _tied_codes_differ(prepared, reference.to_rotated_int8(*stored))
        return "it prepares weights wrongly" if wrong else None

    return test


def exact(matmul: Callable, rows: tuple[int, ...]) -> Test:
    """The test of an exact matmul, with these numbers of rows."""

    def test(device, dtype):
        stored = reference.quantize(_normal(N, 0, 192))
        on_device = tuple(part.to(device) for part in stored)
        for M in rows if dtype != torch.float32 else rows[:1]:
            x = _all_sizes(80, M, dtype, 192)[-M:]
            expected = reference.matmul("stored", None, (x,), stored, None, dtype, N)
            wrong = _wrong(matmul((x.to(device),), on_device, None, dtype, N), expected)
            if wrong:
                return f"with {M} rows, {wrong}"
        return None

    return test


_PREPARE = {
    "stored": lambda *stored: stored,
    "rowwise_fp8": reference.to_rowwise,
    "rowwise_fnuz": reference.to_rowwise_fnuz,
    "rotated_int8": reference.to_rotated_int8,
}
_QUANTIZE = {
    "mxfp8": reference.quantize,
    "rowwise_fp8": reference.quantize_rowwise,
    "rowwise_fnuz": reference.quantize_rowwise_fnuz,
    "rotated_int8": reference.quantize_rotated_int8,
}


def matmul(run: Callable, weight_form: str, input_form: str, takes_x: bool = False) -> Test:
    """The test of a fast matmul; the oracle makes its operands.

    Args:
        takes_x: whether it quantizes its input itself.
    """

    def test(device, dtype):
        prepared = _PREPARE[weight_form](*reference.quantize(_normal(N, 1)))
        x, bias = _normal(128, 2).to(dtype), _normal(1, 3)[0, :N].to(dtype)
        quantized = _QUANTIZE[input_form](x)
        expected = reference.matmul(weight_form, input_form, quantized, prepared, bias, dtype, N)
        given = (x,) if takes_x else quantized
        operands = [tuple(t.to(device) for t in tensors) for tensors in (given, prepared)]
        bound = _OTHERWISE if takes_x else _EXACT
        return _wrong(run(*operands, bias.to(device), dtype, N), expected, bound)

    return test


def rotating(run: Callable) -> Test:
    """The test of a matmul that rotates one row of x and multiplies it by rotated INT8 weights."""

    def test(device, dtype):
        prepared = reference.to_rotated_int8(*reference.quantize(_normal(N, 1)))
        x = _normal(1, 2).to(dtype)
        rotated = (reference.rotate(x),)
        expected = reference.matmul("rotated_int8", None, rotated, prepared, None, dtype, N)
        on_device = tuple(tensor.to(device) for tensor in prepared)
        return _wrong(run((x.to(device),), on_device, None, dtype, N), expected)

    return test


# Rows of x: the kernel of one row, that of few, a partial tile of many, and many tiles.
ROWS = (1, 40, 300, 4096)
# On CPUs plain torch multiplies, and a whole weight takes seconds to prepare.
ROWS_ON_CPUS, N_ON_CPUS = (300,), 1024
TILE = 1024  # values of an output whose error counts together: 32 x 32, of one row all 1,024
# Quantized inputs are 0.029 off, rotated ones 0.013; a matmul that drops one of the K / 64 steps of
# a layer with K = 15,360 is 0.065 off.
_AT_SHAPE = {None: 1e-2, "mxfp8": 0.05, "rowwise_fp8": 0.05, "rotated_int8": 0.03}
_AT_SHAPE["rowwise_fnuz"] = _AT_SHAPE["rowwise_fp8"]


def random_weight(N: int, K: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """An MXFP8 weight [N, K], its values around 2**-6 and its padding zero, made on the device."""
    rows, cols = layout.padded_shape(N, K)
    options = {"generator": _generator(device), "dtype": torch.uint8, "device": device}
    code = torch.randint(0, 0xFE, (rows, cols), **options)
    code += code >= 0x7F  # which is NaN; so is 0xFF
    code[N:], code[:, K:] = 0, 0
    scale = torch.randint(114, 116, layout.scale_shape(rows, cols), **options)
    return code.view(torch.float8_e4m3fn), scale


def _generator(device: torch.device) -> torch.Generator:
    """A generator of its own, so that noise goes on from the seed that somebody set."""
    return torch.Generator(device).manual_seed(0)


def at_shape(
    linear: Callable, weight: torch.Tensor, bias: bool, rows: int, form: str | None
) -> str | None:
    """What is wrong with a linear at the shape of a model's, or None: torch's shows it, by tiles.

    One wrong tile among thousands counts: each is compared by itself. Memory is that of x, of two
    outputs, and of float32 copies of 256 rows.

    Args:
        linear: (x [rows, K], bias [N] or None) -> [rows or more, N].
        weight: [N, K], unpacked, in x's dtype, on the device.
        bias: whether it has one.
        form: that x is quantized to on the way.
    """
    N, K = weight.shape
    options = {"device": weight.device, "dtype": weight.dtype}
    generator = _generator(weight.device)
    x = torch.randn(rows, K, generator=generator, **options)
    added = torch.randn(N, generator=generator, **options) if bias else None
    out, expected = linear(x, added), torch.nn.functional.linear(x, weight, added)
    if out.shape[1] != N or out.shape[0] < rows or out.dtype != x.dtype:
        return f"it returns {list(out.shape)} {out.dtype} instead of {[rows, N]} {x.dtype}"
    height = min(rows, 32)
    tile = height, TILE // height
    # The mean square that an output has for any x: that of one value could be next to zero.
    size = torch.linalg.vector_norm(weight, dtype=torch.float32).square() / N
    worst = torch.zeros((), device=weight.device)
    for first in range(0, rows, 256):
        error = expected[first : first + 256].float()
        error -= out[first : first + error.shape[0]]
        # A part of a tile at the edge counts as a whole one with zeros: few values vary much.
        error = torch.nn.functional.avg_pool2d(
            error.square_()[None], tile, ceil_mode=True, divisor_override=TILE
        )
        worst = torch.maximum(worst, error.max() / size)  # NaN stays
    worst = math.sqrt(worst)
    if worst <= _AT_SHAPE[form]:
        return None
    return f"with {rows} rows of x, a part of its result is {worst:.1e} off"
