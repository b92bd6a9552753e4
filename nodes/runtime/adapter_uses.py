"""What became of each LoRA on a model, for reports: which layers it is on, and how it is applied.

ComfyUI keeps a list of patches for each weight and not what they belong to. The adapters of one
LoRA file share one object (`Applied.group`), so a file at one strength is one entry. Whole tensors
(`diff`, `set`) name no file; those of one strength are one entry, and so is a merged model.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter

import torch
from comfy.quant_ops import QuantizedTensor

from ...quant.reports.adapters import BESIDE, LEFT_OUT, MERGED, AdapterUse
from ..host import settings
from . import adapters, lora
from .forward import is_foreign, is_mxfp8_linear, our_patches
from .lora import SideBranches

_LEAVES = "weight", "bias"


def applied_patches(patcher) -> SideBranches:
    """How the patches of any ModelPatcher are applied."""
    ours = our_patches(patcher)
    return lora.side_branches(patcher) if ours else lora.without_branches(patcher)


@dataclass
class _Use:
    """An `AdapterUse` under construction."""

    kinds: dict[str, None] = field(default_factory=dict)  # in order
    ranks: set[int] = field(default_factory=set)
    strengths: set[float] = field(default_factory=set)
    layers: set[str] = field(default_factory=set)
    applied: dict[tuple[str, str], None] = field(default_factory=dict)  # (how, layer)
    nbytes: int = 0

    def add(self, layer: str, how: str, applied: adapters.Applied) -> None:
        self.kinds[applied.kind] = None
        self.strengths.add(applied.strength)
        self.applied[how, layer] = None
        self.nbytes += applied.nbytes
        if applied.rank is not None:
            self.ranks.add(applied.rank)
        if applied.problem is None:
            self.layers.add(layer)

    def finished(self, linears: dict[str, torch.nn.Module]) -> AdapterUse:
        hit = len(self.layers & linears.keys())
        return AdapterUse(
            kinds=tuple(self.kinds),
            ranks=(min(self.ranks), max(self.ranks)) if self.ranks else (),
            strength=next(iter(self.strengths)) if len(self.strengths) == 1 else None,
            hit=hit,
            missed=len(linears) - hit,
            applied=dict(Counter(how for how, _ in self.applied).most_common()),
            bytes=self.nbytes,
            others=len(self.layers - linears.keys()),
        )


def adapter_uses(
    patcher, side: SideBranches, linears: dict[str, torch.nn.Module]
) -> tuple[AdapterUse, ...]:
    """An entry for each LoRA on a ModelPatcher.

    Args:
        side: what `applied_patches` says of it.
        linears: those of its model, by name.
    """
    uses = {entry: _Use() for entry in _in_order(side.patches)}
    with patcher.use_ejected():  # of forwards that are set while it is loaded
        for key, merged in side.merged.items():
            layer = key.rpartition(".")[0]
            for index, patch in enumerate(merged):
                applied = adapters.merged(patch)
                if patch[0] != 0 or patch[2] != 1 or applied.kind == "set":
                    why = _why_merged(patcher, side, linears.get(layer), key, index)
                    uses[_entry(applied)].add(layer, f"{MERGED}: {why}" if why else MERGED, applied)
    for layer, branch in side.branches.items():
        for applied in branch.applied:
            how = f"{BESIDE}: {applied.form}" if applied.form else BESIDE
            if applied.problem is not None:
                how = f"{LEFT_OUT}: {applied.problem}"
            uses[_entry(applied)].add(layer, how, applied)
    return tuple(use.finished(linears) for use in uses.values() if use.applied)


def _in_order(patches: lora.Patches) -> list[tuple]:
    """The entries of patches in the order of loading, as far as it shows.

    ComfyUI appends a file's patches to its weights' lists, and weights that have none yet to the
    weights. So a list is in order, and so are the first entries of all lists.
    """
    before: dict[tuple, dict[tuple, None]] = {}
    first = None
    for of_weight in filter(None, patches.values()):
        last = first
        for entry in dict.fromkeys(_entry(adapters.merged(patch)) for patch in of_weight):
            earlier = before.setdefault(entry, {})
            if last not in (None, entry):
                earlier[last] = None
            last = entry
        first = _entry(adapters.merged(of_weight[0]))
    try:
        return list(TopologicalSorter(before).static_order())
    except CycleError:  # one file loaded twice, with others between
        return list(before)


def _entry(applied: adapters.Applied) -> tuple:
    if applied.kind == adapters.MERGED_MODEL:
        return (applied.kind,)
    return applied.group, applied.strength


def _why_merged(
    patcher, side: SideBranches, module: torch.nn.Module | None, key: str, index: int
) -> str | None:
    """Why ComfyUI merges a patch; None if nothing of ours is on the model."""
    ours, patches = our_patches(patcher), side.patches[key]
    if not ours:
        return None
    if isinstance(patches[index][1], list):
        return "other weights"
    if not settings.loras_beside():
        return settings.why_loras_are_merged()
    layer, _, leaf = key.rpartition(".")
    if module is None or not hasattr(module, "comfy_cast_weights") or leaf not in _LEAVES:
        return "not a linear layer"
    if isinstance(module.weight, QuantizedTensor) and not is_mxfp8_linear(module):
        return "a layer of another format"
    name = f"{layer}.forward"
    if name not in ours and (name in patcher.object_patches or is_foreign(module)):
        return "a layer with another node's forward"
    shape = tuple(module.weight.shape)
    if leaf == "weight" and adapters.merged_by_stock([patches[index]], shape):
        return "of a kind that only ComfyUI applies"
    if leaf == "weight" and index < adapters.merged_by_stock(patches, shape):
        return "loaded before something that ComfyUI merges"
    if any(isinstance(patch[1], list) for patch in patches):
        return "with a merged model"
    return side.left.get(layer)
