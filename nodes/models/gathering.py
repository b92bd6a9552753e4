"""Moments of the inputs of a model's layers, gathered while a sampler runs it.

`quant.conversion.gptq` rounds weights by them. The moments of all layers together are larger than
the model. Layers are watched in groups that fit the given memory, each in runs of its own. Where
that takes several groups, each goes into a file in ComfyUI's temp folder before the next, so what a
calibration needs does not grow with the model. Rejected: all layers in memory (22 GB for Z-Image),
and adding up in a file, which every layer of every step would have to read and write.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator

import torch

from ...kernels.memory import is_out_of_memory
from ...quant.conversion import calibration
from ...quant.conversion.calibration import Calibration, HessianAccumulator, Moments, StoredMoments
from ...quant.reports.units import format_size
from ...quant.sources.file import FileSource
from ..host import paths, unloading
from ..host.progress import check_interrupt
from .sampling import wrap_layers

logger = logging.getLogger(__name__)

Group = dict[str, int]  # layer -> its number of inputs, K


def make_groups(widths: Group, budget: int) -> Iterator[Group]:
    """Layers whose moments fit the budget together, in model order; at least one each."""
    group: Group = {}
    for name, width in widths.items():
        if group and nbytes(group) + calibration.nbytes(width) > budget:
            yield group
            group = {}
        group[name] = width
    if group:
        yield group


def nbytes(*groups: Group) -> int:
    """Bytes of the moments of all layers of some groups."""
    return sum(calibration.nbytes(width) for group in groups for width in group.values())


def check_disk(model: str, groups: list[Group]) -> None:
    """Check that the groups' files fit the temp folder.

    Raises:
        ValueError: they do not.
    """
    needed = nbytes(*groups)
    free = shutil.disk_usage(paths.temporary_folder()).free
    if len(groups) > 1 and needed > free:
        raise ValueError(
            f"calibrating this {model} in {len(groups)} groups takes {format_size(needed)} in "
            f"ComfyUI's temp folder, which has {format_size(free)} free; free space there, raise "
            "memory_gb, or exclude layers"
        )


def gather(
    patcher, groups: list[Group], sample: Callable, on_layer: Callable, on_step: Callable
) -> tuple[dict[str, Moments | StoredMoments], dict[str, HessianAccumulator]]:
    """Moments of all groups, by layer, and the accumulators that they come from.

    Args:
        sample: runs a clone of the model on all seeds.
        on_layer: called before each watched layer runs.
        on_step: called after each step as samplers call it, in place of KSampler's own callback,
            whose bar would start over with every run.

    Raises:
        MemoryError: out of memory; what was gathered is freed, and the model is unloaded.
    """
    layers: dict[str, Moments | StoredMoments] = {}
    accumulators = {name: HessianAccumulator() for group in groups for name in group}
    try:
        for group in groups:
            watched = {name: accumulators[name] for name in group}
            with _reserved(patcher, group, watched):
                sample(_watch(patcher, watched, on_layer, on_step))
                moments = {name: one.take() for name, one in watched.items()}
            moments = {name: taken for name, taken in moments.items() if taken}
            layers |= _store(moments) if len(groups) > 1 else moments
        return layers, accumulators
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("MXFP8: out of memory: %s", error)
    # Not inside the handler: the error keeps the frames in which it rose, with all their tensors.
    layers.clear()
    unloading.unload_all_models()
    raise MemoryError(
        f"out of memory while calibrating this {type(patcher.model).__name__}, which is unchanged; "
        "lower memory_gb, or use a smaller latent"
    )


@contextlib.contextmanager
def _reserved(patcher, group: Group, accumulators: dict[str, HessianAccumulator]) -> Iterator[None]:
    """The memory of some accumulators, reserved before the model is sampled.

    Stock then loads as much of the model as fits the rest, and would otherwise fill it all. It is
    always freed afterwards: stock leaves a clone's patches on the model until it loads another one.
    """
    try:
        unloading.free_memory(nbytes(group), patcher.load_device)
        for name, width in group.items():
            accumulators[name].reserve(width, patcher.load_device)
        yield
    finally:
        for accumulator in accumulators.values():
            accumulator.drop()


def _watch(patcher, accumulators: dict[str, HessianAccumulator], on_layer, on_step):
    """A clone of a ModelPatcher whose layers add their inputs to these accumulators."""
    return wrap_layers(
        patcher,
        accumulators,
        lambda name, _, forward: _watched(forward, accumulators[name], on_layer),
        on_step,
    )


def _watched(forward, accumulator: HessianAccumulator, on_layer):
    def run(x: torch.Tensor, *args, **options):
        if not accumulator.closed:
            on_layer()
            accumulator.add(x)
        return forward(x, *args, **options)

    return run


def _store(moments: dict[str, Moments]) -> dict[str, StoredMoments]:
    """Moments in a file in ComfyUI's temp folder, deleted with the last of them."""
    if not moments:
        return {}
    file = paths.TemporaryFile()
    Calibration(moments, "").save(file.path, progress=check_interrupt)
    file.hold()
    source = _TemporarySource(file)
    return {name: StoredMoments(source, name, one.rows) for name, one in moments.items()}


class _TemporarySource(FileSource):
    """A temporary file, which can be read even if it was deleted."""

    def __init__(self, file: paths.TemporaryFile):
        self._temporary = file
        super().__init__(file.path)
        self.close()

    def _open(self) -> None:
        self._file = self._temporary.reopen()
