"""Giving a model to a patcher: a clone of one MODEL's patcher on the model of another.

Quantize Model (MXFP8) does this, so that its result keeps the sampling settings, options, hooks and
patches of its input. What cannot move to another model is refused first (`check_movable`).
"""

from __future__ import annotations

import logging
import uuid
from types import MethodType

import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

logger = logging.getLogger(__name__)


def check_movable(patcher) -> None:
    """Check that everything on a patcher can move to another model, or into a file.

    Raises:
        ValueError: something is bound to the layers that the model has now.
    """
    model = type(patcher.model).__name__
    if any(patcher.injections.values()):
        names = ", ".join(map(repr, patcher.injections))
        raise ValueError(
            f"{names} on this {model} runs beside its layers and is not part of its weights; "
            "apply it (a bypass LoRA, for example) after this node"
        )
    for name, patch in patcher.object_patches.items():
        if name.startswith("diffusion_model") and isinstance(patch, torch.nn.Module):
            raise ValueError(
                f"{name!r} of this {model} was replaced by {type(patch).__name__} "
                "(torch.compile does that); apply that after this node"
            )


def give_model(patcher, fresh):
    """A clone of `patcher` on the model of `fresh`, a patcher just loaded; LoRAs do not carry over.

    Sampling settings, options, wrappers, hooks and patches of other packs do. Methods that those
    bound to modules of the old model are bound to the new ones.
    """
    clone = patcher.clone(model_override=(fresh.model, ({}, {}, {}, set())))
    clone.patches = {}
    clone.patches_uuid = uuid.uuid4()
    clone.hook_backup = {}
    clone.cached_hook_patches = {}
    clone.current_hooks = None
    clone.parent = None  # not a sibling of the input: they share no model
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
