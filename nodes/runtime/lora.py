"""LoRAs and their relatives beside the weights: what stock would merge into quantized weights.

Stock dequantizes a weight, adds a LoRA and quantizes the sum. A weight that lies on MXFP8's grid
swallows most of a small addition, whichever way it is rounded, and the merge is slow. So a layer
whose forward is ours gets a branch (`adapters.SideBranch`) that computes what the LoRA adds to its
output, and stock is shown only the patches that have no such form: merged models, third-party
adapters, and deltas too large to hold. The stored codes never change.

The branches' tensors are a model of their own, which ComfyUI loads, counts, offloads and frees with
the one that they belong to. Strengths are folded into them, so another strength makes new ones:
that copies a LoRA's tensors once, and moves none of the model's. A model has one set of branches,
that of the patcher that was loaded last, and one for each group of hooks while it is sampled.

Rejected: ComfyUI's bypass mode, which replaces one LoRA by the next, and skips LoRAs on slices.
"""

from __future__ import annotations

import logging
import operator
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MethodType

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.model_base import BaseModel
from comfy.quant_ops import QuantizedTensor

from ...quant.container.header import quoted
from ..host import settings
from . import adapters, forward
from .adapters import Applied, SideBranch
from .cache import model_state

logger = logging.getLogger(__name__)

# Deltas that are neither low rank nor small factors may take a model's size divided by this.
DENSE_SHARE = 4
_MOST_NAMED = 4  # layers in a message
Patches = Mapping[str, list[tuple]]


class MXFP8Adapters(torch.nn.Module):
    """The branches of a model, as ComfyUI loads them; its log names this class."""

    def __init__(self, branches: list[SideBranch]):
        super().__init__()
        self.branches = torch.nn.ModuleList(branches)


@dataclass(frozen=True)
class SideBranches:
    """How the patches on a model are applied.

    Attributes:
        patches: all of them, as a patcher holds them.
        merged: those that stock merges, which come before a weight's others.
        branches: layer -> what the others do.
    """

    patches: Patches
    merged: Patches
    branches: Mapping[str, SideBranch]
    load_device: torch.device
    offload_device: torch.device

    @cached_property
    def model(self) -> MXFP8Adapters:
        return MXFP8Adapters(list(self.branches.values()))

    @cached_property
    def patcher(self):
        """What ComfyUI loads the branches with, or None if there are none."""
        if not self.branches:
            return None
        devices = self.load_device, self.offload_device
        return comfy.model_patcher.CoreModelPatcher(self.model, *devices)

    @property
    def applied(self) -> dict[str, tuple[Applied, ...]]:
        """What is beside each layer."""
        return {layer: branch.applied for layer, branch in self.branches.items()}

    def beside(self, key: str) -> list[tuple]:
        """The patches of a weight that its layer's branch applies."""
        return list(self.patches.get(key, ()))[len(self.merged.get(key, ())) :]


def side_branches(patcher) -> SideBranches:
    """How a patcher's patches are applied; branches are made when they are first asked for."""
    state, on = model_state(patcher.model), settings.loras_beside()
    known = patcher.patches_uuid, patcher.load_device, on, _object_patches(patcher)
    if state.side is None or state.side[0] != known:
        state.side = None
        state.unbind()  # free the last ones before there are others
        state.side = known, _make(patcher, patcher.patches if on else {}, {}, patcher.patches)
    return state.side[1]


def hook_branches(patcher, hooks, patches: Patches) -> SideBranches:
    """How the patches of a group of hooks are applied, on top of those of the patcher."""
    hooked = model_state(patcher.model).hooked
    known = (patcher.patches_uuid, tuple(hook.strength for hook in hooks.hooks))
    if hooks not in hooked or hooked[hooks][0] != known:
        below = side_branches(patcher).patches  # while loading, a patcher shows only a part of them
        side = _make(patcher, patches if settings.loras_beside() else {}, below, patches)
        if side.branches:
            size = comfy.model_management.module_size(side.model)
            side.model.to(_spare_device(patcher, size))
        hooked[hooks] = known, side
    return hooked[hooks][1]


def _spare_device(patcher, size: int) -> torch.device:
    """The load device if so many bytes fit there, else where each call copies them from."""
    spare = comfy.model_management.minimum_inference_memory() * 2
    free = comfy.model_management.get_free_memory(patcher.load_device)
    return patcher.load_device if free - size > spare else patcher.offload_device


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
        patches = patches[len(side_branches(patcher).merged.get(key, ())) :]
    return {key: patches} if patches else {}


def keep_loaded(patcher) -> None:
    """Before loading: let stock load weights anew only where what it merges into them changes."""
    state, model = model_state(patcher.model), patcher.model
    loaded = model.current_weight_patches_uuid
    if loaded is None:
        return
    known = state.merged is not None and state.merged[0] == loaded
    if known and _same_merge(state.merged[1:], _merge(patcher)):
        model.current_weight_patches_uuid = patcher.patches_uuid
        remember_merged(patcher)
    elif loaded == patcher.patches_uuid:
        model.current_weight_patches_uuid = uuid.uuid4()


def remember_merged(patcher) -> None:
    """What is merged into the weights of a model that a patcher has loaded."""
    model_state(patcher.model).merged = (patcher.patches_uuid, *_merge(patcher))


def _merge(patcher) -> tuple:
    """What stock makes of a model's weights when it loads them."""
    wrappers = {key: list(value) for key, value in patcher.weight_wrapper_patches.items()}
    return side_branches(patcher).merged, wrappers, patcher.force_cast_weights


def _same_merge(a: tuple, b: tuple) -> bool:
    return a[2] == b[2] and all(
        x.keys() == y.keys()
        and all(len(x[key]) == len(y[key]) and all(map(operator.is_, x[key], y[key])) for key in x)
        for x, y in zip(a[:2], b[:2], strict=True)
    )


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
    weight = original(patcher, full)
    if isinstance(weight, QuantizedTensor):
        weight = weight.dequantize()
    weight = weight.to(patcher.load_device, torch.float32, copy=True)
    return comfy.lora.calculate_weight(patches, weight, full, intermediate_dtype=torch.float32)


def add_plain_forwards(patcher, layers: Iterable[str]) -> None:
    """Patch the forward of those of these linears that are not quantized: they have branches."""
    for layer in layers:
        if f"{layer}.forward" not in patcher.object_patches:
            module = comfy.utils.get_attr(patcher.model, layer)
            patcher.add_object_patch(f"{layer}.forward", MethodType(forward.PLAIN, module))


def plain_linears(patcher, patches: Patches) -> list[str]:
    """Names of the linears that patches are on, are not quantized, and can have branches."""
    with patcher.use_ejected():
        return [
            layer
            for layer in _layers(patches)
            if f"{layer}.forward" not in patcher.object_patches
            and _linear(patcher, layer) is not None
        ]


def _object_patches(patcher) -> frozenset:
    """What decides which layers can have branches."""
    patches = ((n, getattr(p, "__func__", None)) for n, p in patcher.object_patches.items())
    return frozenset((name, f in forward.OURS) for name, f in patches if f is not forward.PLAIN)


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
    patch = patcher.object_patches.get(f"{layer}.forward")
    if patch is not None:
        return module if getattr(patch, "__func__", None) in forward.OURS else None
    plain = not isinstance(weight, QuantizedTensor) and weight.is_floating_point()
    return module if plain and not forward.is_foreign(module) else None


def _make(patcher, wanted: Patches, below: Patches, patches: Patches) -> SideBranches:
    """Branches for the wanted ones of these patches, which come on top of those below."""
    all_of_them = {key: list(value) for key, value in patches.items()}
    merged = dict(all_of_them)
    branches: dict[str, SideBranch] = {}
    too_large = []
    room = patcher.model_size() // DENSE_SHARE
    with patcher.use_ejected():
        linears = {layer: _linear(patcher, layer) for layer in _layers(wanted)}
    for layer, module in linears.items():
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
            too_large.append(layer)
            continue
        room -= branch.dense_nbytes
        branches[layer] = branch
        merged[key], merged[bias_key] = of_weight[:first], of_bias[:first_of_bias]
    _report(too_large, branches)
    merged = {key: value for key, value in merged.items() if value}
    return SideBranches(all_of_them, merged, branches, patcher.load_device, patcher.offload_device)


def _branch(
    patcher, layer: str, module, under: Patches, of_weight: list, of_bias: list, room: int
) -> SideBranch | None:
    """What patches of a layer's weight and bias do on top of others, or None if there is no room.

    Args:
        room: bytes that it may take for deltas.
    """
    key, bias_key = f"{layer}.weight", f"{layer}.bias"
    bias = None if module.bias is None else patched(patcher, bias_key, under[bias_key])
    loaded = None  # what a model as LoRA is subtracted from
    if any(isinstance(p[1], tuple) and p[1][0] == "model_as_lora" for p in of_weight):
        loaded = patched(patcher, key, [])
    # A text encoder's activations are float32.
    encoder = not isinstance(patcher.model, BaseModel)
    return adapters.build(
        of_weight,
        of_bias,
        lambda: patched(patcher, key, under[key]),
        bias,
        key,
        tuple(module.weight.shape),
        torch.float32 if encoder else forward.compute_dtype(patcher),
        room,
        loaded,
    )


def _report(too_large: list[str], branches: Mapping[str, SideBranch]) -> None:
    """Log what is not applied as asked."""
    if too_large:
        logger.info(
            "MXFP8: ComfyUI merges the adapters on %d layers into their weights: beside them, "
            "their deltas would take more than a quarter of the model's size (%s).",
            len(too_large), _named(too_large),
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
            len(problems), _named(list(problems)),
        )  # fmt: skip


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(quoted(name) for name in names[:_MOST_NAMED]) + more
