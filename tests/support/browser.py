"""The real ComfyUI's page in Chromium, driven by Playwright.

The browser is Debian's package `chromium`, or the one that MXFP8_CHROMIUM names.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from itertools import combinations

from comfyui import Server
from playwright.sync_api import Browser, Page, sync_playwright

# As root Chromium cannot sandbox itself; nothing but the local server is opened.
_ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
# Of comfyui-frontend-package: the newest on 2026-11-30; a release comes about weekly.
NEWEST_PAGE = "1.58.1"
RENDERERS = {"litegraph": False, "nodes2": True}  # -> the setting Comfy.VueNodes.Enabled
SIZE = {"width": 1400, "height": 900}
_BOXES = """() => {
    const { scale, offset } = app.canvas.ds;
    return app.graph._nodes.map((node) => {
        const shown = document.querySelector(`[data-node-id="${node.id}"]`);
        if (!shown) {
            const [x, y, width, height] = node.boundingRect ?? node.getBounding();
            return [node.title, x, y, x + width, y + height];
        }
        const box = shown.getBoundingClientRect();
        const at = app.canvas.canvas.getBoundingClientRect();
        const x = (box.left - at.left) / scale - offset[0];
        const y = (box.top - at.top) / scale - offset[1];
        return [node.title, x, y, x + box.width / scale, y + box.height / scale];
    });
}"""


def overlaps(boxes: list[tuple]) -> list[tuple[str, str]]:
    """The titles of each two that lie over each other."""
    return [
        (a[0], b[0])
        for a, b in combinations(boxes, 2)
        if a[1] < b[3] and b[1] < a[3] and a[2] < b[4] and b[2] < a[4]
    ]


def executable() -> str:
    """The browser to run.

    Raises:
        FileNotFoundError: there is none.
    """
    names = (os.environ.get("MXFP8_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    for name in filter(None, names):
        if path := shutil.which(name):
            return path
    raise FileNotFoundError("no Chromium; install Debian's package chromium (apt install chromium)")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


class ComfyPage:
    """ComfyUI's page.

    Attributes:
        page: Playwright's page.
        nodes2: whether it draws nodes as HTML, not on the canvas.
        complaints: console errors and warnings from this pack's files, and uncaught errors.
    """

    def __init__(
        self,
        browser: Browser,
        server: Server,
        *,
        nodes2: bool,
        theme: str = "dark",
        language: str = "en",
    ):
        server.post(
            "/settings",
            {
                "Comfy.VueNodes.Enabled": nodes2,
                "Comfy.ColorPalette": theme,
                "Comfy.Locale": language,
                "Comfy.RightSidePanel.IsOpen": False,  # an earlier page may have opened it
                "Comfy.TutorialCompleted": True,
                "Comfy.Workflow.ShowMissingModelsWarning": False,
            },
        )
        self.nodes2 = nodes2
        self.complaints: list[str] = []
        self.page: Page = browser.new_page(viewport=SIZE)
        self.page.set_default_timeout(120_000)  # a busy machine takes its time
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(server.url)
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        self.page.wait_for_function(
            "window.app?.extensions?.some(e => e.name === 'mxfp8.report')"
            " && window.LiteGraph && app.extensionManager?.workflow?.activeWorkflow"
        )

    def reload(self) -> None:
        """Load the page anew once it has stored the workflow on the canvas, which comes back."""
        self.page.evaluate(
            "() => app.extensionManager.workflow.activeWorkflow.changeTracker?.checkState?.()"
        )
        self.page.wait_for_function(
            """() => {
                const ids = app.graph._nodes.map((n) => n.type);
                return Object.entries(localStorage).some(
                    ([key, text]) => key.includes("Draft") && ids.every((id) => text.includes(id)));
            }"""
        )
        self.page.reload()
        self._wait_until_ready()
        self.page.wait_for_function("app.graph?._nodes?.length > 0")

    def _on_console(self, message) -> None:
        url = (message.location or {}).get("url", "")
        if message.type in ("error", "warning") and "MXFP8" in url + message.text:
            self.complaints.append(f"{message.type}: {message.text} ({url})")

    def clear(self) -> None:
        """Empty the canvas. Ids keep counting: the page remembers values by node id and widget."""
        self.page.evaluate("() => [...app.graph._nodes].forEach((n) => app.graph.remove(n))")

    def add(self, node: str, position=(100, 100), **widgets) -> int:
        """Create a node as the menu does; returns its id."""
        return self.page.evaluate(
            """([type, pos, widgets]) => {
                const node = LiteGraph.createNode(type);
                node.pos = pos;
                app.graph.add(node);
                for (const [name, value] of Object.entries(widgets)) {
                    node.widgets.find((w) => w.name === name).value = value;
                }
                return node.id;
            }""",
            [node, list(position), widgets],
        )

    def link(self, source: int, target: int, name: str, slot: int = 0) -> None:
        """Connect an output of a node to the input `name` of another."""
        self.page.evaluate(
            """([source, slot, target, name]) => {
                const to = app.graph.getNodeById(target);
                const input = to.inputs.findIndex((i) => i.name === name);
                app.graph.getNodeById(source).connect(slot, to, input);
            }""",
            [source, slot, target, name],
        )

    def boxes(self) -> list[tuple]:
        """(title, left, top, right, bottom) of each node with its title, in px of the canvas."""
        return [tuple(box) for box in self.page.evaluate(_BOXES)]

    def open_menu(self, node: int) -> None:
        """Click a node's title with the right button."""
        self.settle()
        if self.nodes2:
            title = self.page.locator(f"[data-node-id='{node}']")
            title.click(button="right", position={"x": 60, "y": 12})
        else:
            x, y = self.page.evaluate(
                """(id) => {
                    const { pos } = app.graph.getNodeById(id);
                    const { scale, offset } = app.canvas.ds;
                    const box = app.canvas.canvas.getBoundingClientRect();
                    return [box.x + (pos[0] + offset[0] + 60) * scale,
                        box.y + (pos[1] + offset[1] - 12) * scale];
                }""",
                node,
            )
            self.page.mouse.click(x, y, button="right")
        self.settle()

    def command(self, name: str) -> None:
        """Run one of the page's commands, as a menu or a shortcut does."""
        self.page.evaluate("(name) => app.extensionManager.command.execute(name)", name)

    def open(self, workflow: dict) -> None:
        """Open a workflow and show all of it."""
        self.page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
        self.settle()
        self.command("Comfy.Canvas.FitView")
        self.settle(60)

    def queue(self, ends: str = "execution_success") -> None:
        """Run the workflow on the canvas, wait for its end, and check that it ended with this."""
        self.run(None, ends)

    def run(self, prompt: dict | None, ends: str = "execution_success") -> None:
        """The same with a prompt of one's own: {"output": graph, "workflow": what is saved}."""
        self.page.evaluate(
            """(prompt) => {
                window.ended = new Promise((done) => {
                    for (const kind of
                        ["execution_success", "execution_error", "execution_interrupted"]) {
                        app.api.addEventListener(kind, () => done(kind), { once: true });
                    }
                });
                return prompt ? app.api.queuePrompt(0, prompt) : app.queuePrompt(0, 1);
            }""",
            prompt,
        )
        ended = self.page.evaluate("() => window.ended")
        assert ended == ends, ended

    def settle(self, frames: int = 30) -> None:
        """Wait for the page to draw so many frames: half a second, longer on a busy machine."""
        self.page.evaluate(
            """(left) => new Promise((done) => {
                const next = () => (left-- > 0 ? requestAnimationFrame(next) : done());
                next();
            })""",
            frames,
        )

    def close(self) -> None:
        self.page.close()
