"""Jobs on several threads, with results in order and a bound on the bytes in flight.

A thread takes a job from start to end (quantize, checksum, write), so reading, arithmetic and the
disk overlap without threads waiting for each other. Torch's own threads split every operation and
meet after each: on a machine that was busy with other work they were 4 to 10 times slower (two
cores, load 5).

Jobs are made and results are seen in the caller's thread alone, so progress, interrupts and sources
that are not thread-safe stay there.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

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


class Sized(Protocol):
    """A job that a pipeline runs; `size` is the bytes that it holds in memory."""

    @property
    def size(self) -> int: ...


@dataclass(eq=False)
class _Task:
    """A job, and its result or error once `running` is released."""

    job: Sized
    running: threading.Lock = field(default_factory=threading.Lock)
    result: object = None
    error: BaseException | None = None


class Pipeline:
    """Runs a function on jobs; a context manager, after which no thread of it is left.

    An interrupt may come between any two steps of the caller's thread. So the threads share only
    locks and queues that the interpreter takes in a single step: a Condition or a Future, which are
    written in Python, can be left locked, and then the threads would never end.

    Args:
        function: job -> result, called by any of the threads.
        workers: threads.
        budget: bytes of jobs that may be running or waiting, except that one job always may.
        initializer: called by every thread before its first job.
    """

    def __init__(
        self,
        function: Callable[[Sized], object],
        workers: int,
        budget: int,
        initializer: Callable[[], None] = lambda: None,
    ):
        self._function = function
        self._workers = workers
        self._budget = budget
        self._initializer = initializer
        self._threads: list[threading.Thread] = []
        self._queue: deque[_Task] = deque()  # in order: waiting, running, and done but not yielded
        self._in_flight = 0  # bytes of these
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()  # not started
        self._lock = threading.Lock()  # of the two below
        self._working = 0  # threads
        self._stopped = False

    def run(self, jobs: Iterable[Sized]) -> Iterator[tuple[Sized, object]]:
        """Yield (job, result) in the order of the jobs, which are taken as there is room for them.

        Raises:
            What a job raised, in its turn.
        """
        for job in jobs:
            while self._queue and (
                self._in_flight + job.size > self._budget or not self._queue[0].running.locked()
            ):
                yield self._finish_first()
            self._start(job)
        while self._queue:
            yield self._finish_first()

    def _start(self, job: Sized) -> None:
        task = _Task(job)
        task.running.acquire()
        self._queue.append(task)
        self._in_flight += job.size
        self._tasks.put(task)
        if len(self._threads) < self._workers:
            self._threads.append(threading.Thread(target=self._work, name="mxfp8"))
            self._threads[-1].start()

    def _finish_first(self) -> tuple[Sized, object]:
        task = self._queue[0]
        while not task.running.acquire(timeout=_POLL):
            pass
        self._queue.popleft()
        self._in_flight -= task.job.size
        if task.error is not None:
            try:
                raise task.error
            finally:
                del task  # else the error holds itself: by its traceback, this frame and the task
        return task.job, task.result

    def _work(self) -> None:
        """What a thread does; one that starts after the end does nothing."""
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
        ready = False
        while (task := self._tasks.get()) is not None and not self._stopped:
            try:
                if not ready:
                    self._initializer()
                    ready = True
                task.result = self._function(task.job)
            except BaseException as error:
                task.error = error
            task.running.release()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_) -> None:
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
        self._queue.clear()  # of errors' tracebacks, which hold this pipeline
        if interrupts:
            raise interrupts.pop(0)
