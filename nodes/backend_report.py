"""A node that reports how a model runs on this machine, and where its memory is.

It runs again with every workflow, so it has no model output: samplers after it would run again.
"""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..quant.reports.execution import BackendReport
from .host.progress import Progress, ending_shown, output
from .runtime.describe import ROWS, describe, load_for_report, measure
from .widgets import CATEGORY

logger = logging.getLogger(__name__)


class MXFP8BackendReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8BackendReport",
            display_name="Backend Report (MXFP8)",
            category=CATEGORY,
            description=(
                "Reports how a model runs on this machine: the backend and precision of every "
                "layer and why, what faster backends lack here, and the memory of codes, scales, "
                "other weights, prepared weights and LoRAs. Lists the LoRAs: which layers they are "
                "on, and what is merged and why. Optionally times the layers against unquantized "
                "ones and against stock ComfyUI."
            ),
            search_aliases=["mxfp8", "report", "backend", "precision", "memory", "benchmark"],
            inputs=[
                io.Model.Input("model", optional=True, tooltip="A diffusion model, from any node."),
                io.Clip.Input("clip", optional=True, tooltip="A text encoder, instead of a model."),
                io.Boolean.Input(
                    "measure",
                    default=False,
                    tooltip=(
                        "Load the model and time one layer of each size. Takes seconds on a GPU; "
                        "longer on a CPU, where at most 256 rows are timed."
                    ),
                ),
                io.Int.Input(
                    "rows",
                    default=ROWS,
                    min=1,
                    max=1 << 17,
                    tooltip=(
                        "Rows of the layers' inputs to report and time for: image tokens times "
                        "batch size. 1024 x 1024 pixels are about 4096."
                    ),
                ),
            ],
            outputs=[
                io.String.Output(display_name="summary", tooltip="The report as text."),
                io.String.Output(display_name="report", tooltip="Every layer, as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        """Never the same: a report shows what is loaded, which no input does."""
        return float("nan")

    @classmethod
    @ending_shown
    def execute(cls, measure, rows, model=None, clip=None) -> io.NodeOutput:
        if (model is None) == (clip is None):
            raise ValueError("connect either a model or a text encoder to this node")
        report = _make_backend_report(cls, clip.patcher if model is None else model, rows, measure)
        summary, text = report.summary(), report.to_json()
        logger.info("MXFP8: %s", summary)
        return output(cls, summary, summary, text, document=text)


def _make_backend_report(
    node: type[io.ComfyNode], patcher, rows: int, timed: bool
) -> BackendReport:
    if timed:
        load_for_report(patcher)
    report = describe(patcher, rows)
    return measure(patcher, report, Progress(node, steps=True)) if timed else report
