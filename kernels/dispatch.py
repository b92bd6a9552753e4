"""Which implementation runs: chosen once per kind of problem, from capability, with reasons.

A backend is a record: its functions and one predicate that says why it refuses a problem. The
first backend in `BACKENDS` that does not refuse wins; the choice is cached, so a call costs one
dictionary look-up. A backend is never tried and replaced after it failed: what cannot run here is
refused before the call, by name and reason, and an error inside a kernel is an error.

Precision: "exact" multiplies the stored weights by activations as they are (W8A16); "fast"
quantizes activations too (W8A8), for tensor cores that need it; "auto" is fast where some backend
offers it on this device, else exact.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module

import torch

from . import device_facts, self_test
from .backends import eager, fp8_rowwise, reference, torch_mx
from .backends.cute import mx

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "exact", "fast")


@dataclass(frozen=True)
class Problem:
    """What a backend decides on.

    Attributes:
        op: "quantize", "dequantize" or "linear".
        dtype: of the input: x, or qdata for "dequantize".
        few: whether x of a linear has few rows, so that the weight's bytes decide.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    precision: str = "exact"
    small_m: bool = False


@dataclass(frozen=True)
class Backend:
    """One implementation.

    Attributes:
        quantize, dequantize: None where the backend only multiplies.
        refuse: problem -> the reason why this backend cannot take it, or None if it can.
        automatic: whether it may be chosen without being named.
        steps: how its linear is made of several ops, if it is: "rows", those of `fast_linear`,
            which takes a weight that is folded already, or "blocks", quantize and block_matmul.
        matmul: of "blocks": (tokens, weight, bias, dtype, M, N) -> result.
        test: device -> what is wrong with the backend there, or None; run once per device.
    """

    name: str
    summary: str
    quantize: Callable | None
    dequantize: Callable | None
    linear: Callable
    unsupported_reason: Callable[[Problem], str | None]
    automatic: bool = True
    input_form: str | None = None
    matmul: Callable | None = None
    test: Callable[[torch.device], str | None] | None = None


@dataclass(frozen=True)
class BackendStatus:
    """One line of `list_backends()`: `reason` says why not, or is empty."""

    name: str
    summary: str
    available: bool
    reason: str

    def __str__(self) -> str:
        state = "available" if self.available else f"refused: {self.reason}"
        return f"{self.name}: {self.summary} ({state})"


def _eager_linear(x, qdata, scale, bias, rows, cols, precision):
    return eager.linear(x, qdata, scale, bias, rows, cols)


def _eager_unsupported_reason(problem: Problem) -> str | None:
    if problem.precision == "fast":
        return "plain torch has no block-scaled matmul, so quantized activations would gain nothing"
    return None


def _triton_unsupported_reason(problem: Problem) -> str | None:
    if problem.precision == "fast":
        return "unpacks weights and multiplies in 16 bits"
    if problem.device.type != "cuda" and not device_facts.interpreted():
        return f"needs an NVIDIA or AMD GPU; this is {problem.device.type}"
    return device_facts.triton_unsupported_reason()


def _from(module: str, name: str) -> Callable:
    """A function of a module that is imported when it is first called: Triton is optional."""

    def call(*args):
        return getattr(import_module(f".{module}", __package__), name)(*args)

    return call


def _triton_mx_unsupported_reason(problem: Problem) -> str | None:
    reason = fp8_rowwise.activations_unsupported_reason(replace(problem, small_m=False))
    return reason or device_facts.block_scaled_unsupported_reason(problem.device)


def _blocks(matmul: Callable) -> Callable:
    """A linear that quantizes x in blocks, then multiplies."""

    def linear(x, qdata, scale, bias, rows, cols, precision):
        tokens = choose("quantize", x)[0].quantize(x)
        return matmul(tokens, (qdata, scale), bias, x.dtype, x.shape[0], rows)

    return linear


BACKENDS: tuple[Backend, ...] = (
    Backend(
        name="torch_mx",
        summary="block-scaled tensor cores (Blackwell) by cuBLASLt, activations in MXFP8",
        quantize=None,
        dequantize=None,
        linear=_blocks(torch_mx.matmul),
        unsupported_reason=torch_mx.unsupported_reason,
        input_form="mxfp8",
        matmul=torch_mx.matmul,
        test=self_test.blocks(torch_mx.matmul),
    ),
    Backend(
        name="fp8",
        summary="FP8 tensor cores (Hopper, Ada), activations quantized row by row",
        quantize=None,
        dequantize=None,
        linear=fp8_rowwise.linear,
        unsupported_reason=fp8_rowwise.unsupported_reason,
        input_form="rowwise",
        test=self_test.fast,
    ),
    Backend(
        name="triton",
        summary="Triton kernels and cuBLAS, exact weights",
        quantize=_from("backends.triton.cast", "quantize"),
        dequantize=_from("backends.triton.cast", "dequantize"),
        linear=_from("backends.triton.exact", "linear"),
        unsupported_reason=_triton_unsupported_reason,
        test=self_test.exact,
    ),
    Backend(
        name="triton_mx",
        summary="block-scaled tensor cores (Blackwell, gfx950) by Triton, activations in MXFP8",
        quantize=None,
        dequantize=None,
        linear=_blocks(_from("backends.triton.mx", "matmul")),
        unsupported_reason=_triton_mx_unsupported_reason,
        automatic=False,
        input_form="mxfp8",
        matmul=_from("backends.triton.mx", "matmul"),
        test=self_test.blocks(_from("backends.triton.mx", "matmul")),
    ),
    Backend(
        name="cute_mx",
        summary="block-scaled tensor cores (Blackwell) by CuTe DSL, not yet run on a GPU",
        quantize=None,
        dequantize=None,
        linear=_blocks(mx.matmul),
        unsupported_reason=mx.unsupported_reason,
        automatic=False,
        input_form="mxfp8",
        matmul=mx.matmul,
        test=self_test.blocks(mx.matmul),
    ),
    Backend(
        name="eager",
        summary="plain torch on any device, exact weights",
        quantize=eager.quantize,
        dequantize=eager.dequantize,
        linear=_eager_linear,
        unsupported_reason=_eager_unsupported_reason,
    ),
    Backend(
        name="reference",
        summary="the oracle in float64, exact or with quantized activations",
        quantize=reference.quantize,
        dequantize=reference.dequantize,
        linear=reference.linear,
        unsupported_reason=lambda problem: None,
        automatic=False,
    ),
)

# Compute capability -> backend -> the file in bench/results that shows it right, and faster than
# torch_mx, on such a card (`bench/gpu_report.py`, `prefers`; a test holds every entry to it). Only
# what is here comes before what is chosen by itself. Nothing has been measured yet.
MEASURED: dict[tuple[int, int], dict[str, str]] = {}

_NOT_AUTOMATIC = "not chosen by itself; runs when named with use_backend"
_forced: Backend | None = None


def _automatic(device: torch.device) -> list[Backend]:
    """The backends that are chosen without being named, in order of preference."""
    preferred = MEASURED.get(device_facts.capability(device), {}) if MEASURED else {}
    first = [b for b in BACKENDS if b.name in preferred]
    return first + [b for b in BACKENDS if b.automatic and b not in first]


@cache
def _notice_exact(problem: Problem, forced: Backend | None) -> None:
    """Say that fast runs exact, unless that is for want of rows."""
    if _choose(problem, forced)[1] == "exact":
        candidates = _automatic(problem.device) if forced is None else [forced]
        reasons = [f"{b.name}: {_unsupported_reason(b, problem)}" for b in candidates]
        _say_exact(problem.device.type, "; ".join(reasons))


@cache
def _say_exact(device: str, reasons: str) -> None:
    """Warn once per kind of device, whatever the dtypes."""
    logger.warning("MXFP8: running exact instead of fast on %s. %s.", device, reasons)


@cache
def _choose(problem: Problem, forced: Backend | None) -> tuple[Backend, str]:
    """The backend for a problem and the precision it will run at."""
    refusals = []
    for backend, precision, reason in _tried(problem, forced):
        if reason is None:
            return backend, precision
        refusals.append(f"{backend.name} ({precision}): {reason}")
    raise ValueError(
        f"no MXFP8 backend takes {problem.op} of {problem.dtype} on {problem.device} at precision "
        f"{problem.precision!r}: {'; '.join(refusals)}"
    )


def _tried(problem: Problem, forced: Backend | None) -> Iterator[tuple[Backend, str, str | None]]:
    """(backend, precision, why it refuses or None) in order of preference."""
    if forced is not None and getattr(forced, problem.op) is None:
        forced = None  # it only multiplies
    candidates = _automatic(problem.device) if forced is None else [forced]
    candidates = [b for b in candidates if getattr(b, problem.op) is not None]
    if forced is not None:
        problem = replace(problem, small_m=False)  # which is about what is faster
    for precision in ("exact",) if problem.precision == "exact" else ("fast", "exact"):
        for backend in candidates:
            yield (
                backend,
                precision,
                _unsupported_reason(backend, replace(problem, precision=precision)),
            )


def _unsupported_reason(backend: Backend, problem: Problem) -> str | None:
    """Why a backend does not take a problem, or None; its self-test on the device included."""
    reason = backend.unsupported_reason(problem)
    if reason is None and backend.test is not None and not device_facts.capturing():
        reason = _test(backend, problem.device)
    return reason


@cache
def _test(backend: Backend, device: torch.device) -> str | None:
    reason = backend.test(device)
    if reason is not None:
        logger.warning("MXFP8: %s is not used on %s: %s.", backend.name, device, reason)
    return reason


def choose(
    op: str, tensor: torch.Tensor, precision: str = "exact", rows: int | None = None
) -> tuple[Backend, str]:
    """The backend that runs `op` on a tensor like this one, and the precision it runs at.

    Args:
        rows: of x, for a linear; default: many.
    """
    small_m = rows is not None and rows <= fp8_rowwise.SMALL_M
    problem = Problem(op, tensor.device, tensor.dtype, precision, small_m)
    backend, runs_as = _choose(problem, _forced)
    if precision == "fast" and runs_as == "exact":
        _notice_exact(replace(problem, small_m=False), _forced)
    return backend, runs_as


@dataclass(frozen=True)
class ExecutionPath:
    """What runs a linear, and what does not.

    Attributes:
        precision: that it runs at, "exact" or "fast".
        steps: as `Backend.steps`.
        refused: (backend, why not) of what would have come first, one entry for each backend.
    """

    backend: str
    precision: str
    input_form: str | None
    refused: tuple[tuple[str, str], ...]


def execution_path(
    device: torch.device, dtype: torch.dtype, precision: str, rows: int | None = None
) -> ExecutionPath:
    """What `choose` says of a linear, with its reasons; arguments as for `steps` and `choose`."""
    small_m = rows is not None and rows <= fp8_rowwise.SMALL_M
    problem = Problem("linear", device, dtype, precision, small_m)
    refused: dict[str, str] = {}
    for backend, runs_as, reason in _tried(problem, _forced):
        if reason is None:
            # It may have refused at another precision, and so may have those that come after it.
            before = tuple(refused.items())[: [*refused, backend.name].index(backend.name)]
            return ExecutionPath(backend.name, runs_as, backend.input_form, before)
        if not backend.input_form or backend.name not in refused:  # for what it is there for
            refused[backend.name] = reason
    raise ValueError(f"no MXFP8 backend takes linears of {dtype} on {device}: {refused}")


def input_form(device: torch.device, dtype: torch.dtype, precision: str) -> tuple[str, str] | None:
    """(`Backend.steps`, its name) for a linear of many rows, None where it is one op."""
    backend, _ = _choose(Problem("linear", device, dtype, precision), _forced)
    return backend.input_form and (backend.input_form, backend.name)


# Not `torch.compiler.assume_constant_result`, which does this and imports the compiler: a second.
input_form._dynamo_marked_constant = True


def named(name: str) -> Backend:
    """The backend of that name."""
    return next(backend for backend in BACKENDS if backend.name == name)


def describe_paths(device: torch.device | str | None = None) -> list[str]:
    """Sentences on what runs linears in bfloat16 on a device, by precision and rows of x."""
    device = _default(device)
    small_m = f"up to {fp8_rowwise.SMALL_M} rows"
    result = []
    for precision in PRECISIONS:
        names = {}
        for rows, is_small_m in (("more rows", False), (small_m, True)):
            problem = Problem("linear", device, torch.bfloat16, precision, is_small_m)
            backend, runs_as = _choose(problem, _forced)
            names[rows] = f"{backend.name} ({runs_as})"
        same = len(set(names.values())) == 1
        said = (
            names[small_m] if same else ", ".join(f"{r}: {n}" for r, n in reversed(names.items()))
        )
        result.append(f"{precision}: {said}")
    return result


def _default(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = torch.device("cuda", 0) if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def list_backends(device: torch.device | str | None = None) -> list[BackendStatus]:
    """Every backend in order of preference, for `linear` on `device`.

    Args:
        device: default is CUDA where there is a CUDA device, else the CPU.
    """
    problem = Problem("linear", _default(device), torch.bfloat16)
    result = []
    for backend in BACKENDS:
        precision = "fast" if backend.input_form else "exact"
        asked = replace(problem, precision=precision)
        if backend in _automatic(problem.device):
            reason = _unsupported_reason(backend, asked) or ""
        else:  # not tested: what nobody named does not run
            reason = backend.unsupported_reason(asked) or _NOT_AUTOMATIC
        result.append(BackendStatus(backend.name, backend.summary, not reason, reason))
    return result


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every call within the context, in all threads.

    Raises:
        ValueError: on entry, no backend has that name; at a call, the backend refuses the problem.
    """
    global _forced
    chosen = next((b for b in BACKENDS if b.name == name), None)
    if chosen is None:
        known = ", ".join(b.name for b in BACKENDS)
        raise ValueError(f"no MXFP8 backend is called {name!r}; there are: {known}")
    before, _forced = _forced, chosen
    try:
        yield
    finally:
        _forced = before
