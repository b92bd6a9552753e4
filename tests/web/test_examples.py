"""The example workflows in the page: readable as they open, after a run, and under the pointer."""

from __future__ import annotations

import json

import pytest
from browser import RENDERERS, ComfyPage, overlaps
from workflows import EXAMPLES, load_example, use_tiny_models

pytestmark = pytest.mark.comfy

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))
GROUPS = """() => app.graph._groups.map(
    ({ title, _bounding: [x, y, width, height] }) => [title, x, y, x + width, y + height])"""


def inside(pair: tuple[str, str], groups: list[tuple], nodes: list[tuple]) -> bool:
    """Whether the node of a pair lies in its group, frame and all."""
    group, node = (next(box for box in boxes if box[0] == name)
                   for name, boxes in zip(pair, (groups, nodes), strict=True))  # fmt: skip
    return (
        group[1] <= node[1] and node[3] <= group[3] and group[2] <= node[2] and node[4] <= group[4]
    )


@pytest.fixture(scope="module", params=RENDERERS)
def shown(request, comfy, browser):
    theme = "light" if request.param == "litegraph" else "dark"
    page = ComfyPage(browser, comfy, nodes2=RENDERERS[request.param], theme=theme)
    page.page.set_viewport_size({"width": 1800, "height": 1000})
    yield page
    assert not page.complaints
    page.close()


@pytest.mark.parametrize("name", NAMES)
def test_an_example_stays_readable_after_a_run(comfy, shown, name, tmp_path):
    workflow = json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))
    shown.open(workflow)
    before = shown.boxes()
    assert overlaps(before) == []
    groups = shown.page.evaluate(GROUPS)
    assert [title.partition(".")[0] for title, *_ in groups] == list("12345"[: len(groups)])
    assert overlaps(groups) == []
    assert [pair for pair in overlaps([*groups, *before]) if not inside(pair, groups, before)] == []

    graph = load_example(name, comfy.get("/object_info"))
    use_tiny_models(graph)
    shown.run({"output": graph, "workflow": workflow})
    shown.settle(60)
    shown.page.screenshot(path=tmp_path / "after.png")
    after = shown.boxes()
    assert overlaps(after) == []
    for view in shown.page.locator(".mxfp8-report").all():
        view.hover(force=True)
    shown.settle()
    assert shown.boxes() == after


def test_the_examples_are_found_among_the_templates(shown):
    """By the pack's name, with their thumbnails, which are squares."""
    shown.command("Comfy.BrowseTemplates")
    shown.page.get_by_placeholder("Search").first.fill("mxfp8")
    for name in NAMES:
        shown.page.get_by_role("heading", name=name, exact=True).wait_for()
    square = """() => [...document.images].filter(
        ({ naturalWidth, naturalHeight }) => naturalWidth && naturalWidth === naturalHeight
    ).length"""
    shown.page.wait_for_function(f"({square})() >= {len(NAMES)}")
    shown.page.keyboard.press("Escape")
