"""Work on several threads, results in order, and no more bytes under way than were allowed.

A thread takes a piece of work whole (quantize, checksum, write), so reading, arithmetic and the
disk overlap, and threads need not wait for each other. Torch's own threads split every operation
and meet after each: on a machine that does something else as well, they were 4 to 10 times slower
(two cores, load 5).

The caller's thread submits, and it alone sees results and errors: progress, interrupts and sources
that are not made for threads stay there.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

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


@dataclass(eq=False)
class _Task:
    """A piece of work, and what became of it once `running` is released."""

    function: Callable
    arguments: tuple
    size: int
    done: Callable
    running: threading.Lock = field(default_factory=threading.Lock)
    result: object = None
    error: BaseException | None = None


class Pipeline:
    """A context manager; leaving it waits for the work, leaving it with an error drops the rest.

    Either way no thread works any more after that.

    An interrupt may come between any two steps of the caller's thread. What it shares with the
    others are therefore locks and queues that the interpreter takes in a single step: a Condition
    or a Future, written in Python, can be left locked, and then the threads would never end.

    Args:
        workers: threads.
        budget: bytes of work that may be under way or waiting, except that one piece always may.
        initializer: run by every thread first.
    """

    def __init__(self, workers: int, budget: int, initializer: Callable[[], None] = lambda: None):
        self._workers = workers
        self._budget = budget
        self._initializer = initializer
        self._threads: list[threading.Thread] = []
        self._queue: deque[_Task] = deque()  # in order, with what is under way
        self._under_way = 0  # bytes
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()  # not begun
        self._lock = threading.Lock()  # of the two below
        self._working = 0  # threads
        self._stopped = False

    def submit(self, function: Callable, *args, size: int, done: Callable) -> None:
        """Have `function(*args)` run by a thread, and `done(result)` called here, in order.

        Args:
            size: bytes that the work holds on to.

        Raises:
            whatever earlier work or its `done` raised.
        """
        while self._queue and (
            self._under_way + size > self._budget or not self._queue[0].running.locked()
        ):
            self._finish_first()
        task = _Task(function, args, size, done)
        task.running.acquire()
        self._queue.append(task)
        self._under_way += size
        self._tasks.put(task)
        if len(self._threads) < self._workers:
            self._threads.append(threading.Thread(target=self._work, name="mxfp8"))
            self._threads[-1].start()

    def _finish_first(self) -> None:
        task = self._queue[0]
        while not task.running.acquire(timeout=_POLL):
            pass
        self._queue.popleft()
        self._under_way -= task.size
        if task.error is not None:
            raise task.error
        task.done(task.result)

    def _work(self) -> None:
        """What a thread does. One that starts when all is over does nothing."""
        with self._lock:
            if self._stopped:
                return
            self._working += 1
        try:
            self._run_tasks()
        finally:
            with self._lock:
                self._working -= 1

    def _run_tasks(self) -> None:
        failed = None
        try:
            self._initializer()
        except BaseException as error:
            failed = error
        while (task := self._tasks.get()) is not None and not self._stopped:
            try:
                if failed is not None:
                    raise failed
                task.result = task.function(*task.arguments)
            except BaseException as error:
                task.error = error
            task.running.release()

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
                with self._lock:
                    self._stopped = True
                for _ in self._threads:
                    self._tasks.put(None)
                while self._working:
                    time.sleep(0.001)
                break
            except BaseException as interrupt:
                interrupts.append(interrupt)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        if interrupts:
            raise interrupts[0]
