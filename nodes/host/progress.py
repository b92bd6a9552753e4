"""Progress of long work on its node: a bar, and below it the layer, percent, speed and time left.

ComfyUI's bar throttles itself; its text does not, so `quant.progress.Pace` does. Every call also
asks whether the user interrupted: the work calls after each slab, many times a second.

ComfyUI's page makes HTML of the text: as it comes until ComfyUI 0.20, sanitized since, and always
with `[[label|url]]` and bare addresses as links. Names of tensors and metadata come from strangers,
so nothing of that is left to the page: what it would read is sent as character references, which
every page shows as the characters they stand for.
"""

from __future__ import annotations

import html
import re

import comfy.model_management
import comfy.utils
from comfy_api.latest import io
from server import PromptServer

from ...quant.progress import Pace

# One character of all that the page makes links of, its own placeholder __LNK0__ included.
_LINKS = re.compile(r"(?i)(?<=\[)\[|:(?=//)|(?<=www)\.|(?<=__)L(?=NK)")


def show(node: type[io.ComfyNode], text: str) -> None:
    """Show a line or more on the node itself, in the browser, as text and nothing else."""
    if node.hidden.unique_id:
        PromptServer.instance.send_progress_text(as_html(text), node.hidden.unique_id)


def as_html(text: str) -> str:
    """HTML that shows this text, and that the page finds no link in."""
    return _LINKS.sub(lambda found: f"&#{ord(found[0])};", html.escape(text, quote=False))


class Progress:
    """A `quant.progress.Progress` that shows itself on a node and stops when the user interrupts.

    Args:
        rate: whether the work is measured in bytes, so that a speed means something.
    """

    def __init__(self, node: type[io.ComfyNode], rate: bool = True) -> None:
        self._node = node
        self._bar = comfy.utils.ProgressBar(1)
        self._pace = Pace(rate=rate)

    def __call__(self, done: int, total: int, key: str) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar.update_absolute(done, max(total, 1))
        text = self._pace(done, total, key)
        if text is not None:
            show(self._node, text)
