"""The report view in the real ComfyUI's page, in both of its renderers, in Chromium."""

from __future__ import annotations

import json
import re
import struct

import pytest
import translations
from browser import RENDERERS, ComfyPage

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module", params=RENDERERS)
def quantized(request, comfy, browser, tmp_path_factory):
    """A page with a report: Flux, two of its layers kept."""
    shown = ComfyPage(browser, comfy, nodes2=RENDERERS[request.param])
    shown.clear()
    loader = shown.add("UNETLoader", (60, 160), unet_name="flux.safetensors")
    kept = f"txt_in|img_in|{request.param}"
    node = shown.add("MXFP8Quantize", (420, 160), preset="none", exclude=kept)
    end = shown.add("PreviewAny", (980, 160))
    shown.link(loader, node, "model")
    shown.link(node, end, "source", slot=1)
    shown.queue()
    shown.node = node
    shown.view = shown.page.locator(".mxfp8-report")
    shown.view.get_by_role("button", name="show layers").click()
    shown.view.locator(".bar").first.wait_for()
    picture = tmp_path_factory.mktemp("pictures") / f"report-{request.param}.png"
    shown.page.screenshot(path=picture)
    yield shown
    assert not shown.complaints
    shown.close()


def report(shown) -> dict:
    """The document that the node sent."""
    return json.loads(shown.page.evaluate(f"app.nodeOutputs[{shown.node}].mxfp8_report[0]"))


def choose(shown, name: str, label: str) -> None:
    shown.view.locator(f"[name={name}]").select_option(label=label)


def boxes(shown) -> list[dict]:
    """Position and size of each bar, in px of the page."""
    return shown.view.locator(".bar").evaluate_all(
        "(all) => all.map((e) => { const b = e.getBoundingClientRect();"
        " return {x: b.x, y: b.y, width: b.width, height: b.height}; })"
    )


def labels(shown) -> list[str]:
    return shown.view.locator(".bar").evaluate_all(
        "(all) => all.map((e) => e.getAttribute('aria-label').split(',')[0])"
    )


def test_every_layer_has_a_bar_of_its_size(quantized):
    layers = report(quantized)["layers"]
    choose(quantized, "measure", "Size")
    bars = boxes(quantized)
    assert len(bars) == len(layers) > 10
    largest = max(layers, key=lambda layer: layer["bytes_after"])
    unit = bars[layers.index(largest)]["height"] / largest["bytes_after"]
    for box, layer in zip(bars, layers, strict=True):
        assert box["height"] == pytest.approx(layer["bytes_after"] * unit, abs=1.5)
    choose(quantized, "measure", "SQNR")


def test_the_summary_is_the_report_s(quantized):
    text = quantized.view.locator(".summary").inner_text()
    assert "17 layers MXFP8, 2 not quantized" in text and "worst layer" in text
    legend = quantized.view.locator(".legend").inner_text()
    assert "MXFP8 17" in legend and "not quantized 2" in legend
    widgets = quantized.page.evaluate(
        f"app.graph.getNodeById({quantized.node}).widgets.map((w) => w.name)"
    )
    assert "$$node-text-preview" not in widgets  # it would repeat the summary


@pytest.mark.parametrize("zoom", [1.0, 0.5, 1.7])
def test_pointing_at_a_bar_shows_its_layer_at_every_zoom(quantized, zoom):
    quantized.page.evaluate(
        f"() => {{ app.canvas.ds.scale = {zoom}; app.canvas.ds.offset = [-300, -100];"
        " app.canvas.setDirty(true, true); }"
    )
    quantized.settle()
    layers = report(quantized)["layers"]
    for index in (0, 5, len(layers) - 1):
        box = boxes(quantized)[index]
        quantized.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 1)
        details = quantized.view.locator(".details").inner_text()
        assert details.startswith(layers[index]["name"])
        assert " x ".join(map(str, layers[index]["shape"])) in details
        assert layers[index]["reason"] in details
    quantized.page.evaluate("() => { app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 0]; }")
    quantized.settle()


def test_layers_are_sorted_and_filtered(quantized):
    layers = report(quantized)["layers"]
    choose(quantized, "order", "worst first")
    lossy = [layer for layer in layers if layer["sqnr_db"] is not None]
    expected = [x["name"] for x in sorted(lossy, key=lambda layer: layer["sqnr_db"])]
    assert labels(quantized)[: len(expected)] == expected
    choose(quantized, "order", "in order")
    quantized.view.locator("[name=filter]").fill("kept")
    assert labels(quantized) == ["img_in", "txt_in"]
    quantized.view.locator("[name=filter]").fill("no such layer")
    assert labels(quantized) == []
    assert "No layer" in quantized.view.locator(".details").inner_text()
    quantized.view.locator("[name=filter]").fill("")
    assert labels(quantized) == [layer["name"] for layer in layers]


def test_keys_walk_the_bars_and_reach_nothing_else(quantized):
    nodes = quantized.page.evaluate("app.graph._nodes.length")
    layers = report(quantized)["layers"]
    chart = quantized.view.locator("[role=listbox]")
    chart.focus()
    for key, index in (("ArrowRight", 0), ("ArrowRight", 1), ("End", -1), ("Home", 0)):
        quantized.page.keyboard.press(key)
        chosen = quantized.view.locator("[aria-selected=true]")
        assert chosen.count() == 1
        name = layers[index]["name"]
        assert chosen.get_attribute("aria-label").startswith(name)
        assert chart.get_attribute("aria-activedescendant") == chosen.get_attribute("id")
        assert quantized.view.locator(".details").inner_text().startswith(name)
    # Letters and Delete are shortcuts of the canvas; in the filter they are text.
    quantized.view.locator("[name=filter]").focus()
    quantized.page.keyboard.type("qrw")
    quantized.page.keyboard.press("Delete")
    assert quantized.view.locator("[name=filter]").input_value() == "qrw"
    quantized.view.locator("[name=filter]").fill("")
    assert quantized.page.evaluate("app.graph._nodes.length") == nodes


def test_every_control_has_a_name_and_every_bar_a_role(quantized):
    for name in ("measure", "order", "filter"):
        assert quantized.view.locator(f"[name={name}]").get_attribute("aria-label")
    assert quantized.view.get_by_role("option", name="img_in, not quantized").count() == 1
    assert quantized.view.get_by_role("button", name="copy JSON").count() == 1


def test_the_report_is_copied_and_saved(quantized, tmp_path):
    context = quantized.page.context
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    quantized.view.get_by_role("button", name="copy JSON").click()
    quantized.view.get_by_role("button", name="copied").wait_for()
    read = "() => navigator.clipboard.readText()"
    assert json.loads(quantized.page.evaluate(read)) == report(quantized)
    # Without a clipboard, as on a page served to another machine over http.
    quantized.page.evaluate("() => navigator.clipboard.writeText('')")
    quantized.view.get_by_role("button", name="copy JSON").wait_for()
    hide = "(clipboard) => Object.defineProperty(navigator, 'clipboard', { value: clipboard, "
    hide += "configurable: true })"
    quantized.page.evaluate("() => { window.clipboard = navigator.clipboard; }")
    quantized.page.evaluate(hide, None)
    quantized.view.get_by_role("button", name="copy JSON").click()
    quantized.view.get_by_role("button", name="copied").wait_for()
    quantized.page.evaluate("() => delete navigator.clipboard")
    assert json.loads(quantized.page.evaluate(read)) == report(quantized)
    with quantized.page.expect_download() as download:
        quantized.view.get_by_role("button", name="save PNG").click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert re.fullmatch(r"mxfp8-conversion-Flux-\d{4}-\d\d-\d\d\.png", path.name)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 500 and height > 300


def test_the_view_is_not_saved_with_the_workflow(quantized):
    saved, prompt = quantized.page.evaluate(
        "async () => [app.graph.serialize(), (await app.graphToPrompt()).output]"
    )
    (entry,) = (n for n in saved["nodes"] if n["type"] == "MXFP8Quantize")
    assert len(entry["widgets_values"]) == 5
    assert "mxfp8_report" not in json.dumps(saved)
    assert set(prompt[str(quantized.node)]["inputs"]) == {
        "model", "preset", "precision", "include", "exclude", "size_or_quality",
    }  # fmt: skip
    again = quantized.page.evaluate(
        """async (saved) => {
            await app.loadGraphData(saved);
            const node = app.graph._nodes.find((n) => n.type === "MXFP8Quantize");
            return node.widgets.map((w) => w.value);
        }""",
        saved,
    )
    assert again[:5] == entry["widgets_values"]


@pytest.mark.parametrize("renderer", RENDERERS)
def test_layers_that_stand_out_are_excluded_on_a_click(comfy, browser, renderer):
    """Random weights have no such layers, so the report that the node sent is given two."""
    shown = ComfyPage(browser, comfy, nodes2=RENDERERS[renderer])
    shown.clear()
    load = shown.add("UNETLoader", (60, 160), unet_name="flux.safetensors")
    seen = f"no_such_layer_{renderer}"  # or the server would not run it for both renderers
    node = shown.add("MXFP8Quantize", (420, 160), preset="none", exclude=seen)
    shown.link(load, node, "model")
    shown.link(node, shown.add("PreviewAny", (980, 160)), "source", slot=1)
    shown.queue()
    view = f"app.graph.getNodeById({node}).widgets.find((w) => w.name === 'mxfp8_report').view"
    names = ["double_blocks.0.img_attn.proj", "img_in"]
    shown.page.evaluate(
        f"""(names) => {{
            const report = JSON.parse({view}.json);
            report.verdict.layers = names;
            {view}.show(JSON.stringify(report), "");
        }}""",
        names,
    )
    shown.page.get_by_role("button", name="exclude these 2 layers").click()
    shown.page.get_by_role("button", name="excluded in the next run").wait_for()
    exclude = f"app.graph.getNodeById({node}).widgets.find((w) => w.name === 'exclude').value"
    for key, value in (("z", seen), ("y", shown.page.evaluate(exclude))):
        shown.page.keyboard.press(f"Control+{key}")
        shown.page.wait_for_function(f"(value) => {exclude} === value", arg=value)
        shown.settle()
    shown.queue()
    layers = json.loads(shown.page.evaluate(f"{view}.json"))["layers"]
    assert [x["name"] for x in layers if x["decision"] == "kept"] == sorted(names, reverse=True)
    assert not shown.complaints
    shown.close()


@pytest.mark.parametrize("renderer", RENDERERS)
def test_the_presets_are_listed_with_what_they_are_for(comfy, browser, renderer):
    shown = ComfyPage(browser, comfy, nodes2=RENDERERS[renderer])
    shown.clear()
    node = shown.add("MXFP8ConvertFile")
    shown.settle()
    if RENDERERS[renderer]:
        card = shown.page.locator(f"[data-node-id='{node}']")
        card.get_by_placeholder("*-mxfp8.safetensors").wait_for()  # an empty target
        card.get_by_text("auto:").click()
    else:
        shown.page.evaluate(
            f"""() => {{
                const node = app.graph.getNodeById({node});
                const widget = node.widgets.find((w) => w.name === "preset");
                const e = {{ canvasX: node.pos[0] + node.size[0] / 2, clientX: 300, clientY: 100 }};
                widget.onClick({{ e, node, canvas: app.canvas }});
            }}"""
        )
    shown.page.get_by_text("zimage: Z-Image", exact=True).wait_for()
    shown.page.keyboard.press("Escape")
    value = f"app.graph.getNodeById({node}).widgets.find((w) => w.name === 'preset').value"
    assert shown.page.evaluate(value) == "auto"
    assert not shown.complaints
    shown.close()


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_text_and_bars_stand_out_in_both_themes(comfy, browser, theme):
    shown = ComfyPage(browser, comfy, nodes2=False, theme=theme)
    text, bar, back = shown.page.evaluate(
        """async () => {
            const { ReportView } = await import("/extensions/ComfyUI-MXFP8/report.mjs");
            const view = new ReportView();
            document.body.append(view.element);
            view.show(JSON.stringify({ mxfp8_report: 1, layers: [
                { name: "a", shape: [1, 1], decision: "mxfp8", bytes_after: 1, sqnr_db: 30 },
            ] }), "summary");
            const style = (selector) => getComputedStyle(view.part(selector));
            const colors = [style(".summary").color, view.part(".bar").getAttribute("fill"),
                getComputedStyle(view.element).backgroundColor];
            view.element.remove();
            return colors;
        }"""
    )
    assert not shown.complaints
    shown.close()
    assert contrast(text, back) >= 4.5  # WCAG's bound for text
    assert contrast(bar, back) >= 3  # and for graphics


def contrast(a: str, b: str) -> float:
    """The WCAG 2 contrast ratio of two CSS colors."""
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: str) -> float:
    if color.startswith("#"):
        parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    else:
        parts = [float(p) for p in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [p / 3294.6 if p <= 10.31 else ((p / 255 + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_default_precision_is_for_new_nodes_only(comfy, browser):
    shown = ComfyPage(browser, comfy, nodes2=False)
    shown.clear()
    old = shown.add("MXFP8Accelerate")
    saved = shown.page.evaluate("app.graph.serialize()")
    shown.page.evaluate("() => app.extensionManager.setting.set('MXFP8.DefaultPrecision', 'exact')")
    precision = "app.graph.getNodeById({}).widgets.find((w) => w.name === 'precision').value"
    try:
        new = shown.add("MXFP8Accelerate", (500, 100))
        assert shown.page.evaluate(precision.format(new)) == "exact"
        shown.page.evaluate("(saved) => app.loadGraphData(saved)", saved)
        assert shown.page.evaluate(precision.format(old)) == "auto"
    finally:
        shown.page.evaluate(
            "() => app.extensionManager.setting.set('MXFP8.DefaultPrecision', 'auto')"
        )
    assert not shown.complaints
    shown.close()


@pytest.mark.parametrize("renderer", RENDERERS)
def test_every_kind_of_document_is_shown(comfy, browser, renderer):
    shown = ComfyPage(browser, comfy, nodes2=RENDERERS[renderer])
    shown.clear()
    load = shown.add("MXFP8Load", (60, 100), model_name="flux2-mxfp8.safetensors")
    kinds = {
        "MXFP8ConvertFile": {
            "source": "diffusion_models/flux2.safetensors", "target": "seen", "overwrite": True,
        },
        "MXFP8InspectFile": {"file": "diffusion_models/flux2-mxfp8.safetensors"},
        "MXFP8BackendReport": {"rows": 128 + len(renderer)},
    }  # fmt: skip
    nodes = {name: shown.add(name, (500, 100), **widgets) for name, widgets in kinds.items()}
    shown.link(load, nodes["MXFP8BackendReport"], "model")
    shown.queue()
    for name, node in nodes.items():
        counted, layers = shown.page.evaluate(
            """(id) => {
                const { view } = app.graph.getNodeById(id).widgets.find(
                    (w) => w.name === "mxfp8_report");
                return [view.root.querySelectorAll(".bar").length,
                    JSON.parse(view.json).layers.length];
            }""",
            node,
        )
        assert counted == layers > 10, name
    assert not shown.complaints
    shown.close()


def test_a_node_inside_a_subgraph_shows_its_report(served, browser):
    """Also when one of its widgets is on the subgraph's node, as the user promotes it."""
    shown = ComfyPage(browser, served, nodes2=False)
    shown.clear()
    node = shown.add("MXFP8InspectFile", (100, 100), file="diffusion_models/wan-mxfp8.safetensors")
    promoted = shown.page.evaluate(
        """(id) => {
            app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)]));
            const [outer] = app.graph._nodes;
            const [inner] = outer.subgraph._nodes;
            const slot = inner.inputs.find((input) => input.name === "file");
            outer.subgraph.addInput("file", "COMBO").connect(slot, inner);
            return outer.widgets.map((widget) => [widget.name, widget.value]);
        }""",
        node,
    )
    assert promoted == [["file", "diffusion_models/wan-mxfp8.safetensors"]]
    shown.queue()
    inside = """() => {
        const outer = app.graph._nodes[0];
        const inner = outer?.subgraph?._nodes[0];
        return inner?.widgets.find((w) => w.name === "mxfp8_report")?.view.rows.length ?? 0;
    }"""
    bars = shown.page.evaluate(inside)
    assert bars > 10
    switch_tabs(shown)
    assert shown.page.evaluate(inside) == bars
    shown.reload()
    shown.page.wait_for_function(f"({inside})() === {bars}")
    assert not shown.complaints
    shown.close()


def switch_tabs(shown) -> None:
    """Open another workflow's tab and come back to the first."""
    count = "() => app.graph._nodes.length"
    nodes = shown.page.evaluate(count)
    shown.command("Comfy.NewBlankWorkflow")
    assert shown.page.evaluate(count) == 0
    shown.command("Workspace.PreviousOpenedWorkflow")
    assert shown.page.evaluate(count) == nodes
    shown.settle()


def test_a_report_comes_back_with_its_workflow_tab(served, browser):
    shown = ComfyPage(browser, served, nodes2=False)
    shown.clear()
    shown.add("MXFP8InspectFile", (100, 100), file="diffusion_models/flux-mxfp8.safetensors")
    shown.queue()
    switch_tabs(shown)
    bars = """() => app.graph._nodes[0].widgets.find((w) => w.name === "mxfp8_report")
        ?.view.rows.length ?? 0"""
    assert shown.page.evaluate(bars) > 10
    assert not shown.complaints
    shown.close()


def test_a_report_comes_back_after_a_reload_if_the_server_has_it(served, browser):
    shown = ComfyPage(browser, served, nodes2=True)
    shown.clear()
    node = shown.add("MXFP8InspectFile", (100, 100), file="diffusion_models/wan-mxfp8.safetensors")
    shown.queue()
    document = shown.page.evaluate(f"app.nodeOutputs[{node}].mxfp8_report[0]")
    shown.reload()
    shown.page.locator(".mxfp8-report .bar").first.wait_for(state="attached")
    assert shown.page.evaluate(
        f"app.graph.getNodeById({node}).widgets.find((w) => w.name === 'mxfp8_report').view.json"
    ) == document  # fmt: skip

    served.post("/history", {"clear": True})  # as a server that was started anew has none
    height = shown.page.evaluate(
        """async () => {
            app.nodeOutputs = {};
            await app.loadGraphData(app.graph.serialize());
            return app.graph._nodes[0].size[1];
        }"""
    )
    shown.settle()
    assert shown.page.locator(".mxfp8-report .verdict").inner_text() == "The result appears here."
    assert height < 300  # closed: open, the view alone takes 522
    assert not shown.complaints
    shown.close()


def test_undoing_leaves_results_where_they_are_and_shows_later_ones(served, browser):
    """ComfyUI makes all nodes anew for it, and Nodes 2.0 keeps showing what it has of their ids."""
    shown = ComfyPage(browser, served, nodes2=True)
    shown.clear()
    node = shown.add("MXFP8InspectFile", (100, 100), file="diffusion_models/wan-mxfp8.safetensors")
    text = shown.add("PreviewAny", (600, 100))
    shown.link(node, text, "source")
    shown.queue()
    verdict = shown.page.locator(".mxfp8-report .verdict")  # fails where there are several
    before = verdict.inner_text()
    assert "10 layers" in before
    served.post("/history", {"clear": True})  # the page has it, too
    moved = f"app.graph.getNodeById({node}).pos[1]"
    shown.page.evaluate(
        f"() => {{ app.canvas.emitBeforeChange(); {moved} = 300; app.canvas.emitAfterChange(); }}"
    )
    shown.page.keyboard.press("Control+z")
    shown.page.wait_for_function(f"() => {moved} === 100")
    shown.settle()
    assert verdict.inner_text() == before
    shown.page.evaluate(
        """(id) => { app.graph.getNodeById(id).widgets.find((w) => w.name === "file").value =
            "diffusion_models/flux-mxfp8.safetensors"; }""",
        node,
    )
    shown.queue()
    verdict.get_by_text("13 layers").wait_for()
    switch_tabs(shown)
    assert "13 layers" in verdict.inner_text()
    shown.reload()
    verdict.get_by_text("13 layers").wait_for()
    assert not shown.complaints
    shown.close()


def test_a_node_does_not_show_what_another_of_its_id_sent(comfy, browser):
    """Undoing makes ids free; the page keeps their outputs."""
    shown = ComfyPage(browser, comfy, nodes2=False)
    shown.clear()
    node = shown.add("MXFP8InspectFile", (100, 100), file="diffusion_models/wan-mxfp8.safetensors")
    shown.queue()
    outputs = shown.page.evaluate("() => JSON.parse(JSON.stringify(app.nodeOutputs))")
    seen = []
    for kind in ("MXFP8Quantize", "MXFP8InspectFile"):
        shows = shown.page.evaluate(
            """([id, kind, outputs]) => {
                app.graph.remove(app.graph.getNodeById(id));
                const node = LiteGraph.createNode(kind);
                node.id = id;
                app.graph.add(node);
                const { onNodeOutputsUpdated } = app.extensions.find(
                    (e) => e.name === "mxfp8.report");
                onNodeOutputsUpdated(outputs);
                return !!node.widgets.find((w) => w.name === "mxfp8_report").view.json;
            }""",
            [node, kind, outputs],
        )
        seen.append(shows)
    assert seen == [False, True]
    assert not shown.complaints
    shown.close()


@pytest.mark.parametrize("renderer", RENDERERS)
def test_an_error_says_on_the_page_what_to_do(comfy, browser, renderer):
    shown = ComfyPage(browser, comfy, nodes2=RENDERERS[renderer])
    shown.clear()
    load = shown.add("UNETLoader", (60, 100), unet_name="flux-mxfp8.safetensors")
    node = shown.add("MXFP8Quantize", (420, 100))
    shown.link(load, node, "model")
    shown.link(node, shown.add("PreviewAny", (900, 100)), "source", slot=1)
    shown.queue(ends="execution_error")
    shown.page.get_by_role("button", name="View details").click()
    message = shown.page.get_by_text("convert the BF16, FP16 or FP32 original").first
    message.wait_for(state="visible")
    shown.close()


@pytest.mark.parametrize("renderer", RENDERERS)
def test_every_page_shows_it(served, browser, renderer):
    shown = ComfyPage(browser, served, nodes2=RENDERERS[renderer])
    shown.clear()
    node = shown.add("MXFP8InspectFile", (100, 100), file="diffusion_models/flux-mxfp8.safetensors")
    shown.queue()
    shown.page.locator(".mxfp8-report .bar").first.wait_for(state="attached")
    layers = json.loads(shown.page.evaluate(f"app.nodeOutputs[{node}].mxfp8_report[0]"))["layers"]
    assert shown.page.locator(".mxfp8-report .bar").count() == len(layers)
    assert not shown.complaints
    shown.close()


def test_nodes_and_help_are_in_the_language_of_the_page(served, browser):
    texts = translations.stored("zh")
    shown = ComfyPage(browser, served, nodes2=True, language="zh")
    shown.clear()
    node = shown.add("MXFP8Quantize", (420, 160))
    shown.settle()
    card = shown.page.locator(f"[data-node-id='{node}']")
    title = texts["nodeDefs.MXFP8Quantize.display_name"]
    assert title in card.inner_text()
    card.get_by_text(texts["mxfp8.The result appears here."]).wait_for()
    inspected = shown.add(
        "MXFP8InspectFile", (900, 160), file="diffusion_models/flux-mxfp8.safetensors"
    )
    loader = shown.add("UNETLoader", (900, 600), unet_name="flux.safetensors")
    shown.queue()
    verdict, entry = shown.page.evaluate(
        """([inspected, loader]) => {
            const { view } = app.graph.getNodeById(inspected).widgets.find(
                (w) => w.name === "mxfp8_report");
            const { getNodeMenuItems } = app.extensions.find((e) => e.name === "mxfp8.menu");
            return [view.part(".verdict").textContent,
                getNodeMenuItems(app.graph.getNodeById(loader))[0].content];
        }""",
        [inspected, loader],
    )
    assert "\u5c42" in verdict and " layers" not in verdict  # "N layers"
    assert entry == texts["mxfp8.Convert this model to MXFP8"]
    precision = "nodeDefs.MXFP8Quantize.inputs.precision"
    card.get_by_text(texts[f"{precision}.name"], exact=True).hover()
    shown.page.get_by_text(texts[f"{precision}.tooltip"]).first.wait_for()

    shown.page.evaluate(f"app.canvas.selectNode(app.graph.getNodeById({node}))")
    shown.page.locator("[data-testid=info-button]").click()
    page = translations.help_pages("zh")["web/docs/MXFP8Quantize.md"]
    last = re.findall(r"^## (.+)$", page, re.MULTILINE)[-1]
    shown.page.locator(".node-help-content").get_by_text(last, exact=True).wait_for()
    text = shown.page.locator(".node-help-content").inner_text()
    assert "*" not in text and "`" not in text  # all of its Markdown is understood
    assert not shown.complaints
    shown.close()


def test_a_search_for_the_pack_lists_loading_and_quantizing_first(served, browser):
    """The page ranks equal matches by the length of a node's id: no other is as short."""
    shown = ComfyPage(browser, served, nodes2=False)
    shown.clear()
    shown.command("Workspace.SearchBox.Toggle")
    shown.page.keyboard.type("mxfp8")
    names = shown.page.get_by_text(re.compile(r"\(MXFP8\)$"))
    names.first.wait_for()
    shown.settle()
    assert names.all_inner_texts()[:2] == ["Load Diffusion Model (MXFP8)", "Quantize Model (MXFP8)"]
    shown.close()
