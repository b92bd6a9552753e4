"""The one seam to ComfyUI: a model that stock code loaded gets our forward on its MXFP8 linears.

Stock builds the model and keeps its weights as its own QuantizedTensors, so its offloading,
pinning, saving and memory accounting go on working. `accelerate` clones the patcher and puts an
object patch on `<linear>.forward`. That survives unloading and reloading, merged and bypass LoRAs,
and torch.compile, and serves diffusion models, checkpoints and text encoders alike.

An object patch is bound to a module, and a clone can get a new model (`clone(force_deepcopy)`,
`deepclone_multigpu`, `clone(disable_dynamic)`), on which it would still run the old model's
weights. So a callback on every clone binds the patches to the new modules.

Rejected: a subclass of stock's Linear as `custom_operations`. Stock then skips the markers in a
file's header, and a file that has only those runs raw codes without an error.
"""

from __future__ import annotations

import logging
import uuid
from types import MethodType

import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ... import kernels
from ...kernels import layout
from ...quant.format import AGAIN
from ..host.float8 import check_float8
from . import cache, forward
from .forward import compute_dtype, is_mxfp8_linear, mxfp8_linears, our_patches
from .patcher import patcher_class
from .prepared import stored_weight
from .preparing import judge_uncompiled

logger = logging.getLogger(__name__)

PREFIX = "diffusion_model."  # prefix of the diffusion model's parameters in a MODEL
_KEY = "mxfp8"


def check_scales(model: torch.nn.Module) -> None:
    """Check the scales of a model that another loader made.

    Raises:
        ValueError: those of an MXFP8 linear have another shape than its codes need, or hold NaN.
    """
    for name, module in mxfp8_linears(model):
        weight = stored_weight(module.weight)
        stored, scale = weight._qdata.shape, weight._params.scale
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

    A model that is accelerated already takes the new precision. One without MXFP8 layers comes
    back as a plain clone, and the log says so.

    Raises:
        ValueError: the model's device has no float8.
    """
    clone = patcher.clone()
    linears = list(mxfp8_linears(clone.model))
    model = type(clone.model).__name__
    if not linears:
        logger.info("MXFP8: no layer of this %s is MXFP8; it runs as ComfyUI loaded it.", model)
        return clone
    check_float8(clone.load_device, f"this {model}")
    foreign = clone.object_patches.keys() - our_patches(clone)
    for name, module in linears:
        if f"{name}.forward" in foreign:
            logger.warning("MXFP8: %s is already patched by another node and stays as it is.", name)
        else:
            ours = MethodType(forward.FORWARDS[precision], module)
            cache.patch_forward(clone, name, module, ours)
    clone.__class__ = patcher_class(type(clone))
    if clone.patches:  # stock, which merges them, must not take its weights for ours
        clone.patches_uuid = uuid.uuid4()
    if not clone.get_callbacks(CallbacksMP.ON_CLONE, _KEY):
        clone.add_callback_with_key(CallbacksMP.ON_CLONE, _KEY, _rebind)
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, judge_uncompiled)
    cache.attach(clone.model, [module for _, module in linears])
    dtype = compute_dtype(clone)
    path = kernels.execution_path(clone.load_device, dtype, precision, prepare="once")
    logger.info(
        "MXFP8: %d layers of %s run on %s (%s).", len(linears), model, path.backend, precision
    )
    return clone


def accelerate_clip(clip):
    """A clone of a CLIP whose MXFP8 linears run our kernels, at precision exact as in stock."""
    clone = clip.clone()
    clone.patcher = accelerate(clip.patcher, "exact")
    return clone


def _rebind(old, new) -> None:
    """ON_CLONE: bind our patches to the modules of a clone that has a model of its own.

    Under dynamic VRAM such a clone also gets stock's plain class.
    """
    new.__class__ = patcher_class(type(new))
    if new.model is old.model:
        return
    for patch in our_patches(new):
        name = patch.removesuffix(".forward")
        module = comfy.utils.get_attr(new.model, name)
        function = new.object_patches.pop(patch).__func__
        if function is forward.PLAIN or is_mxfp8_linear(module):
            cache.patch_forward(new, name, module, MethodType(function, module))
    cache.attach(new.model, [module for _, module in mxfp8_linears(new.model)])
