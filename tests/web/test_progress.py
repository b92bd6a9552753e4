"""Progress texts as the browser receives them, and interrupts."""

from __future__ import annotations

import asyncio
import html
import json
import re
import struct
import time
from dataclasses import dataclass, field

import aiohttp
import pytest
import torch
from bad_files import draft
from graphs import Graph, calibrated
from safetensors.torch import save_file

from mxfp8 import kernels

pytestmark = pytest.mark.comfy

TEXT = 3  # ComfyUI's BinaryEventTypes.TEXT
DONE = ("execution_success", "execution_error", "execution_interrupted")
LAYERS, SHAPE = 16, (8192, 4096)  # 1.07 GB in BF16


@dataclass
class Seen:
    """What came over the websocket.

    Attributes:
        texts: (node, text).
        end: kind of the last event.
        seconds: from before the workflow was queued to after the last event.
    """

    texts: list[tuple[str, str]] = field(default_factory=list)
    end: str = ""
    seconds: float = 0.0

    def of(self, node: list) -> list[str]:
        return [text for name, text in self.texts if name == node[0]]


def watch(comfy, graph: Graph, interrupt_at: int | None = None) -> Seen:
    """Run a workflow as the browser does; interrupt it when a node reaches this percentage."""

    async def listen() -> Seen:
        seen, asked = Seen(), False
        url = f"{comfy.url}/ws?clientId={comfy.client}"
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(url) as socket,
        ):
            begin = time.monotonic()
            prompt = comfy.submit(graph)
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    kind, length = struct.unpack(">II", message.data[:8])
                    if kind != TEXT:
                        continue
                    node = message.data[8 : 8 + length].decode()
                    text = message.data[8 + length :].decode()
                    seen.texts.append((node, text))
                    enough = percent(text) is not None and percent(text) >= (interrupt_at or 0)
                    if interrupt_at is not None and not asked and enough:
                        asked = True
                        await session.post(f"{comfy.url}/interrupt")
                    continue
                event = json.loads(message.data)
                ours = event.get("data", {}).get("prompt_id") == prompt
                if event.get("type") in DONE and ours:
                    seen.end = event["type"]
                    seen.seconds = time.monotonic() - begin
                    return seen
        raise AssertionError("the socket was closed")

    return asyncio.run(listen())


def percent(text: str) -> int | None:
    match = re.search(r"(?m)^step (\d+) of (\d+)", text)
    if match:
        return 100 * int(match[1]) // int(match[2])
    match = re.search(r"(?m)^(\d+)%", text)
    return match and int(match[1])


@pytest.fixture(scope="module")
def large(comfy):
    """A model of 1 GB in a sparse file, all zeros."""
    path = comfy.base / "models" / "diffusion_models" / "progress-large.safetensors"
    size = 2 * SHAPE[0] * SHAPE[1]
    header = {
        f"blocks.{i}.weight": {
            "dtype": "BF16", "shape": SHAPE, "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(LAYERS)
    }  # fmt: skip
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + LAYERS * size)
    yield f"diffusion_models/{path.name}"
    path.unlink()


def convert(graph: Graph, source: str, target: str) -> list:
    return graph.add(
        "MXFP8ConvertFile", source=source, target=target, preset="none", overwrite=False
    )


def test_layer_percent_speed_and_time_left_arrive(comfy, large):
    graph = Graph()
    node = convert(graph, large, "progress-done")
    seen = watch(comfy, graph)
    (comfy.base / "models" / "diffusion_models" / "progress-done.safetensors").unlink()
    assert seen.end == "execution_success"
    *texts, last = seen.of(node)
    assert "layers MXFP8" in last  # the summary
    checks = [text for text in texts if text == "verifying"]
    assert checks and texts[-len(checks) :] == checks
    texts = texts[: -len(checks)]
    percents = [percent(text) for text in texts]
    assert len(texts) > 3
    assert percents == sorted(percents)
    under_way = [text for text in texts if 0 < percent(text) < 100]
    assert under_way
    for text in under_way:
        assert re.fullmatch(r"blocks\.\d+\.weight\n\d+%, [\d.]+ MB/s, [\w ]+ left", text), text
    assert len(texts) <= 4 * seen.seconds + 1


HOSTILE = "<img src=x onerror=alert(1)> & [[a|http://b]] [[[c HTTPS://d WWW.e __LNK0__"


def test_names_in_a_file_reach_the_page_as_text(comfy):
    """No text that is sent holds what the page would render as HTML or links; names show as is."""
    folder = comfy.base / "models" / "diffusion_models"
    path, made = folder / "progress-hostile.safetensors", folder / "progress-shown.safetensors"
    save_file({f"{HOSTILE}.weight": torch.zeros(64, 64)}, path, {HOSTILE: "a", "format": "pt"})
    graph = Graph()
    nodes = [
        convert(graph, f"diffusion_models/{path.name}", made.stem),
        graph.add("MXFP8InspectFile", file=f"diffusion_models/{path.name}", every_byte=True),
    ]
    seen = watch(comfy, graph)
    path.unlink()
    made.unlink()
    assert seen.end == "execution_success"
    for node in nodes:
        texts = seen.of(node)
        assert any(HOSTILE in html.unescape(text) for text in texts), graph[node[0]]["class_type"]
        for text in texts:
            assert not re.search(r"(?i)[<>]|\[\[|://|www\.|__LNK", text), text
            assert not re.search(r"&(?!amp;|lt;|gt;|#\d+;)", text), text


def test_an_interrupt_takes_effect_and_leaves_nothing(comfy, large):
    folder = comfy.base / "models" / "diffusion_models"
    before = set(folder.rglob("*"))
    graph = Graph()
    node = convert(graph, large, "new/folder/progress-interrupted")
    seen = watch(comfy, graph, interrupt_at=10)
    assert seen.end == "execution_interrupted"
    assert seen.of(node)[-1] == "interrupted"
    assert set(folder.rglob("*")) == before


def test_a_sampler_that_is_interrupted_leaves_no_time_left_on_its_node(comfy):
    graph = Graph()
    node = calibrated(graph, graph.loader("flux.safetensors"), "flux", steps=500, seeds=1)
    graph.add("MXFP8SaveCalibration", calibration=node, filename_prefix="progress/interrupted")
    seen = watch(comfy, graph, interrupt_at=0)
    assert seen.end == "execution_interrupted"
    assert seen.of(node)[-1] == "interrupted"


def test_what_a_user_should_know_is_on_the_node(comfy):
    """Expressions that match nothing, and a model that Save Model leaves as it is."""
    graph = Graph()
    model = graph.loader("flux.safetensors")
    given = {"include": "attn", "exclude": "nosuchlayer"}
    quantized = graph.add("MXFP8Quantize", model=model, preset="auto", precision="exact", **given)
    nodes = [quantized]
    nodes += [calibrated(graph, model, "flux", steps=1, seeds=1, **given)]
    nodes += [graph.add(
        "MXFP8ConvertFile", source="diffusion_models/flux.safetensors", target="progress-known",
        preset="auto", overwrite=False, **given,
    )]  # fmt: skip
    graph.add("MXFP8SaveCalibration", calibration=nodes[1], filename_prefix="progress/known")
    saved = [graph.add("MXFP8SaveModel", model=m, filename_prefix="progress/known")
             for m in (model, quantized)]  # fmt: skip
    seen = watch(comfy, graph)
    (comfy.base / "models" / "diffusion_models" / "progress-known.safetensors").unlink()
    assert seen.end == "execution_success"
    for node in nodes:
        (warning,) = re.findall("(?m)^WARNING: (.*)$", seen.of(node)[-1])
        assert warning == "exclude 'nosuchlayer' matches no key", graph[node[0]]["class_type"]
    assert "no MXFP8 layer" in seen.of(saved[0])[-1]
    assert "WARNING" not in seen.of(saved[1])[-1]


def test_every_long_node_shows_its_progress(comfy):
    models = comfy.base / "models" / "diffusion_models"
    lost = draft(models / "flux-mxfp8.safetensors")
    lost.unmark()
    path = models / "progress-lost.safetensors"
    path.write_bytes(lost.encode())
    graph = Graph()
    quantized = graph.add(
        "MXFP8Quantize", model=graph.loader("flux2.safetensors"), preset="auto",
        precision="exact",
    )  # fmt: skip
    nodes = [
        quantized,
        graph.add("MXFP8SaveModel", model=quantized, filename_prefix="progress/saved"),
        graph.add("MXFP8RepairFile", source=f"diffusion_models/{path.name}", target="",
                  scales="auto", overwrite=True),
        graph.add("MXFP8InspectFile", file="diffusion_models/flux-mxfp8.safetensors",
                  every_byte=True),
        graph.add("MXFP8BackendReport", model=quantized, measure=True, rows=2),
    ]  # fmt: skip
    seen = watch(comfy, graph)
    path.unlink()
    path.with_name("progress-lost-repaired.safetensors").unlink()
    assert seen.end == "execution_success"
    for node in nodes:
        shown = [re.search(r"(?m)^(\d+%|step \d+ of )", text) for text in seen.of(node)]
        assert any(shown), graph[node[0]]["class_type"]
        assert not shown[-1]  # the last text is the result


def test_loaders_show_the_backend(comfy):
    graph = Graph()
    ours = graph.add("MXFP8Load", model_name="flux-mxfp8.safetensors", precision="fast")
    other = graph.add("MXFP8Load", model_name="flux.safetensors", precision="exact")
    checkpoint = graph.add(
        "MXFP8LoadCheckpoint", checkpoint_name="checkpoint-mxfp8.safetensors", precision="exact"
    )
    for node in (ours, other, checkpoint):
        graph.add("PreviewAny", source=node)
    seen = watch(comfy, graph)
    (line,) = seen.of(ours)
    fast = kernels.execution_path(torch.device("cpu"), torch.bfloat16, "fast", prepare="once")
    limit = "" if fast.precision == "fast" else r" \(no GPU\)"
    runs = f"{fast.backend}, {fast.precision}{limit}"
    assert re.fullmatch(rf"13 MXFP8 layers, [\d.]+ kB: {runs}", line)
    assert seen.of(other) == ["no MXFP8 layers; it runs as ComfyUI loaded it"]
    assert re.search(r"MXFP8 layers, .*(eager|torch_bf16), exact", seen.of(checkpoint)[-1])


def test_a_save_that_fails_leaves_no_new_folder(comfy):
    output = comfy.base / "output"
    (output / "mine").mkdir(parents=True, exist_ok=True)
    before = set(output.rglob("*"))
    graph = Graph()
    model = graph.add("MXFP8Load", model_name="flux-mxfp8.safetensors", precision="exact")
    model = graph.add("TestFail", model=model, how="nan")
    node = graph.add("MXFP8SaveModel", model=model, filename_prefix="mine/%year%/a/failing")
    seen = watch(comfy, graph)
    assert seen.end == "execution_error"
    assert seen.of(node)[-1].startswith("failed: LoRAs or patches on this Flux cannot be merged")
    assert set(output.rglob("*")) == before
    (output / "mine").rmdir()
