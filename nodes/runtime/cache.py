"""Work that fast layers need not repeat: folded weights, and activations of sibling layers.

A folded weight (`kernels.to_rowwise`) is as large as the weight, and is no part of ComfyUI's memory
accounting. So one is kept only out of what is free before a run, less what is still to be loaded
and a reserve for activations and other models: a quarter of the card, 4 GiB at least. All of a
model's go when ComfyUI unloads it or a part of it, or when the last fast patcher of it goes.
Otherwise, and if the user turned that off (`settings`), weights are folded on every forward.

A fold belongs to a module's weight as an object, and to what is merged into the model: stock
replaces the object when it merges a LoRA, except under dynamic VRAM, where it merges into a copy.
There, nothing is kept while there is a LoRA.

Activations are quantized once for layers that a block gives one tensor, one after the other: the
siblings q, k and v, or the two halves of a gated feed-forward. Whether a tensor was written to in
between cannot be seen (tensors made under inference_mode count no versions); between siblings
nothing is. What was quantized goes with the tensor.

torch.compile sees neither: there, the compiler merges equal operations.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import comfy.model_management
import torch

from ... import kernels
from ..host import settings

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


class _PreparedWeights:
    """The folded weights of one model.

    Attributes:
        kept: linear -> (its weight, the device, the fold).
        patches: what is merged into the weights, as the patcher identifies it.
        users: ids of the patchers that run the model fast; the last one takes the folds with it.
    """

    def __init__(self) -> None:
        self.kept: dict[torch.nn.Module, tuple[weakref.ref, torch.device, tuple]] = (
            weakref.WeakKeyDictionary()
        )
        self.patches = None
        self.users: set[int] = set()

    def drop(self) -> int:
        freed = sum(_nbytes(fold) for *_, fold in self.kept.values())
        self.kept.clear()
        return freed


_folds: dict[torch.nn.Module, _PreparedWeights] = weakref.WeakKeyDictionary()  # by linear
_models: dict[torch.nn.Module, _PreparedWeights] = weakref.WeakKeyDictionary()
_budget: dict[torch.device, int] = {}  # bytes that more folds may take


def _nbytes(fold) -> int:
    return sum(tensor.nbytes for tensor in fold)


def allow(patcher, linears: Iterable[torch.nn.Module]) -> None:
    """Before a run: let a model keep the folded weights of these linears, as memory reaches."""
    folds = _models.setdefault(patcher.model, _PreparedWeights())
    linears = list(linears)
    # Under dynamic VRAM a LoRA is merged into what a layer is given, behind the weight's back.
    merged_unseen = patcher.is_dynamic() and patcher.patches
    never = merged_unseen or not linears or not settings.keep_prepared_weights()
    if folds.patches != patcher.patches_uuid or never:
        folds.drop()
    folds.patches = patcher.patches_uuid
    for module in linears:
        _folds[module] = folds
    device = patcher.load_device
    if never:
        for module in linears:
            del _folds[module]
        return
    if id(patcher) not in folds.users:
        folds.users.add(id(patcher))
        weakref.finalize(patcher, _leave, folds, id(patcher))
    free = comfy.model_management.get_free_memory(device)
    total = comfy.model_management.get_total_memory(device)
    to_come = max(0, patcher.model_size() - patcher.loaded_size())
    _budget[device] = int(free - to_come - max(RESERVE, total // SHARE))


def _leave(folds: _PreparedWeights, user: int) -> None:
    folds.users.discard(user)
    if not folds.users:
        folds.drop()


def drop(model: torch.nn.Module) -> int:
    """Free the folded weights of a model; returns their bytes."""
    return _models[model].drop() if model in _models else 0


def kept_bytes(model: torch.nn.Module) -> int:
    """Bytes of the folded weights that a model keeps now."""
    kept = _models[model].kept if model in _models else {}
    return sum(_nbytes(fold) for *_, fold in kept.values())


def folded(module: torch.nn.Module, weight) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The fold of a layer's weight if it is kept or may be, else None.

    Args:
        weight: the QuantizedTensor as the layer runs it, on the device that it runs on.
    """
    folds = _folds.get(module)
    if folds is None:
        return None
    device = weight._qdata.device
    source, where, fold = folds.kept.get(module, (lambda: None, None, None))
    if fold is not None and source() is module.weight and where == device:
        return fold
    if fold is not None:
        _budget[where] = _budget.get(where, 0) + _nbytes(folds.kept.pop(module)[-1])
    size = weight._qdata.numel() + 4 * weight._qdata.shape[0]
    if size > _budget.get(device, 0):
        return None
    _budget[device] -= size
    fold = kernels.to_rowwise(weight._qdata, weight._params.scale)
    folds.kept[module] = weakref.ref(module.weight), device, fold
    return fold


class SharedInput:
    """Layers that share their input, and what was made of the last one they were given.

    Each takes it once: a layer that is called again is given a tensor anew, whatever is in it now.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._forget()

    def tokens(self, module: torch.nn.Module, x: torch.Tensor, kind: str):
        key = kind, x.shape
        if self._source() is not x or self._key != key or module in self._served:
            self._forget()
            self._source, self._key = weakref.ref(x, self._forget), key
            self._tokens = kernels.quantize_input(x, kind)
        self._served.add(module)
        tokens = self._tokens
        if len(self._served) == self._size:
            self._forget()
        return tokens

    def _forget(self, _=None) -> None:
        self._source, self._tokens, self._key = (lambda: None), None, None
        self._served: set[torch.nn.Module] = set()


_shared_inputs: dict[torch.nn.Module, SharedInput] = weakref.WeakKeyDictionary()  # by linear


def find_shared_inputs(model: torch.nn.Module, linears: Iterable[torch.nn.Module]) -> None:
    """Register the siblings among the linears of a model."""
    linears = set(linears)
    for owner in model.modules():
        children = dict(owner.named_children())
        for names in SIBLINGS:
            found = [children[n] for n in names if children.get(n) in linears]
            if len(found) > 1 and not all(module in _shared_inputs for module in found):
                family = SharedInput(len(found))
                for module in found:
                    _shared_inputs[module] = family


def tokens(module: torch.nn.Module, x: torch.Tensor, kind: str):
    """What `kernels.quantize_input` made of x for a sibling; None for a layer without."""
    family = _shared_inputs.get(module)
    return None if family is None else family.tokens(module, x, kind)
