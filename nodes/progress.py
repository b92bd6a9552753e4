"""Progress of long work on its node: a bar, and below it the layer, percent, speed and time left.

ComfyUI's bar throttles itself; its text does not, so `quant.progress.Pace` does. Every call also
asks whether the user interrupted: the work calls after each slab, many times a second.
"""

from __future__ import annotations

import comfy.model_management
import comfy.utils
from comfy_api.latest import io
from server import PromptServer

from ..quant.progress import Pace


def show(node: type[io.ComfyNode], text: str) -> None:
    """Show a line or more on the node itself, in the browser."""
    if node.hidden.unique_id:
        PromptServer.instance.send_progress_text(text, node.hidden.unique_id)


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
