"""The forward of an MXFP8 linear, and what decides how it runs: read by whoever says so, too.

What is decided here is decided once: `_forward` runs by the same functions that the backend report
(`describe`) reads, so the two cannot disagree. `kernels.execution_path` says which backend
multiplies.
"""

from __future__ import annotations

import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from ... import kernels
from ...kernels.ops import FLOATS
from . import cache


def left_to_stock(module) -> str | None:
    """Why a layer runs stock's forward at the moment, or None."""
    if module.weight_function or module.bias_function:
        return "ComfyUI applies a LoRA on the fly, as it does to layers that are offloaded"
    if getattr(module, "pre_quant_scale", None) is not None:
        return "ComfyUI smooths its input"
    return None


def held_exact(module) -> str | None:
    """Why a layer runs exact whatever precision it was given, or None."""
    if module._full_precision_mm_config:
        return "marked full precision in the file"
    if getattr(module, "comfy_force_cast_weights", False):
        return "ComfyUI was told to cast the weights of this model"
    return None


def _forward(module, x: torch.Tensor, precision: str) -> torch.Tensor:
    """The forward of stock's quantized Linear, with `kernels.linear` as its matmul.

    What stock does apart from that is left to stock: training, weights that it patches on the fly
    (a LoRA on an offloaded layer), smoothed inputs. Under dynamic VRAM that patch is applied while
    the weight is cast, which then comes back plain.
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
        want_requant=False,  # requantizing a patched weight would lose 3% on every forward
    )
    if isinstance(weight, QuantizedTensor):
        fold = tokens = None
        kind = None if torch.compiler.is_compiling() else kernels.input_form(x, precision)
        if kind is not None:
            tokens = cache.tokens(module, x, kind)
        if kind == "rowwise":
            fold = cache.folded(module, weight)
        out = kernels.linear(
            x,
            weight._qdata,
            weight._params.scale,
            bias,
            shape=tuple(weight.shape),
            precision=precision,
            prepared_weight=fold,
            quantized_input=tokens,
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
    """Of a layer that folding would change too much."""
    return _forward(module, x, "exact")


# Functions, not one with an argument: a bound method is what torch.compile inlines.
FORWARDS = {"auto": _forward_auto, "exact": _forward_exact, "fast": _forward_fast}
UNFIT = _forward_unfit
PRECISION_OF = {
    **{function: precision for precision, function in FORWARDS.items()},
    UNFIT: "exact",
}
