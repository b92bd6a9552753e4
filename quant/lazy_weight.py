"""What an MXFP8Linear shows as its weight: dequantized when an operator reads it, never written.

The plain dequantized tensor would do, but for two things. T5 reads `weight.dtype` three times per
call, and each would dequantize it (4096 x 10240 in BF16 on one CPU core: 0.2 s; here 5 us; measured
2026-11). And `weight.data.normal_()` would change a copy, without a word.
"""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_leaves, tree_map_only


class LazyWeight(torch.Tensor):
    """The weight [N, K] of an MXFP8Linear, in the dtype to which the module was converted.

    Operators get the values it has when they run. Views and slices are copies of these.

    Raises:
        RuntimeError: an operator would write it; with the layer's `read_only`.
    """

    @staticmethod
    def __new__(cls, layer):
        dtype, device = layer.like.dtype, layer.qdata.device
        result = cls._make_wrapper_subclass(cls, layer.shape, dtype=dtype, device=device)
        result._layer = layer
        return result

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten.detach.default:  # `.data` is this, too
            return cls(args[0]._layer)
        arguments = operator._schema.arguments
        given = {**dict(zip((a.name for a in arguments), args, strict=False)), **(kwargs or {})}
        written = tree_leaves([given.get(a.name) for a in arguments if a.is_write])
        for tensor in written:
            if isinstance(tensor, cls):
                raise RuntimeError(tensor._layer.read_only)
        args, kwargs = tree_map_only(cls, cls._values, (args, kwargs or {}))
        return operator(*args, **kwargs)

    def _values(self) -> torch.Tensor:
        return self._layer.dequantize(self.dtype)

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value):
        raise RuntimeError(self._layer.read_only)
