"""MXFP8RepairFile in the real ComfyUI: what the loaders refuse, repaired and loaded."""

from __future__ import annotations

import json

import bad_files
import pytest
from comfyui import PromptError
from graphs import SAME, Graph, difference, load_ours, ours, run
from quantized_files import make_row_major, write

pytestmark = pytest.mark.comfy


def repair(source: str, target: str = "", scales: str = "auto", overwrite=False):
    graph = Graph()
    node = graph.add(
        "MXFP8RepairFile", source=f"diffusion_models/{source}", target=target, scales=scales,
        overwrite=overwrite,
    )  # fmt: skip
    return graph, node[0]


def test_a_file_without_markers_is_refused_repaired_and_loaded(comfy):
    file = write(comfy, "lost", lambda d: d.unmark())
    graph = Graph()
    graph.save_latent(graph.sample(ours(graph, file), "flux"))
    with pytest.raises(PromptError, match=r"Repair File \(MXFP8\)"):
        comfy.run(graph)

    graph, node = repair(file)
    text = comfy.run(graph)[node]["text"][0]
    assert "markers rebuilt: 13 of 13 layers" in text
    graph = Graph()
    repaired = file.replace(".safetensors", "-repaired.safetensors")
    models = {"repaired": ours(graph, repaired), "good": load_ours(graph, "flux")}
    saved = {name: graph.save_latent(graph.sample(m, "flux")) for name, m in models.items()}
    latent = run(comfy, graph, saved)
    assert difference(latent["repaired"], latent["good"]) < SAME


@pytest.mark.parametrize("scales", ["auto", "row-major"])
def test_row_major_scales_are_repaired(comfy, scales):
    file = write(comfy, f"rows {scales}", make_row_major)
    graph, node = repair(file, f"sub/tiled-{scales}", scales)
    text = comfy.run(graph)[node]["text"][0]
    assert "scales reordered to tiled: 13 of 13 layers" in text
    folder = comfy.base / "models" / "diffusion_models"
    new = bad_files.draft(folder / "sub" / f"tiled-{scales}.safetensors")
    good = bad_files.draft(folder / "flux-mxfp8.safetensors")
    assert new.tensors == good.tensors
    layers = (json.loads(d.metadata[bad_files.HEADER_MARKERS])["layers"] for d in (new, good))
    assert next(layers) == next(layers)


def test_what_cannot_be_repaired_is_said_and_nothing_stays(comfy):
    file = write(comfy, "no scales", bad_files.missing_scale)
    graph, _ = repair(file, "new/folder/file")
    with pytest.raises(PromptError, match="its scales are missing, which cannot be repaired"):
        comfy.run(graph)
    assert not (comfy.base / "models" / "diffusion_models" / "new").exists()
    graph, _ = repair("flux-mxfp8.safetensors")
    with pytest.raises(PromptError, match="nothing to repair"):
        comfy.run(graph)


@pytest.mark.parametrize("target", ["../outside", "/tmp/outside", "a/../../outside"])
def test_no_target_leaves_the_folder_of_its_source(comfy, target):
    graph, _ = repair("flux-mxfp8.safetensors", target)
    with pytest.raises(PromptError, match="outside the folder 'diffusion_models'"):
        comfy.run(graph)
