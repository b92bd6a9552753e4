"""Sampling a model as KSampler does, on several seeds."""

from __future__ import annotations

from dataclasses import dataclass

import nodes as comfy_nodes


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
