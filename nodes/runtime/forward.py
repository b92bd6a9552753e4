"""The forward of an MXFP8 linear, and what decides how it runs.

`_forward` and the backend report (`describe`) ask the same functions, so that they cannot disagree.
Which backend multiplies, `kernels.execution_path` decides.
"""

from __future__ import annotations

import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from ... import kernels
from ...kernels.ops import FLOATS
from .cache import model_state


def left_to_stock(module) -> str | None:
    """Why a layer runs stock's forward now, or None."""
    if module.weight_function or module.bias_function:
        return "ComfyUI applies a LoRA on the fly, as it does to offloaded layers"
    if getattr(module, "pre_quant_scale", None) is not None:
        return "ComfyUI scales its input (pre_quant_scale)"
    return None


def held_exact(module) -> str | None:
    """Why a layer runs exact whatever precision was chosen, or None."""
    if module._full_precision_mm_config:
        return "marked full precision in the file"
    if getattr(module, "comfy_force_cast_weights", False):
        return "ComfyUI was told to cast the weights of this model"
    return None


def _forward(module, x: torch.Tensor, precision: str) -> torch.Tensor:
    """The forward of stock's quantized Linear, with `kernels.linear` as its matmul.

    Everything else stays with stock: training, weights that it patches on the fly (a LoRA on an
    offloaded layer), scaled inputs. Under dynamic VRAM stock applies that patch while it casts the
    weight, which then comes back unquantized.
    """
    stock = (
        x.requires_grad
        or isinstance(x, QuantizedTensor)
        or x.dtype not in FLOATS
        or left_to_stock(module) is not None
    )
    if stock:
        return type(module).forward(module, x)

    comfy.ops.run_every_op()
    if held_exact(module) is not None:
        precision = "exact"
    weight, bias, stream = comfy.ops.cast_bias_weight(
        module,
        input=None,
        dtype=module.weight.dtype,  # another dtype would hand back a dequantized weight
        device=x.device,
        bias_dtype=x.dtype,
        offloadable=True,
        compute_dtype=x.dtype,
        want_requant=False,  # requantizing a patched weight would cost an error of 3%
    )
    if isinstance(weight, QuantizedTensor):
        prepared = quantized = form = None
        if not torch.compiler.is_compiling():
            form = kernels.input_form(x, precision)
        if form is not None:
            quantized = model_state(module).quantized_input(module, x, form)
        if form == "rowwise":
            prepared = model_state(module).prepared_weight(module, weight)
        out = kernels.linear(
            x,
            weight._qdata,
            weight._params.scale,
            bias,
            shape=tuple(weight.shape),
            precision=precision,
            prepared_weight=prepared,
            quantized_input=quantized,
        )
    else:  # a LoRA was merged into it on the way
        out = torch.nn.functional.linear(x, weight.to(x.dtype), bias)
    comfy.ops.uncast_bias_weight(module, weight, bias, stream)
    return out


def _forward_auto(module, x, *_, **__):
    return _forward(module, x, "auto")


def _forward_exact(module, x, *_, **__):
    return _forward(module, x, "exact")


def _forward_fast(module, x, *_, **__):
    return _forward(module, x, "fast")


def _forward_unfit(module, x, *_, **__):
    """For a layer that row-wise scaling would change too much."""
    return _forward(module, x, "exact")


# Separate functions, not one with an argument: torch.compile inlines bound methods.
FORWARDS = {"auto": _forward_auto, "exact": _forward_exact, "fast": _forward_fast}
UNFIT = _forward_unfit
PRECISION_OF = {
    **{function: precision for precision, function in FORWARDS.items()},
    UNFIT: "exact",
}
