"""A quantized linear of a loaded model as the tensors that a file has for it."""

from __future__ import annotations

import torch

from ... import kernels
from ...quant import format
from ...quant.format import MARKER, MXFP8, SCALE, WEIGHT
from ..runtime.prepared import stored_weight


def stored_tensors(
    name: str, module, weight, baked: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a layer, without its bias: MXFP8 as this pack writes it, others as stock does.

    Args:
        name: of the layer in the file.
        weight: its QuantizedTensor.
        baked: the weight in float32 with LoRAs, which is quantized anew.
    """
    if module.quant_format != MXFP8:
        if baked is not None:
            weight = weight.requantize_from_float(baked, scale="recalculate")
        state = module.state_dict(prefix=f"{name}.")
        state.pop(f"{name}.bias", None)
        return {**state, **weight.state_dict(name + WEIGHT)}
    if baked is None:
        weight = stored_weight(weight)
        qdata, scale = weight._qdata, weight._params.scale
    else:
        qdata, scale = kernels.quantize(baked)
    marker = bytearray(format.marker_bytes(_marker(module)))
    return {
        name + WEIGHT: qdata,
        name + SCALE: scale.view(torch.uint8),
        name + MARKER: torch.frombuffer(marker, dtype=torch.uint8),
    }


def _marker(module) -> dict:
    """The stock marker of a loaded MXFP8 linear.

    Its dtype is what the weight computes in; BF16 where ComfyUI holds it in float32, as on a CPU.
    """
    dtype = "F16" if module.weight.dtype == torch.float16 else "BF16"
    marker = format.marker(tuple(module.weight.shape), dtype)
    if module._full_precision_mm_config:
        marker["full_precision_matrix_mult"] = True
    return marker
