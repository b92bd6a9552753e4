"""What a user asks of a conversion instead of a preset: a size, or a quality.

    6.5 GB, 6500 MB     size of the file's tensors (also B, kB, TB; KiB, MiB, GiB, TiB)
    55%                 the same, of the original's
    50 dB               SNR of the model's output: 10 log10 of its energy over the error's
    0.003 error         relative error of the output, the root of the inverse; also 0.3% error

A number alone is an error, since it could be any of these.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..container.header import quoted

SIZE, SHARE, SNR = "size", "share", "snr"
FORMS = '"6.5 GB", "55%" of the original, "50 dB" or "0.003 error"'
_NUMBER = r"(?P<number>\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?)"
_FORM = re.compile(rf"{_NUMBER}\s*(?P<unit>%\s*error|[a-z]+|%)?", re.IGNORECASE)
_UNITS = {
    f"{prefix}{infix}b": (1024 if infix else 1000) ** power
    for power, prefix in enumerate(("", "k", "m", "g", "t"))
    for infix in (("", "i") if prefix else ("",))
}


@dataclass(frozen=True)
class Target:
    """A size or a quality.

    Attributes:
        text: as it was given, without spaces around it.
        kind: SIZE, SHARE or SNR.
        value: bytes; a share of the original's bytes, 0 to 1; or dB.
    """

    text: str
    kind: str
    value: float

    @property
    def is_size(self) -> bool:
        return self.kind != SNR

    def nbytes(self, original: int) -> int:
        """The most bytes, for an original of so many."""
        return int(self.value * original) if self.kind == SHARE else int(self.value)

    @property
    def noise(self) -> float:
        """The most noise energy, over that of the output."""
        return 10 ** (-self.value / 10)


def parse(text: str) -> Target:
    """The target that a text names.

    Raises:
        ValueError: it names none, or one that no model can have.
    """
    if not isinstance(text, str):
        raise ValueError(f"target {text!r} is not a text; give {FORMS}")
    text = text.strip()
    given = quoted(text)
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"target {given} is not understood; give {FORMS}")
    number, unit = float(match["number"]), "".join((match["unit"] or "").lower().split())
    if not unit:
        raise ValueError(f"target {given} has no unit; give {FORMS}")
    if not 0 < number < math.inf:
        raise ValueError(f"target {given} must be more than 0; give {FORMS}")
    if unit in _UNITS:
        size = number * _UNITS[unit]
        if size == math.inf:
            raise ValueError(f"target {given} is larger than any model; give {FORMS}")
        return Target(text, SIZE, size)
    if unit == "%":
        if number >= 100:
            raise ValueError(
                f"target {given} is no less than the original; give a share below 100%"
            )
        return Target(text, SHARE, number / 100)
    if unit in ("error", "%error"):
        error = number / 100 if unit == "%error" else number
        if error >= 1:
            raise ValueError(
                f"target {given} allows an error as large as the output itself; give one below "
                "1, such as 0.003 error"
            )
        if not error:
            raise ValueError(f"target {given} is less than any error; give {FORMS}")
        return Target(text, SNR, -20 * math.log10(error))
    if unit == "db":
        return Target(text, SNR, number)
    raise ValueError(f"target {given} has an unknown unit; give {FORMS}")
