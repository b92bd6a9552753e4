"""Emoji as latents, and their names as what a text encoder makes of them.

    python bench/emoji/pictures.py FILE    write eight of the names, encoded: for bench/in_comfyui

A latent is a picture's RGBA values, -1 to 1, with the four pixels of each 2 x 2 square as channels:
16 channels, as Flux's VAE has, so ComfyUI takes the model for Flux. No autoencoder is needed, and
none blurs what is compared. Where a picture is transparent it is white.

A prompt is MiniLM's last hidden states, one for each token, zero after the end; pooled is their
mean. MiniLM is the only trained text encoder on PyPI that is small enough.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tests" / "support"))

SIZE = 32  # pixels
COLUMNS = 16
SHEET = HERE / "emoji.png"
NAMES = (HERE / "names.txt").read_text("utf-8").splitlines()
HELD_OUT = 16  # the last of the names: prompts that training never sees
TOKENS = 16
WIDTH = 384  # of MiniLM
SAMPLER_STEPS = 20


def latents() -> torch.Tensor:
    """Of all emoji in the order of NAMES, float32 [128, 16, 16, 16]."""
    values = torch.from_numpy(np.array(Image.open(SHEET).convert("RGBA"))).float() / 255
    alpha = values[..., 3:]
    values[..., :3] = values[..., :3] * alpha + 1 - alpha
    rows = len(values) // SIZE
    tiles = values.view(rows, SIZE, COLUMNS, SIZE, 4).permute(0, 2, 4, 1, 3).flatten(0, 1)
    return torch.nn.functional.pixel_unshuffle(tiles[: len(NAMES)] * 2 - 1, 2)


def pixels(latents: torch.Tensor) -> torch.Tensor:
    """RGB of latents [N, 16, h, w]: float32 [N, 2h, 2w, 3], 0 to 1, as ComfyUI has images.

    Those that KSampler returns are to go through the model's `process_latent_in` first.
    """
    values = torch.nn.functional.pixel_shuffle(latents.float(), 2)[:, :3]
    return (values / 2 + 0.5).clamp(0, 1).movedim(1, -1)


@torch.inference_mode()
def encode(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Context [N, TOKENS, WIDTH] and pooled [N, WIDTH], float32.

    Raises:
        ValueError: a prompt has too many tokens.
    """
    import minilm  # and transformers, which takes seconds

    model = minilm.trained().eval()
    (batch,) = minilm.batches(prompts, len(prompts))
    mask = batch["attention_mask"][..., None]
    if mask.shape[1] > TOKENS:
        longest = prompts[int(mask.sum((1, 2)).argmax())]
        raise ValueError(f"the prompt {longest!r} has more than {TOKENS} tokens; shorten it")
    hidden = model(**batch).last_hidden_state * mask
    context = torch.nn.functional.pad(hidden, (0, 0, 0, TOKENS - hidden.shape[1]))
    return context.clone(), hidden.sum(1) / mask.sum(1)


@torch.inference_mode()  # as ComfyUI executes nodes
def sample(
    model,
    context: torch.Tensor,
    pooled: torch.Tensor,
    noise: torch.Tensor,
    steps: int = SAMPLER_STEPS,
) -> torch.Tensor:
    """Latents [N, 16, 16, 16] that ComfyUI samples: Euler, simple schedule, CFG 1, in one batch.

    Args:
        model: a ModelPatcher; its modules can be imported by then.
        context, pooled: N prompts, as `encode` makes them.
        noise: [N, 16, 16, 16].
    """
    import comfy.sample

    prompts = [[context, {"pooled_output": pooled}]]
    arguments = (steps, 1.0, "euler", "simple", prompts, prompts, torch.zeros_like(noise))
    out = comfy.sample.sample(model, noise, *arguments, seed=0, disable_pbar=True)
    return model.model.process_latent_in(out)


def main() -> None:
    context, pooled = encode(NAMES[:: len(NAMES) // 8])
    save_file({"context": context, "pooled": pooled}, sys.argv[1])


if __name__ == "__main__":
    main()
