"""Which backend runs a linear: chosen once per kind of problem, from capability, with reasons.

`records` lists what there is. The first backend without a reason against it is chosen, with the
steps around its matmul, and the whole is one frozen `ExecutionPath`, which is kept: a call costs a
dictionary look-up. There is no choice inside a backend and no fallback after a failure: what cannot
run here is ruled out before the call, with its reason, and an exception in a kernel reaches the
caller.

Precision: "exact" multiplies the stored weights by activations as they are (W8A16); "fast"
quantizes activations too (W8A8), for an 8-bit matmul; "auto" is fast on GPUs that have one, else
exact.

On a GPU a fast matmul is worth having only with a quantizer beside it that reads x once. In plain
torch, quantizing x takes a dozen passes, which costs more than the matmul saves.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch

from . import device_facts, self_test
from .backends import eager
from .records import (
    BACKENDS,
    FEW_ROWS,
    FLOATS,
    PREPARE,
    Backend,
    Problem,
    Step,
    m_class,
)

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "exact", "fast")

# Compute capability -> backend -> the file in bench/results that shows it correct, and faster than
# torch_mx, on such a card (`prefers` in bench/gpu/report.py; a test holds every entry to it). These
# come before the automatic ones. Nothing has been measured yet.
MEASURED: dict[tuple[int, int], dict[str, str]] = {}

_NOT_AUTOMATIC = "not chosen automatically; select it with use_backend"
_ON_EACH_CALL = "its weight would be prepared on each call, in several passes"


@dataclass(frozen=True)
class ExecutionPath:
    """How a linear runs: who prepares the weight, who quantizes the input, who multiplies.

    Attributes:
        backend: its name; precision: that it runs at, "exact" or "fast".
        weight_form, input_form: as in `records`.
        preparer, quantizer: names of the steps, None where there is nothing to do.
        unsupported: (backend, reason) of those that would have come first, one entry for each.
    """

    backend: str
    precision: str
    weight_form: str
    input_form: str | None
    preparer: str | None
    quantizer: str | None
    unsupported: tuple[tuple[str, str], ...] = field(compare=False)


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


@dataclass
class _Verdicts:
    """Asks for reasons; `final` turns False if one could not be established now."""

    final: bool = True

    def reason(self, what: Backend | Step, problem: Problem) -> str | None:
        """Why a backend or step does not take a problem, its self-test included, or None."""
        reason = what.unsupported_reason(problem)
        if reason is None and what.test is not None:
            reason, final = self_test.verdict(what.name, what.test, problem.device, problem.dtype)
            self.final = self.final and final
        return reason

    def first(self, steps: tuple[Step, ...], problem: Problem, one_pass: bool):
        """(the first step that takes a problem, None), or (None, the first reason why none does).

        Args:
            one_pass: whether only such steps are wanted.
        """
        reasons = []
        for step in steps:
            if one_pass and not step.one_pass:
                continue
            reason = self.reason(step, problem)
            if reason is None:
                return step, None
            reasons.append(f"{step.name}: {reason}")
        return None, "; ".join(reasons) or "there is none"


_forced: tuple[Backend, ...] = ()
_entered: list[list[tuple[Backend, ...]]] = []  # of `use_backend`, each the only one in its list
_paths: dict[tuple, ExecutionPath] = {}
_steps: dict[tuple, Step] = {}
_warned: set[tuple[str, str]] = set()
_tried: set[tuple] = set()  # (path, device, dtype, shape, bias, rows)
_refused: dict[tuple, str] = {}  # (backend, device, dtype, shape) -> reason


def forget() -> None:
    """Choose anew: for tests that change what there is."""
    _paths.clear()
    _steps.clear()
    _warned.clear()
    _tried.clear()
    _refused.clear()
    self_test.forget()


def execution_path(
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    rows: int | None = None,
    shape: tuple[int, int] | None = None,
    *,
    weight_form: str = "stored",
    prepare: str = "never",
) -> ExecutionPath:
    """How a linear runs.

    Args:
        dtype: of x.
        precision: "auto", "exact" or "fast".
        rows: of x; default: many.
        shape: (N, K) of the weight; default: any.
        weight_form: of the weight at hand.
        prepare: whether a stored weight may be prepared: "never", "each call", "once" (`Problem`).

    Raises:
        ValueError: no backend takes it, or one of the arguments is none of the above.
    """
    return _path(device, dtype, precision, m_class(rows), shape, weight_form, prepare)


def _path(*parts) -> ExecutionPath:
    key = *parts, _forced
    path = _paths.get(key)
    return path if path is not None else _choose(key)


# As `torch.compiler.assume_constant_result` does, which would import the compiler: a second.
_path._dynamo_marked_constant = True


def _path_of(problem: Problem) -> ExecutionPath:
    return _path(*_parts(problem))


def _parts(problem: Problem) -> tuple:
    return tuple(getattr(problem, part.name) for part in fields(problem))


def _choose(key: tuple) -> ExecutionPath:
    *parts, forced = key
    problem, verdicts, reasons = Problem(*parts), _Verdicts(), {}
    _check(problem)
    for backend in _candidates(problem, forced):
        steps, reason = _steps_for(backend, problem, verdicts, bool(forced))
        if steps is not None:
            names = (None if step is None else step.name for step in steps)
            path = ExecutionPath(
                backend.name, backend.precision, backend.weight_form, backend.input_form, *names,
                tuple(reasons.items()),
            )  # fmt: skip
            break
        reasons[backend.name] = reason
    else:
        found = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(
            f"no MXFP8 backend takes a linear of {problem.dtype} on {problem.device} at precision "
            f"{problem.precision!r} with a weight that is {problem.weight_form}"
            f"{'' if problem.shape is None else f', {list(problem.shape)}'}: {found or 'none'}"
        )
    wants_fast = problem.precision == "fast" and problem.prepare != "never"
    if wants_fast and path.precision == "exact" and problem.m_class == "many":
        if problem.shape is None:
            _warn_exact(problem.device.type, path)
        else:  # which warns unless it is this layer alone
            _path_of(replace(problem, shape=None))
    if problem.m_class != "many" and problem.precision != "exact" and path.backend == "eager":
        many, known = _as_many(problem, forced)
        path, verdicts.final = many or path, verdicts.final and known
    if verdicts.final:
        _paths[key] = path
    return path


def _check(problem: Problem) -> None:
    """Raise ValueError for a problem that there is not: once, as its path would be kept."""
    for name, value, allowed in (
        ("precision", problem.precision, PRECISIONS),
        ("x's dtype", problem.dtype, FLOATS),
        ("prepare", problem.prepare, PREPARE),
    ):
        if value not in allowed:
            names = ", ".join(str(one).removeprefix("torch.") for one in allowed)
            raise ValueError(f"{name} is {value!r}; it must be one of {names}")


def _as_many(problem: Problem, forced: tuple[Backend, ...]) -> tuple[ExecutionPath | None, bool]:
    """(the path of many rows, whether it is kept) for few rows on a GPU without Triton.

    Plain torch unpacks a whole weight for them, and tensor cores that multiply it as it is stored
    read half of its bytes once. The path is None where those do not run.
    """
    if forced or problem.device.type == "cpu":
        return None, True
    many = replace(problem, m_class="many")
    path = _path_of(many)
    fits = path.precision == "fast" and path.weight_form == problem.weight_form
    return path if fits else None, (*_parts(many), forced) in _paths


def _candidates(problem: Problem, forced: tuple[Backend, ...]) -> Iterator[Backend]:
    """The backends that are tried, in order of preference."""
    backends = forced or _automatic(problem.device)
    for precision in ("exact",) if problem.precision == "exact" else ("fast", "exact"):
        for backend in backends:
            at_hand = problem.weight_form != "stored"
            fits = forced or at_hand or problem.m_class in backend.m_classes
            if backend.precision == precision and fits:
                yield backend


def _automatic(device: torch.device) -> list[Backend]:
    """The backends that are chosen without being named, in order of preference."""
    capability = device_facts.capability(device)
    preferred = MEASURED.get(capability, {}) if MEASURED else {}
    first = [b for b in BACKENDS if b.name in preferred]
    if (capability or (0, 0))[0] == 9:
        # comfy-kitchen's INT8 was reported slower than BF16 on Hopper, which has full-rate FP8.
        first += [b for b in BACKENDS if b.weight_form == "rowwise_fp8" and b.automatic]
    return first + [b for b in BACKENDS if b.automatic and b not in first]


def _steps_for(backend: Backend, problem: Problem, verdicts: _Verdicts, forced: bool):
    """((preparer, quantizer), None) of a backend that takes a problem, else (None, reason)."""
    if backend.precision == "fast" and problem.shape is not None and 0 in problem.shape:
        return None, "the weight is empty"
    reason = (
        None
        if forced
        else _named_only(backend, problem)
        or _refused.get((backend.name, problem.device, problem.dtype, problem.shape))
    )
    reason = reason or verdicts.reason(backend, problem)
    if reason is not None:
        return None, reason
    preparer = quantizer = None
    if backend.weight_form != problem.weight_form:
        if problem.weight_form != "stored":
            return None, f"multiplies {backend.weight_form}, the weight is {problem.weight_form}"
        if problem.prepare == "never":
            return None, f"needs a weight prepared as {backend.weight_form}"
        once = problem.prepare == "once" or forced
        preparer, reason = verdicts.first(backend.preparers, problem, one_pass=not once)
        if preparer is None:
            return None, _ON_EACH_CALL if not once else f"cannot prepare weights ({reason})"
    if backend.quantizers:
        one_pass = problem.device.type != "cpu" and not forced
        quantizer, reason = verdicts.first(backend.quantizers, problem, one_pass)
        if quantizer is None:
            slower = one_pass and not all(step.one_pass for step in backend.quantizers)
            named = f"; use_backend({backend.name!r}) runs it with plain torch's" if slower else ""
            return None, f"nothing here quantizes inputs in one pass ({reason}){named}"
    return (preparer, quantizer), None


def _named_only(backend: Backend, problem: Problem) -> str | None:
    """Why a backend is not chosen for a problem without being named, or None."""
    if backend.weight_form == "rotated_int8" and problem.weight_form == "stored":
        if problem.prepare == "each call":
            return "its weight is prepared once, by callers that look how much it changes"
        if problem.device.type == "cpu" and problem.precision == "auto":
            return "on a CPU, auto stays exact"
        if (device_facts.capability(problem.device) or (0, 0)) >= (10, 0):
            return device_facts.NamedReason(
                "runs on this card when it is named; MXFP8 inputs are its native path"
            )
    return None


def _warn_exact(device: str, path: ExecutionPath) -> None:
    """Log once per device type and set of reasons, whatever the dtype.

    A layer whose shape alone keeps it from running fast is for the backend report.
    """
    fast = {b.name for b in BACKENDS if b.precision == "fast"}
    reasons = "; ".join(f"{name}: {reason}" for name, reason in path.unsupported if name in fast)
    reasons = reasons or "Those that are named are exact"
    if (device, reasons) not in _warned:
        _warned.add((device, reasons))
        logger.warning("MXFP8: running exact instead of fast on %s. %s.", device, reasons)


def try_shape(
    device: torch.device, dtype: torch.dtype, precision: str, shape: tuple[int, int], bias: bool
) -> None:
    """Before a model runs: try how its linears of a shape will run, and refuse what is wrong.

    Each path runs once on random numbers, against torch's linear: those of the weight as it is
    stored, and as it is prepared. A backend that raises or differs is not chosen for this shape any
    more, unless it is named, and the next one is tried. Not tried are plain torch, which the others
    are held to, what is named, and what there is no memory for.

    Args:
        as for `execution_path`; bias: whether they have one, of `dtype`.
    """
    if 0 in shape or _forced:
        return
    stored, tried, all_rows = None, shape, self_test.ROWS
    if device.type == "cpu":
        tried, all_rows = (min(shape[0], self_test.N_ON_CPUS), shape[1]), self_test.ROWS_ON_CPUS
    for rows in all_rows:
        for prepared in (True, False):
            while True:
                path = _path_of_call(device, dtype, precision, shape, rows, prepared)
                key, backend = (path, device, dtype, shape, bias, rows), named(path.backend)
                if key in _tried or backend.test is None:
                    break
                try:
                    stored = stored or self_test.random_weight(*tried, device)
                    trial = partial(_try, path, stored, tried, bias, rows)
                    reason = self_test.run(trial, device, dtype)
                except (MemoryError, torch.OutOfMemoryError) as error:
                    logger.info("MXFP8: layers of %d x %d were not tried: %s.", *shape, error)
                    return
                _tried.add(key)
                if reason is not None:
                    _refuse(path.backend, device, dtype, shape, reason)


def _path_of_call(device, dtype, precision, shape, rows: int, prepared: bool) -> ExecutionPath:
    """How a call runs, with its preparer, on a weight as stored or in the form of many rows."""
    many = execution_path(device, dtype, precision, None, shape, prepare="once")
    if not prepared or many.weight_form == "stored":
        return execution_path(device, dtype, precision, rows, shape)
    if m_class(rows) == "many":
        return many
    few = execution_path(device, dtype, "auto", rows, shape, weight_form=many.weight_form)
    return replace(few, preparer=many.preparer)


def _refuse(backend: str, device, dtype, shape, reason: str) -> None:
    """Choose no more a backend that is wrong at a shape."""
    logger.warning(
        "MXFP8: %s is not used for layers of %d x %d on %s: %s.", backend, *shape, device, reason
    )
    _refused[backend, device, dtype, shape] = reason
    for key in list(_paths):
        if shape in key:
            _paths.pop(key, None)  # another thread may refuse it too


def _try(path: ExecutionPath, stored, shape, bias: bool, rows: int, device, dtype) -> str | None:
    """What is wrong with a path at a shape, or None."""
    backend = named(path.backend)
    quantize, prepare = (
        next(step.run for step in steps if step.name == name) if name else lambda *tensors: tensors
        for steps, name in (
            (backend.quantizers, path.quantizer), (backend.preparers, path.preparer)
        )
    )  # fmt: skip
    prepared = prepare(*stored)

    def linear(x, bias):
        return backend.matmul(quantize(x), prepared, bias, dtype, shape[0])

    form = None if path.precision == "exact" else path.input_form or path.weight_form
    weight = eager.dequantize(*stored, dtype, *shape)
    return self_test.at_shape(linear, weight, bias, rows, form)


def choose_step(steps: tuple[Step, ...], device: torch.device, dtype: torch.dtype) -> Step:
    """Who quantizes or dequantizes here: `records.QUANTIZERS` or `DEQUANTIZERS`.

    Where a backend is named that has such a step, that step.
    """
    key = steps, device, dtype, _forced
    step = _steps.get(key)
    if step is None:
        names = [backend.name for backend in _forced]
        verdicts, problem = _Verdicts(), Problem(device, dtype)
        named = [step for step in steps if step.name in names]
        step = named[0] if named else verdicts.first(steps, problem, one_pass=False)[0]
        if verdicts.final:
            _steps[key] = step
    return step


def describe_paths(device: torch.device | str | None = None) -> list[str]:
    """Which backends run linears in bfloat16 on a device, one line per precision."""
    device = _default(device)
    lines = []
    for precision in PRECISIONS:
        small, large = (
            execution_path(device, torch.bfloat16, precision, rows, prepare="once")
            for rows in (1, None)
        )
        small, large = (f"{path.backend} ({path.precision})" for path in (small, large))
        both = f"up to {FEW_ROWS} rows: {small}, more rows: {large}"
        lines.append(f"{precision}: {large if small == large else both}")
    return lines


def list_backends(device: torch.device | str | None = None) -> list[BackendStatus]:
    """Every backend in order of preference, for a linear on `device` whose weight may be prepared.

    Args:
        device: default is CUDA where there is a CUDA device, else the CPU.
    """
    device = _default(device)
    result = []
    for backend in BACKENDS:
        rows = backend.m_classes[-1]
        problem = Problem(device, torch.bfloat16, backend.precision, rows, prepare="once")
        if backend in _automatic(device):
            reason = _steps_for(backend, problem, _Verdicts(), forced=False)[1] or ""
        else:  # without its self-test: it does not run unless named
            reason = backend.unsupported_reason(problem) or _NOT_AUTOMATIC
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
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    names = ", ".join(backend.name for backend in BACKENDS)
    raise ValueError(f"unknown backend {name!r}; choose one of: {names}")


@contextlib.contextmanager
def use_backend(*names: str) -> Iterator[None]:
    """Choose among these backends for every linear within the context, in all threads.

    They need not be automatic, and take any number of rows. Of an exact and a fast one, the
    precision of the call decides. Of several contexts, the one that was entered last holds.

    Raises:
        ValueError: on entry, no backend has that name; at a call, none of them takes the problem.
    """
    entered = [tuple(named(name) for name in names)]
    _entered.append(entered)
    _force()
    try:
        yield
    finally:
        # Threads may leave in another order than they entered.
        _entered[:] = [other for other in _entered if other is not entered]
        _force()


def _force() -> None:
    global _forced
    (_forced,) = _entered[-1] if _entered else ((),)
