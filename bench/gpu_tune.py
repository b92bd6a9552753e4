"""Try configurations of the kernels and print the fastest per problem: `gpu.py --tune`.

Kernels read their constants from tables in their modules; a candidate is a table for the time of a
call. Every candidate is checked against the result of plain torch before it is timed, and one that
does not compile, does not fit the device or is wrong is listed with its reason. Compiling is most
of the work, so with a GPU several processes compile the candidates first, into Triton's cache.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module

import gpu_ceilings
import gpu_package
import torch
from gpu_checks import close, same_bits
from gpu_clock import Clock, reason
from gpu_shapes import LARGE, numbers, sets_beyond, weight
from gpu_ways import exact_weight

from mxfp8.kernels import eager, launch, row_fold

_PROCESSES = 8


@dataclass(frozen=True)
class Problem:
    """One size: `run(i)` on the i-th set of inputs, `wrong(result of run(0))`, its roofline."""

    run: Callable
    wrong: Callable[[object], str | None]
    sets: int
    roofline: Callable[[gpu_ceilings.Ceilings], float]


@dataclass(frozen=True)
class Kernel:
    """What is tuned.

    Attributes:
        table: configuration -> {attribute of the module: value}.
        problem: sizes -> Problem.
    """

    module: str
    table: Callable[[dict], dict]
    problem: Callable[..., Problem]
    sizes: tuple[tuple[int, ...], ...]
    quick: tuple[tuple[int, ...], ...]
    candidates: tuple[dict, ...] = field(default=())


def _gemm(BM, BN, BK, GROUP, warps, stages) -> dict:
    return {
        "BM": BM, "BN": BN, "BK": BK, "GROUP": GROUP, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


_GEMMS = (
    _gemm(128, 256, 128, 8, 8, 4), _gemm(128, 256, 128, 8, 8, 3), _gemm(128, 256, 128, 16, 8, 4),
    _gemm(128, 256, 128, 4, 8, 4), _gemm(256, 128, 128, 8, 8, 4), _gemm(256, 128, 128, 8, 8, 3),
    _gemm(128, 256, 64, 8, 8, 6), _gemm(128, 128, 128, 8, 8, 5), _gemm(128, 128, 128, 8, 4, 4),
    _gemm(128, 128, 256, 8, 8, 3), _gemm(64, 256, 128, 8, 8, 4), _gemm(64, 256, 128, 8, 4, 4),
    _gemm(64, 128, 128, 8, 4, 5), _gemm(64, 128, 256, 8, 4, 4), _gemm(64, 64, 128, 8, 4, 6),
    _gemm(64, 64, 256, 8, 4, 4),
)  # fmt: skip
_ONE_ROW = tuple(
    {"N": n, "K": k, "num_warps": w, "num_stages": s}
    for n, k, w in ((4, 512, 2), (4, 512, 4), (4, 1024, 4), (8, 256, 4), (8, 512, 4), (8, 512, 8),
                    (8, 1024, 8), (16, 256, 4), (16, 512, 8), (32, 256, 8))
    for s in (1, 3)
)  # fmt: skip
_FEW_ROWS = tuple(
    {"BM": 16, "N": n, "K": k, "num_warps": w, "num_stages": s}
    for n, k, w, s in ((16, 128, 2, 4), (16, 256, 4, 4), (32, 128, 4, 4), (32, 128, 4, 6),
                       (32, 256, 4, 3), (32, 256, 8, 4), (64, 128, 4, 4), (64, 128, 8, 3))
)  # fmt: skip
_CASTS = tuple(
    {"ROWS": r, "COLUMNS": c, "WARPS": w}
    for r, c, w in ((128, 128, 4), (128, 128, 8), (128, 128, 16), (128, 256, 8), (128, 256, 16),
                    (128, 512, 16), (64, 256, 8), (32, 512, 8), (32, 256, 4), (64, 128, 4))
)  # fmt: skip
_FOLDS = tuple(
    {"R": r, "C": c, "num_warps": w}
    for r, c, w in ((4, 1024, 4), (4, 2048, 8), (8, 512, 4), (8, 1024, 4), (8, 1024, 8),
                    (16, 512, 8), (2, 2048, 4), (1, 4096, 4), (32, 256, 8))
)  # fmt: skip


def kernels(device: torch.device) -> dict[str, Kernel]:
    """By name."""
    shapes = (10240, 3840), (3072, 3072), (3072, 15360)
    many = tuple((m, *shape) for m in (4096, 1024, 256, 128, 64) for shape in shapes)
    few = tuple((m, *shape) for m in (64, 32, 16, 4) for shape in ((5120, 5120), (3072, 3072)))
    tiny = ((70, 96, 256),)

    def gemm(config: dict) -> dict:
        table = ((1 << 31, config),)
        return {"CONFIGS": dict.fromkeys(import_module("mxfp8.kernels.fp8_gemm").CONFIGS, table)}

    def few_rows(config: dict) -> dict:
        return {"FEW_ROWS": ((64, config),)}

    wide = tuple(c | {"BM": bm} for bm in (16, 32, 64) for c in _FEW_ROWS)
    one = ((1, 5120, 5120), (1, 3072, 3072), (1, 10240, 3840))
    large, small = LARGE, ((96, 256),)
    found = {
        "fp8_gemm": Kernel("fp8_gemm", gemm, _product(device), many, tiny, _GEMMS),
        "one_row": Kernel("triton_w8a16", lambda c: {"ONE_ROW": c}, _w8a16(device), one,
                          ((1, 96, 256),), _ONE_ROW),
        "few_rows": Kernel("triton_w8a16", few_rows, _w8a16(device), few, ((8, 96, 256),), wide),
        "dequantize": Kernel("triton_cast", dict, _cast(device, "dequantize"), large, small,
                             _CASTS),
        "quantize": Kernel("triton_cast", dict, _cast(device, "quantize"), large, small,
                           tuple(c for c in _CASTS if c["ROWS"] == 128)),
        "fold": Kernel("triton_fold", lambda c: {"FOLD": c}, _cast(device, "fold_rows"), large,
                       small, _FOLDS),
    }  # fmt: skip
    return found


def _count(device, nbytes: int) -> int:
    return sets_beyond(gpu_package.l2_bytes(device), nbytes)


def _product(device) -> Callable[..., Problem]:
    def make(M: int, N: int, K: int) -> Problem:
        sets = _count(device, N * K + M * K)
        a = [row_fold.quantize_tokens(numbers(device, M, K, seed=s)) for s in range(sets)]
        b = [row_fold.fold_rows(*eager.quantize(weight(device, N, K, s))) for s in range(sets)]
        (x, x_scale), (w, w_scale) = a[0], b[0]
        wanted = (x.double() * x_scale.double()[:, None]) @ w.double().t() * w_scale.double()
        matmul = import_module("mxfp8.kernels.fp8_gemm").matmul
        return Problem(
            lambda i: matmul(*a[i], *b[i], None, torch.bfloat16, N),
            lambda out: close(out, wanted, 2.5e-3 + K / 32 * 2.0**-15),
            sets,
            lambda ceilings: ceilings.matmul(M, N, K, 1, fp8=True),
        )

    return make


def _w8a16(device) -> Callable[..., Problem]:
    def make(M: int, N: int, K: int) -> Problem:
        sets = _count(device, N * K)
        xs = [numbers(device, M, K, seed=s) for s in range(sets)]
        packed = [eager.quantize(weight(device, N, K, s)) for s in range(sets)]
        wanted = xs[0].double() @ exact_weight(*packed[0]).t()
        linear = import_module("mxfp8.kernels.triton_w8a16").linear
        return Problem(
            lambda i: linear(xs[i], *packed[i], None, N, K),
            lambda out: close(out, wanted, 2.5e-3),
            sets,
            lambda ceilings: ceilings.exact(M, N, K, True),
        )

    return make


def _cast(device, op: str) -> Callable[..., Problem]:
    def make(N: int, K: int) -> Problem:
        sets = _count(device, N * K)
        plain = [weight(device, N, K, s) for s in range(sets)]
        packed = [eager.quantize(w) for w in plain]
        name = "triton_fold" if op == "fold_rows" else "triton_cast"
        function = getattr(import_module(f"mxfp8.kernels.{name}"), op)
        if op == "dequantize":
            wanted = (eager.dequantize(*packed[0], torch.bfloat16, N, K),)
            run = lambda i: (function(*packed[i], torch.bfloat16, N, K),)  # noqa: E731
        elif op == "quantize":
            wanted, run = packed[0], lambda i: function(plain[i])
        else:
            wanted, run = row_fold.fold_rows(*packed[0]), lambda i: function(*packed[i])

        def wrong(found) -> str | None:
            return next(filter(None, map(same_bits, found, wanted)), None)

        def roofline(ceilings):
            return ceilings.fold(N, K) if op == "fold_rows" else ceilings.unpack(N, K)

        return Problem(run, wrong, sets, roofline)

    return make


@contextlib.contextmanager
def override(module, **values):
    """Attributes of a module, changed for a while."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _text(config: dict) -> str:
    return ",".join(f"{name}={value}" for name, value in config.items()) or "as it is"


def _given(words: list[str]) -> dict[str, list[dict]]:
    """Kernel -> configurations from the command line."""
    found: dict[str, list[dict]] = {}
    for word in words:
        name, _, settings = word.partition(":")
        pairs = (pair.split("=") for pair in settings.split(","))
        found.setdefault(name, []).append({key: int(value) for key, value in pairs})
    return found


def tune(arguments, device: torch.device) -> int:
    refused = launch.refusal()
    if refused is None and device.type != "cuda" and not launch.interpreted():
        refused = f"needs a GPU; this is {device.type}"
    if refused is not None:
        print(f"nothing to tune: {refused}")
        return 0
    given = _given(arguments.config)
    wanted = arguments.kernel or list(given) or list(kernels(device))
    chosen = {name: kernels(device)[name] for name in wanted}
    part, parts = map(int, (arguments.share or "0/1").split("/"))
    end = time.monotonic() + 60 * arguments.minutes
    clock = Clock(device, rounds=1 if arguments.quick else 9)
    if arguments.share is None:
        if device.type == "cuda":
            _compile_ahead()
        ceilings = gpu_ceilings.measure(clock, arguments.quick)
    results = []
    for name, kernel in chosen.items():
        module = import_module(f"mxfp8.kernels.{kernel.module}")
        # The first is what the module has now.
        configs = [{}, *given.get(name, kernel.candidates)][part::parts]
        for size in kernel.quick if arguments.quick else kernel.sizes:
            if time.monotonic() > end:
                print(f"{name} {size}: no time left")
                continue
            problem = kernel.problem(*size)
            runs = _runs(module, kernel, problem, configs, arguments.share is not None)
            if arguments.share is None:
                limit = problem.roofline(ceilings)
                results.append(_report(name, size, clock.time(runs, problem.sets), limit))
                _save(arguments, device, results)
            del problem, runs
    return 0


def _runs(module, kernel: Kernel, problem: Problem, configs, quiet: bool) -> dict[str, Callable]:
    """Configuration as text -> run, of those that are right."""
    runs = {}
    for config in configs:

        def run(i, config=config):
            with override(module, **(kernel.table(config) if config else {})):
                return problem.run(i)

        try:
            wrong = problem.wrong(run(0))
        except Exception as error:  # a configuration that does not fit is a result too
            wrong = reason(error)
        if wrong is None:
            runs[_text(config)] = run
        elif not quiet:
            print(f"  {_text(config)}: {wrong}", flush=True)
    return runs


def _report(name: str, size, spent: dict[str, float], limit: float) -> dict:
    print(f"{name} {size}, roofline {limit:.2f} us", flush=True)
    ranked = sorted(spent.items(), key=lambda pair: pair[1])
    now = spent.get("as it is")
    for text, us in ranked:
        if text in {t for t, _ in ranked[:4]} | {"as it is"}:
            print(f"  {us:9.2f} us  {limit / us:5.2f} of roofline  {text}", flush=True)
    return {"kernel": name, "size": list(size), "roofline_us": limit, "now_us": now,
            "us": {text: round(us, 3) for text, us in ranked}}  # fmt: skip


def _save(arguments, device, results: list[dict]) -> None:
    today = datetime.date.today().isoformat()
    path = arguments.out / f"{gpu_package.slug(device)}-{today}-tune.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": gpu_package.machine(device), "results": results,
             "kernels_sha256": gpu_package.kernels_sha256()}  # fmt: skip
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _compile_ahead() -> None:
    """Compile every candidate, in several processes, into Triton's cache."""
    count = max(1, min(_PROCESSES, (os.cpu_count() or 1) // 2))
    command = [sys.executable, *sys.argv]
    started = [
        subprocess.Popen([*command, "--share", f"{i}/{count}"], stdout=subprocess.DEVNULL)
        for i in range(count)
    ]
    for process in started:
        process.wait()
