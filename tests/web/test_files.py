"""From a file to its conversion and on to a loader, in the page: both renderers, in Chromium."""

from __future__ import annotations

import json

import pytest
from browser import ComfyPage

pytestmark = pytest.mark.comfy

SOURCE = "diffusion_models/flux.safetensors"


# Each page, and both renderers of the pinned one.
SHOWN = (("oldest", False), ("pinned", False), ("pinned", True), ("newest", True))


@pytest.fixture(scope="module", params=SHOWN, ids=lambda p: f"{p[0]}-{'nodes2' * p[1]}")
def shown(request, with_page, browser):
    name, nodes2 = request.param
    server = with_page(name)
    page = ComfyPage(browser, server, nodes2=nodes2)
    page.server = server
    page.look = f"{name}-{nodes2}"
    yield page
    assert not page.complaints
    page.close()


def values(shown, node: int) -> dict:
    return shown.page.evaluate(
        "(id) => Object.fromEntries(app.graph.getNodeById(id).widgets.map(w => [w.name, w.value]))",
        node,
    )


def test_a_loader_s_menu_adds_a_conversion_of_its_file(shown):
    shown.clear()
    loader = shown.add("UNETLoader", (200, 200), unet_name="flux.safetensors")
    shown.open_menu(loader)
    shown.page.get_by_text("Convert this model to MXFP8").first.click()
    shown.settle()
    added = shown.page.evaluate(
        "(id) => app.graph._nodes.filter((n) => n.id !== id).map((n) => [n.id, n.type, n.pos[0]])",
        loader,
    )
    ((node, kind, x),) = added
    assert kind == "MXFP8ConvertFile" and x > 200
    assert values(shown, node)["source"] == SOURCE
    shown.page.keyboard.press("Control+z")
    shown.page.wait_for_function("() => app.graph._nodes.length === 1")
    assert shown.page.evaluate("() => app.graph._nodes[0].type") == "UNETLoader"


def test_several_files_are_named_and_what_cannot_be_converted_is_not_offered(shown):
    shown.clear()
    two = shown.add("DualCLIPLoader", (200, 200), clip_name1="a.safetensors", clip_name2="b.gguf")
    vae = shown.add("VAELoader", (600, 200))
    offered = shown.page.evaluate(
        """(ids) => {
            const { getNodeMenuItems } = app.extensions.find((e) => e.name === "mxfp8.menu");
            return ids.map((id) => getNodeMenuItems(app.graph.getNodeById(id)).map(
                (item) => item.content));
        }""",
        [two, vae],
    )
    assert offered == [["Convert this model to MXFP8"], []]


def test_a_conversion_that_cannot_be_added_leaves_undo_as_it_is(shown):
    shown.clear()
    loader = shown.add("UNETLoader", (200, 200), unet_name="flux.safetensors")
    begun, ended = shown.page.evaluate(
        """(id) => {
            const { canvas, graph, extensions } = app;
            const { emitBeforeChange, emitAfterChange } = canvas;
            const { createNode } = LiteGraph;
            const counts = [0, 0];
            canvas.emitBeforeChange = () => { counts[0] += 1; };
            canvas.emitAfterChange = () => { counts[1] += 1; };
            LiteGraph.createNode = () => null;
            try {
                const { getNodeMenuItems } = extensions.find((e) => e.name === "mxfp8.menu");
                getNodeMenuItems(graph.getNodeById(id))[0].callback();
            } catch {
                // What is thrown does not matter here.
            } finally {
                Object.assign(canvas, { emitBeforeChange, emitAfterChange });
                LiteGraph.createNode = createNode;
            }
            return counts;
        }""",
        loader,
    )
    assert begun == ended


def test_a_new_file_goes_on_to_a_loader_and_into_its_list(shown):
    comfy = shown.server
    shown.clear()
    target = f"new-{shown.look}.safetensors"
    convert = shown.add("MXFP8ConvertFile", (100, 100), source=SOURCE, target=target)
    loaders = [shown.add("UNETLoader", (600, y)) for y in (100, 400)]
    sampler = shown.add("KSampler", (1000, 100), steps=1)
    prompt = shown.add("LotusConditioning", (600, 600))
    latent = shown.add("EmptySD3LatentImage", (600, 700), width=64, height=64)
    end = shown.add("PreviewAny", (1400, 100))
    shown.link(convert, loaders[0], "unet_name", slot=1)
    for source, name in ((loaders[0], "model"), (prompt, "positive"), (prompt, "negative"),
                         (latent, "latent_image")):  # fmt: skip
        shown.link(source, sampler, name)
    shown.link(sampler, end, "source")
    shown.queue()  # the second loader is connected to nothing, and does not run
    assert shown.page.evaluate("(id) => id in app.nodeOutputs", end)
    shown.page.wait_for_function(
        """([id, name]) => app.graph.getNodeById(id).widgets[0].options.values.includes(name)""",
        arg=[loaders[1], target],
    )
    assert values(shown, convert)["target"] == target
    (comfy.base / "models" / "diffusion_models" / target).unlink()


@pytest.fixture
def blueprints(shown) -> dict[str, dict]:
    """The subgraphs of this pack that ComfyUI offers, by name."""
    comfy = shown.server
    found = comfy.get("/global_subgraphs")
    return {
        about["name"]: json.loads(comfy.get(f"/global_subgraphs/{key}")["data"])
        for key, about in found.items()
        if about["source"] == "custom_node"
    }


def opened(shown, blueprint: dict, **widgets) -> int:
    """Open a blueprint as a workflow, and connect a small model, a prompt and a latent to it."""
    shown.page.evaluate("(data) => app.loadGraphData(data)", blueprint)
    node = shown.page.evaluate(
        """(values) => {
            const [node] = app.graph._nodes;
            for (const [name, value] of Object.entries(values)) {
                node.widgets.find((w) => w.name === name).value = value;
            }
            return node.id;
        }""",
        widgets,
    )
    prompt = shown.add("LotusConditioning", (-400, 200))
    for kind, name, settings in (
        ("UNETLoader", "model", {"unet_name": "flux.safetensors"}),
        ("EmptySD3LatentImage", "latent_image", {"width": 64, "height": 64}),
    ):
        shown.link(shown.add(kind, (-400, 0), **settings), node, name)
    for name in ("positive", "negative"):
        shown.link(prompt, node, name)
    return node


def test_the_blueprints_run(shown, blueprints):
    comfy = shown.server
    steps = {"seeds": 1, "steps": 1}
    prefix = f"diffusion_models/blueprint-{shown.look}"
    compare = blueprints.pop("Quantize, compare and save (MXFP8)")
    node = opened(shown, compare, filename_prefix=prefix, **steps)
    vae = shown.add("VAELoader", (-400, 400), vae_name="vae.safetensors")
    shown.link(vae, node, "vae")
    shown.queue()
    assert (comfy.base / "output" / f"{prefix}_00001_.safetensors").stat().st_size > 0

    calibrate = blueprints.pop("Calibrate and convert (MXFP8)")
    target = f"blueprint-{shown.look}.safetensors"
    opened(shown, calibrate, source=SOURCE, target=target, **steps)
    shown.queue()
    path = comfy.base / "models" / "diffusion_models" / target
    assert path.stat().st_size > 0
    path.unlink()
    assert not blueprints
