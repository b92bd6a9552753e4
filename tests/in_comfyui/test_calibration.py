"""From calibration to a better quantized model, in the real ComfyUI."""

from __future__ import annotations

import re
import shutil

import pytest
from comfyui import PromptError
from graphs import (
    LATENTS,
    SAME,
    Graph,
    calibrated,
    difference,
    interrupt,
    latents,
    quantized,
    run,
    watch,
    with_lora,
)

from mxfp8.quant.conversion import calibration
from mxfp8.quant.reports.conversion import Report

pytestmark = pytest.mark.comfy


# `most`: of the error that rounding to nearest leaves. Many of Flux's layers are given one row a
# step (modulations, inputs): 8 rows say little, so they stay as they are.
@pytest.mark.parametrize(
    ("kind", "exclude", "most"), [("flux", "mod|_in", 0.9), ("flux2", "", 0.9), ("wan", "", 0.9)]
)
def test_a_calibrated_model_is_nearer_to_the_original_on_seeds_it_has_not_seen(
    comfy, kind, exclude, most
):
    graph = Graph()
    original = graph.loader(f"{kind}.safetensors")
    node = calibrated(graph, original, kind, exclude=exclude)
    ours = quantized(graph, original, exclude=exclude, calibration=node)
    plain = quantized(graph, original, exclude=exclude)
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
    assert "layers calibrated: layer output error 0." in outputs[ours[0]]["text"][0]


def test_a_saved_calibration_makes_the_same_model_in_the_graph_and_from_a_file(comfy):
    graph = Graph()
    original = graph.loader("flux.safetensors")
    node = calibrated(graph, original, "flux")
    graph.add("MXFP8SaveCalibration", calibration=node, filename_prefix="calibrations/flux")
    saved = {"now": graph.save_latent(graph.sample(
        quantized(graph, original, calibration=node), "flux"
    ))}  # fmt: skip
    latent = run(comfy, graph, saved)
    name = "flux_00001_.safetensors"
    stored = calibration.load(comfy.base / "output" / "calibrations" / name)
    assert stored.about == {
        "first_seed": 100, "seeds": 2, "steps": 4, "cfg": 1.0, "sampler": "euler",
        "scheduler": "simple", "denoise": 1.0, "preset": "auto", "include": "", "exclude": "",
    }  # fmt: skip
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
        node = calibrated(graph, original, "flux", seeds=1, steps=2, memory_gb=memory)
        graph.add("MXFP8SaveCalibration", calibration=node, filename_prefix=f"calibrations/{name}")
        files[name] = comfy.base / "output" / "calibrations" / f"{name}_00001_.safetensors"
        notes[name] = node[0]
    outputs = comfy.run(graph)
    assert "in 1 group: 1 run of 2 steps" in outputs[notes["together"]]["text"][0]
    assert "in 1 group:" not in outputs[notes["groups"]]["text"][0]
    one, other = (calibration.load(path) for path in files.values())
    assert one.model == other.model and one.layers.keys() == other.layers.keys()
    for name, moments in one.layers.items():
        assert moments.rows == other.layers[name].rows
        for part in ("hessian", "mean", "amax"):
            apart = difference(getattr(other.layers[name], part), getattr(moments, part))
            assert apart < 1e-5, (name, part)
        # No mean is beyond the largest magnitude, nor its square beyond the mean of squares.
        assert (moments.mean.abs() <= moments.amax * 1.001).all()
        assert (moments.mean**2 <= moments.hessian.diagonal() * 1.001).all()


def test_a_calibration_needs_no_file_in_the_temp_folder(comfy):
    """A second ComfyUI on the same folders empties it when it starts."""
    graph = Graph()
    original = graph.loader("flux.safetensors")
    node = calibrated(graph, original, "flux", first_seed=5, seeds=1, steps=2, memory_gb=0.002)
    files = []
    for name in ("before", "after"):
        graph.add("MXFP8SaveCalibration", calibration=node, filename_prefix=f"calibrations/{name}")
        comfy.run(graph)
        files.append(comfy.base / "output" / "calibrations" / f"{name}_00001_.safetensors")
        shutil.rmtree(comfy.base / "temp", ignore_errors=True)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_model_is_left_as_it_was_and_a_lora_is_part_of_it(comfy):
    graph = Graph()
    original = graph.loader("flux.safetensors")
    patched = with_lora(graph, original)
    before = graph.save_latent(graph.sample(patched, "flux"))
    node = calibrated(graph, patched, "flux", seeds=1, steps=2)
    made = quantized(graph, patched, calibration=node)
    saved = {"before": before, "made": graph.save_latent(graph.sample(made, "flux"))}
    latent = run(comfy, graph, saved)
    assert difference(latent["made"], latent["before"]) < 0.1
    graph = Graph()
    again = with_lora(graph, graph.loader("flux.safetensors"))
    latent |= run(comfy, graph, {"after": graph.save_latent(graph.sample(again, "flux"))})
    assert difference(latent["after"], latent["before"]) == 0

    graph = Graph()
    original = graph.loader("flux.safetensors")
    patched = with_lora(graph, original)
    node = calibrated(graph, patched, "flux", seeds=1, steps=2)
    graph.save_latent(graph.sample(quantized(graph, original, calibration=node), "flux"))
    with pytest.raises(PromptError, match="made with other weights; calibrate this model"):
        comfy.run(graph)


def test_what_cannot_be_calibrated_is_refused_in_words(comfy):
    for how, message in (
        ("bypass", "'bypass_lora' on this Flux runs beside its layers"),
        ("module", "'diffusion_model' of this Flux was replaced by"),
    ):
        graph = Graph()
        model = graph.loader("flux.safetensors")
        if how == "bypass":
            model = graph.add("LoraLoaderBypassModelOnly", model=model,
                              lora_name="lora.safetensors", strength_model=1.0)  # fmt: skip
        else:
            model = graph.add("TestPatch", model=model, kind=how)
        graph.add("MXFP8SaveCalibration", calibration=calibrated(graph, model, "flux"),
                  filename_prefix="calibrations/never")  # fmt: skip
        with pytest.raises(PromptError, match=message):
            comfy.run(graph)
    graph = Graph()
    node = calibrated(graph, graph.loader("flux-mxfp8.safetensors"), "flux")
    graph.add("MXFP8SaveCalibration", calibration=node, filename_prefix="calibrations/never")
    with pytest.raises(PromptError, match=r"already quantized .*; convert the BF16"):
        comfy.run(graph)
    graph = Graph()
    node = calibrated(graph, graph.loader("flux.safetensors"), "flux", exclude=".")
    graph.add("MXFP8SaveCalibration", calibration=node, filename_prefix="calibrations/never")
    with pytest.raises(PromptError, match="calibration is empty: no layer of this Flux is to be"):
        comfy.run(graph)
    assert not list((comfy.base / "output").rglob("never*"))


@pytest.mark.parametrize(("kind", "memory", "fewest"), [("flux", 0.002, 2), ("wan", 4.0, 1)])
def test_the_plan_the_time_and_one_bar_for_all_runs_are_on_the_node(comfy, kind, memory, fewest):
    graph = Graph()
    original = graph.loader(f"{kind}.safetensors")
    node = calibrated(graph, original, kind, steps=3, memory_gb=memory)
    graph.add("MXFP8SaveCalibration", calibration=node, filename_prefix="calibrations/shown-plan")
    bars, shown = watch(comfy, graph)
    bar, texts = bars[node[0]], shown[node[0]]
    plan = re.fullmatch(
        r"(\d+ layers, [\d.]+ [kM]B in (\d+) groups?: (\d+) runs of 3 steps)\. The first step "
        r"shows how long that takes\.",
        texts[0],
    )
    assert plan, texts[0]
    groups, runs = int(plan[2]), int(plan[3])
    assert groups >= fewest and runs == 2 * groups
    steps = 3 * runs
    first = rf"{re.escape(plan[1])}\nstep 1 of {steps}, (\d+ min )?\d+ s left"
    assert re.fullmatch(first, texts[1]), texts[1]
    assert texts[-1].startswith(plan[1]) and ", at least " in texts[-1]
    assert bar == sorted(bar) and {most for _, most in bar} == {steps}
    assert bar[0][0] == 1 and bar[-1][0] == steps


def test_saving_and_loading_show_layer_by_layer_how_far_they_are(comfy):
    """And stop at an interrupt: what shows it asks."""
    graph = Graph()
    node = calibrated(graph, graph.loader("flux.safetensors"), "flux", seeds=1, steps=1)
    graph.add("MXFP8SaveCalibration", calibration=node, filename_prefix="calibrations/shown")
    comfy.run(graph)
    graph = Graph()
    loaded = graph.add("MXFP8LoadCalibration", calibration_name="shown_00001_.safetensors")
    saved = graph.add("MXFP8SaveCalibration", calibration=loaded, filename_prefix="calibrations/b")
    bars, texts = watch(comfy, graph)
    for node in (loaded[0], saved[0]):
        done, total = bars[node][-1]
        assert done == total > 10**6 and bars[node][0][0] < total, node
        assert "%" in texts[node][0], node


def test_layers_that_never_run_are_named_and_rounded_to_nearest(comfy):
    graph = Graph()
    original = graph.loader("flux.safetensors")
    skipped = graph.add("TestForward", model=original, how="skip", call=0)
    node = calibrated(graph, skipped, "flux", seeds=1, steps=2)
    made = quantized(graph, original, calibration=node)
    graph.save_latent(graph.sample(made, "flux"))
    outputs = comfy.run(graph)
    (fault,) = (
        line
        for line in outputs[node[0]]["text"][0].splitlines()
        if "layers got no input and will be rounded to nearest: 'single_blocks" in line
    )
    report = Report.from_json(outputs[made[0]]["mxfp8_report"][0])
    silent = [layer.name for layer in report.quantized if layer.output_error is None]
    assert silent and all(name.startswith("single_blocks.") for name in silent)
    assert fault.startswith(f"{len(silent)} layers") and all(
        f"'{name}'" in fault for name in silent
    )


def test_layers_whose_inputs_are_not_finite_are_named_with_how_many_do_not_count(comfy):
    graph = Graph()
    original = graph.loader("flux.safetensors")
    nodes = {
        how: calibrated(graph, graph.add("TestForward", model=original, how=how, call=call),
                        "flux", seeds=1, exclude="mod|^[^.]*$|^final|_in")
        for how, call in (("late", 20), ("huge", 0))
    }  # fmt: skip
    for how, node in nodes.items():
        graph.add("MXFP8SaveCalibration", calibration=node, filename_prefix=f"calibrations/{how}")
    outputs = comfy.run(graph)
    texts = {how: outputs[node[0]]["text"][0].splitlines() for how, node in nodes.items()}
    assert any(
        re.fullmatch(r"\d+ layers got rows with NaN or Inf, which were left out: "
                     r"('[\w.]+' \(\d+\)(, )?)+( and \d+ more)?", line)
        for line in texts["late"]
    ), texts  # fmt: skip
    assert any(
        re.match(r"\d+ layers? got values whose squares float32 cannot hold and will be rounded to "
                 r"nearest: 'double_blocks\.0\.\w+_mlp\.2'", line)
        for line in texts["huge"]
    ), texts  # fmt: skip


def test_all_moments_have_their_memory_before_the_model_runs(comfy):
    """ComfyUI fills a GPU with the model: what is asked for later is not there."""
    graph = Graph()
    original = graph.loader("flux.safetensors")
    model = graph.add("TestForward", model=original, how="moments", call=1)
    node = calibrated(graph, model, "flux", seeds=1, steps=1, preset="none")
    graph.add("MXFP8SaveCalibration", calibration=node, filename_prefix="calibrations/never")
    with pytest.raises(PromptError) as raised:
        comfy.run(graph)
    plan = re.findall(r"calibration of (\d+ layers),", comfy.log.read_text(errors="replace"))[-1]
    assert f"{plan} have memory" in str(raised.value)


def test_the_model_stays_usable_when_memory_ends_or_values_are_no_numbers(comfy):
    """Half-way through the second of two seeds; nothing that was noted stays in memory."""
    graph = Graph()
    original = graph.loader("flux.safetensors")
    before = graph.save_latent(graph.sample(original, "flux"))
    latent = run(comfy, graph, {"before": before})

    for how, message in (
        (
            "memory",
            "out of memory while calibrating this Flux, which is unchanged; lower memory_gb",
        ),
        ("nan", "calibration is empty: no layer of this Flux received usable"),
    ):
        failing = Graph(graph)
        model = failing.add("TestForward", model=original, how=how, call=60)
        node = calibrated(failing, model, "flux", preset="none", exclude="^(?!.*blocks)")
        if how == "nan":  # the first layer is given numbers; what follows is not
            failing[node[0]]["inputs"]["exclude"] += r"|img_mod|txt_mod|modulation"
        failing.add("MXFP8SaveCalibration", calibration=node, filename_prefix="calibrations/never")
        with pytest.raises(PromptError, match=message):
            comfy.run(failing)

        again = Graph(graph)
        sampled = again.sample(original, "flux", steps=2)
        held = again.add("TestMoments", samples=sampled)
        saved = again.save_latent(sampled, prefix=f"after-{how}")
        outputs = comfy.run(again)
        assert outputs[held[0]]["result"] == [0], how
        after = latents(outputs, saved, comfy.base)
        assert difference(after, latent["before"]) < SAME, how


def test_an_interrupt_stops_before_the_next_layer_and_a_second_run_works(comfy):
    graph = Graph()
    node = calibrated(graph, graph.loader("flux.safetensors"), "flux")
    graph.add("MXFP8SaveCalibration", calibration=node, filename_prefix="calibrations/stopped")
    # Of 13 layers a step: in the middle of the second step of the first seed.
    add = ("quant.conversion.calibration", "HessianAccumulator.add")
    assert interrupt(comfy, graph, *add, call=20) == 0
    assert not list((comfy.base / "output").rglob("stopped*"))
    graph = Graph()  # before another model is loaded, which would take our patches off this one
    held = graph.add("TestMoments", samples=graph.add("EmptySD3LatentImage", **LATENTS["flux"][1],
                                                   batch_size=1))  # fmt: skip
    assert comfy.run(graph)[held[0]]["result"] == [0]

    graph = Graph()
    original = graph.loader("flux.safetensors")
    node = calibrated(graph, original, "flux", seeds=1, steps=2)
    graph.add("MXFP8SaveCalibration", calibration=node, filename_prefix="calibrations/second")
    outputs = comfy.run(graph)
    (text,) = outputs[node[0]]["text"]
    assert " rows each, in " in text and "(in-sample)" in text
    (few,) = re.findall(r"(\d+) layers saw fewer rows than the layer's width", text)  # 16 of 128
    assert int(few) > 5
