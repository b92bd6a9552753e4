"""From calibration to a better quantised model, in the real ComfyUI."""

from __future__ import annotations

import pytest
from comfyui import PromptError
from graphs import LATENTS, Graph, latents
from test_comfy_models import SAME, difference, run

from mxfp8.quant import calibration
from mxfp8.quant.report import Report

pytestmark = pytest.mark.comfy


def calibrated(graph: Graph, model: list, kind: str, **options) -> list:
    """A CALIBRATION of a model on an empty prompt."""
    empty, size = LATENTS[kind]
    conditioning = graph.add("LotusConditioning")
    if kind == "wan":
        conditioning = graph.add("TestWideConditioning", conditioning=conditioning)
    inputs = {
        "seed": 100, "seeds": 2, "steps": 4, "cfg": 1.0, "sampler_name": "euler",
        "scheduler": "simple", "denoise": 1.0, "preset": "auto",
    }  # fmt: skip
    return graph.add(
        "MXFP8Calibrate", model=model, positive=conditioning, negative=conditioning,
        latent_image=graph.add(empty, **size, batch_size=1), **{**inputs, **options},
    )  # fmt: skip


def quantized(graph: Graph, model: list, **options) -> list:
    return graph.add(
        "MXFP8QuantizeModel", model=model, preset="auto", precision="exact", **options
    )  # fmt: skip


# Of the error that rounding to nearest leaves. Half of Flux's layers are modulations, which are
# given one row a step: 8 rows say little, and all that is asked is that they do no harm.
@pytest.mark.parametrize(("kind", "most"), [("flux", 1.1), ("flux2", 0.9), ("wan", 0.9)])
def test_a_calibrated_model_is_nearer_to_the_original_on_seeds_it_has_not_seen(comfy, kind, most):
    graph = Graph()
    original = graph.loader(f"{kind}.safetensors")
    found = calibrated(graph, original, kind)
    ours, plain = quantized(graph, original, calibration=found), quantized(graph, original)
    saved = {
        name: graph.save_latent(graph.sample(model, kind))
        for name, model in (("original", original), ("ours", ours), ("plain", plain))
    }
    outputs = comfy.run(graph)
    latent = {name: latents(outputs, node, comfy.base) for name, node in saved.items()}
    errors = {n: difference(latent[n], latent["original"]) for n in ("ours", "plain")}
    assert errors["ours"] < most * errors["plain"], errors

    report = Report.from_json(outputs[ours[0]]["mxfp8_report"][0])
    layers = [layer for layer in report.quantized if layer.output_error is not None]
    assert len(layers) >= 10
    assert all(layer.output_error <= layer.nearest_error for layer in layers)
    assert "layers calibrated: what they put out is off by 0." in outputs[ours[0]]["text"][0]


def test_a_saved_calibration_makes_the_same_model_in_the_graph_and_from_a_file(comfy):
    graph = Graph()
    original = graph.loader("flux.safetensors")
    found = calibrated(graph, original, "flux")
    graph.add("MXFP8SaveCalibration", calibration=found, filename_prefix="calibrations/flux")
    saved = {"now": graph.save_latent(graph.sample(
        quantized(graph, original, calibration=found), "flux"
    ))}  # fmt: skip
    latent = run(comfy, graph, saved)
    name = "flux_00001_.safetensors"
    stored = calibration.load(comfy.base / "output" / "calibrations" / name)
    assert max(moments.rows for moments in stored.layers.values()) > 8  # steps

    graph = Graph()
    loaded = graph.add("MXFP8LoadCalibration", calibration_name=name)
    again = quantized(graph, graph.loader("flux.safetensors"), calibration=loaded)
    graph.add(
        "MXFP8ConvertFile", source="diffusion_models/flux.safetensors", target="calibrated",
        preset="auto", overwrite=True, calibration=loaded,
    )  # fmt: skip
    latent |= run(comfy, graph, {"loaded": graph.save_latent(graph.sample(again, "flux"))})
    graph = Graph()
    file = graph.loader("calibrated.safetensors")
    latent |= run(comfy, graph, {"file": graph.save_latent(graph.sample(file, "flux"))})
    (comfy.base / "models" / "diffusion_models" / "calibrated.safetensors").unlink()
    assert difference(latent["loaded"], latent["now"]) < SAME
    assert difference(latent["file"], latent["now"]) < 1e-3  # the file's own dtype: other roundings


def test_groups_that_fit_the_memory_see_what_all_see_together(comfy):
    graph = Graph()
    original = graph.loader("flux.safetensors")
    files = {}
    for name, memory in (("together", 4.0), ("groups", 0.1)):
        found = calibrated(graph, original, "flux", seeds=1, steps=2, memory_gb=memory)
        graph.add("MXFP8SaveCalibration", calibration=found, filename_prefix=f"calibrations/{name}")
        files[name] = comfy.base / "output" / "calibrations" / f"{name}_00001_.safetensors"
    comfy.run(graph)
    one, other = (calibration.load(path) for path in files.values())
    assert one.model == other.model and one.layers.keys() == other.layers.keys()
    for name, moments in one.layers.items():
        assert moments.rows == other.layers[name].rows
        assert difference(other.layers[name].second, moments.second) < 1e-5, name


def test_the_model_is_left_as_it_was_and_a_lora_is_part_of_it(comfy):
    graph = Graph()
    original = graph.loader("flux.safetensors")
    with_lora = graph.add(
        "LoraLoaderModelOnly", model=original, lora_name="lora.safetensors", strength_model=1.0
    )
    before = graph.save_latent(graph.sample(with_lora, "flux"))
    found = calibrated(graph, with_lora, "flux", seeds=1, steps=2)
    made = quantized(graph, with_lora, calibration=found)
    saved = {"before": before, "made": graph.save_latent(graph.sample(made, "flux"))}
    latent = run(comfy, graph, saved)
    assert difference(latent["made"], latent["before"]) < 0.1
    graph = Graph()
    again = graph.add(
        "LoraLoaderModelOnly", model=graph.loader("flux.safetensors"),
        lora_name="lora.safetensors", strength_model=1.0,
    )  # fmt: skip
    latent |= run(comfy, graph, {"after": graph.save_latent(graph.sample(again, "flux"))})
    assert difference(latent["after"], latent["before"]) == 0

    graph = Graph()
    original = graph.loader("flux.safetensors")
    with_lora = graph.add(
        "LoraLoaderModelOnly", model=original, lora_name="lora.safetensors", strength_model=1.0
    )
    found = calibrated(graph, with_lora, "flux", seeds=1, steps=2)
    graph.save_latent(graph.sample(quantized(graph, original, calibration=found), "flux"))
    with pytest.raises(PromptError, match="made with other weights; calibrate this model"):
        comfy.run(graph)


def test_what_cannot_be_calibrated_is_refused_in_words(comfy):
    graph = Graph()
    found = calibrated(graph, graph.loader("flux-mxfp8.safetensors"), "flux")
    graph.add("MXFP8SaveCalibration", calibration=found, filename_prefix="calibrations/never")
    with pytest.raises(PromptError, match="quantised already; calibrate the BF16"):
        comfy.run(graph)
    graph = Graph()
    found = calibrated(graph, graph.loader("flux.safetensors"), "flux", exclude=".")
    graph.add("MXFP8SaveCalibration", calibration=found, filename_prefix="calibrations/never")
    with pytest.raises(PromptError, match="calibration is empty: no layer of this Flux was run"):
        comfy.run(graph)
    assert not list((comfy.base / "output").rglob("never*"))
