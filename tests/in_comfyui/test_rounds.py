"""Load, quantize, sample and unload, fifty times: nothing is left behind in the real ComfyUI."""

from __future__ import annotations

import os
from pathlib import Path

import numpy
import pytest
from graphs import SAME, Graph, difference, latents, load_ours, unload

pytestmark = pytest.mark.comfy

ROUNDS = 50
WARM = 10  # rounds until caches and the allocator's pools have their size
# Bytes per round. A model that stays would be 1.2 MB (MXFP8) or 4.4 MB (as ComfyUI holds BF16 on a
# CPU) a round. Stock's own loading grows by some KB, and the allocator's pools fill up meanwhile.
GROWTH = 150_000


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
        quantized = graph.add("MXFP8QuantizeModel", model=lora, preset="auto", precision="exact")
        nodes = [graph.save_latent(graph.sample(m, "flux", 1)) for m in (loaded, quantized)]
        outputs = comfy.run(graph)
        sampled = [latents(outputs, node, comfy.base) for node in nodes]
        first = first or sampled
        for now, before in zip(sampled, first, strict=True):
            assert difference(now, before) < SAME, index
        unload(comfy)
        states.append(state(comfy.process.pid))

    warm = states[WARM:]
    resident = [f["resident"] for f in warm]
    slope = numpy.polyfit(range(len(warm)), resident, 1)[0]
    record_property("bytes per round", float(slope))
    assert slope < GROWTH, resident
    for what in ("files", "threads"):
        counts = [f[what] for f in warm]
        assert counts[-1] <= counts[0], (what, counts)
