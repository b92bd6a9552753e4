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

from ..quant.container.header import quoted
from ..quant.conversion import calibration
from ..quant.conversion.calibration import Calibration, HessianAccumulator, Moments, StoredMoments
from ..quant.conversion.convert import plan_source
from ..quant.conversion.policy import Selection
from ..quant.format import WEIGHT
from ..quant.memory import is_out_of_memory
from ..quant.progress import duration
from ..quant.reports.conversion import gigabytes
from ..quant.sources.unsupported import check_unquantized
from .host import paths
from .host.progress import show
from .loading import CATEGORY
from .models.source import PREFIX, ModelSource
from .runtime.patch import check_movable
from .widgets import selection_inputs

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
        check_movable(model)  # what Quantize Model (MXFP8) would refuse after hours of this
        source = ModelSource(model)
        if source.quantized:
            raise ValueError(
                f"this {source.name} is quantized already; calibrate the BF16, FP16 or FP32 "
                "original"
            )
        check_unquantized(source)
        plan = plan_source(source, Selection(preset, include, exclude), is_linear=source.is_linear)
        widths = {d.layer: d.shape[1] for d in plan.quantized}
        groups = list(_groups(widths, int(memory_gb * _GB)))
        _check_disk(source.name, groups)
        progress = _Progress(cls, _announce(groups, seeds, steps), len(groups) * seeds, steps)

        def sample(watched) -> None:
            for number in range(seeds):
                seed = (first_seed + number) % 2**64
                comfy_nodes.common_ksampler(
                    watched, seed, steps, cfg, sampler_name, scheduler, positive, negative,
                    latent_image, denoise=denoise,
                )  # fmt: skip
                progress.finish_run()

        layers, sums = _gather_all(model, groups, sample, progress)
        if not layers:
            raise ValueError(
                f"calibration is empty: no layer of this {source.name} was run"
                + " on finite values with finite squares" * bool(groups)
            )
        mark = calibration.fingerprint(
            (n, source.tensors[n + WEIGHT][1], source.rows(n + WEIGHT, 0, 1)[0]) for n in layers
        )
        about = {
            "first_seed": first_seed, "seeds": seeds, "steps": steps, "cfg": cfg,
            "sampler": sampler_name, "scheduler": scheduler, "denoise": denoise,
            "preset": preset, "include": include, "exclude": exclude,
        }  # fmt: skip
        text = _result(layers, sums, progress)
        show(cls, text)
        return io.NodeOutput(Calibration(layers, mark, about), ui={"text": [text]})


def _groups(widths: dict[str, int], budget: int) -> Iterator[dict[str, int]]:
    """Layers whose moments fit the budget together, in model order; one always may.

    Args:
        widths: inputs of each layer, as the groups have them too.
    """
    group: dict[str, int] = {}
    for name, width in widths.items():
        if group and _nbytes(group) + calibration.nbytes(width) > budget:
            yield group
            group = {}
        group[name] = width
    if group:
        yield group


def _nbytes(*groups: dict[str, int]) -> int:
    return sum(calibration.nbytes(width) for group in groups for width in group.values())


def _check_disk(model: str, groups: list[dict[str, int]]) -> None:
    """Raise ValueError where the temp folder has no room for the groups' files."""
    needed = _nbytes(*groups)
    free = shutil.disk_usage(paths.temporary_path().parent).free
    if len(groups) > 1 and needed > free:
        raise ValueError(
            f"calibrating this {model} in {len(groups)} groups takes {gigabytes(needed)} in "
            f"ComfyUI's temp folder, which has {gigabytes(free)} free; make room there, raise "
            "memory_gb, or exclude layers"
        )


def _announce(groups: list[dict[str, int]], seeds: int, steps: int) -> str:
    layers, total = _counted(sum(map(len, groups)), "layer"), gigabytes(_nbytes(*groups))
    runs = f"{_counted(len(groups) * seeds, 'run')} of {_counted(steps, 'step')}"
    return f"{layers}, {total} in {_counted(len(groups), 'group')}: {runs}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


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
    patcher, groups: list[dict[str, int]], sample, progress: _Progress
) -> tuple[dict[str, Moments | StoredMoments], dict[str, HessianAccumulator]]:
    """Moments of all groups, by layer, and the sums that they were taken from.

    Raises:
        MemoryError: it did not suffice; what was gathered is free again, and so is the model.
    """
    layers: dict[str, Moments | StoredMoments] = {}
    sums = {name: HessianAccumulator() for group in groups for name in group}
    try:
        for group in groups:
            found = _gather(patcher, group, {n: sums[n] for n in group}, sample, progress)
            layers |= _in_file(found) if len(groups) > 1 else found
        return layers, sums
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


def _gather(
    patcher,
    widths: dict[str, int],
    sums: dict[str, HessianAccumulator],
    sample,
    progress: _Progress,
) -> dict[str, Moments]:
    """Moments of these layers while `sample` runs a clone of the model.

    Their memory is taken before: stock then loads as much of the model as the rest has room for,
    and would else fill it all. Whatever happens, it is free afterwards: stock leaves a clone's
    patches on the model until it loads another one.
    """
    try:
        comfy.model_management.free_memory(_nbytes(widths), patcher.load_device)
        for name, width in widths.items():
            sums[name].reserve(width, patcher.load_device)
        sample(_watched(patcher, sums, progress))
        found = {name: one.take() for name, one in sums.items()}
    finally:
        for one in sums.values():
            one.drop()
    return {name: moments for name, moments in found.items() if moments}


def _watched(patcher, sums: dict[str, HessianAccumulator], progress: _Progress):
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


def _noting(forward, found: HessianAccumulator, progress: _Progress):
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
    path = paths.temporary_path()
    Calibration(found, "").save(path, progress=_check_interrupt)
    layers = dict(calibration.load(path, _check_interrupt).layers)
    paths.delete_with(next(iter(layers.values())).source, path)  # one source for all
    return layers


def _check_interrupt(*_) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def _result(layers, sums: dict[str, HessianAccumulator], progress: _Progress) -> str:
    rows = min(moments.rows for moments in layers.values())
    took = duration(progress.seconds)
    lines = [progress.plan, f"{_counted(len(layers), 'layer')}, {rows} rows at least, in {took}"]
    lost: dict[str, list[str]] = {}  # by what they were given
    for name, one in sums.items():
        if name not in layers:
            lost.setdefault(one.given, []).append(quoted(name))
    faults = [
        f"{_counted(len(found), 'layer')} given {given}, to be rounded to nearest: {_some(found)}"
        for given, found in lost.items()
    ]
    partly = [f"{quoted(n)} ({sums[n].dropped})" for n in layers if sums[n].dropped]
    if partly:
        faults.append(
            f"{_counted(len(partly), 'layer')} given rows with NaN or Inf, which do not count: "
            f"{_some(partly)}"
        )
    for fault in faults:
        logger.warning("MXFP8: %s", fault)
    return "\n".join(lines + faults)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
