"""A MODEL, its CLIP and its VAE under the names that they have in one checkpoint.

The names are those of stock's own `CheckpointSave`: each class of models has functions that make
them. They are asked with empty tensors first; where they only rename, weights are read as they are
written, quantized ones included. A few (of SDXL and older models, whose CLIP is never quantized)
also join or transpose tensors, and get the values.

Stock writes whatever it is given, and its loader then takes the text encoder for the one that the
model class has. So one that does not belong to the model is rejected here.
"""

from __future__ import annotations

import torch
from comfy.model_detection import unet_prefix_from_state_dict

from ...quant.container.header import quoted
from ...quant.conversion import text_encoders
from .raw_codes import check_weights
from .source import ModelSource
from .weights import LoadedWeights, narrowest


def checkpoint_sources(model, clip, vae) -> tuple[ModelSource, LoadedWeights, LoadedWeights]:
    """The three parts of a checkpoint.

    Args:
        model: a ModelPatcher.
        clip, vae: ComfyUI's CLIP and VAE.

    Raises:
        ValueError: a LoRA cannot be merged, or ComfyUI would not load the text encoder as it is.
    """
    config = model.model.model_config
    (prefix,) = config.process_unet_state_dict_for_saving({"": None})
    diffusion_model = ModelSource(model, prefix)
    encoders = text_encoder_source(clip, config)
    tensors = config.process_vae_state_dict_for_saving(vae.get_sd())
    decoder = LoadedWeights(
        vae.patcher, rename=None, beside={k: v.to(narrowest(v)) for k, v in tensors.items()}
    )
    names = dict.fromkeys([*diffusion_model.tensors, *encoders.tensors, *decoder.tensors])
    if unet_prefix_from_state_dict(names) != prefix:
        raise ValueError(
            f"ComfyUI does not find a {diffusion_model.name} in a checkpoint; save the parts with "
            "Save Model (MXFP8) and Save Text Encoder (MXFP8)"
        )
    return diffusion_model, encoders, decoder


def text_encoder_source(clip, config) -> LoadedWeights:
    """A CLIP under the names that it has in a checkpoint.

    Args:
        config: of the diffusion model, from `comfy.supported_models`.

    Raises:
        as `checkpoint_sources`.
    """
    check_weights(clip.cond_stage_model)
    state = clip.cond_stage_model.state_dict()
    data = {k: v for k, v in clip.tokenizer.state_dict().items() if isinstance(v, torch.Tensor)}
    empty = {
        key: torch.empty(value.shape, dtype=value.dtype, device="meta")
        for key, value in {**state, **data}.items()
    }
    before = {id(value): key for key, value in empty.items()}
    placed = config.process_clip_state_dict_for_saving(dict(empty))
    _check_class(clip, config, placed)
    names = {before[id(value)]: key for key, value in placed.items() if id(value) in before}
    if len(names) == len(placed):
        data = {names[key]: value for key, value in data.items() if key in names}
        source = LoadedWeights(clip.patcher, rename=names.get, beside=data)
    else:
        whole = LoadedWeights(clip.patcher, beside=data)
        values = config.process_clip_state_dict_for_saving({k: whole.tensor(k) for k in empty})
        source = LoadedWeights(clip.patcher, rename=None, beside=values)
    for layer, module in source.quantized.items():
        shape = module.out_features, module.in_features
        reason = text_encoders.unsupported_reason(layer, shape, (type(config).__name__,))
        if reason is not None:
            raise ValueError(
                f"{quoted(layer)} of this {source.name} is quantized, but {reason}; connect the "
                "text encoder that is not quantized, or save this one with Save Text Encoder "
                "(MXFP8)"
            )
    return source


def _check_class(clip, config, placed: dict[str, torch.Tensor]) -> None:
    """Check that ComfyUI builds a CLIP of this class from such a checkpoint."""
    target = config.clip_target(state_dict=placed)
    wanted, given = target and _named(target.clip), _named(type(clip.cond_stage_model))
    if wanted is not given:
        model = type(config).__name__
        has = f"it has {wanted.__name__}" if wanted else "it has none with these layers"
        raise ValueError(
            f"this text encoder ({given.__name__}) does not go into a checkpoint of this {model}: "
            f"{has}; save it with Save Text Encoder (MXFP8)"
        )


def _named(cls: type) -> type:
    """The class of a text encoder; ComfyUI's factories make a local subclass of it."""
    return next(c for c in cls.__mro__ if "<locals>" not in c.__qualname__)
