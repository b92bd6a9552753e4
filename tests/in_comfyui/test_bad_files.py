"""Bad files in the real ComfyUI: what a user reads in the node's dialog, and that all goes on."""

from __future__ import annotations

import re

import bad_files
import pytest
from bad_files import BAD_FILES
from comfyui import PromptError
from graphs import Graph

pytestmark = pytest.mark.comfy

ADVICE = re.compile(  # what every message must have: what to do
    "get (it|the file) again|mxfp8 repair|take the model as|[Cc]onvert (the|its|the file's) "
    "(BF16, FP16 or FP32 )?original|update ComfyUI"
)
FOLDERS = ("diffusion_models", "checkpoints", "text_encoders")


def dialog(comfy, graph: Graph) -> dict:
    """What the browser shows of a workflow that must fail in a node."""
    with pytest.raises(PromptError) as caught:
        comfy.run(graph)
    messages = dict(caught.value.details)
    assert "execution_error" in messages, caught.value
    return messages["execution_error"]


@pytest.fixture
def bad(comfy):
    """Writes a file of the table into every model folder; the files are gone afterwards."""
    models = comfy.base / "models"
    good = models / "diffusion_models" / "flux-mxfp8.safetensors"
    made = []

    def make(defect: str) -> str:
        name = f"bad {defect}.safetensors"
        for folder in FOLDERS:
            target = models / folder / name
            target.parent.mkdir(exist_ok=True)
            made.append(bad_files.write(defect, good, target))
        return name

    yield make
    for path in made:
        path.unlink()


def loaders(name: str) -> dict[str, Graph]:
    """Each of our loaders on a file."""
    graphs = {
        "MXFP8Load": {"model_name": name, "precision": "auto"},
        "MXFP8LoadCheckpoint": {"checkpoint_name": name, "precision": "auto"},
        "MXFP8LoadTextEncoder": {"name": name, "type": "flux"},
    }
    result = {}
    for node, inputs in graphs.items():
        graph = result[node] = Graph()
        graph.add("PreviewAny", source=graph.add(node, **inputs))
    return result


@pytest.mark.parametrize("defect", BAD_FILES)
def test_every_loader_refuses_it_in_words(comfy, bad, defect):
    name = bad(defect)
    for node, graph in loaders(name).items():
        error = dialog(comfy, graph)
        assert error["node_type"] == node
        assert error["exception_type"] == "ValueError"  # which the page shows, without a module
        message = error["exception_message"]
        assert re.search(re.escape(name) + ": .*" + BAD_FILES[defect].rule, message), message
        assert ADVICE.search(message), message
        assert len(message) < 1000


@pytest.mark.parametrize("defect", BAD_FILES)
def test_no_conversion_takes_it_for_an_original(comfy, bad, defect):
    name = bad(defect)
    graph = Graph()
    graph.add(
        "MXFP8ConvertFile", source=f"diffusion_models/{name}", target="from bad",
        preset="auto", overwrite=False,
    )  # fmt: skip
    message = dialog(comfy, graph)["exception_message"]
    assert name in message
    bad_file = BAD_FILES[defect]
    rule = bad_file.rule
    if bad_file.quantized:
        rule += "|already quantized|quantized already"
    assert re.search(rule, message), message
    assert ADVICE.search(message), message
    assert not list((comfy.base / "models").rglob("from bad*"))


# What stock's loader takes without an error (ComfyUI 0.30), and runs wrong or not as it says.
SILENT = [
    "scale shape", "scale cut", "scale flat", "scale dtype", "scale e4m3", "scale nan",
    "all scales nan", "weight bf16", "weight e5m2", "weight u8", "weight 1-D", "convolution",
    "embedding", "odd columns", "missing weight", "marked elsewhere", "group size",
    "true shape larger", "true shape text", "full precision text", "markers disagree on format",
    "markers disagree on shape", "marker json", "marker list", "marker nested",
    "marker oversized", "marker dtype", "lost markers", "lost markers and scales",
    "duplicate key",
]  # fmt: skip


@pytest.mark.parametrize("defect", SILENT)
def test_accelerating_what_stock_loaded_checks_its_file(comfy, bad, defect):
    graph = Graph()
    name = bad(defect)
    accelerated = graph.add("MXFP8Accelerate", model=graph.loader(name), precision="exact")
    graph.save_latent(graph.sample(accelerated, "flux"))
    error = dialog(comfy, graph)
    assert error["node_type"] == "MXFP8Accelerate"
    message = error["exception_message"]
    assert re.search(BAD_FILES[defect].rule, message), message
    assert ADVICE.search(message), message


@pytest.mark.parametrize("node", ["MXFP8Quantize", "MXFP8SaveModel"])
def test_raw_codes_that_stock_loaded_are_not_taken_for_weights(comfy, bad, node):
    graph = Graph()
    model = graph.loader(bad("lost markers"))
    if node == "MXFP8Quantize":
        model = graph.add(node, model=model, preset="auto", precision="exact")
    graph.add("MXFP8SaveModel", model=model, filename_prefix="diffusion_models/raw")
    error = dialog(comfy, graph)
    assert error["node_type"] == node
    assert "holds MXFP8 codes, which ComfyUI uses as weights" in error["exception_message"]
    assert not list((comfy.base / "output").rglob("raw*"))
