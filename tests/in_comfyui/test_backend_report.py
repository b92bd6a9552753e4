"""Backend Report and Inspect in the real ComfyUI: what is reported of a layer is what ran."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import other_formats
import pytest
import torch
from bad_files import LAYER, draft
from checkpoints import load
from comfyui import PromptError, comfyui_path
from graphs import Graph, int8_cpu, latents, unload
from lora_kinds import lora_file
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy

MANY = 4096


def ours(graph: Graph, name: str = "flux-mxfp8", precision: str = "auto") -> list:
    return graph.add("MXFP8Load", model_name=f"{name}.safetensors", precision=precision)


def fast(graph: Graph, **options) -> list:
    """The model on a CPU that multiplies INT8, where one row is few."""
    model = int8_cpu(graph, graph.loader("flux-mxfp8.safetensors"), **options)
    return graph.add("MXFP8Accelerate", model=model, precision="fast")


@pytest.fixture
def int8(comfy):
    """Afterwards the CPU multiplies no INT8."""
    yield
    graph = Graph()
    int8_cpu(graph, graph.loader("flux.safetensors"), on=False)
    comfy.run(graph)


def backend_report(graph: Graph, model: list, rows: int = MANY, **options) -> list:
    return graph.add("MXFP8BackendReport", model=model, rows=rows, **{"measure": False, **options})


def document(outputs: dict, node: list) -> dict:
    return json.loads(outputs[node[0]]["mxfp8_report"][0])


def by_name(report: dict) -> dict:
    return {layer["name"]: layer for layer in report["layers"]}


def reported_and_recorded(
    comfy, make, kind: str = "flux", loaded: bool = False
) -> tuple[dict, dict, dict]:
    """({layer: what is reported} for many rows, the same for one row, {layer: what ran}).

    Args:
        loaded: whether reports are made after the run.
    """
    graph = Graph()
    model = make(graph)
    recording = graph.add("TestRecord", model=model, name="recorded")
    samples = graph.sample(recording, kind, steps=1)
    if loaded:
        model = graph.add("TestAfter", model=model, samples=samples)
    small_m = backend_report(graph, model, rows=1)
    many = backend_report(graph, model)
    recorded = graph.add("TestRecorded", samples=samples, name="recorded")
    outputs = comfy.run(graph)
    ran = json.loads(outputs[recorded[0]]["result"][0])
    reports = [by_name(document(outputs, node)) for node in (many, small_m)]
    assert len(ran) > 15
    assert ran.keys() <= reports[0].keys()
    return *reports, ran


def recorded_path(entry: dict) -> str:
    """The backend and precision of a layer by what was recorded."""
    ours = [op for op in entry["ops"] if op.startswith("mxfp8.")]
    if not ours:
        assert not entry["backends"]
        return "stock"
    (ran,) = entry["backends"]
    return ran


def reported(layer: dict) -> str:
    return ", ".join(filter(None, (layer["backend"], layer["precision"])))


def check_all(many: dict, small_m: dict, ran: dict) -> None:
    for name, entry in ran.items():
        layers = small_m if entry["rows"] == [1] else many
        assert reported(layers[name]) == recorded_path(entry), name


@pytest.mark.parametrize(
    ("precision", "reason"),
    [
        ("auto", "on a CPU, auto stays exact"),
        ("exact", "exact was chosen"),
        ("fast", "needs a CPU with INT8 matrix instructions (VNNI with AVX-512, or AMX)"),
    ],
)
def test_on_a_cpu_every_mxfp8_layer_runs_exact_as_it_says(comfy, precision, reason):
    """On one without INT8 instructions."""

    def accelerated(graph):
        model = int8_cpu(graph, graph.loader("flux-mxfp8.safetensors"), on=False)
        return graph.add("MXFP8Accelerate", model=model, precision=precision)

    many, small_m, ran = reported_and_recorded(comfy, accelerated)
    check_all(many, small_m, ran)
    layer = many[LAYER]
    assert reported(layer) == recorded_path(ran[LAYER]) == "torch_bf16, exact"
    assert layer["reason"] == f"torch_bf16: {reason}"
    assert (layer["shape"], layer["decision"]) == ([128, 128], "mxfp8")
    assert layer["bytes"] == 128 * 128 + 128 * 4


def test_a_model_that_stock_has_loaded_is_reported_as_it_will_run(comfy):
    """As every CLIP is on a CPU: its constructor loads it, before anyone can accelerate it."""

    def accelerated(graph):
        stock = int8_cpu(graph, graph.loader("flux-mxfp8.safetensors"), on=False)
        samples = graph.sample(stock, "flux", steps=1)
        model = graph.add("TestAfter", model=stock, samples=samples)
        return graph.add("MXFP8Accelerate", model=model, precision="exact")

    many, small_m, ran = reported_and_recorded(comfy, accelerated)
    check_all(many, small_m, ran)
    assert many[LAYER]["reason"] == "torch_bf16: exact was chosen"


def test_what_is_kept_runs_as_stock_runs_it(comfy):
    many, small_m, ran = reported_and_recorded(
        comfy, lambda graph: ours(graph, "flux2-mxfp8"), "flux2"
    )
    check_all(many, small_m, ran)
    kept = many["img_in"]
    assert (kept["decision"], kept["backend"]) == ("kept", "stock")
    assert kept["reason"] == "not MXFP8: F32"
    assert recorded_path(ran["img_in"]) == "stock"


def test_a_model_of_the_stock_loader_runs_as_stock_runs_it(comfy):
    reports = reported_and_recorded(comfy, lambda graph: graph.loader("flux-mxfp8.safetensors"))
    check_all(*reports)
    many, _, ran = reports
    assert recorded_path(ran[LAYER]) == "stock"
    assert "Accelerate Model (MXFP8) is not on it" in many[LAYER]["reason"]
    graph = Graph()
    node = backend_report(graph, graph.loader("flux-mxfp8.safetensors"))
    whole = document(comfy.run(graph), node)
    assert (whole["limited_by"], whole["small_m"]) == (None, "stock")  # nothing of ours runs


@pytest.mark.parametrize("loaded", [False, True])
def test_fast_layers_have_prepared_weights_and_few_rows_run_exact(comfy, int8, loaded):
    many, small_m, ran = reported_and_recorded(comfy, fast, loaded=loaded)
    check_all(many, small_m, ran)
    assert recorded_path(ran[LAYER]) == "int8, fast"
    if loaded:
        assert 1e-3 < float(many[LAYER]["reason"].rpartition(" ")[2]) < 0.01
    assert small_m[LAYER]["reason"] == "exact: 64 rows or fewer"
    single = [n for n, e in ran.items() if e["rows"] == [1] and many[n]["decision"] == "mxfp8"]
    assert single  # the modulations
    assert {recorded_path(ran[n]) for n in single} == {"torch_bf16, exact"}


def test_layers_that_a_form_would_change_too_much_are_exact(comfy, int8):
    many, small_m, ran = reported_and_recorded(
        comfy, lambda graph: fast(graph, most_change=1e-4), loaded=True
    )
    check_all(many, small_m, ran)
    assert reported(many[LAYER]) == recorded_path(ran[LAYER]) == "torch_bf16, exact"
    assert many[LAYER]["reason"].startswith("exact: rotated_int8 would change its weight by ")


def test_measuring_few_rows_leaves_layers_fast(comfy, int8):
    graph = Graph()
    model = fast(graph)
    report = backend_report(graph, model, rows=1, measure=True)
    outputs = comfy.run(graph)
    assert {t["backend"] for t in document(outputs, report)["timings"]} == {"torch_bf16"}
    counted = graph.add("TestPrepared", model=model, samples=graph.sample(model, "flux", 1))
    del graph[report[0]]
    outputs = comfy.run(graph)
    assert outputs[counted[0]]["result"][0] == 10


def test_a_layer_marked_full_precision_is_exact(comfy, int8):
    folder = comfy.base / "models" / "diffusion_models"
    whole = draft(folder / "flux-mxfp8.safetensors")
    whole.mark(LAYER, full_precision_matrix_mult=True)
    path = folder / "report-full.safetensors"
    path.write_bytes(whole.encode())

    def marked(graph):
        fast(graph)
        return graph.add("MXFP8Accelerate", model=graph.loader(path.name), precision="fast")

    many, small_m, ran = reported_and_recorded(comfy, marked)
    path.unlink()
    check_all(many, small_m, ran)
    assert many[LAYER]["reason"] == "exact: marked full precision in the file"
    assert recorded_path(ran[LAYER]) == "torch_bf16, exact"


def test_a_layer_patched_by_another_node_is_said_to_be(comfy):
    def patched(graph):
        model = graph.add(
            "TestPatchLinear", model=graph.loader("flux-mxfp8.safetensors"), layer=LAYER
        )
        return graph.add("MXFP8Accelerate", model=model, precision="auto")

    many, small_m, ran = reported_and_recorded(comfy, patched)
    check_all(many, small_m, ran)
    assert many[LAYER]["reason"] == "patched by another node"
    assert recorded_path(ran[LAYER]) == "stock"


@pytest.fixture(scope="module")
def loras(comfy):
    """Names of LoRA files for the Flux model, by what is done with them."""
    models = comfy.base / "models"
    state, _ = load(models / "diffusion_models" / "flux-plain.safetensors")
    weights = {k: w for k, w in state.items() if w.ndim == 2 and k.endswith(".weight")}
    (first, weight), *others = weights.items()
    longer, names = {first: torch.cat([weight, weight])}, list(weights)
    norm = next(key.removesuffix(".weight") for key in state if "query_norm." in key)
    scale = torch.ones(state[f"{norm}.weight"].shape)
    files = {
        "rank 4": lora_file(weights, "lora"),
        "rank 2": lora_file({LAYER + ".weight": weights[LAYER + ".weight"]}, "lora", rank=2),
        "Kronecker": lora_file(weights, "lokr"),
        "large": lora_file(weights, "diff"),
        "longer": lora_file(longer | dict(others), "lora", seed=1),
        "norm": {f"diffusion_model.{norm}.diff": scale},
        **{
            f"on {on}": lora_file({names[i]: weights[names[i]] for i in on}, "lora", rank=2)
            for on in ((0,), (1, 2), (0, 2))
        },
        "growing": lora_file({f"{LAYER}.weight": torch.ones(160, 128)}, "lora")
        | {f"diffusion_model.{LAYER}.reshape_weight": torch.tensor([160, 128])},
    }
    for name, file in files.items():
        save_file(file, models / "loras" / f"report {name}.safetensors")
    yield {name: f"report {name}.safetensors" for name in files}
    for name in files:
        (models / "loras" / f"report {name}.safetensors").unlink()


def with_loras(graph: Graph, model: list, *loras: tuple[str, float]) -> list:
    for name, strength in loras:
        model = graph.add(
            "LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength
        )
    return model


def merged_model(graph: Graph, model: list) -> list:
    return graph.add("ModelMergeSimple", model1=model, model2=ours(graph), ratio=0.5)


def test_loras_are_listed_with_what_became_of_them(comfy, loras):
    graph = Graph()
    first = with_loras(graph, ours(graph), (loras["rank 4"], 0.8), (loras["rank 2"], 0.8))
    models = {
        "beside": with_loras(graph, first, (loras["Kronecker"], -0.5)),
        "large": with_loras(graph, ours(graph), (loras["large"], 1.0)),
        "longer": with_loras(graph, ours(graph), (loras["longer"], 1.0), (loras["norm"], 0.5)),
        "merged": with_loras(graph, merged_model(graph, first), (loras["Kronecker"], 1.0)),
        "replaced": with_loras(
            graph,
            graph.add("TestPatchLinear", model=ours(graph), layer=LAYER),
            (loras["rank 4"], 1.0),
            (loras["growing"], 1.0),
        ),
        "growing": with_loras(graph, ours(graph), (loras["growing"], 1.0)),
        "ordered": with_loras(
            graph,
            ours(graph),
            (loras["on (0,)"], 0.1),
            (loras["on (1, 2)"], 0.2),
            (loras["on (0, 2)"], 0.3),
        ),
        "other": graph.add(
            "TestLora", model=ours(graph), key=f"diffusion_model.{LAYER}.weight", how="other"
        ),
        "stock": with_loras(graph, graph.loader("flux.safetensors"), (loras["rank 4"], 0.8)),
        "none": ours(graph),
    }
    nodes = {name: backend_report(graph, model) for name, model in models.items()}
    saved = [graph.save_latent(graph.sample(models["beside"], "flux", steps)) for steps in (1, 2)]
    before = latents(comfy.run(graph, only=[saved[1][0]]), saved[1], comfy.base)
    comfy.run(graph, only=[saved[0][0]])  # what is reported now is loaded
    outputs = comfy.run(graph, only=[node[0] for node in nodes.values()])
    reports = {name: document(outputs, node) for name, node in nodes.items()}
    layers = {name: by_name(report) for name, report in reports.items()}
    uses = {name: report["adapters"] for name, report in reports.items()}
    count = len(layers["none"])
    assert uses["none"] == []

    shapes = [layer["shape"] for layer in layers["none"].values()]
    rank4, rank2, kronecker = uses["beside"]
    assert rank4 == {
        "kinds": ["LoRA"], "ranks": [4, 4], "strength": 0.8, "hit": count, "missed": 0,
        "applied": {"beside the weight: low rank": count},
        "bytes": sum(4 * 4 * (n + k) for n, k in shapes),  # float32 on a CPU
        "others": 0,
    }  # fmt: skip
    assert (rank2["ranks"], rank2["hit"], rank2["missed"]) == ([2, 2], 1, count - 1)
    assert (kronecker["kinds"], kronecker["strength"]) == (["LoKr"], -0.5)
    assert kronecker["applied"] == {"beside the weight: Kronecker factors": count}
    size = reports["beside"]["memory"]["LoRAs beside the weights"]
    assert size == {"device": sum(use["bytes"] for use in uses["beside"]), "offloaded": 0}
    for layer in layers["beside"].values():
        assert layer["reason"].endswith("; LoRA beside the weight")
        assert "another node" not in layer["reason"]
    text = outputs[nodes["beside"][0]]["text"][0].splitlines()
    said = f"LoRA, rank 4, strength 0.8: changes {count} of {count} linear layers, all beside the"
    assert text[1].startswith(said)

    (large,) = uses["large"]
    assert large["kinds"] == ["diff"] and large["hit"] == count
    assert large["applied"].keys() == {
        "beside the weight: FP32 delta",
        "merged by ComfyUI: on a layer with a delta that is too large to hold"
    }  # fmt: skip
    beside = [x for x in layers["large"].values() if "LoRA beside the weight" in x["reason"]]
    assert large["applied"]["beside the weight: FP32 delta"] == len(beside) < count
    assert sum(large["applied"].values()) == count

    assert [use["strength"] for use in uses["ordered"]] == [0.1, 0.2, 0.3]

    longer, norm = uses["longer"]
    (left_out,) = (how for how in longer["applied"] if how.startswith("left out: its tensors ["))
    assert longer["applied"] == {"beside the weight: low rank": count - 1, left_out: 1}
    assert (longer["hit"], longer["missed"]) == (count - 1, 1)
    assert sum("LoRA" in layer["reason"] for layer in layers["longer"].values()) == count - 1
    assert norm["applied"] == {"merged by ComfyUI: not a linear layer": 1}
    assert (norm["hit"], norm["missed"], norm["others"], norm["bytes"]) == (0, count, 1, 0)

    under, _, merged, kronecker = uses["merged"]
    assert under["applied"] == {
        "merged by ComfyUI: loaded before something that ComfyUI merges": count
    }
    assert under["ranks"] == [4, 4]
    assert merged["kinds"] == ["merged model"] and merged["hit"] == count
    assert merged["applied"].keys() >= {"merged by ComfyUI: other weights"}
    assert kronecker["applied"] == {"beside the weight: Kronecker factors": count}
    replaced = {"merged by ComfyUI: a layer with another node's forward": 1}
    assert [use["applied"] for use in uses["replaced"]] == [
        {"beside the weight: low rank": count - 1} | replaced, replaced
    ]  # fmt: skip
    (growing,) = uses["growing"]
    assert growing["applied"] == {"merged by ComfyUI: of a kind that only ComfyUI applies": 1}
    (other,) = uses["other"]
    assert other["kinds"] == ["OtherAdapter"] and other["applied"] == growing["applied"]
    (stock,) = uses["stock"]
    assert stock == rank4 | {"applied": {"merged by ComfyUI": count}, "bytes": 0}

    inputs = graph[graph[saved[1][0]]["inputs"]["samples"][0]]["inputs"]
    inputs["latent_image"] = graph.add(  # or the samples would be those that ComfyUI has
        "TestEmptyAfter", samples=graph[saved[0][0]]["inputs"]["samples"],
        like=inputs["latent_image"],
    )  # fmt: skip
    after = latents(comfy.run(graph, only=[saved[1][0]]), saved[1], comfy.base)
    assert torch.equal(after, before)  # reports of its clones took nothing off a loaded model


def test_with_the_setting_off_loras_are_said_to_be_merged(comfy, loras):
    comfy.post("/api/settings", {"MXFP8.LoRAsBesideWeights": False})
    try:
        graph = Graph()
        node = backend_report(graph, with_loras(graph, ours(graph), (loras["rank 4"], 1.0)))
        report = document(comfy.run(graph), node)
    finally:
        comfy.post("/api/settings", {"MXFP8.LoRAsBesideWeights": True})
    (use,) = report["adapters"]
    count = len(report["layers"])
    assert use["applied"] == {
        "merged by ComfyUI: the setting LoRAs beside weights is off": count
    }  # fmt: skip
    assert not any("LoRA" in layer["reason"] for layer in report["layers"])


def merged_on_offloaded(graph: Graph) -> list:
    """A model that stock merges into on every forward."""
    return graph.add("TestLowVRAM", model=merged_model(graph, ours(graph)))


def test_a_merged_model_on_offloaded_layers_is_left_to_stock(comfy):
    graph = Graph()
    model = merged_on_offloaded(graph)
    recording = graph.add("TestRecord", model=model, name="offloaded")
    samples = graph.sample(recording, "flux", steps=1)
    recorded = graph.add("TestRecorded", samples=samples, name="offloaded")
    ran = json.loads(comfy.run(graph)[recorded[0]]["result"][0])
    node = backend_report(graph, model)  # now that it is loaded
    report = document(comfy.run(graph), node)
    unload(comfy)
    assert left_to_stock(report)
    layers = by_name(report)
    for name, entry in ran.items():
        assert reported(layers[name]) == recorded_path(entry), name
    assert report["memory"]["LoRAs to merge"]["device"] > 0


def left_to_stock(report: dict) -> bool:
    return any("applies a patch on the fly" in layer["reason"] for layer in report["layers"])


def test_what_is_said_is_asked_anew_in_every_run(comfy):
    graph = Graph()
    model = merged_on_offloaded(graph)
    nodes = [
        backend_report(graph, model),
        graph.add("MXFP8InspectFile", file="none", every_byte=True, model=model),
    ]
    saved = graph.save_latent(graph.sample(model, "flux", steps=1))
    left = []
    for asked in (nodes, [saved], nodes):
        outputs = comfy.run(graph, only=[node[0] for node in asked])
        if asked is nodes:
            left.append([left_to_stock(document(outputs, node)) for node in nodes])
    unload(comfy)
    assert left == [[False, False], [True, True]]


def test_a_model_is_loaded_before_it_is_described_and_measured(comfy):
    graph = Graph()
    node = backend_report(graph, merged_on_offloaded(graph), measure=True, rows=1)
    report = document(comfy.run(graph), node)
    unload(comfy)
    assert left_to_stock(report)
    assert all((x["microseconds"] is None) == (x["backend"] == "stock") for x in report["layers"])


def test_on_a_cpu_few_rows_are_timed_and_it_is_said_how_many(comfy):
    graph = Graph()
    node = backend_report(graph, ours(graph), measure=True)
    outputs = comfy.run(graph)
    report = document(outputs, node)
    assert report["rows"] == MANY
    assert {timing["rows"] for timing in report["timings"]} == {256}
    assert outputs[node[0]]["text"][0].count(" on torch_bf16, 256 rows: ") == len(report["timings"])


def test_measured_times_memory_and_what_is_not_used(comfy):
    graph = Graph()
    node = backend_report(graph, ours(graph), rows=32, measure=True)
    outputs = comfy.run(graph)
    report = document(outputs, node)
    layers = [layer for layer in report["layers"] if layer["decision"] == "mxfp8"]
    sizes = {tuple(layer["shape"]) for layer in layers}
    assert {tuple(timing["shape"]) for timing in report["timings"]} == sizes
    assert sum(timing["layers"] for timing in report["timings"]) == len(layers) == 13
    assert all(layer["microseconds"] > 0 for layer in layers)
    for timing in report["timings"]:
        ratio = timing["stock_microseconds"] / timing["microseconds"]
        assert timing["faster_than_stock"] == pytest.approx(ratio)
        assert timing["dense_microseconds"] > 0
    assert sum(map(sum_bytes, layers)) == sum(
        report["memory"][kind]["device"] for kind in ("codes", "scales")
    )
    assert report["rows"] == 32
    assert {timing["rows"] for timing in report["timings"]} == {32}
    assert any(line.startswith("torch_fp8: needs FP8 tensor") for line in report["unsupported"])
    assert any(line.startswith("triton: needs an NVIDIA") for line in report["unsupported"])
    text = outputs[node[0]]["text"][0]
    assert text.splitlines()[0].startswith("Flux on cpu: 13 MXFP8 layers, ")
    assert sum(line.endswith(" stock") for line in text.splitlines()) == len(sizes)


def sum_bytes(layer: dict) -> int:
    return layer["bytes"]


def test_a_backend_report_wants_one_model(comfy):
    graph = Graph()
    graph.add("MXFP8BackendReport", measure=False, rows=1)
    with pytest.raises(PromptError, match="connect either a model or a text encoder"):
        comfy.run(graph)


# ---- inspecting ------------------------------------------------------------------------------


def inspected(comfy, file: str, model=None, every_byte: bool = True) -> tuple[dict, str]:
    graph = Graph()
    options = {} if model is None else {"model": model(graph)}
    node = graph.add("MXFP8InspectFile", file=file, every_byte=every_byte, **options)
    outputs = comfy.run(graph)
    return document(outputs, node), outputs[node[0]]["text"][0]


@pytest.mark.parametrize("every_byte", [True, False])
def test_a_file_is_inspected(comfy, every_byte):
    report, text = inspected(
        comfy, "diffusion_models/flux2-mxfp8.safetensors", every_byte=every_byte
    )
    layers = by_name(report)
    count = sum(layer["decision"] == "mxfp8" for layer in layers.values())
    assert report["formats"] == {"mxfp8": count}
    assert layers[LAYER]["scale_order"] == ("tiled" if every_byte else None)
    kept = [layer for layer in layers.values() if layer["decision"] == "kept"]
    assert {layer["reason"] for layer in kept} == {"BF16 in the file"}
    assert layers["img_in"]["bytes"] == 128 * 128 * 2
    assert f"not quantized: {len(kept)} matrices, BF16 in the file" in text
    header = [] if every_byte else [" in the header"]
    assert text.splitlines()[-1] == "".join(["OK: no problem found", *header])


def test_what_is_wrong_in_a_file_is_shown_and_is_no_error(comfy):
    folder = comfy.base / "models" / "diffusion_models"
    whole = draft(folder / "flux-mxfp8.safetensors")
    codes = whole.tensors[f"{LAYER}.weight"]
    codes[2] = b"\x7f" + codes[2][1:]
    path = folder / "inspect-nan.safetensors"
    path.write_bytes(whole.encode())
    report, text = inspected(comfy, f"diffusion_models/{path.name}")
    path.unlink()
    assert len(report["problems"]) == 1
    assert f"PROBLEM: '{LAYER}': 1 codes are NaN" in text
    assert text.splitlines()[-1] == "NOT OK: 1 problem; do not use this file"


OTHERS = {
    "gguf 0.19.0: flux": (".gguf", "GGUF: 3 layers, 6.33 bits", "ComfyUI with ComfyUI-GGUF"),
    "torchao 0.18.0: torch.save": (".pt", "torchao: named in the file", "can run code when read"),
    "comfy-kitchen 0.2.40: asym_w4a8_int8": (
        ".safetensors", "W4A8 (4 bits for INT8 matmuls): 1 layer", "runs in: ComfyUI 0.31 or later",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_files_that_no_loader_here_takes_are_listed_and_explained(comfy, name):
    suffix, *words = OTHERS[name]
    path = comfy.base / "models" / "diffusion_models" / "folder" / f"inspected{suffix}"
    path.parent.mkdir(exist_ok=True)
    other_formats.write(path, name)
    report, text = inspected(comfy, f"diffusion_models/folder/{path.name}", every_byte=False)
    shutil.rmtree(path.parent)
    assert all(word in text for word in words)
    assert len(report["explained"]) == 1 and report["problems"] == []


def test_the_list_of_files_knows_what_came_and_went_in_a_subfolder(comfy):
    folder = comfy.base / "models" / "diffusion_models" / "listed"
    folder.mkdir()

    def listed() -> list[bool]:
        """Whether each file is in the list."""
        info = json.dumps(comfy.get("/object_info/MXFP8InspectFile"))
        return [f"listed/{name}.gguf" in info for name in ("first", "second")]

    (folder / "first.gguf").touch()
    assert listed() == [True, False]
    (folder / "first.gguf").rename(folder / "second.gguf")
    assert listed() == [False, True]
    shutil.rmtree(folder)
    assert listed() == [False, False]


def test_a_missing_part_is_named_until_it_is_there(comfy):
    folder = comfy.base / "models" / "diffusion_models" / "parts"
    folder.mkdir()
    names = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    for name in names:
        save_file({name: torch.zeros(8)}, folder / name)
    weight_map = {name: name for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / names[1]).rename(folder / "away")
    first, _ = inspected(comfy, "diffusion_models/parts")
    (folder / "away").rename(folder / names[1])
    second, _ = inspected(comfy, "diffusion_models/parts")
    shutil.rmtree(folder)
    assert f"1 of its 2 parts is missing: {names[1]!r}" in first["problems"][0]
    assert second["problems"] == []


def test_a_model_is_inspected(comfy):
    report, text = inspected(comfy, "none", lambda graph: ours(graph, "flux2-mxfp8"))
    layers = by_name(report)
    count = sum(layer["decision"] == "mxfp8" for layer in layers.values())
    assert report["formats"] == {"mxfp8": count}
    assert layers[LAYER]["decision"] == "mxfp8"
    assert layers["img_in"]["reason"] == "F32 in the model"
    assert report["mxfp8_bytes"] == sum(
        layer["bytes"] for layer in layers.values() if layer["decision"] == "mxfp8"
    )
    assert f"MXFP8: {count} layers" in text


def test_nothing_to_inspect(comfy):
    graph = Graph()
    graph.add("MXFP8InspectFile", file="none", every_byte=True)
    with pytest.raises(PromptError, match="choose a file, or connect a model"):
        comfy.run(graph)


# ---- settings --------------------------------------------------------------------------------


SEVERAL_USERS = """
import logging, sys
sys.path.insert(0, sys.argv.pop(1))
import comfy.options
comfy.options.enable_args_parsing()
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from mxfp8.nodes.host import settings
settings._stored = None
for _ in range(3):
    print(settings.loras_beside())
"""


@pytest.mark.parametrize(("variable", "kept"), [("", "True"), ("0", "False")])
def test_of_several_users_nobodys_setting_holds_and_that_is_said_once(variable, kept):
    lines = subprocess.check_output(
        [sys.executable, "-c", SEVERAL_USERS, comfyui_path(), "--multi-user"],
        text=True,
        env={**os.environ, "MXFP8_LORAS_BESIDE_WEIGHTS": variable},
    ).splitlines()
    notice = (
        "MXFP8: ComfyUI serves several users, so the setting MXFP8.LoRAsBesideWeights is ignored; "
        "set MXFP8_LORAS_BESIDE_WEIGHTS=0 or 1 for all."
    )
    assert lines == [notice] * (not variable) + [kept] * 3
