"""A weight in a backend's form, which stands in a layer while ComfyUI holds that on the device.

It takes the place of the MXFP8 weight that it was made from, so that the device holds one of them,
and refers to that one, which stays in RAM (`stored`). Only our forward uses the form. For everyone
else it is the MXFP8 weight: values, state dict and operators are those of `stored`, so what saves,
merges, patches or compares weights needs no case of its own.

Rejected: ComfyUI's INT8 layout in its place. Saving then writes INT8 under the marker of MXFP8, and
a LoRA is added to a weight that was rounded twice.
"""

from __future__ import annotations

import dataclasses

import torch
from comfy.quant_ops import QuantizedTensor

_aten = torch.ops.aten
# These keep the form; every other operator is given the stored values.
_COPYING = {
    _aten.detach.default,
    _aten.clone.default,
    _aten._to_copy.default,
    _aten.to.dtype,  # in inference mode, in place of _to_copy
    _aten.to.dtype_layout,
    _aten.contiguous.default,
    _aten.is_contiguous.default,
    _aten.empty_like.default,
    _aten._has_compatible_shallow_copy_type.default,
}


class _Master:
    """Holds a stored weight where torch.compile compares what tensors are made of, copies it and
    keeps it on disk: a compiled graph serves every weight of a form."""

    def __init__(self, weight: QuantizedTensor | None = None) -> None:
        self.weight = weight

    def __eq__(self, other) -> bool:
        return isinstance(other, _Master)

    def __hash__(self) -> int:
        return hash(_Master)

    def __reduce__(self):
        return _Master, ()


class PreparedWeight(QuantizedTensor):
    """A weight [N, K]: `_qdata` and `_params.scale` are a form's tensors, on the device.

    Made by `of`. The scale of a form without one is empty.

    Attributes:
        form: the name of the form (`kernels`).
    """

    @staticmethod
    def __new__(cls, qdata: torch.Tensor, layout_cls: str, params, form: str, master: _Master):
        return QuantizedTensor.__new__(cls, qdata, layout_cls, params)

    def __init__(self, qdata: torch.Tensor, layout_cls: str, params, form: str, master: _Master):
        super().__init__(qdata, layout_cls, params)
        self.form = form
        self._master = master

    @classmethod
    def of(
        cls, stored: QuantizedTensor, form: str, tensors: tuple[torch.Tensor, ...]
    ) -> PreparedWeight:
        """What stands for an MXFP8 weight.

        Args:
            tensors: what `kernels.prepare_weight` made of it.
        """
        qdata, *scale = tensors
        (scale,) = scale or (qdata.new_empty(0, dtype=torch.float32),)
        params = dataclasses.replace(stored._params, scale=scale)
        return cls(qdata, stored._layout_cls, params, form, _Master(stored))

    @property
    def stored(self) -> QuantizedTensor:
        """The MXFP8 weight that this one was made from, which may be on another device."""
        return self._master.weight

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The form's tensors."""
        scale = self._params.scale
        return (self._qdata, scale) if scale.numel() else (self._qdata,)

    def dequantize(self) -> torch.Tensor:
        # Not by `stored.to`: inside of __torch_dispatch__ that would be dequantized.
        stored, device = self.stored, self.device
        params = dataclasses.replace(stored._params.to_device(device), orig_dtype=self.dtype)
        return QuantizedTensor(stored._qdata.to(device), stored._layout_cls, params).dequantize()

    def state_dict(self, prefix: str = "") -> dict[str, torch.Tensor]:
        return self.stored.state_dict(prefix)

    def requantize_from_float(self, tensor: torch.Tensor, **options) -> QuantizedTensor:
        return self.stored.requantize_from_float(tensor, **options)

    def _copy_with(self, *args, **options) -> PreparedWeight:
        copy = super()._copy_with(*args, **options)
        return PreparedWeight(copy._qdata, copy._layout_cls, copy._params, self.form, self._master)

    def __tensor_flatten__(self):
        names, context = super().__tensor_flatten__()
        return names, {**context, "form": self.form, "master": self._master}

    @staticmethod
    def __tensor_unflatten__(inner_tensors, context, outer_size, outer_stride):
        plain = QuantizedTensor.__tensor_unflatten__(
            inner_tensors, context, outer_size, outer_stride
        )
        return PreparedWeight(
            plain._qdata, plain._layout_cls, plain._params, context["form"], context["master"]
        )

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _aten.copy_.default:
            return _copy(*args, **kwargs)
        if func in _COPYING:
            return super().__torch_dispatch__(func, types, args, kwargs)
        return cls._dequant_and_fallback(func, args, kwargs)


def _copy(target: torch.Tensor, source: torch.Tensor, *args, **options) -> torch.Tensor:
    """`target.copy_(source)`, one of which is a PreparedWeight."""
    if not isinstance(target, PreparedWeight):
        quantized = isinstance(target, QuantizedTensor)
        values = source.stored if quantized else source.dequantize()
        return target.copy_(values, *args, **options)
    if not isinstance(source, PreparedWeight) or source.form != target.form:
        raise TypeError(
            f"a weight in the form {target.form} is replaced, not written into "
            f"(by a {type(source).__name__})"
        )
    target._qdata.copy_(source._qdata, *args, **options)
    target._params.scale.copy_(source._params.scale, *args, **options)
    target._master = source._master
    return target


def stored_weight(weight: torch.Tensor) -> torch.Tensor:
    """A layer's weight as its file holds it, on the device where that is."""
    return weight.stored if isinstance(weight, PreparedWeight) else weight
