"""Nodes that calibrate a model, so that `quant.conversion.gptq` can round it for its use."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from comfy_api.latest import io

from ..quant.budget.choice import make_budget
from ..quant.container.header import first_of, quoted
from ..quant.conversion import calibration
from ..quant.conversion.calibration import Calibration, HessianAccumulator
from ..quant.conversion.policy import Selection
from ..quant.format import WEIGHT
from ..quant.progress import duration
from ..quant.reports.units import format_count, format_size
from ..quant.reports.verdict import GOOD, NOTICE, Verdict
from .host import paths
from .host.progress import (
    Progress,
    RunProgress,
    ending_shown,
    output,
    show,
)
from .models.gathering import Group, check_disk, gather, make_groups, nbytes
from .models.probing import planned_runs, probe_model
from .models.quantize import plan_model
from .models.sampling import SamplerSettings
from .models.source import ModelSource
from .widgets import CATEGORY, CalibrationType, sampler_inputs, selection_inputs

logger = logging.getLogger(__name__)

_GB = 10**9
_MOST_NAMED = 8  # layers in a result's text
_MOST_SENSITIVE = 3  # of these
_IN_SAMPLE = (
    "the report of a conversion measures its error on this data (in-sample) unless it gets a "
    "second calibration, of other seeds, as held_out"
)


class MXFP8Calibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8Calibrate",
            display_name="Calibrate (MXFP8)",
            category=CATEGORY,
            description=(
                "Samples a BF16, FP16 or FP32 model as KSampler does, on prompts and seeds that "
                "are typical of its use, and gathers statistics of every layer's inputs. Quantize "
                "Model (MXFP8) and Convert File (MXFP8) then round the weights for these inputs: "
                "same format, same size, less error in the layers' outputs."
            ),
            search_aliases=["mxfp8", "calibrate", "calibration", "gptq", "quantize"],
            inputs=[
                io.Model.Input("model", tooltip="The original model, with the LoRAs to bake in."),
                *sampler_inputs(
                    io.Int.Input("first_seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF,
                                 tooltip="The first seed; the others follow it."),
                    io.Int.Input("seeds", default=2, min=1, max=64,
                                 tooltip="How many seeds to sample. More is better, and slower."),
                ),
                *selection_inputs(),
                io.Float.Input(
                    "memory_gb", default=4.0, min=0.001, max=256.0, step=0.1, optional=True,
                    advanced=True,
                    tooltip=(
                        "Memory for the statistics, on the model's device. If all layers do not "
                        "fit, they are watched in groups; each takes sampling runs of its own, "
                        "and a file in ComfyUI's temp folder."
                    ),
                ),
                io.Boolean.Input(
                    "sensitivity", default=False, optional=True,
                    tooltip=(
                        "Also measure what rounding each layer does to the picture, so that "
                        "Quantize Model and Convert File can be given a size or a quality. Takes "
                        "more sampling runs: at most 44 for 210 layers, however many seeds. An "
                        "interrupted measurement goes on where it stopped."
                    ),
                ),
            ],
            outputs=[
                CalibrationType.Output(
                    display_name="calibration",
                    tooltip="For Quantize Model, Convert File or Save Calibration.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    @ending_shown
    def execute(
        cls, model, preset, include="", exclude="", memory_gb=4.0, sensitivity=False, **sampling
    ) -> io.NodeOutput:
        settings = SamplerSettings(**sampling)
        # What Quantize Model (MXFP8) would reject after hours of this is rejected now.
        source, plan = plan_model(model, Selection(preset, include, exclude))
        widths = {d.layer.removeprefix(source.prefix): d.shape[1] for d in plan.quantized}
        groups = list(make_groups(widths, int(memory_gb * _GB)))
        check_disk(source.name, groups)
        work = _announce(groups, settings, sensitivity)
        show(cls, f"{work}. The first step shows how long that takes.")
        logger.info("MXFP8: calibration of %s.", work)
        progress = RunProgress(cls, len(groups) * settings.seeds, settings.steps)

        def on_step(index: int, *_) -> None:
            text = progress.step(index + 1, work)
            if text and not index:
                logger.info("MXFP8: %s", text.rpartition("\n")[2])

        def sample(watched) -> None:
            for seed in settings.each_seed:
                settings.sample(watched, seed)
                progress.finish_run()

        layers, accumulators = gather(model, groups, sample, progress.begin, on_step)
        if not layers:
            why = "received usable (finite) inputs" if groups else "is to be quantized"
            raise ValueError(f"calibration is empty: no layer of this {source.name} {why}")
        keys = [f"{source.prefix}{name}{WEIGHT}" for name in layers]
        mark = calibration.fingerprint(
            (key.removesuffix(WEIGHT), source.tensors[key][1], source.rows(key, 0, 1)[0])
            for key in keys
        )
        about = {
            "first_seed": settings.first_seed, "seeds": settings.seeds, "steps": settings.steps,
            "cfg": settings.cfg, "sampler": settings.sampler_name,
            "scheduler": settings.scheduler, "denoise": settings.denoise,
            "preset": preset, "include": include, "exclude": exclude,
        }  # fmt: skip
        warnings = [f"WARNING: {warning}" for warning in plan.warnings]
        rows = min(moments.rows for moments in layers.values())
        done = (
            f"{format_count(len(layers), 'layer')}, at least {format_count(rows, 'row')} each, in "
            f"{duration(progress.seconds)}"
        )
        faults = _faults(layers, accumulators)
        for fault, names in faults:
            logger.warning("MXFP8: %s: %s", fault, names)
        made = Calibration(layers, mark, about)
        lines, document = [], None
        if sensitivity:
            made, line = _with_sensitivity(cls, model, source, made, settings)
            lines = [line]
            document = make_budget(
                source, plan, made.sensitivity, is_linear=source.is_linear
            ).to_json()
        text = [work, done, *lines, *map(": ".join, faults), *warnings, _IN_SAMPLE]
        first = [done, *lines, *(fault for fault, _ in faults), *warnings]
        verdict = Verdict(NOTICE if faults or warnings else GOOD, "\n".join(first))
        return output(cls, "\n".join(text), made, document=document, verdict=verdict)


def _with_sensitivity(
    node: type[io.ComfyNode], patcher, source: ModelSource, made: Calibration,
    settings: SamplerSettings,
) -> tuple[Calibration, str]:  # fmt: skip
    """A calibration with its sensitivities, and a line about the most sensitive layers."""
    keys = {name: f"{source.prefix}{name}{WEIGHT}" for name in made.layers}
    sizes = {name: math.prod(source.tensors[key][1]) for name, key in keys.items()}
    samples, runs = planned_runs(len(sizes), settings.seeds)
    work = (
        f"sensitivities of {format_count(len(sizes), 'layer')}: "
        f"{format_count(samples * (1 + runs), 'run')} of {format_count(settings.steps, 'step')}"
    )
    logger.info("MXFP8: %s.", work)
    progress = RunProgress(node, samples * (1 + runs), settings.steps)
    sensitivity = probe_model(
        patcher,
        sizes,
        settings,
        about=made.about,
        model=made.model,
        on_layer=progress.begin,
        on_step=lambda index, *_: progress.step(index + 1, work),
        on_run=lambda done, _: progress.skip_to(done),
    )
    damages = sensitivity.damages
    every = damages.total(sizes)
    worst = sorted(sizes, key=lambda name: -damages.values[name])[:_MOST_SENSITIVE]
    shares = (f"{quoted(n)} {100 * damages.values[n] / every:.0f}%" for n in worst if every)
    line = (
        f"sensitivity from {format_count(sensitivity.runs, 'run')} in "
        f"{duration(progress.seconds)}; of the error in the picture: {', '.join(shares) or 'none'}"
    )
    return replace(made, sensitivity=sensitivity), line


def _announce(groups: list[Group], settings: SamplerSettings, sensitivity: bool) -> str:
    layers = sum(map(len, groups))
    runs = format_count(len(groups) * settings.seeds, "run")
    work = (
        f"{format_count(layers, 'layer')}, {format_size(nbytes(*groups))} in "
        f"{format_count(len(groups), 'group')}: {runs} of {format_count(settings.steps, 'step')}"
    )
    if sensitivity and layers:
        samples, probes = planned_runs(layers, settings.seeds)
        work += f", then {samples * (1 + probes)} more for sensitivity"
    return work


def _faults(layers: dict, accumulators: dict[str, HessianAccumulator]) -> list[tuple[str, str]]:
    """What is wrong with layers' inputs, each with the names of these layers."""
    lost: dict[str, list[str]] = {}  # by what they got
    for name, accumulator in accumulators.items():
        if name not in layers:
            lost.setdefault(accumulator.received, []).append(quoted(name))
    faults = [
        (
            f"{format_count(len(names), 'layer')} got {received} and will be rounded to nearest",
            first_of(names, _MOST_NAMED, str),
        )
        for received, names in lost.items()
    ]
    partly = [f"{quoted(n)} ({accumulators[n].dropped})" for n in layers if accumulators[n].dropped]
    if partly:
        faults.append((
            f"{format_count(len(partly), 'layer')} got rows with NaN or Inf, which were left out",
            first_of(partly, _MOST_NAMED, str),
        ))  # fmt: skip
    few = [f"{quoted(name)} ({moments.rows} of {moments.width})"
           for name, moments in layers.items() if moments.rows < moments.width]  # fmt: skip
    if few:
        faults.append((
            f"{format_count(len(few), 'layer')} saw fewer rows than the layer's width and may "
            "gain less; use more seeds or a larger latent",
            first_of(few, _MOST_NAMED, str),
        ))  # fmt: skip
    return faults


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
                    default=f"{paths.CALIBRATIONS}/mxfp8",
                    tooltip=(
                        "Folder and name inside output/. Load Calibration (MXFP8) lists "
                        f"output/{paths.CALIBRATIONS}."
                    ),
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @ending_shown
    def execute(cls, calibration, filename_prefix) -> io.NodeOutput:
        with paths.saving(filename_prefix) as path:
            calibration.save(path, progress=Progress(cls))
        return output(cls, f"{path.name}: {format_size(path.stat().st_size)}")


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
                    options=paths.list_calibrations(),
                    tooltip=f"A file in output/{paths.CALIBRATIONS}.",
                )
            ],
            outputs=[
                CalibrationType.Output(display_name="calibration", tooltip="As it was saved.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @ending_shown
    def execute(cls, calibration_name) -> io.NodeOutput:
        path = paths.calibration_path(calibration_name)
        loaded = calibration.load(path, Progress(cls))
        text = format_count(len(loaded.layers), "layer")
        return output(cls, f"{text}, with sensitivity" if loaded.sensitivity else text, loaded)
