"""Probe runs of a MODEL: sampled as for its calibration, with the layers' weights perturbed.

`quant.budget.probing` says which layers are perturbed how, and what follows from the outputs. Here
a run is one seed, and its output the final latent.

A perturbed weight is made when its layer runs, from what ComfyUI hands that layer: on the compute
device, offloaded or not, with LoRAs. For this the layer has one more weight function, which stock
applies after its own, for the length of its forward. So the model's weights stay as they are, and a
run takes the memory of one layer's weight more. Rejected: weight patches (`add_patches`), which are
merged into the whole model, with a backup of it, before every run.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from ...quant.budget.probing import needed_runs, perturbed_weight, probe
from ...quant.budget.sensitivity import Sensitivity
from ..host import paths
from ..host.progress import check_interrupt
from .sampling import SamplerSettings, wrap_layers

_SAMPLES = 2  # seeds: with as many runs in all, more seeds tell layers apart less well
_AT_ONCE = 1 << 22  # weights that are perturbed at a time: 16 MB in float32
_FUNCTIONS = "weight_function"  # where ComfyUI's layers have them


def planned_runs(layers: int, seeds: int) -> tuple[int, int]:
    """(seeds to probe, probe runs of each); each seed takes one more run, unperturbed."""
    samples = min(seeds, _SAMPLES)
    return samples, math.ceil(needed_runs(layers) / samples)


def probe_model(
    patcher,
    layers: Mapping[str, int],
    settings: SamplerSettings,
    *,
    about: Mapping[str, object],
    model: str,
    on_layer: Callable,
    on_step: Callable,
    on_run: Callable[[int, int], None],
) -> Sensitivity:
    """Measure how sensitive the final latent is to the rounding of each layer.

    What an interrupted call had measured is kept in output/calibrations, and the same call goes on
    from there.

    Args:
        patcher: the MODEL, which is left as it was.
        layers: name without prefix -> number of weights.
        about: how the model is sampled, as JSON types.
        model: the fingerprint of its weights.
        on_layer: called before each of these layers runs.
        on_step: called after each step as samplers call it.
        on_run: (runs done, all runs) before each run.

    Raises:
        ValueError: as `probe`.
    """
    signs: dict[str, int] = {}  # of the present run

    def wrap(name: str, module, forward) -> Callable:
        def run(x: torch.Tensor, *args, **options):
            check_interrupt()
            on_layer()
            if name not in signs:
                return forward(x, *args, **options)
            with _weight_function(module, partial(_perturb, sign=signs[name])):
                return forward(x, *args, **options)

        return run

    clone = wrap_layers(patcher, layers, wrap, on_step)

    def run(sample: int, given: Mapping[str, int]):
        signs.clear()
        signs.update(given)
        return settings.sample(clone, settings.each_seed[sample])

    samples, runs = planned_runs(len(layers), settings.seeds)
    about = {**about, "inputs": settings.digest(patcher)}
    with _journal(model, about, layers) as journal:
        return probe(
            layers, run, samples, runs, about=about, model=model, journal=journal, on_run=on_run
        )


@contextlib.contextmanager
def _journal(model: str, about: Mapping, layers: Mapping[str, int]) -> Iterator[Path]:
    """The file that keeps these runs until all are done; other runs have another."""
    what = hashlib.sha256(repr((model, sorted(about.items()), list(layers))).encode()).hexdigest()
    folder = paths.unfinished_folder()
    try:
        yield folder / f"{what[:16]}.safetensors"
    finally:
        with contextlib.suppress(OSError):  # runs are in it
            folder.rmdir()


@contextlib.contextmanager
def _weight_function(module, function: Callable) -> Iterator[None]:
    """One more weight function on a layer, after those that it has."""
    own = vars(module).get(_FUNCTIONS)
    setattr(module, _FUNCTIONS, [*getattr(module, _FUNCTIONS), function])
    try:
        yield
    finally:
        if own is None:
            delattr(module, _FUNCTIONS)
        else:
            setattr(module, _FUNCTIONS, own)


def _perturb(weight: torch.Tensor, sign: int) -> torch.Tensor:
    """A weight [N, K] with its rounding error added or subtracted, in its own dtype.

    Some rows at a time: blocks lie along K, so rows are rounded alone.
    """
    result = torch.empty_like(weight)
    rows = max(1, _AT_ONCE // weight.shape[1])
    for part, into in zip(weight.split(rows), result.split(rows), strict=True):
        into.copy_(perturbed_weight(part, sign))
    return result
