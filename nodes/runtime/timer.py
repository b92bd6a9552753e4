"""Times a call on a device, for Backend Report (MXFP8).

Short calls are timed several at once, so that reading the clock does not count, and long ones only
once after the warm-up, so that a large layer on a CPU does not take minutes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

_SAMPLE = 0.005  # seconds of calls between two readings of the clock
_SAMPLES = 5
_LONG = 1.0  # seconds for one call, above which it is timed only once


def median_microseconds(
    call: Callable[[], object],
    synchronize: Callable[[], None],
    tick: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The median time of a call over several samples, after one call to warm up.

    Args:
        synchronize: waits for the work queued on the device.
        tick: called before each sample; an exception from it stops the measurement.
    """

    def seconds(calls: int) -> float:
        tick()
        synchronize()
        start = clock()
        for _ in range(calls):
            call()
        synchronize()
        return (clock() - start) / calls

    seconds(1)
    once = seconds(1)
    if once > _LONG:
        return 1e6 * once
    calls = max(1, math.ceil(_SAMPLE / max(once, 1e-7)))
    return 1e6 * statistics.median(seconds(calls) for _ in range(_SAMPLES))
