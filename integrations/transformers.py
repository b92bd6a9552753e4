"""MXFP8 models in transformers: the text encoders of image models.

    import mxfp8.integrations.transformers as mxfp8

    encoder = Qwen3Model.from_pretrained("folder", dtype=torch.bfloat16)  # MXFP8 by its config.json
    encoder = mxfp8.from_single_file(Qwen3Model, "qwen_3_4b-mxfp8.safetensors", config)

Importing this module registers a quantizer and its configuration with transformers, as its
documentation describes, and does nothing else to the library. Layers are filled by name (`layers`).
https://huggingface.co/docs/transformers/quantization/contribute
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable

import torch
from safetensors.torch import load_file
from torch import nn

try:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
except ImportError as error:
    raise ImportError(
        f"MXFP8 models in transformers need version 5 of it, or newer ({error})"
    ) from error

from ..quant import format
from ..quant.container.header import read_container
from ..quant.format import MARKER, SCALE
from .config import Method, MXFP8Config
from .layers import (
    EMPTY_FOLDER,
    LEAVES,
    LoadedLinear,
    check_dtype,
    check_filled,
    check_offload,
    checked_header,
    replace_linears,
    restore,
    set_precision,
)

__all__ = ["MXFP8Config", "from_single_file", "set_precision"]


def from_single_file(
    cls: type[PreTrainedModel], path, config: PreTrainedConfig, precision: str = "auto", **options
) -> PreTrainedModel:
    """A transformers model from one MXFP8 file with its tensors' names, as ComfyUI's files have.

    Args:
        cls: the model's class, not an Auto class; config: its configuration, which such a file
            lacks.
        options: of `from_pretrained`: dtype, device_map, ...

    Raises:
        FormatError: the file is damaged, lost its markers, or has no MXFP8 layer.
        ValueError: one of its MXFP8 layers does not fit the class, or it lacks a weight.
        TypeError: `cls` is no model's class.
        OSError: it cannot be read.
    """
    if not issubclass(cls, PreTrainedModel):
        raise TypeError(f"{cls.__name__} is no model's class; give one, such as Qwen3Model")
    header = checked_header(path)
    state = load_file(path)
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):  # of a folder, which has other layers in MXFP8
        del config.quantization_config
    for name, layer in header.layers.items():  # of some files, only the header has the markers
        encoded = bytearray(format.marker_bytes(layer.conf))
        state[name + MARKER] = torch.frombuffer(encoded, dtype=torch.uint8)
    given = _SingleFileConfig(precision, names=tuple(header.layers))
    return cls.from_pretrained(
        None, config=config, state_dict=state, quantization_config=given, **options
    )


class _SingleFileConfig(MXFP8Config):
    """One that knows the layers, because transformers shows a quantizer no state dict."""

    def __init__(self, precision: str, names: tuple[str, ...] = ()):
        super().__init__(precision)
        self.names = names


class MXFP8HfQuantizer(HfQuantizer):
    """What transformers calls while it loads a model with an MXFP8Config.

    Raises:
        ValueError: there is no MXFP8 layer, one does not fit the class, a tensor is in no file, or
            `dtype` or `device_map` cannot be used.
    """

    def __init__(self, quantization_config: MXFP8Config, **kwargs):
        super().__init__(quantization_config, **{**kwargs, "pre_quantized": True})

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        check_offload(device_map)

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        name, _, leaf = param_name.rpartition(".")  # these may be padded
        return leaf in LEAVES and isinstance(model.get_submodule(name), LoadedLinear)

    def get_new_dtype(self, converter, param, dtype):
        stored = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype)
        is_codes = stored.startswith(("F8", "torch.float8"))
        return None if is_codes else super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        check_dtype(model.config.dtype)
        names = getattr(self.quantization_config, "names", ()) or _quantized(checkpoint_files or ())
        if not names:
            raise ValueError(f"{type(model).__name__}: {EMPTY_FOLDER}")
        names = _own_names(model, names)
        wide = {name for name in names if _is_kept_in_float32(model, name)}
        precision = self.quantization_config.precision
        done = replace_linears(model, names - wide, precision, model.config.dtype)
        done |= replace_linears(model, wide, precision, torch.float32)
        ignored = model._keys_to_ignore_on_load_unexpected  # such as the decoder of a whole T5
        if lost := {n for n in names - done if not _is_among(ignored, f"{n}.weight")}:
            raise ValueError(
                f"{type(model).__name__} has no linear layer {min(lost)!r}, which is MXFP8 in the "
                "files; load them with the class and the config they were made for"
            )

    def _process_model_after_weight_loading(self, model, **kwargs):
        required = self._required_prefix(model)
        dispensable = model._keys_to_ignore_on_load_missing

        def is_empty(name: str, parameter: torch.nn.Parameter) -> bool:
            needed = name.startswith(required) and not _is_among(dispensable, name)
            return needed and _is_new(parameter)

        check_filled(model, is_empty)
        linears = [n for n, m in model.named_modules() if type(m) is nn.Linear]
        config = MXFP8Config(self.quantization_config.precision, linears)
        self.quantization_config = model.config.quantization_config = config
        return model

    def _required_prefix(self, model) -> str:
        """Of the tensors that must be in the files: of all, mostly.

        A folder may lack what another class than its own adds to the base model: a head to train.
        """
        is_file = isinstance(self.quantization_config, _SingleFileConfig)
        is_own = type(model).__name__ in (model.config.architectures or ())
        needs_all = is_file or is_own or model.base_model is model
        return "" if needs_all else f"{model.base_model_prefix}."

    def _dequantize(self, model, dtype=None):
        restore(model)
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _quantized(files: Iterable[str]) -> set[str]:
    """The names of the layers with scales in some safetensors files."""
    keys = (key for file in files for key in read_container(file).tensors)
    return {key.removesuffix(SCALE) for key in keys if key.endswith(SCALE)}


def _is_among(patterns: Iterable[str] | None, name: str) -> bool:
    """Whether one of a class's expressions for names, such as of tensors to ignore, matches."""
    return any(re.search(pattern, name) for pattern in patterns or ())


def _is_new(parameter: torch.nn.Parameter) -> bool:
    """Whether it was in no file, so that it has random values, or any; transformers only warns."""
    return not getattr(parameter, "_is_hf_initialized", False)


def _is_kept_in_float32(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers loads a layer in float32, whatever dtype is asked for, as T5's `wo`."""
    if hasattr(model, "_get_dtype_plan"):
        plan = model._get_dtype_plan(model.config.dtype)
    else:  # 5.0, where it is the same for all dtypes
        plan = model.dtype_plan
    return any(re.search(glob.replace("*", ".*"), f"{name}.weight") for glob in plan)


def _own_names(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Layers' names in the model, to which transformers renames those in a file.

    Raises:
        ValueError: it does not rename one, but computes other tensors from it.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    own, state = set(), model.state_dict()
    for name in names:
        key, converter = rename_source_key(
            f"{name}.weight", renamings, converters, model.base_model_prefix, state
        )
        if converter is not None:
            raise ValueError(
                f"{type(model).__name__}: transformers splits or joins the weight of {name!r}, "
                "which it cannot do in MXFP8; convert the original again and exclude this layer "
                "(--exclude)"
            )
        own.add(key.removesuffix(".weight"))
    return own


auto.AUTO_QUANTIZER_MAPPING[Method.MXFP8.value] = MXFP8HfQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.MXFP8.value] = MXFP8Config
