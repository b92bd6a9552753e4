"""What runs beside a linear layer; `adapters` makes it, and says why.

Thin and dense matrices are weights of ComfyUI's linears: it accounts for them, moves and streams
them like the model's own. The small factors of LoKr, LoHa, OFT and BOFT are parameters, which it
accounts for and moves. Vectors are held in float32: they cost little, and where they scale the
layer its own precision depends on theirs. Everything is added into the base's output: beside it, a
LoRA needs M x rank values and no M x N.

Rejected: one `up` for all LoRAs of a layer, padded with zeros where they belong to a slice (a third
of a fused q, k, v), which multiplies and holds three times as much.
"""

from __future__ import annotations

from dataclasses import dataclass

import comfy.ops
import torch
from torch import Tensor, nn
from torch.nn import functional

Span = tuple[int, int]  # start, length


@dataclass
class LowRank:
    """up @ down, on some of the rows."""

    up: Tensor  # [rows[1], r]
    down: Tensor  # [r, K]
    rows: Span
    owner: int

    def nbytes(self, dtype: torch.dtype) -> int:
        return (self.up.numel() + self.down.numel()) * dtype.itemsize


@dataclass
class Dense:
    delta: Tensor  # [rows[1], columns[1]]
    rows: Span
    columns: Span
    owners: list[int]
    roundoff: float  # of what it was read from

    def nbytes(self, dtype: torch.dtype) -> int:
        return self.delta.numel() * dtype.itemsize


def scaled_rows(matrix: Tensor, span: Span, rows: Span, factor: Tensor) -> Tensor:
    """`matrix`, whose rows are `span` of a layer's, with the layer's `rows` scaled."""
    start, stop = max(span[0], rows[0]), min(sum(span), sum(rows))
    if start >= stop:
        return matrix
    matrix = matrix.clone()
    matrix[start - span[0] : stop - span[0]] *= factor[start - rows[0] : stop - rows[0], None]
    return matrix


def _parameter(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    with torch.inference_mode(False):  # autograd cannot save a tensor that was made in it
        held = torch.empty(tensor.shape, dtype=dtype)
        held.copy_(tensor)
        return nn.Parameter(held, requires_grad=False)


def _linear(parts: list[Tensor], dtype: torch.dtype, dim: int = 0) -> nn.Module:
    """A linear of ComfyUI's, which accounts for its weight, moves it and streams it.

    Args:
        parts: matrices that are its weight when they are joined along `dim`.
    """
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    linear = comfy.ops.manual_cast.Linear(*shape[::-1], bias=False, device="meta", dtype=dtype)
    with torch.inference_mode(False):
        weight = torch.empty(shape, dtype=dtype)
        torch.cat([part.to(dtype) for part in parts], dim, out=weight)
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _borrow(linear: nn.Module, x: Tensor):
    """(weight on x's device in its dtype, what `_return` needs)."""
    weight = linear._parameters["weight"]  # without the detour of Module.__getattr__
    here = weight.device == x.device and weight.dtype == x.dtype
    if here and "_v" not in linear.__dict__ and not linear.weight_function:
        return weight, None
    weight, _, stream = comfy.ops.cast_bias_weight(linear, x, offloadable=True)
    return weight, stream


def _return(linear: nn.Module, weight: Tensor, stream) -> None:
    if stream is not None:
        comfy.ops.uncast_bias_weight(linear, weight, None, stream)


def _like(parameter: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return parameter.to(device=x.device, dtype=dtype or x.dtype)


def _balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of `up` and rows of `down` of one size, by powers of two, so that FP16 holds both."""
    _, high = torch.frexp(up.abs().amax(0))
    _, low = torch.frexp(down.abs().amax(1))
    shift = (high - low).div(2, rounding_mode="floor")
    return torch.ldexp(up, -shift), torch.ldexp(down, shift[:, None])


def _normalized(matrices: list[Tensor]) -> tuple[list[Tensor], int]:
    """(them with a largest value of 0.5 to 1, the exponent of 2 that their product lacks)."""
    exponents = [torch.frexp(matrix.abs().amax())[1] for matrix in matrices]
    normal = [torch.ldexp(m, -e) for m, e in zip(matrices, exponents, strict=True)]
    return normal, sum(map(int, exponents))


class RowScales(nn.Module):
    def __init__(self, rows: int, owner: int):
        super().__init__()
        self.scales, self.owner = torch.ones(rows), owner

    def nbytes(self, _) -> int:
        return self.scales.numel() * 4

    def hold(self, _) -> None:
        self.scales = _parameter(self.scales, torch.float32)

    def add_to(self, out: Tensor, _) -> None:
        out.mul_(_like(self.scales, out, torch.float32))


class Rotation(nn.Module):
    """y -> keep y + gain E(y), E(y) being what rotations of blocks of y, in stages, add to it.

    E is held, not I + E: rounding it then costs what the adapter does, not the layer.
    """

    def __init__(self, stages, keep: Tensor, gain: Tensor, rows: Span, owner: int):
        super().__init__()
        self.rows, self.owner = rows, owner
        self.strides = tuple(stride for _, stride in stages)
        self.stages = [stage for stage, _ in stages]  # [blocks, size, size], output index first
        self.keep = None if bool((keep == 1).all()) else keep
        self.gain = None if bool((gain == 1).all()) else gain

    def nbytes(self, dtype: torch.dtype) -> int:
        vectors = sum(4 * v.numel() for v in (self.keep, self.gain) if v is not None)
        return vectors + sum(stage.numel() * dtype.itemsize for stage in self.stages)

    def hold(self, dtype: torch.dtype) -> None:
        self.stages = nn.ParameterList([_parameter(stage, dtype) for stage in self.stages])
        for name in ("keep", "gain"):
            vector = getattr(self, name)
            if vector is not None:
                setattr(self, name, _parameter(vector, torch.float32))

    def add_to(self, out: Tensor, _) -> None:
        self.turn_(out.narrow(1, *self.rows))

    def turn_(self, y: Tensor) -> None:
        added = None
        for stage, stride in zip(self.stages, self.strides, strict=True):
            turned = _turned(y if added is None else y + added, _like(stage, y), stride)
            added = turned if added is None else added + turned
        if self.gain is not None:
            added = added.mul_(_like(self.gain, y, torch.float32))
        if self.keep is not None:
            y.mul_(_like(self.keep, y, torch.float32))
        y.add_(added)


def _turned(y: Tensor, blocks: Tensor, stride: int) -> Tensor:
    """Block-diagonal times y [M, n]; with a stride, of elements that far apart (a butterfly)."""
    if stride:
        y = y.unflatten(-1, (-1, 2, stride)).transpose(-2, -1).flatten(-3)
    y = torch.einsum("bij,mbj->mbi", blocks, y.unflatten(-1, blocks.shape[:2])).flatten(-2)
    if stride:
        y = y.unflatten(-1, (-1, stride, 2)).transpose(-2, -1).flatten(-3)
    return y


class Kronecker(nn.Module):
    """kron(w1, w2) x by small matmuls; w1 and w2 are each a matrix, or a product of two."""

    def __init__(self, w1: list[Tensor], w2: list[Tensor], rows: Span, columns: Span, owner: int):
        super().__init__()
        self.w1, self.w2, self.rows, self.columns, self.owner = w1, w2, rows, columns, owner
        self.outputs = w1[0].shape[0], w2[0].shape[0]
        self.inputs = w1[-1].shape[1], w2[-1].shape[1]
        self.row_gain: Tensor | None = None
        self.column_gain: Tensor | None = None

    def scale_columns(self, columns: Span, factor: Tensor) -> None:
        gain = torch.ones(self.columns[1]) if self.column_gain is None else self.column_gain
        self.column_gain = scaled_rows(gain[:, None], self.columns, columns, factor)[:, 0]

    def nbytes(self, dtype: torch.dtype) -> int:
        vectors = sum(4 * v.numel() for v in (self.row_gain, self.column_gain) if v is not None)
        return vectors + sum(w.numel() for w in (*self.w1, *self.w2)) * dtype.itemsize

    def hold(self, dtype: torch.dtype) -> None:
        factors, exponent = _normalized([*self.w1, *self.w2])
        share, rest = divmod(exponent, len(factors))  # so that FP16 holds each
        shifts = [share + (index < rest) for index in range(len(factors))]
        held = [
            _parameter(torch.ldexp(w, torch.tensor(shift)), dtype)
            for w, shift in zip(factors, shifts, strict=True)
        ]
        count = len(self.w1)
        # In the order in which they are applied.
        self.w1 = nn.ParameterList(held[:count][::-1])
        self.w2 = nn.ParameterList(held[count:][::-1])
        for name in ("row_gain", "column_gain"):
            vector = getattr(self, name)
            if vector is not None:
                setattr(self, name, _parameter(vector, torch.float32))

    def add_to(self, out: Tensor, x: Tensor) -> None:
        x = x.narrow(1, *self.columns)
        if self.column_gain is not None:
            x = x.clone().mul_(_like(self.column_gain, x, torch.float32))
        (a, c), (b, d) = self.outputs, self.inputs
        added = x.reshape(-1, d)
        for w in self.w2:
            added = functional.linear(added, _like(w, x))
        added = added.view(-1, b, c).transpose(1, 2)
        for w in self.w1:
            added = functional.linear(added, _like(w, x))
        if self.row_gain is not None:
            added = added.mul_(_like(self.row_gain, x, torch.float32).view(a, c).T)
        out.narrow(1, *self.rows).unflatten(1, (a, c)).transpose(1, 2).add_(added)


class Hadamard(nn.Module):
    """(up1 down1) * (up2 down2), elementwise, computed on each call in slabs that are not kept.

    It equals one product of thin matrices of rank r1 r2 (see `factors`), which would take 16 times
    the bytes of the factors at rank 32. That product is computed on each call, or the whole delta
    where that is smaller; the delta costs as many multiplications as the layer itself.
    """

    SLAB = 2**26  # bytes, about

    def __init__(self, factors: list[Tensor], rows: Span, columns: Span, owner: int):
        super().__init__()
        self.factors = factors  # up1, down1, up2, down2
        self.rows, self.columns, self.owner = rows, columns, owner

    def scale_columns(self, columns: Span, factor: Tensor) -> None:
        self.factors[1] = scaled_rows(self.factors[1].T, self.columns, columns, factor).T

    def nbytes(self, dtype: torch.dtype) -> int:
        return sum(factor.numel() for factor in self.factors) * dtype.itemsize

    def hold(self, dtype: torch.dtype) -> None:
        factors, exponent = _normalized(self.factors)
        half = exponent // 2  # in FP16 neither hidden values overflow nor deltas become zero
        factors[1] = torch.ldexp(factors[1], torch.tensor(half))
        self.factor = 2.0 ** (exponent - half)
        self.factors = nn.ParameterList([_parameter(factor, dtype) for factor in factors])

    def add_to(self, out: Tensor, x: Tensor) -> None:
        x, out = x.narrow(1, *self.columns), out.narrow(1, *self.rows)
        up1, down1, up2, down2 = [_like(factor, x) for factor in self.factors]
        (n, r1), (r2, k) = up1.shape, down2.shape
        if r1 * r2 * (n + k) < n * k:
            step = max(1, self.SLAB // (r1 * (n + k) * x.element_size()))
            for start in range(0, r2, step):
                some = slice(start, start + step)
                up = (up1[:, :, None] * up2[:, None, some]).flatten(1)
                down = (down1[:, None] * down2[some]).flatten(0, 1)
                out.addmm_(functional.linear(x, down), up.t(), alpha=self.factor)
            return
        step = max(1, self.SLAB // (2 * k * x.element_size()))
        for start in range(0, n, step):
            rows = slice(start, start + step)
            delta = (up1[rows] @ down1).mul_(up2[rows] @ down2)
            out[:, rows].addmm_(x, delta.t(), alpha=self.factor)


ADDING = Kronecker, Hadamard  # the steps that neither scale nor turn the layer
Step = RowScales | Rotation | Kronecker | Hadamard


class SideBranch(nn.Module):
    """What a layer's patches make of its output: see `build`.

    The layer is called with `adjust_input(x)`. Its bias is scaled and turned with its output, so
    what that does to it is taken back with the change of the bias.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        applied: tuple,
        steps: list[Step],
        columns: Tensor | None,
        low_rank: list[LowRank],
        dense: list[Dense],
        bias: Tensor | None,
        bias_change: Tensor | None,
        dtype: torch.dtype,
        dense_nbytes: int,
    ):
        super().__init__()
        self.dense_nbytes = dense_nbytes  # beyond the patches' own size; see `build`
        self.out_features, self.in_features = shape
        self.applied = applied
        for step in steps:
            step.hold(dtype)
        self.steps = nn.ModuleList(steps)
        self.columns = None if columns is None else _parameter(columns, torch.float32)

        groups: dict[Span, list[tuple[Tensor, Tensor]]] = {}
        for term in low_rank:
            product = term.up, term.down
            if dtype == torch.float16:
                product = _balanced(*product)
            groups.setdefault(term.rows, []).append(product)
        self.down, self.ups, places, start = None, nn.ModuleList(), [], 0
        for rows, products in groups.items():
            self.ups.append(_linear([up for up, _ in products], dtype, dim=1))
            places.append((rows, (start, self.ups[-1].in_features)))
            start += self.ups[-1].in_features
        if groups:
            downs = [down for products in groups.values() for _, down in products]
            self.down = _linear(downs, dtype)
        # What runs, in plain tuples: looking modules up costs more than a thin matmul.
        self._steps = tuple(steps)
        ups = (
            (up, None if rows == (0, shape[0]) else rows, None if len(places) == 1 else part)
            for up, (rows, part) in zip(self.ups, places, strict=True)
        )
        self._low_rank = (self.down, tuple(ups)) if groups else None

        self.dense, places = nn.ModuleList(), []
        for term in dense:
            exponent = 0
            if dtype == torch.float16:  # small deltas would be subnormal numbers
                _, exponent = torch.frexp(term.delta.abs().amax())
                exponent = min(0, int(exponent))
            self.dense.append(_linear([term.delta * 2.0**-exponent], dtype))
            places.append((term.rows, term.columns, 2.0**exponent))
        self._dense = tuple(zip(self.dense, places, strict=True))
        scaling = [step for step in steps if not isinstance(step, ADDING)]
        if bias is not None and scaling:
            scaled = bias.clone()[None]
            for step in scaling:
                step.add_to(scaled, scaled)
            back = bias - scaled[0]
            bias_change = back if bias_change is None else bias_change + back
        self.bias = None if bias_change is None else _parameter(bias_change, torch.float32)

    @property
    def scales(self) -> bool:
        """Whether the layer's own output is changed, not only added to."""
        added = all(isinstance(step, ADDING) for step in self.steps)
        return not added or self.columns is not None

    def adjust_input(self, x: Tensor) -> Tensor:
        """c * x; x itself if no columns are scaled."""
        if self.columns is None:
            return x
        return x.clone().mul_(_like(self.columns, x, torch.float32))

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """The patched layer's output, from the base's `out` [..., N] for x [..., K], in its place.

        Autograd may need the base's output as it was, so it gets a copy.
        """
        y = out
        if out.ndim != 2:
            y, x = out.reshape(-1, self.out_features), x.reshape(-1, self.in_features)
        if x.dtype != y.dtype:
            x = x.to(y.dtype)
        if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad):
            y = y.clone()
        for step in self._steps:
            step.add_to(y, x)
        if self._low_rank is not None:
            down, ups = self._low_rank
            weight, stream = _borrow(down, x)
            hidden = functional.linear(x, weight)
            _return(down, weight, stream)
            for up, rows, part in ups:
                weight, stream = _borrow(up, x)
                target = y if rows is None else y.narrow(1, *rows)
                target.addmm_(hidden if part is None else hidden.narrow(1, *part), weight.t())
                _return(up, weight, stream)
        for dense, (rows, columns, factor) in self._dense:
            weight, stream = _borrow(dense, x)
            y.narrow(1, *rows).addmm_(x.narrow(1, *columns), weight.t(), alpha=factor)
            _return(dense, weight, stream)
        if self.bias is not None:
            y.add_(_like(self.bias, y, torch.float32))
        return y if out.ndim == 2 else y.view_as(out)
