"""The one seam to ComfyUI: a model loaded by stock code gets our forward on its MXFP8 linears.

Stock builds the model and keeps its weights as its own QuantizedTensors, so its offloading,
pinning, saving and memory accounting go on working. `accelerate` clones the patcher and puts an
object patch on `<linear>.forward`. That survives unloading and reloading, merged and bypass LoRA,
and torch.compile, and serves diffusion models, checkpoints and text encoders alike.

An object patch is bound to a module, and a clone can get a fresh model (`clone(force_deepcopy)`,
`deepclone_multigpu`, `clone(disable_dynamic)`): its patches would go on running the old model's
weights. A callback on every clone binds them to the new modules.

The clone's class is a subclass of the patcher's own, because merging models and hook LoRAs fail in
stock on a quantized weight: they look for its scales on the module and write into it in place.

Rejected: a subclass of stock's Linear as `custom_operations`. Stock then skips the markers in a
file's header, and a file that has only those runs raw codes without an error.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from functools import cache
from types import MethodType

import comfy.hooks
import comfy.lora
import comfy.ops
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.quant_ops import QuantizedTensor
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

from ... import kernels
from ...kernels import layout
from ...kernels.dispatch import choose
from ...kernels.ops import FLOATS
from ...quant.container.header import quoted
from ...quant.format import AGAIN, MARKER
from . import forward
from .cache import allow, drop, find_shared_inputs

logger = logging.getLogger(__name__)

_KEY = "mxfp8"
MAX_ROWWISE_CHANGE = (
    0.01  # change by folding above which a layer runs exact; MXFP8 itself rounds by 0.027
)


def is_mxfp8_linear(module: torch.nn.Module) -> bool:
    """Whether stock loaded this module as a linear layer with an MXFP8 weight."""
    return (
        getattr(module, "quant_format", None) == "mxfp8"
        and hasattr(module, "in_features")
        and isinstance(getattr(module, "weight", None), QuantizedTensor)
        and module.weight.ndim == 2
    )


def mxfp8_linears(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name, module) of every MXFP8 linear in a model, in module order."""
    return ((n, m) for n, m in model.named_modules() if is_mxfp8_linear(m))


def check_scales(model: torch.nn.Module) -> None:
    """Check the scales of a model that another loader made.

    Raises:
        ValueError: those of an MXFP8 linear have another shape than its codes need, or hold NaN.
    """
    for name, module in mxfp8_linears(model):
        stored, scale = module.weight._qdata.shape, module.weight._params.scale
        try:
            rows, cols = layout.true_shape(stored)
            layout.check_scale(stored, scale.shape)
        except ValueError as error:
            raise ValueError(
                f"MXFP8 layer {name!r} of this model: {error}; for its file: {AGAIN}"
            ) from error
        used = layout.untile(scale.view(torch.uint8), rows, cols // layout.BLOCK)
        if (used == layout.E8M0_NAN).any():
            raise ValueError(
                f"MXFP8 layer {name!r} of this model has scale bytes 255 (NaN): its file is "
                f"damaged; {AGAIN}"
            )


def accelerate(patcher, precision: str):
    """A clone of a ModelPatcher whose MXFP8 linears run `kernels.linear` at `precision`.

    A model that is accelerated already takes the new precision. One with nothing in MXFP8 comes
    back as a plain clone, with a notice.
    """
    clone = patcher.clone()
    linears = list(mxfp8_linears(clone.model))
    foreign = clone.object_patches.keys() - our_patches(clone)
    changes = rowwise_changes(clone, linears, precision)
    unfit = {name for name, change in changes.items() if change > MAX_ROWWISE_CHANGE}
    if unfit:
        _warn_unfit(unfit, changes)
    for name, module in linears:
        if f"{name}.forward" in foreign:
            logger.warning("MXFP8: %s is patched by another node already; it stays so.", name)
        else:
            ours = forward.UNFIT if name in unfit else forward.FORWARDS[precision]
            clone.add_object_patch(f"{name}.forward", MethodType(ours, module))
    if linears:
        clone.__class__ = _patcher_class(type(clone))
        if not clone.get_callbacks(CallbacksMP.ON_CLONE, _KEY):
            clone.add_callback_with_key(CallbacksMP.ON_CLONE, _KEY, _rebind)
        find_shared_inputs(clone.model, [module for _, module in linears])
        sample = torch.empty(0, dtype=compute_dtype(clone), device=clone.load_device)
        backend, _ = choose("linear", sample, precision)
        logger.info(
            "MXFP8: %d layers of %s run on %s (%s).",
            len(linears),
            type(clone.model).__name__,
            backend.name,
            precision,
        )
    else:
        logger.info(
            "MXFP8: nothing in this %s is MXFP8; it runs as ComfyUI loaded it.",
            type(clone.model).__name__,
        )
    return clone


def rowwise_changes(patcher, linears, precision: str) -> dict[str, float]:
    """How much folding changes each layer at most; empty where no layer is folded."""
    found = kernels.execution_path(patcher.load_device, compute_dtype(patcher), precision)
    if found.input_form != "rowwise":
        return {}
    return {
        name: kernels.rowwise_error_bound(module.weight._qdata.shape, module.weight._params.scale)
        for name, module in linears
    }


def _warn_unfit(unfit: set[str], changes: dict[str, float]) -> None:
    worst = max(unfit, key=changes.get)
    logger.warning(
        "MXFP8: %d of %d layers run exact: one scale per row, which FP8 tensor cores need, "
        "could change them by more than %g (%s by %.2g).",
        len(unfit), len(changes), MAX_ROWWISE_CHANGE, quoted(worst), changes[worst],
    )  # fmt: skip


def compute_dtype(patcher) -> torch.dtype:
    """The dtype of a model's activations, as far as the model says."""
    found = getattr(patcher.model, "get_dtype_inference", lambda: None)()
    return found if found in FLOATS else torch.bfloat16


def our_patches(patcher) -> list[str]:
    """Names of the object patches on a patcher that are ours."""
    patches = patcher.object_patches.items()
    return [n for n, p in patches if getattr(p, "__func__", None) in forward.PRECISION_OF]


def allow_prepared_weights(patcher) -> None:
    """Before a run: let fast layers keep their folded weights (`reuse`)."""
    fast = forward.FORWARDS["auto"], forward.FORWARDS["fast"]
    patches = [p for p in patcher.object_patches.values() if getattr(p, "__func__", None) in fast]
    folds = (
        kernels.execution_path(patcher.load_device, compute_dtype(patcher), "auto").input_form
        == "rowwise"
    )
    allow(patcher, [patch.__self__ for patch in patches] if folds else ())


class _QuantizedWeights:
    """What a ModelPatcher needs for weights that are QuantizedTensors, in front of its class.

    A weight is replaced, never written into: `parameter.data` of a QuantizedTensor shares its codes
    but holds a copy of its scales, so that stock's `copy_to_param` restores one without the other.
    """

    def model_state_dict(self, filter_prefix=None):
        """Without the scales and markers of quantized weights: no module has them by name, and so
        merging and hooks, which ask every key's module for its value, would fail."""
        modules = dict(self.model.named_modules())

        def is_there(key: str) -> bool:
            owner, _, leaf = key.rpartition(".")
            module = modules.get(owner)
            quantized = isinstance(getattr(module, "weight", None), QuantizedTensor)
            return not quantized or hasattr(module, leaf)

        state = super().model_state_dict(filter_prefix)
        return {key: value for key, value in state.items() if is_there(key)}

    def pre_run(self):
        super().pre_run()
        allow_prepared_weights(self)

    def partially_unload(self, device_to, memory_to_free=0, *args, **options):
        freed = drop(self.model)
        if freed >= memory_to_free > 0:
            return freed
        return freed + super().partially_unload(
            device_to, max(0, memory_to_free - freed), *args, **options
        )

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:  # else they stay, and only object patches go
            drop(self.model)
        return super().unpatch_model(device_to, unpatch_weights)

    def add_hook_patches(self, hook, patches, strength_patch=1.0, strength_model=1.0):
        codes = next((key for key in patches or () if key.endswith(MARKER)), None)
        if codes is not None:
            raise ValueError(
                f"the checkpoint of this model-as-LoRA hook is quantized (it holds {codes!r}), "
                "and its raw codes would be taken for weights; use its BF16 original"
            )
        return super().add_hook_patches(hook, patches, strength_patch, strength_model)

    def patch_hook_weight_to_device(
        self, hooks, combined_patches, key, original_weights, memory_counter
    ):
        """The hooks' LoRAs in one weight, requantized as stock requantizes a merged LoRA."""
        weight = comfy.utils.get_attr(self.model, key)
        if key not in combined_patches or not self._replaces(weight):
            return super().patch_hook_weight_to_device(
                hooks, combined_patches, key, original_weights, memory_counter
            )
        self._keep_original(key, weight, memory_counter)
        module = comfy.utils.get_attr(self.model, key.rpartition(".")[0])
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


@cache
def _patcher_class(base: type) -> type:
    """A ModelPatcher class with `_QuantizedWeights` in front."""
    if issubclass(base, _QuantizedWeights):
        return base
    return type(f"MXFP8{base.__name__}", (_QuantizedWeights, base), {})


def _rebind(old, new) -> None:
    """ON_CLONE: bind our patches to the modules of a clone that has a model of its own.

    Under dynamic VRAM such a clone also gets stock's plain class.
    """
    new.__class__ = _patcher_class(type(new))
    if new.model is old.model:
        return
    for name in our_patches(new):
        module = comfy.utils.get_attr(new.model, name.removesuffix(".forward"))
        if is_mxfp8_linear(module):
            new.object_patches[name] = MethodType(new.object_patches[name].__func__, module)
        else:
            del new.object_patches[name]
    find_shared_inputs(new.model, [module for _, module in mxfp8_linears(new.model)])


def check_movable(patcher) -> None:
    """Check that what is on a patcher can move to a copy of its model, or into a file.

    Raises:
        ValueError: something is tied to the layers that the model has now.
    """
    model = type(patcher.model).__name__
    if any(patcher.injections.values()):
        names = ", ".join(map(repr, patcher.injections))
        raise ValueError(
            f"{names} on this {model} works beside its layers and is no part of its weights; "
            "apply it (a bypass LoRA, for one) after this node"
        )
    for name, patch in patcher.object_patches.items():
        if name.startswith("diffusion_model") and isinstance(patch, torch.nn.Module):
            raise ValueError(
                f"{name!r} of this {model} was replaced by {type(patch).__name__} "
                "(torch.compile does that); do that after this node"
            )


def give_model(patcher, fresh):
    """A clone of `patcher` on the model of `fresh`, a patcher just loaded, LoRAs left behind.

    Sampling, options, wrappers, hooks and patches by other packs carry over; methods that those
    bound to modules of the old model are bound to the new ones.
    """
    clone = patcher.clone(model_override=(fresh.model, ({}, {}, {}, set())))
    clone.patches = {}
    clone.patches_uuid = uuid.uuid4()
    clone.hook_backup = {}
    clone.cached_hook_patches = {}
    clone.current_hooks = None
    clone.parent = None  # no sibling of the input: they share no model
    clone.clone_base_uuid = uuid.uuid4()
    clone.size = 0
    clone.model_size()
    clone.cached_patcher_init = fresh.cached_patcher_init
    clone.remove_additional_models("multigpu")  # those are the old model's

    names = {id(module): name for name, module in patcher.model.named_modules()}
    for key, patch in clone.object_patches.items():
        name = names.get(id(getattr(patch, "__self__", None)))
        if name is not None:
            owner = comfy.utils.get_attr(clone.model, name) if name else clone.model
            clone.object_patches[key] = MethodType(patch.__func__, owner)
    if clone.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_KEY):
        clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY)
        logger.warning(
            "MXFP8: torch.compile on the input does not carry over; compile the quantized model."
        )
    return clone
