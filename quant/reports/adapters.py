"""The LoRAs and their relatives on a model, as data: a part of backend reports and comparisons.

A module of its own, which imports no torch: `checks.inspect` reads comparisons from headers.
"""

from __future__ import annotations

from dataclasses import dataclass

from .conversion import format_size

BESIDE = "beside the weight"
MERGED = "merged by ComfyUI"
LEFT_OUT = "left out"
_MOST_SHOWN = 4  # of `AdapterUse.applied`, in a line


@dataclass(frozen=True)
class AdapterUse:
    """A LoRA file at one strength, or what belongs to no file: whole tensors, a merged model.

    Attributes:
        kinds: "LoRA", "LoKr", "diff", "merged model", ...
        ranks: the lowest and the highest; empty if it has none.
        strength: None if it differs from layer to layer.
        hit: linears that it changes; missed: the other linears of the model.
        applied: how ("beside the weight: low rank", "merged by ComfyUI: <why>", "left out: <why>")
            -> number of layers, those that are no linears included.
        bytes: of what runs beside the weights.
    """

    kinds: tuple[str, ...]
    ranks: tuple[int, ...]
    strength: float | None
    hit: int
    missed: int
    applied: dict[str, int]
    bytes: int

    def line(self) -> str:
        name = ", ".join(self.kinds)
        if self.ranks:
            name += f" of rank {' to '.join(map(str, dict.fromkeys(self.ranks)))}"
        if self.strength is not None:
            name += f" at {self.strength:g}"
        shown = [f"{count} {how}" for how, count in list(self.applied.items())[:_MOST_SHOWN]]
        if len(self.applied) > _MOST_SHOWN:
            shown.append(f"{sum(list(self.applied.values())[_MOST_SHOWN:])} others")
        size = f", {format_size(self.bytes)}" if self.bytes else ""
        return f"{name}: {self.hit} of {self.hit + self.missed} linears ({'; '.join(shown)}){size}"
