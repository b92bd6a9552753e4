"""Which layers of text encoders stock ComfyUI runs quantized, by name and shape.

Stock builds a text encoder with quantizing operations only where its factory is told to: the same
T5 is quantized in its largest size and plain in the others, and inside a checkpoint the model class
decides. A plain layer would run raw codes without an error. So `bench/text_encoders.py` asks
ComfyUI itself and writes `text_encoders.json`; a list kept by hand had missed seven encoders. An
encoder that is in neither of its tables is left to the other rules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path

from ..reports.verdict import Part, say

_VOCABULARY = "model.embed_tokens.weight"
# Where checkpoints of Stable Diffusion have their text encoders, which all are CLIP's.
_CLIP = ("cond_stage_model.", "conditioner.embedders.")
PREFIXES = ("text_encoders.", "text_encoder.", *_CLIP)  # of text encoders in any checkpoint
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@cache
def _table() -> dict:
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def unsupported_reason(
    layer: str, shape: tuple[int, ...], classes: Collection[str] = ()
) -> Part | None:
    """Why stock ComfyUI cannot run a layer of a text encoder quantized; None if it can.

    Args:
        layer: its name in the file.
        shape: of its weight.
        classes: ComfyUI's classes that the model of the checkpoint may have; empty if not known.
    """
    table = _table()
    place = next((p for p in table["checkpoints"] if layer.startswith(p)), None)
    if place is not None:
        runs = table["checkpoints"][place]["quantized"]
        if classes:
            runs = [name for name in runs if name in classes]
        if not runs:
            return say(
                "stock ComfyUI runs [encoder] of this checkpoint unquantized", encoder=place[:-1]
            )
        layer = layer.removeprefix(place).removeprefix("transformer.")
    elif layer.startswith(_CLIP):
        return say("stock ComfyUI runs this checkpoint's text encoder unquantized")
    name = _NUMBER.sub("#", layer)
    known = table["layers"].get(name)
    while known is None and "#" in name and "." in name:  # under any prefix
        name = name.partition(".")[2]
        known = table["layers"].get(name)
    if known is None or list(shape) in known["quantized"]:
        return None
    encoders = ", ".join(known["encoders"][:3])
    if len(known["encoders"]) > 3:
        encoders += ", ..."
    return say(
        "stock ComfyUI runs this layer of a text encoder ([encoders]) unquantized",
        encoders=encoders,
    )


def plain_encoder(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Part | None:
    """Why stock ComfyUI runs no layer of a text encoder's file quantized; None if it may.

    Such an encoder has the layers of one that runs quantized, and another vocabulary.

    Args:
        tensors: key -> (header dtype, shape), of the whole file.
    """
    _, shape = tensors.get(_VOCABULARY, (None, ()))
    for encoder, vocabulary in _table()["vocabularies"].items():
        if list(shape) == vocabulary:
            return say(
                "stock ComfyUI runs this text encoder ([encoder]) unquantized", encoder=encoder
            )
    return None
