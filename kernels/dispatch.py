"""Which backend runs: chosen once per kind of problem, from capability, with reasons.

A backend is a record: its functions, and a predicate that returns the reason why it cannot take a
problem. The first backend in `BACKENDS` without such a reason is chosen, and the choice is cached,
so a call costs one dictionary look-up. There is no fallback after a failure: what cannot run here
is ruled out before the call, with its reason, and an exception in a kernel reaches the caller.

Precision: "exact" multiplies the stored weights by activations as they are (W8A16); "fast"
quantizes activations too (W8A8), for FP8 tensor cores; "auto" is fast where a backend offers it on
this device, else exact.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from itertools import takewhile

import torch

from . import device_facts, self_test
from .backends import eager, fp8_rowwise, reference, torch_mx
from .backends.cute import mx

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "exact", "fast")


@dataclass(frozen=True)
class Problem:
    """What a backend is chosen for.

    Attributes:
        op: "quantize", "dequantize" or "linear".
        dtype: of the input: x, or qdata for "dequantize".
        small_m: whether x of a linear has so few rows that reading the weight is the bottleneck.
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
        linear: (x [M, K], qdata, scale, bias, rows, cols, precision) -> [M, rows].
        unsupported_reason: problem -> why this backend cannot take it, or None if it can.
        quantize, dequantize: None where the backend only multiplies.
        automatic: whether it may be chosen without being named.
        input_form: the form into which its linear quantizes x, as an op of its own: "rowwise"
            (E4M3 with a scale per row, beside a prepared weight) or "mxfp8"; None if it does not.
        matmul: of input form "mxfp8": (quantized input, weight, bias, dtype, M, N) -> [M, N].
        test: device -> what is wrong with the backend there, or None; run once per device.
    """

    name: str
    summary: str
    linear: Callable
    unsupported_reason: Callable[[Problem], str | None]
    quantize: Callable | None = None
    dequantize: Callable | None = None
    automatic: bool = True
    input_form: str | None = None
    matmul: Callable | None = None
    test: Callable[[torch.device], str | None] | None = None


@dataclass(frozen=True)
class BackendStatus:
    """One line of `list_backends()`; `reason` says why it is not used, or is empty."""

    name: str
    summary: str
    available: bool
    reason: str

    def __str__(self) -> str:
        state = "available" if self.available else f"not used: {self.reason}"
        return f"{self.name}: {self.summary} ({state})"


def _lazy(module: str, name: str) -> Callable:
    """A function of a Triton module, which is imported on first call because Triton is optional."""

    def call(*args):
        return getattr(import_module(f".backends.triton.{module}", __package__), name)(*args)

    return call


def _eager_unsupported_reason(problem: Problem) -> str | None:
    if problem.precision == "fast":
        return "plain torch has no block-scaled matmul, so quantizing activations gains nothing"
    return None


def _triton_unsupported_reason(problem: Problem) -> str | None:
    if problem.precision == "fast":
        return "unpacks weights and multiplies in 16 bits"
    if problem.device.type != "cuda" and not device_facts.interpreted():
        return f"needs an NVIDIA or AMD GPU; this is {problem.device.type}"
    return device_facts.triton_unsupported_reason()


def _triton_mx_unsupported_reason(problem: Problem) -> str | None:
    reason = fp8_rowwise.activations_unsupported_reason(replace(problem, small_m=False))
    return reason or device_facts.block_scaled_unsupported_reason(problem.device)


def _block_scaled(name: str, summary: str, matmul: Callable, unsupported_reason, **options):
    """A backend whose linear quantizes x to MXFP8, then calls a block-scaled matmul."""

    def linear(x, qdata, scale, bias, rows, cols, precision):
        quantized_input = choose("quantize", x)[0].quantize(x)
        return matmul(quantized_input, (qdata, scale), bias, x.dtype, x.shape[0], rows)

    return Backend(
        name, summary, linear, unsupported_reason, input_form="mxfp8", matmul=matmul,
        test=self_test.block_scaled(matmul), **options,
    )  # fmt: skip


BACKENDS: tuple[Backend, ...] = (
    _block_scaled(
        "torch_mx",
        "block-scaled tensor cores (Blackwell) by cuBLASLt, activations in MXFP8",
        torch_mx.matmul,
        torch_mx.unsupported_reason,
    ),
    Backend(
        name="fp8",
        summary="FP8 tensor cores (Hopper, Ada), activations quantized row by row",
        linear=fp8_rowwise.linear,
        unsupported_reason=fp8_rowwise.unsupported_reason,
        input_form="rowwise",
        test=self_test.fast,
    ),
    Backend(
        name="triton",
        summary="Triton kernels and cuBLAS, exact weights",
        quantize=_lazy("cast", "quantize"),
        dequantize=_lazy("cast", "dequantize"),
        linear=_lazy("exact", "linear"),
        unsupported_reason=_triton_unsupported_reason,
        test=self_test.exact,
    ),
    _block_scaled(
        "triton_mx",
        "block-scaled tensor cores (Blackwell, gfx950) by Triton, activations in MXFP8",
        _lazy("mx", "matmul"),
        _triton_mx_unsupported_reason,
        automatic=False,
    ),
    _block_scaled(
        "cute_mx",
        "block-scaled tensor cores (Blackwell) by CuTe DSL, not yet run on a GPU",
        mx.matmul,
        mx.unsupported_reason,
        automatic=False,
    ),
    Backend(
        name="eager",
        summary="plain torch on any device, exact weights",
        quantize=eager.quantize,
        dequantize=eager.dequantize,
        linear=eager.linear,
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

# Compute capability -> backend -> the file in bench/results that shows it correct, and faster than
# torch_mx, on such a card (`prefers` in bench/gpu/report.py; a test holds every entry to it). These
# come before the automatic ones. Nothing has been measured yet.
MEASURED: dict[tuple[int, int], dict[str, str]] = {}

_NOT_AUTOMATIC = "not chosen automatically; select it with use_backend"
_forced: Backend | None = None


def _automatic(device: torch.device) -> list[Backend]:
    """The backends that are chosen without being named, in order of preference."""
    preferred = MEASURED.get(device_facts.capability(device), {}) if MEASURED else {}
    first = [b for b in BACKENDS if b.name in preferred]
    return first + [b for b in BACKENDS if b.automatic and b not in first]


def _attempts(
    problem: Problem, forced: Backend | None
) -> Iterator[tuple[Backend, str, str | None]]:
    """(backend, precision, unsupported reason or None), in order of preference."""
    if forced is not None and getattr(forced, problem.op) is None:
        forced = None  # it only multiplies
    if forced is None:
        candidates = [b for b in _automatic(problem.device) if getattr(b, problem.op) is not None]
    else:
        candidates = [forced]
        problem = replace(problem, small_m=False)  # which only concerns speed
    for precision in ("exact",) if problem.precision == "exact" else ("fast", "exact"):
        for backend in candidates:
            reason = _unsupported_reason(backend, replace(problem, precision=precision))
            yield backend, precision, reason


def _unsupported_reason(backend: Backend, problem: Problem) -> str | None:
    """Why a backend cannot take a problem, its self-test on the device included, or None."""
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


@cache
def _choose(problem: Problem, forced: Backend | None) -> tuple[Backend, str]:
    """The backend for a problem, and the precision it will run at."""
    reasons = []
    for backend, precision, reason in _attempts(problem, forced):
        if reason is None:
            return backend, precision
        reasons.append(f"{backend.name} ({precision}): {reason}")
    raise ValueError(
        f"no MXFP8 backend takes {problem.op} of {problem.dtype} on {problem.device} at precision "
        f"{problem.precision!r}: {'; '.join(reasons)}"
    )


@cache
def _notice_exact(problem: Problem, forced: Backend | None) -> None:
    """Warn that fast runs exact, unless that is only because x has few rows."""
    if _choose(problem, forced)[1] == "exact":
        fast = takewhile(lambda attempt: attempt[1] == "fast", _attempts(problem, forced))
        reasons = "; ".join(f"{backend.name}: {reason}" for backend, _, reason in fast)
        _warn_exact(problem.device.type, reasons)


@cache
def _warn_exact(device: str, reasons: str) -> None:
    """Log once per device type and set of reasons, whatever the dtype."""
    logger.warning("MXFP8: running exact instead of fast on %s. %s.", device, reasons)


def choose(
    op: str, tensor: torch.Tensor, precision: str = "exact", rows: int | None = None
) -> tuple[Backend, str]:
    """The backend that runs `op` on a tensor like this one, and the precision it runs at.

    Args:
        rows: of x, for a linear; default: many.
    """
    problem = Problem(op, tensor.device, tensor.dtype, precision, _is_small(rows))
    backend, runs_as = _choose(problem, _forced)
    if precision == "fast" and runs_as == "exact":
        _notice_exact(replace(problem, small_m=False), _forced)
    return backend, runs_as


def _is_small(rows: int | None) -> bool:
    return rows is not None and rows <= fp8_rowwise.SMALL_M


@dataclass(frozen=True)
class ExecutionPath:
    """The backend that runs a linear, and why the ones before it do not.

    Attributes:
        precision: that it runs at, "exact" or "fast".
        input_form: as of `Backend`.
        unsupported: (backend, reason) of those that would have come first, one entry for each.
    """

    backend: str
    precision: str
    input_form: str | None
    unsupported: tuple[tuple[str, str], ...]


def execution_path(
    device: torch.device, dtype: torch.dtype, precision: str, rows: int | None = None
) -> ExecutionPath:
    """What `choose` selects for a linear, with the reasons.

    Args:
        dtype: of x.
        rows: of x; default: many.
    """
    problem = Problem("linear", device, dtype, precision, _is_small(rows))
    chosen, runs_as = _choose(problem, _forced)
    reasons: dict[str, str] = {}
    for backend, tried, reason in _attempts(problem, _forced):
        if (backend, tried) == (chosen, runs_as):
            break
        if not backend.input_form or backend.name not in reasons:  # at the precision it is for
            reasons[backend.name] = reason
    # Backends at or after the chosen one may have been tried at fast first: list only those before.
    before = takewhile(lambda item: item[0] != chosen.name, reasons.items())
    return ExecutionPath(chosen.name, runs_as, chosen.input_form, tuple(before))


def input_form(device: torch.device, dtype: torch.dtype, precision: str) -> tuple[str, str] | None:
    """(`Backend.input_form`, backend) of a linear of many rows; None where it is one op."""
    backend, _ = _choose(Problem("linear", device, dtype, precision), _forced)
    return backend.input_form and (backend.input_form, backend.name)


# As `torch.compiler.assume_constant_result` does, which would import the compiler: a second.
input_form._dynamo_marked_constant = True


def describe_paths(device: torch.device | str | None = None) -> list[str]:
    """Which backends run linears in bfloat16 on a device, one line per precision."""
    device = _default(device)
    lines = []
    for precision in PRECISIONS:
        small, large = (
            execution_path(device, torch.bfloat16, precision, rows) for rows in (1, None)
        )
        small, large = (f"{path.backend} ({path.precision})" for path in (small, large))
        if small != large:
            large = f"up to {fp8_rowwise.SMALL_M} rows: {small}, more rows: {large}"
        lines.append(f"{precision}: {large}")
    return lines


def list_backends(device: torch.device | str | None = None) -> list[BackendStatus]:
    """Every backend in order of preference, for `linear` on `device`.

    Args:
        device: default is CUDA where there is a CUDA device, else the CPU.
    """
    problem = Problem("linear", _default(device), torch.bfloat16)
    result = []
    for backend in BACKENDS:
        best = replace(problem, precision="fast" if backend.input_form else "exact")
        if backend in _automatic(problem.device):
            reason = _unsupported_reason(backend, best) or ""
        else:  # without its self-test: it does not run unless named
            reason = backend.unsupported_reason(best) or _NOT_AUTOMATIC
        result.append(BackendStatus(backend.name, backend.summary, not reason, reason))
    return result


def _default(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = torch.device("cuda", 0) if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def named(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: there is none.
    """
    backends = {backend.name: backend for backend in BACKENDS}
    if name not in backends:
        raise ValueError(f"unknown backend {name!r}; choose one of: {', '.join(backends)}")
    return backends[name]


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every call within the context, in all threads.

    Raises:
        ValueError: on entry, no backend has that name; at a call, the backend cannot take the
            problem.
    """
    global _forced
    backend = named(name)
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before
