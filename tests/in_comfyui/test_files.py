"""MXFP8ConvertFile, and a model of real width: in the real ComfyUI."""

from __future__ import annotations

import json
import shutil

import numpy
import pytest
from comfyui import TESTS, PromptError, Server, make_models
from graphs import Graph, convert, difference, interrupt, latents, output_files, unload, watch
from PIL import Image

from mxfp8.quant.format import read_header
from mxfp8.quant.reports.conversion import Report

pytestmark = pytest.mark.comfy


def leftovers(server: Server) -> list:
    return list(server.base.rglob("*.part"))


def test_a_file_becomes_what_the_command_makes_of_it(comfy):
    graph, node = convert(target="sub/folder/converted")
    outputs = comfy.run(graph)[node[0]]
    folder = comfy.base / "models" / "diffusion_models"
    target = folder / "sub" / "folder" / "converted.safetensors"
    assert target.read_bytes() == (folder / "flux-mxfp8.safetensors").read_bytes()
    report = Report.from_json(outputs["mxfp8_report"][0])
    assert report.target == "converted.safetensors"
    in_blocks = sum(layer.bytes_before for layer in report.quantized)
    assert in_blocks > 0.7 * report.bytes_before
    assert report.bytes_after < report.bytes_before - 0.45 * in_blocks  # a bit more than half
    assert report.summary() == outputs["text"][0]


def test_the_new_file_goes_on_to_a_loader(comfy):
    graph, node = convert(target="sub/goes-on")
    model = graph.add("UNETLoader", unet_name=[node[0], 1], weight_dtype="default")
    report = graph.add("MXFP8BackendReport", model=model, measure=False, rows=64)
    layers = json.loads(comfy.run(graph)[report[0]]["mxfp8_report"][0])["layers"]
    assert any(layer["decision"] == "mxfp8" for layer in layers)


def batch(sources: str, **options) -> tuple[Graph, list]:
    graph = Graph()
    options = {"preset": "auto", "overwrite": False, **options}
    return graph, graph.add("MXFP8ConvertFiles", sources=sources, **options)


@pytest.fixture
def several(comfy):
    """A folder in the model folder: two models, and a file that is none."""
    models = comfy.base / "models" / "diffusion_models"
    folder = models / "several"
    (folder / "inner").mkdir(parents=True)
    for kind, name in (("flux", "one"), ("wan", "inner/two")):
        (folder / f"{name}.safetensors").hardlink_to(models / f"{kind}.safetensors")
    (folder / "lora.safetensors").hardlink_to(comfy.base / "models/loras/lora.safetensors")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("sources", ["diffusion_models/several", "diffusion_models/sev*\n\n"])
def test_a_folder_or_a_pattern_is_converted_and_an_interrupted_batch_goes_on(
    comfy, several, sources
):
    graph, node = batch(sources, dry_run=True)
    lines = comfy.run(graph)[node[0]]["text"][0].splitlines()
    assert lines[-1].startswith("2 planned, 1 skipped")
    targets = [several / "one-mxfp8.safetensors", several / "inner" / "two-mxfp8.safetensors"]
    assert not any(target.exists() for target in targets)

    graph, node = batch(sources)
    lines = comfy.run(graph)[node[0]]["text"][0].splitlines()
    assert lines[-1].startswith("2 converted, 1 skipped")
    models = comfy.base / "models" / "diffusion_models"
    for target, kind in zip(targets, ("flux", "wan"), strict=True):
        assert target.read_bytes() == (models / f"{kind}-mxfp8.safetensors").read_bytes()

    targets[0].unlink()
    graph, node = batch(sources)
    lines = comfy.run(graph)[node[0]]["text"][0].splitlines()
    assert lines[-1].startswith("1 converted, 2 skipped")


@pytest.mark.parametrize("sources", ["", "loras", "../*", "/etc/*", "diffusion_models/no such*"])
def test_a_batch_finds_only_what_the_list_has(comfy, sources):
    graph, _ = batch(sources)
    with pytest.raises(PromptError, match=r"no source is given|no model fits"):
        comfy.run(graph)


def test_progress_reaches_the_browser(comfy):
    graph, node = convert(target="progress")
    bar = watch(comfy, graph)[0][node[0]]
    total = (comfy.base / "models" / "diffusion_models/flux.safetensors").stat().st_size
    assert bar == sorted(bar)
    assert bar[-1][0] == bar[-1][1] > 0.99 * total


def test_an_existing_file_is_replaced_only_when_asked(comfy):
    target = comfy.base / "models" / "diffusion_models" / "mine.safetensors"
    target.write_bytes(b"mine")
    graph, _ = convert(target="mine")
    with pytest.raises(PromptError, match="turn on overwrite"):
        comfy.run(graph)
    assert target.read_bytes() == b"mine"
    graph, _ = convert(target="mine", overwrite=True)
    comfy.run(graph)
    assert read_header(target).layers


def ran(comfy, graph: Graph, node: list) -> bool:
    """Run a workflow; whether the node ran, or ComfyUI handed out its last result."""
    messages = comfy.wait(comfy.submit(graph))["status"]["messages"]
    (cached,) = [data["nodes"] for kind, data in messages if kind == "execution_cached"]
    return node[0] not in cached


def test_a_deleted_file_is_written_again_and_a_changed_source_is_seen(comfy):
    folder = comfy.base / "models" / "diffusion_models"
    source, target = folder / "again.safetensors", folder / "again-mxfp8.safetensors"
    shutil.copyfile(folder / "flux.safetensors", source)
    graph, node = convert("diffusion_models/again.safetensors")
    for _ in range(2):
        assert ran(comfy, graph, node)
        assert not ran(comfy, graph, node)
        target.unlink()
    assert ran(comfy, graph, node)
    shutil.copyfile(folder / "wan.safetensors", source)
    with pytest.raises(PromptError, match="exists"):
        comfy.run(graph)
    graph, node = convert("diffusion_models/again.safetensors", overwrite=True)
    assert ran(comfy, graph, node)
    assert target.read_bytes() == (folder / "wan-mxfp8.safetensors").read_bytes()
    assert not ran(comfy, graph, node)
    source.unlink()
    target.unlink()


def test_a_linked_model_is_converted_beside_its_link(comfy, tmp_path):
    folder = comfy.base / "models" / "diffusion_models"
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes((folder / "flux.safetensors").read_bytes())
    (folder / "linked.safetensors").symlink_to(elsewhere)
    for target in ("", "linked-named"):
        graph, _ = convert("diffusion_models/linked.safetensors", target)
        comfy.run(graph)
    assert read_header(folder / "linked-mxfp8.safetensors").layers
    assert read_header(folder / "linked-named.safetensors").layers
    assert list(tmp_path.iterdir()) == [elsewhere]


@pytest.mark.parametrize("target", ["../outside", "/tmp/outside", "a/../../outside"])
def test_no_target_leaves_the_folder_of_its_source(comfy, target):
    graph, _ = convert(target=target)
    with pytest.raises(PromptError, match="outside the folder 'diffusion_models'"):
        comfy.run(graph)
    assert not list(comfy.base.rglob("outside*"))


@pytest.mark.parametrize("source", ["loras/lora.safetensors", "../x.safetensors", "/etc/passwd"])
def test_no_source_lies_outside_the_model_folders(comfy, source):
    graph, _ = convert(source=source)
    with pytest.raises(PromptError, match="not in list"):
        comfy.run(graph)


@pytest.fixture(scope="module")
def zimage(tmp_path_factory):
    """A server of its own, so that memory is this model's, with a Z-Image of full width."""
    base = tmp_path_factory.mktemp("zimage")
    make_models(base, "zimage", "vae")
    nodes = TESTS / "comfy_nodes" / "mxfp8_test_nodes"
    with Server(base, (nodes,), ["--disable-metadata"]) as server:
        yield server
    for path in base.rglob("*.safetensors"):
        path.unlink()


def test_a_model_of_908_million_parameters_in_bounded_memory(zimage):
    graph = Graph()
    before = graph.add("TestMemory", model=graph.loader("zimage.safetensors"))
    quantized = graph.add("MXFP8Quantize", model=before, preset="auto", precision="exact")
    after = graph.add("TestMemory", model=quantized)
    saving = graph.add("MXFP8SaveModel", model=after, filename_prefix="diffusion_models/zimage")
    outputs = zimage.run(graph)

    (held, _), (_, peak) = (json.loads(outputs[n[0]]["result"][0]) for n in (before, after))
    assert peak - held <= 1e9  # above the process with the input model in it
    report = Report.from_json(outputs[quantized[0]]["mxfp8_report"][0])
    assert (report.architecture, report.preset) == ("Z-Image", "zimage")
    assert sum(layer.shape[0] * layer.shape[1] for layer in report.layers) > 900e6

    name = outputs[saving[0]]["text"][0].split(":")[0]
    path = zimage.base / "output" / "diffusion_models" / name
    assert set(read_header(path).metadata) == {"_quantization_metadata"}  # --disable-metadata

    unload(zimage)
    graph = Graph()
    ours = graph.add("MXFP8Load", model_name=name, precision="auto")
    models = {"bf16": graph.loader("zimage.safetensors"), "mxfp8": ours}
    samples = {name: graph.sample(model, "zimage") for name, model in models.items()}
    saved = {name: graph.save_latent(latent) for name, latent in samples.items()}
    image = graph.save_image(samples["mxfp8"], "vae.safetensors")
    outputs = zimage.run(graph)
    latent = {name: latents(outputs, node, zimage.base) for name, node in saved.items()}
    assert 1e-4 < difference(latent["mxfp8"], latent["bf16"]) < 0.1
    (picture,) = output_files(outputs, image, zimage.base, "images")
    assert numpy.asarray(Image.open(picture)).std() > 1


def test_an_interrupt_stops_a_conversion_before_more_is_read_than_it_holds(zimage):
    """Of 1.8 GB, 128 MB may be in memory, in slabs of 3.9 MB."""
    graph, _ = convert("diffusion_models/zimage.safetensors", target="interrupted")
    assert interrupt(zimage, graph, "kernels", "quantize_and_measure", call=100) <= 128 / 3.9
    assert leftovers(zimage) == []
    assert not list(zimage.base.rglob("interrupted*"))
