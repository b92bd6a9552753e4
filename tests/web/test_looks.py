"""What users see: every view with a result in it, in both renderers, dark and light.

    MXFP8_KEEP_PICTURES=1 python -m pytest tests/web/test_looks.py     keeps the pictures in looks/

The pictures are for looking at. What a program can tell of them is checked: that no text is cut
off, too small or too faint, that no node lies over another, and that thumbnails are square.
"""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path

import pytest
from browser import RENDERERS, ComfyPage, overlaps
from workflows import EXAMPLES

pytestmark = pytest.mark.comfy

ROOT = Path(__file__).resolve().parents[2]
FILE = "diffusion_models/flux.safetensors"
LOOKS = [f"{renderer}-{theme}" for renderer, theme in product(RENDERERS, ("dark", "light"))]
VIEW = "app.graph.getNodeById(id).widgets.find((w) => w.name === 'mxfp8_report').view"
# WCAG's bound for text, and the smallest that is read without effort.
CONTRAST, PIXELS = 4.5, 10
# Of each text in a view that can be seen: its size, its contrast with the color under it, and
# whether a part of it is cut off at the side.
TEXTS = f"""(id) => {{
    const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
    const under = (element) => {{
        for (let e = element; e; e = e.parentElement ?? e.getRootNode().host) {{
            const [r, g, b, alpha = 1] = numbers(getComputedStyle(e).backgroundColor);
            if (alpha > 0.5) return [r, g, b];
        }}
        return [0, 0, 0];
    }};
    const light = (rgb) => rgb.map((v) => v / 255)
        .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const contrast = (a, b) => {{
        const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
        return (high + 0.05) / (low + 0.05);
    }};
    return [...{VIEW}.root.querySelectorAll("*")].flatMap((element) => {{
        const own = [...element.childNodes].filter((n) => n.nodeType === Node.TEXT_NODE);
        const text = own.map((n) => n.data.trim()).join(" ").trim() || element.placeholder;
        const box = element.getBoundingClientRect();
        if (!text || box.width <= 1 || ["STYLE", "OPTION"].includes(element.tagName)) return [];
        const style = getComputedStyle(element);
        const drawn = element instanceof SVGElement;
        const color = numbers(drawn ? style.fill : style.color).slice(0, 3);
        const wide = style.display !== "inline" && element.scrollWidth > element.clientWidth + 1;
        return [{{
            text, size: parseFloat(style.fontSize), contrast: contrast(color, under(element)),
            cut: !drawn && wide,
        }}];
    }});
}}"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """The folder they go to."""
    if not os.environ.get("MXFP8_KEEP_PICTURES"):
        return tmp_path_factory.mktemp("pictures")
    (ROOT / "looks").mkdir(exist_ok=True)
    return ROOT / "looks"


@pytest.fixture(scope="module", params=LOOKS)
def shown(request, comfy, browser):
    """A page with all nodes that show something, after a run."""
    renderer, theme = request.param.split("-")
    page = ComfyPage(browser, comfy, nodes2=RENDERERS[renderer], theme=theme)
    page.look = request.param
    page.page.set_viewport_size({"width": 1500, "height": 1100})
    page.clear()
    page.nodes = build(page)
    comfy.free()  # or results of another look would not be sent again
    page.queue()
    page.settle()
    yield page
    assert not page.complaints
    page.close()


def build(page) -> dict[str, int]:
    """A workflow with each of these nodes; returns their ids."""
    kinds = {
        "load": ("MXFP8Load", {"model_name": "flux-mxfp8.safetensors"}),
        "original": ("UNETLoader", {"unet_name": "flux.safetensors"}),
        "vae": ("VAELoader", {"vae_name": "vae.safetensors"}),
        "prompt": ("LotusConditioning", {}),
        "latent": ("EmptySD3LatentImage", {"width": 64, "height": 64}),
        "quantize": ("MXFP8Quantize", {}),
        "compare": ("MXFP8CompareModels", {"steps": 1, "seeds": 2}),
        "calibrate": ("MXFP8Calibrate", {"steps": 1, "seeds": 1}),
        "save": ("MXFP8SaveCalibration", {"filename_prefix": "calibrations/looks"}),
        "inspect": ("MXFP8InspectFile", {"file": "diffusion_models/flux-mxfp8.safetensors"}),
        "recommend": ("MXFP8Recommend", {"model": FILE}),
        "batch": ("MXFP8ConvertFiles", {"sources": "diffusion_models/*", "dry_run": True}),
        "backends": ("MXFP8BackendReport", {}),
        "plan": ("MXFP8PlanConversion", {"source": FILE}),
    }
    nodes = {name: page.add(kind, **widgets) for name, (kind, widgets) in kinds.items()}
    for source, target, name in (
        ("original", "quantize", "model"), ("original", "calibrate", "model"),
        ("original", "compare", "reference"), ("quantize", "compare", "model"),
        ("vae", "compare", "vae"), ("calibrate", "save", "calibration"),
        ("load", "backends", "model"),
        *((s, t, n) for t in ("compare", "calibrate") for s, n in (
            ("prompt", "positive"), ("prompt", "negative"), ("latent", "latent_image"))),
    ):  # fmt: skip
        page.link(nodes[source], nodes[target], name)
    page.settle()
    page.page.evaluate(
        """() => {  // columns, with the room that a node has when it is new
            const heights = [0, 0, 0, 0];
            for (const node of app.graph._nodes) {
                const column = heights.indexOf(Math.min(...heights));
                const card = document.querySelector(`[data-node-id="${node.id}"]`);
                node.pos = [column * 480, heights[column]];
                heights[column] += Math.max(node.size[1], card?.offsetHeight ?? 0) + 80;
            }
            app.canvas.setDirty(true, true);
        }"""
    )
    page.settle()
    return nodes


def take(shown, path: Path, node: int) -> None:
    """Save a picture of a node at its real size."""
    box = shown.page.evaluate(
        """(id) => {
            const node = app.graph.getNodeById(id);
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [150 - node.pos[0], 120 - node.pos[1]];
            app.canvas.setDirty(true, true);
            const card = document.querySelector(`[data-node-id="${id}"]`);
            const { x, y } = app.canvas.canvas.getBoundingClientRect();
            return { x: x + 130, y: y + 70, width: 40 + (card?.offsetWidth ?? node.size[0]),
                height: 80 + (card?.offsetHeight ?? node.size[1]) };
        }""",
        node,
    )
    shown.settle(10)
    shown.page.screenshot(path=path, clip=box)


def check_texts(shown, node: int) -> None:
    """Check all texts in a node's view."""
    texts = shown.page.evaluate(TEXTS, node)
    assert texts
    for text in texts:
        assert not text["cut"], text
        assert text["size"] >= PIXELS, text
        assert text["contrast"] >= CONTRAST, text


def test_every_result_can_be_read(shown, pictures):
    """Closed and, on a click, opened, which brings the node before the others."""
    assert overlaps(shown.boxes()) == []
    for name in ("load", "quantize", "compare", "calibrate", "save", "inspect", "recommend",
                 "batch", "backends", "plan"):  # fmt: skip
        node = shown.nodes[name]
        take(shown, pictures / f"{name}-{shown.look}.png", node)
        check_texts(shown, node)
        state = f"""(id) => {{
            const verdict = {VIEW}.part(".verdict");
            const cut = verdict.scrollHeight > verdict.clientHeight;
            return [verdict.dataset.level, cut, {VIEW}.part(".actions").hidden];
        }}"""
        level, cut, alone = shown.page.evaluate(state, node)
        assert not cut, name
        assert level == {"calibrate": "notice"}.get(name, level) != "none"
        assert alone == (name in ("load", "save"))
        if alone:
            continue
        # Where a mouse would click.
        find = f"(id) => {{ const b = {VIEW}.part('[name=open]').getBoundingClientRect();"
        find += " return [b.x + b.width / 2, b.y + b.height / 2]; }"
        shown.page.mouse.click(*shown.page.evaluate(find, node))
        shown.settle(10)
        shown.page.evaluate(f"(id) => {VIEW}._choose(3)", node)
        take(shown, pictures / f"{name}-opened-{shown.look}.png", node)
        assert shown.page.evaluate(f"(id) => {VIEW}.open", node)
        check_texts(shown, node)
        assert is_in_front(shown, node)
        shown.page.evaluate(f"(id) => {VIEW}.part('[name=open]').click()", node)
        shown.settle(10)


def is_in_front(shown, node: int) -> bool:
    """Whether the view is what is seen at its end."""
    return shown.page.evaluate(
        f"""(id) => {{
            const {{ element }} = {VIEW};
            const box = element.getBoundingClientRect();
            const end = Math.min(box.bottom, innerHeight) - 4;
            return document.elementFromPoint(box.x + box.width / 2, end) === element;
        }}""",
        node,
    )


def test_the_templates_are_drawn(shown, pictures):
    shown.command("Comfy.BrowseTemplates")
    shown.page.get_by_placeholder("Search").first.fill("mxfp8")
    sizes = """() => [...document.images].filter(
        ({ naturalWidth, naturalHeight }) => naturalWidth && naturalWidth === naturalHeight)
        .map((image) => [image.offsetWidth, image.offsetHeight])"""
    shown.page.wait_for_function(f"({sizes})().length >= {len(list(EXAMPLES.glob('*.json')))}")
    shown.settle(20)
    shown.page.screenshot(path=pictures / f"templates-{shown.look}.png")
    for width, height in shown.page.evaluate(sizes):
        assert width == height >= 200
    shown.page.keyboard.press("Escape")


def test_a_loader_s_menu_is_drawn(shown, pictures):
    node = shown.nodes["original"]
    take(shown, pictures / f"loader-{shown.look}.png", node)
    shown.open_menu(node)
    shown.page.get_by_text("Convert this model to MXFP8").first.wait_for()
    shown.page.screenshot(path=pictures / f"menu-{shown.look}.png")
