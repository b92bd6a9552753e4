"""LoRAs and their relatives beside the weights: what stock would merge into quantized weights.

Stock dequantizes a weight, adds a LoRA and quantizes the sum. A weight that lies on MXFP8's grid
swallows most of a small addition, whichever way it is rounded, and the merge is slow. So a layer
whose forward is ours gets a branch (`adapters.SideBranch`) that computes what the LoRA adds to its
output, and stock is shown only the patches that have no such form: merged models, third-party
adapters, and deltas too large to hold. The stored codes never change.

The branches' tensors are a model of their own, which ComfyUI loads, counts, offloads and frees with
the one that they belong to (`_Adapters`). Strengths are folded into them, so another strength makes
new ones: that copies a LoRA's tensors once, and moves none of the model's. A model has one set of
branches, that of the patcher that was loaded last, and one for each group of hooks while it is
sampled. From loading to unloading, the branches on a model are in its `ModelState.sides`.

Rejected: ComfyUI's bypass mode, which replaces one LoRA by the next, and skips LoRAs on slices.
"""

from __future__ import annotations

import logging
import operator
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import MethodType

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.model_base import BaseModel
from comfy.quant_ops import QuantizedTensor

from ...quant.container.header import first_of
from ..host import settings
from . import adapters, forward, values
from .adapters import SideBranch
from .cache import model_state, patch_forward

logger = logging.getLogger(__name__)

# What adapters take beyond their own size may be a model's size divided by this.
DENSE_SHARE = 4
_MOST_NAMED = 4  # layers in a message
TOO_LARGE = "on a layer with a delta that is too large to hold"
TRAINED = "on a layer that is trained"
# ComfyUI 0.20 saves models as they lie in memory: what is to be saved has to be merged.
SAVES_PATCHED = hasattr(comfy.model_patcher.ModelPatcher, "model_state_dict_for_saving")
Patches = Mapping[str, list[tuple]]


@dataclass(frozen=True)
class SideBranches:
    """How the patches on a model are applied.

    Attributes:
        patches: all of them, as a patcher holds them.
        merged: those that stock merges, which come before a weight's others.
        branches: layer -> what the others do.
        left: layer -> why stock merges what a branch could have done.
    """

    patches: Patches
    merged: Patches
    branches: Mapping[str, SideBranch]
    left: Mapping[str, str]

    def beside(self, key: str) -> list[tuple]:
        """The patches of a weight that its layer's branch applies."""
        return list(self.patches.get(key, ()))[len(self.merged.get(key, ())) :]


@dataclass(frozen=True)
class Merge:
    """What stock made of a model's weights when a patcher of ours loaded it."""

    patches_uuid: uuid.UUID
    patches: Patches
    wrappers: Patches
    cast: bool

    @classmethod
    def of(cls, patcher, side: SideBranches) -> Merge:
        wrappers = {key: list(value) for key, value in patcher.weight_wrapper_patches.items()}
        return cls(patcher.patches_uuid, side.merged, wrappers, patcher.force_cast_weights)

    def same_weights(self, other: Merge) -> bool:
        return self.cast == other.cast and all(
            a.keys() == b.keys()
            and all(len(a[k]) == len(b[k]) and all(map(operator.is_, a[k], b[k])) for k in a)
            for a, b in ((self.patches, other.patches), (self.wrappers, other.wrappers))
        )


class MXFP8Adapters(torch.nn.Module):
    """The branches of a model, as ComfyUI loads them; its log names this class."""

    def __init__(self, branches: Iterable[SideBranch] = ()):
        super().__init__()
        self.branches = torch.nn.ModuleList(branches)


class _Adapters:
    """Goes in front of a ModelPatcher's class: branches that are made when ComfyUI loads them.

    ComfyUI asks a MODEL at every link of a workflow which other models it needs, and making
    branches takes time and memory. So they are made as late as that, and those that were made
    before for the same model are dropped.
    """

    side: SideBranches | None = None
    dropped = False

    def make(self, patcher) -> SideBranches:
        """The branches of `patcher`, which asked for these."""
        if self.side is None:
            drop_branches(patcher.model)
            model_state(patcher.model).adapters = self
            self.side = _make(patcher, patcher.patches, {}, patcher.patches)
            self.model.branches.extend(self.side.branches.values())
            self.size = 0  # to be counted anew
        return self.side

    def drop(self) -> None:
        self.unpin_all_weights()
        self.dropped, self.side = True, None
        self.model.branches = torch.nn.ModuleList()
        self.model.model_loaded_weight_memory = 0

    def model_size(self) -> int:
        if self.side is None and not self.dropped:
            return self.expected_size
        return super().model_size()

    def partially_load(self, *args, **options):
        patcher = self.owner()
        if patcher is not None and not self.dropped:
            with unloaded_on_failure(patcher):
                self.make(patcher)
        return super().partially_load(*args, **options)


@contextmanager
def unloaded_on_failure(patcher) -> Iterator[None]:
    """Unload a model whose loading fails or is interrupted.

    ComfyUI has already taken it off its list of loaded models, so it would stay on the device and
    never be freed. Stock does this for an Exception, which ComfyUI's interrupt is not.
    """
    try:
        yield
    except BaseException:
        patcher.detach()
        raise


@cache
def _adapters_class(base: type) -> type:
    return type(f"Adapters{base.__name__}", (_Adapters, base), {})


def adapters_of(patcher):
    """What ComfyUI loads the branches of a patcher with; None if it has none."""
    if not settings.loras_beside() or not any(_layers(patcher.patches)):
        return None
    if not SAVES_PATCHED and not isinstance(patcher.model, BaseModel):
        return None  # nothing of ours is asked when a text encoder is saved
    state = model_state(patcher.model)
    known = patcher.patches_uuid, patcher.load_device, _functions(patcher)
    held = state.held.get(known)
    if held is None or held.dropped:
        devices = patcher.load_device, patcher.offload_device
        held = comfy.model_patcher.CoreModelPatcher(MXFP8Adapters(), *devices)
        held.__class__ = _adapters_class(type(held))
        tensors = tensors_of(list(patcher.patches.values()))
        itemsize = activations_dtype(patcher).itemsize
        held.expected_size = sum(tensor.numel() for tensor in tensors) * itemsize
        state.held[known] = held
    held.owner = weakref.ref(patcher)
    return held


def drop_branches(model: torch.nn.Module) -> None:
    """Free the branches that were made last for a model's patches."""
    state = model_state(model)
    if state.adapters is not None:
        state.adapters.drop()
    state.adapters = None


def side_branches(patcher) -> SideBranches:
    """How a patcher's patches are applied; its branches are made if they are not there."""
    held = adapters_of(patcher)
    return without_branches(patcher) if held is None else held.make(patcher)


def without_branches(patcher) -> SideBranches:
    """All patches of a patcher left to stock."""
    patches = {key: list(value) for key, value in patcher.patches.items()}
    return SideBranches(patches, patches, {}, {})


def loaded_merge(patcher) -> Patches:
    """The patches that stock merged, or merges, into the weights of a model that is loaded."""
    sides = model_state(patcher.model).sides
    return sides[0].merged if sides else patcher.patches


def hook_branches(patcher, hooks, patches: Patches) -> SideBranches:
    """How the patches of a group of hooks are applied, on top of those of the patcher."""
    state = model_state(patcher.model)
    known = patcher.patches_uuid, tuple(hook.strength for hook in hooks.hooks)
    if hooks not in state.hooked or state.hooked[hooks][0] != known:
        below = state.sides[0].patches if state.sides else patcher.patches
        side = _make(patcher, patches if settings.loras_beside() else {}, below, patches)
        model = MXFP8Adapters(side.branches.values())
        size = comfy.model_management.module_size(model)
        # Where it does not fit, each call copies what it needs.
        spare = comfy.model_management.minimum_inference_memory() * 2
        if comfy.model_management.get_free_memory(patcher.load_device) - size > spare:
            model.to(patcher.load_device)
        state.hooked[hooks] = known, side
    return state.hooked[hooks][1]


def bind(model: torch.nn.Module, *sides: SideBranches) -> None:
    """Have a model's layers run these branches, one after the other, and no others."""
    state = model_state(model)
    state.unbind()
    for side in sides:
        for layer, branch in side.branches.items():
            module = comfy.utils.get_attr(model, layer)
            # A tuple, which is no submodule.
            module.mxfp8_branches = (*getattr(module, "mxfp8_branches", ()), branch)
            state.bound.append(module)
    state.sides = sides


def bound_patches(model: torch.nn.Module) -> dict[str, list[tuple]]:
    """The patches that the branches of a model apply now, by weight."""
    bound: dict[str, list[tuple]] = {}
    for side in model_state(model).sides:
        for layer in side.branches:
            for key in (f"{layer}.weight", f"{layer}.bias"):
                if side.beside(key):
                    bound[key] = [*bound.get(key, ()), *side.beside(key)]
    return bound


def unmerged(patcher, key: str) -> Patches:
    """The patches of a weight that are not merged into it now."""
    patches = patcher.patches.get(key, [])
    if key in patcher.backup:
        patches = patches[len(loaded_merge(patcher).get(key, ())) :]
    return {key: patches} if patches else {}


def keep_loaded(patcher, side: SideBranches) -> None:
    """Before loading: let stock load weights anew only where what it merges into them changes."""
    state, model = model_state(patcher.model), patcher.model
    loaded, merge = model.current_weight_patches_uuid, Merge.of(patcher, side)
    if loaded is None:
        return
    if state.merge is not None and state.merge.patches_uuid == loaded:  # else stock's patcher did
        if state.merge.same_weights(merge):
            model.current_weight_patches_uuid = patcher.patches_uuid
            state.merge = merge
        elif loaded == patcher.patches_uuid:
            model.current_weight_patches_uuid = uuid.uuid4()
    elif loaded == patcher.patches_uuid and side.branches:
        model.current_weight_patches_uuid = uuid.uuid4()


def original(patcher, full: str) -> torch.Tensor:
    """A parameter as loaded, without what is merged into it now."""
    # In this order: what hooks backed up may have LoRAs merged into it.
    if full in patcher.backup:
        return patcher.backup[full].weight
    if full in patcher.hook_backup:
        return patcher.hook_backup[full][0]
    if full in patcher.backup_buffers:
        return patcher.backup_buffers[full]
    value = comfy.utils.get_attr(patcher.model, full)
    # A parameter that is not in the checkpoint: ComfyUI makes it zero when it is first used.
    return torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value


def patched(patcher, full: str, patches: list[tuple]) -> torch.Tensor:
    """A weight as loaded with patches, in float32, as stock computes it, on the load device."""
    return values.patched(original(patcher, full), full, patches, patcher.load_device)


def add_plain_forwards(patcher, layers: Iterable[str]) -> None:
    """Patch the forward of those of these linears that are not quantized: they have branches."""
    for layer in layers:
        if f"{layer}.forward" not in patcher.object_patches:
            module = comfy.utils.get_attr(patcher.model, layer)
            patch_forward(patcher, layer, module, MethodType(forward.PLAIN, module))


def plain_linears(patcher, patches: Patches) -> list[str]:
    """Names of the linears that patches are on, are not quantized, and can have branches."""
    with patcher.use_ejected():
        return [
            layer
            for layer in _layers(patches)
            if f"{layer}.forward" not in patcher.object_patches
            and _linear(patcher, layer) is not None
        ]


def _functions(patcher) -> frozenset:
    """What decides which layers can have branches: patched forwards, and those that stay hidden."""
    patches = ((n, getattr(p, "__func__", None)) for n, p in patcher.object_patches.items())
    known = {(name, f in forward.OURS) for name, f in patches if f is not forward.PLAIN}
    return frozenset((*known, *(name for name, ours in known if ours and _hidden(patcher, name))))


def _hidden(patcher, name: str) -> bool:
    """Whether our patch of a forward is not set, as one from elsewhere was there before it."""
    if name in model_state(patcher.model).forwards or name in patcher.object_patches_backup:
        return False
    return forward.is_foreign(patcher.object_patches[name].__self__)


def _layers(patches: Patches) -> list[str]:
    """Names of the modules whose weight or bias patches are on, in order."""
    owners = (key.rpartition(".") for key in patches)
    return list(dict.fromkeys(owner for owner, _, leaf in owners if leaf in ("weight", "bias")))


def _linear(patcher, layer: str) -> torch.nn.Module | None:
    """The module of this name if it can have a branch: a linear whose forward is ours or can be."""
    try:
        module = comfy.utils.get_attr(patcher.model, layer)
    except AttributeError:
        return None
    weight = getattr(module, "weight", None)
    linear = hasattr(module, "in_features") and hasattr(module, "comfy_cast_weights")
    if not linear or weight is None or weight.ndim != 2:
        return None
    name = f"{layer}.forward"
    if name in patcher.object_patches:
        ours = forward.is_ours(patcher.object_patches[name])
        return module if ours and not _hidden(patcher, name) else None
    plain = not isinstance(weight, QuantizedTensor) and weight.is_floating_point()
    return module if plain and not forward.is_foreign(module) else None


def _make(patcher, wanted: Patches, below: Patches, patches: Patches) -> SideBranches:
    """Branches for the wanted ones of these patches, which come on top of those below."""
    all_of_them = {key: list(value) for key, value in patches.items()}
    merged = dict(all_of_them)
    branches: dict[str, SideBranch] = {}
    left: dict[str, str] = {}
    wrapped = patcher.weight_wrapper_patches.keys()
    room = patcher.model_size() // DENSE_SHARE
    with patcher.use_ejected():
        linears = {layer: _linear(patcher, layer) for layer in _layers(wanted)}
    for layer, module in linears.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        if module is None:
            continue
        key, bias_key = f"{layer}.weight", f"{layer}.bias"
        of_weight, of_bias = all_of_them.get(key, []), all_of_them.get(bias_key, [])
        first = adapters.merged_by_stock(of_weight, tuple(module.weight.shape))
        # A bias is merged or beside as a whole: a merged model has one.
        whole = any(isinstance(patch[1], list) for patch in of_bias)
        first_of_bias = len(of_bias) if whole else 0
        if first == len(of_weight) and first_of_bias == len(of_bias):
            continue
        under = {
            key: [*below.get(key, ()), *of_weight[:first]],
            bias_key: [*below.get(bias_key, ()), *of_bias[:first_of_bias]],
        }
        beside = of_weight[first:], of_bias[first_of_bias:]
        branch = _branch(patcher, layer, module, under, *beside, room)
        if branch is None:
            left[layer] = TOO_LARGE
            continue
        if branch.scales and not wrapped.isdisjoint((key, bias_key)):
            left[layer] = TRAINED  # which comes after the patches, and is not to be scaled
            continue
        room -= branch.dense_nbytes
        branches[layer] = branch
        merged[key], merged[bias_key] = of_weight[:first], of_bias[:first_of_bias]
    _report([layer for layer, why in left.items() if why == TOO_LARGE], branches)
    merged = {key: value for key, value in merged.items() if value}
    return SideBranches(all_of_them, merged, branches, left)


def _branch(
    patcher, layer: str, module, under: Patches, of_weight: list, of_bias: list, room: int
) -> SideBranch | None:
    """What patches of a layer's weight and bias do on top of others, or None if there is no room.

    Args:
        room: bytes that it may take for deltas.
    """
    key, bias_key = f"{layer}.weight", f"{layer}.bias"
    bias = None if module.bias is None else patched(patcher, bias_key, under[bias_key])
    return adapters.build(
        of_weight,
        of_bias,
        lambda: patched(patcher, key, under[key]),
        bias,
        key,
        tuple(module.weight.shape),
        activations_dtype(patcher),
        room,
        lambda: original(patcher, key),
    )


def activations_dtype(patcher) -> torch.dtype:
    """The dtype of a model's activations, and so of branches. A text encoder's are float32."""
    encoder = not isinstance(patcher.model, BaseModel)
    return torch.float32 if encoder else forward.compute_dtype(patcher)


def tensors_of(patches) -> Iterator[torch.Tensor]:
    """The tensors in a patcher's patches, which are nested tuples, and adapters with `weights`."""
    if isinstance(patches, torch.Tensor):
        yield patches
    elif isinstance(patches, (list, tuple)):
        for part in patches:
            yield from tensors_of(part)
    elif hasattr(patches, "weights"):
        yield from tensors_of(patches.weights)


def _report(too_large: list[str], branches: Mapping[str, SideBranch]) -> None:
    """Log what is not applied as asked."""
    if too_large:
        logger.info(
            "MXFP8: ComfyUI merges the adapters on %d layers into their weights: beside them, "
            "their deltas would take more than a quarter of the model's size (%s).",
            len(too_large), first_of(too_large, _MOST_NAMED),
        )  # fmt: skip
    problems = {
        f"{layer} ({applied.problem})": None
        for layer, branch in branches.items()
        for applied in branch.applied
        if applied.problem
    }
    if problems:
        logger.warning(
            "MXFP8: adapters on %d layers do not fit and are left out: %s.",
            len(problems), first_of(list(problems), _MOST_NAMED),
        )  # fmt: skip
