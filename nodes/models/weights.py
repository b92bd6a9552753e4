"""The weights of a loaded model as the tensors of a file, LoRAs baked in.

Weights are those that were loaded, whatever is merged into them now: while a LoRA is merged, the
originals are in the patcher's backup. Patches are applied in float32, and the result goes to the
quantizer in float32, or is rounded once to the weight's own dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import comfy.lora
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor

from ...quant import format
from ...quant.container.header import first_of, quoted
from ...quant.format import MARKER, WEIGHT
from ...quant.sources.file import HEADER_DTYPES, as_bytes
from ..runtime import lora
from ..runtime.adapters import SHORT_NAMES
from .baking import BakingError, bake, fits, misfit
from .stored_layers import stored_tensors

_MOST_NAMED = 4  # weights in an error


@dataclass(frozen=True)
class _Entry:
    """One tensor: `full` is its name in the model; `tensor` is set if it is not in the model."""

    full: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    tensor: torch.Tensor | None = None


@dataclass(frozen=True)
class _Part:
    """One tensor of a quantized layer."""

    layer: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class LoadedWeights:
    """Weights of a loaded model as a source for `quant.conversion.convert`, or to save.

    Args:
        patcher: what holds the model. It is only read.
        root: what the names of the weights begin with in the patcher's model, and not in a file.
        rename: from a name without the root to that in a file, or to None, which leaves the tensor
            out; None leaves all of them out.
        beside: more tensors of the file, by name there.
        narrow: whether what is held in float32 counts as `narrowest`.

    Attributes:
        quantized: the linears that are quantized already, by layer; their tensors are those of the
            file format, MXFP8 as this pack writes it.
        markers: theirs, by layer.

    Raises:
        ValueError: a LoRA cannot be merged.
    """

    def __init__(
        self,
        patcher,
        root: str = "",
        rename: Callable[[str], str | None] | None = str,
        beside: Mapping[str, torch.Tensor] | None = None,
        narrow: bool = False,
    ):
        self.name = type(patcher.model).__name__.rstrip("_")
        self._patcher = patcher
        self._root = root
        self._narrow = narrow
        # The tensor, or the tensors of the quantized layer, that was computed last.
        self._cached: tuple[str, torch.Tensor | dict[str, torch.Tensor]] | None = None
        self._entries: dict[str, _Entry] = {}
        self._parts: dict[str, _Part] = {}  # of quantized layers
        self._weights: dict[str, str] = {}  # of quantized layers, by name in the patcher's model
        self.quantized: dict[str, torch.nn.Module] = {}
        model = comfy.utils.get_attr(patcher.model, root[:-1]) if root else patcher.model
        modules = dict(model.named_modules())
        for key in model.state_dict() if rename else ():
            name = rename(key)
            if name is None:
                continue
            owner, _, leaf = key.rpartition(".")
            module = modules.get(owner)
            if isinstance(getattr(module, "weight", None), QuantizedTensor) and leaf != "bias":
                layer = name.removesuffix(f".{leaf}")
                self.quantized[layer] = module
                self._weights[layer] = f"{root}{owner}{WEIGHT}"
            else:
                self._add(name, root + key)
        for key, tensor in (beside or {}).items():
            self._entries[key] = _Entry(key, tensor.dtype, tuple(tensor.shape), tensor)
        self.markers: dict[str, dict] = {}
        for name, module in self.quantized.items():
            parts = stored_tensors(name, module, module.weight)
            marker = parts.pop(name + MARKER)
            self._entries[name + MARKER] = _Entry("", marker.dtype, tuple(marker.shape), marker)
            self._parts |= {k: _Part(name, v.dtype, tuple(v.shape)) for k, v in parts.items()}
            self.markers[name] = json.loads(bytes(marker.tolist()))
        self.metadata = format.with_markers({}, self.markers) if self.markers else {}
        self._check_patches()

    @cached_property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        entries = (*self._entries.items(), *self._parts.items())
        return {key: (HEADER_DTYPES[entry.dtype], entry.shape) for key, entry in entries}

    def is_linear(self, layer: str) -> bool:
        """Whether a layer is one of ComfyUI's linears (an Embedding's weight is 2-D too)."""
        module = self.quantized.get(layer)
        if module is None:
            entry = self._entries.get(layer + WEIGHT)
            if entry is None or entry.tensor is not None:
                return False
            module = comfy.utils.get_attr(self._patcher.model, entry.full.removesuffix(WEIGHT))
        return hasattr(module, "comfy_cast_weights") and hasattr(module, "in_features")

    def rows(self, key: str, first: int, last: int) -> torch.Tensor:
        """Rows of a weight with its patches, unrounded."""
        return self._value(key)[first:last].to("cpu").contiguous()

    def pieces(self, key: str) -> Iterator[memoryview]:
        if key in self._parts:
            yield as_bytes(self._part(key).to("cpu").contiguous())
            return
        yield as_bytes(self.tensor(key).reshape(-1))

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor of no quantized layer, with its patches, on the CPU."""
        entry = self._entries[key]
        value = self._value(key).to("cpu", entry.dtype).contiguous()
        if entry.full in self._patcher.patches and not value.isfinite().all():
            reason = f"it gets too large for {SHORT_NAMES[entry.dtype]}"
            raise ValueError(self._unmergeable({entry.full: reason}))
        return value

    def _add(self, name: str, full: str) -> None:
        value = lora.original(self._patcher, full)
        dtype = value.dtype
        patches = self._patcher.patches.get(full, [])
        if tuple(comfy.lora.calculate_shape(patches, value, full)) != tuple(value.shape):
            raise ValueError(
                f"a LoRA on this {self.name} changes the shape of {name!r}; apply it after this "
                "node"
            )
        if self._narrow and not patches:
            dtype = narrowest(value)
        self._entries[name] = _Entry(full, dtype, tuple(value.shape))

    def _part(self, key: str) -> torch.Tensor:
        layer = self._parts[key].layer
        if self._cached is None or self._cached[0] != layer:
            self._cached = None  # free the last one first
            full = self._weights[layer]
            baked = self._patched(full) if full in self._patcher.patches else None
            original = lora.original(self._patcher, full)
            self._cached = layer, stored_tensors(layer, self.quantized[layer], original, baked)
        return self._cached[1][key]

    def _value(self, key: str) -> torch.Tensor:
        entry = self._entries[key]
        if entry.tensor is not None:
            return entry.tensor
        if entry.full not in self._patcher.patches:
            return lora.original(self._patcher, entry.full)
        if self._cached is None or self._cached[0] != key:
            self._cached = None  # free the last one first
            self._cached = key, self._patched(entry.full)
        return self._cached[1]

    def _patched(self, full: str) -> torch.Tensor:
        weight = lora.patched(self._patcher, full, [])
        try:
            return bake(self._patcher.patches[full], weight, full)
        except BakingError as error:
            raise ValueError(self._unmergeable({full: str(error)})) from error

    def _check_patches(self) -> None:
        """Check that all patches fit their weights, before any work is done.

        Raises:
            ValueError: some do not; the message names them.
        """
        failed = {}
        ours = {entry.full for entry in self._entries.values()} | {*self._weights.values()}
        for full, patches in self._patcher.patches.items():
            if full not in ours:
                continue
            shape = lora.original(self._patcher, full).shape
            if fits(patches, shape, full):
                continue
            try:
                self._patched(full)
            except ValueError as error:
                computed = error.__cause__.__cause__ is None  # to NaN or Inf
                known = None if computed else misfit(patches, shape, full)
                failed[full] = known or str(error.__cause__)
        if failed:
            raise ValueError(self._unmergeable(failed))

    def _unmergeable(self, failed: dict[str, str]) -> str:
        named = [
            f"{quoted(full.removeprefix(self._root))} ({reason})" for full, reason in failed.items()
        ]
        return (
            f"LoRAs or patches on this {self.name} cannot be merged into {len(failed)} of its "
            f"weights: {first_of(named, _MOST_NAMED, str)}; remove them, or use ones made for this "
            "model"
        )


def narrowest(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of 16 bits that holds a float32 tensor's values exactly, or the tensor's own.

    On a CPU, ComfyUI holds diffusion models of 16 bits in float32; files should not double in size
    for it.
    """
    narrow = (torch.bfloat16, torch.float16) if tensor.dtype == torch.float32 else ()
    return next((d for d in narrow if torch.equal(tensor.to(d).float(), tensor)), tensor.dtype)
