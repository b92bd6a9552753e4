"""From calibration to a better quantised model, in the real ComfyUI."""

from __future__ import annotations

import asyncio
import re
import struct
import time

import aiohttp
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
        "first_seed": 100, "seeds": 2, "steps": 4, "cfg": 1.0, "sampler_name": "euler",
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
    files, notes = {}, {}
    for name, memory in (("together", 4.0), ("groups", 0.002)):
        found = calibrated(graph, original, "flux", seeds=1, steps=2, memory_gb=memory)
        graph.add("MXFP8SaveCalibration", calibration=found, filename_prefix=f"calibrations/{name}")
        files[name] = comfy.base / "output" / "calibrations" / f"{name}_00001_.safetensors"
        notes[name] = found[0]
    outputs = comfy.run(graph)
    assert "in 1 groups: 1 runs" in outputs[notes["together"]]["text"][0]
    assert "in 1 groups" not in outputs[notes["groups"]]["text"][0]
    one, other = (calibration.load(path) for path in files.values())
    assert one.model == other.model and one.layers.keys() == other.layers.keys()
    for name, moments in one.layers.items():
        assert moments.rows == other.layers[name].rows
        for part in ("second", "mean", "amax"):
            apart = difference(getattr(other.layers[name], part), getattr(moments, part))
            assert apart < 1e-5, (name, part)
        # What they are of each other: no mean is beyond the largest, nor its square the second's.
        assert (moments.mean.abs() <= moments.amax * 1.001).all()
        assert (moments.mean**2 <= moments.second.diagonal() * 1.001).all()


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


@pytest.mark.parametrize(("kind", "memory", "fewest"), [("flux", 0.002, 2), ("wan", 4.0, 1)])
def test_the_plan_the_time_and_one_bar_for_all_runs_are_on_the_node(comfy, kind, memory, fewest):
    """As the browser does: listen on the websocket while the workflow runs."""

    async def listen(graph, node):
        bar, texts = [], []
        url = f"{comfy.url}/ws?clientId={comfy.client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
            await asyncio.to_thread(comfy.submit, graph)
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    event, length = struct.unpack(">II", message.data[:8])
                    if (event, message.data[8 : 8 + length].decode()) == (3, node):  # a text
                        texts.append(message.data[8 + length :].decode())
                    continue
                event = message.json()
                if event.get("type") == "progress" and event["data"]["node"] == node:
                    bar.append((event["data"]["value"], event["data"]["max"]))
                if event.get("type") in ("execution_success", "execution_error"):
                    return bar, texts

    graph = Graph()
    original = graph.loader(f"{kind}.safetensors")
    found = calibrated(graph, original, kind, steps=3, memory_gb=memory)
    graph.add("MXFP8SaveCalibration", calibration=found, filename_prefix="calibrations/told")
    bar, texts = asyncio.run(asyncio.wait_for(listen(graph, found[0]), 120))
    plan = re.fullmatch(
        r"(\d+ layers, [\d.]+ [kM]B in (\d+) groups: (\d+) runs of 3 steps). Its first step "
        "tells how long that takes.",
        texts[0],
    )
    assert plan, texts[0]
    groups, runs = int(plan[2]), int(plan[3])
    assert groups >= fewest and runs == 2 * groups
    steps = 3 * runs
    assert re.fullmatch(rf"{plan[1]}\nstep 1 of {steps}, about (\d+ min )?\d+ s to go", texts[1]), (
        texts[1]
    )
    assert texts[-1].startswith(plan[1]) and " rows at least" in texts[-1]
    assert bar == sorted(bar) and {most for _, most in bar} == {steps}
    assert bar[0][0] == 1 and bar[-1][0] == steps


def test_layers_that_never_run_are_named_and_rounded_to_nearest(comfy):
    graph = Graph()
    original = graph.loader("flux.safetensors")
    skipped = graph.add("TestForward", model=original, how="skip", call=0)
    found = calibrated(graph, skipped, "flux", seeds=1, steps=2)
    made = quantized(graph, original, calibration=found)
    graph.save_latent(graph.sample(made, "flux"))
    outputs = comfy.run(graph)
    said = outputs[found[0]]["text"][0].splitlines()[-1]
    assert "layers were given nothing finite and will be rounded to nearest: 'single_blocks" in said
    report = Report.from_json(outputs[made[0]]["mxfp8_report"][0])
    silent = [layer.name for layer in report.quantized if layer.output_error is None]
    assert silent and all(name.startswith("single_blocks.") for name in silent)
    assert said.startswith(f"{len(silent)} layers") and all(f"'{name}'" in said for name in silent)


def test_the_model_stays_usable_when_memory_ends_or_values_are_no_numbers(comfy):
    """Half-way through the second of two seeds; nothing that was noted stays in memory."""
    graph = Graph()
    original = graph.loader("flux.safetensors")
    before = graph.save_latent(graph.sample(original, "flux"))
    latent = run(comfy, graph, {"before": before})

    for how, message in (
        ("memory", "out of memory while this Flux was calibrated; it is as it was before. Lower"),
        ("nan", "calibration is empty: no layer of this Flux was run on finite values"),
    ):
        failing = Graph(graph)
        model = failing.add("TestForward", model=original, how=how, call=60)
        found = calibrated(failing, model, "flux", preset="none", exclude="^(?!.*blocks)")
        if how == "nan":  # the first layer is given numbers; what follows is not
            failing[found[0]]["inputs"]["exclude"] += r"|img_mod|txt_mod|modulation"
        failing.add("MXFP8SaveCalibration", calibration=found, filename_prefix="calibrations/never")
        with pytest.raises(PromptError, match=message):
            comfy.run(failing)

        again = Graph(graph)
        sampled = again.sample(original, "flux", steps=2)
        held = again.add("TestSums", samples=sampled)
        saved = again.save_latent(sampled, prefix=f"after-{how}")
        outputs = comfy.run(again)
        assert outputs[held[0]]["result"] == [0], how
        after = latents(outputs, saved, comfy.base)
        assert difference(after, latent["before"]) < SAME, how


def test_an_interrupt_stops_within_a_step_and_a_second_run_works(comfy):
    graph = Graph()
    original = graph.loader("flux.safetensors")
    slow = graph.add("TestForward", model=original, how="slow", call=0)  # 5 s and more a step
    found = calibrated(graph, slow, "flux")
    graph.add("MXFP8SaveCalibration", calibration=found, filename_prefix="calibrations/stopped")
    prompt = comfy.submit(graph)
    deadline = time.monotonic() + 60
    seen = comfy.log.read_text(errors="replace").count("calibration of")
    while comfy.log.read_text(errors="replace").count("calibration of") == seen:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.0)  # some layers on
    start = time.monotonic()
    comfy.post("/interrupt", {})
    with pytest.raises(PromptError, match="interrupted"):
        comfy.wait(prompt, 60)
    assert time.monotonic() - start < 2.5  # a layer takes 0.3 s here, a step over 5 s
    assert not list((comfy.base / "output").rglob("stopped*"))
    graph = Graph()  # before another model is loaded, which would take our patches off this one
    held = graph.add("TestSums", samples=graph.add("EmptySD3LatentImage", **LATENTS["flux"][1],
                                                   batch_size=1))  # fmt: skip
    assert comfy.run(graph)[held[0]]["result"] == [0]

    graph = Graph()
    original = graph.loader("flux.safetensors")
    found = calibrated(graph, original, "flux", seeds=1, steps=2)
    graph.add("MXFP8SaveCalibration", calibration=found, filename_prefix="calibrations/second")
    outputs = comfy.run(graph)
    assert " rows at least" in outputs[found[0]]["text"][0]
