"""A linear with a LoRA beside its weight: the two matmuls of nodes/runtime/side_branch.py.

Several LoRAs of a layer are one of their summed rank, so there is one rank here. The rivals are the
same layer without a LoRA, a dense BF16 weight into which it is merged, and stock's bypass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu.ceilings import total
from gpu.methods import Weight, exact_weight, relative, rivals, the_chosen
from gpu.rows import SAMPLE, Bench, row
from gpu.shapes import numbers, weight
from torch.nn.functional import linear

RANK = 32


def loras(bench: Bench, M: int, N: int, K: int) -> Iterator[dict]:
    """Rows of exact and of fast, as they are chosen here."""
    device, count = bench.device, bench.sets(N * K + 2 * M * K)
    xs = [numbers(device, M, K, seed=seed) for seed in range(count)]
    weights = [Weight(weight(device, N, K, seed)) for seed in range(count)]
    down, up = weight(device, RANK, K), numbers(device, N, RANK, seed=1, scale=0.01)
    merged = [w.plain + up @ down for w in weights]

    def beside(out: torch.Tensor, i: int) -> torch.Tensor:
        return out.addmm_(linear(xs[i], down), up.t())

    methods = the_chosen(device, M, (N, K))
    runs = {"merged": lambda i: linear(xs[i], merged[i])}
    stock = {method.name: method for method in rivals(device)}.get("stock")
    if stock is not None:
        runs["bypass"] = lambda i: (
            stock.run(xs[i], weights[i].form(stock), None) + linear(linear(xs[i], down), up)
        )
    for name, method in methods.items():
        runs[name] = lambda i, m=method: m.run(xs[i], weights[i].form(m), None)
        runs[f"{name}, LoRA"] = lambda i, base=runs[name]: beside(base(i), i)
    spent = bench.time(f"LoRA beside {M} x {N} x {K}", runs, count)

    sample = torch.arange(M, device=device)
    sample = torch.cat([sample[:SAMPLE], sample[SAMPLE:][-SAMPLE:]])
    expected = exact_weight(*weights[0].codes)[:N, :K] + up.double() @ down.double()
    expected = xs[0][sample].double() @ expected.t()
    for name, method in methods.items():
        both = name, f"{name}, LoRA"
        if spent.keys() >= set(both):
            before, after = (bench.clock.launches(lambda n=n: runs[n](0)) for n in both)
            limit = bench.roofline(method, M, N, K), bench.ceilings.low_rank(M, N, K, RANK)
            yield row(
                "linear, LoRA", method, M, N, K, spent[both[1]],
                bf16_us=spent.get("merged"), stock_us=spent.get("bypass"),
                without_us=spent[name], added_launches=after - before,
                roofline_us=total(*limit), error=relative(runs[both[1]](0)[sample], expected),
            )  # fmt: skip
