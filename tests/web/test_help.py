"""The nodes' help pages are complete, match the nodes, and are served."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfy

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "web" / "docs"
URL = "/extensions/ComfyUI-MXFP8/docs/"


@pytest.fixture(scope="module")
def ours(comfy) -> dict[str, dict]:
    """/object_info of the nodes of this pack, by name."""
    info = comfy.get("/object_info")
    return {n: i for n, i in info.items() if i["python_module"] == "custom_nodes.ComfyUI-MXFP8"}


def test_every_node_has_a_page_and_no_page_is_left_over(ours):
    assert {path.stem for path in PAGES.glob("*.md")} == set(ours)


def test_a_page_names_every_input_and_output_of_its_node(ours):
    for name, info in ours.items():
        page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
        named = set(re.findall(r"\*\*([a-z0-9_]+)\*\*", page))
        inputs = {i for part in ("required", "optional") for i in info["input"].get(part, {})}
        missing = (inputs | set(info["output_name"])) - named
        assert not missing, f"{name}.md does not name {sorted(missing)}"
        assert page.startswith(f"# {info['display_name']}\n"), name
        assert "## Example" in page, name


def test_pages_and_their_pictures_are_served(comfy, ours):
    for name in ours:
        with urllib.request.urlopen(f"{comfy.url}{URL}{name}.md", timeout=60) as answer:
            page = answer.read().decode()
        pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
        assert pictures, name
        for picture in pictures:
            with urllib.request.urlopen(f"{comfy.url}{URL}{picture}", timeout=60) as answer:
                assert answer.headers["Content-Type"] == "image/png"
                assert answer.read(8) == b"\x89PNG\r\n\x1a\n"


def test_the_pages_name_every_example_workflow():
    examples = {path.stem for path in (ROOT / "example_workflows").glob("*.json")}
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES.glob("*.md"))
    named = set(re.findall(r"example workflow `([^`]+)`", text))
    assert named == examples
