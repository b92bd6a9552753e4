"""The timer of Backend Report, against a clock of its own."""

from __future__ import annotations

import pytest

from mxfp8.nodes.runtime.timer import median_microseconds


class Clock:
    """Time that passes when something is called."""

    def __init__(self, *durations: float):
        self.now = 0.0
        self.durations = list(durations)
        self.calls = self.waits = 0

    def __call__(self) -> float:
        return self.now

    def call(self) -> None:
        self.calls += 1
        self.now += self.durations[min(self.calls, len(self.durations)) - 1]

    def wait(self) -> None:
        self.waits += 1


def test_a_time_is_a_median_after_a_call_to_warm_up():
    clock = Clock(9.0, 0.02, 0.02, 0.03, 0.5, 0.01, 0.03)
    microseconds = median_microseconds(clock.call, clock.wait, clock=clock)
    assert microseconds == pytest.approx(30_000)
    assert clock.waits == 2 * clock.calls  # each reading of the clock is of finished work


def test_short_calls_are_timed_together_and_long_ones_twice():
    short = Clock(1e-5)
    assert median_microseconds(short.call, short.wait, clock=short) == pytest.approx(10)
    assert short.waits < 20 < 2000 < short.calls
    long = Clock(5.0, 4.0)
    assert median_microseconds(long.call, long.wait, clock=long) == pytest.approx(4e6)
    assert long.calls == 2


def test_what_tick_raises_stops_it():
    def stop():
        raise KeyboardInterrupt

    clock = Clock(1.0)
    with pytest.raises(KeyboardInterrupt):
        median_microseconds(clock.call, clock.wait, stop, clock)
    assert clock.calls == 0
