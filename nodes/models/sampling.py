"""Sampling a model as KSampler does, on several seeds, and hooks on its layers meanwhile."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType

import comfy.utils
import nodes as comfy_nodes
import torch
from comfy.patcher_extension import WrappersMP

from ..runtime.cache import patch_forward
from ..runtime.patch import PREFIX


@dataclass(frozen=True)
class SamplerSettings:
    """What KSampler is given apart from the model; fields are inputs of nodes."""

    positive: list
    negative: list
    latent_image: dict
    first_seed: int  # an input called "seed" would get a control for random seeds
    seeds: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float

    @property
    def each_seed(self) -> list[int]:
        return [(self.first_seed + number) % 2**64 for number in range(self.seeds)]

    def sample(self, patcher, seed: int):
        """The latent of a seed, as KSampler samples it."""
        (latent,) = comfy_nodes.common_ksampler(
            patcher, seed, self.steps, self.cfg, self.sampler_name, self.scheduler, self.positive,
            self.negative, self.latent_image, denoise=self.denoise,
        )  # fmt: skip
        return latent["samples"]

    def digest(self, patcher) -> str:
        """A hash of the prompts, of the latent image, and of what a MODEL has beside its weights.

        That is its shift and prediction type, and the names of what patches it; of patches that are
        functions, also the numbers that they were made with.
        """
        noise = patcher.get_model_object("model_sampling")
        kinds = [kind.__name__ for kind in type(noise).__mro__]
        found = hashlib.sha256()
        _add(found, [self.positive, self.negative, self.latent_image])
        _add(found, [kinds, dict(noise.state_dict()), vars(noise)])
        _add(found, [patcher.model_options, patcher.object_patches])
        return found.hexdigest()[:16]


def _add(found, value) -> None:
    """Add a value to a hash, with the tensors in it; of other objects, what they are."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        found.update(value.flatten().view(torch.uint8).numpy())
    elif isinstance(value, dict):
        for key, part in value.items():
            _add(found, str(key))
            _add(found, part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _add(found, part)
    else:
        name = getattr(value, "__qualname__", type(value).__name__)
        found.update(f"{name}:{value if _is_plain(value) else ''};".encode())
        cells = getattr(value, "__closure__", None) or ()
        _add(found, [cell.cell_contents for cell in cells if _is_plain(cell.cell_contents)])


def _is_plain(value) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))


def wrap_layers(patcher, layers: Iterable[str], wrap: Callable[..., Callable], on_step: Callable):
    """A clone of a ModelPatcher whose layers run other forwards while it is sampled.

    Args:
        layers: names without the prefix of a diffusion model.
        wrap: (name, module, forward) -> the forward to run; `forward` is what the layer runs now.
        on_step: called after each step as samplers call it, in place of KSampler's own callback,
            whose bar would start over with every run.
    """
    clone = patcher.clone()
    for name in layers:
        full = PREFIX + name
        module = comfy.utils.get_attr(clone.model, full)
        own = MethodType(type(module).forward, module)
        forward = clone.object_patches.get(f"{full}.forward", own)
        patch_forward(clone, full, module, wrap(name, module, forward))

    def sample(executor, noise, latent, sampler, sigmas, mask, callback, *args, **options):
        return executor(noise, latent, sampler, sigmas, mask, on_step, *args, **options)

    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "mxfp8_calibrate", sample)
    return clone
