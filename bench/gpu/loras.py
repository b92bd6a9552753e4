"""A linear with a LoRA beside its weight: the two matmuls of nodes/runtime/side_branch.py.

Several LoRAs of a layer are one of their summed rank, so there is one rank here. The rivals are the
same layer without a LoRA, a dense BF16 weight into which it is merged, and stock's bypass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu.paths import backend_name, exact_weight, relative
from gpu.rows import SAMPLE, Bench, row
from gpu.shapes import numbers, weight
from torch.nn.functional import linear

from mxfp8 import kernels

RANK = 32


def loras(bench: Bench, M: int, N: int, K: int) -> Iterator[dict]:
    """Rows of exact and of fast, with a prepared weight if there is one."""
    device, count = bench.device, bench.sets(N * K + 2 * M * K)
    xs = [numbers(device, M, K, seed=seed) for seed in range(count)]
    plain = [weight(device, N, K, seed) for seed in range(count)]
    down, up = weight(device, RANK, K), numbers(device, N, RANK, seed=1, scale=0.01)
    merged = [w + up @ down for w in plain]

    def beside(out: torch.Tensor, i: int) -> torch.Tensor:
        return out.addmm_(linear(xs[i], down), up.t())

    methods = {name: bench.methods[name] for name in ("exact", "fast") if name in bench.methods}
    if "fast cached" in bench.methods:
        methods["fast"] = bench.methods["fast cached"]
    packed = [kernels.quantize(w) for w in plain]
    stored = {
        name: packed if name == "exact" else [method.store(w) for w in plain]
        for name, method in methods.items()
    }
    stock = bench.methods["stock"]
    runs = {
        "merged": lambda i: linear(xs[i], merged[i]),
        "bypass": lambda i: stock.run(xs[i], packed[i], None) + linear(linear(xs[i], down), up),
    }
    for name, method in methods.items():
        runs[name] = lambda i, m=method, s=stored[name]: m.run(xs[i], s[i], None)
        runs[f"{name}, LoRA"] = lambda i, base=runs[name]: beside(base(i), i)
    spent = bench.time(f"LoRA beside {M} x {N} x {K}", runs, count)

    sample = torch.arange(M, device=device)
    sample = torch.cat([sample[:SAMPLE], sample[SAMPLE:][-SAMPLE:]])
    expected = exact_weight(*packed[0]) + up.double() @ down.double()
    expected = xs[0][sample].double() @ expected.t()
    limits = {"exact": bench.ceilings.exact(M, N, K, False)}
    if "fast" in methods:
        limits["fast"] = bench.ceilings.fast(M, N, K, methods["fast"].cached is not False)
    for name, method in methods.items():
        both = name, f"{name}, LoRA"
        if spent.keys() >= set(both):
            before, after = (bench.clock.launches(lambda n=n: runs[n](0)) for n in both)
            yield row(
                "linear, LoRA", method.precision, backend_name(device, method, M), method.cached,
                M, N, K, spent[both[1]], bf16_us=spent.get("merged"), stock_us=spent.get("bypass"),
                without_us=spent[name], added_launches=after - before,
                roofline_us=limits[name] + bench.ceilings.low_rank(M, N, K, RANK),
                error=relative(runs[both[1]](0)[sample], expected),
            )  # fmt: skip
