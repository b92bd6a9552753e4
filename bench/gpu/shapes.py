"""The shapes that the benchmark measures, and random matrices of those shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MODELS = {  # (N, K) of the linears inside the blocks
    "Z-Image": ((11520, 3840), (3840, 3840), (10240, 3840), (3840, 10240)),
    "Flux": (
        (9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360),
    ),
    "Wan": ((5120, 5120), (13824, 5120), (5120, 13824)),
}  # fmt: skip
SHAPES = tuple(shape for shapes in MODELS.values() for shape in shapes)
LARGE = (10240, 3840), (13824, 5120)  # of the goals for casts
ONE_ROW = (5120, 5120)  # of the goal for M = 1
SOME = (10240, 3840), (3072, 3072), (5120, 5120), (3072, 15360)
EVERY_M = (4096, 1024, 2048)  # at which all of SHAPES are measured, and at SOME_M only SOME
SOME_M = (1, 4, 16, 64, 256, 8192, 16384)


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Attributes:
        problems: (M, N, K) of linears, the most important first.
        shapes: (N, K) of the casts.
        lora_shapes: (N, K) of linears with a LoRA, whose M is `tokens`.
        tokens: image tokens of a block.
        shrink: a divisor of the widths of blocks.
    """

    problems: tuple[tuple[int, int, int], ...]
    shapes: tuple[tuple[int, int], ...]
    lora_shapes: tuple[tuple[int, int], ...]
    tokens: int
    shrink: int = 1


def plan(quick: bool) -> Plan:
    """The whole plan, or with `quick` sizes that a CPU computes in a second, to try the script."""
    if quick:
        problems = ((1, 96, 256), (16, 96, 256), (128, 96, 256), (130, 160, 96))
        return Plan(problems, ((256, 192), (96, 256)), ((96, 256),), 48, 16)
    problems = [(m, *shape) for m in EVERY_M for shape in SHAPES]
    problems += [(m, *shape) for m in SOME_M for shape in SOME]
    return Plan(tuple(problems), SHAPES, SOME, 4096)


def numbers(device, *size: int, seed: int = 0, scale: float = 1.0, dtype=torch.bfloat16):
    """Normally distributed values."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(size, generator=generator, device=device).mul_(scale).to(dtype)


def weight(device, rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """A BF16 weight [rows, cols] whose output has about the magnitude of its input."""
    return numbers(device, rows, cols, seed=seed, scale=cols**-0.5)


def sets_beyond(cache: int, nbytes: int) -> int:
    """How many sets of inputs of this size to rotate through so that none is still cached."""
    return max(2, min(32, -(-3 * cache // max(nbytes, 1))))
