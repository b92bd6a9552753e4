"""How much memory sampling takes beside the weights, as ComfyUI 0.30 estimates it.

ComfyUI loads a model with as much memory left as `BaseModel.memory_required` says
(comfy/model_base.py): latent pixels x 2 bytes x 0.01 MiB x the model's `memory_usage_factor`, which
holds with torch's or xformers' attention, and for one sample at a time, as it samples when memory
is short. It keeps at least 0.8 GiB, and 400 MiB for others, up to 700 on Windows
(comfy/model_management.py). This is its guess, not a measurement; the extra latents of editing and
control models are not in it. A test compares every row with ComfyUI's classes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from ..format import PREFIXES

_MIB = 1 << 20
LEAST = int(0.8 * (1 << 30))
RESERVED = (700 if os.name == "nt" else 400) * _MIB
_FRAME = 832, 480  # pixels that frames of a video are counted for
_LARGEST = 4096  # pixels; larger pictures are not promised


@dataclass(frozen=True)
class Activations:
    """How ComfyUI's guess grows with the size of what is sampled.

    Attributes:
        kind: ComfyUI's class.
        factor: its `memory_usage_factor`; per unit of width, where `width` is given.
        pixels: pixels along a side of a latent pixel.
        frames: frames of a latent frame of a video, or None for pictures.
        width: a tensor and the axis whose size the factor is multiplied by.
    """

    kind: str
    factor: float
    pixels: int
    frames: int | None = None
    width: tuple[str, int] | None = None

    def factor_of(self, shapes: Mapping[str, tuple[int, ...]]) -> float | None:
        """The factor for a model of these tensors, or None if its width cannot be told."""
        if self.width is None:
            return self.factor
        name, axis = self.width
        shape = next((shapes[p + name] for p in PREFIXES if p + name in shapes), None)
        return self.factor * shape[axis] if shape and axis < len(shape) else None


# By the names of `conversion.architectures`, where one formula holds for all models of that name.
ACTIVATIONS = {
    "Z-Image": Activations("ZImage", 2.8, 8),
    "Flux.1": Activations("Flux", 3.1, 8),
    "Flux.2": Activations("Flux2", 3.1 * 4 / 2604, 16, width=("img_in.weight", 0)),
    "Chroma": Activations("Chroma", 3.2, 8),
    "Qwen-Image": Activations("QwenImage", 1.8, 8),
    "Wan": Activations("WAN21_T2V", 1 / 2222, 8, 4, width=("head.modulation", 2)),
    "Stable Diffusion 3": Activations("SD3", 1.6, 8),
    "HiDream-I1": Activations("HiDream", 2.0, 8),
    "Lumina 2": Activations("Lumina2", 1.4, 8),
    "OmniGen2": Activations("Omnigen2", 1.95, 8),
    "AuraFlow": Activations("AuraFlow", 2.0, 8),
}


def per_latent_pixel(factor: float) -> float:
    """Bytes for each pixel of a latent, in a 16-bit dtype."""
    return 2 * 0.01 * factor * _MIB


def largest(activations: Activations, factor: float, room: int) -> str | None:
    """The largest picture or longest video that fits into so many bytes, in words, or None."""
    area = int(max(room, 0) / per_latent_pixel(factor))
    if activations.frames is None:
        side = int(math.sqrt(area)) * activations.pixels // 64 * 64
        if side >= _LARGEST:
            return f"{_LARGEST} x {_LARGEST} and more"
        return f"{side} x {side}" if side >= 64 else None
    per_frame = math.prod(size // activations.pixels for size in _FRAME)
    frames = (area // per_frame - 1) * activations.frames + 1
    return f"{frames} frames of {_FRAME[0]} x {_FRAME[1]}" if frames >= 1 else None
