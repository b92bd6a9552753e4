"""The values of quantized weights, for code that takes a state dict's entries for values.

Stock's state dicts hold a quantized weight as its codes, with scales and a marker beside them: what
is written to a file. Nodes that extract a LoRA from a model, or build a control model from one,
take the codes for the weight, which are thousands of times as large, and no error follows. So a
patcher's `model_state_dict` holds values (`StateDict`), and so does the model's own `state_dict`
while the model is sampled (`show`), when nothing saves it. At other times that is left to those who
save.

Both are lazy. Stock lists the keys of a model at every switch of hooks, and ControlLora would
otherwise take the memory of a whole dequantized model.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from types import MethodType

import torch
from comfy.quant_ops import QuantizedTensor


class StateDict(MutableMapping, dict):
    """A dict whose quantized tensors come out dequantized, each time they are read."""

    def __getitem__(self, key):
        value = dict.__getitem__(self, key)
        return value.dequantize() if isinstance(value, QuantizedTensor) else value

    def __iter__(self):
        return dict.__iter__(self)

    __setitem__, __delitem__ = dict.__setitem__, dict.__delitem__
    __len__, __contains__ = dict.__len__, dict.__contains__


class _Values(QuantizedTensor):
    """A quantized tensor that is dequantized by every operation, copying it elsewhere included."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:  # what makes it a parameter
            return cls(args[0]._qdata, args[0]._layout_cls, args[0]._params)
        return cls._dequant_and_fallback(func, args, kwargs or {})


def _state_dict(module, *args, prefix="", **options):
    state = type(module).state_dict(module, *args, prefix=prefix, **options)
    weight = module.weight
    state[f"{prefix}weight"] = _Values(weight._qdata, weight._layout_cls, weight._params)
    return state


def show(model: torch.nn.Module) -> None:
    """Have the state dict of a model, and of its parts, hold the values of quantized weights."""
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), QuantizedTensor):
            module.state_dict = MethodType(_state_dict, module)


def hide(model: torch.nn.Module) -> None:
    """Undo `show`."""
    for module in model.modules():
        if getattr(vars(module).get("state_dict"), "__func__", None) is _state_dict:
            del module.state_dict
