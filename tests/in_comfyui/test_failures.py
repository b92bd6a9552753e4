"""A node that fails leaves the server and every other model as they were: in the real ComfyUI."""

from __future__ import annotations

import contextlib
import resource
import shutil
import stat
import time

import pytest
from checkpoints import load
from comfyui import TESTS, PromptError, Server
from graphs import SAME, Graph, difference, load_ours, run, unload, with_lora
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def reference(comfy):
    """What the models of these tests sample where nothing has failed, by name and steps."""
    graph, saved = Graph(), {}
    for name, model in models(graph).items():
        for steps in (1, 2, 3):
            saved[name, steps] = graph.save_latent(graph.sample(model, "flux", steps))
    latent = run(comfy, graph, saved)
    unload(comfy)
    return latent


def models(graph: Graph) -> dict[str, list]:
    """The models that are loaded before a failure, and looked at after it."""
    ours, bf16 = load_ours(graph, "flux"), graph.loader("flux.safetensors")
    return {
        "ours": ours,
        "bf16": bf16,
        "lora": with_lora(graph, ours),
        "quantized": graph.add(
            "MXFP8Quantize", model=bf16, preset="auto", precision="exact"
        ),
    }  # fmt: skip


def save(graph: Graph, model: list, prefix: str = "diffusion_models/failing") -> list:
    return graph.add("MXFP8SaveModel", model=model, filename_prefix=prefix)


def check_failure(comfy, reference, fail, message: str, condition=contextlib.nullcontext) -> str:
    """Fail with all models loaded and sampled; then they sample what they sampled before.

    Args:
        fail: adds the node that fails to a graph, given its models.
        condition: a context for the workflow that fails.
    """
    graph = Graph()
    loaded = models(graph)
    saved = {name: graph.save_latent(graph.sample(m, "flux", 1)) for name, m in loaded.items()}
    comfy.run(graph)
    before = contents(comfy)
    fail(graph, loaded)
    with condition(), pytest.raises(PromptError, match=message) as caught:
        comfy.run(graph)
    check_files(comfy, before)

    graph = Graph()  # the same loaders: what they loaded is kept
    loaded = models(graph)
    saved = {name: graph.save_latent(graph.sample(m, "flux", 2)) for name, m in loaded.items()}
    latent = run(comfy, graph, saved)
    for name in loaded:
        assert difference(latent[name], reference[name, 2]) < SAME, name
    unload(comfy)
    graph = Graph()  # and newly loaded
    model = load_ours(graph, "flux")
    latent = run(comfy, graph, {"ours": graph.save_latent(graph.sample(model, "flux", 3))})
    assert difference(latent["ours"], reference["ours", 3]) < SAME
    return str(caught.value)


def contents(comfy) -> set:
    """Model files, temporary ones too, and anything half-written."""
    folders = [comfy.base / name for name in ("models", "output", "temp")]
    files = {p for folder in folders for p in folder.rglob("*") if p.is_file()}
    return {p for p in files if p.suffix not in (".latent", ".png")}


def check_files(comfy, before: set) -> None:
    """No file came or went since `before`, but for temporary ones: they go with their models, which
    the server drops when it gets to it, those of an earlier test too."""
    deadline = time.monotonic() + 120
    while new := contents(comfy) - before:
        assert time.monotonic() < deadline, new
        time.sleep(0.05)
    gone = {path for path in before - contents(comfy) if path.parent != comfy.base / "temp"}
    assert not gone


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("memory", "allocate|memory"),
        ("error", "a patch failed"),
        ("interrupt", "interrupted"),
    ],
)
@pytest.mark.parametrize("where", ["sample", "save", "quantize"])
def test_a_failure_in_the_middle_of_a_model(comfy, reference, how, message, where):
    """Halfway through its layers: while LoRAs are merged, while a file is written, and both."""

    def fail(graph, loaded):
        kind = "bf16" if where == "quantize" else "ours"
        model = graph.add("TestFail", model=loaded[kind], how=how)
        if where == "sample":
            graph.save_latent(graph.sample(model, "flux", 1))
        elif where == "save":
            save(graph, model)
        else:
            quantized = graph.add("MXFP8Quantize", model=model, preset="auto", precision="exact")
            graph.save_latent(graph.sample(quantized, "flux", 1))

    check_failure(comfy, reference, fail, message)


def test_a_bad_file(comfy, reference):
    path = comfy.base / "models" / "diffusion_models" / "bad.safetensors"
    path.write_bytes(path.with_name("flux-mxfp8.safetensors").read_bytes()[:-1])

    def fail(graph, loaded):
        model = graph.add("MXFP8Load", model_name=path.name, precision="auto")
        graph.save_latent(graph.sample(model, "flux", 1))

    check_failure(comfy, reference, fail, "bad.safetensors: truncated")
    path.unlink()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number(comfy, reference, value):
    path = comfy.base / "models" / "diffusion_models" / "nan.safetensors"
    state, _ = load(path.with_name("flux.safetensors"))
    state["double_blocks.0.img_attn.proj.weight"][5, 7] = value
    save_file(state, path)

    def quantize(graph, loaded):
        model = graph.loader(path.name)
        save(graph, graph.add(
            "MXFP8Quantize", model=model, preset="auto", precision="exact"
        ))  # fmt: skip

    check_failure(
        comfy,
        reference,
        quantize,
        r"'double_blocks.0.img_attn.proj.weight' holds NaN or Inf in row 5",
    )
    path.unlink()


def test_a_lora_that_makes_nan(comfy, reference):
    def fail(graph, loaded):
        save(graph, graph.add("TestFail", model=loaded["ours"], how="nan"))

    check_failure(comfy, reference, fail, r"'[\w.]+' \(it gets NaN or Inf\)")


def write(node: str, name: str = "failing"):
    """Adds a node that writes a file."""

    def add(graph, loaded):
        if node == "MXFP8SaveModel":
            save(graph, loaded["ours"], f"diffusion_models/{name}")
        elif node == "MXFP8Quantize":
            # A model of its own: the other one is quantized and kept.
            other = graph.add("ModelSamplingAuraFlow", model=loaded["bf16"], shift=5.0)
            quantized = graph.add(node, model=other, preset="auto", precision="exact")
            graph.save_latent(graph.sample(quantized, "flux", 1))
        else:
            graph.add(
                node, source="diffusion_models/flux.safetensors", target=name, preset="auto",
                overwrite=False,
            )  # fmt: skip

    return add


WRITERS = ("MXFP8SaveModel", "MXFP8Quantize", "MXFP8ConvertFile")


@pytest.fixture(scope="module")
def quiet(comfy, tmp_path_factory):
    """A server of its own with the same models, whose log is smaller than they are."""
    base = tmp_path_factory.mktemp("quiet")
    for name in ("diffusion_models/flux", "diffusion_models/flux-mxfp8", "loras/lora"):
        target = base / "models" / f"{name}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(comfy.base / "models" / f"{name}.safetensors", target)
    with Server(base, (TESTS / "comfy_nodes" / "mxfp8_test_nodes",)) as server:
        yield server


@pytest.mark.parametrize("node", WRITERS)
def test_a_disk_that_takes_no_more(quiet, reference, node):
    """The system lets no file of the server grow further, as a full disk would not."""
    process = quiet.process.pid

    @contextlib.contextmanager
    def full():
        before = resource.prlimit(process, resource.RLIMIT_FSIZE)
        limit = quiet.log.stat().st_size + 300_000  # its log must go on
        assert limit < 1_100_000, "the log is as large as a model"
        resource.prlimit(process, resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            yield
        finally:
            resource.prlimit(process, resource.RLIMIT_FSIZE, before)

    error = check_failure(quiet, reference, write(node), "over a limit of the file system", full)
    assert error.startswith(node)


@pytest.mark.parametrize("node", WRITERS)
def test_a_folder_that_may_not_be_written(comfy, reference, node):
    folder = {
        "MXFP8SaveModel": comfy.base / "output" / "diffusion_models",
        "MXFP8Quantize": comfy.base / "temp",
        "MXFP8ConvertFile": comfy.base / "models" / "diffusion_models",
    }[node]
    folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def read_only():
        rights(comfy, drop=True)
        mode = folder.stat().st_mode
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(stat.S_IMODE(mode))
            rights(comfy, drop=False)

    error = check_failure(comfy, reference, write(node), "no permission to write", read_only)
    assert str(folder) in error


def rights(comfy, drop: bool) -> None:
    graph = Graph()
    for model in models(graph).values():  # they stay loaded
        graph.save_latent(graph.sample(model, "flux", 1))
    graph.add("TestRights", model=load_ours(graph, "wan"), drop=drop)
    comfy.run(graph)
