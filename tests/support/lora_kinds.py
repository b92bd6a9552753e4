"""LoRA files of every kind that ComfyUI loads, for the weights of a small model.

Keys are those of a diffusion model: `diffusion_model.<layer>.<part>`. The deltas here are written
from the formulas of ComfyUI's adapters, so a test can ask for a LoRA of a given size.
"""

from __future__ import annotations

import math

import torch

# Kinds that replace the weight, or turn or scale its rows or columns: their order counts.
ORDERED = ("dora_rows", "dora_columns", "glora", "oft", "boft", "set")
ADDITIVE = ("lora", "lora_alpha_mid", "lokr", "lokr_decomposed", "loha", "diff", "diff_b")
KINDS = ADDITIVE + ORDERED


def linears(state: dict) -> dict:
    """The weights of linear layers."""
    return {key: value for key, value in state.items() if value.ndim == 2 and "bias" not in key}


def lora_file(
    state: dict[str, torch.Tensor],
    kind: str,
    norm: float | None = None,
    rank: int = 4,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """A LoRA file (float32) of one kind for the 2-D weights of `state`; other tensors get nothing.

    `norm` is what the LoRA adds at strength 1, relative to the weight (Frobenius); for `diff_b`,
    relative to the layer's output for inputs of variance 1. Without it factors stay as drawn.
    """
    file = {}
    for index, (key, weight) in enumerate(state.items()):
        if weight.ndim != 2 or not key.endswith(".weight"):
            continue
        layer = key.removesuffix(".weight").removeprefix("model.").removeprefix("diffusion_model.")
        weight = weight.detach().float().cpu()
        draw = _Draw(weight, rank, 1009 * seed + index)
        size = 1.0
        parts, delta = getattr(draw, kind)(size)
        if norm is not None:
            wanted = norm * float(weight.norm())
            for _ in range(12):  # one is enough for kinds that are linear in their size
                if abs(float(delta.norm()) - wanted) <= 1e-6 * wanted:
                    break
                size *= wanted / max(float(delta.norm()), 1e-30)
                parts, delta = getattr(draw, kind)(size)
        for name, part in parts.items():
            file[f"diffusion_model.{layer}.{name}"] = part.contiguous()
    return file


def _divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)


class _Draw:
    """Each method: (parts of the file, what they add to the weight), of about `size`."""

    def __init__(self, weight: torch.Tensor, rank: int, seed: int):
        self.weight, self.rank, self.seed = weight, rank, seed
        self.unit = float(weight.norm()) / math.sqrt(weight.numel()) or 1.0

    def _normal(self, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.randn(shape, generator=generator) for shape in shapes]

    def lora(self, size):
        n, k = self.weight.shape
        up, down = self._normal((n, self.rank), (self.rank, k))
        up = up * (size * self.unit)
        return {"lora_up.weight": up, "lora_down.weight": down}, up @ down

    def lora_alpha_mid(self, size):
        n, k = self.weight.shape
        up, down, mid = self._normal((n, self.rank), (self.rank, k), (self.rank, self.rank, 1, 1))
        up = up * (size * self.unit)
        parts = {
            "lora_up.weight": up,
            "lora_down.weight": down,
            "lora_mid.weight": mid,
            "alpha": torch.tensor(self.rank / 2),
        }
        return parts, 0.5 * up @ mid[:, :, 0, 0] @ down

    def lokr(self, size):
        n, k = self.weight.shape
        a, b = _divisor(n, 2 * self.rank), _divisor(k, 2 * self.rank)
        w1, w2 = self._normal((a, b), (n // a, k // b))
        w1 = w1 * (size * self.unit)
        return {"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1, w2)

    def lokr_decomposed(self, size):
        n, k = self.weight.shape
        a, b = _divisor(n, 2 * self.rank), _divisor(k, 2 * self.rank)
        w1, up, down = self._normal((a, b), (n // a, self.rank), (self.rank, k // b))
        w1 = w1 * (size * self.unit)
        parts = {
            "lokr_w1": w1,
            "lokr_w2_a": up,
            "lokr_w2_b": down,
            "alpha": torch.tensor(self.rank / 2),
        }
        return parts, 0.5 * torch.kron(w1, up @ down)

    def loha(self, size):
        n, k = self.weight.shape
        shapes = (n, self.rank), (self.rank, k), (n, self.rank), (self.rank, k)
        up1, down1, up2, down2 = self._normal(*shapes)
        up1 = up1 * (size * self.unit)
        parts = {
            "hada_w1_a": up1,
            "hada_w1_b": down1,
            "hada_w2_a": up2,
            "hada_w2_b": down2,
            "alpha": torch.tensor(self.rank / 2),
        }
        return parts, 0.5 * (up1 @ down1) * (up2 @ down2)

    def dora_rows(self, size):
        parts, delta = self.lora(size)
        (noise,) = self._normal((self.weight.shape[0], 1))
        scale = self.weight.norm(dim=1, keepdim=True) * (0.5 * min(size, 1.0) * noise).exp()
        parts["dora_scale"] = scale
        grown = scale / (self.weight.norm(dim=1, keepdim=True) + torch.finfo(torch.float32).eps)
        return parts, (self.weight + delta) * grown - self.weight

    def dora_columns(self, size):
        parts, delta = self.lora(size)
        (noise,) = self._normal((1, self.weight.shape[1]))
        norms = (self.weight + delta).norm(dim=0, keepdim=True)
        scale = norms * (0.5 * min(size, 1.0) * noise).exp()
        parts["dora_scale"] = scale
        grown = scale / (norms + torch.finfo(torch.float32).eps)
        return parts, (self.weight + delta) * grown - self.weight

    def glora(self, size):
        n, k = self.weight.shape
        r = self.rank
        a1, a2, b1, b2 = self._normal((k, r), (r, k), (n, r), (r, k))
        a1 = a1 * (size / k)
        b1 = b1 * (size * self.unit)
        parts = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2}
        return parts, self.weight @ a1 @ a2 + b1 @ b2

    def oft(self, size):
        n = self.weight.shape[0]
        block = _divisor(n, 4 * self.rank)
        (blocks,) = self._normal((n // block, block, block))
        blocks = blocks * (size / block)
        turned = self.weight.view(n // block, block, -1)
        turned = torch.einsum("knm,kn...->km...", _cayley(blocks), turned).reshape(n, -1)
        return {"oft_blocks": blocks}, turned - self.weight

    def boft(self, size):
        n = self.weight.shape[0]
        block = 2 * _divisor(n // 2, max(1, self.rank // 2)) if n % 2 == 0 else 0
        if not block:
            raise ValueError(f"BOFT turns pairs of rows: a weight of {n} rows has none left over")
        stages = 2 if n % (2 * block) == 0 else 1
        blocks, noise = self._normal((stages, n // block, block, block), (n, 1))
        blocks = blocks * (size / block)
        rescale = (0.2 * min(size, 1.0) * noise).exp()
        turned = self.weight
        for stage, rotations in enumerate(_cayley(blocks)):
            stride = 2**stage * block // 2
            turned = turned.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2)
            turned = turned.unflatten(0, (-1, block))
            turned = torch.einsum("bij,bj...->bi...", rotations, turned).flatten(0, 1)
            turned = turned.unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
        parts = {"oft_blocks": blocks, "rescale": rescale, "alpha": torch.tensor(0.0)}
        return parts, turned * rescale - self.weight

    def diff(self, size):
        (delta,) = self._normal(tuple(self.weight.shape))
        delta = delta * (size * self.unit)
        return {"diff": delta}, delta

    def diff_b(self, size):
        n, k = self.weight.shape
        (delta,) = self._normal((n,))
        delta = delta * (size * self.unit * math.sqrt(k))
        return {"diff_b": delta}, delta

    def set(self, size):
        (delta,) = self._normal(tuple(self.weight.shape))
        delta = delta * (size * self.unit)
        return {"set_weight": self.weight + delta}, delta


def _cayley(blocks: torch.Tensor) -> torch.Tensor:
    skew = blocks - blocks.transpose(-1, -2)
    eye = torch.eye(blocks.shape[-1])
    return (eye + skew) @ (eye - skew).inverse()
