"""A ModelPatcher for a model whose weights are quantized and whose linears have our forward.

In stock, merging models and hook LoRAs fail on a quantized weight: they look for its scales on the
module and write into it in place. Whoever asks for weights gets their codes (`values`). Loading
merges LoRAs into codes (`lora`) and sets our forward over one that was set since. So
`patch.accelerate` gives a clone this class in front of its own.
"""

from __future__ import annotations

import uuid
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor

from ...quant.format import MARKER
from . import forward, lora, residency, values
from .cache import RELEASED, model_state
from .forward import our_patches


@cache
def patcher_class(base: type) -> type:
    """A ModelPatcher class with `_QuantizedWeights` in front."""
    if issubclass(base, _QuantizedWeights):
        return base
    return type(f"MXFP8{base.__name__}", (_QuantizedWeights, base), {})


class _QuantizedWeights:
    """Goes in front of a ModelPatcher's class, for weights that are QuantizedTensors.

    A weight is replaced, never written into: `parameter.data` of a QuantizedTensor shares its codes
    but holds a copy of its scales, so stock's `copy_to_param` would restore only the codes.
    """

    _side = None  # while loading: how patches are applied
    _merges = False  # while loading: whether stock merges all of them

    def model_state_dict(self, filter_prefix=None):
        """The values of the weights, without the scales and markers of quantized ones.

        No module has an attribute of their names, so merging and hooks, which ask the module of
        every key for its value, would fail.
        """
        modules = dict(self.model.named_modules())
        state = values.StateDict(lora.bound_patches(self.model))
        for key, value in super().model_state_dict(filter_prefix).items():
            owner, _, leaf = key.rpartition(".")
            module = modules.get(owner)
            weight = getattr(module, "weight", None)
            if not isinstance(weight, QuantizedTensor):
                state[key] = value
            elif hasattr(module, leaf):
                state[key] = weight if leaf == "weight" else value
        return state

    def patch_weight_to_device(self, key, *args, return_weight=False, **options):
        """The values of a weight for who asks; stock's savers ask for the `state_dict` of it."""
        if not return_weight:
            return super().patch_weight_to_device(key, *args, **options)
        with self._showing(lora.unmerged(self, key)):
            weight = super().patch_weight_to_device(key, *args, return_weight=True, **options)
        if not isinstance(weight, QuantizedTensor):
            return weight
        dense = weight.dequantize()
        dense.state_dict = weight.state_dict
        return dense

    def model_state_dict_for_saving(self, model=None, prefix=""):
        # Stock takes the weights of loaded layers for merged ones, and these are beside their LoRA.
        bound = model_state(self.model).bound
        merged = [m for m in bound if getattr(m, "comfy_patched_weights", False)]
        for module in merged:
            module.comfy_patched_weights = False
        try:
            return super().model_state_dict_for_saving(model, prefix)
        finally:
            for module in merged:
                module.comfy_patched_weights = True

    if not lora.SAVES_PATCHED:

        def state_dict_for_saving(self, *args, **options):
            self._merges = True
            try:
                comfy.model_management.load_models_gpu([self])
            finally:
                self._merges = False
            return super().state_dict_for_saving(*args, **options)

    def model_patches_models(self):
        held = None if self._merges else lora.adapters_of(self)
        return [*super().model_patches_models(), *([] if held is None else [held])]

    @contextmanager
    def _showing(self, patches):
        """Show stock other patches than there are."""
        kept, self.patches = self.patches, patches
        try:
            yield
        finally:
            self.patches = kept

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        make = lora.without_branches if self._merges else lora.side_branches
        try:
            with lora.unloaded_on_failure(self):
                self._side = make(self)
                if not self._side.branches:
                    lora.drop_branches(self.model)
                lora.keep_loaded(self, self._side)
                residency.try_shapes(self)
                loaded = super().partially_load(
                    device_to, extra_memory, force_patch_weights=force_patch_weights
                )
                self._settle(self._side, {})  # where stock had nothing to load
                return loaded
        finally:
            self._side = None

    def load(self, *args, **options):
        side = self._side or lora.side_branches(self)
        masters = residency.masters(self)
        with self._showing(side.merged):
            super().load(*args, **options)
        self._settle(side, masters)

    def _settle(self, side: lora.SideBranches, masters: dict) -> None:
        """Prepare the weights of a model that is loaded."""
        state = model_state(self.model)
        state.merge = lora.Merge.of(self, side)
        try:
            residency.settle(self, masters)
        finally:
            if residency.holds_prepared(self):
                # So that stock's own patcher, whose weights may be the same, sets the codes back.
                state.merge = replace(state.merge, patches_uuid=uuid.uuid4())
                self.model.current_weight_patches_uuid = state.merge.patches_uuid

    def pre_run(self):
        super().pre_run()
        values.show(self.model, lora.bound_patches(self.model))

    def cleanup(self):
        values.hide(self.model)
        super().cleanup()

    def patch_model(self, *args, **options):
        side = self._side or lora.side_branches(self)
        lora.add_plain_forwards(self, side.branches)
        lora.bind(self.model, side)
        with self.use_ejected(), self._foreign_forwards_left_alone():
            return super().patch_model(*args, **options)

    @contextmanager
    def _foreign_forwards_left_alone(self):
        """Hide from stock the patches of ours whose layer has a forward from elsewhere.

        Stock sets every object patch again on every load. A forward that was set in between, to
        train or to apply a LoRA, calls ours, and would be lost. Another patcher's object patch on
        a layer is no such forward: stock has a backup of what it replaced, as it has of our
        patches, and the model's state says which those are.
        """
        state, backup = model_state(self.model), self.object_patches_backup
        backup.pop(RELEASED, None)
        foreign = [
            name
            for name in our_patches(self)
            if (name in state.forwards or name not in backup) and self._has_foreign_forward(name)
        ]
        hidden = [
            (patches, {name: patches.pop(name) for name in foreign if name in patches})
            for patches in (self.object_patches, backup)
        ]
        try:
            yield
        finally:
            for patches, items in hidden:
                patches.update(items)
            state.forwards = [name for name in our_patches(self) if name in backup]
            if state.forwards:
                backup[RELEASED] = True  # what stock's own patcher sets that takes the model over

    def _has_foreign_forward(self, name: str) -> bool:
        return forward.is_foreign(comfy.utils.get_attr(self.model, name.removesuffix(".forward")))

    def partially_unload(self, *args, **options):
        with self._showing(lora.loaded_merge(self)):
            return super().partially_unload(*args, **options)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            model_state(self.model).unloaded()
        lora.bind(self.model)
        self.eject_model()
        with self._foreign_forwards_left_alone():
            return super().unpatch_model(device_to, unpatch_weights)

    def add_hook_patches(self, hook, patches, strength_patch=1.0, strength_model=1.0):
        # The key of a part of a weight is a tuple that begins with the weight's.
        keys = (key if isinstance(key, str) else key[0] for key in patches or ())
        marker = next((key for key in keys if key.endswith(MARKER)), None)
        if marker is not None:
            raise ValueError(
                f"the checkpoint of this model-as-LoRA hook is quantized (it holds {marker!r}), "
                "and its raw codes would be used as weights; use its BF16 original"
            )
        added = super().add_hook_patches(hook, patches, strength_patch, strength_model)
        lora.add_plain_forwards(self, lora.plain_linears(self, self.hook_patches[hook.hook_ref]))
        return added

    def get_combined_hook_patches(self, hooks):
        """Those that stock merges; the others are bound in `patch_hooks`."""
        combined = super().get_combined_hook_patches(hooks)
        return lora.hook_branches(self, hooks, combined).merged if combined else combined

    def patch_hooks(self, hooks):
        super().patch_hooks(hooks)
        loaded = model_state(self.model).sides[:1]  # none before loading, which binds them
        combined = super().get_combined_hook_patches(hooks)
        if loaded and combined:
            loaded = (*loaded, lora.hook_branches(self, hooks, combined))
        lora.bind(self.model, *loaded)

    def clear_cached_hook_weights(self):
        model_state(self.model).hooked.clear()
        super().clear_cached_hook_weights()

    def patch_hook_weight_to_device(
        self, hooks, combined_patches, key, original_weights, memory_counter
    ):
        """The hooks' LoRAs in one weight, requantized as stock requantizes a merged LoRA."""
        weight = comfy.utils.get_attr(self.model, key)
        owner, _, leaf = key.rpartition(".")
        module = comfy.utils.get_attr(self.model, owner)
        # Stock patches in place, and its quantizing linears refuse that, quantized or not.
        linear = leaf == "weight" and hasattr(module, "_full_precision_mm_config")
        if key not in combined_patches or not linear or self.is_dynamic():
            return super().patch_hook_weight_to_device(
                hooks, combined_patches, key, original_weights, memory_counter
            )
        self._keep_original(key, weight, memory_counter)
        merged = comfy.lora.calculate_weight(
            combined_patches[key],
            module.convert_weight(weight.to(dtype=torch.float32, copy=True)),
            key,
            original_weights=original_weights,
        )
        del original_weights[key]
        seed = comfy.utils.string_to_seed(key)
        patched = module.set_weight(merged, seed=seed, return_weight=True)
        comfy.utils.set_attr_param(self.model, key, patched)
        if self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed:
            device = self._spare_device(weight, memory_counter)
            cached = self.cached_hook_patches.setdefault(hooks, {})
            cached[key] = (patched.to(device=device), weight.device)
        return None

    def patch_cached_hook_weights(self, cached_weights, key, memory_counter):
        cached, device = cached_weights[key]
        if not self._replaces(cached):
            return super().patch_cached_hook_weights(cached_weights, key, memory_counter)
        self._keep_original(key, comfy.utils.get_attr(self.model, key), memory_counter)
        comfy.utils.set_attr_param(self.model, key, cached.to(device=device))
        return None

    def unpatch_hooks(self, whitelist_keys_set=None) -> None:
        for key in list(self.hook_backup):
            weight, device = self.hook_backup[key]
            if self._replaces(weight) and (not whitelist_keys_set or key in whitelist_keys_set):
                comfy.utils.set_attr_param(self.model, key, weight.to(device=device))
                del self.hook_backup[key]
        super().unpatch_hooks(whitelist_keys_set)

    def _replaces(self, weight) -> bool:
        # Under dynamic VRAM stock samples hooks on a clone of the plain class.
        return isinstance(weight, QuantizedTensor) and not self.is_dynamic()

    def _keep_original(self, key: str, weight, memory_counter) -> None:
        if key not in self.hook_backup:
            device = self._spare_device(weight, memory_counter)
            self.hook_backup[key] = (weight.detach().to(device=device), weight.device)

    def _spare_device(self, weight, memory_counter) -> torch.device:
        fast = self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed
        return weight.device if fast and memory_counter.use(weight) else self.offload_device
