"""Prepared weights under dynamic VRAM: in place, in the slot that stock copies a layer's codes to.

There a layer's weight stays in RAM or in its file, and each call asks for its slot on the device.
If stock has the memory, the slot keeps the codes from call to call, as long as its signature holds
(`cast_bias_weight_with_vbar` in ComfyUI's ops). Row codes are as large as stored ones, and a float
per row takes no more than the tiled scales do, so both are written over what they were made from.
What stands in `_v_weight` then is the prepared weight, whose validity is that of stock's signature:
when stock copies the codes again, it sets `_v_weight` anew. To have it do so, the signature is set
to None, as stock itself does for other patches.

It has not run: dynamic VRAM needs a GPU. Tests hold the bytes and these rules on a CPU.
"""

from __future__ import annotations

import torch
from comfy.quant_ops import QuantizedTensor

from ... import kernels
from .prepared import PreparedWeight
from .preparing import prepare


def prepare_in_slot(
    module: torch.nn.Module, weight: QuantizedTensor, path: kernels.ExecutionPath
) -> QuantizedTensor:
    """The weight of a call, prepared if it is in its layer's slot and may be.

    Args:
        weight: on the device, as `cast_bias_weight` gave it.
        path: that the layer runs at with a prepared weight.
    """
    in_slot = (
        weight is getattr(module, "_v_weight", None)
        and module._v_signature is not None
        and not isinstance(weight, PreparedWeight)
    )
    # bfloat16 takes more room; a patch is merged into the codes in the slot while they are cast.
    fits = path.weight_form in ("rowwise_fp8", "rowwise_fnuz", "rotated_int8")
    if not in_slot or not fits or getattr(module, "weight_lowvram_function", None) is not None:
        return weight
    prepared = prepare(module, weight, module.weight, path)
    if prepared is None:
        return weight
    module._v_weight = _written_over(weight, prepared)
    return module._v_weight


def _written_over(weight: QuantizedTensor, prepared: PreparedWeight) -> PreparedWeight:
    """A prepared weight in the memory of the codes that it was made from."""
    tensors = []
    for room, tensor in zip((weight._qdata, weight._params.scale), prepared.tensors, strict=True):
        raw = room.view(torch.uint8).view(-1)
        assert tensor.nbytes <= raw.numel(), (tensor.shape, room.shape)
        place = raw[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensors.append(place.copy_(tensor))
    return PreparedWeight.of(prepared.stored, prepared.form, tuple(tensors))


def refault(module: torch.nn.Module, form: str) -> None:
    """Have stock copy a layer's codes into its slot again if that has another form."""
    weight = getattr(module, "_v_weight", None)
    if isinstance(weight, PreparedWeight) and weight.form != form:
        module._v_signature = None
