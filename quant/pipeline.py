"""Work on several threads, results in order, and no more bytes under way than were allowed.

A thread takes a piece of work whole (quantise, checksum, write), so reading, arithmetic and the
disk overlap, and threads need not wait for each other. Torch's own threads split every operation
and meet after each: on a machine that does something else as well, they were 4 to 10 times slower
(two cores, load 5).

The caller's thread submits, and it alone sees results and errors: progress, interrupts and sources
that are not made for threads stay there.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

_POLL = 0.2  # seconds; Windows cannot interrupt a wait without end


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next piece of work, in the whole process.

    For the command only. glibc returns blocks of megabytes to the system, which hands them out
    again page by page: a million page faults per GB of model, 2 s of work on a virtual machine.
    With this, 20 thousand, for 3 MB more memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:  # other C libraries have their own ways
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)
        mallopt(_M_TRIM_THRESHOLD, 1 << 26)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class Pipeline:
    """A context manager; leaving it waits for the work, leaving it with an error drops the rest.

    Either way no thread works any more after that.

    Args:
        workers: threads.
        budget: bytes of work that may be under way or waiting, except that one piece always may.
        initializer: run by every thread first.
    """

    def __init__(self, workers: int, budget: int, initializer: Callable[[], None] = lambda: None):
        self._pool = ThreadPoolExecutor(workers, "mxfp8", initializer)
        self._budget = budget
        self._under_way = 0
        self._queue: deque[tuple[Future, int, Callable]] = deque()

    def submit(self, function: Callable, *args, size: int, done: Callable) -> None:
        """Have `function(*args)` run by a thread, and `done(result)` called here, in order.

        Args:
            size: bytes that the work holds on to.

        Raises:
            whatever earlier work or its `done` raised.
        """
        while self._queue and (self._under_way + size > self._budget or self._queue[0][0].done()):
            self._finish_first()
        self._queue.append((self._pool.submit(function, *args), size, done))
        self._under_way += size

    def _finish_first(self) -> None:
        future, size, done = self._queue[0]
        while not future.done():
            wait([future], _POLL)
        self._queue.popleft()
        self._under_way -= size
        done(future.result())

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            while error is None and self._queue:
                self._finish_first()
        finally:
            self._stop()

    def _stop(self) -> None:
        """Wait for the threads, interrupted or not: they write to files that will be closed."""
        interrupts = []
        while True:
            try:
                self._pool.shutdown(wait=True, cancel_futures=True)
                break
            except BaseException as interrupt:
                interrupts.append(interrupt)
        if interrupts:
            raise interrupts[0]
