"""The LoRAs and their relatives on a model, as data: a part of backend reports and comparisons.

A module of its own, which imports no torch: `checks.inspect` reads comparisons from headers.
"""

from __future__ import annotations

from dataclasses import dataclass

from .units import format_count, format_size

BESIDE = "beside the weight"
MERGED = "merged by ComfyUI"
LEFT_OUT = "left out"
_PLAIN = f"{BESIDE}: low rank"  # the usual way, whose form needs no words
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
        others: layers that it changes that are no linears.
    """

    kinds: tuple[str, ...]
    ranks: tuple[int, ...]
    strength: float | None
    hit: int
    missed: int
    applied: dict[str, int]
    bytes: int
    others: int = 0

    def line(self) -> str:
        name = ", ".join(self.kinds)
        if self.ranks:
            name += f", rank {' to '.join(map(str, dict.fromkeys(self.ranks)))}"
        if self.strength is not None:
            name += f", strength {self.strength:g}"
        changed = f"{self.hit} of {format_count(self.hit + self.missed, 'linear layer')}"
        if self.others:
            changed += f" and {format_count(self.others, 'other')}"
        ways = self._ways()
        how = f", {ways[0]}" if len(ways) == 1 else f" ({'; '.join(ways)})"
        size = f", {format_size(self.bytes)}" if self.bytes else ""
        return f"{name}: changes {changed}{how}{size}"

    def _ways(self) -> list[str]:
        """How layers are changed and how many, then what is left out."""
        left_out = [how for how in self.applied if how.startswith(LEFT_OUT)]
        changed = [how for how in self.applied if how not in left_out]
        ways = []
        for how in changed:
            count = self.applied[how]
            words = how if how != _PLAIN else BESIDE if count == 1 else f"{BESIDE}s"
            number = str(count) if len(changed) > 1 else "all" if count > 1 else ""
            ways.append(f"{number} {words}".lstrip())
        more = " more" if changed else ""
        ways += [f"{self.applied[how]}{more} {how}" for how in left_out]
        if len(ways) > _MOST_SHOWN:
            hidden = (changed + left_out)[_MOST_SHOWN:]
            count = sum(self.applied[how] for how in hidden)
            ways = [*ways[:_MOST_SHOWN], f"{count} in other ways"]
        return ways
