"""A weight in a backend's form as ComfyUI and torch see it.

    python tests/support/prepared_weights.py COMFYUI

Prints a JSON object: what was checked -> whether it holds.
"""

from __future__ import annotations

import json

import comfyui_modules  # noqa: F401

# isort: split
import comfy.memory_management
import comfy.model_management
import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from mxfp8.nodes.runtime.forward import is_mxfp8_linear
from mxfp8.nodes.runtime.prepared import PreparedWeight, stored_weight

SHAPE = 70, 96  # neither a multiple of 32 nor of 128


def stored_and_prepared() -> tuple[QuantizedTensor, PreparedWeight]:
    weight = torch.randn(SHAPE, dtype=torch.bfloat16)
    stored = QuantizedTensor.from_float(weight, "TensorCoreMXFP8Layout")
    codes = torch.randint(-127, 128, tuple(stored._qdata.shape), dtype=torch.int8)
    return stored, PreparedWeight.of(stored, "rotated_int8", (codes, torch.rand(len(codes))))


def linear(weight: torch.Tensor) -> torch.nn.Module:
    module = comfy.ops.mixed_precision_ops({}, torch.bfloat16).Linear(96, 70, device="meta")
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    module.bias = torch.nn.Parameter(torch.randn(70, dtype=torch.bfloat16), requires_grad=False)
    module.quant_format, module.layout_type = "mxfp8", "TensorCoreMXFP8Layout"
    return module


def same(a, b) -> bool:
    def raw(tensor):
        return tensor.contiguous().view(torch.uint8)

    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a.dtype == b.dtype and torch.equal(raw(a), raw(b))


def kept(copy, prepared: PreparedWeight) -> bool:
    """Whether a copy is what the original is."""
    return (
        isinstance(copy, PreparedWeight)
        and copy.form == prepared.form
        and copy.stored is prepared.stored
        and all(map(same, copy.tensors, prepared.tensors))
    )


class Forward(torch.nn.Module):
    """A layer that uses a weight as our forward does."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        assert self.weight.form == "rotated_int8"
        codes = self.weight._qdata.to(x.dtype) * self.weight._params.scale[:, None]
        return x @ codes.t()


def checks():
    stored, prepared = stored_and_prepared()
    values, x = stored.dequantize(), torch.randn(5, 96, dtype=torch.bfloat16)
    parameter = torch.nn.Parameter(prepared, requires_grad=False)
    yield "a parameter", kept(parameter, prepared) and isinstance(parameter, torch.nn.Parameter)
    yield "detached", kept(parameter.detach(), prepared)
    yield "cloned", kept(parameter.clone(), prepared)
    yield "copied", kept(parameter.to("cpu", copy=True), prepared)
    yield "contiguous", kept(parameter.contiguous(), prepared)
    wider = parameter.to(torch.float32)
    yield "in another dtype", kept(wider, prepared) and same(wider.dequantize(), values.float())
    yield "without a copy", parameter.to("cpu") is parameter
    elsewhere = torch.empty_like(parameter)
    yield "copied into", kept(elsewhere.copy_(parameter), prepared)
    names, context = parameter.__tensor_flatten__()
    inner = {name: getattr(parameter, name) for name in names}
    again = PreparedWeight.__tensor_unflatten__(inner, context, None, None)
    yield "taken apart", kept(again, prepared) and context == again.__tensor_flatten__()[1]

    yield "stored_weight", stored_weight(parameter) is stored and stored_weight(stored) is stored
    yield "dequantized", same(parameter.dequantize(), values)
    yield "a sum", same(parameter + 1, values + 1)
    yield "a row", same(parameter[3], values[3])
    yield "transposed", same(parameter.t(), values.t())
    wanted = torch.nn.functional.linear(x, values)
    yield "multiplied", same(torch.nn.functional.linear(x, parameter), wanted)
    dense = torch.empty(SHAPE, dtype=torch.bfloat16)
    yield "copied into a plain one", same(dense.copy_(parameter), values)
    quantized, _ = stored_and_prepared()
    quantized.copy_(parameter)
    yield "copied into a stored one", same(quantized.state_dict("w"), stored.state_dict("w"))
    try:
        parameter.copy_(stored)
    except TypeError as error:
        yield "not written into", "rotated_int8" in str(error) and kept(parameter, prepared)
    requantized = [w.requantize_from_float(2 * values + 1) for w in (parameter, stored)]
    yield (
        "requantized",
        type(requantized[0]) is QuantizedTensor and same(*(w.state_dict("w") for w in requantized)),
    )

    module, plain = linear(prepared), linear(stored)
    plain.bias = module.bias
    yield "an MXFP8 linear", is_mxfp8_linear(module)
    yield "its state dict", same(module.state_dict(prefix="a."), plain.state_dict(prefix="a."))
    sizes = [comfy.model_management.module_size(m) for m in (module, plain)]
    yield "its size", sizes[0] == sizes[1]
    yield "stock's forward", same(module(x), plain(x))
    yield "moved as a module", kept(module.to("cpu").weight, prepared)
    yield "converted", same(module.convert_weight(module.weight), values)
    yield "set", type(module.set_weight(values, seed=1, return_weight=True)) is QuantizedTensor

    bf16 = PreparedWeight.of(stored, "bf16", (values,))
    yield "one tensor", len(bf16.tensors) == 1 and kept(bf16.clone(), bf16)


def compiled():
    eager, x = Forward(stored_and_prepared()[1]), torch.randn(5, 96)
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            yield f"compiled in {mode.__name__}", torch.equal(compiled(x), eager(x))


if __name__ == "__main__":
    torch.manual_seed(0)
    results = dict(compiled())
    for mode in (torch.no_grad, torch.inference_mode):  # which dispatches other operators
        with mode():
            results |= {f"{what} in {mode.__name__}": holds for what, holds in checks()}
    print(json.dumps(results))
