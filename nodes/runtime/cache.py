"""What is remembered of a model, and quantized inputs that sibling layers share.

An input is quantized once for layers to which a block gives the same tensor, one after the other:
the siblings q, k and v, or the two halves of a gated feed-forward. Nothing shows whether a tensor
was written to in between (tensors made under inference_mode count no versions), but no block does
that between siblings. A quantized input is freed with its tensor.

torch.compile traces none of that; it merges equal operations itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from ... import kernels

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


class SharedInput:
    """The last input of some sibling layers, quantized.

    Each layer takes it once: a layer that is called again is given a new tensor, even if it is the
    same object.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._forget()

    def quantize(self, module: torch.nn.Module, x: torch.Tensor, path: kernels.ExecutionPath):
        key = path.input_form, path.quantizer, x.shape
        if self._source() is not x or self._key != key or module in self._served:
            self._forget()
            self._source, self._key = weakref.ref(x, self._forget), key
            self._quantized = kernels.quantize_input(path, x)
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
        stays_stored: linear -> why its weight is not prepared though its precision asks for it.
        changes: linear -> by how much preparing its weight changed that.
        called: linears that were called since they were loaded.
        unjudged: whether a weight was prepared, and no call has shown yet who has few rows.
        shared_inputs: linear -> the input that it shares with its siblings.
        forwards: names of our object patches that are on the model now.
        held: what a patcher's branches are loaded with, by what they are made for (`lora`).
        adapters: of those, the one whose branches are made.
        sides: the branches that the layers run now; `bound` are the layers.
        hooked: groups of hooks -> what their branches were made for, and the branches.
        merge: what stock merged when a patcher of ours loaded the model last.
        patched: linears whose forward was patched (`patch_forward`); `owner` is the model in which
            the last of them was.
    """

    def __init__(self) -> None:
        self.stays_stored: dict[torch.nn.Module, str] = weakref.WeakKeyDictionary()
        self.changes: dict[torch.nn.Module, float] = weakref.WeakKeyDictionary()
        self.called: set[torch.nn.Module] = weakref.WeakSet()
        self.unjudged = False
        self.shared_inputs: dict[torch.nn.Module, SharedInput] = weakref.WeakKeyDictionary()
        self.forwards: Sequence[str] = ()
        self.held: Mapping = weakref.WeakValueDictionary()
        self.adapters = None
        self.hooked: Mapping = weakref.WeakKeyDictionary()
        self.sides: tuple = ()
        self.bound: list[torch.nn.Module] = []
        self.merge = None
        self.patched: set[torch.nn.Module] = weakref.WeakSet()
        self.owner: Callable[[], torch.nn.Module | None] = lambda: None

    def __reduce__(self):
        return ModelState, ()  # also for copy.deepcopy

    @property
    def released(self) -> bool:
        """Whether none of our patches is on the model.

        Stock's patcher, which does not know of branches, sets this as it sets back what object
        patches replaced.
        """
        return not self.forwards

    @released.setter
    def released(self, _: bool) -> None:
        self.forwards = ()
        self.hooked.clear()
        self.unbind()
        self.unloaded()
        if self.adapters is not None:
            self.adapters.drop()
            self.adapters = None

    def unloaded(self) -> None:
        """Forget what holds until the model is loaded anew."""
        for remembered in (self.stays_stored, self.changes, self.called):
            remembered.clear()
        self.unjudged = False

    def unbind(self) -> None:
        """Take the branches off the layers."""
        for module in self.bound:
            vars(module).pop("mxfp8_branches", None)
        self.sides, self.bound = (), []

    def quantized_input(
        self, module: torch.nn.Module, x: torch.Tensor, path: kernels.ExecutionPath
    ) -> tuple[torch.Tensor, ...] | None:
        """What `kernels.quantize_input` made of x for a layer with siblings, else None."""
        shared = self.shared_inputs.get(module)
        return None if shared is None else shared.quantize(module, x, path)


def model_state(module: torch.nn.Module) -> ModelState:
    """The state of a model, made when it is first asked for; of a linear, its model's."""
    if not hasattr(module, _STATE):
        setattr(module, _STATE, ModelState())
    return getattr(module, _STATE)


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


def patch_forward(patcher, name: str, module: torch.nn.Module, forward: Callable) -> None:
    """Patch the forward of a patcher's linear, so that it is freed with its model.

    The forward of a linear is bound to it, and an attribute of it as soon as ComfyUI has patched it
    once: the patch, and later what ComfyUI sets back. Only a garbage collection would find such a
    linear, and until that its weights take the memory that the next model needs.

    Args:
        name: of the linear in the patcher's model.
        forward: to be run in place of the linear's own.
    """
    state = model_state(patcher.model)
    if state.owner() is not patcher.model:
        state.owner = weakref.ref(patcher.model)
        weakref.finalize(patcher.model, _free, weakref.ref(state)).atexit = False
    state.patched.add(module)
    patcher.add_object_patch(f"{name}.forward", forward)


def _free(reference: Callable[[], ModelState | None]) -> None:
    """Take off the linears of a model that is freed what refers back to them.

    Those that another model has too stay as they are: a shallow copy has the same state.
    """
    state = reference()
    if state is None or state.owner() is not None:
        return
    for module in state.patched:
        if vars(module).get(_STATE, state) is state:
            for name in ("forward", _STATE):
                vars(module).pop(name, None)
