"""Nodes that watch a model at work, so that its weights can be rounded for that (`quant.gptq`).

The moments of all layers together are larger than the model. Layers are watched in groups that fit
the memory given, each in runs of its own; where that takes more than one group, each goes into a
file in ComfyUI's temp folder before the next, so what a calibration needs does not grow with the
model. Rejected: all of them in memory (22 GB for Z-Image), and adding up in a file, which every
layer of every step would have to read and write.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from types import MethodType

import comfy.model_management
import comfy.samplers
import comfy.utils
import nodes as comfy_nodes
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ..quant import calibration
from ..quant.calibration import Calibration, Moments, StoredMoments, Sum
from ..quant.container import quoted
from ..quant.convert import plan_source
from ..quant.format import WEIGHT
from ..quant.memory import is_out_of_memory
from ..quant.progress import duration
from ..quant.report import gigabytes
from . import files, names
from .loading import CATEGORY
from .model_source import PREFIX, ModelSource
from .progress import show
from .selection import selection_inputs

logger = logging.getLogger(__name__)

CalibrationType = io.Custom("MXFP8_CALIBRATION")
_GB = 10**9
_MOST_NAMED = 8  # layers in a result's text
_INTERVAL = 0.5  # seconds between two texts on the node


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
                io.Int.Input("first_seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF,
                             tooltip="The others follow it."),
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
                    "memory_gb", default=4.0, min=0.001, max=256.0, step=0.1, optional=True,
                    advanced=True,
                    tooltip=(
                        "Memory on the model's device for what is noted. If all layers do not fit, "
                        "they are watched in groups; each takes runs of its own, and goes into a "
                        "file in ComfyUI's temp folder."
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
        cls, model, positive, negative, latent_image, first_seed, seeds, steps, cfg, sampler_name,
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
        sizes = {d.layer: calibration.nbytes(d.shape[1]) for d in plan.quantized}
        groups = list(_groups(sizes, int(memory_gb * _GB)))
        _check_disk(source.name, groups, sizes)
        progress = _Progress(
            cls, _announce(groups, sizes, seeds, steps), len(groups) * seeds, steps
        )

        def sample(watched) -> None:
            for number in range(seeds):
                seed = (first_seed + number) % 2**64
                comfy_nodes.common_ksampler(
                    watched, seed, steps, cfg, sampler_name, scheduler, positive, negative,
                    latent_image, denoise=denoise,
                )  # fmt: skip
                progress.finish_run()

        comfy.model_management.free_memory(
            min(int(memory_gb * _GB), sum(sizes.values())), model.load_device
        )
        layers = _gather_all(model, groups, sample, progress)
        if not layers:
            raise ValueError(
                f"calibration is empty: no layer of this {source.name} was run"
                + " on finite values" * bool(groups)
            )
        mark = calibration.fingerprint(
            (n, source.tensors[n + WEIGHT][1], source.rows(n + WEIGHT, 0, 1)[0]) for n in layers
        )
        text = _result(layers, sizes, progress)
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


def _check_disk(model: str, groups, sizes: dict[str, int]) -> None:
    """Raise ValueError where the temp folder has no room for the groups' files."""
    needed = sum(sizes.values())
    free = shutil.disk_usage(files.temporary_path().parent).free
    if len(groups) > 1 and needed > free:
        raise ValueError(
            f"calibrating this {model} in {len(groups)} groups takes {gigabytes(needed)} in "
            f"ComfyUI's temp folder, which has {gigabytes(free)} free; make room there, raise "
            "memory_gb, or exclude layers"
        )


def _announce(groups, sizes, seeds: int, steps: int) -> str:
    total = gigabytes(sum(sizes.values()))
    runs = len(groups) * seeds
    return f"{len(sizes)} layers, {total} in {len(groups)} groups: {runs} runs of {steps} steps"


class _Progress:
    """Steps of all runs, on the node's bar and in its text, with the time that is left.

    Not `quant.progress.Pace`, which times its work from when it is made.
    The first step is timed from its first layer on: what came before was loading the model. Later
    ones count whole, with what lies between two runs.
    """

    def __init__(self, node: type[io.ComfyNode], plan: str, runs: int, steps: int):
        self.plan, self._node, self._steps = plan, node, steps
        self._total = runs * steps
        self._bar = comfy.utils.ProgressBar(self._total)
        self._runs = self._step = 0
        self._begin = self._first = self._shown = 0.0
        show(node, f"{plan}. Its first step tells how long that takes.")
        logger.info("MXFP8: calibration of %s.", plan)

    @property
    def seconds(self) -> float:
        """Since the first layer was run."""
        return time.perf_counter() - self._begin

    def layer(self) -> None:
        """Before each layer, where stock looks for interrupts itself."""
        self._begin = self._begin or time.perf_counter()

    def step(self, index: int, *_) -> None:
        """After each step of a run, as samplers call it."""
        self._step = min(index + 1, self._steps)
        now = time.perf_counter()
        done = self._runs * self._steps + self._step
        self._bar.update_absolute(done, self._total)
        first = not self._first
        self._first = self._first or now
        each = (now - self._first) / (done - 1) if done > 1 else now - self._begin
        left = duration(each * (self._total - done))
        if first:
            logger.info("MXFP8: the first step took %.2f s; about %s to go.", each, left)
        if first or now - self._shown > _INTERVAL:
            self._shown = now
            show(self._node, f"{self.plan}\nstep {done} of {self._total}, about {left} to go")

    def finish_run(self) -> None:
        self._runs, self._step = self._runs + 1, 0


def _gather_all(
    patcher, groups: list[list[str]], sample, progress: _Progress
) -> dict[str, Moments | StoredMoments]:
    """Moments of all groups, by layer.

    Raises:
        MemoryError: it did not suffice; what was gathered is free again, and so is the model.
    """
    layers: dict[str, Moments | StoredMoments] = {}
    try:
        for group in groups:
            found = _gather(patcher, group, sample, progress)
            layers |= _in_file(found) if len(groups) > 1 else found
        return layers
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("MXFP8: out of memory: %s", error)
    # Not inside the handler: the error keeps the frames in which it rose, with all their tensors.
    layers.clear()
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    raise MemoryError(
        f"out of memory while this {type(patcher.model).__name__} was calibrated; it is as it was "
        "before. Lower memory_gb, or take a smaller latent"
    )


def _gather(patcher, layers: list[str], sample, progress: _Progress) -> dict[str, Moments]:
    """Moments of these layers while `sample` runs a clone of the model.

    Whatever happens, their memory is free afterwards: stock leaves a clone's patches on the model
    until it loads another one.
    """
    sums = {name: Sum() for name in layers}
    try:
        sample(_watched(patcher, sums, progress))
        found = {name: one.take() for name, one in sums.items()}
    finally:
        for one in sums.values():
            one.drop()
    return {name: moments for name, moments in found.items() if moments}


def _watched(patcher, sums: dict[str, Sum], progress: _Progress):
    """A clone of a ModelPatcher whose layers note what they are given."""
    clone = patcher.clone()
    for name, one in sums.items():
        key = f"{PREFIX}{name}.forward"
        module = comfy.utils.get_attr(clone.model, PREFIX + name)
        forward = clone.object_patches.get(key, MethodType(type(module).forward, module))
        clone.add_object_patch(key, _noting(forward, one, progress))

    def report(executor, noise, latent, sampler, sigmas, mask, callback, *args, **options):
        # In place of KSampler's own callback, whose bar begins anew with every run.
        return executor(noise, latent, sampler, sigmas, mask, progress.step, *args, **options)

    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "mxfp8_calibrate", report)
    return clone


def _noting(forward, found: Sum, progress: _Progress):
    def note(x: torch.Tensor, *args, **options):
        if not found.closed:
            progress.layer()
            found.add(x)
        return forward(x, *args, **options)

    return note


def _in_file(found: dict[str, Moments]) -> dict[str, StoredMoments]:
    """Moments in a file of ComfyUI's temp folder, which goes when the last of them goes."""
    if not found:
        return {}
    path = files.temporary_path()
    Calibration(found, "").save(path)
    layers = dict(calibration.load(path).layers)
    files.delete_with(next(iter(layers.values())).source, path)  # one source for all
    return layers


def _result(layers, sizes: dict[str, int], progress: _Progress) -> str:
    rows = min(moments.rows for moments in layers.values())
    took = duration(progress.seconds)
    lines = [progress.plan, f"{len(layers)} layers, {rows} rows at least, in {took}"]
    silent = [name for name in sizes if name not in layers]
    if silent:
        named = ", ".join(quoted(name) for name in silent[:_MOST_NAMED])
        more = f" and {len(silent) - _MOST_NAMED} more" if len(silent) > _MOST_NAMED else ""
        lines.append(
            f"{len(silent)} layers were given nothing finite and will be rounded to nearest: "
            f"{named}{more}"
        )
        logger.warning("MXFP8: %s", lines[-1])
    return "\n".join(lines)


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
