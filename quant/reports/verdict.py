"""Verdicts: what a report comes down to, in one line, for those who read nothing else.

The words and the thresholds behind them stand here and nowhere else. A report's JSON carries its
verdict, so that no reader of it has thresholds of its own; docs/how-it-works.md explains them.

A text is made of `Part`s, which the browser has in its own languages: it finds a translation by the
text with its names in brackets, and fills these in. Command, log and older pages show the English.
Reasons and plans, which are stored as text, are made of them too.

A word stands for how much of the energy differs, in steps of ten. What can be seen of that depends
on the picture, and one number for "visible" would be made up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..container.header import first_of

GOOD, NOTICE, BAD = "good", "notice", "bad"
_MOST_NAMED = 3  # layers in a line; JSON has all


@dataclass(frozen=True)
class Part:
    """A text with its values apart, as of a part of a verdict.

    Attributes:
        text: with names in brackets: "[count] seeds".
        values: of these names; a part of its own where a value has words.
    """

    text: str
    values: dict[str, str | int | Part] = field(default_factory=dict)

    def __str__(self) -> str:
        return re.sub(r"\[(\w+)\]", lambda name: str(self.values[name[1]]), self.text)


def say(text: str, **values: str | int | Part) -> Part:
    """A text that is known in other languages. `make locales` finds the texts by these calls.

    Where the page gets it as a `str`, it is recognized by the words around its values
    (`web/language.mjs`).
    """
    return Part(text, values)


@dataclass(frozen=True)
class Verdict:
    """What a report comes down to.

    Attributes:
        level: GOOD, NOTICE or BAD, which a page shows as a color; "" for none of them.
        text: one line.
        layers: names of layers to look at, worst first.
        parts: those of the text, if it can be said in other languages.
    """

    level: str
    text: str
    layers: tuple[str, ...] = ()
    parts: tuple[Part, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, level: str, *parts: Part, layers: tuple[str, ...] = ()) -> Verdict:
        """A verdict from the parts of its text."""
        return cls(level, "; ".join(map(str, parts)), layers, parts)

    def line(self) -> str:
        """The text with the names of the first layers."""
        if not self.layers:
            return self.text
        return f"{self.text}: {first_of(self.layers, _MOST_NAMED, str)}"


@dataclass(frozen=True)
class Word:
    """A word, the SNR in dB from which on it holds, and why from there."""

    word: str
    level: str
    at_least: float
    reason: str


# Of the latents of two models that sampled the same seed.
LATENTS = (
    Word("very close", GOOD, 30.0,
         "at most 1/1000 of the energy differs, 3% of the amplitude: no more than rounding to "
         "MXFP8 changes in the weights themselves (31.5 dB)"),
    Word("close", GOOD, 20.0, "at most 1/100 of the energy differs, 10% of the amplitude"),
    Word("similar", NOTICE, 10.0, "at most 1/10 of the energy differs, 32% of the amplitude"),
    Word("different", BAD, -math.inf,
         "more than that differs; latents that have nothing in common are at -3 dB"),
)  # fmt: skip

# dB, the least that rounding to E4M3 leaves: half a spacing of a value just above a power of two,
# 1 in 17.
MIN_SQNR = 24.6
# Of a model's weights, rounded to nearest.
WEIGHTS = (
    Word("typical", GOOD, 30.0, "trained weights have 31 to 32 dB in MXFP8"),
    Word("noisier than usual", NOTICE, MIN_SQNR, "less than trained weights have"),
    Word("damaged", BAD, -math.inf, "less than rounding to E4M3 can leave"),
)
# dB below the median layer from which on a layer stands out: twice the noise of the others.
STANDS_OUT = 3.0


def word_for(snr_db: float, words: Sequence[Word]) -> Word:
    return next(word for word in words if snr_db >= word.at_least)
