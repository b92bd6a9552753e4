"""What is said of work under way: how far, how fast, how long yet, and not too often."""

from __future__ import annotations

import pytest

from mxfp8.quant.progress import VERIFY, Meter, Pace, duration


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_percent_speed_and_time_left():
    clock = Clock()
    pace = Pace(clock=clock)
    assert pace(0, 1_000_000_000, "a") == "a\n0%"
    clock.now += 2
    assert pace(500_000_000, 1_000_000_000, "b.weight") == "b.weight\n50%, 250 MB/s, 2 s left"
    clock.now += 2
    assert pace(1_000_000_000, 1_000_000_000, "c") == "c\n100%, 250 MB/s"


def test_what_is_read_back_is_no_percent_of_what_was_written():
    clock, calls = Clock(), []
    pace = Pace(clock=clock)
    meter = Meter(8, lambda *call: calls.append(pace(*call)))
    for count, key in ((4, VERIFY), (4, "b"), (0, VERIFY)):  # a tensor may have that name
        meter(count, key)
        clock.now += 1
    assert calls == ["verify\n50%, 0.0 MB/s, 1 s left", "b\n100%, 0.0 MB/s", "verifying"]


def test_slow_work_has_a_decimal_and_other_work_no_speed():
    clock = Clock()
    pace = Pace(clock=clock), Pace(rate=False, clock=clock)
    clock.now += 10
    assert pace[0](3_000_000, 300_000_000, "a") == "a\n1%, 0.3 MB/s, 16 min 30 s left"
    assert pace[1](1, 3, "a") == "a\n33%, 20 s left"


def test_it_speaks_four_times_a_second_at_most():
    clock = Clock()
    pace, said = Pace(clock=clock), []
    for step in range(1000):
        clock.now = 100 + step / 100
        said.append(pace(step, 1000, "a"))
    spoken = [text for text in said if text is not None]
    assert said[0] is not None
    assert 38 <= len(spoken) <= 40
    percents = [int(text.split("\n")[1].partition("%")[0]) for text in spoken]
    assert percents == sorted(percents)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.1, "1 s"), (59.4, "59 s"), (65, "1 min 05 s"), (3599, "59 min 59 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_no_division_by_nothing():
    assert Pace()(0, 0, "a") == "a\n0%"


def test_a_meter_adds_up():
    calls = []
    meter = Meter(10, lambda *call: calls.append(call))
    meter(4, "a")
    meter(6, "b")
    assert calls == [(4, 10, "a"), (10, 10, "b")]
