"""Work that fast layers need not repeat: folded weights, and activations of sibling layers.

A folded weight (`kernels.fold_rows`) is as large as the weight, and is no part of ComfyUI's memory
accounting. So one is kept only out of what is free before a run, with the model loaded, less a
reserve for activations and other models: a quarter of the card, 4 GiB at least. All of a model's
go when ComfyUI unloads it or a part of it. Otherwise weights are folded on every forward.

A fold belongs to a module's weight as an object. Stock replaces that object when it merges a LoRA
and never writes into it (`model_patch`), so another object means another weight.

Activations are quantised once for layers that a block gives one tensor, one after the other: the
siblings q, k and v, or the two halves of a gated feed-forward. Whether a tensor was written to in
between cannot be seen (tensors made under inference_mode count no versions); between siblings
nothing is. What was quantised goes with the tensor.

torch.compile sees neither: there, the compiler merges equal operations.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import comfy.model_management
import torch

from .. import kernels

GIB = 1 << 30
RESERVE = 4 * GIB  # at least
SHARE = 4  # of the card's memory, one in so many

# Names of layers below one module that are given the same tensor.
SIBLINGS = (
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("w1", "w3"),
    ("gate_proj", "up_proj"),
)


class _Folds:
    """The folded weights of one model."""

    def __init__(self) -> None:
        self.budget = 0  # bytes that more may take
        self.kept: dict[torch.nn.Module, tuple[weakref.ref, tuple]] = weakref.WeakKeyDictionary()

    def drop(self) -> None:
        self.budget = 0
        self.kept.clear()


_folds: dict[torch.nn.Module, _Folds] = weakref.WeakKeyDictionary()  # by linear
_models: dict[torch.nn.Module, _Folds] = weakref.WeakKeyDictionary()


def allow(patcher, linears: Iterable[torch.nn.Module]) -> None:
    """Let a model that is loaded keep folded weights, as far as memory reaches."""
    free = comfy.model_management.get_free_memory(patcher.load_device)
    total = comfy.model_management.get_total_memory(patcher.load_device)
    folds = _models.setdefault(patcher.model, _Folds())
    folds.budget = int(free - max(RESERVE, total // SHARE))
    for module in linears:
        _folds[module] = folds


def drop(model: torch.nn.Module) -> None:
    """Free the folded weights of a model."""
    if model in _models:
        _models[model].drop()


def folded(module: torch.nn.Module, weight) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The fold of a layer's weight if it is kept or may be, else None.

    Args:
        weight: the QuantizedTensor as the layer runs it, on the device that it runs on.
    """
    folds = _folds.get(module)
    if folds is None:
        return None
    source, fold = folds.kept.get(module, (lambda: None, None))
    if source() is module.weight:
        return fold
    folds.kept.pop(module, None)
    size = weight._qdata.numel() + 4 * weight._qdata.shape[0]
    if size > folds.budget:
        return None
    folds.budget -= size
    fold = kernels.fold_rows(weight._qdata, weight._params.scale)
    folds.kept[module] = weakref.ref(module.weight), fold
    return fold


class _Family:
    """Layers that share their input, and what was made of the last one they were given."""

    def __init__(self) -> None:
        self._source = lambda: None
        self._tokens = self._kind = None

    def tokens(self, x: torch.Tensor, kind: str):
        if self._source() is not x or self._kind != kind:
            self._tokens, self._kind = kernels.quantize_activations(x, kind), kind
            self._source = weakref.ref(x, self._forget)
        return self._tokens

    def _forget(self, reference) -> None:
        if reference is self._source:
            self._tokens = None


_families: dict[torch.nn.Module, _Family] = weakref.WeakKeyDictionary()  # by linear


def find_families(model: torch.nn.Module, linears: Iterable[torch.nn.Module]) -> None:
    """Register the siblings among the linears of a model."""
    linears = set(linears)
    for owner in model.modules():
        children = dict(owner.named_children())
        for names in SIBLINGS:
            found = [children[n] for n in names if children.get(n) in linears]
            if len(found) > 1 and not all(module in _families for module in found):
                family = _Family()
                for module in found:
                    _families[module] = family


def tokens(module: torch.nn.Module, x: torch.Tensor, kind: str):
    """What `kernels.quantize_activations` made of x for a sibling; None for a layer without."""
    family = _families.get(module)
    return None if family is None else family.tokens(x, kind)
