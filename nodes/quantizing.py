"""Nodes that quantize to MXFP8: a model in the graph, and a file to a file."""

from __future__ import annotations

import logging
from dataclasses import replace

import comfy.model_management
import comfy.sd
from comfy_api.latest import io

from ..kernels import layout
from ..quant.conversion.convert import convert, convert_file, plan_source
from ..quant.conversion.policy import Selection
from ..quant.reports.conversion import Report
from ..quant.sources.unsupported import check_unquantized
from .host import paths
from .host.progress import Progress, output
from .models.source import ModelSource
from .models.transfer import check_movable, give_model
from .runtime.describe import describe
from .runtime.patch import accelerate
from .widgets import (
    CATEGORY,
    calibration_inputs,
    overwrite_input,
    precision_input,
    selection_inputs,
)

logger = logging.getLogger(__name__)


class MXFP8QuantizeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8QuantizeModel",
            display_name="Quantize Model (MXFP8)",
            category=CATEGORY,
            description=(
                "Quantizes a BF16, FP16 or FP32 diffusion model to MXFP8: half the size of BF16, "
                "nearly the same output. LoRAs on it are first baked in at full precision. The "
                "input model is not changed."
            ),
            search_aliases=["mxfp8", "quantize", "quantise", "compress", "fp8", "convert model"],
            inputs=[
                io.Model.Input("model", tooltip="A model that is not quantized yet."),
                *selection_inputs(),
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
    def execute(
        cls, model, preset, precision, include="", exclude="", calibration=None, held_out=None
    ) -> io.NodeOutput:
        selection = Selection(preset, include, exclude)
        quantized, report = quantize_model(cls, model, selection, calibration, held_out)
        quantized = accelerate(quantized, precision)
        return _report_output(cls, report, quantized, runs=describe(quantized).line())


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
                io.Combo.Input(
                    "source",
                    options=paths.list_sources(),
                    tooltip="A BF16, FP16 or FP32 model in a model folder, in one file or several.",
                ),
                io.String.Input(
                    "target",
                    default="",
                    tooltip=(
                        "Name of the new file in the same model folder. Empty: the source's name "
                        "with -mxfp8."
                    ),
                ),
                *selection_inputs(),
                overwrite_input(),
                *calibration_inputs(),
            ],
            outputs=[
                io.String.Output(
                    display_name="report", tooltip="Every layer's decision, size and error: JSON."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(
        cls, source, target, preset, overwrite, include="", exclude="", calibration=None,
        held_out=None,
    ) -> io.NodeOutput:  # fmt: skip
        path = paths.source_path(source)
        new = paths.target_beside(path, source, target, "mxfp8")
        with paths.folder_of(new):
            report = convert_file(
                path,
                new,
                Selection(preset, include, exclude),
                overwrite=overwrite,
                progress=Progress(cls),
                device=device(),
                calibration=calibration,
                held_out=held_out,
            )
        return _report_output(cls, report)


def _report_output(node: type[io.ComfyNode], report: Report, *values, runs: str = ""):
    """A node's output with the report on a conversion.

    Args:
        runs: how the result runs here, if it is a model.
    """
    summary = "\n".join(filter(None, (report.summary(), runs)))
    logger.info("MXFP8: %s", summary)
    text = report.to_json()
    return output(node, summary, *values, text, document=text)


def device() -> str:
    """The device to quantize on: ComfyUI's, if it has float8."""
    chosen = comfy.model_management.get_torch_device()
    return "cpu" if chosen.type == "mps" else str(chosen)


def quantize_model(
    node: type[io.ComfyNode], patcher, selection: Selection, calibration=None, held_out=None
):
    """(the MXFP8 version of a MODEL, the report on it); `node` shows the progress.

    The weights stream through the converter into a file in ComfyUI's temp folder, and stock loads
    that file. So reloads, deep clones and other devices have a file to load, and memory holds the
    input, the result and one layer. The file is deleted with the last model that uses it.
    """
    check_movable(patcher)
    source = ModelSource(patcher)
    if source.quantized:
        name, module = next(iter(source.quantized.items()))
        raise ValueError(
            f"this {source.name} is already quantized ({name!r} is {module.quant_format}); "
            "quantize the BF16, FP16 or FP32 original"
        )
    check_unquantized(source)
    plan = plan_source(source, selection, is_linear=source.is_linear)
    source.metadata = source.detection_metadata(
        {d.key: layout.padded_shape(*d.shape) for d in plan.quantized}
    )
    file = TemporaryFile()
    report = convert(
        source, file.path, plan, progress=Progress(node), device=device(),
        calibration=calibration, held_out=held_out,
    )  # fmt: skip
    del source

    fresh = load_temporary(file, disable_dynamic=not patcher.is_dynamic())
    return give_model(patcher, fresh), replace(report, target="MODEL")


class TemporaryFile:
    """A file that is deleted when nothing refers to this object any more."""

    def __init__(self):
        self.path = paths.temporary_path()
        paths.delete_with(self, self.path)


def load_temporary(file: TemporaryFile, disable_dynamic: bool = False):
    """Load a temporary file with stock; also ComfyUI's factory for deep clones."""
    patcher = comfy.sd.load_diffusion_model(str(file.path), disable_dynamic=disable_dynamic)
    patcher.cached_patcher_init = (load_temporary, (file,))
    return patcher
