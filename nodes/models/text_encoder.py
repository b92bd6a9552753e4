"""The text encoders inside a CLIP, each as a file of its own.

ComfyUI tells text encoders apart by the names in their files. In memory each is a part of the CLIP
("t5xxl"), or, of LTX-2's Gemma alone, the CLIP's whole model (""), and its layers are in its
`transformer`. A few have other names there than in files, which
`comfy.sd.load_text_encoder_state_dicts` renames.

LTX-2 has a projection beside its Gemma, which ComfyUI reads from a second file: the checkpoint of
LTX-2, or one that holds it alone. Where that checkpoint is of the first version, the CLIP has the
model's connectors, too (`comfy.text_encoders.lt`). They become a file of their own again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from .raw_codes import check_weights
from .weights import LoadedWeights

# What names begin with in memory -> in files: of any encoder, and of those that see images.
_RENAMED = {"model.lm_head.": "lm_head."}
_RENAMED_VISION = {**_RENAMED, "model.": "model.language_model.", "visual.": "model.visual."}


PROJECTION = "text_embedding_projection"  # of LTX-2
_CONNECTORS = ("audio_embeddings_connector.", "video_embeddings_connector.")


def encoders(clip) -> list[str]:
    """Names of the text encoders in a CLIP, and `PROJECTION` if it has that: each is a file.

    Raises:
        ValueError: it has weights that no file of a text encoder has.
    """
    model = clip.cond_stage_model
    parts = {"": model, **dict(model.named_children())}
    found = [name for name, part in parts.items() if hasattr(part, "transformer")]
    inside = tuple(map(_prefix, found))
    beside = [key for key in model.state_dict() if not key.startswith(inside)]
    if any(map(_is_projection, beside)):
        found.append(PROJECTION)
    for key in beside:
        if not _is_projection(key) and not key.endswith("logit_scale"):
            raise ValueError(
                f"this text encoder ({type(model).__name__.rstrip('_')}) has weights beside its "
                f"layers ({key!r}), which ComfyUI reads from another file; convert the files that "
                "it was loaded from with Convert File (MXFP8)"
            )
    return found


def _is_projection(key: str) -> bool:
    return key.startswith((f"{PROJECTION}.", *_CONNECTORS))


def _prefix(encoder: str) -> str:
    return f"{encoder}.transformer.".removeprefix(".")


def names_in_file(clip, encoder: str) -> dict[str, str]:
    """Name in memory -> name in the encoder's own file, for every tensor of it."""
    if encoder == PROJECTION:
        keys = filter(_is_projection, clip.cond_stage_model.state_dict())
        return {key: _name_beside(key) for key in keys}
    prefix = _prefix(encoder)
    keys = [key for key in clip.cond_stage_model.state_dict() if key.startswith(prefix)]
    rename = _renamer(key.removeprefix(prefix) for key in keys)
    return {key: rename(key.removeprefix(prefix)) for key in keys}


def _name_beside(key: str) -> str:
    if key.startswith(_CONNECTORS):
        return f"model.diffusion_model.{key}"
    return f"{PROJECTION}.aggregate_embed.weight" if key == f"{PROJECTION}.weight" else key


def _renamer(keys: Iterable[str]) -> Callable[[str], str]:
    keys = set(keys)
    qwen35 = "model.layers.0.linear_attn.A_log" in keys
    qwen3_vl = "visual.deepstack_merger_list.0.norm.weight" in keys
    minimax = "model.layers.49.self_attn.q_proj.weight" in keys  # a Qwen3-VL that keeps its names
    prefixes = _RENAMED_VISION if qwen35 or (qwen3_vl and not minimax) else _RENAMED

    def rename(key: str) -> str:
        prefix = next(filter(key.startswith, prefixes), "")
        return prefixes.get(prefix, "") + key.removeprefix(prefix)

    return rename


class TextEncoderSource(LoadedWeights):
    """One text encoder of a CLIP under the names of its own file, its tokenizer's data included.

    Args:
        clip: the CLIP. It is only read.
        encoder: one of `encoders(clip)`.

    Attributes:
        in_memory: name in the file -> name in the CLIP's model.

    Raises:
        ValueError: a plain weight holds MXFP8 codes, or a LoRA cannot be merged.
    """

    def __init__(self, clip, encoder: str):
        check_weights(clip.cond_stage_model)
        names = names_in_file(clip, encoder)
        self.in_memory = {new: old for old, new in names.items()}
        data = {} if encoder == PROJECTION else _tokenizer(clip, encoder).state_dict()
        super().__init__(
            clip.patcher,
            rename=names.get,
            beside={k: v for k, v in data.items() if isinstance(v, torch.Tensor)},
        )
        self.name = f"{encoder} of {self.name}" if encoder else self.name


def _tokenizer(clip, encoder: str):
    """The tokenizer of an encoder: that of the CLIP, if it has only one."""
    alone = len(encoders(clip)) == 1
    return clip.tokenizer if alone else getattr(clip.tokenizer, encoder)
