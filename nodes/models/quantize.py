"""A MODEL quantized to MXFP8, on the patcher of its input.

The weights stream through the converter into a file in ComfyUI's temp folder, and stock loads that
file. So reloads, deep clones and other devices have a file to load, and memory holds the input, the
result and one layer. The file is deleted with the last model that uses it.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import comfy.model_management
from comfy.model_patcher import ModelPatcher

from ...kernels import has_float8, layout
from ...quant.container.header import advising, quoted
from ...quant.conversion.calibration import Calibration
from ...quant.conversion.convert import convert, plan_source
from ...quant.conversion.policy import Plan, Selection
from ...quant.format import WEIGHT
from ...quant.progress import Progress
from ...quant.reports.conversion import Report
from ..host import paths
from ..host.float8 import check_float8
from .load import load_diffusion_model
from .source import ModelSource
from .transfer import check_movable, give_model

_SAVE_INSTEAD = "to bake a LoRA into this one, use Save Model (MXFP8)"


def device() -> str:
    """The device to quantize on: ComfyUI's, if it has float8."""
    chosen = comfy.model_management.get_torch_device()
    return str(chosen) if has_float8(chosen) else "cpu"


def plan_model(patcher, selection: Selection) -> tuple[ModelSource, Plan]:
    """A MODEL as a source, and which of its layers to quantize.

    Raises:
        ValueError: a layer to quantize is quantized already, or the model is cast to FP8, ComfyUI
            would not recognize it in a file, or something on it cannot move to another model.
    """
    check_movable(patcher)
    source = ModelSource(patcher)
    _check_not_cast(source)
    baking = bool(source.quantized and patcher.patches)
    with advising(_SAVE_INSTEAD) if baking else contextlib.nullcontext():
        plan = plan_source(source, selection, is_linear=source.is_linear)
    source.metadata |= source.detection_metadata(
        {d.key: layout.padded_shape(*d.shape) for d in plan.quantized}
    )
    return source, plan


def _check_not_cast(source: ModelSource) -> None:
    for key, (dtype, shape) in source.tensors.items():
        layer = key.removesuffix(WEIGHT)
        if layer in source.quantized or layer == key:
            continue
        if len(shape) > 1 and dtype.startswith("F8_"):
            raise ValueError(
                f"this {source.name} is FP8 in memory ({quoted(key)} is {dtype}): its file is, or "
                "it was cast on loading. Load the BF16, FP16 or FP32 original with weight_dtype "
                "'default', in a ComfyUI started without an option such as --fp8_e4m3fn-unet"
            )


def quantize_model(
    patcher,
    selection: Selection,
    calibration: Calibration | None = None,
    held_out: Calibration | None = None,
    progress: Progress | None = None,
) -> tuple[ModelPatcher, Report]:
    """The MXFP8 version of a MODEL, and the report on it.

    Raises:
        ValueError: as `plan_model`, or the model's device has no float8.
    """
    check_float8(patcher.load_device, f"this {type(patcher.model).__name__}")
    source, plan = plan_model(patcher, selection)
    file = paths.TemporaryFile()
    report = convert(
        source, file.path, plan, progress=progress, device=device(),
        calibration=calibration, held_out=held_out,
    )  # fmt: skip
    file.hold()
    del source

    fresh = _load_temporary(file, disable_dynamic=not patcher.is_dynamic())
    return give_model(patcher, fresh), replace(report, target="MODEL")


def _load_temporary(file: paths.TemporaryFile, disable_dynamic: bool = False):
    """Load a temporary file; also ComfyUI's factory for deep clones."""
    patcher = load_diffusion_model(str(file.restored()), disable_dynamic=disable_dynamic)
    patcher.cached_patcher_init = (_load_temporary, (file,))
    return patcher
