"""Times of every operation: dense BF16, stock ComfyUI, ours, and the roofline.

A row's `error` is the relative error of the output against float64, with the stored weights and
unquantized activations; it is null for casts, whose bits are checked instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from gpu.ceilings import Ceilings
from gpu.clock import Clock
from gpu.paths import (
    Method,
    all_methods,
    backend_name,
    exact_weight,
    fast_backends,
    path_of,
    relative,
    stock_dequantize,
    stock_quantize,
)
from gpu.shapes import numbers, sets_beyond, weight
from working_copy import l2_bytes

from mxfp8 import kernels
from mxfp8.kernels.dispatch import choose_step, named
from mxfp8.kernels.records import DEQUANTIZERS, FEW_ROWS, QUANTIZERS

SAMPLE = 128  # rows at either end of an output whose error is measured


def row(op: str, precision, backend, cached, M, N, K, us, **rest) -> dict:
    """A row of the results; None where a column does not apply.

    `without_us` and `added_launches` are those of a layer without a LoRA, and of a LoRA beside it.
    """
    names = ("bf16_us", "stock_us", "without_us", "added_launches", "roofline_us", "error")
    assert rest.keys() <= set(names), rest
    columns = {"op": op, "precision": precision, "backend": backend, "cached": cached}
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
    methods: dict[str, Method]
    left_out: list[str]

    @classmethod
    def start(cls, clock: Clock, ceilings: Ceilings, left_out: list[str]) -> Bench:
        return cls(clock.device, clock, ceilings, all_methods(clock.device), left_out)

    def sets(self, nbytes: int) -> int:
        return sets_beyond(l2_bytes(self.device), nbytes)

    def time(self, what: str, runs: dict[str, Callable], sets: int = 1, graph=True):
        spent = self.clock.time(runs, sets, graph)
        self.left_out += [f"{what}, {n}: {why}" for n, why in self.clock.failures.items()]
        return spent


def casts(bench: Bench, N: int, K: int) -> Iterator[dict]:
    """The casts of a weight [N, K], and of an input with as many rows."""
    count = bench.sets(N * K)
    plain = [weight(bench.device, N, K, seed) for seed in range(count)]
    packed = [kernels.quantize(w) for w in plain]
    bf16, by_row = torch.bfloat16, named("torch_fp8")
    steps = {
        "dequantize": choose_step(DEQUANTIZERS, bench.device, packed[0][0].dtype),
        "quantize": choose_step(QUANTIZERS, bench.device, bf16),
        "to_rowwise": choose_step(by_row.preparers, bench.device, bf16),
        "quantize_rowwise": choose_step(by_row.quantizers, bench.device, bf16),
    }
    runs = {
        "dequantize": lambda i: kernels.dequantize(*packed[i], bf16),
        "stock dequantize": lambda i: stock_dequantize(*packed[i]),
        "quantize": lambda i: kernels.quantize(plain[i]),
        "stock quantize": lambda i: stock_quantize(plain[i]),
        "to_rowwise": lambda i: steps["to_rowwise"].run(*packed[i]),
        "quantize_rowwise": lambda i: steps["quantize_rowwise"].run(plain[i]),
    }
    spent = bench.time(f"casts of {N} x {K}", runs, count)
    limits = {
        "dequantize": bench.ceilings.unpack(N, K),
        "quantize": bench.ceilings.unpack(N, K),
        "to_rowwise": bench.ceilings.to_rowwise(N, K),
        "quantize_rowwise": bench.ceilings.quantize_rowwise(N, K),
    }
    for op, limit in limits.items():
        if op in spent:
            stock = spent.get(f"stock {op}")
            M, rows = (N, None) if op == "quantize_rowwise" else (None, N)
            yield row(op, None, steps[op].name, None, M, rows, K, spent[op], stock_us=stock,
                      roofline_us=limit)  # fmt: skip


def linears(bench: Bench, M: int, N: int, K: int) -> Iterator[dict]:
    """All methods of one linear, and its 8-bit matmuls alone, by every backend."""
    count = bench.sets(N * K + 2 * M * K)
    xs = [numbers(bench.device, M, K, seed=seed) for seed in range(count)]
    plain = [weight(bench.device, N, K, seed) for seed in range(count)]
    small_m = FEW_ROWS >= M
    chosen = {
        name: method
        for name, method in bench.methods.items()
        if not method.shares and not (small_m and method.precision == "fast")
    }
    stored = {name: [method.store(w) for w in plain] for name, method in chosen.items()}
    runs = {
        name: lambda i, n=name, m=method: m.run(xs[i], stored[n][i], None)
        for name, method in chosen.items()
    }
    products = {}
    if M >= 16:
        for op, input_form in (("scaled_matmul", "rowwise_fp8"), ("block_matmul", "mxfp8")):
            products |= _products(bench, op, input_form, xs, plain, N)
    if small_m and M >= 16:
        runs["unpacked"] = lambda i: torch.nn.functional.linear(
            xs[i], kernels.dequantize(*stored["exact"][i], torch.bfloat16)
        )
    spent = bench.time(f"linear {M} x {N} x {K}", runs | products, count)

    rivals = {"bf16_us": spent.get("bf16"), "stock_us": spent.get("stock")}
    sample = torch.arange(M, device=bench.device)
    sample = torch.cat([sample[:SAMPLE], sample[SAMPLE:][-SAMPLE:]])
    expected = xs[0][sample].double() @ exact_weight(*stored["exact"][0]).t()

    def measured(op, method, backend, name, limit):
        error = relative((runs | products)[name](0)[sample], expected)
        cached = None if method is None else method.cached
        precision = "fast" if method is None else method.precision
        return row(op, precision, backend, cached, M, N, K, spent[name], **rivals,
                   roofline_us=limit, error=error)  # fmt: skip

    for name, method in chosen.items():
        if name in spent and name not in ("bf16", "stock"):
            if method.precision == "exact":
                limit = bench.ceilings.exact(M, N, K, small_m)
            else:
                limit = bench.ceilings.fast(M, N, K, method.cached is not False)
            yield measured("linear", method, backend_name(bench.device, method, M), name, limit)
    if "unpacked" in spent:
        limit = bench.ceilings.exact(M, N, K, small_m)
        yield measured("linear", chosen["exact"], "dequantize + torch", "unpacked", limit)
    for name in products:
        if name in spent:
            op, _, backend = name.partition(": ")
            limit = bench.ceilings.matmul(M, N, K, 1 + (op == "block_matmul") / 32, fp8=True)
            yield measured(op, None, backend, name, limit)


def _products(bench: Bench, op: str, input_form: str, xs, plain, N: int) -> dict[str, Callable]:
    """The matmuls alone of quantized inputs and prepared weights, by every backend that has one."""
    backends, reasons = fast_backends(bench.device, input_form)
    lines = [f"{op} by {name}: {reason}" for name, reason in reasons.items()]
    bench.left_out += [line for line in lines if line not in bench.left_out]
    if not backends:
        return {}
    path = path_of(bench.device, next(iter(backends)))
    inputs = [kernels.quantize_input(path, x) for x in xs]
    weights = [kernels.prepare_weight(path, *kernels.quantize(w)) for w in plain]
    return {
        f"{op}: {name}": lambda i, b=backend: b.matmul(
            inputs[i], weights[i], None, torch.bfloat16, N
        )
        for name, backend in backends.items()
    }


def host(bench: Bench) -> Iterator[dict]:
    """The host's microseconds to launch one linear in eager mode."""
    N, K = 256, 256
    plain = weight(bench.device, N, K)
    for M in (1, 128):
        x = numbers(bench.device, M, K)
        spent = {}
        for name, method in bench.methods.items():
            if method.shares or (method.precision == "fast" and FEW_ROWS >= M):
                continue
            stored = method.store(plain)
            spent[name] = bench.clock.host(lambda m=method, s=stored, x=x: m.run(x, s, None))
        rivals = {"bf16_us": spent.pop("bf16"), "stock_us": spent.pop("stock")}
        for name, us in spent.items():
            method = bench.methods[name]
            backend = backend_name(bench.device, method, M)
            yield row("host_us", method.precision, backend, method.cached, M, N, K, us, **rivals)
