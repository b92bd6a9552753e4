"""The architectures that ComfyUI's model classes have, and which of their layers MXFP8 is for.

`architectures.json` has a row for each, known by keys that its files have. What stock ComfyUI does
with its layers was asked of stock itself, by `bench/architectures.py`, which builds every class of
`comfy.supported_models` on torch's meta device; a list kept by hand would miss the next layer. A
text encoder's row has only a name and a preset.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from ...kernels.layout import BLOCK
from ..format import PREFIXES
from ..reports.verdict import Part, say

_PREFIXES = (*PREFIXES[:-1], "model.language_model.", "")  # as in a vision model


@dataclass(frozen=True)
class Architecture:
    """A row of the table; names of layers are those in a file, without the model's prefix.

    Attributes:
        name: for the user.
        preset: what convert_to_quant keeps of it, a name in `presets.json`, or None.
        signature: keys that are all there in its files, under any prefix.
        blocks: what holds the layers to quantize. Outside of it are the embedders of inputs, text,
            time and guidance and the final layers: few bytes, and an error there reaches all.
        classes: ComfyUI's model classes.
        plain: layers that stock does not build with its quantizing operations, or changes when
            loading; "#" is any number.
        identifying: layers whose shapes detection reads: padded, they would be another model's.
    """

    name: str
    preset: str | None
    signature: tuple[str, ...]
    blocks: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    identifying: tuple[str, ...] = ()

    def unsupported_reason(self, layer: str, shape: tuple[int, ...]) -> Part | None:
        """Why stock cannot run a layer of the model quantized, or None if it can."""
        if self._plain.fullmatch(layer):
            return say(
                "not quantized in [model]: stock ComfyUI would run raw codes", model=self.name
            )
        if self._identifying.fullmatch(layer) and any(size % BLOCK for size in shape):
            return say(
                "its shape tells ComfyUI which [model] this is, and [shape] would be padded to "
                "multiples of [count]",
                model=self.name, shape=str(list(shape)), count=BLOCK,
            )  # fmt: skip
        return None

    def in_blocks(self, layer: str) -> bool:
        """Whether a layer is one of those that repeat; always true of a text encoder."""
        return not self.blocks or self._blocks.search(layer) is not None

    @cached_property
    def _plain(self) -> re.Pattern:
        return _any_of(self.plain)

    @cached_property
    def _identifying(self) -> re.Pattern:
        return _any_of(self.identifying)

    @cached_property
    def _blocks(self) -> re.Pattern:
        return re.compile(rf"(?:^|\.)(?:{'|'.join(map(re.escape, self.blocks))})\.")


def _any_of(patterns: Iterable[str]) -> re.Pattern:
    return re.compile("|".join(re.escape(p).replace(r"\#", r"\d+") for p in patterns) or "$.")


@cache
def architectures() -> tuple[Architecture, ...]:
    """The table. The first row that fits a model counts."""
    path = Path(__file__).with_name("architectures.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["architectures"]
    return tuple(
        Architecture(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
        for row in rows
    )


def detect(keys: Iterable[str]) -> tuple[Architecture, str] | None:
    """The architecture that a model's keys show and the prefix of its keys, or None."""
    keys = set(keys)
    for architecture in architectures():
        # Each key under any prefix: a vision model's parts have different ones.
        found = [next((p for p in _PREFIXES if p + key in keys), None)
                 for key in architecture.signature]  # fmt: skip
        if None not in found:
            return architecture, found[0]
    return None
