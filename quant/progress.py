"""Progress of work that is measured in bytes, for whoever watches: a bar, a node, an interrupt."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # (bytes done, bytes in all, key)
VERIFY = "verify"  # the key while what was written is read back: all is done, and it is not over


class Meter:
    """Adds up the bytes of finished pieces and tells a callback after each.

    What the callback raises passes through, so that it can stop the work.
    """

    def __init__(self, total: int, progress: Progress | None):
        self._total = total
        self._progress = progress
        self._done = 0

    def __call__(self, count: int, key: str) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total, key)


class Pace:
    """Words on work under way: what it is at, how far it is, how fast, and how long it takes yet.

    Args:
        every: seconds between two answers; in between there is None.
        rate: whether a speed in bytes means something.
    """

    def __init__(
        self,
        every: float = 0.25,
        rate: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._every = every
        self._rate = rate
        self._clock = clock
        self._start = clock()
        self._said: float | None = None

    def __call__(self, done: int, total: int, key: str) -> str | None:
        """A line or two, or None if the last ones are recent; arguments as of `Progress`."""
        now = self._clock()
        if self._said is not None and now - self._said < self._every:
            return None
        self._said = now
        if key == VERIFY and done >= total:  # how far that is, nobody counts
            return "verifying"
        parts = [f"{100 * min(done, total) // max(total, 1)}%"]
        speed = done / max(now - self._start, 1e-3)
        if self._rate and done:
            parts.append(f"{speed / 1e6:.0f} MB/s" if speed >= 1e7 else f"{speed / 1e6:.1f} MB/s")
        if 0 < done < total:
            parts.append(f"{duration((total - done) / speed)} left")
        return f"{key}\n{', '.join(parts)}"


def duration(seconds: float) -> str:
    """A time for people: "9 s", "4 min 05 s", "2 h 10 min"."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
