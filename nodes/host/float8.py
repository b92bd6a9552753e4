"""Devices that hold no float8, which is what MXFP8 weights are stored in."""

from __future__ import annotations

import torch

from ...kernels import has_float8


def check_float8(device: torch.device, name: str) -> None:
    """Refuse MXFP8 weights where they would be loaded, before torch fails on the first of them.

    Args:
        device: that the model computes on.
        name: of the model, to begin a sentence with.

    Raises:
        ValueError: the device has no float8.
    """
    if not has_float8(device):
        raise ValueError(
            f"{name} would be on the device {device} in MXFP8, and PyTorch has no float8 there "
            "(Apple GPUs); start ComfyUI with --cpu, or use the BF16 or FP16 original"
        )
