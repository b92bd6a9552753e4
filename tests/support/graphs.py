"""Workflows in ComfyUI's API form, and the tensors and images they leave behind."""

from __future__ import annotations

import asyncio
import struct
import time
from pathlib import Path

import aiohttp
import pytest
import torch
from comfyui import PromptError
from safetensors.torch import load_file

LATENTS = {
    "flux": ("EmptySD3LatentImage", {"width": 64, "height": 64}),
    "flux2": ("EmptyFlux2LatentImage", {"width": 64, "height": 64}),
    "wan": ("EmptyHunyuanLatentVideo", {"width": 64, "height": 64, "length": 1}),
    "zimage": ("EmptySD3LatentImage", {"width": 64, "height": 64}),
}

# ComfyUI computes in float32 on a CPU. Two sampling steps of a few layers amplify roundings of
# 6e-8 to at most this; a wrong scale, layer or LoRA changes the latent by 1e-3 and more.
SAME = 1e-5


class Graph(dict):
    """A workflow under construction: `add` returns the new node's first output."""

    def add(self, class_type: str, **inputs) -> list:
        key = str(len(self) + 1)
        self[key] = {"class_type": class_type, "inputs": inputs}
        return [key, 0]

    def loader(self, name: str) -> list:
        """A model from the stock loader."""
        return self.add("UNETLoader", unet_name=name, weight_dtype="default")

    def sample(self, model: list, kind: str, steps: int = 2) -> list:
        """A latent sampled without a text encoder."""
        empty, size = LATENTS[kind]
        conditioning = self.add("LotusConditioning")
        if kind == "wan":  # its text is 4096 wide
            conditioning = self.add("TestWideConditioning", conditioning=conditioning)
        return self.add(
            "KSampler",
            model=model,
            positive=conditioning,
            negative=conditioning,
            latent_image=self.add(empty, **size, batch_size=1),
            seed=7,
            steps=steps,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        )

    def save_latent(self, samples: list, prefix: str = "latent") -> list:
        return self.add("SaveLatent", samples=samples, filename_prefix=prefix)

    def save_image(self, samples: list, vae: str, prefix: str = "image") -> list:
        images = self.add("VAEDecode", samples=samples, vae=self.add("VAELoader", vae_name=vae))
        return self.add("SaveImage", images=images, filename_prefix=prefix)


def output_files(outputs: dict, node: list, folder: Path, kind: str = "latents") -> list[Path]:
    """The files that a node of a finished workflow wrote into a server's output folder."""
    return [folder / "output" / e["subfolder"] / e["filename"] for e in outputs[node[0]][kind]]


def latents(outputs: dict, node: list, folder: Path):
    """The tensor that a SaveLatent node wrote."""
    (path,) = output_files(outputs, node, folder)
    return load_file(path)["latent_tensor"]


def saved_tensor(folder: Path, name: str):
    """What a TestSaveTensor node wrote."""
    return torch.load(folder / "output" / f"{name}.pt", weights_only=True)


def difference(a, b) -> float:
    """Relative difference of two latents."""
    return float((a - b).norm() / b.norm())


def run(comfy, graph: Graph, saved: dict[str, list]) -> dict:
    outputs = comfy.run(graph)
    return {name: latents(outputs, node, comfy.base) for name, node in saved.items()}


def watch(comfy, graph: Graph) -> tuple[dict[str, list], dict[str, list]]:
    """Run a workflow as the browser does, on its websocket: (bars, texts), each by node."""
    bars, texts = {node: [] for node in graph}, {node: [] for node in graph}

    async def listen() -> None:
        url = f"{comfy.url}/ws?clientId={comfy.client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
            await asyncio.to_thread(comfy.submit, graph)
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    event, length = struct.unpack(">II", message.data[:8])
                    if event == 3:  # a text
                        node = message.data[8 : 8 + length].decode()
                        texts[node].append(message.data[8 + length :].decode())
                    continue
                event = message.json()
                if event.get("type") == "progress":
                    data = event["data"]
                    bars[data["node"]].append((data["value"], data["max"]))
                if event.get("type") in ("execution_success", "execution_error"):
                    return

    asyncio.run(listen())
    return bars, texts


def interrupt(comfy, graph: Graph, module: str, name: str, call: int) -> int:
    """Run a workflow that is interrupted within a call of one of the pack's functions: how often
    that was called afterwards. A clock would time the machine, too, and what else it does."""

    def node(number: int) -> list:
        armed = Graph()
        key, _ = armed.add("TestInterrupt", module=module, name=name, call=number)
        return comfy.run(armed).get(key, {}).get("result")

    node(call)
    with pytest.raises(PromptError, match="interrupted"):
        comfy.run(graph)
    return node(0)[0]


def unload(comfy) -> None:
    """Have the server drop every model, and wait until their temporary files are gone."""
    comfy.post("/history", {"clear": True})  # it keeps every workflow and report
    comfy.free()
    deadline = time.monotonic() + 120
    while list((comfy.base / "temp").glob("mxfp8-*")):
        assert time.monotonic() < deadline, "a temporary file stays"
        time.sleep(0.02)


def after(graph: Graph, samples: list, previous: list) -> list:
    """Samples that are not begun before the previous ones are there."""
    graph[samples[0]]["inputs"]["latent_image"] = graph.add(
        "TestEmptyAfter", samples=previous, like=graph[samples[0]]["inputs"]["latent_image"]
    )
    return samples


def with_lora(graph: Graph, model: list, file: str = "lora.safetensors") -> list:
    return graph.add("LoraLoaderModelOnly", model=model, lora_name=file, strength_model=1.0)


def int8_cpu(graph: Graph, model: list, on: bool = True, **options) -> list:
    """A model, after the server was made to take the CPU for one that multiplies INT8, or not."""
    options = {"memory": True, "most_change": 0.02, **options}
    return graph.add("TestFast", model=model, on=on, **options)


def load_ours(graph: Graph, kind: str, precision: str = "exact") -> list:
    return graph.add("MXFP8Load", model_name=f"{kind}-mxfp8.safetensors", precision=precision)


def calibrated(graph: Graph, model: list, kind: str, **options) -> list:
    """A CALIBRATION of a model on an empty prompt."""
    empty, size = LATENTS[kind]
    conditioning = graph.add("LotusConditioning")
    if kind == "wan":
        conditioning = graph.add("TestWideConditioning", conditioning=conditioning)
    inputs = {
        "first_seed": 100, "seeds": 2, "steps": 4, "cfg": 1.0, "sampler_name": "euler",
        "scheduler": "simple", "denoise": 1.0, "preset": "auto",
    }  # fmt: skip
    return graph.add(
        "MXFP8Calibrate", model=model, positive=conditioning, negative=conditioning,
        latent_image=graph.add(empty, **size, batch_size=1), **{**inputs, **options},
    )  # fmt: skip


def quantized(graph: Graph, model: list, **options) -> list:
    return graph.add(
        "MXFP8Quantize", model=model, preset="auto", precision="exact", **options
    )  # fmt: skip


def ours(graph: Graph, file: str, **options) -> list:
    return graph.add("MXFP8Load", model_name=file, precision="exact", **options)


def convert(
    source: str = "diffusion_models/flux.safetensors", target: str = "", **options
) -> tuple[Graph, list]:
    graph = Graph()
    options = {"preset": "auto", "overwrite": False, **options}
    return graph, graph.add("MXFP8ConvertFile", source=source, target=target, **options)
