"""Times on a device: medians of device events around replays of a CUDA graph.

A graph, because a small kernel finishes before the host has launched the next one. Contestants take
turns, round after round, so that a change in the device's clocks affects all of them, and rotate
through sets of inputs that together exceed its cache. Without a GPU the host's clock is used.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

ROUNDS = 11
_LEAST_US = 1500.0  # per timed stretch: events resolve half a microsecond
_MOST_CALLS = 256


class OutOfTimeError(Exception):
    """The time for the whole run is over."""


class Clock:
    """Times calls until `end`, in seconds of `time.monotonic`; from then on it raises.

    `failures`: contestant -> why the last `time` could not time it, or not in a graph.
    """

    def __init__(self, device: torch.device, rounds: int = ROUNDS, end: float = math.inf):
        self.device = device
        self.rounds = rounds
        self.end = end
        self.failures: dict[str, str] = {}

    def check(self) -> None:
        """
        Raises:
            OutOfTimeError: the time is over.
        """
        if time.monotonic() >= self.end:
            raise OutOfTimeError("no time left")

    def time(
        self, runs: dict[str, Callable[[int], object]], sets: int = 1, graph: bool = True
    ) -> dict[str, float]:
        """Microseconds per call, the median over rounds.

        Args:
            runs: contestant -> a function that runs it on the i-th set of inputs.
            graph: whether to time replays of a CUDA graph; otherwise calls from the host.
        """
        self.failures = {}
        # Graphs overwrite each other's results, which nobody reads: so all fit a small card.
        pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" and graph else None
        prepared = {}
        for name, run in runs.items():
            self.check()
            try:
                own = pool
                if pool is not None and self._synchronizes(run):
                    own = None
                    self.failures[name] = "timed from the host, as it waits for the device"
                prepared[name] = self._prepare(run, sets, own)
            except Exception as error:  # one contestant's failure must not lose the others
                self.failures[name] = reason(error)
        measured: dict[str, list[float]] = {name: [] for name in prepared}
        for counted in [False] + [True] * self.rounds:
            self.check()
            for name, (stretch, calls) in prepared.items():
                spent = self._stretch(stretch) / calls
                if counted:
                    measured[name].append(spent)
        return {name: statistics.median(values) for name, values in measured.items()}

    def _synchronizes(self, run: Callable[[int], object]) -> bool:
        """Whether a call waits for the device: capturing it would fail, and break later ones."""
        run(0)  # compiles, which may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(0)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return False

    def _prepare(self, run, sets: int, pool) -> tuple[Callable[[], None], int]:
        """(a function to time, calls in it), after running on every set, which compiles it."""
        for _ in range(2):
            for index in range(sets):
                run(index)
        if self.device.type != "cuda":
            return lambda: run(0), 1

        def all_sets():
            for index in range(sets):
                run(index)

        one = self._stretch(all_sets) / sets
        rotations = max(1, min(_MOST_CALLS // sets, round(_LEAST_US / max(one, 0.1) / sets)))
        calls = rotations * sets
        if pool is None:
            return lambda: [run(i % sets) for i in range(calls)] and None, calls
        recorded = torch.cuda.CUDAGraph()
        # Results are kept for one rotation: a buffer that is reused at once stays in the cache.
        kept: list[object] = [None] * sets
        torch.cuda.synchronize()
        with torch.cuda.graph(recorded, pool=pool):
            for index in range(calls):
                kept[index % sets] = run(index % sets)
        return recorded.replay, calls

    def _stretch(self, run: Callable[[], object]) -> float:
        """Microseconds of one run."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e6
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def host(self, run: Callable[[], object]) -> float:
        """Microseconds of the host's time per call, the median over rounds.

        `run` must take the device less time than the host, or the device is what is timed.
        """
        measured = []
        calls = 200 if self.device.type == "cuda" else 10
        for counted in [False] + [True] * self.rounds:
            self.check()
            self.wait()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            spent = (time.perf_counter() - start) * 1e6 / calls
            if counted:
                measured.append(spent)
        self.wait()
        return statistics.median(measured)

    def launches(self, run: Callable[[], object]) -> int:
        """Kernels that a call starts on a GPU; on a CPU, the matmuls in it."""
        gpu = self.device.type == "cuda"
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(
            activities=[activity.CUDA if gpu else activity.CPU], acc_events=True
        ) as seen:
            run()
            self.wait()
        if gpu:
            return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in seen.events())
        return sum(e.name in ("aten::mm", "aten::addmm", "aten::addmm_") for e in seen.events())

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """The peak of allocated memory during a run, beyond what was allocated before."""
        if self.device.type != "cuda":
            run()
            return None
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.wait()
        return torch.cuda.max_memory_allocated() - before


def reason(error: Exception) -> str:
    """An exception as one line."""
    message = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {message[:300]}"
