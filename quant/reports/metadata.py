"""What a file's header says of its own making: the conversion's report, and a comparison.

Save Model (MXFP8) writes both as strings of the metadata, which every other reader leaves alone.
The converter itself writes neither: what it makes holds nothing beside the format, and whoever
converts a file has the report. What a header says is anyone's claim, so what is read here is
checked and bounded, and a claim that is damaged is a warning: the weights do not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..container.header import quoted
from .comparison import KEY as COMPARISON
from .comparison import OLD_KEY as OLD_COMPARISON
from .comparison import Comparison
from .conversion import Report

REPORT = "mxfp8_report"
MOST_BYTES = 1 << 22  # of each; a report takes about 350 bytes a layer
_MOST_LINES = 40
_LONGEST_LINE = 300


@dataclass(frozen=True)
class Provenance:
    """What was found; warnings are sentences."""

    report: Report | None
    comparison: Comparison | None
    warnings: tuple[str, ...]


def lines(report: Report | None, comparison: Comparison | None) -> list[str]:
    """Both for people, indented under a heading each."""
    found = []
    for heading, part in (("conversion", report), ("comparison", comparison)):
        if part is not None:
            said = part.summary().splitlines()[:_MOST_LINES]
            found += [f"{heading}, as the file says:", *(f"  {_plain(line)}" for line in said)]
    note = note_on_seeds(report, comparison)
    return [*found, f"  NOTE: {note}"] if note else found


def note_on_seeds(report: Report | None, comparison: Comparison | None) -> str | None:
    """What is wrong with the seeds of a comparison: the weights were rounded for these very runs.

    None also where the report does not say what its calibration sampled.
    """
    about = report.calibration if report and comparison else None
    if not about or about.get("sampler") != comparison.setting.sampler:
        return None
    first, count = about.get("first_seed"), about.get("seeds")
    if type(first) is not int or type(count) is not int:
        return None
    shared = [s.seed for s in comparison.seeds if (s.seed - first) % 2**64 < count]
    if not shared:
        return None
    return (
        f"measured on seeds that the calibration sampled ({len(shared)} of "
        f"{len(comparison.seeds)}, first {shared[0]}): other seeds may be off by more"
    )


def _plain(line: str) -> str:
    """A line from a stranger's file that moves no cursor of a terminal and fills no screen."""
    return "".join(c if c.isprintable() else "?" for c in line[:_LONGEST_LINE])


def check_size(key: str, text: str) -> None:
    """Raise ValueError for an entry that is too long for a header."""
    size = len(text.encode())
    if size > MOST_BYTES:
        raise ValueError(f"{key} has {size} bytes; at most {MOST_BYTES} go into a file's header")


def read(metadata: Mapping[str, str]) -> Provenance:
    """Both entries of a file's metadata, as far as they are there and whole."""
    warnings = []

    def parse(kind, *keys: str):
        """The entry under the first of the keys that is there."""
        key = next((key for key in keys if key in metadata), None)
        if key is None:
            return None
        try:
            check_size(key, metadata[key])
            entry = kind.from_json(metadata[key])
            entry.summary(), entry.to_json()  # a report's fields may be of other types
            return entry
        except _DAMAGE as error:
            warnings.append(f"{key} in the header cannot be read: {quoted(str(error))}")

    report = parse(Report, REPORT)
    comparison = parse(Comparison, COMPARISON, OLD_COMPARISON)
    return Provenance(report, comparison, tuple(warnings))


# What a report raises whose fields are of other types: those of a comparison are checked.
_DAMAGE = (ValueError, TypeError, AttributeError, KeyError, ArithmeticError, RecursionError)
