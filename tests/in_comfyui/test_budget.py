"""From a calibration with sensitivity to a size or a quality that is reached, in the real ComfyUI.

The model is the small trained image model, on prompts and seeds that the calibration did not see.
"""

from __future__ import annotations

import math
import re
import shutil

import demo_pictures
import pytest
from comfyui import PromptError
from graphs import (
    SAME,
    Graph,
    calibrated,
    difference,
    interrupt,
    quantized,
    run,
    watch,
    with_lora,
)

from mxfp8.quant.conversion import calibration
from mxfp8.quant.reports.budget import Budget
from mxfp8.quant.reports.comparison import Comparison
from mxfp8.quant.reports.conversion import Report
from mxfp8.quant.sources.file import TORCH_DTYPES, FileSource

pytestmark = pytest.mark.comfy

STEPS = 8
_SAMPLER = {"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
_LATENT = {"width": demo_pictures.WIDTH, "height": demo_pictures.WIDTH, "batch_size": 1}


@pytest.fixture(scope="module", autouse=True)
def _model(comfy):
    shutil.copy(demo_pictures.MODEL, comfy.base / "models" / "diffusion_models")


def prompts(graph: Graph, texts) -> dict[str, list]:
    """Inputs of a sampler for several prompts in one batch."""
    clip = graph.add("TestEmojiTextEncoder")
    given = graph.add("CLIPTextEncode", clip=clip, text="\n".join(texts))
    size = {**_LATENT, "batch_size": len(texts)}
    return {"positive": given, "negative": given,
            "latent_image": graph.add("EmptySD3LatentImage", **size)}  # fmt: skip


def calibrate(graph: Graph, model: list, **options) -> list:
    return graph.add(
        "MXFP8Calibrate", model=model, first_seed=1000, preset="auto", **_SAMPLER,
        **prompts(graph, demo_pictures.CALIBRATION[:8]),
        **{"seeds": 1, "steps": STEPS, "sensitivity": True, **options},
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(comfy):
    """(outputs, name of the saved calibration) of a calibration with sensitivity."""
    graph = Graph()
    node = calibrate(graph, graph.loader(demo_pictures.MODEL.name))
    graph.add("MXFP8SaveCalibration", calibration=node, filename_prefix="calibrations/budget")
    outputs = comfy.run(graph)
    (path,) = (comfy.base / "output" / "calibrations").glob("budget_*.safetensors")
    return outputs[node[0]], path


def test_a_calibration_says_which_layers_matter(made):
    shown, path = made
    budget = Budget.from_json(shown["mxfp8_report"][0])
    sensitivity = calibration.load(path).sensitivity
    assert set(sensitivity.layers) == set(calibration.load(path).layers)
    worst = max(budget.layers, key=lambda layer: layer.damage).name
    assert re.search(rf"of the error in the picture: '{re.escape(worst)}' \d+%", shown["text"][0])
    assert not (path.parent / "unfinished").exists()


def compare(graph: Graph, reference: list, model: list) -> list:
    """A comparison on other prompts and another seed."""
    return graph.add(
        "MXFP8CompareModels", reference=reference, model=model, first_seed=7, seeds=1, steps=STEPS,
        **_SAMPLER, **prompts(graph, demo_pictures.PROMPTS),
    )  # fmt: skip


def quantize(graph: Graph, model: list, path, wanted: str) -> list:
    loaded = graph.add("MXFP8LoadCalibration", calibration_name=path.name)
    return graph.add(
        "MXFP8Quantize", model=model, preset="auto", precision="exact", calibration=loaded,
        size_or_quality=wanted,
    )  # fmt: skip


@pytest.fixture(scope="module")
def reached(comfy, made):
    """(result of quantizing, comparison) of what was asked for, by that."""
    graph = Graph()
    original = graph.loader(demo_pictures.MODEL.name)
    nodes = {}
    for wanted in ("", "65%"):
        model = quantize(graph, original, made[1], wanted)
        nodes[wanted] = model, compare(graph, original, model)
    outputs = comfy.run(graph)
    return {
        wanted: (outputs[model[0]], Comparison.from_json(outputs[node[0]]["mxfp8_report"][0]))
        for wanted, (model, node) in nodes.items()
    }


def test_a_size_is_reached_and_better_than_all_mxfp8(reached):
    shown, comparison = reached["65%"]
    report = Report.from_json(shown["mxfp8_report"][0])
    chosen = Budget.from_json(shown["mxfp8_budget"][0]).chosen
    assert report.bytes_after == chosen.point.bytes <= 0.65 * report.bytes_before
    kept = {layer.name for layer in report.layers if "target 65%" in layer.reason}
    assert kept == set(chosen.layers) and len(kept) == chosen.point.kept > 0
    assert report.chosen == chosen and chosen.summary() in shown["text"][0]
    assert comparison.predicted_snr_db == chosen.point.snr_db
    assert f"{chosen.point.snr_db:.1f} dB was predicted" in comparison.verdict.text
    gain = comparison.latent_snr_db.mean - reached[""][1].latent_snr_db.mean
    assert gain > 2  # found: 3.3 dB
    # Predicted for rounding to nearest, and for other prompts: calibrated rounding gains some dB,
    # prompts differ by some.
    assert -2 < comparison.latent_snr_db.mean - chosen.point.snr_db < 6


def test_the_file_is_as_large_as_predicted_and_stock_reads_it(comfy, made, reached):
    """Convert File chooses as Quantize Model does, and the plan before it says so."""
    source = f"diffusion_models/{demo_pictures.MODEL.name}"
    given = {"source": source, "preset": "auto", "size_or_quality": "65%"}
    graph = Graph()
    loaded = graph.add("MXFP8LoadCalibration", calibration_name=made[1].name)
    node = graph.add(
        "MXFP8ConvertFile", **given, target="emoji-65", overwrite=True, calibration=loaded
    )
    plan = graph.add("MXFP8PlanConversion", **given, calibration_name=made[1].name)
    outputs = comfy.run(graph)
    chosen = Budget.from_json(reached["65%"][0]["mxfp8_budget"][0]).chosen
    file = comfy.base / "models" / "diffusion_models" / "emoji-65.safetensors"
    with FileSource(file) as opened:
        stored = sum(math.prod(shape) * TORCH_DTYPES[dtype].itemsize
                     for dtype, shape in opened.tensors.values())  # fmt: skip
    assert stored == chosen.point.bytes
    assert outputs[plan[0]]["text"][0].split("\n")[1] == chosen.summary()
    assert chosen.summary() in outputs[node[0]]["text"][0]
    kept = Budget.from_json(outputs[node[0]]["mxfp8_budget"][0]).chosen.layers
    assert kept == chosen.layers

    graph = Graph()
    stock = graph.loader(file.name)
    graph.save_latent(graph.add(
        "KSampler", model=stock, seed=7, steps=1, **prompts(graph, demo_pictures.PROMPTS[:1]),
        **_SAMPLER,
    ))  # fmt: skip
    comfy.run(graph)
    file.unlink()


def small(graph: Graph, **options) -> list:
    """A calibration of a tiny model: 12 runs of 2 steps."""
    options = {"seeds": 1, "steps": 2, "sensitivity": True, **options}
    return calibrated(graph, graph.loader("flux.safetensors"), "flux", **options)


def test_an_interrupted_measurement_goes_on_and_leaves_the_model_alone(comfy):
    graph = Graph()
    before = graph.save_latent(graph.sample(graph.loader("flux.safetensors"), "flux"))
    latent = run(comfy, graph, {"before": before})

    graph = Graph()
    node = small(graph)
    graph.add("MXFP8SaveCalibration", calibration=node, filename_prefix="calibrations/resumed")
    # Of 13 layers a step: in the first step of the fifth perturbed run.
    call = 4 * 2 * 13 + 5
    assert interrupt(comfy, graph, "nodes.models.probing", "_perturb", call=call) == 0
    folder = comfy.base / "output" / "calibrations"
    assert len(list((folder / "unfinished").glob("*.safetensors"))) == 1
    again = Graph()
    after = again.save_latent(again.sample(again.loader("flux.safetensors"), "flux"), "again")
    latent |= run(comfy, again, {"after": after})
    assert difference(latent["after"], latent["before"]) < SAME

    texts = watch(comfy, graph)[1][node[0]]
    assert any(": 1 run of 2 steps, then 12 more for sensitivity." in text for text in texts)
    steps = [re.search(r"sensitivities of 13 layers.*\nstep (\d+) of 24", text) for text in texts]
    assert min(int(step[1]) for step in steps if step) > 2 * 5  # those before were kept
    assert not (folder / "unfinished").exists()

    graph = Graph()
    node = small(graph, memory_gb=3.0)
    graph.add("MXFP8SaveCalibration", calibration=node, filename_prefix="calibrations/at-once")
    comfy.run(graph)
    found = [calibration.load(next(folder.glob(f"{name}_*"))).sensitivity
             for name in ("resumed", "at-once")]  # fmt: skip
    assert found[0] == found[1]


def test_a_run_that_rounds_every_layer_does_what_quantizing_does(comfy):
    """With a LoRA, whose weights are rounded together with the model's."""
    graph = Graph()
    patched = with_lora(graph, graph.loader("flux.safetensors"))
    node = calibrated(graph, patched, "flux", seeds=1, steps=2, sensitivity=True)
    graph.add("MXFP8SaveCalibration", calibration=node, filename_prefix="calibrations/lora")
    inputs = {name: graph[node[0]]["inputs"][name] for name in (
        "first_seed", "seeds", "steps", "cfg", "sampler_name", "scheduler", "denoise", "positive",
        "negative", "latent_image",
    )}  # fmt: skip
    model = quantized(graph, patched)
    compared = graph.add("MXFP8CompareModels", reference=patched, model=model, **inputs)
    outputs = comfy.run(graph)
    comparison = Comparison.from_json(outputs[compared[0]]["mxfp8_report"][0])
    (path,) = (comfy.base / "output" / "calibrations").glob("lora_*")
    (sample,) = calibration.load(path).sensitivity.samples
    assert set(sample.signs[0]) == {"+"}
    rounded = -10 * math.log10(sample.gram[0][0])
    assert rounded == pytest.approx(comparison.latent_snr_db.mean, abs=0.1)
    # The model without the LoRA is another one.
    graph = Graph()
    loaded = graph.add("MXFP8LoadCalibration", calibration_name=path.name)
    model = quantized(
        graph, graph.loader("flux.safetensors"), calibration=loaded, size_or_quality="80%"
    )
    graph.add("PreviewAny", source=[model[0], 1])
    with pytest.raises(PromptError, match="made with other weights"):
        comfy.run(graph)


def test_a_measurement_goes_on_only_as_it_began(comfy):
    """With another shift of the model's noise levels all outputs are others."""
    interrupt(comfy, small_graph(), "nodes.models.probing", "_perturb", call=4 * 2 * 13 + 5)
    graph = small_graph(shift=3.0)
    (node,) = (key for key in graph if graph[key]["class_type"] == "MXFP8Calibrate")
    texts = watch(comfy, graph)[1][node]
    steps = [re.search(r"sensitivities of 13 layers.*\nstep (\d+) of 24", text) for text in texts]
    assert min(int(step[1]) for step in steps if step) <= 2
    (journal,) = (comfy.base / "output" / "calibrations" / "unfinished").iterdir()
    journal.unlink()


def small_graph(shift: float | None = None) -> Graph:
    graph = Graph()
    model = graph.loader("flux.safetensors")
    if shift is not None:
        size = {"width": 64, "height": 64}
        model = graph.add(
            "ModelSamplingFlux", model=model, max_shift=shift, base_shift=shift, **size
        )
    node = calibrated(graph, model, "flux", seeds=1, steps=2, first_seed=5, sensitivity=True)
    graph.add("MXFP8SaveCalibration", calibration=node, filename_prefix="calibrations/shifted")
    return graph


def test_what_cannot_be_reached_is_an_error_that_says_what_can(comfy, made):
    for inputs, message in (
        ({"size_or_quality": "50 dB"}, "needs a calibration with sensitivities; Calibrate"),
        ({"size_or_quality": "50"}, "has no unit; give"),
        ({"size_or_quality": "large"}, "is not understood; give"),
        (
            {"size_or_quality": "50 dB", "calibration": ("sensitivity", False)},
            "this calibration has no sensitivities.*calibrate again with sensitivity on",
        ),
        ({"size_or_quality": "50 dB", "calibration": made[1].name}, "another|not of this model"),
        (
            {"size_or_quality": "30%", "calibration": ("sensitivity", True)},
            r"target 30% cannot be reached: all layers in MXFP8 are larger \(\d+ B\)\. All",
        ),
        (
            {"size_or_quality": "190 dB", "calibration": ("sensitivity", True)},
            r"target 190 dB cannot be reached: only the original itself reaches it",
        ),
    ):
        graph = Graph()
        given = inputs.pop("calibration", None)
        if isinstance(given, tuple):
            inputs["calibration"] = small(graph, sensitivity=given[1])
        elif given is not None:
            inputs["calibration"] = graph.add("MXFP8LoadCalibration", calibration_name=given)
        model = graph.loader("flux.safetensors")
        node = graph.add("MXFP8Quantize", model=model, preset="auto", precision="exact", **inputs)
        graph.add("PreviewAny", source=[node[0], 1])
        with pytest.raises(PromptError, match=message):
            comfy.run(graph)
