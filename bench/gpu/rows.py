"""Times of every operation by every method, and the roofline.

A row's `error` is the relative error of the output against float64, from unquantized inputs and the
weights that the method was given: for `bf16` and `stock_int8` the original ones, for all others
those of the MXFP8 file. `total_error` is against the original weights for every method. Both are
null for casts, whose bits are checked instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from gpu.ceilings import Ceilings
from gpu.clock import Clock, reason
from gpu.methods import Method, Weight, exact_weight, ours, relative, rivals
from gpu.report import MATMULS, PREPARING, QUANTIZING
from gpu.shapes import numbers, sets_beyond, weight
from working_copy import l2_bytes

from mxfp8 import kernels
from mxfp8.kernels.records import BACKENDS, DEQUANTIZERS, FEW_ROWS, Problem, Step

SAMPLE = 128  # rows at either end of an output whose error is measured


def row(op: str, method: Method | None, M, N, K, us, backend=None, **rest) -> dict:
    """A row of the results; None where a column does not apply.

    `without_us` and `added_launches` are those of a layer without a LoRA, and of a LoRA beside it.
    """
    names = ("bf16_us", "stock_us", "without_us", "added_launches", "roofline_us", "error",
             "total_error")  # fmt: skip
    assert rest.keys() <= set(names), rest
    columns = {"op": op, "precision": None, "backend": backend, "cached": None, "chosen": None}
    if method is not None:
        columns |= {"precision": method.precision, "backend": backend or method.name}
        columns |= {"cached": method.cached, "chosen": method.chosen}
    columns |= {"M": M, "N": N, "K": K, "us": us} | {name: rest.get(name) for name in names}
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in columns.items()}


@dataclass
class Bench:
    """What every section needs.

    Attributes:
        left_out: what was not measured, and why.
    """

    device: torch.device
    clock: Clock
    ceilings: Ceilings
    left_out: list[str]

    def sets(self, nbytes: int) -> int:
        return sets_beyond(l2_bytes(self.device), nbytes)

    def time(self, what: str, runs: dict[str, Callable], sets: int = 1, graph=True):
        spent = self.clock.time(runs, sets, graph)
        self.left_out += [f"{what}, {n}: {why}" for n, why in self.clock.failures.items()]
        return spent

    def methods(self, M: int, shape: tuple[int, int] | None = None) -> list[Method]:
        """Rivals, then ours; the reasons why others do not run are listed once."""
        found, reasons = ours(self.device, M, shape)
        lines = [f"{name}: {reason}" for name, reason in reasons.items()]
        self.left_out += [line for line in lines if line not in self.left_out]
        return rivals(self.device) + found

    def roofline(self, method: Method, M: int, N: int, K: int) -> float | None:
        if method.precision is None:
            return self.ceilings.matmul("plain", M, N, K)
        if method.precision == "exact":
            return self.ceilings.exact(M, N, K, M <= FEW_ROWS)
        forms = {"stored": "mxfp8", "stock": "mxfp8", "stock_int8": "rotated_int8"}
        return self.ceilings.fast(forms.get(method.form, method.form), M, N, K)


def linears(bench: Bench, M: int, N: int, K: int) -> Iterator[dict]:
    """One linear by all methods, and the matmuls alone of those that quantize inputs apart."""
    count = bench.sets(N * K + 2 * M * K)
    xs = [numbers(bench.device, M, K, seed=seed) for seed in range(count)]
    weights = [Weight(weight(bench.device, N, K, seed)) for seed in range(count)]
    methods = {method.name: method for method in bench.methods(M, (N, K))}
    runs = {
        name: lambda i, m=method: m.run(xs[i], weights[i].form(m), None)
        for name, method in methods.items()
    }
    quantized: dict[tuple, tuple] = {}

    def product(i: int, method: Method) -> torch.Tensor:
        key = method.path.input_form, i  # quantized before anything is timed
        if key not in quantized:
            quantized[key] = kernels.quantize_input(method.path, xs[i])
        matmul = method.backend.matmul
        return matmul(quantized[key], weights[i].form(method), None, torch.bfloat16, N)[:M]

    for name, method in methods.items():
        if M >= 16 and method.path is not None and method.path.quantizer is not None:
            op = f"{MATMULS[method.path.input_form]}: {name}"
            runs[op] = lambda i, m=method: product(i, m)
    spent = bench.time(f"linear {M} x {N} x {K}", runs, count)

    sample = torch.arange(M, device=bench.device)
    sample = torch.cat([sample[:SAMPLE], sample[SAMPLE:][-SAMPLE:]])
    x = xs[0][sample].double()
    original = x @ weights[0].plain.double().t()
    stored = x @ exact_weight(*weights[0].codes)[:N, :K].t()
    columns = {"bf16_us": spent.get("bf16"), "stock_us": spent.get("stock")}
    for name, us in spent.items():
        op, _, backend = name.rpartition(": ")
        method, out = methods[backend], runs[name](0)[sample]
        given = original if backend in ("bf16", "stock_int8") else stored
        columns["error"], columns["total_error"] = relative(out, given), relative(out, original)
        if op:
            limit = bench.ceilings.matmul(method.path.input_form, M, N, K)
        else:
            limit = bench.roofline(method, M, N, K)
        yield row(op or "linear", method, M, N, K, us, roofline_us=limit, **columns)


def casts(bench: Bench, N: int, K: int) -> Iterator[dict]:
    """Every step that casts a weight [N, K], or an input with as many rows."""
    count = bench.sets(N * K)
    weights = [Weight(weight(bench.device, N, K, seed)) for seed in range(count)]
    bf16, stock = torch.bfloat16, {m.name: m for m in rivals(bench.device)}.get("stock")
    ceilings, problem = bench.ceilings, Problem(bench.device, bf16)
    runs: dict[str, Callable] = {}
    limits: dict[str, float | None] = {}

    def add(op: str, steps: Iterable[Step], run: Callable, limit: float | None) -> None:
        for step in steps:
            if step.name != "reference" and step.unsupported_reason(problem) is None:
                runs[f"{op}: {step.name}"] = lambda i, step=step: run(step, weights[i])
                limits[op] = limit

    unpacking = ceilings.cast("stored", N, K, 2)
    add("dequantize", DEQUANTIZERS, lambda s, w: s.run(*w.codes, bf16, N, K), unpacking)
    for form, op in QUANTIZING.items():
        steps = {s.name: s for b in BACKENDS if b.input_form == form for s in b.quantizers}
        add(op, steps.values(), lambda s, w: s.run(w.plain), ceilings.cast(form, N, K, 2))
    for form, op in PREPARING.items():
        steps = {s.name: s for b in BACKENDS if b.weight_form == form for s in b.preparers}
        add(op, steps.values(), lambda s, w: s.run(*w.codes), ceilings.prepare(form, N, K))
    if stock is not None:
        runs["stock dequantize"] = lambda i: weights[i].form(stock).dequantize()
        runs["stock quantize"] = lambda i: type(weights[i].form(stock)).from_float(
            weights[i].plain, "TensorCoreMXFP8Layout"
        )
    spent = bench.time(f"casts of {N} x {K}", runs, count)
    for name, us in spent.items():
        op, _, step = name.partition(": ")
        if step:
            M, rows = (N, None) if op in ("quantize_rowwise", "quantize_int8") else (None, N)
            yield row(op, None, M, rows, K, us, step, stock_us=spent.get(f"stock {op}"),
                      roofline_us=limits[op])  # fmt: skip


def host(bench: Bench) -> Iterator[dict]:
    """The host's microseconds for one linear in eager mode, launches included: a row per method.

    The layer is so small that the device waits for the host.
    """
    N, K = 256, 256
    stored = Weight(weight(bench.device, N, K))
    for M in (1, 128):
        x, spent, methods = numbers(bench.device, M, K), {}, bench.methods(M, (N, K))
        for method in methods:
            try:
                form = stored.form(method)
                spent[method.name] = bench.clock.host(partial(method.run, x, form, None))
            except (RuntimeError, ValueError) as error:
                bench.left_out.append(f"host, {method.name}: {reason(error)}")
        columns = {"bf16_us": spent.get("bf16"), "stock_us": spent.get("stock")}
        for method in methods:
            if method.name in spent:
                yield row("host_us", method, M, N, K, spent[method.name], **columns)
