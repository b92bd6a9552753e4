"""Progress of work that is measured in bytes, for whoever watches: a bar, a node, an interrupt."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # (bytes done, bytes in all, key)


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
