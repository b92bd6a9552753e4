"""Plans that nodes show before they are run: both renderers, in Chromium."""

from __future__ import annotations

import re

import pytest
from browser import ComfyPage

pytestmark = pytest.mark.comfy

VIEW = """app.graph.getNodeById(id).widgets.find((w) => w.name === "mxfp8_report").view"""
TEXT = f"(id) => {VIEW}.summary ?? ''"


# Each page, and both renderers of the pinned one.
SHOWN = (("oldest", False), ("pinned", False), ("pinned", True), ("newest", True))


@pytest.fixture(scope="module", params=SHOWN, ids=lambda p: f"{p[0]}-{'nodes2' * p[1]}")
def shown(request, with_page, browser):
    name, nodes2 = request.param
    server = with_page(name)
    server.post("/history", {"clear": True})
    page = ComfyPage(browser, server, nodes2=nodes2)
    page.server = server
    yield page
    assert not page.complaints
    page.close()


def choose(shown, node: int, name: str, value: str) -> None:
    """Set a widget as the page does when the user chose a value."""
    shown.page.evaluate(
        """([id, name, value]) => {
            const widget = app.graph.getNodeById(id).widgets.find((w) => w.name === name);
            widget.value = value;
            widget.callback(value, app.canvas, app.graph.getNodeById(id));
        }""",
        [node, name, value],
    )


def box(shown, node: int) -> list[float]:
    return shown.page.evaluate("(id) => [...app.graph.getNodeById(id).size]", node)


def plan(shown, node: int, has: str) -> str:
    """A node's plan, once it has this in it."""
    wanted = f"(id) => ({TEXT})(id).includes({has!r})"
    shown.page.wait_for_function(wanted, arg=node)
    return shown.page.evaluate(TEXT, node)


def test_a_choice_shows_what_will_come_of_it_and_leaves_no_trace(shown):
    comfy = shown.server
    shown.clear()
    source = "diffusion_models/flux.safetensors"
    node = shown.add("MXFP8ConvertFile", (100, 100), source=source)
    before, size = comfy.get("/history"), box(shown, node)
    choose(shown, node, "preset", "none")
    text = plan(shown, node, "preset none")
    assert "19 layers MXFP8, 0 not quantized" in text
    assert "flux-mxfp8.safetensors (exists)" in text
    choose(shown, node, "preset", "auto")
    text = plan(shown, node, "preset default")
    assert "13 layers MXFP8, 6 not quantized" in text
    assert "embedders and final layers stay (final_layer" in text
    seen = shown.page.evaluate(f"(id) => {VIEW}.part('.verdict').textContent", node)
    lines = text.replace("->", "\u2192").splitlines()
    assert seen.splitlines() == lines[:3]
    rest = shown.page.evaluate(f"(id) => {VIEW}.part('.summary').textContent", node)
    assert rest.splitlines() == lines[3:]
    choose(shown, node, "target", "other")
    plan(shown, node, "other.safetensors\n")
    assert comfy.get("/history") == before
    assert box(shown, node) == size
    assert comfy.get("/prompt")["exec_info"]["queue_remaining"] == 0


def test_typing_makes_one_plan(shown):
    shown.clear()
    source = "diffusion_models/flux.safetensors"
    node = shown.add("MXFP8ConvertFile", (100, 100), source=source)
    asked = []
    shown.page.on("request", lambda r: r.method == "POST" and r.url.endswith("/prompt")
                  and asked.append(r))  # fmt: skip
    for end in range(1, 7):
        choose(shown, node, "exclude", "single"[:end])
    assert "excluded by 'single'" in plan(shown, node, "excluded")
    assert len(asked) == 1


def test_a_quantize_node_plans_the_file_of_its_loader(shown):
    shown.clear()
    loader = shown.add("UNETLoader", (100, 100), unet_name="flux.safetensors")
    between = shown.add("ModelSamplingFlux", (400, 100))
    node = shown.add("MXFP8Quantize", (700, 100))
    shown.link(loader, between, "model")
    shown.link(between, node, "model")
    assert "Flux.1" in plan(shown, node, "layers MXFP8")
    choose(shown, loader, "unet_name", "flux2.safetensors")
    plan(shown, node, "Flux.2")
    end = shown.add("PreviewAny", (1100, 100))
    shown.link(node, end, "source", slot=1)
    choose(shown, loader, "unet_name", "flux.safetensors")
    plan(shown, node, "Flux.1")
    shown.page.evaluate(  # so that the result of an earlier test is not used again
        """(id) => { app.graph.getNodeById(id).widgets.find((w) => w.name === "exclude").value =
            `never-${Math.random()}`; }""",
        node,
    )
    shown.queue()
    shown.page.wait_for_function(f"(id) => !({TEXT})(id).startsWith('Plan')", arg=node)


def quantizing(shown: ComfyPage) -> int:
    """The Quantize node of a new workflow: a loader before it, and its report shown after it."""
    shown.clear()
    loader = shown.add("UNETLoader", (100, 100), unet_name="flux.safetensors")
    node = shown.add("MXFP8Quantize", (700, 100))
    shown.link(loader, node, "model")
    shown.link(node, shown.add("PreviewAny", (1100, 100)), "source", slot=1)
    return node


def test_the_result_comes_back_when_nothing_has_to_run_again(shown):
    """After other choices, and their plans: ComfyUI sends no results that it has already."""
    node = quantizing(shown)
    plan(shown, node, "13 layers MXFP8")
    shown.queue()
    shown.page.wait_for_function(f"(id) => {VIEW}.json", arg=node)
    for preset, layers in (("none", 19), ("auto", 13)):
        choose(shown, node, "preset", preset)
        assert plan(shown, node, f"{layers} layers MXFP8, ").startswith("Plan")
    shown.queue()
    shown.page.wait_for_function(f"(id) => {VIEW}.json", arg=node)


def test_a_result_that_comes_back_is_of_the_same_choices(shown):
    """Not the node's last one."""
    node = quantizing(shown)
    quantized = f"""JSON.parse({VIEW}.json ?? '{{"layers": []}}').layers
        .filter(({{ decision }}) => decision === "mxfp8").length"""
    shows = f"([id, layers]) => {quantized} === layers"
    runs = []
    for preset, layers in (("auto", 13), ("none", 19)):
        choose(shown, node, "preset", preset)
        shown.queue()
        shown.page.wait_for_function(shows, arg=[node, layers])
        runs += shown.server.get("/history?max_items=1")
    shown.page.evaluate(  # as for a run like the first one; the server may have dropped its result
        """([id, run]) => {
            const detail = { nodes: [String(id)], prompt_id: run };
            app.api.dispatchEvent(new CustomEvent("execution_cached", { detail }));
        }""",
        [node, runs[0]],
    )
    shown.page.wait_for_function(shows, arg=[node, 13], timeout=20_000)


def test_a_model_from_outside_of_a_subgraph_has_no_plan(shown):
    node = quantizing(shown)
    text = shown.page.evaluate(
        """async (id) => {
            app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)]));
            const [inner] = app.graph._nodes.find((node) => node.subgraph).subgraph._nodes;
            const preset = inner.widgets.find((w) => w.name === "preset");
            preset.value = "none";
            preset.callback("none", app.canvas, inner);
            await new Promise((done) => setTimeout(done, 1500));
            return inner.widgets.find((w) => w.name === "mxfp8_report").view.summary ?? "";
        }""",
        node,
    )
    assert text == ""


def test_a_model_from_no_file_has_no_plan(shown):
    shown.clear()
    loader = shown.add("UNETLoader", (100, 100), unet_name="flux.safetensors")
    merged = shown.add("ModelMergeSimple", (400, 100))
    node = shown.add("MXFP8Quantize", (700, 100))
    shown.link(loader, merged, "model1")
    shown.link(loader, merged, "model2")
    shown.link(merged, node, "model")
    plan(shown, node, "not from a loader")


def test_plans_can_be_switched_off(shown):
    shown.clear()
    set_to = """(on) => app.extensionManager.setting.set("MXFP8.PlanBeforeRuns", on)"""
    shown.page.evaluate(set_to, False)
    source = "diffusion_models/flux.safetensors"
    quiet = shown.add("MXFP8ConvertFile", (100, 100), source=source)
    choose(shown, quiet, "preset", "none")
    shown.page.evaluate(set_to, True)
    other = shown.add("MXFP8ConvertFile", (100, 500), source=source)
    choose(shown, other, "preset", "none")
    plan(shown, other, "layers MXFP8")
    assert shown.page.evaluate(TEXT, quiet) == ""


def test_plans_reasons_and_summaries_are_in_the_language_of_the_page(comfy, browser):
    english = re.compile("excluded|layers|quantized|preset|memory|at least|blocks of|worst|size")
    shown = ComfyPage(browser, comfy, nodes2=False, language="zh")
    shown.clear()
    target = "in-chinese.safetensors"
    source = "diffusion_models/flux.safetensors"
    node = shown.add("MXFP8ConvertFile", (100, 100), source=source, target=target)
    choose(shown, node, "exclude", "single|absent")
    text = plan(shown, node, "single")
    assert len(text.splitlines()) > 4 and not english.search(text), text
    shown.queue()
    (comfy.base / "models" / "diffusion_models" / target).unlink()
    shown.page.wait_for_function(f"(id) => {VIEW}.json", arg=node)
    details, summary = shown.page.evaluate(
        f"""(id) => {{
            const view = {VIEW};
            view.part("[name=open]").click();
            view._choose(view._drawn.findIndex(({{ name }}) => name.startsWith("single")));
            return [view.part(".details").textContent, view.part(".summary").textContent];
        }}""",
        node,
    )
    assert "exclude \u7684 'single|absent'" in details
    for text in (details, summary):
        assert not english.search(text), text
    assert not shown.complaints
    shown.close()
