"""Progress of long work: how far it is, how fast, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # (done, total, what is being worked on)
VERIFY = "verify"  # the key while a written file is read back: everything is written by then


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
    """The text of work in progress: what is being worked on, how far, how fast, how long it takes.

    Args:
        every: seconds between two texts.
        steps: whether the work is counted in steps, not in bytes. The first step includes
            warm-up; after a second one the speed is taken without it.
    """

    def __init__(
        self,
        every: float = 0.25,
        steps: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._every = every
        self._steps = steps
        self._clock = clock
        self._shown: float | None = None
        self._first: tuple[float, int] | None = None  # time, and what was done
        self._verifying = False
        self.start()

    def start(self) -> None:
        """Time the work from now on."""
        self._start = self._clock()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return self._clock() - self._start

    def __call__(self, done: int, total: int, key: str) -> str | None:
        """A line or two, or None if the last text is recent; arguments as for `Progress`.

        That verifying began is told at once: it may be over before another text is due.
        """
        now = self._clock()
        since, before = self._first or (self._start, 0)
        if self._steps and done:
            self._first = self._first or (now, done)
        verifying = key == VERIFY and done >= total
        begins, self._verifying = verifying and not self._verifying, verifying
        if self._shown is not None and now - self._shown < self._every and not begins:
            return None
        self._shown = now
        if verifying:  # how much is read back is not counted
            return "verifying"
        speed = (done - before) / max(now - since, 1e-3)
        if self._steps:
            parts = [f"step {done} of {total}"]
        else:
            parts = [f"{100 * min(done, total) // max(total, 1)}%"]
            if done:
                parts.append(f"{speed / 1e6:.{0 if speed >= 1e7 else 1}f} MB/s")
        if speed > 0 and done < total:
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
