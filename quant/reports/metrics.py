"""The metrics of a comparison: how much two latents or two images differ.

Sums are taken in float64 on the CPU, so that no number depends on the device that sampled. PSNR and
SSIM (Gaussian window of 11 pixels) are kornia's, which ComfyUI brings; importing it takes seconds,
so that waits until there are images.
"""

from __future__ import annotations

import math

import torch

from .conversion import sqnr_db

_WINDOW = 11  # pixels of SSIM's window
_BLACK = 1 / 255  # below this largest value an 8-bit image is black


def flat(tensor) -> torch.Tensor:
    """A latent as one row of float32 on the CPU; a nested one (video, sound) is joined."""
    parts = tensor.unbind() if getattr(tensor, "is_nested", False) else [tensor]
    return torch.cat([part.detach().to("cpu", torch.float32).reshape(-1) for part in parts])


def snr_db(reference: torch.Tensor, other: torch.Tensor) -> float | None:
    """10 log10(sum r^2 / sum (o - r)^2); None if identical, not finite, or of a zero reference.

    Args:
        reference, other: of one shape.
    """
    reference, other = reference.double(), other.double()
    signal = float(reference.square().sum())
    noise = float((other - reference).square().sum())
    if not (math.isfinite(signal) and math.isfinite(noise)) or signal == 0:
        return None
    return sqnr_db(signal, noise)


def relative(reference: torch.Tensor, other: torch.Tensor) -> float:
    """|o - r| / |r|; NaN or Inf if a value is not finite or the reference is zero."""
    reference, other = reference.double(), other.double()
    error, size = float((other - reference).norm()), float(reference.norm())
    return error / size if size else (0.0 if error == 0 else math.inf)


def latent_problem(values: torch.Tensor) -> str | None:
    """What is wrong with a latent, in words, or None."""
    for name, mask in (("NaN", values.isnan()), ("Inf", values.isinf())):
        count = int(mask.sum())
        if count:
            return f"its latent holds {name} ({count} of {values.numel()} values)"
    return "its latent is all zero" if not values.any() else None


def image_problem(image: torch.Tensor) -> str | None:
    """What is wrong with an image in 0..1, in words, or None."""
    if not image.isfinite().all():
        return "its image holds NaN or Inf"
    return "its image is black" if image.max() < _BLACK else None


def quality(reference: torch.Tensor, other: torch.Tensor) -> tuple[float | None, float]:
    """(PSNR in dB, SSIM) of images.

    Args:
        reference, other: [B, H, W, C] in 0..1, finite.

    Returns:
        PSNR over all of them together, None if they are identical; the mean SSIM.

    Raises:
        ImportError: kornia is not installed.
        ValueError: the images are smaller than SSIM's window.
    """
    from kornia.metrics import psnr, ssim

    if min(reference.shape[1:3]) < _WINDOW:
        raise ValueError(f"images of {list(reference.shape)} are smaller than SSIM's window")
    ours, theirs = (image.cpu().float().movedim(-1, 1) for image in (other, reference))
    similar = [
        float(ssim(a[None], b[None], _WINDOW).double().mean())  # one at a time: a video is long
        for a, b in zip(ours, theirs, strict=True)
    ]
    ratio = None if torch.equal(ours, theirs) else float(psnr(ours.double(), theirs.double(), 1.0))
    return ratio, sum(similar) / len(similar)
