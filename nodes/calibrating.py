"""Nodes that watch a model at work, so that its weights can be rounded for that (`quant.gptq`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import MethodType

import comfy.model_management
import comfy.samplers
import comfy.utils
import nodes as comfy_nodes
import torch
from comfy_api.latest import io

from ..quant import calibration
from ..quant.calibration import Calibration, Moments, Sum
from ..quant.convert import plan_source
from ..quant.format import WEIGHT
from ..quant.report import gigabytes
from . import files, names
from .loading import CATEGORY, show
from .model_source import ModelSource
from .selection import selection_inputs

logger = logging.getLogger(__name__)

CalibrationType = io.Custom("MXFP8_CALIBRATION")
_PREFIX = "diffusion_model."
_GB = 10**9


class MXFP8Calibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8Calibrate",
            display_name="Calibrate (MXFP8)",
            category=CATEGORY,
            description=(
                "Runs a BF16, FP16 or FP32 model as KSampler does, on prompts and seeds that are "
                "typical of its use, and notes what each layer is given. Quantize Model (MXFP8) "
                "and Convert File (MXFP8) then round the weights for that: same format, same size, "
                "less error in what the layers put out."
            ),
            search_aliases=["mxfp8", "calibrate", "calibration", "gptq", "quantize"],
            inputs=[
                io.Model.Input("model", tooltip="The original model, with the LoRAs to bake in."),
                io.Conditioning.Input("positive", tooltip="A prompt as you use them."),
                io.Conditioning.Input("negative", tooltip="What KSampler would be given."),
                io.Latent.Input("latent_image", tooltip="Of the size that you use."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF,
                             tooltip="The first seed; the others follow it."),
                io.Int.Input("seeds", default=2, min=1, max=64,
                             tooltip="How many seeds are sampled. More is better, and slower."),
                io.Int.Input("steps", default=8, min=1, max=1000, tooltip="As in KSampler."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1,
                               tooltip="As in KSampler."),
                io.Combo.Input("sampler_name", options=list(comfy.samplers.KSampler.SAMPLERS),
                               default="euler", tooltip="As in KSampler."),
                io.Combo.Input("scheduler", options=list(comfy.samplers.KSampler.SCHEDULERS),
                               default="simple", tooltip="As in KSampler."),
                io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01,
                               tooltip="As in KSampler."),
                *selection_inputs(),
                io.Float.Input(
                    "memory_gb", default=4.0, min=0.1, max=256.0, step=0.1, optional=True,
                    advanced=True,
                    tooltip=(
                        "Memory on the model's device for what is noted. If all layers do not fit, "
                        "they are watched in groups, and each group takes a run of its own."
                    ),
                ),
            ],
            outputs=[
                CalibrationType.Output(
                    display_name="calibration", tooltip="For Quantize, Convert or Save Calibration."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, seed, seeds, steps, cfg, sampler_name,
        scheduler, denoise, preset, include="", exclude="", memory_gb=4.0,
    ) -> io.NodeOutput:  # fmt: skip
        source = ModelSource(model)
        if source.quantized:
            raise ValueError(
                f"this {source.name} is quantised already; calibrate the BF16, FP16 or FP32 "
                "original"
            )
        plan = plan_source(
            source, preset=preset, include=include, exclude=exclude, is_linear=source.is_linear
        )
        sizes = {d.layer: 4 * d.shape[1] ** 2 for d in plan.quantized}
        groups = list(_groups(sizes, int(memory_gb * _GB)))
        show(cls, _announce(groups, sizes, seeds, steps))
        comfy.model_management.free_memory(
            min(int(memory_gb * _GB), sum(sizes.values())), model.load_device
        )

        layers: dict[str, Moments] = {}
        for group in groups:
            watched, sums = _watch(model, group)
            for number in range(seeds):
                comfy_nodes.common_ksampler(
                    watched, seed + number, steps, cfg, sampler_name, scheduler, positive, negative,
                    latent_image, denoise=denoise,
                )  # fmt: skip
            for name, found in sums.items():
                if found.rows:
                    layers[name] = Moments((found.second / found.rows).cpu(), found.rows)
        silent = [name for name in sizes if name not in layers]
        if silent:
            logger.warning(
                "MXFP8: %d layers were given nothing (%r the first); they are rounded to nearest.",
                len(silent), silent[0],
            )  # fmt: skip
        if not layers:
            raise ValueError(f"calibration is empty: no layer of this {source.name} was run")
        mark = calibration.fingerprint(
            (n, source.tensors[n + WEIGHT][1], source.rows(n + WEIGHT, 0, 1)[0]) for n in layers
        )
        text = f"{len(layers)} layers, {min(m.rows for m in layers.values())} rows at least"
        show(cls, text)
        return io.NodeOutput(Calibration(layers, mark), ui={"text": [text]})


def _groups(sizes: dict[str, int], budget: int) -> Iterator[list[str]]:
    """Layers whose moments fit the budget together, in model order; one always may."""
    group: list[str] = []
    left = budget
    for name, size in sizes.items():
        if group and size > left:
            yield group
            group, left = [], budget
        group.append(name)
        left -= size
    if group:
        yield group


def _announce(groups, sizes, seeds: int, steps: int) -> str:
    total = gigabytes(sum(sizes.values()))
    runs = len(groups) * seeds
    return f"{len(sizes)} layers, {total} in {len(groups)} groups: {runs} runs of {steps} steps"


def _watch(patcher, layers: list[str]):
    """A clone of a ModelPatcher whose layers note what they are given; (clone, notes by layer)."""
    clone = patcher.clone()
    sums: dict[str, Sum] = {}
    for name in layers:
        key = f"{_PREFIX}{name}.forward"
        module = comfy.utils.get_attr(clone.model, _PREFIX + name)
        forward = clone.object_patches.get(key, MethodType(type(module).forward, module))
        sums[name] = Sum()
        clone.add_object_patch(key, _noting(forward, sums[name]))
    return clone, sums


def _noting(forward, found: Sum):
    def note(x: torch.Tensor, *args, **options):
        found.add(x)
        return forward(x, *args, **options)

    return note


class MXFP8SaveCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8SaveCalibration",
            display_name="Save Calibration (MXFP8)",
            category=CATEGORY,
            description="Saves a calibration to output/, for later and for `mxfp8 convert`.",
            search_aliases=["mxfp8", "calibration", "save"],
            inputs=[
                CalibrationType.Input("calibration", tooltip="From Calibrate (MXFP8)."),
                io.String.Input(
                    "filename_prefix",
                    default=f"{files.CALIBRATIONS}/mxfp8",
                    tooltip="Folder and name inside output/; the loader lists that folder.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, calibration, filename_prefix) -> io.NodeOutput:
        path = files.save_path(names.check_name("filename_prefix", filename_prefix))
        calibration.save(path)
        text = f"{path.name}: {gigabytes(path.stat().st_size)}"
        show(cls, text)
        return io.NodeOutput(ui={"text": [text]})


class MXFP8LoadCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8LoadCalibration",
            display_name="Load Calibration (MXFP8)",
            category=CATEGORY,
            description="Loads a calibration that Save Calibration (MXFP8) wrote.",
            search_aliases=["mxfp8", "calibration", "load"],
            inputs=[
                io.Combo.Input(
                    "calibration_name",
                    options=files.list_calibrations(),
                    tooltip=f"A file in output/{files.CALIBRATIONS}.",
                )
            ],
            outputs=[
                CalibrationType.Output(display_name="calibration", tooltip="As it was saved.")
            ],
        )

    @classmethod
    def execute(cls, calibration_name) -> io.NodeOutput:
        return io.NodeOutput(calibration.load(files.calibration_path(calibration_name)))
