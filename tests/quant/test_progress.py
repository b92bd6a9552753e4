"""The text of work in progress: how far, how fast, how long, and not too often."""

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


def test_reading_back_has_no_percentage():
    clock, calls = Clock(), []
    pace = Pace(clock=clock)
    meter = Meter(8, lambda *call: calls.append(pace(*call)))
    for count, key in ((4, VERIFY), (4, "b"), (0, VERIFY)):  # a tensor may have that name
        meter(count, key)
        clock.now += 1
    assert calls == ["verify\n50%, 0.0 MB/s, 1 s left", "b\n100%, 0.0 MB/s", "verifying"]


def test_reading_back_is_told_at_once_and_then_not_too_often():
    clock = Clock()
    pace = Pace(clock=clock)
    results = [pace(8, 8, key) for key in ("a", "b", VERIFY, VERIFY)]
    assert results == ["a\n100%, 0.0 MB/s", None, "verifying", None]


def test_a_low_speed_has_a_decimal():
    clock = Clock()
    pace = Pace(clock=clock)
    clock.now += 10
    assert pace(3_000_000, 300_000_000, "a") == "a\n1%, 0.3 MB/s, 16 min 30 s left"


def test_steps_are_timed_without_the_first_one_as_soon_as_there_is_another():
    clock = Clock()
    pace = Pace(steps=True, clock=clock)
    clock.now += 100  # a model is loaded
    pace.start()
    assert pace(0, 10, "a") == "a\nstep 0 of 10"
    clock.now += 10
    assert pace(1, 10, "a") == "a\nstep 1 of 10, 1 min 30 s left"
    clock.now += 2
    assert pace(2, 10, "a") == "a\nstep 2 of 10, 16 s left"
    clock.now += 4
    assert pace(3, 10, "a") == "a\nstep 3 of 10, 21 s left"
    assert pace.seconds == 16


def test_there_are_at_most_four_texts_a_second():
    clock = Clock()
    pace, results = Pace(clock=clock), []
    for step in range(1000):
        clock.now = 100 + step / 100
        results.append(pace(step, 1000, "a"))
    texts = [text for text in results if text is not None]
    assert results[0] is not None
    assert 38 <= len(texts) <= 40
    percents = [int(text.split("\n")[1].partition("%")[0]) for text in texts]
    assert percents == sorted(percents)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.1, "1 s"), (59.4, "59 s"), (65, "1 min 05 s"), (3599, "59 min 59 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_no_division_by_zero():
    assert Pace()(0, 0, "a") == "a\n0%"


def test_a_meter_adds_up():
    calls = []
    meter = Meter(10, lambda *call: calls.append(call))
    meter(4, "a")
    meter(6, "b")
    assert calls == [(4, 10, "a"), (10, 10, "b")]
