"""MXFP8 models in diffusers.

    import mxfp8.integrations.diffusers as mxfp8

    transformer = ZImageTransformer2DModel.from_single_file(
        "z_image-mxfp8.safetensors", quantization_config=mxfp8.MXFP8Config(), torch_dtype=...
    )

Importing this module adds a quantizer to the two tables in which diffusers looks for one, and for a
pipeline's text encoders, to those of transformers. It does nothing else to either. Without the
config, diffusers loads such a file with a warning about unused weights, and runs its codes as if
they were the weights.

A single file has ComfyUI's names: diffusers renames, splits and joins its tensors before a
quantizer sees the model, so each MXFP8 layer goes through that as one tensor (`stacked_rows`). A
folder has diffusers' own names, and its tensors are set one by one (`layers`).
"""

from __future__ import annotations

import contextlib
import logging

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from ..quant.container.header import quoted
from ..quant.format import SCALE
from .config import Method, MXFP8Config
from .layers import (
    EMPTY_FOLDER,
    LEAVES,
    LoadedLinear,
    check_dtype,
    check_filled,
    check_offload,
    read,
    read_layers,
    replace_linears,
    restore,
    set_precision,
)
from .stacked_rows import MXFP8Rows

__all__ = ["MXFP8Config", "read", "set_precision"]

logger = logging.getLogger(__name__)


class MXFP8Quantizer(DiffusersQuantizer):
    """What diffusers calls while it loads a model with an MXFP8Config.

    Raises:
        ValueError: the file or folder has no MXFP8 layer, an MXFP8 layer does not fit the class, or
            `torch_dtype` or `device_map` cannot be used.
    """

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: MXFP8Config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self._names: set[str] | None = None  # of a folder's MXFP8 layers
        self._dtype = torch.bfloat16
        self._is_prepared = False

    # ---- what can be loaded ------------------------------------------------------------------

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        check_offload(device_map)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        if torch_dtype is None:
            logger.info("MXFP8: no torch_dtype given: bfloat16")
            torch_dtype = torch.bfloat16
        check_dtype(torch_dtype)
        self._dtype = torch_dtype
        return torch_dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> torch.dtype:
        return torch.uint8  # of most parameters, for a device_map

    # ---- loading -----------------------------------------------------------------------------

    def maybe_update_state_dict(self, state_dict: dict) -> dict:
        # Of a folder, the model is prepared when its files are read; of a single file, it is not.
        return state_dict if self._is_prepared else read_layers("the file", state_dict)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files) -> list[str]:
        self._names = {k.removesuffix(SCALE) for k in loaded_keys if k.endswith(SCALE)}
        return loaded_keys

    def _process_model_before_weight_loading(self, model, state_dict=None, **kwargs):
        self._is_prepared = True
        if state_dict is not None:
            self._prepare_for_file(model, state_dict)
            return
        names = self._names
        if names is None:  # diffusers before 0.37 does not tell the keys
            kept = self.quantization_config.modules_to_not_convert
            linears = {n for n, m in model.named_modules() if type(m) is nn.Linear}
            names = None if kept is None else linears.difference(kept)
        if not names:
            raise ValueError(f"{type(model).__name__}: {EMPTY_FOLDER}")
        done = replace_linears(model, names, self.quantization_config.precision, self._dtype)
        if lost := names - done:
            raise ValueError(
                f"{type(model).__name__} has no linear layer {min(lost)!r}, which is MXFP8 in this "
                "folder; load the folder with the class that its config.json names"
            )

    def _prepare_for_file(self, model, state: dict) -> None:
        """Make layers MXFP8 whose weight still is after diffusers' changes."""
        whole = {k: v for k, v in state.items() if isinstance(v, MXFP8Rows)}
        if not whole:
            raise ValueError(
                f"{type(model).__name__}: none of the file's MXFP8 layers reached this class. "
                "With diffusers before 0.42, give from_single_file(read(path), ...) instead of the "
                "path (mxfp8.integrations.diffusers.read); else the file is another model's"
            )
        expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
        for key, value in whole.items():
            if expected.get(key, value.shape) != tuple(value.shape):
                raise ValueError(
                    f"{type(model).__name__}: {quoted(key)} is MXFP8 {list(value.shape)} in the "
                    f"file and {list(expected[key])} in the model; give the `config` that belongs "
                    "to the file"
                )
        names = [key.removesuffix(".weight") for key in whole if key.endswith(".weight")]
        done = replace_linears(model, names, self.quantization_config.precision, self._dtype)
        filled = {f"{name}.weight" for name in done}
        plain = [key for key in whole if key in expected and key not in filled]
        if not filled and not plain:
            raise ValueError(
                f"{type(model).__name__} has no place for {quoted(min(whole))}, nor for any other "
                "MXFP8 layer of the file. If diffusers does not know the prefix of its names, give "
                "from_single_file(read(path, prefix), ...); else the file is another model's"
            )
        for key in plain:
            state[key] = whole[key].values()
        if plain:
            logger.warning(
                "MXFP8: dequantized, because these are not plain linear layers: %s", plain
            )

    def check_if_quantized_param(self, model, param_value, param_name, *args, **kwargs) -> bool:
        name, _, leaf = param_name.rpartition(".")
        return leaf in LEAVES and isinstance(model.get_submodule(name), LoadedLinear)

    def create_quantized_param(
        self, model, param_value, param_name, target_device, *args, dtype=None, **kwargs
    ) -> None:
        name, _, leaf = param_name.rpartition(".")
        layer = model.get_submodule(name)
        if isinstance(param_value, MXFP8Rows):
            layer.fill_from_rows(param_value, target_device)
            return
        layer.add_tensor(leaf, param_value.to(target_device))

    def _process_model_after_weight_loading(self, model, **kwargs):
        names = set(check_filled(model))
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        kept = [name for name in linears if name not in names]
        # A new one: the user may load another model with the same.
        config = MXFP8Config(self.quantization_config.precision, kept)
        self.quantization_config = config
        model.register_to_config(quantization_config=config)
        return model

    # ---- afterwards --------------------------------------------------------------------------

    def _dequantize(self, model):
        restore(model)
        kept = {k: v for k, v in model.config.items() if k != "quantization_config"}
        model._internal_dict = type(model.config)(kept)  # the only way to remove an entry
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


auto.AUTO_QUANTIZER_MAPPING[Method.MXFP8.value] = MXFP8Quantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.MXFP8.value] = MXFP8Config
with contextlib.suppress(ImportError):  # none, or one before 5
    from . import transformers  # noqa: F401
