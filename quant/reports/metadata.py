"""The report and the comparison in a file's header, as Save Model (MXFP8) keeps them.

Both are strings of the metadata, which every other reader leaves alone. The converter writes
neither, so that its files hold nothing beside the format. Anyone can write a header, so what is
read here is checked and bounded, and a damaged entry is only a warning: no weight depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..container.header import FormatError, quoted
from .comparison import KEY as COMPARISON
from .comparison import OLD_KEY as OLD_COMPARISON
from .comparison import Comparison
from .conversion import KEY as REPORT
from .conversion import Report

MOST_BYTES = 1 << 22  # of each; a report takes about 350 bytes per layer
_MOST_LINES = 40
_LONGEST_LINE = 300


def lines(report: Report | None, comparison: Comparison | None) -> list[str]:
    """The summaries of both, each indented under a heading."""
    result = []
    for heading, part in (("conversion", report), ("comparison", comparison)):
        if part is not None:
            summary = part.summary().splitlines()[:_MOST_LINES]
            result += [f"{heading}, as stated in the file:", *(f"  {_plain(x)}" for x in summary)]
    note = note_on_seeds(report, comparison)
    return [*result, f"  NOTE: {note}"] if note else result


def note_on_seeds(report: Report | None, comparison: Comparison | None) -> str | None:
    """A warning that a comparison sampled seeds of the calibration, or None.

    On those the weights were rounded for the very runs that are compared. None also if the report
    does not say what its calibration sampled.
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
        f"{len(comparison.seeds)}, first {shared[0]}): other seeds may differ more"
    )


def _plain(line: str) -> str:
    """A line from a stranger's file, shortened and without control characters of a terminal."""
    return "".join(c if c.isprintable() else "?" for c in line[:_LONGEST_LINE])


def check_size(key: str, text: str) -> None:
    """Raise FormatError for an entry that is too long for a header."""
    size = len(text.encode())
    if size > MOST_BYTES:
        raise FormatError(f"{key} has {size} bytes; at most {MOST_BYTES} fit in a file's header")


def read(
    metadata: Mapping[str, str],
) -> tuple[Report | None, Comparison | None, list[str]]:
    """Both entries of a file's metadata, None where one is missing or damaged, and warnings."""
    entries: dict[type, object] = {}
    warnings = []
    for kind, key in (
        (Report, REPORT),
        (Comparison, COMPARISON if COMPARISON in metadata else OLD_COMPARISON),
    ):
        if key in metadata:
            try:
                check_size(key, metadata[key])
                entries[kind] = kind.from_json(metadata[key])
            except FormatError as error:
                warnings.append(f"{key} in the header cannot be read: {quoted(str(error))}")
    return entries.get(Report), entries.get(Comparison), warnings
