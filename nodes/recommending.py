"""A node that says which format suits this machine and a model."""

from __future__ import annotations

import comfy.model_management
from comfy_api.latest import io

from ..quant.advice.recommend import recommend
from ..quant.reports.verdict import Verdict
from .host import paths
from .host.progress import ending_shown, output
from .widgets import CATEGORY, NO_FILE


class MXFP8Recommend(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8Recommend",
            display_name="Recommend Format (MXFP8)",
            category=CATEGORY,
            description=(
                "Says which format suits this machine: what it multiplies directly, MXFP8 beside "
                "INT8, GGUF and NVFP4, which of them fit with which picture size, and what to "
                "install for more speed."
            ),
            search_aliases=[
                "mxfp8", "recommend", "which format", "vram", "memory", "int8", "gguf", "nvfp4",
            ],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[NO_FILE, *paths.list_sources()],
                    tooltip=(
                        "A model that is not quantized, or an MXFP8 file, to see what fits. Only "
                        "its header is read."
                    ),
                ),
            ],
            outputs=[
                io.String.Output(display_name="summary", tooltip="The result as text."),
                io.String.Output(display_name="recommendation", tooltip="The same as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, **_):
        """Never the same: free memory changes, and so do files."""
        return float("nan")

    @classmethod
    @ending_shown
    def execute(cls, model) -> io.NodeOutput:
        path = None if model == NO_FILE else paths.source_path(model)
        found = recommend(path, comfy.model_management.get_torch_device())
        summary = found.summary()
        verdict = Verdict("", found.advice)
        return output(cls, summary, summary, found.to_json(), verdict=verdict)
