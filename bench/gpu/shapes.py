"""The shapes that the benchmark measures, and random matrices of those shapes."""

from __future__ import annotations

from collections.abc import Iterable
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
TOKENS = 4096


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Attributes:
        items: (section, its argument), the most telling first: of "linears" (M, N, K), of "casts"
            (N, K), of "loras" (M, N, K), of "blocks" the model.
        shapes: (N, K) of the checks of casts.
        tokens: image tokens of a block.
        shrink: a divisor of the widths of blocks.
    """

    items: tuple[tuple[str, object], ...]
    shapes: tuple[tuple[int, int], ...]
    tokens: int = TOKENS
    shrink: int = 1


def plan(quick: bool) -> Plan:
    """The whole plan, or with `quick` sizes that a CPU computes in a second, to try the script."""
    if quick:
        problems = ((128, 96, 256), (1, 96, 256), (16, 96, 256), (130, 160, 96))
        items = [
            *_each("linears", problems), ("host", None), ("blocks", "Z-Image"),
            ("casts", (96, 256)), ("loras", (48, 96, 256)), ("check", None), ("blocks", "Flux"),
        ]  # fmt: skip
        return Plan(tuple(items), ((256, 192), (96, 256)), 48, 16)
    few = ((1, ONE_ROW), (1, LARGE[0]), (16, LARGE[0]), (64, LARGE[0]))
    items = [
        *_each("linears", ((TOKENS, *shape) for shape in MODELS["Z-Image"])),
        ("host", None),
        *_each("linears", ((M, *shape) for M, shape in few)),
        ("blocks", "Z-Image"),
        *_each("casts", LARGE),
        *_each("linears", ((1024, *shape) for shape in SOME)),
        ("loras", (TOKENS, *LARGE[0])),
        ("check", None),
        ("blocks", "Flux"),
        *_each("linears", ((M, *shape) for M in (TOKENS, 1024, 2048) for shape in SHAPES)),
        *_each("loras", ((TOKENS, *shape) for shape in SOME)),
        *_each("casts", SHAPES),
        *_each("linears", ((M, *shape) for M in (1, 4, 16, 64, 256, 8192) for shape in SOME)),
    ]
    return Plan(tuple(dict.fromkeys(items)), SHAPES)


def _each(section: str, arguments: Iterable[tuple]) -> list[tuple[str, tuple]]:
    return [(section, argument) for argument in arguments]


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
