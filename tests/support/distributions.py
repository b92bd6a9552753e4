"""Random matrices for tests, from a seed."""

from __future__ import annotations

import torch


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy(*shape, seed=0):
    """Student's t with 3 degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)
    squares = torch.randn(3, *shape, generator=generator).square().mean(0)
    return torch.randn(shape, generator=generator) / squares.sqrt()
