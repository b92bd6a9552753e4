"""A loaded model as something to convert or save: its tensors by name, LoRAs baked in.

Weights come as the model was loaded, whatever is merged into them at the moment: the originals are
in the patcher's backup while a LoRA is merged. Patches are then applied in float32 and the result
is handed on in float32 to the quantiser, or rounded once to the weight's own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import comfy.lora
import comfy.utils
import torch
from comfy.model_base import ModelType
from comfy.model_sampling import V_PREDICTION, ModelSamplingContinuousEDM
from comfy.quant_ops import QuantizedTensor

from ..quant.format import WEIGHT
from ..quant.source import HEADER_DTYPES, as_bytes

_PREFIX = "diffusion_model."


@dataclass(frozen=True)
class _Entry:
    """One tensor: `full` is its name in the patcher, `tensor` is set where it has none."""

    full: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    tensor: torch.Tensor | None = None


class ModelSource:
    """The diffusion model inside a MODEL, keys without prefix, for `quant.convert`.

    Args:
        patcher: the MODEL. It is only read.
        metadata: for the file's header.

    A weight held in float32 whose values are all exact in bfloat16 counts as bfloat16: on a CPU,
    ComfyUI holds BF16 checkpoints in float32, and a file should not double for that.
    """

    def __init__(self, patcher, metadata: dict[str, str] | None = None):
        self.name = type(patcher.model).__name__
        self.metadata = metadata or {}
        self._patcher = patcher
        self._cached: tuple[str, torch.Tensor] | None = None
        self._entries: dict[str, _Entry] = {}
        self.quantized: dict[str, torch.nn.Module] = {}
        model = patcher.model.diffusion_model
        modules = dict(model.named_modules())
        for key in model.state_dict():
            owner, _, leaf = key.rpartition(".")
            module = modules.get(owner)
            if isinstance(getattr(module, "weight", None), QuantizedTensor):
                self.quantized[owner] = module
                if leaf != "bias":
                    continue
            self._add(key)
        for key, tensor in _prediction_keys(patcher).items():
            self._entries[key] = _Entry(key, tensor.dtype, tuple(tensor.shape), tensor)

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {k: (HEADER_DTYPES[e.dtype], e.shape) for k, e in self._entries.items()}

    def is_linear(self, layer: str) -> bool:
        """Whether a layer is one of ComfyUI's linears (an Embedding's weight is 2-D too)."""
        module = comfy.utils.get_attr(self._patcher.model, _PREFIX + layer)
        return isinstance(module, torch.nn.Linear) or (
            hasattr(module, "comfy_cast_weights") and hasattr(module, "in_features")
        )

    def rows(self, key: str, first: int, last: int) -> torch.Tensor:
        """Rows of a weight with its patches, as precise as they are."""
        return self._value(key)[first:last].to("cpu").contiguous()

    def pieces(self, key: str) -> Iterator[memoryview]:
        value = self._value(key).to("cpu", self._entries[key].dtype).contiguous()
        yield as_bytes(value.reshape(-1))

    def weight(self, layer: str) -> torch.Tensor | None:
        """A quantised layer's weight in float32 if patches change it, else None."""
        full = f"{_PREFIX}{layer}{WEIGHT}"
        if full not in self._patcher.patches:
            return None
        return self._patched(full)

    def original(self, full: str) -> torch.Tensor:
        """A parameter as loaded, without what is merged into it now."""
        if full in self._patcher.hook_backup:
            return self._patcher.hook_backup[full][0]
        if full in self._patcher.backup:
            return self._patcher.backup[full].weight
        return comfy.utils.get_attr(self._patcher.model, full)

    def _add(self, key: str) -> None:
        full = _PREFIX + key
        value = self.original(full)
        dtype = value.dtype
        exact = full not in self._patcher.patches and dtype == torch.float32
        if exact and torch.equal(value.bfloat16().float(), value):
            dtype = torch.bfloat16
        self._entries[key] = _Entry(full, dtype, tuple(value.shape))

    def _value(self, key: str) -> torch.Tensor:
        entry = self._entries[key]
        if entry.tensor is not None:
            return entry.tensor
        if entry.full not in self._patcher.patches:
            return self.original(entry.full)
        if self._cached is None or self._cached[0] != key:
            self._cached = None  # free the last one first
            self._cached = key, self._patched(entry.full)
        return self._cached[1]

    def _patched(self, full: str) -> torch.Tensor:
        weight = self.original(full)
        if isinstance(weight, QuantizedTensor):
            weight = weight.dequantize()
        weight = weight.to(self._patcher.load_device, torch.float32, copy=True)
        patches = self._patcher.patches[full]
        return comfy.lora.calculate_weight(patches, weight, full, intermediate_dtype=torch.float32)


def _prediction_keys(patcher) -> dict[str, torch.Tensor]:
    """The marker tensors by which ComfyUI recognises v-prediction models; most have none."""
    sampling = patcher.get_model_object("model_sampling")
    keys = {}
    if isinstance(sampling, ModelSamplingContinuousEDM) and isinstance(sampling, V_PREDICTION):
        keys["edm_vpred.sigma_max"] = torch.tensor(float(sampling.sigma_max))
        keys["edm_vpred.sigma_min"] = torch.tensor(float(sampling.sigma_min))
    if patcher.model.model_type == ModelType.V_PREDICTION:
        keys["v_pred"] = torch.tensor([])
        if getattr(sampling, "zsnr", False):
            keys["ztsnr"] = torch.tensor([])
    return keys
