"""The diffusion model of a MODEL as a source to convert or save.

Names are those by which ComfyUI recognizes such a file, or a checkpoint. What it needs beside the
model's layers to build the model is part of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from comfy.model_base import ModelType
from comfy.model_detection import detect_unet_config, model_config_from_unet
from comfy.model_sampling import V_PREDICTION, ModelSamplingContinuousEDM

from ...quant.format import WEIGHT
from ..runtime import lora
from ..runtime.patch import PREFIX
from .raw_codes import check_weights
from .weights import LoadedWeights

# What files have before the names in memory where ComfyUI recognizes them by it, by `image_model`.
_FILE_PREFIXES = {"pixeldit_t2i": "core."}


class ModelSource(LoadedWeights):
    """The diffusion model inside a MODEL.

    Args:
        patcher: the MODEL. It is only read.
        prefix: of the names in the file: empty for one that holds only this model.

    Attributes:
        prefix: what names begin with, and not in memory.

    Raises:
        ValueError: a plain weight holds MXFP8 codes, or a LoRA cannot be merged.
    """

    def __init__(self, patcher, prefix: str = ""):
        check_weights(patcher.model)
        self._place = prefix
        image_model = patcher.model.model_config.unet_config.get("image_model")
        self.prefix = prefix + _FILE_PREFIXES.get(image_model, "")
        beside = {**_beside(patcher), **_prediction_keys(patcher)}
        super().__init__(patcher, PREFIX, lambda key: self.prefix + key, beside, narrow=True)

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
        detected = detect_unet_config(state, self._place)
        metadata = _undetected(config, detected)
        found = model_config_from_unet(state, self._place, metadata=metadata)
        if type(found) is not type(config):
            what = f"take it for {type(found).__name__}" if found else "not recognize it"
            raise ValueError(
                f"loading a file of this {self.name}, ComfyUI would {what}: its checkpoint has "
                "more than its layers show. Convert that file with Convert File (MXFP8)"
            )
        for key, shape in {**{k: part.shape for k, part in self._parts.items()}, **stored}.items():
            if key in state and tuple(state[key].shape) != tuple(shape):
                state[key] = torch.empty(shape, dtype=state[key].dtype, device="meta")
        if detect_unet_config(state, self._place) != detected:
            raise ValueError(
                f"padded to multiples of 32, this {self.name} would be taken for another model; "
                "exclude its layers of other sizes"
            )
        return metadata


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
