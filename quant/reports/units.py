"""Counts, sizes and times in words."""

from __future__ import annotations

from ..progress import duration


def format_count(count: int, name: str, plural: str | None = None) -> str:
    return f"{count} {name if count == 1 else plural or f'{name}s'}"


def format_size(count: int) -> str:
    """A size in decimal units, as disks and model pages give it, with three digits."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= 0.9995 * size:
            return f"{_three_digits(count / size)} {unit}"
    return f"{count} B"


def format_seconds(seconds: float) -> str:
    """A time that something took: "643 us", "12.3 s", "2 min 05 s"."""
    if seconds >= 60:
        return duration(seconds)
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * size:
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds * 1e6)} us"


def _three_digits(value: float) -> str:
    """A number of at most four digits before the point, rounded to three."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
