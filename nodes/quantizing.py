"""Nodes that quantize to MXFP8: models in the graph, and files to files."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..quant.conversion.batch import FAILED, convert_all
from ..quant.conversion.convert import convert, plan_source
from ..quant.conversion.policy import Selection
from ..quant.reports.conversion import Report
from ..quant.reports.verdict import GOOD, NOTICE, Verdict
from ..quant.sources.open import open_source
from .host import paths, written
from .host.progress import Progress, ending_shown, output
from .models.budget import Reached, reach
from .models.quantize import device, quantize_clip, quantize_model
from .runtime.describe import describe
from .runtime.patch import accelerate, accelerate_clip
from .widgets import (
    CATEGORY,
    ModelNode,
    calibration_inputs,
    overwrite_input,
    precision_input,
    selection_inputs,
    size_or_quality_input,
    source_input,
    target_input,
)

logger = logging.getLogger(__name__)


class MXFP8Quantize(ModelNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8Quantize",
            display_name="Quantize Model (MXFP8)",
            category=CATEGORY,
            description=(
                "Quantizes a BF16, FP16 or FP32 diffusion model to MXFP8, half the size of BF16. "
                "LoRAs on it are first baked in at full precision. The input model is not changed."
            ),
            search_aliases=["mxfp8", "quantize", "quantise", "compress", "fp8", "convert model"],
            inputs=[
                io.Model.Input("model", tooltip="A model that is not quantized yet."),
                *selection_inputs(),
                size_or_quality_input(),
                precision_input(),
                *calibration_inputs(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The MXFP8 model."),
                io.String.Output(
                    display_name="report", tooltip="Every layer's decision, size and error: JSON."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @ending_shown
    def execute(
        cls, model, preset, precision, include="", exclude="", size_or_quality="",
        calibration=None, held_out=None,
    ) -> io.NodeOutput:  # fmt: skip
        selection = Selection(preset, include, exclude)
        quantized, report, reached = quantize_model(
            model, selection, calibration, held_out, Progress(cls), size_or_quality
        )
        quantized = accelerate(quantized, precision)
        runs = describe(quantized).line()
        return _report_output(cls, report, quantized, runs, reached)


class MXFP8QuantizeTextEncoder(ModelNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8QuantizeTextEncoder",
            display_name="Quantize Text Encoder (MXFP8)",
            category=CATEGORY,
            description=(
                "Quantizes a BF16, FP16 or FP32 text encoder to MXFP8, half the size of BF16: the "
                "layers that ComfyUI runs quantized (T5-XXL and language models; not CLIP). LoRAs "
                "on it are first baked in at full precision. The input is not changed."
            ),
            search_aliases=["mxfp8", "quantize clip", "quantize", "compress", "t5", "qwen"],
            inputs=[
                io.Clip.Input("clip", tooltip="A text encoder that is not quantized yet."),
                *selection_inputs(),
            ],
            outputs=[
                io.Clip.Output(display_name="clip", tooltip="The MXFP8 text encoder."),
                io.String.Output(
                    display_name="report", tooltip="Every layer's decision, size and error: JSON."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @ending_shown
    def execute(cls, clip, preset, include="", exclude="") -> io.NodeOutput:
        quantized, report = quantize_clip(clip, Selection(preset, include, exclude), Progress(cls))
        quantized = accelerate_clip(quantized)
        return _report_output(cls, report, quantized, runs=describe(quantized.patcher).line())


class MXFP8ConvertFile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8ConvertFile",
            display_name="Convert File (MXFP8)",
            category=CATEGORY,
            description=(
                "Converts a safetensors model file to MXFP8 without loading the model. The new "
                "file is written beside its source and verified; stock ComfyUI loads it too."
            ),
            search_aliases=["mxfp8", "convert", "quantize file", "quantise"],
            inputs=[
                source_input(),
                target_input("mxfp8"),
                *selection_inputs(),
                size_or_quality_input(),
                overwrite_input(),
                *calibration_inputs(),
            ],
            outputs=[
                io.String.Output(
                    display_name="report", tooltip="Every layer's decision, size and error: JSON."
                ),
                io.AnyType.Output(  # ComfyUI connects no narrower type to its own loaders' lists
                    display_name="file", tooltip="Name of the new file, for a loader's input."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls, source=None, target="", **_):
        return written.fingerprint(source, target, "mxfp8")

    @classmethod
    @ending_shown
    def execute(
        cls, source, target, preset, overwrite, include="", exclude="", size_or_quality="",
        calibration=None, held_out=None,
    ) -> io.NodeOutput:  # fmt: skip
        path = paths.source_path(source)
        new = paths.target_beside(path, source, target, "mxfp8")
        with open_source(path) as opened, paths.folder_of(new), written.counted(new):
            plan = plan_source(opened, Selection(preset, include, exclude))
            reached = reach(opened, plan, size_or_quality, calibration)
            report = convert(
                opened,
                new,
                reached.plan,
                overwrite=overwrite,
                progress=Progress(cls),
                device=device(),
                calibration=calibration,
                held_out=held_out,
                chosen=reached.chosen,
            )
        text = _log(report.summary())
        document = report.to_json()
        name = paths.listed_name(source, new)
        return output(cls, text, document, name, document=document, **reached.shown)


class MXFP8ConvertFiles(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8ConvertFiles",
            display_name="Convert Files (MXFP8)",
            category=CATEGORY,
            description=(
                "Converts several model files to MXFP8, one after another. Each new file is "
                "written beside its source. Files that were converted already are skipped, so an "
                "interrupted run goes on where it stopped."
            ),
            search_aliases=["mxfp8", "batch", "convert folder", "quantize files"],
            inputs=[
                io.String.Input(
                    "sources",
                    multiline=True,
                    placeholder="diffusion_models/flux*\ntext_encoders",
                    tooltip=(
                        "One per line: a file, a folder or a pattern in the model folders, as in "
                        "Convert File: diffusion_models/flux1-dev.safetensors, "
                        "text_encoders, checkpoints/*xl*."
                    ),
                ),
                *selection_inputs(),
                overwrite_input(),
                io.Boolean.Input(
                    "dry_run",
                    default=False,
                    optional=True,
                    tooltip="Check, and list what would be done; write nothing.",
                ),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The outcomes as JSON.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        return float("nan")  # equal to none: what is in folders changes

    @classmethod
    @ending_shown
    def execute(
        cls, sources, preset, overwrite, include="", exclude="", dry_run=False
    ) -> io.NodeOutput:
        batch = convert_all(
            paths.find_jobs(sources, "mxfp8"),
            Selection(preset, include, exclude),
            overwrite=overwrite,
            progress=Progress(cls),
            device=device(),
            dry_run=dry_run,
        )
        level = NOTICE if batch.of(FAILED) else GOOD
        verdict = Verdict(level, batch.total())
        return output(cls, _log(batch.summary()), batch.to_json(), verdict=verdict)


def _report_output(
    node: type[io.ComfyNode], report: Report, model, runs: str, reached: Reached | None = None
):
    """The output of a node with a quantized model and the report on it.

    Args:
        runs: how the model runs here.
    """
    document = report.to_json()
    text = _log(f"{report.summary()}\n{runs}")
    shown = reached.shown if reached else {}
    return output(node, text, model, document, document=document, **shown)


def _log(text: str) -> str:
    logger.info("MXFP8: %s", text)
    return text
