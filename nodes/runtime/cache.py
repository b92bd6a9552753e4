"""What is remembered of a model: prepared weights, and quantized inputs that sibling layers share.

A prepared weight (`kernels.to_rowwise`) is as large as the weight, and ComfyUI does not account for
its memory. So weights are kept only in memory that is free before a run, less what is still to be
loaded and a reserve for activations and other models: a quarter of the card, at least 4 GiB. That
budget is the device's: all models on it draw on the same one. A model's prepared weights are freed
when ComfyUI unloads it or a part of it, or has its own patcher take it over, and with its last fast
patcher. Where they are not kept, or the user turned that off (`settings`), each forward prepares
its weight anew.

A prepared weight belongs to a module's weight as an object: stock replaces it when it merges a
patch into it, except under dynamic VRAM, where it merges into a copy. There, nothing is kept while
there is a patch to merge.

An input is quantized once for layers to which a block gives the same tensor, one after the other:
the siblings q, k and v, or the two halves of a gated feed-forward. Nothing shows whether a tensor
was written to in between (tensors made under inference_mode count no versions), but no block does
that between siblings. A quantized input is freed with its tensor.

torch.compile traces neither; it merges equal operations itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import comfy.model_management
import torch

from ... import kernels
from ..host import settings

GIB = 1 << 30
RESERVE = 4 * GIB  # at least
SHARE = 4  # the reserve is total memory / SHARE

# Names of layers below one module that are given the same tensor.
SIBLINGS = (
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("w1", "w3"),
    ("gate_proj", "up_proj"),
)

_STATE = "mxfp8_state"  # the attribute of a model, and of its linears, that holds its ModelState
RELEASED = f"{_STATE}.released"  # as ComfyUI names that attribute of a model
_budget: dict[torch.device, int] = {}  # bytes that prepared weights may still take on a device


@dataclass(frozen=True)
class PreparedWeight:
    """A weight in a backend's form, with the weight and the device that it was made from."""

    source: weakref.ref
    device: torch.device
    tensors: tuple[torch.Tensor, torch.Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class SharedInput:
    """The last input of some sibling layers, quantized.

    Each layer takes it once: a layer that is called again is given a new tensor, even if it is the
    same object.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._forget()

    def quantize(self, module: torch.nn.Module, x: torch.Tensor, form: str):
        key = form, x.shape
        if self._source() is not x or self._key != key or module in self._served:
            self._forget()
            self._source, self._key = weakref.ref(x, self._forget), key
            self._quantized = kernels.quantize_input(x, form)
        self._served.add(module)
        quantized = self._quantized
        if len(self._served) == self._size:
            self._forget()
        return quantized

    def _forget(self, _=None) -> None:
        self._source, self._quantized, self._key = (lambda: None), None, None
        self._served: set[torch.nn.Module] = set()


class ModelState:
    """All that is remembered of one model; it lives on the model, as stock's own state does.

    A copy of the model, deep or pickled, or of one of its linears, starts with an empty state.

    Attributes:
        prepared: linear -> its prepared weight.
        shared_inputs: linear -> the input that it shares with its siblings.
        forwards: names of our object patches that are on the model now.
        held: what a patcher's branches are loaded with, by what they are made for (`lora`).
        adapters: of those, the one whose branches are made.
        sides: the branches that the layers run now; `bound` are the layers.
        hooked: groups of hooks -> what their branches were made for, and the branches.
        merge: what stock merged when a patcher of ours loaded the model last.
    """

    def __init__(self) -> None:
        self.prepared: dict[torch.nn.Module, PreparedWeight] = weakref.WeakKeyDictionary()
        self.shared_inputs: dict[torch.nn.Module, SharedInput] = weakref.WeakKeyDictionary()
        self.forwards: Sequence[str] = ()
        self.held: Mapping = weakref.WeakValueDictionary()
        self.adapters = None
        self.hooked: Mapping = weakref.WeakKeyDictionary()
        self.sides: tuple = ()
        self.bound: list[torch.nn.Module] = []
        self.merge = None
        self._keeps = False
        self._users: set[int] = set()  # ids of the patchers that run the model fast

    def __reduce__(self):
        return ModelState, ()  # also for copy.deepcopy

    def keep(self, patcher, wanted: bool, merged: bool) -> None:
        """Before a run: keep prepared weights, as far as memory allows, or drop them.

        Args:
            wanted: whether any layer of this patcher runs on a prepared weight.
            merged: whether stock merges patches into weights.
        """
        # Under dynamic VRAM they are merged into what a layer is given, not into its weight.
        merged_unseen = patcher.is_dynamic() and merged
        keeps = wanted and not merged_unseen and settings.keep_prepared_weights()
        if not keeps:
            self.drop()
        if wanted:
            self._keeps = keeps
        if not keeps:
            return
        if id(patcher) not in self._users:
            self._users.add(id(patcher))
            weakref.finalize(patcher, self._leave, id(patcher))
        device = patcher.load_device
        free = comfy.model_management.get_free_memory(device)
        total = comfy.model_management.get_total_memory(device)
        to_come = max(0, patcher.model_size() - patcher.loaded_size())
        _budget[device] = int(free - to_come - max(RESERVE, total // SHARE))

    def _leave(self, user: int) -> None:
        self._users.discard(user)
        if not self._users:
            self.drop()

    @property
    def released(self) -> bool:
        """Whether none of our patches is on the model.

        Stock's patcher, which does not know of prepared weights, sets this as it sets back what
        object patches replaced.
        """
        return not self.forwards

    @released.setter
    def released(self, _: bool) -> None:
        self.forwards = ()
        self.hooked.clear()
        self.unbind()
        self.drop()
        if self.adapters is not None:
            self.adapters.drop()
            self.adapters = None

    def unbind(self) -> None:
        """Take the branches off the layers."""
        for module in self.bound:
            vars(module).pop("mxfp8_branches", None)
        self.sides, self.bound = (), []

    @property
    def nbytes(self) -> int:
        """Bytes of the prepared weights that are kept now."""
        return sum(weight.nbytes for weight in self.prepared.values())

    def drop(self) -> int:
        """Free the prepared weights; returns their bytes."""
        freed = self.nbytes
        self.prepared.clear()
        return freed

    def prepared_weight(self, module: torch.nn.Module, weight) -> tuple[torch.Tensor, ...] | None:
        """A layer's prepared weight if it is kept or may be, else None.

        Args:
            weight: the QuantizedTensor as the layer runs it, on the device that it runs on.
        """
        if not self._keeps:
            return None
        device = weight._qdata.device
        kept = self.prepared.get(module)
        if kept is not None:
            if kept.source() is module.weight and kept.device == device:
                return kept.tensors
            _budget[kept.device] = _budget.get(kept.device, 0) + kept.nbytes
            del self.prepared[module]
        size = weight._qdata.numel() + 4 * weight._qdata.shape[0]
        if size > _budget.get(device, 0):
            return None
        _budget[device] -= size
        tensors = kernels.to_rowwise(weight._qdata, weight._params.scale)
        self.prepared[module] = PreparedWeight(weakref.ref(module.weight), device, tensors)
        return tensors

    def quantized_input(self, module: torch.nn.Module, x: torch.Tensor, form: str):
        """What `kernels.quantize_input` made of x for a layer with siblings, else None."""
        shared = self.shared_inputs.get(module)
        return None if shared is None else shared.quantize(module, x, form)


def model_state(module: torch.nn.Module) -> ModelState:
    """The state of a model, made when it is first asked for; of a linear, its model's."""
    if not hasattr(module, _STATE):
        setattr(module, _STATE, ModelState())
    return getattr(module, _STATE)


def prepared_nbytes(model: torch.nn.Module) -> int:
    """Bytes of the prepared weights that are kept now of a model, which may be one without any."""
    return getattr(model, _STATE).nbytes if hasattr(model, _STATE) else 0


def attach(model: torch.nn.Module, linears: Iterable[torch.nn.Module]) -> None:
    """Have these linears of a model use its state, and find the siblings among them."""
    state, linears = model_state(model), set(linears)
    for module in linears:
        setattr(module, _STATE, state)
    for owner in model.modules():
        children = dict(owner.named_children())
        for names in SIBLINGS:
            siblings = [children[n] for n in names if children.get(n) in linears]
            if len(siblings) > 1 and not all(m in state.shared_inputs for m in siblings):
                state.shared_inputs.update(dict.fromkeys(siblings, SharedInput(len(siblings))))
