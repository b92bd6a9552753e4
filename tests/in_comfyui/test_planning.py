"""Plans made by the node that the page runs for others, in the real ComfyUI."""

from __future__ import annotations

import pytest
from comfyui import Server
from graphs import Graph, latents

from mxfp8.quant.format import read_header
from mxfp8.quant.reports.conversion import format_size

pytestmark = pytest.mark.comfy


def plan(comfy, source: str, **options) -> list[str]:
    graph = Graph()
    node = graph.add("MXFP8PlanConversion", source=source, **{"preset": "auto", **options})
    return comfy.run(graph)[node[0]]["text"][0].splitlines()


def test_a_plan_has_the_size_of_the_file_that_convert_file_writes(comfy):
    lines = plan(comfy, "diffusion_models/flux.safetensors")
    header = read_header(comfy.base / "models" / "diffusion_models" / "flux-mxfp8.safetensors")
    size = sum(tensor.nbytes for tensor in header.tensors.values())
    assert lines[0].split(" -> ")[1].startswith(format_size(size))
    assert lines[1].startswith(f"{len(header.layers)} layers MXFP8")
    assert "at least" in lines[1]


def test_the_parts_of_a_checkpoint_are_planned_apart(comfy):
    whole = plan(comfy, "checkpoints/checkpoint.safetensors")
    model = plan(comfy, "checkpoints/checkpoint.safetensors", part="diffusion model")
    alone = plan(comfy, "diffusion_models/flux.safetensors")
    assert model[:2] == alone[:2] != whole[:2]  # the same Flux, and a VAE beside it


def test_what_cannot_be_converted_is_said_without_failing(comfy):
    (line,) = plan(comfy, "diffusion_models/flux-mxfp8.safetensors")
    assert "already quantized as MXFP8" in line
    (line,) = plan(comfy, "diffusion_models/flux.safetensors", exclude="(")
    assert "not a regular expression" in line


@pytest.mark.slow
def test_results_of_the_last_run_outlive_a_plan_beside_it(comfy, tmp_path):
    """Under the cache that forgets what a prompt lacks; the page asks in this way."""
    (tmp_path / "models").symlink_to(comfy.base / "models")
    graph = Graph()
    sampled = graph.save_latent(graph.sample(graph.loader("flux.safetensors"), "flux"))
    asked = {"class_type": "MXFP8PlanConversion", "inputs": {
        "source": "diffusion_models/flux.safetensors", "preset": "auto"}}  # fmt: skip
    with Server(tmp_path, arguments=("--cache-classic",)) as server:
        first = latents(server.run(graph), sampled, tmp_path)

        def cached() -> set[str]:
            identifier = server.submit(graph)
            server.wait(identifier)
            messages = server.get(f"/history/{identifier}")[identifier]["status"]["messages"]
            return {node for kind, about in messages if kind == "execution_cached"
                    for node in about["nodes"]}  # fmt: skip

        assert cached() == set(graph)
        server.run(Graph({**graph, "mxfp8_plan": asked}), only=["mxfp8_plan"])
        assert cached() == set(graph)
        server.run(Graph({"mxfp8_plan": asked}))
        assert cached() == set()
    assert first.std() > 0
