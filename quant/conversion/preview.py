"""What a conversion would do, from headers alone: sizes, layers that stay and why, time, memory.

The time is that of quantizing random values of the same number here. What reading and writing take
depends on disks and on what is cached, and is not guessed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache

import torch

from ... import kernels
from ..container.header import plain
from ..format import WEIGHT
from ..progress import duration
from ..reports.conversion import listed
from ..reports.units import format_count, format_size
from ..reports.verdict import Part, say
from .policy import Decision, Plan
from .stored import stored_bytes

_SAMPLE = 1 << 21  # values that are quantized for the speed
_RUNS = 4
_MOST_REASONS = 6
_NAMED = 2  # layers named for a reason
MEMORY = say("[size] of memory", size="0.5 GB")  # besides torch, as `convert` says if it runs out


def summary(plan: Plan, speed: float | None = None, target: str = "") -> str:
    """A plan in some lines.

    Args:
        target: the name of the file that will be written, if there will be one.
        speed: bytes of the source that are quantized in a second, from `speed`.
    """
    before, after = sum(d.nbytes for d in plan.decisions), stored_bytes(plan)
    sizes = f"{format_size(before)} -> {format_size(after)}{f', {target}' if target else ''}"
    architecture = plan.architecture or say("architecture not recognized")
    what = [say("[architecture], preset [preset]", architecture=architecture, preset=plan.preset)]
    count, *reasons = _layers(plan)
    counts, basis = [count], []
    if speed is not None and plan.quantized:
        seconds = sum(d.nbytes for d in plan.quantized) / speed
        counts.append(say("at least [time] here", time=duration(seconds)))
        what.append(MEMORY)
        basis = [
            say(
                "(time: quantizing at [speed]/s, as a sample did, without reading and writing; "
                "memory: besides torch)",
                speed=format_size(speed),
            )
        ]
    lines = [sizes, "; ".join(map(str, counts)), "; ".join(map(str, what)), *reasons, *basis]
    return "\n".join([*map(str, lines), *listed("WARNING", plan.warnings)])


def _layers(plan: Plan) -> Iterator[Part | str]:
    """How many layers become MXFP8, and why the others do not, the most frequent reason first."""
    kept: dict[str, list[Decision]] = {}
    for decision in plan.decisions:
        if not decision.quantize and decision.key.endswith(WEIGHT) and len(decision.shape) == 2:
            kept.setdefault(decision.reason, []).append(decision)
    layers = format_count(len(plan.quantized), "layer")
    others = sum(map(len, kept.values()))
    yield say("[layers] MXFP8, [others] not quantized", layers=layers, others=others)
    reasons = sorted(kept.items(), key=lambda item: -len(item[1]))
    for reason, decisions in reasons[:_MOST_REASONS]:
        names = ", ".join(plain(decision.layer) for decision in decisions[:_NAMED])
        more = ", ..." if len(decisions) > _NAMED else ""
        yield f"  {len(decisions)}: {reason} ({names}{more})"
    rest = sum(len(decisions) for _, decisions in reasons[_MOST_REASONS:])
    if rest:
        more = len(reasons) - _MOST_REASONS
        yield say("  [layers] for [count] other reasons", layers=rest, count=more)


@cache
def speed(device: str) -> float:
    """Bytes of BF16 weights that a device quantizes in a second, as a sample did once.

    The fastest of a few runs: the first one loads and compiles, and other programs may be busy.
    """
    values = torch.randn(_SAMPLE, device=device).bfloat16().reshape(-1, 1024)
    times = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        _, scale = kernels.quantize(values)
        scale.cpu()  # waits for the device
        times.append(time.perf_counter() - start)
    return values.nbytes / min(times)
