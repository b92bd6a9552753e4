"""The forward of an MXFP8 linear, and what decides how it runs.

`_linear` and the backend report (`describe`) ask the same functions, so that they cannot disagree.
Which backend multiplies, `kernels.execution_path` decides, for the form that the weight has now
(`prepared`). The branches of a layer (`lora`) are run after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from ... import kernels
from ...kernels.ops import FLOATS
from .cache import model_state
from .prepared import PreparedWeight
from .preparing import called_with_few_rows, give_back
from .slot import prepare_in_slot


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


def is_away(tensor: torch.Tensor, patcher) -> bool:
    """Whether a tensor is not on the device that its model computes on ("mps" is "mps:0")."""
    here, there = patcher.load_device, tensor.device
    return (here.type, here.index or 0) != (there.type, there.index or 0)


def compute_dtype(patcher) -> torch.dtype:
    """The dtype of a model's activations; bfloat16 where the model does not say."""
    model, name = patcher.model, "manual_cast_dtype"
    dtype = None
    if hasattr(model, name):  # which another patcher may have patched on the model
        dtype = patcher.get_model_object(name) or model.get_dtype()
    return dtype if dtype in FLOATS else torch.bfloat16


def left_to_stock(module, precision: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a layer runs stock's forward now, or None.

    Args:
        precision: that was chosen for it; device, dtype: of its input.
    """
    if module.weight_function or module.bias_function:
        return "ComfyUI applies a patch on the fly, as it does to offloaded layers"
    if module._parameters.get("pre_quant_scale") is not None:
        return "ComfyUI scales its input (pre_quant_scale)"
    # Where stock multiplies in MXFP8, which is faster than anything exact.
    if precision != "exact" and not module._full_precision_mm and held_exact(module) is None:
        path = wanted_path(module, precision, device, dtype)
        if path.precision == "exact":
            return f"as ComfyUI runs it, in MXFP8; nothing here is faster ({_first_reason(path)})"
    return None


def wanted_path(module, precision: str, device: torch.device, dtype: torch.dtype):
    """The path of a layer with many rows whose weight may be prepared.

    Args:
        as for `left_to_stock`.
    """
    if held_exact(module) is not None:
        precision = "exact"
    shape = tuple(module.weight.shape)
    return kernels.execution_path(device, dtype, precision, None, shape, prepare="once")


def form_and_tensors(weight: QuantizedTensor) -> tuple[str, tuple[torch.Tensor, ...]]:
    """The form that a weight has now, and its tensors."""
    if isinstance(weight, PreparedWeight):
        return weight.form, weight.tensors
    return "stored", (weight._qdata, weight._params.scale)


def _first_reason(path) -> str:
    return next(iter(f"{name}: {reason}" for name, reason in path.unsupported), "")


def held_exact(module) -> str | None:
    """Why a layer runs exact whatever precision was chosen, or None."""
    if module._full_precision_mm_config:
        return "marked full precision in the file"
    if vars(module).get("comfy_force_cast_weights"):  # `getattr` takes 1 us where it is missing
        return "ComfyUI was told to cast the weights of this model"
    return None


def _forward(module, x: torch.Tensor, precision: str | None) -> torch.Tensor:
    """A linear's output, with its branches: those of the model's patches, then those of hooks.

    Args:
        precision: None for stock's forward.
    """
    branches = vars(module).get("mxfp8_branches")
    if not branches:
        return _base(module, x, precision)
    if isinstance(x, QuantizedTensor):
        x = x.dequantize()
    inputs = [x]
    for branch in reversed(branches):
        inputs.append(branch.adjust_input(inputs[-1]))
    x = inputs.pop()
    out = _base(module, x, precision)
    for branch in branches:
        out = branch.add_to(out, inputs.pop())
    return out


def _base(module, x: torch.Tensor, precision: str | None) -> torch.Tensor:
    """A linear's output without branches."""
    return type(module).forward(module, x) if precision is None else _linear(module, x, precision)


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
        or left_to_stock(module, precision, x.device, x.dtype) is not None
    )
    if stock:
        return type(module).forward(module, x)

    comfy.ops.run_every_op()
    if held_exact(module) is not None:
        precision = "exact"
    weight, bias, stream = comfy.ops.cast_bias_weight(
        module,
        input=None,
        dtype=module._parameters["weight"].dtype,  # else a dequantized weight would come back
        device=x.device,
        bias_dtype=x.dtype,
        offloadable=True,
        compute_dtype=x.dtype,
        want_requant=False,  # requantizing a patched weight would cost an error of 3%
    )
    if isinstance(weight, QuantizedTensor):
        out = _multiply(module, x, weight, bias, precision)
    else:  # a patch was merged into it on the way
        out = torch.nn.functional.linear(x, weight.to(x.dtype), bias)
    comfy.ops.uncast_bias_weight(module, weight, bias, stream)
    return out


def _multiply(module, x: torch.Tensor, weight: QuantizedTensor, bias, precision: str):
    """x @ W.T + bias with the weight in the form that it has now.

    A weight that was prepared says how it is multiplied; one that is stored, because it is
    offloaded, is multiplied as stored.
    """
    rows = math.prod(x.shape[:-1])
    if not torch.compiler.is_compiling():
        weight = _held(module, x, weight, rows, precision)
    form, tensors = form_and_tensors(weight)
    path = kernels.execution_path(
        x.device,
        x.dtype,
        precision if form == "stored" else "auto",
        rows,
        tuple(weight.shape),
        weight_form=form,
    )
    quantized = None
    if path.quantizer is not None and not torch.compiler.is_compiling():
        quantized = model_state(module).quantized_input(module, x, path)
    return kernels.linear_prepared(path, x, tensors, bias, weight.shape[0], quantized)


def _held(module, x: torch.Tensor, weight: QuantizedTensor, rows: int, precision: str):
    """The weight of a call, once it is known whether the layer has few rows.

    Args:
        weight: on the device, as `cast_bias_weight` gave it.
    """
    if precision == "exact":
        return weight
    state = model_state(module)
    if module in state.stays_stored:
        return weight
    if isinstance(weight, PreparedWeight):
        if module in state.called:
            return weight
    elif "_v" not in vars(module):  # it is offloaded, or hooks have merged LoRAs into it
        return weight
    path = wanted_path(module, precision, x.device, x.dtype)
    if path.precision == "exact" or path.weight_form == "stored":
        return weight
    if not called_with_few_rows(module, rows):
        return prepare_in_slot(module, weight, path)
    if isinstance(weight, PreparedWeight):
        return give_back(module, weight, wanted_path(module, "exact", x.device, x.dtype))
    return weight


def _forward_auto(module, x, *_, **__):
    return _forward(module, x, "auto")


def _forward_exact(module, x, *_, **__):
    return _forward(module, x, "exact")


def _forward_fast(module, x, *_, **__):
    return _forward(module, x, "fast")


def _forward_plain(module, x, *_, **__):
    """For a layer that is not quantized, and has branches."""
    return _forward(module, x, None)


# Separate functions, not one with an argument: torch.compile inlines bound methods.
FORWARDS = {"auto": _forward_auto, "exact": _forward_exact, "fast": _forward_fast}
PLAIN = _forward_plain
PRECISION_OF = {function: precision for precision, function in FORWARDS.items()}
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
