"""What a computation costs a GPU, counted where there is none: launches, and bytes moved.

Every op that reaches torch's dispatcher is a launch, except views and allocations. It reads every
input once and writes every output once. Within a FakeTensorMode, tensors of any size and device do.
"""

from __future__ import annotations

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view"}
_OVERWRITES = {"copy_", "fill_", "zero_"}  # in place, without reading what is there


class Launches(TorchDispatchMode):
    """A context that counts; `names` of the ops in order, and `bytes`."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        namespace, _, name = op._schema.name.partition("::")
        returns = [value.alias_info for value in op._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in returns)
        if namespace != "prim" and not view and name not in _ALLOCATIONS:
            self.names.append(name)
            read = tree_leaves((args[1:] if name in _OVERWRITES else args, kwargs))
            self.bytes += sum(map(_size, [*read, *tree_leaves(result)]))
        return result


def _size(value) -> int:
    """Bytes of a tensor; a value that is broadcast counts once."""
    if not isinstance(value, torch.Tensor):
        return 0
    sizes = zip(value.shape, value.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride or not size) * value.element_size()
