"""Load, quantize, sample and unload, fifty times: nothing is left behind in the real ComfyUI."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import pytest
from graphs import SAME, Graph, difference, latents, load_ours, unload

pytestmark = pytest.mark.comfy

ROUNDS = 50
WARM = 10  # rounds until caches and the allocator's pools have their size
# Bytes per round, the median over pairs of rounds. A model that stays would be 1.2 MB (MXFP8) or
# 4.4 MB (as ComfyUI holds BF16 on a CPU) in each; stock's own loading grows by some KB. The
# allocator's pools grow by 2 MB in a few rounds, which a fitted line took for 20 to 200 KB in each.
GROWTH = 100_000


def state(process: int) -> dict[str, int]:
    """Resident bytes, open files and threads of a process."""
    folder = Path("/proc", str(process))
    lines = (folder / "status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines)
    return {
        "resident": int(status["VmRSS"].split()[0]) * 1024,
        "files": len(os.listdir(folder / "fd")),
        "threads": len(os.listdir(folder / "task")),
    }


def test_fifty_rounds_of_load_quantize_sample_unload_leave_nothing(comfy, record_property):
    states, first = [], None
    for index in range(ROUNDS):
        graph = Graph()
        loaded = load_ours(graph, "flux")
        lora = graph.add(
            "LoraLoaderModelOnly", model=graph.loader("flux.safetensors"),
            lora_name="lora.safetensors", strength_model=1.0,
        )  # fmt: skip
        quantized = graph.add("MXFP8Quantize", model=lora, preset="auto", precision="exact")
        nodes = [graph.save_latent(graph.sample(m, "flux", 1)) for m in (loaded, quantized)]
        outputs = comfy.run(graph)
        sampled = [latents(outputs, node, comfy.base) for node in nodes]
        first = first or sampled
        for now, before in zip(sampled, first, strict=True):
            assert difference(now, before) < SAME, index
        unload(comfy)
        states.append(state(comfy.process.pid))

    warm = states[WARM:]
    resident = [s["resident"] for s in warm]
    growth = statistics.median((b - a) / 2 for a, b in zip(resident, resident[2:], strict=False))
    record_property("bytes per round", growth)
    record_property("resident", resident)
    assert growth < GROWTH, resident
    for what in ("files", "threads"):
        counts = [s[what] for s in warm]  # one more while a connection is being closed
        assert min(counts[-5:]) <= min(counts[:5]), (what, counts)
