"""The notebook for ComfyUI: its nodes and their inputs exist, and its workflow draws."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from graphs import output_files
from notebooks import FOLDER, code, read
from PIL import Image
from workflows import set_inputs, use_tiny_models

pytestmark = pytest.mark.comfy

CELLS = code(read(FOLDER / "z_image_turbo_mxfp8.ipynb"))


def test_every_node_and_input_exists(comfy):
    known = comfy.get("/object_info")
    calls = [
        call
        for source in CELLS.values()
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "node"
    ]
    assert len(calls) == 11
    for call in calls:
        name = call.args[0].value
        inputs, given = known[name]["input"], {word.arg for word in call.keywords}
        assert inputs["required"].keys() <= given, name
        assert given <= inputs["required"].keys() | inputs.get("optional", {}).keys(), name
        for word in call.keywords:
            if isinstance(word.value, ast.Constant) and isinstance(word.value.value, str):
                kind, *options = (inputs["required"] | inputs.get("optional", {}))[word.arg]
                choices = options[0].get("options") if kind == "COMBO" else kind
                if isinstance(choices, list):
                    assert word.value.value in choices, (name, word.arg)


def test_the_workflow_draws(comfy):
    space = dict.fromkeys(("model", "text_encoder", "vae"), Path("file"))
    for cell in ("parameters", "graph"):
        exec(CELLS[cell], space)  # noqa: S102
    graph = space["graph"]
    use_tiny_models(graph)
    set_inputs(graph, "VAELoader", vae_name="vae.safetensors")
    (image,) = output_files(comfy.run(graph), ["saved"], comfy.base, "images")
    assert Image.open(image).size == (64, 64)
