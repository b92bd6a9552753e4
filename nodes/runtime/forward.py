"""The forward of an MXFP8 linear, and what decides how it runs.

`_linear` and the backend report (`describe`) ask the same functions, so that they cannot disagree.
Which backend multiplies, `kernels.execution_path` decides. The branches of a layer (`lora`) are run
after it.
"""

from __future__ import annotations

import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from ... import kernels
from ...kernels.ops import FLOATS
from .cache import model_state


def is_mxfp8_linear(module: torch.nn.Module) -> bool:
    """Whether stock loaded this module as a linear layer with an MXFP8 weight."""
    return (
        getattr(module, "quant_format", None) == "mxfp8"
        and hasattr(module, "in_features")
        and isinstance(getattr(module, "weight", None), QuantizedTensor)
        and module.weight.ndim == 2
    )


def compute_dtype(patcher) -> torch.dtype:
    """The dtype of a model's activations; bfloat16 where the model does not say."""
    dtype = patcher.object_patches.get("manual_cast_dtype")
    dtype = dtype or getattr(patcher.model, "get_dtype_inference", lambda: None)()
    return dtype if dtype in FLOATS else torch.bfloat16


def left_to_stock(module) -> str | None:
    """Why a layer runs stock's forward now, or None."""
    if module.weight_function or module.bias_function:
        return "ComfyUI applies a patch on the fly, as it does to offloaded layers"
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


def _forward(module, x: torch.Tensor, precision: str | None) -> torch.Tensor:
    """A linear's output, with its branches: those of the model's patches, then those of hooks.

    Args:
        precision: None for stock's forward.
    """
    branches = getattr(module, "mxfp8_branches", ())
    if branches and isinstance(x, QuantizedTensor):
        x = x.dequantize()
    inputs = [x]
    for branch in reversed(branches):
        inputs.append(branch.adjust_input(inputs[-1]))
    x = inputs.pop()
    out = type(module).forward(module, x) if precision is None else _linear(module, x, precision)
    for branch in branches:
        out = branch.add_to(out, inputs.pop())
    return out


def _linear(module, x: torch.Tensor, precision: str) -> torch.Tensor:
    """The forward of stock's quantized Linear, with `kernels.linear` as its matmul.

    Everything else stays with stock: training, scaled inputs, and weights that it patches on the
    fly: a merged model on an offloaded layer. Under dynamic VRAM stock applies that patch while it
    casts the weight, which then comes back unquantized.
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
    else:  # a patch was merged into it on the way
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


def _forward_plain(module, x, *_, **__):
    """For a layer that is not quantized, and has branches."""
    return _forward(module, x, None)


# Separate functions, not one with an argument: torch.compile inlines bound methods.
FORWARDS = {"auto": _forward_auto, "exact": _forward_exact, "fast": _forward_fast}
UNFIT = _forward_unfit
PLAIN = _forward_plain
PRECISION_OF = {
    **{function: precision for precision, function in FORWARDS.items()},
    UNFIT: "exact",
}
OURS = {*PRECISION_OF, PLAIN}


def is_ours(patch) -> bool:
    """Whether an object patch is one of these forwards."""
    return getattr(patch, "__func__", None) in OURS


def our_patches(patcher) -> list[str]:
    """Names of the object patches on a patcher that are ours."""
    return [name for name, patch in patcher.object_patches.items() if is_ours(patch)]


def is_foreign(module) -> bool:
    """Whether a linear has a forward from elsewhere: neither its class's nor ours."""
    function = getattr(module.forward, "__func__", None)
    return function is not type(module).forward and function not in OURS
