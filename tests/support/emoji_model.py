"""bench/emoji: a trained model as ComfyUI loads it, gradients, and pictures there and back.

    python tests/support/emoji_model.py COMFYUI FILE

Prints JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from comfyui_modules import FOLDER

# isort: split
import comfy.sd
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench" / "emoji"))
import pictures
import train

LENGTH = 0.02  # of a step along the gradient


@torch.no_grad()
def difference(file: Path) -> float:
    """Relative, of what the loaded model and the trained class say, in float32."""
    patcher = comfy.sd.load_diffusion_model(str(file), model_options={"dtype": torch.float32})
    network = train.build(seed=1)
    network.load_state_dict({key: value.float() for key, value in load_file(file).items()})
    context, pooled = pictures.encode(pictures.NAMES[:4])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 16, 16, 16, generator=generator)
    time = torch.rand(4, generator=generator)
    wanted = network(x, time, context, pooled)
    # ComfyUI tells a denoised latent.
    found = patcher.model.apply_model(x, time, c_crossattn=context, y=pooled)
    found = (x - found) / time[:, None, None, None]
    return float((found - wanted).norm() / wanted.norm())


def slopes() -> dict[str, float]:
    """How far the loss falls along a gradient, over how far that gradient says: 1 if it is right.

    Of weights whose gradient comes through the rotary embedding, and of those before all blocks.
    """
    training = train.Training(seed=0, batch=8)
    training.bfloat16 = False
    weights = dict(training.network.named_parameters())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in weights.values():  # else blocks are identities
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.05)
    found = {}
    for part in ("single_blocks.0.norm", "double_blocks.0.img_attn.norm", "img_in", "txt_in"):
        chosen = [value for name, value in weights.items() if name.startswith(part)]
        gradients = torch.autograd.grad(training.loss(), chosen)
        norm = float(torch.cat([g.flatten() for g in gradients]).norm())
        losses = []
        with torch.no_grad():
            for step in (LENGTH, -2 * LENGTH):
                torch._foreach_add_(chosen, gradients, alpha=step / norm)
                losses.append(float(training.loss()))
            torch._foreach_add_(chosen, gradients, alpha=LENGTH / norm)
        found[part] = (losses[0] - losses[1]) / (2 * LENGTH * norm)
    return found


def pixels() -> float:
    """The largest change of a pixel, 0 to 1, on the way to latents and back."""
    sheet = Image.open(pictures.SHEET)
    white = Image.new("RGBA", sheet.size, "white")
    wanted = torch.from_numpy(np.array(Image.alpha_composite(white, sheet).convert("RGB"))) / 255
    found = pictures.pixels(pictures.latents()).unflatten(0, (-1, pictures.COLUMNS))
    found = found.movedim(1, 2).flatten(0, 1).flatten(1, 2)
    return float((found - wanted).abs().max())


def main() -> None:
    print(json.dumps({"difference": difference(FOLDER), "slopes": slopes(), "pixels": pixels()}))


if __name__ == "__main__":
    main()
