"""The values of quantized weights, for code that takes a state dict's entries for values.

Stock's state dicts hold a quantized weight as its codes, with scales and a marker beside them: what
is written to a file. Nodes that extract a LoRA from a model, or build a control model from one,
take the codes for the weight, which are thousands of times as large, and no error follows. So a
patcher's `model_state_dict` holds values (`StateDict`), and so does the model's own `state_dict`
while the model is sampled (`show`), when nothing saves it. At other times that is left to those who
save.

Values include the LoRAs that run beside a weight (`lora`), as they include merged ones.

Both are lazy. Stock lists the keys of a model at every switch of hooks, and ControlLora would
otherwise take the memory of a whole dequantized model.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import comfy.lora
import torch
from comfy.quant_ops import QuantizedTensor


class StateDict(MutableMapping, dict):
    """A dict whose tensors come out dequantized and with patches, each time they are read.

    Args:
        patches: of the tensors that have some, by key.
    """

    def __init__(self, patches: Mapping[str, list[tuple]]):
        super().__init__()
        self._patches = patches

    def __getitem__(self, key):
        return _value(dict.__getitem__(self, key), key, self._patches.get(key))

    def __iter__(self):
        return dict.__iter__(self)

    __setitem__, __delitem__ = dict.__setitem__, dict.__delitem__
    __len__, __contains__ = dict.__len__, dict.__contains__


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


def patched(
    tensor: torch.Tensor, key: str, patches: list[tuple], device: torch.device | None = None
) -> torch.Tensor:
    """A weight, quantized or not, with patches as stock merges them: in float32, a copy."""
    weight = _dense(tensor).to(device, torch.float32, copy=True)
    return comfy.lora.calculate_weight(patches, weight, key, intermediate_dtype=torch.float32)


def _value(tensor: torch.Tensor, key: str, patches: list[tuple] | None) -> torch.Tensor:
    return patched(tensor, key, patches).to(tensor.dtype) if patches else _dense(tensor)


class _Values(QuantizedTensor):
    """A quantized tensor that is dequantized by every operation, copying it elsewhere included."""

    source, key, patches = None, "", None

    def dequantize(self):
        return _value(self.source, self.key, self.patches)

    @classmethod
    def of(cls, tensor: QuantizedTensor, key: str, patches: list[tuple] | None) -> _Values:
        values = cls(tensor._qdata, tensor._layout_cls, tensor._params)
        values.source, values.key, values.patches = tensor, key, patches
        return values

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:  # what makes it a parameter
            return cls.of(args[0].source, args[0].key, args[0].patches)
        return cls._dequant_and_fallback(func, args, kwargs or {})


class _StateDictOf:
    """The `state_dict` of a linear that holds values."""

    def __init__(self, module: torch.nn.Module, name: str, patches: Mapping[str, list[tuple]]):
        self._module, self._name, self._patches = module, name, patches

    def __call__(self, *args, prefix="", **options):
        state = type(self._module).state_dict(self._module, *args, prefix=prefix, **options)
        for leaf in ("weight", "bias"):
            tensor, key = getattr(self._module, leaf, None), f"{self._name}.{leaf}"
            patches = self._patches.get(key)
            if isinstance(tensor, QuantizedTensor):
                state[prefix + leaf] = _Values.of(tensor, key, patches)
            elif patches:
                state[prefix + leaf] = _value(tensor, key, patches)
        return state


def show(model: torch.nn.Module, patches: Mapping[str, list[tuple]]) -> None:
    """Have the state dict of a model, and of its parts, hold the values of weights.

    Args:
        patches: what branches do to weights, by key (`lora.bound_patches`).
    """
    layers = {key.rpartition(".")[0] for key in patches}
    for name, module in model.named_modules():
        if name in layers or isinstance(getattr(module, "weight", None), QuantizedTensor):
            module.state_dict = _StateDictOf(module, name, patches)


def hide(model: torch.nn.Module) -> None:
    """Undo `show`."""
    for module in model.modules():
        if isinstance(vars(module).get("state_dict"), _StateDictOf):
            del module.state_dict
