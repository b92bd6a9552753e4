"""LoRAs beside a weight: what ComfyUI would merge into it, made of a layer's input and output.

ComfyUI keeps a list of patches for each weight and merges them one after the other
(`comfy.lora.calculate_weight`, `comfy.weight_adapter`). A quantized weight would have to be
quantized again after that, which loses most of a small LoRA. Every patch of a linear layer y = W x
is one of these, or a few of them:

- something added to W: a product of two thin matrices (LoRA, GLoRA), a Kronecker product (LoKr),
  an elementwise product of two thin ones (LoHa), or a dense matrix (`diff`, `set`);
- its rows scaled (DoRA, `strength_model`) or turned in blocks (OFT, BOFT): the same on the output;
- its columns scaled (DoRA): the same on the input.

So a list of patches becomes W' = P W diag(c) + D, with stock's order kept: what scales or turns W
does so to all that was added before. `build` composes it in float32 where that leaves thin matrices
thin; `SideBranch` runs it. All thin products of a layer are one: two matmuls for any number of
LoRAs, the second adding into the layer's output.

Rejected: ComfyUI's own bypass (`comfy.weight_adapter.bypass`), which ignores DoRA's scales and
slices of a fused weight, and runs every LoRA by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import comfy.lora
import comfy.weight_adapter as stock
import torch
from torch import Tensor
from torch.nn import functional

from .factors import (
    Factors,
    as_float,
    dora_scale,
    factors_of,
    low_rank_of,
    moved_rows,
    rotations,
)
from .side_branch import (
    ADDING,
    Dense,
    Hadamard,
    Kronecker,
    LowRank,
    Rotation,
    RowScales,
    SideBranch,
    Span,
    Step,
    scaled_rows,
)

ADAPTERS = {
    stock.LoRAAdapter: "LoRA",
    stock.LoHaAdapter: "LoHa",
    stock.LoKrAdapter: "LoKr",
    stock.GLoRAAdapter: "GLoRA",
    stock.OFTAdapter: "OFT",
    stock.BOFTAdapter: "BOFT",
}
PATCH_TYPES = ("diff", "set", "model_as_lora")
MERGED_MODEL = "merged model"  # the kind of a patch that holds another model's weight
# What rounding to a dtype changes values by, root mean square (at most: 2^-8, 2^-11).
ROUNDOFF = {torch.bfloat16: 2**-9, torch.float16: 2**-12}
SHORT_NAMES = {torch.bfloat16: "BF16", torch.float16: "FP16", torch.float32: "FP32"}


@dataclass(frozen=True)
class Applied:
    """One patch, as reports show it.

    `nbytes` is what it adds to the branch (a dense delta that several patches share counts for the
    first). `group` is the same for all patches of one LoRA file, and 0 for what no adapter holds.
    `problem` says why a patch was left out.
    """

    kind: str
    rank: int | None
    strength: float
    form: str
    nbytes: int
    group: int
    problem: str | None = None


def merged(patch: tuple) -> Applied:
    """A patch that ComfyUI merges."""
    note, value = _note(patch), patch[1]
    if type(value) is stock.LoRAAdapter:
        note["rank"] = value.weights[1].shape[0]
    del note["forms"]
    return Applied(form="", **note)


def merged_by_stock(patches: list[tuple], shape: Iterable[int]) -> int:
    """How many patches at the front of a weight's list only stock's merging can apply."""
    shape = tuple(shape)
    count = 0
    for index, patch in enumerate(patches, 1):
        if len(shape) != 2 or not _runs_beside(patch, shape):
            count = index
    return count


def _runs_beside(patch: tuple, shape: tuple[int, ...]) -> bool:
    _, value, _, offset, _ = patch
    if offset is not None and not -2 <= offset[0] < 2:
        return False
    if type(value) in ADAPTERS:
        grown = value.calculate_shape(None)
        return grown is None or (tuple(grown) == shape and offset is None)
    if not isinstance(value, tuple) or len(value) not in (1, 2):
        return False  # a list: another model's weight
    kind, parts = ("diff", value) if len(value) == 1 else value
    if kind == "diff" and len(parts) > 1 and parts[1]["pad_weight"]:
        rows, columns = _spans(shape, offset)
        return tuple(parts[0].shape) == (rows[1], columns[1])
    return kind in PATCH_TYPES


def _spans(shape: tuple[int, ...], offset: tuple[int, int, int] | None) -> tuple[Span, Span]:
    """(rows, columns) that a patch is for."""
    spans = [(0, shape[0]), (0, shape[1])]
    if offset is not None:
        spans[offset[0]] = (offset[1], offset[2])
    return spans[0], spans[1]


def build(
    patches: list[tuple],
    bias_patches: list[tuple],
    weight: Callable[[], Tensor],
    bias: Tensor | None,
    key: str,
    shape: Iterable[int],
    dtype: torch.dtype,
    dense_limit: int,
    original: Callable[[], Tensor] | None = None,
) -> SideBranch | None:
    """A linear layer's side branch, or None if it needs more than `dense_limit` bytes for deltas.

    `patches` and `bias_patches` are ComfyUI's, in its order, without those that `merged_by_stock`
    counts. `weight()` gives W [N, K] in float32, a new tensor each time, and is called only for
    adapters that depend on it; `original()` is the weight that `model_as_lora` is subtracted from,
    if not W. `dtype` is what matrices are held in. `dense_limit` counts dense deltas, and what thin
    matrices take beyond their patch's own size.
    """
    shape = tuple(shape)
    with torch.no_grad():
        terms = _Terms(shape, _Current(weight, key, original))
        for patch in patches:
            terms.apply(patch)
        if bias is not None:
            terms.apply_to_bias(bias_patches, bias, key)
        terms.compress(dtype)
        dense_nbytes = terms.dense_nbytes(dtype)
        if dense_nbytes > dense_limit:
            return None
        return SideBranch(
            shape,
            terms.applied(dtype),
            terms.steps,
            terms.columns,
            terms.low_rank,
            terms.dense,
            None if bias is None else bias.float().cpu(),
            terms.bias,
            dtype,
            dense_nbytes,
        )


class _Current:
    """The weight with the patches so far, made when an adapter first depends on it."""

    def __init__(self, make: Callable[[], Tensor], key: str, original: Callable | None):
        self.make, self.key, self._make_original = make, key, original or make
        self._weight: Tensor | None = None
        self._original: Tensor | None = None
        self.waiting: list[tuple] = []

    def original(self) -> Tensor:
        if self._original is None:
            self._original = as_float(self._make_original())
        return self._original

    def merge(self, patches: list[tuple], weight: Tensor) -> Tensor:
        """ComfyUI's merging into `weight`, which it overwrites: float32, or float64."""
        originals = None
        if any(_kind(patch[1]) == "model_as_lora" for patch in patches):
            originals = {self.key: ((self.original(),),)}
        return comfy.lora.calculate_weight(
            patches, weight, self.key, intermediate_dtype=torch.float32, original_weights=originals
        )

    def weight(self) -> Tensor:
        """Float32 [N, K]; not to be written to."""
        if self._weight is None:
            self._weight = self.make()
        if self.waiting:
            self._weight = self.merge(self.waiting, self._weight)
            self.waiting = []
        return self._weight

    def change(self, patch: tuple) -> Tensor | None:
        """What one more patch adds: in float64, as small LoRAs would drown in W's rounding.

        None if its value adds nothing: stock logs an error of an adapter and goes on.
        """
        before = self.weight().cpu().double()
        after = self.merge([patch], before.clone())
        if torch.equal(after, self.merge([_without_value(patch)], before.clone())):
            return None
        return (after - before).float()


class _MisfitError(ValueError):
    pass


@dataclass
class _Terms:
    """W' = P W diag(c) + D, patch by patch."""

    shape: tuple[int, int]
    current: _Current
    steps: list[Step] = field(default_factory=list)  # in order
    columns: Tensor | None = None  # c
    low_rank: list[LowRank] = field(default_factory=list)
    dense: list[Dense] = field(default_factory=list)
    bias: Tensor | None = None
    notes: list[dict] = field(default_factory=list)  # of each patch: fields of Applied
    own: list[int] = field(default_factory=list)  # of each patch: elements of its tensors

    def apply(self, patch: tuple) -> None:
        strength, value, strength_model, offset, function = patch
        nothing = strength == 0 and _kind(value) != "set"
        if nothing and strength_model == 1:
            return
        self.notes.append(_note(patch))
        self.own.append(sum(p.numel() for p in _parts(value) if isinstance(p, Tensor)))
        rows, columns = _spans(self.shape, offset)
        if min(*rows, *columns) < 0 or sum(rows) > self.shape[0] or sum(columns) > self.shape[1]:
            self.notes[-1]["problem"] = f"its slice {offset} lies outside of {list(self.shape)}"
            return
        if function is not None:
            patch = (*patch[:4], _checked(function, (rows[1], columns[1])))
        try:
            if not nothing:
                apply = self._tuple if isinstance(value, tuple) else self._adapter
                apply(patch, rows, columns)
        except _MisfitError as misfit:  # raised before anything is changed
            self.notes[-1]["problem"] = str(misfit)
            nothing = True
        if nothing:
            self._strength_model(strength_model, rows, columns)
            patch = _without_value(patch)
        self.current.waiting.append(patch)

    def apply_to_bias(self, patches: list[tuple], bias: Tensor, key: str) -> None:
        before = as_float(bias).cpu().double()
        current = _Current(lambda: before, f"{key.removesuffix('.weight')}.bias", None)
        after = before.clone()
        for patch in patches:
            self.notes.append(_note(patch))
            try:
                after = self._bias_after(patch, after, current)
            except _MisfitError as misfit:
                self.notes[-1]["problem"] = str(misfit)
                continue
            self._form("vector")
            if self.bias is None:
                self.notes[-1]["nbytes"] += 4 * before.numel()
            self.bias = (after - before).float()

    def _bias_after(self, patch: tuple, before: Tensor, current: _Current) -> Tensor:
        strength, value, strength_model, offset, function = patch
        shape = before.shape
        if offset is not None:
            dim, start, length = offset
            if dim not in (0, -1) or start < 0 or length < 0 or start + length > shape[0]:
                raise _MisfitError(f"its slice {offset} lies outside of {list(shape)}")
            shape = torch.Size([length])
        if function is not None:
            function = _checked(function, shape)
        kind, given = _kind(value), getattr(_parts(value)[0], "shape", ())
        fits = isinstance(value, tuple) and given == shape
        # Stock would stop at another shape of these. One of `diff` it logs and leaves out.
        whole = kind == "model_as_lora" and not given == shape == before.shape
        if whole or (kind == "set" and not _expands(given, shape)):
            raise _MisfitError(_misfit(patch, shape))
        after = current.merge([(strength, value, strength_model, offset, function)], before.clone())
        left_out = strength != 0 and not fits and torch.equal(after, before)
        if after.shape != before.shape or left_out:
            raise _MisfitError(_misfit(patch, shape))
        return after

    # The kinds of patches.

    def _tuple(self, patch: tuple, rows: Span, columns: Span) -> None:
        strength, value, strength_model, _, function = patch
        kind, parts = ("diff", value) if len(value) == 1 else value
        given, shape = parts[0], (rows[1], columns[1])
        if not isinstance(given, Tensor):
            raise _MisfitError(_misfit(patch, shape))
        if kind == "set":
            if not _expands(given.shape, shape):
                raise _MisfitError(_misfit(patch, shape))
            values = as_float(given).cpu().expand(shape)
            self._strength_model(0.0, rows, columns)
            self._plus(Factors(dense=values), 1.0, rows, columns, roundoff=_roundoff(given))
            return
        whole = kind == "model_as_lora" and given.shape != self.shape
        if whole or tuple(given.shape) != shape:
            raise _MisfitError(_misfit(patch, shape))
        delta = as_float(given).cpu()
        if kind == "model_as_lora":
            delta = delta - self.current.original().cpu()
        moved = moved_rows(Factors(dense=delta), function, shape, strength)
        self._strength_model(strength_model, rows, columns)
        self._plus(moved, strength, rows, columns, roundoff=_roundoff(given))

    def _adapter(self, patch: tuple, rows: Span, columns: Span) -> None:
        if isinstance(patch[1], stock.OFTAdapter | stock.BOFTAdapter):
            self._turn(patch, rows, columns)
        else:
            self._add(patch, rows, columns)

    def _add(self, patch: tuple, rows: Span, columns: Span) -> None:
        strength, value, strength_model, _, function = patch

        def scaled() -> Tensor:
            return self._slice(rows, columns, strength_model)

        n, k = rows[1], columns[1]
        factors, scale = factors_of(value, n, k, scaled), dora_scale(value)
        by_norm_of_rows = scale is not None and scale.shape[:1] == (n,)  # as stock tells
        scales = scale is None or (scale.ndim and _expands(scale.shape, (n, k)))
        if factors is None or not scales:
            raise _MisfitError(_misfit(patch, (n, k)))
        self.notes[-1]["rank"] = factors.rank
        factor = factors.alpha if scale is not None else strength * factors.alpha
        moved = moved_rows(factors, function, (n, k), factor)
        if scale is None:
            self._strength_model(strength_model, rows, columns)
            self._plus(moved, factor, rows, columns)
            return

        weight = scaled()
        if by_norm_of_rows:  # before this patch
            norms = weight.norm(dim=1, keepdim=True)
        else:  # by the norms with it
            delta = moved.alpha * moved.matrix(weight.device)
            norms = (weight + delta).norm(dim=0, keepdim=True)
        gain = scale / (norms.cpu() + torch.finfo(torch.float32).eps)
        by_row = gain.shape == (n, 1) and columns[1] == self.shape[1]
        by_column = gain.shape == (1, k) and rows[1] == self.shape[0]
        if not by_row and not by_column:
            self._change(patch, rows, columns)
            return
        self._strength_model(strength_model, rows, columns)
        kept = 1 - strength + strength * gain
        if by_row:
            self._scale_rows(rows, kept[:, 0])
            gains = {"row_gain": strength * gain[:, 0]}
        else:
            self._scale_columns(columns, kept[0])
            gains = {"column_gain": strength * gain[0]}
        self._plus(moved, factor, rows, columns, **gains)

    def _turn(self, patch: tuple, rows: Span, columns: Span) -> None:
        """OFT and BOFT: stock's difference is a W + r E(W), E(W) being what rotations add to W."""
        strength, value, strength_model, _, function = patch
        n, k = rows[1], columns[1]
        blocks, rescale, alpha, scale = value.weights
        oft = type(value) is stock.OFTAdapter
        if alpha is None and oft:
            alpha = 0.0
        if blocks is None or blocks.ndim != (3 if oft else 4):
            raise _MisfitError(_misfit(patch, (n, k)))
        if blocks.shape[-1] != blocks.shape[-2] or blocks.shape[-3] * blocks.shape[-1] != n:
            raise _MisfitError(_misfit(patch, (n, k)))
        if alpha is None:  # stock compares it with 0 and leaves the adapter out
            raise _MisfitError("it has no alpha, which ComfyUI needs for BOFT")
        turns = rotations(as_float(blocks).cpu(), alpha)
        size = blocks.shape[-1]
        if oft:
            a, r = torch.zeros(n), torch.full((n,), float(strength))
            stages = [(turns.transpose(-1, -2), 0)]
        else:
            a, r = torch.zeros(n), torch.ones(n)
            if rescale is not None:
                if rescale.numel() != 1 and rescale.shape != (n, 1):
                    self._change(patch, rows, columns)
                    return
                r = r * as_float(rescale).cpu().flatten()
                a = r - 1
            strides = [2**i * (size // 2) for i in range(len(turns))]
            if any(stride == 0 or n % (2 * stride) for stride in strides):
                raise _MisfitError(_misfit(patch, (n, k)))
            stages = list(zip(strength * turns, strides, strict=True))

        keep, gain = 1 + strength * a, strength * r
        if scale is not None:
            scale = as_float(scale).cpu()
            if scale.shape != (n, 1):
                self._change(patch, rows, columns)
                return
            weight = self._slice(rows, columns, strength_model)
            norms = weight.norm(dim=1, keepdim=True).cpu()
            g = (scale / (norms + torch.finfo(torch.float32).eps))[:, 0]
            keep = 1 - strength + strength * g * (1 + alpha * a)
            gain = strength * g * alpha * r
        if columns[1] != self.shape[1] or function is not None:
            self._change(patch, rows, columns)
            return
        self._strength_model(strength_model, rows, columns)
        self._rotate(Rotation(stages, keep, gain, rows, self._owner))

    def _change(self, patch: tuple, rows: Span, columns: Span) -> None:
        """A patch that none of the forms holds: what stock's merging of it changes."""
        delta = self.current.change(patch)
        if delta is None:
            nothing = torch.zeros(rows[1], columns[1])
            if patch[4] is not None:
                patch[4](nothing)  # raises what stock has logged
            raise _MisfitError(_misfit(patch, nothing.shape))
        delta = delta.narrow(0, *rows).narrow(1, *columns)
        self._plus(Factors(dense=delta), 1.0, rows, columns)

    # What they do to the terms.

    @property
    def _owner(self) -> int:
        return len(self.notes) - 1

    def _slice(self, rows: Span, columns: Span, strength_model: float) -> Tensor:
        weight = self.current.weight().narrow(0, *rows).narrow(1, *columns)
        return weight if strength_model == 1 else weight * strength_model

    def _strength_model(self, factor: float, rows: Span, columns: Span) -> None:
        if factor == 1:
            return
        if columns[1] == self.shape[1]:
            self._scale_rows(rows, torch.full((rows[1],), float(factor)))
        else:
            self._scale_columns(columns, torch.full((columns[1],), float(factor)))

    def _scale_rows(self, rows: Span, factor: Tensor) -> None:
        if not self.steps or not isinstance(self.steps[-1], RowScales):
            self.steps.append(RowScales(self.shape[0], self._owner))
        self.steps[-1].scales.narrow(0, *rows).mul_(factor)
        self._form("row scales")
        for term in self.low_rank:
            term.up = scaled_rows(term.up, term.rows, rows, factor)
        for term in self.dense:
            term.delta = scaled_rows(term.delta, term.rows, rows, factor)

    def _scale_columns(self, columns: Span, factor: Tensor) -> None:
        if self.columns is None:
            self.columns = torch.ones(self.shape[1])
            if self.notes:
                self.notes[-1]["nbytes"] += 4 * self.shape[1]
        self.columns = scaled_rows(self.columns[:, None], (0, self.shape[1]), columns, factor)[:, 0]
        self._form("column scales")
        for term in self.low_rank:
            term.down = scaled_rows(term.down.T, (0, self.shape[1]), columns, factor).T
        for term in self.dense:
            term.delta = scaled_rows(term.delta.T, term.columns, columns, factor).T
        for step in self.steps:
            if isinstance(step, ADDING):
                step.scale_columns(columns, factor)

    def _rotate(self, rotation: Rotation) -> None:
        self.steps.append(rotation)
        self._form("rotation")
        start, length = rotation.rows
        for term in [*self.low_rank, *self.dense]:
            low_rank = isinstance(term, LowRank)
            if term.rows[0] >= start + length or start >= sum(term.rows):
                continue
            matrix = term.up if low_rank else term.delta
            if term.rows[0] > start or sum(term.rows) < start + length:  # it spreads over the rows
                whole = matrix.new_zeros(self.shape[0], matrix.shape[1])
                whole.narrow(0, *term.rows).copy_(matrix)
                matrix, term.rows = whole, (0, self.shape[0])
            turned = matrix.T.contiguous()
            rotation.turn_(turned.narrow(1, start - term.rows[0], length))
            if low_rank:
                term.up = turned.T
            else:
                term.delta = turned.T

    def _plus(
        self,
        factors: Factors,
        factor: float,
        rows: Span,
        columns: Span,
        row_gain: Tensor | None = None,
        column_gain: Tensor | None = None,
        roundoff: float = 0.0,
    ) -> None:
        if factors.kron is not None:
            w1, w2 = factors.kron
            w1 = [w1[0] * factor, *w1[1:]]
            step = Kronecker(w1, w2, rows, columns, self._owner)
            step.row_gain, step.column_gain = row_gain, column_gain
            self.steps.append(step)
            self._form("Kronecker factors")
            return
        if factors.hadamard is not None:
            up1, down1, *others = factors.hadamard
            up1 = up1 * factor if row_gain is None else up1 * factor * row_gain[:, None]
            down1 = down1 if column_gain is None else down1 * column_gain
            self.steps.append(Hadamard([up1, down1, *others], rows, columns, self._owner))
            self._form("LoHa factors, multiplied on each call")
            return
        if factors.dense is not None:
            delta = factors.dense * factor
            delta = delta if row_gain is None else delta * row_gain[:, None]
            delta = delta if column_gain is None else delta * column_gain
            for term in self.dense:
                if (term.rows, term.columns) == (rows, columns):
                    term.delta = term.delta + delta
                    term.owners.append(self._owner)
                    term.roundoff = max(term.roundoff, roundoff)
                    return
            self.dense.append(Dense(delta, rows, columns, [self._owner], roundoff))
            return
        up, down = factors.up * factor, factors.down
        up = up if row_gain is None else up * row_gain[:, None]
        down = down if column_gain is None else down * column_gain
        if columns[1] != self.shape[1]:
            down = functional.pad(down, (columns[0], self.shape[1] - sum(columns)))
        self.low_rank.append(LowRank(up, down, rows, self._owner))
        self._form("low rank")

    def _form(self, form: str) -> None:
        if self.notes and form not in self.notes[-1]["forms"]:
            self.notes[-1]["forms"].append(form)

    def compress(self, dtype: torch.dtype) -> None:
        """Dense deltas that a low rank holds as well as the dtypes do."""
        remaining = []
        for term in self.dense:
            # Frobenius norms: what the dense delta would lose by being rounded.
            tolerance = max(term.roundoff, ROUNDOFF.get(dtype, 0.0), 2**-20)
            found = low_rank_of(term.delta, min(tolerance, 2**-9))
            if found is None:
                remaining.append(term)
                form = f"{SHORT_NAMES.get(dtype, str(dtype))} delta"
            else:
                up, down = found
                down = functional.pad(down, (term.columns[0], self.shape[1] - sum(term.columns)))
                self.low_rank.append(LowRank(up, down, term.rows, term.owners[0]))
                form = "low rank"
            for owner in term.owners:
                note = self.notes[owner]
                note["forms"].append(form)
                if found is not None and note["rank"] is None:
                    note["rank"] = found[0].shape[1]
        self.dense = remaining

    def dense_nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of dense deltas, and of thin matrices beyond their patch's own size."""
        thin = dict.fromkeys((term.owner for term in self.low_rank), 0)
        for term in self.low_rank:
            thin[term.owner] += term.nbytes(dtype)
        beyond = (size - self.own[owner] * dtype.itemsize for owner, size in thin.items())
        return sum(term.nbytes(dtype) for term in self.dense) + sum(max(0, b) for b in beyond)

    def applied(self, dtype: torch.dtype) -> tuple[Applied, ...]:
        for term in self.low_rank:
            self.notes[term.owner]["nbytes"] += term.nbytes(dtype)
        for term in self.dense:
            self.notes[term.owners[0]]["nbytes"] += term.nbytes(dtype)
        for step in self.steps:
            if step.owner >= 0:
                self.notes[step.owner]["nbytes"] += step.nbytes(dtype)
        return tuple(
            Applied(form=" and ".join(note.pop("forms")), **note) for note in map(dict, self.notes)
        )


def _kind(value) -> str:
    if isinstance(value, list):
        return MERGED_MODEL
    if isinstance(value, tuple):
        return "diff" if len(value) == 1 else value[0]
    if type(value) not in ADAPTERS:
        return type(value).__name__
    name = ADAPTERS[type(value)]
    if dora_scale(value) is None:
        return name
    return "DoRA" if name == "LoRA" else f"{name} with DoRA"


def _note(patch: tuple) -> dict:
    value = patch[1]
    return {
        "kind": _kind(value),
        "rank": None,
        "strength": float(patch[0]),
        "forms": [],
        "nbytes": 0,
        "group": id(value.loaded_keys) if hasattr(value, "loaded_keys") else 0,
        "problem": None,
    }


def _without_value(patch: tuple) -> tuple:
    """A patch that applies `strength_model` alone."""
    return (0.0, ("diff", (torch.zeros(()),)), *patch[2:4], None)


def _misfit(patch: tuple, shape: Iterable[int]) -> str:
    shapes = [list(part.shape) for part in _parts(patch[1]) if isinstance(part, Tensor)]
    return f"its tensors {', '.join(map(str, shapes))} do not fit the shape {list(shape)}"


def _expands(shape: Iterable[int], to: tuple[int, ...]) -> bool:
    try:
        return tuple(torch.broadcast_shapes(tuple(shape), to)) == tuple(to)
    except RuntimeError:
        return False


def _checked(function: Callable, shape: tuple[int, ...]) -> Callable:
    """A patch's function, so that another shape is a problem of this patch.

    What it raises is no misfit, and rises: stock lets it rise, or logs it and leaves the patch out.
    """

    def checked(delta: Tensor) -> Tensor:
        moved = function(delta)
        if not isinstance(moved, Tensor) or not _expands(moved.shape, shape):
            raise _MisfitError(f"its function does not keep the shape {list(shape)}")
        return moved

    return checked


def _parts(value) -> tuple:
    """The tensors of a patch, and other things between them."""
    if not isinstance(value, tuple):
        return value.weights
    return value if len(value) == 1 else value[1]


def _roundoff(tensor: Tensor) -> float:
    return ROUNDOFF.get(tensor.dtype, 0.0)
