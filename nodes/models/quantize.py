"""A MODEL or a CLIP quantized to MXFP8, on the patcher of its input.

The weights stream through the converter into a file in ComfyUI's temp folder, and stock loads that
file. So reloads, deep clones and other devices have a file to load, and memory holds the input, the
result and one layer. The file is deleted with the last model that uses it.

A MODEL's file is one that stock recognizes. What type of CLIP a text encoder's files were loaded as
is not to be seen in them, so stock's CLIP is built anew from the class of the given one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.text_encoders.long_clipl import model_options_long_clip

from ...kernels import has_float8, layout
from ...quant.container.header import advising, quoted
from ...quant.conversion.calibration import Calibration
from ...quant.conversion.convert import convert, plan_source
from ...quant.conversion.policy import Decision, Plan, Selection
from ...quant.format import WEIGHT, read_header
from ...quant.progress import Progress
from ...quant.reports.conversion import LayerReport, Report
from ..host import paths
from ..host.float8 import check_float8
from .budget import Reached, keep_prediction, reach
from .load import load_diffusion_model, read_state
from .raw_codes import check_layers
from .source import ModelSource
from .text_encoder import PROJECTION, TextEncoderSource, encoders, names_in_file
from .transfer import check_movable, give_model
from .weights import LoadedWeights

# By which ComfyUI's text encoders are told to build quantizing layers.
_QUANTIZING = {
    f"{part}quantization_metadata": {"mixed_ops": True} for part in ("", "t5xxl_", "llama_")
}
_SAVE_INSTEAD = "to bake a LoRA into this one, use {} (MXFP8)"


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
    _check_not_cast(source, "--fp8_e4m3fn-unet")
    plan = _plan(source, selection, patcher, "Save Model")
    source.metadata |= source.detection_metadata(
        {d.key: layout.padded_shape(*d.shape) for d in plan.quantized}
    )
    return source, plan


def _plan(source: LoadedWeights, selection: Selection, patcher, saver: str) -> Plan:
    baking = bool(source.quantized and patcher.patches)
    with advising(_SAVE_INSTEAD.format(saver)) if baking else contextlib.nullcontext():
        return plan_source(source, selection, is_linear=source.is_linear)


def _check_not_cast(source: LoadedWeights, option: str) -> None:
    for key, (dtype, shape) in source.tensors.items():
        layer = key.removesuffix(WEIGHT)
        if layer in source.quantized or layer == key:
            continue
        if len(shape) > 1 and dtype.startswith("F8_"):
            raise ValueError(
                f"this {source.name} is FP8 in memory ({quoted(key)} is {dtype}): its file is, or "
                "it was cast on loading. Load the BF16, FP16 or FP32 original with weight_dtype "
                f"'default', in a ComfyUI started without an option such as {option}"
            )


def quantize_model(
    patcher,
    selection: Selection,
    calibration: Calibration | None = None,
    held_out: Calibration | None = None,
    progress: Progress | None = None,
    size_or_quality: str = "",
) -> tuple[ModelPatcher, Report, Reached]:
    """The MXFP8 version of a MODEL, the report on it, and what its size or quality comes to.

    Raises:
        ValueError: as `plan_model` and `reach`, or the model's device has no float8.
    """
    check_float8(patcher.load_device, f"this {type(patcher.model).__name__}")
    source, plan = plan_model(patcher, selection)
    reached = reach(source, plan, size_or_quality, calibration, source.is_linear)
    file = paths.TemporaryFile()
    report = convert(
        source, file.path, reached.plan, progress=progress, device=device(),
        calibration=calibration, held_out=held_out, chosen=reached.chosen,
    )  # fmt: skip
    file.hold()
    del source

    fresh = _load_temporary(file, disable_dynamic=not patcher.is_dynamic())
    model = give_model(patcher, fresh)
    keep_prediction(model, reached.chosen)
    return model, replace(report, target="MODEL"), reached


def _load_temporary(file: paths.TemporaryFile, disable_dynamic: bool = False):
    """Load a temporary file; also ComfyUI's factory for deep clones."""
    patcher = load_diffusion_model(str(file.restored()), disable_dynamic=disable_dynamic)
    patcher.cached_patcher_init = (_load_temporary, (file,))
    return patcher


def plan_clip(clip, selection: Selection) -> tuple[LoadedWeights, Plan]:
    """The weights of a CLIP as a source, and which of its layers to quantize.

    Each text encoder is planned as the file that it would be.

    Raises:
        ValueError: as `plan_model`, or the CLIP has weights that no file of a text encoder has.
    """
    check_movable(clip.patcher)
    source = LoadedWeights(clip.patcher)
    decisions: dict[str, Decision] = {}
    plans = []
    for encoder in encoders(clip):
        if encoder == PROJECTION:  # which ComfyUI runs unquantized
            continue
        part = TextEncoderSource(clip, encoder)
        _check_not_cast(part, "--fp8_e4m3fn-text-enc")
        plans.append(_plan(part, selection, clip.patcher, "Save Text Encoder"))
        for decision in plans[-1].decisions:
            if decision.key in part.in_memory:  # the rest is the tokenizer's
                key = part.in_memory[decision.key]
                decisions[key] = replace(decision, key=key)
    for key in source.tensors.keys() - decisions.keys():
        decisions[key] = Decision(key, *source.tensors[key], False, "not a layer's weight")
    quantizing = [plan for plan in plans if plan.quantized] or plans
    return source, Plan(
        tuple(decisions[key] for key in source.tensors),
        ", ".join(dict.fromkeys(plan.preset for plan in quantizing)),
        ", ".join(dict.fromkeys(filter(None, (plan.architecture for plan in quantizing)))) or None,
        selection,
        tuple(dict.fromkeys(warning for plan in quantizing for warning in plan.warnings)),
    )


def quantize_clip(clip, selection: Selection, progress: Progress | None = None):
    """The MXFP8 version of a CLIP, and the report on it.

    Raises:
        ValueError: as `plan_clip`, or the CLIP's device has no float8.
    """
    check_float8(clip.patcher.load_device, f"this {type(clip.cond_stage_model).__name__}")
    source, plan = plan_clip(clip, selection)
    file = paths.TemporaryFile()
    report = convert(source, file.path, plan, progress=progress, device=device())
    report = replace(report, target="CLIP", layers=_as_in_files(clip, report))
    file.hold()
    del source

    fresh = _ClipFile.like(clip, file).load(disable_dynamic=not clip.patcher.is_dynamic())
    quantized = clip.clone()
    quantized.patcher = give_model(clip.patcher, fresh.patcher)
    quantized.cond_stage_model = fresh.cond_stage_model
    return quantized, report


def _as_in_files(clip, report: Report) -> tuple[LayerReport, ...]:
    """The layers of a report on a CLIP under the names that presets, include and exclude match."""
    names = {}
    for encoder in encoders(clip):
        for key, name in names_in_file(clip, encoder).items():
            names[key.removesuffix(WEIGHT)] = name.removesuffix(WEIGHT)
    return tuple(replace(layer, name=names.get(layer.name, layer.name)) for layer in report.layers)


def builder(model: torch.nn.Module) -> Callable[..., torch.nn.Module]:
    """What builds a text encoder like this one, and does not hold it."""
    kind = type(model)
    connectors = getattr(model, "compat_mode", False)  # LTX-2's, of its checkpoint

    def build(**options) -> torch.nn.Module:
        built = kind(**options)
        if connectors:
            built.enable_compat_mode()
        return built

    return build


@dataclass(frozen=True)
class _ClipFile:
    """A file with the weights of a CLIP, by their names in memory, and what to build it with.

    Attributes:
        build: its model, as ComfyUI's class of it is built.
        tokenizer: of the CLIP, which is shared.
        options: as ComfyUI's loaders give it.
    """

    file: paths.TemporaryFile
    build: Callable[..., torch.nn.Module]
    tokenizer: object
    options: Mapping

    @classmethod
    def like(cls, clip, file: paths.TemporaryFile) -> _ClipFile:
        patcher = clip.patcher
        _, arguments, *_ = patcher.cached_patcher_init or (None, ())
        given = arguments[3] if len(arguments) > 3 else None  # to all of ComfyUI's loaders
        options = dict(given) if isinstance(given, Mapping) else {}
        state = clip.cond_stage_model.state_dict()
        for encoder in encoders(clip):  # CLIP-L may be a longer one, which its weights show
            names = names_in_file(clip, encoder)
            named = {new: state[old] for old, new in names.items()}
            _, options = model_options_long_clip(named, {}, options)
        options |= {"load_device": patcher.load_device, "offload_device": patcher.offload_device}
        return cls(file, builder(clip.cond_stage_model), clip.tokenizer, options)

    def load(self, disable_dynamic: bool = False) -> comfy.sd.CLIP:
        header = read_header(self.file.restored())
        state, _ = read_state(header)
        clip = comfy.sd.CLIP(
            SimpleNamespace(params={}, clip=self.build, tokenizer=lambda **_: self.tokenizer),
            parameters=comfy.utils.calculate_parameters(state),
            state_dict=state,
            model_options={**self.options, **_QUANTIZING},
            disable_dynamic=disable_dynamic,
        )
        check_layers(header, clip.cond_stage_model)
        clip.patcher.cached_patcher_init = (self.load_patcher, ())
        return clip

    def load_patcher(self, disable_dynamic: bool = False) -> ModelPatcher:
        """ComfyUI's factory for deep clones."""
        return self.load(disable_dynamic).patcher
