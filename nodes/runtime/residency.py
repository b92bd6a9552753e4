"""When the weights of a model are prepared, and when their stored codes come back.

A layer that runs on another form than the stored one (`forward.wanted_path`) holds that form while
ComfyUI holds it on the device, in place of its codes (`PreparedWeight`). One layer after the other
is prepared, so that at most one stands there twice. The codes are the master. They stay in RAM, in
stock's `backup`, from which stock's own code sets them back when it unloads the layer, or a part of
the model that it is in, or has another patcher load it. Offloaded layers run on their codes.

On a CPU, where both lie in RAM, weights are prepared only in memory that is free: what is available
less a quarter of the whole, at least 4 GiB. On a GPU a form is as large as the codes.

Under dynamic VRAM stock loads a layer when it is called (`slot`).
"""

from __future__ import annotations

import logging
from collections import namedtuple
from collections.abc import Mapping

import comfy.model_management
import torch
from comfy.quant_ops import QuantizedTensor

from ... import kernels
from . import forward, lora
from .cache import model_state
from .forward import mxfp8_linears
from .prepared import PreparedWeight, stored_weight
from .preparing import free_memory, nbytes, prepare, replace
from .slot import refault

logger = logging.getLogger(__name__)

NO_ROOM = "there is no free memory for prepared weights"
RAM = torch.device("cpu")
_Backup = namedtuple("_Backup", ("weight", "inplace_update"))  # as stock's


def try_shapes(patcher) -> None:
    """Before stock loads a model: try the kernels at the shapes of its layers, each shape once."""
    device, dtype = patcher.load_device, lora.activations_dtype(patcher)
    asked = {}  # in the model's order
    for name, module in mxfp8_linears(patcher.model):
        precision = _precision(patcher, name)
        if precision is not None:
            exact = forward.held_exact(module) is not None
            shape, bias = tuple(module.weight.shape), module.bias is not None
            asked["exact" if exact else precision, shape, bias] = None
    for precision, shape, bias in asked:
        comfy.model_management.throw_exception_if_processing_interrupted()
        kernels.try_shape(device, dtype, precision, shape, bias)


def masters(patcher) -> dict[str, QuantizedTensor]:
    """Before stock loads a model: weights in RAM that are to be prepared, by name.

    Whoever holds them keeps them from being freed when stock moves the layers to the device.
    """
    if patcher.is_dynamic() or patcher.load_device == RAM:
        return {}
    return {
        name: stored_weight(module.weight)
        for name, module in mxfp8_linears(patcher.model)
        if _wanted(patcher, name, module) is not None
    }


def settle(patcher, masters: Mapping[str, QuantizedTensor]) -> None:
    """After loading: have each layer on the device hold the form that it runs on.

    Args:
        masters: from before.
    """
    stays_stored, short = model_state(patcher.model).stays_stored, 0
    room = free_memory(patcher.load_device)
    for name, module in mxfp8_linears(patcher.model):
        if patcher.is_dynamic():
            path = _wanted(patcher, name, module)
            refault(module, "stored" if path is None else path.weight_form)
        elif is_resident(patcher, name, module):
            comfy.model_management.throw_exception_if_processing_interrupted()
            if stays_stored.get(module) == NO_ROOM:
                del stays_stored[module]
            room -= _settle(patcher, name, module, masters, room)
            short += stays_stored.get(module) == NO_ROOM
    if short:
        logger.info("MXFP8: %d layers run exact: %s.", short, NO_ROOM)


def holds_prepared(patcher) -> bool:
    """Whether layers of a loaded model hold, or will hold, prepared weights."""
    if patcher.is_dynamic():
        return any(_wanted(patcher, *linear) is not None for linear in mxfp8_linears(patcher.model))
    return any(isinstance(m.weight, PreparedWeight) for _, m in mxfp8_linears(patcher.model))


def is_resident(patcher, name: str, module) -> bool:
    """Whether stock loaded a layer, and its weight is not one that hooks merged."""
    loaded = getattr(module, "comfy_patched_weights", False)
    here = loaded and not forward.is_away(module.weight, patcher)
    return here and f"{name}.weight" not in patcher.hook_backup


def _precision(patcher, name: str) -> str | None:
    """The precision that was chosen for a layer, or None: its forward is not ours."""
    patch = patcher.object_patches.get(f"{name}.forward")
    return forward.PRECISION_OF.get(getattr(patch, "__func__", None))


def _wanted(patcher, name: str, module):
    """The path of a layer that runs on a prepared weight; None of one that runs on its codes."""
    precision = _precision(patcher, name)
    device, dtype = patcher.load_device, lora.activations_dtype(patcher)
    if precision is None or forward.left_to_stock(module, precision, device, dtype) is not None:
        return None
    stays = model_state(module).stays_stored.get(module)
    if stays is not None and stays != NO_ROOM:
        precision = "exact"
    path = forward.wanted_path(module, precision, device, dtype)
    return path if path.weight_form != "stored" else None


def _settle(patcher, name: str, module, masters, room: float) -> int:
    """Bring a layer on the device to the form that it runs on; returns the bytes that it takes."""
    path, weight = _wanted(patcher, name, module), module.weight
    form = "stored" if path is None else path.weight_form
    has, freed = "stored", 0
    if isinstance(weight, PreparedWeight):
        has, freed = weight.form, sum(tensor.nbytes for tensor in weight.tensors)
    if form == has:
        return 0
    key = f"{name}.weight"
    if has == "stored":
        codes, stored = weight, _master(patcher, key, weight, masters)
    else:
        stored = weight.stored
        codes = stored.to(device=weight.device)
    if path is not None and nbytes(path, weight) - freed > max(room, 0):
        model_state(module).stays_stored.setdefault(module, NO_ROOM)  # it may have another reason
        path = None
    if path is None:
        replace(module, codes)
        return -freed
    prepared = prepare(module, codes, stored, path)
    if prepared is None:  # it stays exact
        return _settle(patcher, name, module, masters, room)
    if key not in patcher.backup:
        patcher.backup[key] = _Backup(stored, False)
    replace(module, prepared)
    state = model_state(module)
    state.unjudged |= path.precision == "fast" and module not in state.called
    return nbytes(path, weight) - freed


def _master(patcher, key: str, weight: QuantizedTensor, masters) -> QuantizedTensor:
    """The weight that a layer on the device holds, in RAM: copied there if it is nowhere else."""
    if key not in lora.loaded_merge(patcher):
        if key in patcher.backup:
            return patcher.backup[key].weight
        master = masters.get(key.removesuffix(".weight"))
        if master is not None and master.device == RAM:
            return master
    return weight.to(device=RAM)  # which is not where ComfyUI offloads to with --highvram
