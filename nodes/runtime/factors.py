"""What each of ComfyUI's adapters adds to a linear layer's weight, as factors.

The formulas are those of `comfy.weight_adapter`, which makes the whole delta of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import comfy.weight_adapter as stock
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

# Of the range finder: the highest rank, columns to be sure of that, columns to check with.
RANK, OVERSAMPLED, CHECKS = 64, 8, 8
# How many times its own size a LoHa (up to rank 8) or a LoKr may take as one thin product, which
# runs faster than its own factors do.
LARGER_LOHA, LARGER_LOKR = 4, 2


@dataclass
class Factors:
    """What one adapter adds, in one of these forms, before strength and alpha."""

    up: Tensor | None = None
    down: Tensor | None = None
    kron: tuple[list[Tensor], list[Tensor]] | None = None  # each a matrix, or a product of two
    hadamard: list[Tensor] | None = None  # up1, down1, up2, down2
    dense: Tensor | None = None
    alpha: float = 1.0
    rank: int | None = None

    def matrix(self, device: torch.device | None = None) -> Tensor:
        if self.dense is not None:
            return self.dense.to(device)
        if self.kron is not None:
            one, two = ([part.to(device) for part in parts] for parts in self.kron)
            return torch.kron(_whole(one), _whole(two))
        if self.hadamard is not None:
            up1, down1, up2, down2 = (factor.to(device) for factor in self.hadamard)
            return (up1 @ down1).mul_(up2 @ down2)
        return self.up.to(device) @ self.down.to(device)


def _whole(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else parts[0] @ parts[1]


def as_float(tensor: Tensor) -> Tensor:
    tensor = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
    return tensor.detach().to(torch.float32)


# What each adapter adds: its weights, the shape, the weight before it -> factors.


def dora_scale(value) -> Tensor | None:
    index = {"lora": 4, "loha": 7, "lokr": 8, "glora": 5, "oft": 3, "boft": 3}[value.name]
    scale = value.weights[index]
    return None if scale is None else as_float(scale).cpu()


def _alpha(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else float(alpha) / rank


def _all_float(parts: Iterable) -> list[Tensor]:
    return [as_float(part).cpu() if isinstance(part, Tensor) else part for part in parts]


def _product(up: Tensor, down: Tensor, n: int, k: int, **others) -> Factors:
    if (up.shape[0], down.shape[1]) == (n, k) and up.shape[1] == down.shape[0]:
        return Factors(up, down, **others)
    return Factors(dense=(up @ down).reshape(n, k), **others)


def _lora(parts, n: int, k: int, _) -> Factors:
    up, down, alpha, mid, *_ = parts
    rank = down.shape[0]
    if mid is not None:  # LoCon: another convolution in between
        middle = down.transpose(0, 1).flatten(1) @ mid.transpose(0, 1).flatten(1)
        down = middle.reshape(down.shape[1], rank, *mid.shape[2:4]).transpose(0, 1)
    return _product(up.flatten(1), down.flatten(1), n, k, alpha=_alpha(alpha, rank), rank=rank)


def _loha(parts, n: int, k: int, _) -> Factors:
    up1, down1, alpha, up2, down2, t1, t2, _ = parts
    others = {"alpha": _alpha(alpha, down1.shape[0]), "rank": down1.shape[0]}
    if t1 is not None:
        if t1.shape[2:].numel() != 1 or t2.shape[2:].numel() != 1:
            one, two = (
                torch.einsum("ijkl,jr,ip->prkl", *factors)
                for factors in ((t1, down1, up1), (t2, down2, up2))
            )
            return Factors(dense=(one * two).reshape(n, k), **others)
        up1, down1 = up1.T, t1.flatten(1) @ down1
        up2, down2 = up2.T, t2.flatten(1) @ down2
    own, rank = up1.shape[1] + up2.shape[1], up1.shape[1] * up2.shape[1]
    same = up1.shape[0] == up2.shape[0] == n and down1.shape[1] == down2.shape[1] == k
    fits = same and up1.shape[1] == down1.shape[0] and up2.shape[1] == down2.shape[0]
    if fits and rank <= LARGER_LOHA * own and rank * (n + k) < n * k:
        # (U1 D1) * (U2 D2): the products of their columns, times those of their rows.
        up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
        down = (down1[:, None, :] * down2[None, :, :]).flatten(0, 1)
        return Factors(up, down, **others)
    if fits and own * (n + k) < n * k:
        return Factors(hadamard=[up1, down1, up2, down2], **others)
    return Factors(dense=((up1 @ down1) * (up2 @ down2)).reshape(n, k), **others)


def _lokr(parts, n: int, k: int, _) -> Factors:
    w1, w2, alpha, w1_a, w1_b, w2_a, w2_b, t2, _ = parts
    rank = None
    one, two = None, None  # (up, down) of a factor that the file holds decomposed
    if w1 is None:
        rank, one, w1 = w1_b.shape[0], (w1_a, w1_b), w1_a @ w1_b
    if w2 is None:
        rank = w2_b.shape[0]
        if t2 is None:
            two, w2 = (w2_a, w2_b), w2_a @ w2_b
        else:
            w2 = torch.einsum("ijkl,jr,ip->prkl", t2, w2_b, w2_a)
    others = {"alpha": 1.0 if rank is None else _alpha(alpha, rank), "rank": rank}
    w2 = w2.flatten(1)
    (a, b), (c, d) = w1.shape, w2.shape
    if (a * c, b * d) != (n, k):
        return Factors(dense=torch.kron(w1, w2).reshape(n, k), **others)
    # In the smaller form: w, or (up, down) of a small rank.
    held1, held2 = (
        list(pair) if pair and sum(part.numel() for part in pair) < w.numel() else [w]
        for pair, w in ((one, w1), (two, w2))
    )
    size1, size2 = (sum(part.numel() for part in parts) for parts in (held1, held2))
    # kron(U1 D1, U2 D2) = kron(U1, U2) kron(D1, D2): thin if the factors' ranks are small.
    eye = partial(torch.eye, device=w1.device)
    one = one or ((eye(a), w1) if a <= b else (w1, eye(b)))
    two = two or ((eye(c), w2) if c <= d else (w2, eye(d)))
    thin = one[0].shape[1] * two[0].shape[1] * (n + k)
    # Multiplications for each row of the input, and memory.
    if thin <= min(b * size2 + c * size1, LARGER_LOKR * (size1 + size2)):
        return Factors(torch.kron(one[0], two[0]), torch.kron(one[1], two[1]), **others)
    return Factors(kron=(held1, held2), **others)


def _glora(parts, n: int, k: int, weight: Callable[[], Tensor]) -> Factors:
    """Of either layout, which are told apart as stock does."""
    a1, a2, b1, b2, alpha, _ = parts
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    rank = a1.shape[0] if old else None
    new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    if new and not (old and a2.shape[0] == n == k):
        old, rank = False, a2.shape[0]
    a1, a2, b1, b2 = (part.flatten(1) for part in (a1, a2, b1, b2))
    if old:
        a1, a2, b1, b2 = a2, a1, b2, b1
    w = weight()
    left = (w @ a1.to(w.device)).to(a1.device)
    if left.shape[0] != n or b1.shape[0] != n or a2.shape[1] != k or b2.shape[1] != k:
        raise IndexError
    up, down = torch.cat([left, b1], 1), torch.cat([a2, b2])
    return _product(up, down, n, k, alpha=_alpha(alpha, rank), rank=rank)


_FACTORS = {
    stock.LoRAAdapter: _lora,
    stock.LoHaAdapter: _loha,
    stock.LoKrAdapter: _lokr,
    stock.GLoRAAdapter: _glora,
}


def factors_of(value, n: int, k: int, weight: Callable[[], Tensor]) -> Factors | None:
    """What an adapter adds to a weight [n, k]; None if its tensors do not make this shape."""
    make, parts = _FACTORS[type(value)], _all_float(value.weights)
    shapes = [part.to("meta") if isinstance(part, Tensor) and part.ndim else part for part in parts]
    try:  # on "meta", where tensors have shapes alone: no other error is taken for a misfit
        make(shapes, n, k, lambda: torch.empty(n, k, device="meta"))
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, ZeroDivisionError):
        return None
    return make(parts, n, k, weight)


def rotations(blocks: Tensor, constraint: float) -> Tensor:
    """R - I of Cayley's rotations R = (I + Q) (I - Q)^-1, which is 2 Q (I - Q)^-1."""
    skew = (blocks - blocks.transpose(-1, -2)).double()
    if constraint > 0:
        norm = skew.norm() + 1e-8
        skew = skew * constraint / norm if norm > constraint else skew
    eye = torch.eye(blocks.shape[-1], dtype=skew.dtype)
    return torch.linalg.solve(eye - skew, 2 * skew, left=False).float()


def moved_rows(
    factors: Factors, function: Callable | None, shape: tuple[int, int], factor: float
) -> Factors:
    """What `function` (of a patch: halves swapped, for instance) makes of the delta."""
    if function is None or factor == 0:
        return factors
    order = _row_order(function, shape) if factors.up is not None else None
    others = {"alpha": factors.alpha, "rank": factors.rank}
    if order is not None:
        return Factors(factors.up[order], factors.down, **others)
    # It need not be linear: stock gives it the scaled delta.
    delta = function(factors.matrix() * factor) / factor
    return Factors(dense=delta.expand(shape), **others)


def _row_order(function: Callable, shape: tuple[int, int]) -> Tensor | None:
    """The order that `function` puts rows in, if that is all it does."""
    n, k = shape
    numbers = torch.arange(n, dtype=torch.float32)[:, None].expand(n, k)
    moved = function(numbers.clone())
    if moved.shape != shape:
        return None
    order = moved[:, 0].long()
    if not torch.equal(order.sort().values, torch.arange(n)):
        return None
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(-99, 100, shape, generator=generator).float()
    return order if torch.equal(function(probe.clone()), probe[order]) else None


def low_rank_of(delta: Tensor, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """(up, down) with |delta - up down| <= tolerance |delta|, if that is smaller than delta.

    A randomized range finder (Halko, Martinsson, Tropp 2011, algorithm 4.4) with one power
    iteration; the same matrix gives the same factors.
    """
    n, k = delta.shape
    total = delta.norm()
    if min(n, k) <= CHECKS or not bool(total.isfinite()):
        return None
    generator = torch.Generator().manual_seed(0)
    width = min(RANK + OVERSAMPLED + CHECKS, n, k)
    seen = delta @ torch.randn(k, width, generator=generator)
    basis = torch.linalg.qr(seen[:, :-CHECKS]).Q
    rest = seen[:, -CHECKS:]
    # Without power iterations such a basis misses about 3 times what the best one does.
    if (rest - basis @ (basis.T @ rest)).norm() > 16 * tolerance * rest.norm():
        return None
    basis = torch.linalg.qr(delta.T @ basis).Q
    basis = torch.linalg.qr(delta @ basis).Q
    inside = basis.T @ delta
    missed = (delta - basis @ inside).norm().double() ** 2
    left, values, right = torch.linalg.svd(inside, full_matrices=False)
    tails = values.double().square().flip(0).cumsum(0).flip(0)  # what ranks 0, 1, ... would miss
    tails = torch.cat([tails, tails.new_zeros(1)]) + missed
    fits = (tails <= (tolerance * total.double()) ** 2).nonzero()
    if not len(fits):
        return None
    rank = max(1, int(fits[0]))
    if rank > RANK or rank * (n + k) >= n * k:
        return None
    return basis @ left[:, :rank], values[:rank, None] * right[:rank]
