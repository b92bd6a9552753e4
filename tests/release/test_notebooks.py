"""The notebooks: their form, what they name, and how they say no; then all of their cells."""

from __future__ import annotations

import ast
import base64
import io
import os
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from comfyui import ROOT, comfyui_path, free_port, make_models
from IPython.core.inputtransformer2 import TransformerManager
from notebooks import (
    FOLDER,
    NOTEBOOKS,
    code,
    execute,
    hub,
    printed,
    read,
    repository,
    with_parameters,
)
from PIL import Image
from transformers import AutoTokenizer

from mxfp8.quant.cli import parser

EVERY = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
COMFYUI = FOLDER / "z_image_turbo_mxfp8.ipynb"
DIFFUSERS = FOLDER / "diffusers_mxfp8.ipynb"
SHARED = ("memory", "gpu", "commands", "files")  # cells that are the same in all


def strings(source: str, function: str) -> list[list[str]]:
    """The arguments that are literal strings, of every call of a function."""
    return [
        [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == function
    ]


def test_there_are_notebooks():
    assert set(NOTEBOOKS) >= {COMFYUI, DIFFUSERS}


@EVERY
def test_a_notebook_is_valid_and_has_not_been_run(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.execution_count, cell.outputs) == (None, []), cell.id
    # As Jupyter writes it: a change of a cell is a change of its lines and no others.
    assert path.read_text(encoding="utf-8") == nbformat.writes(notebook) + "\n"


@EVERY
def test_the_cells_of_a_notebook_compile(path):
    for name, source in code(read(path)).items():
        compile(TransformerManager().transform_cell(source), name, "exec")
        # IPython goes on after a shell command that failed.
        assert not re.search(r"(?m)^\s*[!%]", source), name


@EVERY
def test_a_notebook_opens_in_colab_and_says_what_has_not_run(path):
    text = read(path).cells[0].source
    address = re.search(r'^Repository = "https://github.com/(.+)"$', pyproject(), re.MULTILINE)[1]
    place = f"{address}/blob/main/{path.relative_to(ROOT).as_posix()}"
    badge = "https://colab.research.google.com/assets/colab-badge.svg"
    assert text.startswith(
        f"[![Open in Colab]({badge})](https://colab.research.google.com/github/{place})\n"
    )
    assert "**No T4 has run this notebook yet.**" in text


def pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@EVERY
def test_links_to_this_repository_lead_somewhere(path):
    (address,) = re.findall(r'^Repository = "(.+)"$', pyproject(), re.MULTILINE)
    text = "\n".join(cell.source for cell in read(path).cells)
    for kind, name in re.findall(rf"{address}/(blob|tree)/main/([^)#\s]+)", text):
        assert (ROOT / name).is_file() == (kind == "blob"), name


@EVERY
def test_a_notebooks_commands_exist(path):
    commands = [
        words[1:]
        for source in code(read(path)).values()
        for words in strings(source, "run")
        if words[:1] == ["mxfp8"]
    ]
    assert commands
    known = parser()
    (choices,) = (a.choices for a in known._actions if getattr(a, "choices", None))
    for name, *options in commands:
        assert set(options) <= set(choices[name]._option_string_actions), (name, options)


@EVERY
def test_cells_that_notebooks_share_are_the_same(path):
    ours, first = code(read(path)), code(read(NOTEBOOKS[0]))
    for name in SHARED:
        assert ours[name] == first[name]


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """gpu(what nvidia-smi prints, or None where it fails): run the cell that checks the GPU."""

    def check(answer: str | None) -> None:
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\nprintf '{answer or ''}'\nexit {int(answer is None)}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        cells = code(read(COMFYUI))
        space: dict = {}
        for name in ("parameters", "memory", "gpu"):
            exec(cells[name], space)  # noqa: S102

    return check


def test_a_t4_is_named(gpu, capsys):
    gpu("Tesla T4, 7.5, 15360")
    assert capsys.readouterr().out == "Tesla T4, compute capability 7.5, 16.1 GB\n"


def test_a_p100_is_refused_by_name(gpu):
    with pytest.raises(RuntimeError, match=r"Tesla P100-PCIE-16GB is too old: .*sm_60.*T4"):
        gpu("Tesla P100-PCIE-16GB, 6.0, 16384")


@pytest.mark.parametrize("answer", [None, ""])
def test_without_a_gpu_the_notebook_says_so(gpu, answer):
    with pytest.raises(RuntimeError, match=r"There is no GPU. Choose a T4. Colab: "):
        gpu(answer)


def test_other_parameters_leave_the_cells_unchanged():
    notebook = read(COMFYUI)
    changed = with_parameters(notebook, {"CPU": True})
    assert code(notebook).items() < code(changed).items()
    space: dict = {}
    for source in list(code(changed).values())[:2]:
        exec(source, space)  # noqa: S102
    assert space["CPU"] is True
    with pytest.raises(ValueError, match="no \\['GPU'\\]"):
        with_parameters(notebook, {"GPU": True})


STEP = re.compile(r"^(.+): ([\d.]+) s, RAM ([\d.]+) GB, GPU ([\d.]+) GB$", re.MULTILINE)


def steps(notebook) -> list[str]:
    """What was timed, in order."""
    return [line[1] for cell in code(notebook) for line in STEP.finditer(printed(notebook, cell))]


def pictures(notebook, cell: str) -> list[Image.Image]:
    """The pictures that a cell shows."""
    (found,) = (c for c in notebook.cells if c.id == cell)
    data = (o.data["image/png"] for o in found.outputs if o.output_type == "display_data")
    return [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in data]


def run(path, folder: Path, files: Path, **parameters):
    """A notebook after a run in a folder, with small models from a folder of files."""
    notebook = with_parameters(
        read(path),
        {
            "PACK_GIT": repository(ROOT, folder / "pack.git"),
            "REPOSITORY": "tests/small",
            "CPU": True,
            **parameters,
        },
    )
    place = folder / "hub" / "tests" / "small" / "resolve" / "main"
    place.parent.mkdir(parents=True)
    place.symlink_to(files, target_is_directory=True)
    with hub(folder / "hub") as address:
        execute(notebook, folder, {"HF_ENDPOINT": address, "HF_HOME": str(folder / "cache")})
    assert not list((folder / "work" / "downloads").rglob("*.safetensors"))
    return notebook


def check_pictures(notebook, side: int) -> None:
    """Two of them, neither flat nor the same."""
    first, second = (np.array(picture, dtype=float) for picture in pictures(notebook, "draw"))
    assert first.shape == second.shape == (side, side, 3)
    assert min(first.std(), second.std(), (first - second).std()) > 10


def converted_layers(notebook) -> list[int]:
    """How many layers of each file became MXFP8."""
    return [int(n) for n in re.findall(r"(\d+) layers MXFP8", printed(notebook, "convert"))]


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.comfy
def test_the_notebook_for_comfyui_draws(tmp_path):
    """With a small Flux and Qwen3 0.6B, which it converts, and ComfyUI on the CPU."""
    make_models(tmp_path, "flux", "qwen3", "vae")
    notebook = run(
        COMFYUI,
        tmp_path,
        tmp_path / "models",
        COMFYUI_GIT=repository(comfyui_path(), tmp_path / "comfyui.git", "v0.30.0"),
        MODEL="diffusion_models/flux.safetensors",
        TEXT_ENCODER="text_encoders/qwen3.safetensors",
        VAE="vae/vae.safetensors",
        PORT=free_port(),
    )
    assert steps(notebook) == [
        "install",
        "download diffusion_models/flux.safetensors", "convert diffusion_models/flux.safetensors",
        "download text_encoders/qwen3.safetensors", "convert text_encoders/qwen3.safetensors",
        "download vae/vae.safetensors",
        "start ComfyUI", "load and draw", "draw again", "time the layers",
    ]  # fmt: skip
    assert converted_layers(notebook) == [13, 196]
    check_pictures(notebook, 1024)
    report = printed(notebook, "report")
    assert re.search(r"^Flux on cpu: 13 MXFP8 layers", report, re.MULTILINE)
    assert re.search(r" as stock| than stock", report)
    assert "manual cast: torch.float32" in report


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_notebook_for_diffusers_draws(tmp_path):
    """With a small Z-Image and Qwen3, which it converts."""
    from diffusers_pipeline import draw_plain, write_files  # diffusers takes seconds to import

    files = tmp_path / "files"
    qwen = comfyui_path() / "comfy" / "text_encoders" / "qwen25_tokenizer"
    write_files(files, AutoTokenizer.from_pretrained(qwen))
    notebook = run(
        DIFFUSERS,
        tmp_path,
        files,
        MODEL="transformer.safetensors",
        TEXT_ENCODER="text_encoder.safetensors",
        PIPELINE=str(files / "pipeline"),
    )
    assert steps(notebook) == [
        "install",
        "download transformer.safetensors", "convert transformer.safetensors",
        "download text_encoder.safetensors", "convert text_encoder.safetensors",
        "load the text encoder", "encode the prompt", "load the model", "draw", "draw again",
    ]  # fmt: skip
    assert converted_layers(notebook) == [15, 14]
    check_pictures(notebook, 512)
    # What its files are worth: the dequantized weights in plain diffusers.
    known: dict = {}
    exec(code(notebook)["parameters"], known)  # noqa: S102
    large = draw_plain(files / "pipeline", tmp_path / "work", known["PROMPT"], seed=1)
    expected = np.array(large.resize((512, 512)), dtype=float)
    found = np.array(pictures(notebook, "draw")[0], dtype=float)
    assert np.abs(found - expected).mean() < 0.5  # of 255: float32, in another order of sums
