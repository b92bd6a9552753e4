"""A node that says how a model runs on this machine, and where its memory is.

It runs anew with every workflow, so it hands no model on: samplers behind it would run anew too.
"""

from __future__ import annotations

import logging

from comfy_api.latest import io

from .host.progress import Progress, show
from .loading import CATEGORY, ROWS
from .runtime.describe import describe, load, measure

logger = logging.getLogger(__name__)


class MXFP8BackendReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8BackendReport",
            display_name="Backend Report (MXFP8)",
            category=CATEGORY,
            description=(
                "Says how a model runs on this machine: the backend and precision of every layer "
                "with the reason, what faster backends lack here, and the bytes of codes, scales, "
                "other weights, prepared weights and LoRAs. If asked, it measures how long layers "
                "take, against dense ones and against ComfyUI's own way."
            ),
            search_aliases=["mxfp8", "report", "backend", "precision", "memory", "benchmark"],
            inputs=[
                io.Model.Input("model", optional=True, tooltip="A diffusion model, from any node."),
                io.Clip.Input("clip", optional=True, tooltip="A text encoder, instead of a model."),
                io.Boolean.Input(
                    "measure",
                    default=False,
                    tooltip=(
                        "Load the model and time one layer of each size. Seconds on a GPU; on a "
                        "CPU longer, and for 256 rows at most."
                    ),
                ),
                io.Int.Input(
                    "rows",
                    default=ROWS,
                    min=1,
                    max=1 << 17,
                    tooltip=(
                        "Rows of the inputs that layers are described and timed for: image tokens "
                        "times batch size. 1024 x 1024 pixels are about 4096."
                    ),
                ),
            ],
            outputs=[
                io.String.Output(display_name="summary", tooltip="The report in words."),
                io.String.Output(display_name="report", tooltip="Every layer: JSON."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        """Never what it was: a report tells what is loaded, which no input shows."""
        return float("nan")

    @classmethod
    def execute(cls, measure, rows, model=None, clip=None) -> io.NodeOutput:
        if (model is None) == (clip is None):
            raise ValueError("connect a model or a text encoder to this node, one of the two")
        found = make_report(cls, clip.patcher if model is None else model, rows, measure)
        summary, text = found.summary(), found.to_json()
        logger.info("MXFP8: %s", summary)
        show(cls, found.line())
        shown = {"text": [summary], "mxfp8_report": [text]}
        return io.NodeOutput(summary, text, ui=shown)


def make_report(node: type[io.ComfyNode], patcher, rows: int, timed: bool):
    """The backend report of a ModelPatcher, measured if asked."""
    if not timed:
        return describe(patcher, rows)
    load(patcher)
    return measure(patcher, describe(patcher, rows), Progress(node, rate=False))
