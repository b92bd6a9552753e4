"""Progress of long work on its node: a bar, and a text with the layer, how far, and the time left.

ComfyUI throttles its bar but not its text, so `quant.progress.Pace` does. Every call also checks
whether the user interrupted: the work calls after each slab, many times a second.

ComfyUI's page shows the text as HTML: unchecked until ComfyUI 0.20, sanitized since, and always
with `[[label|url]]` and bare addresses made into links. Names of tensors and metadata come from
files of strangers, so all that the page would interpret is sent as character references, which it
shows as the characters they stand for.
"""

from __future__ import annotations

import functools
import html
import re
from dataclasses import asdict

import comfy.model_management
import comfy.utils
from comfy_api.latest import io
from server import PromptServer

from ...quant.progress import Pace
from ...quant.reports.verdict import Verdict

_PACK = __package__.removesuffix("nodes.host")
# One character of everything that the page makes links of, its own placeholder __LNK0__ included.
_LINKS = re.compile(r"(?i)(?<=\[)\[|:(?=//)|(?<=www)\.|(?<=__)L(?=NK)")


def show(node: type[io.ComfyNode], text: str) -> None:
    """Show lines on the node itself, in the browser, as plain text."""
    if node.hidden.unique_id:
        PromptServer.instance.send_progress_text(as_html(text), node.hidden.unique_id)


def output(
    node: type[io.ComfyNode],
    text: str,
    *values,
    document: str | None = None,
    verdict: Verdict | None = None,
    **shown,
) -> io.NodeOutput:
    """A node's output, with its text on the node and a JSON document in the report view.

    Args:
        verdict: what the view shows while it is closed, if there is no document to say it; else
            that is the text's first line, and its warnings.
    """
    show(node, text)
    if document is not None:
        shown["mxfp8_report"] = [document]
    if verdict is not None:
        shown["mxfp8_verdict"] = [asdict(verdict)]
    # The page keeps outputs by ids, which other nodes get in turn.
    return io.NodeOutput(*values, ui={**shown, "text": [text], "mxfp8_node": [node.SCHEMA.node_id]})


def as_html(text: str) -> str:
    """HTML that shows this text, and in which the page finds no link."""
    return _LINKS.sub(lambda match: f"&#{ord(match[0])};", html.escape(text, quote=False))


def ending_shown(execute):
    """For a node's `execute`: failing or interrupted, it says so in place of its last progress.

    An exception of this pack's own kind goes on as the built-in one that it is: ComfyUI's page puts
    the path of an exception's module above the message.
    """

    @functools.wraps(execute)
    def run(node: type[io.ComfyNode], *args, **inputs):
        try:
            return execute(node, *args, **inputs)
        except comfy.model_management.InterruptProcessingException:
            show(node, "interrupted")
            raise
        except Exception as error:
            show(node, f"failed: {error}".splitlines()[0])
            plain = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
            if plain is type(error) or not type(error).__module__.startswith(_PACK):
                raise
            raise plain(str(error)).with_traceback(error.__traceback__) from None

    return run


class Progress:
    """A `quant.progress.Progress` that shows itself on a node and stops when the user interrupts.

    Args:
        steps: whether the work is counted in steps, not in bytes.
    """

    def __init__(self, node: type[io.ComfyNode], steps: bool = False) -> None:
        self._node = node
        self._bar = comfy.utils.ProgressBar(1)
        self._pace = Pace(steps=steps)

    def __call__(self, done: int, total: int, key: str) -> str | None:
        """Returns the text, if it was shown."""
        check_interrupt()
        self._bar.update_absolute(done, max(total, 1))
        text = self._pace(done, total, key)
        if text is not None:
            show(self._node, text)
        return text

    @property
    def seconds(self) -> float:
        """Since the work began; of sampling runs, since the first of them did."""
        return self._pace.seconds


class RunProgress(Progress):
    """Progress over several sampling runs, in steps; each run has as many.

    Attributes:
        runs: how many runs there will be; may grow.
    """

    def __init__(self, node: type[io.ComfyNode], runs: int, steps: int) -> None:
        super().__init__(node, steps=True)
        self.runs = runs
        self._steps = steps
        self._finished = 0
        self._begun = False

    def begin(self) -> None:
        """Start timing at the first call; the time before went into loading the model."""
        if not self._begun:
            self._begun = True
            self._pace.start()

    def step(self, number: int, key: str) -> str | None:
        """Show step `number` of the present run, counted from 1; returns what `Progress` does."""
        done = self._finished * self._steps + min(number, self._steps)
        return self(done, self.runs * self._steps, key)

    def finish_run(self) -> None:
        self._finished += 1

    def skip_to(self, runs: int) -> None:
        """So many runs are finished, some of them before the program was started."""
        self._finished = runs


def check_interrupt(*_) -> None:
    """Raise ComfyUI's exception if the user interrupted; also a `quant.progress.Progress`."""
    comfy.model_management.throw_exception_if_processing_interrupted()
