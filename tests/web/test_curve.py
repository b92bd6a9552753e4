"""The curve of size and quality in the real ComfyUI's page, in both renderers, in Chromium."""

from __future__ import annotations

import json
import re
import struct

import pytest
from browser import RENDERERS, ComfyPage

pytestmark = pytest.mark.comfy

MEASURE = "Size and quality"
EXCLUDED = "double_blocks.0.img_attn.proj"


@pytest.fixture(scope="module", params=RENDERERS)
def shown(request, comfy, browser):
    """A page with a calibrated Flux that is given a size; light on the canvas, dark in HTML."""
    theme = "light" if request.param == "litegraph" else "dark"
    page = ComfyPage(browser, comfy, nodes2=RENDERERS[request.param], theme=theme)
    page.page.set_viewport_size({"width": 1600, "height": 1000})
    page.clear()
    load = page.add("UNETLoader", (60, 120), unet_name="flux.safetensors")
    prompt = page.add("LotusConditioning", (60, 300))
    latent = page.add("EmptySD3LatentImage", (60, 400), width=64, height=64)
    calibrate = page.add(
        "MXFP8Calibrate", (420, 120), seeds=1, steps=2, sensitivity=True,
        first_seed=int(page.nodes2),  # or the server has the results of the other page
    )  # fmt: skip
    quantize = page.add("MXFP8Quantize", (900, 120), size_or_quality="80%", exclude=EXCLUDED)
    end = page.add("PreviewAny", (1400, 120))
    for source, to, name in (
        (load, calibrate, "model"), (prompt, calibrate, "positive"),
        (prompt, calibrate, "negative"), (latent, calibrate, "latent_image"),
        (load, quantize, "model"), (calibrate, quantize, "calibration"),
    ):  # fmt: skip
        page.link(source, to, name)
    page.link(quantize, end, "source", slot=1)
    page.queue()
    page.nodes = {"calibrate": calibrate, "quantize": quantize}
    page.view = page.page.locator(".mxfp8-report").nth(1)
    page.view.get_by_role("button", name="show layers").click()
    page.view.locator(".point").first.wait_for()
    yield page
    assert not page.complaints
    page.close()


def output(shown, node: str, key: str) -> dict:
    return json.loads(shown.page.evaluate(f"app.nodeOutputs[{shown.nodes[node]}].{key}[0]"))


def details(shown) -> str:
    return shown.view.locator(".details").inner_text()


def test_the_target_is_the_first_point_that_is_read_out(shown):
    budget = output(shown, "quantize", "mxfp8_budget")
    known = [p for p in [*budget["curve"], *budget["others"]] if p["snr_db"] is not None]
    assert shown.view.locator(".point").count() == len(known) + 1
    assert details(shown).startswith("target 80%")
    assert f"Layers kept: {budget['chosen']['point']['kept']}" in details(shown)
    report = output(shown, "quantize", "mxfp8_report")
    assert report["bytes_after"] == budget["chosen"]["point"]["bytes"]


def test_pointing_and_keys_choose_points(shown):
    budget = output(shown, "quantize", "mxfp8_budget")
    box = shown.view.locator(".point").nth(2).bounding_box()
    shown.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert details(shown).startswith(budget["curve"][2]["label"])
    shown.view.locator("[role=listbox]").focus()
    shown.page.keyboard.press("ArrowRight")
    assert details(shown).startswith(budget["curve"][3]["label"])
    assert f"{budget['curve'][3]['snr_db']:.2f} dB" in details(shown)
    assert "Layers kept: 3" in details(shown)


def test_points_stand_by_size_and_quality(shown):
    budget = output(shown, "quantize", "mxfp8_budget")
    drawn = shown.view.locator(".point").evaluate_all(
        "(all) => all.map((e) => [Number(e.getAttribute('cx')), Number(e.getAttribute('cy'))])"
    )
    steps = [p for p in budget["curve"] if p["snr_db"] is not None]
    first, last = steps[0], steps[-1]
    for (x, y), point in zip(drawn, steps, strict=False):
        share = (point["bytes"] - first["bytes"]) / (last["bytes"] - first["bytes"])
        assert x == pytest.approx(drawn[0][0] + share * (drawn[len(steps) - 1][0] - drawn[0][0]))
        gain = (point["snr_db"] - first["snr_db"]) / (last["snr_db"] - first["snr_db"])
        assert y == pytest.approx(drawn[0][1] + gain * (drawn[len(steps) - 1][1] - drawn[0][1]))


def test_exclude_is_copied_and_makes_the_same_choice(shown):
    """With what the node's own `exclude` keeps, which the copied one replaces."""
    shown.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    budget = output(shown, "quantize", "mxfp8_budget")
    every = output(shown, "calibrate", "mxfp8_report")["layers"]
    layers = [f"{layer['name']}.weight" for layer in every]
    assert EXCLUDED in {k.removesuffix(".weight") for k in layers}
    target = shown.view.get_by_role("option", name="target 80%")
    worst = [layer["name"] for layer in budget["layers"][:3]]
    for option, kept in (
        (target, {EXCLUDED, *budget["chosen"]["layers"]}),
        (shown.view.locator(".point").nth(3), {EXCLUDED, *worst}),
    ):
        option.hover(force=True)
        shown.view.get_by_role("button", name="copy exclude").click()
        shown.view.get_by_role("button", name="copied").wait_for()
        text = shown.page.evaluate("() => navigator.clipboard.readText()")
        assert {k.removesuffix(".weight") for k in layers if re.search(text, k)} == kept
        shown.view.get_by_role("button", name="copy exclude").wait_for()


def test_the_curve_is_saved_as_a_picture(shown, tmp_path):
    with shown.page.expect_download() as download:
        shown.view.get_by_role("button", name="save PNG").click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    assert width > 500 and height > 300
    shown.page.screenshot(path=tmp_path / "curve.png")


def test_a_report_s_own_measures_stay(shown):
    shown.view.locator("[name=measure]").select_option(label="SQNR")
    report = output(shown, "quantize", "mxfp8_report")
    assert shown.view.locator(".bar").count() == len(report["layers"])
    assert shown.view.get_by_role("button", name="copy exclude").count() == 0
    assert shown.view.locator("[name=filter]").is_visible()
    shown.view.locator("[name=measure]").select_option(label=MEASURE)
    assert shown.view.locator("[name=filter]").is_hidden()


def test_a_calibration_shows_the_curve_too(shown):
    view = shown.page.locator(".mxfp8-report").first
    view.get_by_role("button", name="show layers").click()
    assert view.locator(".details").inner_text().startswith("all MXFP8")
    view.locator("[name=measure]").select_option(label="Share of the error")
    layers = output(shown, "calibrate", "mxfp8_report")["layers"]
    assert view.locator(".bar").count() == len(layers)


def test_a_plan_says_that_a_calibration_is_to_come(shown):
    node = shown.nodes["quantize"]
    shown.page.evaluate(
        """(id) => {
            const node = app.graph.getNodeById(id);
            const widget = node.widgets.find((w) => w.name === "size_or_quality");
            widget.value = "70%";
            widget.callback("70%", app.canvas, node);
        }""",
        node,
    )
    plan = shown.view.locator(".verdict").filter(has_text="known when the calibration is there")
    plan.wait_for()
    assert "target 70%" in plan.inner_text()
