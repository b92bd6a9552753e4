"""A loaded model as a source to convert or save: its tensors by name, LoRAs baked in.

Weights are those that were loaded, whatever is merged into them now: while a LoRA is merged, the
originals are in the patcher's backup. Patches are applied in float32, and the result goes to the
quantizer in float32, or is rounded once to the weight's own dtype.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import comfy.lora
import comfy.utils
import torch
from comfy.model_base import ModelType
from comfy.model_detection import detect_unet_config, model_config_from_unet
from comfy.model_sampling import V_PREDICTION, ModelSamplingContinuousEDM
from comfy.quant_ops import QuantizedTensor

from ...quant import format
from ...quant.container.header import quoted
from ...quant.format import MARKER, WEIGHT
from ...quant.sources.file import HEADER_DTYPES, as_bytes
from ..runtime import lora
from ..runtime.adapters import SHORT_NAMES
from ..runtime.patch import PREFIX
from .baking import BakingError, bake, fits, misfit
from .raw_codes import check_weights
from .stored_layers import stored_tensors

_MOST_NAMED = 4  # weights in an error
# What files have before the names in memory where ComfyUI recognizes them by it, by `image_model`.
_FILE_PREFIXES = {"pixeldit_t2i": "core."}


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


class ModelSource:
    """The diffusion model inside a MODEL as a file of its own, for `quant.conversion.convert`.

    Names are those by which ComfyUI recognizes such a file. What it needs beside the model's layers
    to build the model is part of it.

    Args:
        patcher: the MODEL. It is only read.

    Attributes:
        prefix: what names begin with, and not in memory.
        quantized: the linears that are quantized already, by layer; their tensors are those of the
            file format, MXFP8 as this pack writes it.

    Raises:
        ValueError: a plain weight holds MXFP8 codes, or a LoRA cannot be merged.

    A weight held in float32 whose values are all exact in bfloat16 or float16 counts as that: on a
    CPU, ComfyUI holds 16-bit checkpoints in float32, and files should not double in size for it.
    """

    def __init__(self, patcher):
        self.name = type(patcher.model).__name__
        self._patcher = patcher
        # The tensor, or the tensors of the quantized layer, that was computed last.
        self._cached: tuple[str, torch.Tensor | dict[str, torch.Tensor]] | None = None
        self._entries: dict[str, _Entry] = {}
        self._parts: dict[str, _Part] = {}  # of quantized layers
        image_model = patcher.model.model_config.unet_config.get("image_model")
        self.prefix = _FILE_PREFIXES.get(image_model, "")
        self.quantized: dict[str, torch.nn.Module] = {}
        check_weights(patcher.model)
        model = patcher.model.diffusion_model
        modules = dict(model.named_modules())
        for key in model.state_dict():
            owner, _, leaf = key.rpartition(".")
            module = modules.get(owner)
            if isinstance(getattr(module, "weight", None), QuantizedTensor):
                self.quantized[self.prefix + owner] = module
                if leaf != "bias":
                    continue
            self._add(key)
        for key, tensor in {**_beside(patcher), **_prediction_keys(patcher)}.items():
            self._entries[key] = _Entry(key, tensor.dtype, tuple(tensor.shape), tensor)
        markers = {}
        for name, module in self.quantized.items():
            parts = stored_tensors(name, module, module.weight)
            marker = parts.pop(name + MARKER)
            self._entries[name + MARKER] = _Entry("", marker.dtype, tuple(marker.shape), marker)
            self._parts |= {k: _Part(name, v.dtype, tuple(v.shape)) for k, v in parts.items()}
            markers[name] = json.loads(bytes(marker.tolist()))
        self.metadata = format.with_markers({}, markers) if markers else {}
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

    def detection_metadata(self, stored: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """The metadata that ComfyUI needs to recognize this model in a file.

        ComfyUI tells models apart by the shapes of their tensors. For a few (LTX, MiniMax, some
        Wan) it reads the rest from metadata, which a loaded model no longer has.

        Args:
            stored: shapes in the file, of plain tensors whose shape there differs.

        Raises:
            ValueError: ComfyUI would not recognize it, or take it for another model.
        """
        state = {
            key: lora.original(self._patcher, entry.full) if entry.tensor is None else entry.tensor
            for key, entry in self._entries.items()
        }
        state |= {f"{name}{WEIGHT}": m.weight for name, m in self.quantized.items()}
        config = self._patcher.model.model_config
        detected = detect_unet_config(state, "")
        metadata = _undetected(config, detected)
        found = model_config_from_unet(state, "", metadata=metadata)
        if type(found) is not type(config):
            what = f"take it for {type(found).__name__}" if found else "not recognize it"
            raise ValueError(
                f"loading a file of this {self.name}, ComfyUI would {what}: its checkpoint has "
                "more than its layers show. Convert that file with Convert File (MXFP8)"
            )
        for key, shape in {**{k: part.shape for k, part in self._parts.items()}, **stored}.items():
            if key in state and tuple(state[key].shape) != tuple(shape):
                state[key] = torch.empty(shape, dtype=state[key].dtype, device="meta")
        if detect_unet_config(state, "") != detected:
            raise ValueError(
                f"padded to multiples of 32, this {self.name} would be taken for another model; "
                "exclude its layers of other sizes"
            )
        return metadata

    def rows(self, key: str, first: int, last: int) -> torch.Tensor:
        """Rows of a weight with its patches, unrounded."""
        return self._value(key)[first:last].to("cpu").contiguous()

    def pieces(self, key: str) -> Iterator[memoryview]:
        if key in self._parts:
            yield as_bytes(self._part(key).to("cpu").contiguous())
            return
        entry = self._entries[key]
        value = self._value(key).to("cpu", entry.dtype).contiguous()
        if entry.full in self._patcher.patches and not value.isfinite().all():
            reason = f"it gets too large for {SHORT_NAMES[entry.dtype]}"
            raise ValueError(self._unmergeable({entry.full: reason}))
        yield as_bytes(value.reshape(-1))

    def _add(self, key: str) -> None:
        full = PREFIX + key
        value = lora.original(self._patcher, full)
        dtype = value.dtype
        patches = self._patcher.patches.get(full, [])
        if tuple(comfy.lora.calculate_shape(patches, value, full)) != tuple(value.shape):
            raise ValueError(
                f"a LoRA on this {self.name} changes the shape of {key!r}; apply it after this node"
            )
        if dtype == torch.float32 and not patches:
            narrow = (torch.bfloat16, torch.float16)
            dtype = next((d for d in narrow if torch.equal(value.to(d).float(), value)), dtype)
        self._entries[self.prefix + key] = _Entry(full, dtype, tuple(value.shape))

    def _part(self, key: str) -> torch.Tensor:
        layer = self._parts[key].layer
        if self._cached is None or self._cached[0] != layer:
            self._cached = None  # free the last one first
            full = PREFIX + (layer + WEIGHT).removeprefix(self.prefix)
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
        for full, patches in self._patcher.patches.items():
            if not full.startswith(PREFIX):
                continue
            shape = lora.original(self._patcher, full).shape
            if fits(patches, shape, full):
                continue
            try:
                self._patched(full)
            except ValueError as error:
                baking = error.__cause__
                known = baking.__cause__ and misfit(patches, shape, full)  # else NaN or Inf
                failed[full] = known or str(baking)
        if failed:
            raise ValueError(self._unmergeable(failed))

    def _unmergeable(self, failed: dict[str, str]) -> str:
        named = [
            f"{quoted(full.removeprefix(PREFIX))} ({reason})"
            for full, reason in list(failed.items())[:_MOST_NAMED]
        ]
        more = f" and {len(failed) - len(named)} more" if len(failed) > len(named) else ""
        return (
            f"LoRAs or patches on this {self.name} cannot be merged into {len(failed)} of its "
            f"weights: {', '.join(named)}{more}; remove them, or use ones made for this model"
        )


def _undetected(config, detected: Mapping | None) -> dict[str, str]:
    """The settings of a model that its tensors do not show, as a file's metadata."""
    # The class's own settings are what detection compares; some classes change them when built.
    settings = {**config.unet_config, **type(config).unet_config}
    undetected = {
        key: value
        for key, value in settings.items()
        if key not in config.unet_extra_config
        and isinstance(value, (bool, int, float, str, list, tuple))
        and (detected is None or detected.get(key) != value)
    }
    return {"config": json.dumps({"transformer": undetected})} if undetected else {}


def _beside(patcher) -> dict[str, torch.Tensor]:
    """What ComfyUI builds a model from besides its layers, by the names in a file.

    Most have nothing; Stable Audio has embedders of seconds, Stable Zero123 a projection.
    """
    tensors = dict(patcher.model.state_dict_for_saving({}))
    state = patcher.model.state_dict()
    required = patcher.model.model_config.required_keys
    return tensors | {key: state[key] for key in required if key in state}


def _prediction_keys(patcher) -> dict[str, torch.Tensor]:
    """The marker tensors by which ComfyUI recognizes v-prediction models; most have none."""
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
