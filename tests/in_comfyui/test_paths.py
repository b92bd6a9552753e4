"""Hostile names and values over POST /prompt: nothing outside ComfyUI's folders is touched."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
from comfyui import PromptError, comfyui_path
from graphs import Graph, unload

pytestmark = pytest.mark.comfy

TOKEN = f"escaped-{uuid.uuid4().hex[:8]}"  # in every hostile name; looked for everywhere after

# Names that lead out of a folder, on some system.
OUTSIDE = [
    f"../{TOKEN}", f"../../../../../../../../tmp/{TOKEN}", f"a/../../{TOKEN}", f"/tmp/{TOKEN}",
    f"//tmp/{TOKEN}", f"./../{TOKEN}", f"..\\{TOKEN}", f"a\\..\\..\\{TOKEN}", f"a/..\\../{TOKEN}",
    f"\\\\server\\share\\{TOKEN}", f"\\{TOKEN}", f"C:\\{TOKEN}", f"C:{TOKEN}", f"C:/{TOKEN}",
    f"\\\\?\\C:\\{TOKEN}", f"file:///tmp/{TOKEN}",
]  # fmt: skip
# Names that some system cannot store, or takes for another.
UNFIT = [
    f"{TOKEN}\0", f"{TOKEN}\0.txt", f"a\0/../../{TOKEN}", f"{TOKEN}\n", f"{TOKEN}\r\nx", "\x1b[2J",
    f"{TOKEN}\u202etxt", f"{TOKEN}\ud800", TOKEN + "x" * 300, "x/" * 400 + TOKEN,
    TOKEN + "x" * 100_000, "../" * 30_000 + TOKEN, f"{TOKEN} ", f" {TOKEN}", f"{TOKEN}.",
    f"{TOKEN}./x", f"{TOKEN} /x", "CON", "con.safetensors", f"{TOKEN}/NUL", "aux.x.y", "COM1",
    "lpt9 .x", f"{TOKEN}*", f"{TOKEN}?", f"{TOKEN}|x", f'"{TOKEN}"', f"<{TOKEN}>", ".", "..",
    f"{TOKEN}/", f"{TOKEN}/.", f"{TOKEN}/..",
]  # fmt: skip
# What JSON can hold where a name is expected. A list means a link to another node's output.
VALUES = [
    None, True, 0, 1.5, -1, {}, [], ["1"], ["1", 0], ["99", 0], [["1", 0], 0], {"a": 1},
    {"__value__": ["1", 0]}, {"__value__": None}, ["../x", "../y"],
]  # fmt: skip

MODEL_INPUTS = {
    "MXFP8Load": {"model_name": "flux-mxfp8.safetensors", "precision": "auto"},
    "MXFP8LoadCheckpoint": {"checkpoint_name": "checkpoint-mxfp8.safetensors", "precision": "auto"},
    "MXFP8LoadTextEncoder": {
        "name": "text.safetensors", "type": "flux", "name2": "none", "name3": "none",
        "name4": "none", "device": "default",
    },
    "MXFP8ConvertFile": {
        "source": "diffusion_models/flux.safetensors", "target": f"{TOKEN}", "preset": "auto",
        "overwrite": False,
    },
    "MXFP8RepairFile": {
        "source": "diffusion_models/flux-mxfp8.safetensors", "target": f"{TOKEN}",
        "scales": "auto", "overwrite": False,
    },
}  # fmt: skip
# These take a model, from the first of the loaders.
TAKES_MODEL = {
    "MXFP8Accelerate": {"precision": "auto"},
    "MXFP8Quantize": {"preset": "auto", "precision": "auto"},
}
CHOICES = [
    (node, widget)
    for node, inputs in (MODEL_INPUTS | TAKES_MODEL).items()
    for widget in inputs
    if widget not in ("target", "overwrite")
]


@pytest.fixture(scope="module")
def names(comfy):
    """A text encoder to choose, and folders that lead out of the model and output folders."""
    unload(comfy)  # else temporary files of earlier tests may go while folders are compared
    models = comfy.base / "models"
    folder = models / "text_encoders"
    folder.mkdir(exist_ok=True)
    (folder / "text.safetensors").write_bytes(b"")
    outside = comfy.base.parent / f"outside-{uuid.uuid4().hex[:8]}"
    outside.mkdir()
    (outside / "mine.safetensors").write_bytes(b"mine")
    (comfy.base / "output").mkdir(exist_ok=True)
    links = [models / "diffusion_models" / "linked", comfy.base / "output" / "linked"]
    for link in links:
        link.symlink_to(outside, target_is_directory=True)
    yield outside
    for link in links:
        link.unlink()
    (folder / "text.safetensors").unlink()


def tree(*roots: Path) -> dict:
    """Every path below with its size and time of change, but for what the server may write."""
    result = {}
    for root in roots:
        for folder, _, names in os.walk(root):
            for name in [*names, "."]:
                path = Path(folder, name)
                status = path.lstat()
                result[str(path)] = status.st_size * (name != "."), status.st_mtime_ns
    return {k: v for k, v in result.items() if not k.endswith(("server.log", ".pyc"))}


def around(comfy) -> dict:
    """All that the server could reach near its folders, and the names at likely targets."""
    entries = tree(comfy.base, *(p for p in comfy.base.parent.glob("outside*")))
    for folder in (Path("/"), Path("/tmp"), Path.home(), comfy.base.parent, comfyui_path()):
        entries |= {str(folder / n): None for n in os.listdir(folder) if TOKEN in n or "C:" in n}
    return entries


def message(comfy, graph: Graph) -> str:
    """The failure of a workflow, refused or failed in a node; its kind must be a foreseen one."""
    with pytest.raises(PromptError) as caught:
        comfy.run(graph)
        pytest.fail(f"accepted: {str(graph)[:500]}")
    details = caught.value.details
    if isinstance(details, dict):  # refused before it ran
        assert details["error"]["type"] or details["node_errors"]
        return str(caught.value)
    error = dict(details)["execution_error"]
    assert error["exception_type"] in ("ValueError", "FileNotFoundError", "Exception"), error
    return error["exception_message"]


def loading(node: str, widget: str, value) -> Graph:
    graph = Graph()
    inputs = {**(MODEL_INPUTS | TAKES_MODEL)[node], widget: value}
    if node in TAKES_MODEL:
        loader = "MXFP8Load"
        inputs["model"] = graph.add(loader, **MODEL_INPUTS[loader])
    graph.add("PreviewAny", source=graph.add(node, **inputs))
    return graph


@pytest.mark.parametrize(("node", "widget"), CHOICES)
def test_only_what_a_list_offers_can_be_chosen(comfy, names, node, widget):
    before = around(comfy)
    for value in (*OUTSIDE, *UNFIT, "", " ", "/etc/passwd", "linked/../../x", "loras/lora"):
        assert "not in list" in message(comfy, loading(node, widget, value)), value[:80]
    for value in VALUES:
        message(comfy, loading(node, widget, value))
    assert around(comfy) == before


def converting(node: str = "MXFP8ConvertFile", **inputs) -> Graph:
    graph = Graph()
    graph.add(node, **{**MODEL_INPUTS[node], **inputs})
    return graph


def saving(comfy, prefix) -> Graph:
    graph = Graph()
    model = graph.add("MXFP8Load", **MODEL_INPUTS["MXFP8Load"])
    graph.add("MXFP8SaveModel", model=model, filename_prefix=prefix)
    return graph


@pytest.mark.parametrize("node", ["MXFP8ConvertFile", "MXFP8RepairFile"])
def test_no_target_leaves_its_folder_or_fits_only_some_systems(comfy, names, node):
    before = around(comfy)
    for target in OUTSIDE:
        error = message(comfy, converting(node, target=target))
        assert "outside the folder" in error or "Windows does not allow" in error, target
    for target in UNFIT:
        error = message(comfy, converting(node, target=target))
        assert "target " in error, error
        assert len(error) < 4000
    for target in ("linked/x", "linked/mine", "linked/../../x", "linked"):
        if target != "linked":  # that is linked.safetensors, a name of its own
            for overwrite in (False, True):
                graph = converting(node, target=target, overwrite=overwrite)
                assert "outside the folder" in message(comfy, graph)
    assert around(comfy) == before


def test_no_prefix_of_a_saved_model_leaves_the_output_folder_or_fits_only_some_systems(
    comfy, names
):
    before = around(comfy)
    for prefix in OUTSIDE:
        error = message(comfy, saving(comfy, prefix))
        assert "outside the output folder" in error or "Windows does not allow" in error, prefix
    for prefix in (*UNFIT, "", " "):
        assert "filename_prefix " in message(comfy, saving(comfy, prefix)), prefix[:80]
    for prefix in ("linked/x", "linked/sub/x"):
        assert "outside the output folder" in message(comfy, saving(comfy, prefix))
    assert around(comfy) == before


def test_values_that_are_no_names_stay_inside_too(comfy, names):
    """ComfyUI makes text of them: null becomes "None"."""
    before = around(comfy)
    inside = comfy.base / "models" / "diffusion_models"
    for value in VALUES:
        for graph in (converting(target=value), saving(comfy, value)):
            try:
                comfy.run(graph)
            except PromptError:
                continue
    for path in around(comfy).keys() - before.keys():
        assert Path(path).is_relative_to(inside) or Path(path).is_relative_to(comfy.base / "output")
        if Path(path).is_file():
            Path(path).unlink()


def test_names_in_other_alphabets_are_names(comfy, names):
    """Look-alikes of dots and slashes are letters to a file system."""
    inside = comfy.base / "models" / "diffusion_models"
    made = (
        "mod\xe8le",
        "\u6a21\u578b",
        f"\uff0e\uff0e\u2215{TOKEN}",
        f"..%2f{TOKEN}",
        f"~{TOKEN}",
        f"${TOKEN}",
        f"-{TOKEN}",
    )
    for name in made:
        comfy.run(converting(target=name))
        (inside / f"{name}.safetensors").unlink()


def test_a_linked_folder_is_read_but_not_written(comfy, names):
    """Users link folders of models; a file is not written through such a link."""
    models = comfy.base / "models" / "diffusion_models"
    (names / "there.safetensors").write_bytes((models / "flux.safetensors").read_bytes())
    before = tree(names)
    source = "diffusion_models/linked/there.safetensors"
    error = message(comfy, converting(source=source, target=""))
    assert "outside the model folder 'diffusion_models'" in error
    assert tree(names) == before
    comfy.run(converting(source=source, target=f"{TOKEN}-2"))
    assert (models / f"{TOKEN}-2.safetensors").is_file()
    (models / f"{TOKEN}-2.safetensors").unlink()


def test_a_link_is_no_target_even_to_overwrite(comfy, names):
    link = comfy.base / "models" / "diffusion_models" / "link.safetensors"
    link.symlink_to(names / "mine.safetensors")
    for overwrite in (False, True):
        error = message(comfy, converting(target="link", overwrite=overwrite))
        assert "outside the folder" in error
    assert (names / "mine.safetensors").read_bytes() == b"mine"
    assert link.is_symlink()
    link.unlink()


@pytest.mark.parametrize("widget", ["include", "exclude"])
def test_expressions_that_are_none_are_refused(comfy, names, widget):
    before = around(comfy)
    for value in ("(", "[", "*", "a{2,1}", "(?P<a", "\\", "(?i)(", "x" * 100_000 + "("):
        error = message(comfy, converting(**{widget: value}))
        assert f"{widget} " in error and "is not a regular expression" in error
    assert around(comfy) == before


@pytest.mark.parametrize("expression", [r"(.|.)+[^t]$", r"^(.|.)+(?<!t)$"])
def test_an_expression_that_never_ends_does_not_stop_the_server(comfy, names, expression):
    """Python's matcher holds the interpreter's lock, so the whole server would stand still."""
    for widget in ("include", "exclude"):
        assert "takes too long" in message(comfy, converting(**{widget: expression}))
