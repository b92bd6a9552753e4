"""Models in several files, with other names, or with shared tensors: in the real ComfyUI."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import load, same
from comfyui import PromptError
from diffusers_names import rename
from graphs import Graph, convert, latents
from model_folders import write_shards
from safetensors.torch import load_file, save_file

from mxfp8.quant.conversion.convert import convert as convert_source
from mxfp8.quant.conversion.convert import convert_file, plan_source
from mxfp8.quant.sources.file import FileSource

pytestmark = pytest.mark.comfy

DIFFUSERS_INDEX = "diffusion_pytorch_model.safetensors.index.json"


def models(server):
    return server.base / "models" / "diffusion_models"


def pipeline(server, name: str, state) -> None:
    """A model folder as model hubs have them, with the other parts of a pipeline."""
    folder = models(server) / name
    write_shards(folder / "transformer", state, 3, index=DIFFUSERS_INDEX)
    (folder / "model_index.json").write_text('{"_class_name": "Pipeline"}')
    (folder / "vae").mkdir()
    save_file({"decoder.conv_in.weight": torch.ones(4, 4, 3, 3)}, folder / "vae" / "v.safetensors")


def offered(server) -> list[str]:
    node = server.get("/object_info/MXFP8ConvertFile")["MXFP8ConvertFile"]
    return node["input"]["required"]["source"][1]["options"]


def sampled(server, kind: str, *names: str) -> list[torch.Tensor]:
    """Latents of stock's loader and sampler, one per file."""
    graph = Graph()
    nodes = [graph.save_latent(graph.sample(graph.loader(name), kind)) for name in names]
    outputs = server.run(graph)
    return [latents(outputs, node, server.base) for node in nodes]


@pytest.mark.parametrize("kind", ["flux", "flux2"])
def test_a_diffusers_folder_becomes_a_file_that_stock_runs_alike(comfy, kind):
    state = rename(kind, load_file(models(comfy) / f"{kind}.safetensors"))
    name = f"{kind}-hub"
    pipeline(comfy, name, state)
    choices = [choice for choice in offered(comfy) if name in choice]
    assert choices == [f"diffusion_models/{name}", f"diffusion_models/{name}/vae/v.safetensors"]

    graph, node = convert(choices[0])
    outputs = comfy.run(graph)
    report = json.loads(outputs[node[0]]["mxfp8_report"][0])
    assert (report["source"], report["target"]) == (DIFFUSERS_INDEX, f"{name}-mxfp8.safetensors")
    ours, original = sampled(comfy, kind, f"{name}-mxfp8.safetensors", f"{kind}-mxfp8.safetensors")
    assert torch.equal(ours, original)
    assert ours.std() > 0.1


def test_several_files_in_the_model_folder_itself_are_offered_by_their_index(comfy):
    state = load_file(models(comfy) / "flux.safetensors")
    write_shards(models(comfy), state, 2, index="several.safetensors.index.json")
    choice = "diffusion_models/several.safetensors.index.json"
    assert [c for c in offered(comfy) if "several" in c] == [choice]
    for target, name in (("", "several-mxfp8"), ("sub/named", "sub/named")):
        graph, _ = convert(choice, target)
        comfy.run(graph)
        made, original = (load(models(comfy) / f"{n}.safetensors")[0] for n in (name, "flux-mxfp8"))
        assert made.keys() == original.keys()
        assert all(same(made[key], original[key]) for key in made)


def test_two_models_in_one_folder_are_offered_apart(comfy):
    state = load_file(models(comfy) / "flux.safetensors")
    folder = models(comfy) / "two"
    for name in ("one", "other"):
        write_shards(folder, state, 2, index=f"{name}.safetensors.index.json")
    assert [c for c in offered(comfy) if "/two" in c] == [
        f"diffusion_models/two/{name}.safetensors.index.json" for name in ("one", "other")
    ]


def test_a_tensor_kept_once_for_two_names_is_there_under_both(comfy):
    """As safetensors' save_model leaves it; stock reads no notes on shared tensors."""
    state = load_file(models(comfy) / "flux.safetensors")
    stored, left_out = (f"double_blocks.0.{s}_mod.lin.weight" for s in ("img", "txt"))
    state[left_out] = state[stored].clone()
    save_file(state, models(comfy) / "both.safetensors")
    convert_file(models(comfy) / "both.safetensors", models(comfy) / "both-mxfp8.safetensors")
    state.pop(left_out)
    save_file(state, models(comfy) / "tied.safetensors", {left_out: stored})
    graph, _ = convert("diffusion_models/tied.safetensors")
    comfy.run(graph)
    tied, both, other = sampled(
        comfy, "flux", "tied-mxfp8.safetensors", "both-mxfp8.safetensors", "flux-mxfp8.safetensors"
    )
    assert torch.equal(tied, both)
    assert not torch.equal(both, other)


def test_a_file_quantized_under_diffusers_names_is_refused(comfy):
    """As other tools make them; stock runs the raw codes."""
    path = models(comfy) / "renamed.safetensors"
    save_file(rename("flux", load_file(models(comfy) / "flux.safetensors")), path)
    with FileSource(path) as source:
        convert_source(source, path.with_name("raw.safetensors"), plan_source(source))
    graph = Graph()
    model = graph.add("MXFP8Load", model_name="raw.safetensors", precision="exact")
    graph.save_latent(graph.sample(model, "flux"))
    with pytest.raises(PromptError, match="MXFP8 layers of Flux with diffusers' tensor names"):
        comfy.run(graph)


def outside(folder):
    save_file({"a.weight": torch.ones(32, 32)}, folder.parent / "a-00001-of-00002.safetensors")
    weight_map = {"a.weight": "../a-00001-of-00002.safetensors"}
    save_file({"b.weight": torch.ones(32, 32)}, folder / "a-00002-of-00002.safetensors")
    (folder / "a.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def fp8(folder):
    write_shards(folder, {"a.weight": torch.ones(32, 32).to(torch.float8_e4m3fn)}, 2)


def wan(folder):
    keys = ("condition_embedder.time_embedder.linear_1.weight", "blocks.0.attn1.to_q.weight")
    write_shards(folder, {key: torch.ones(32, 32) for key in keys}, 2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (outside, "must be a file in the index's own folder"),
        (fp8, r"already quantized as FP8 \(E4M3\) .*; convert the BF16, FP16 or FP32 original"),
        (wan, "Wan with diffusers' tensor names: .*; convert the model's file for ComfyUI"),
    ],
)
def test_what_cannot_be_converted_is_said_in_the_dialog(comfy, make, words):
    folder = models(comfy) / f"bad-{make.__name__}" / "model"
    folder.mkdir(parents=True)
    make(folder)
    for target in ("", "new/folder/mxfp8"):
        graph, _ = convert(f"diffusion_models/bad-{make.__name__}/model", target)
        with pytest.raises(PromptError, match=words):
            comfy.run(graph)
    assert not list(folder.parent.glob("*mxfp8*"))
    assert not (models(comfy) / "new").exists()


@pytest.mark.parametrize(
    "source",
    [
        "diffusion_models/../../etc",
        "diffusion_models/flux-hub/transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
        f"diffusion_models/flux-hub/transformer/{DIFFUSERS_INDEX}",
    ],
)
def test_only_what_is_offered_can_be_a_source(comfy, source):
    graph, _ = convert(source)
    with pytest.raises(PromptError, match="not in list"):
        comfy.run(graph)
