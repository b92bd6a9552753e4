"""Train a small text-to-image model: ComfyUI's own Flux on 112 emoji, with their names as prompts.

    python bench/emoji/train.py --out FILE [--steps N] [--minutes M] [--picture PNG]

Tests and benchmarks need an image model that is trained, of a class that ComfyUI recognizes, and
small; PyPI has none. This one has a double and three single blocks of width 256, the narrowest that
ComfyUI gives two heads: 5.9 million parameters, 11.8 MB in BF16. What a prompt and a latent are is
in pictures.py. 16 of the 128 names are held out.

It learns the velocity of a rectified flow, noise - image, with times from a logit-normal
distribution (https://arxiv.org/abs/2403.03206), as ComfyUI samples models of Flux's class without
guidance. The weights written are an average over the last part of the steps
(https://arxiv.org/abs/2312.02696, section 3.1). Neither the average nor the learning rate depends
on how many steps there will be, so more can be added at any time.

FILE.training, beside the weights, holds what a run needs to go on from where another stopped, after
--steps or --minutes, or was killed; both are written every two minutes. Every step draws its random
numbers from the seed and its own number: on one machine, with as many threads, the result does not
depend on where a run was interrupted. --picture draws what the real ComfyUI samples of the
weights, above the emoji themselves; the last row is of names held out.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path
from statistics import mean

import torch
from pictures import HELD_OUT, NAMES, WIDTH, encode, latents, pixels, sample
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

STEPS, BATCH = 4000, 48
RATE, WARM_UP, CONSTANT = 1e-3, 100, 1000  # steps; then falls with the root of the step
BETAS, DECAY, MOST_GRADIENT = (0.9, 0.99), 0.01, 1.0
AVERAGE = 7  # gamma of that section: the average spreads over a tenth of the steps
SECONDS_BETWEEN_FILES = 120
STEPS_BETWEEN_LINES = 50


def build(seed: int) -> torch.nn.Module:
    """The model in float32: blocks begin as identities, the velocity as zero."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    network = Flux(
        image_model="flux", in_channels=16, out_channels=16, vec_in_dim=WIDTH,
        context_in_dim=WIDTH, hidden_size=256, mlp_ratio=4.0, num_heads=2, depth=1,
        depth_single_blocks=3, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True,
        guidance_embed=False, txt_ids_dims=[], dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.named_parameters():
        if "mod" in name or name.startswith("final_layer"):
            torch.nn.init.zeros_(value)
        elif value.ndim == 2:
            torch.nn.init.xavier_uniform_(value, generator=generator)
        else:
            torch.nn.init.constant_(value, 1.0 if "norm" in name else 0.0)
    for layer in network.modules():
        if isinstance(layer, torch.nn.LayerNorm):  # Flux adds to what it has normalized, in place
            layer.register_forward_pre_hook(lambda _, x: (x[0].clone(),))
    return network


class Training:
    """A model on its way, and all that the next step depends on.

    Args:
        seed: of the first weights, and with a step's number of what the step draws.
        batch: pictures in a step.
    """

    def __init__(self, seed: int, batch: int):
        self.seed, self.batch = seed, batch
        self.losses: list[float] = []  # of every step
        self.bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16", False)  # else slower
        self.network = build(seed)
        self._weights = list(self.network.parameters())
        self._average = [weight.detach().clone() for weight in self._weights]
        self._optimizer = torch.optim.AdamW(
            self._weights, betas=BETAS, weight_decay=DECAY, fused=True
        )
        known = len(NAMES) - HELD_OUT
        self._images = latents()[:known]
        self._context, self._pooled = encode(NAMES[:known])

    def loss(self) -> torch.Tensor:
        """Of the next step, a scalar."""
        import comfy.model_management

        generator = torch.Generator().manual_seed(self.seed << 32 | len(self.losses))
        chosen = torch.randint(len(self._images), (self.batch,), generator=generator)
        image = self._images[chosen]
        noise = torch.randn(image.shape, generator=generator)
        moment = torch.randn(self.batch, generator=generator).sigmoid()
        mixed = image.lerp(noise, moment[:, None, None, None])
        prompts = self._context[chosen], self._pooled[chosen]
        comfy.model_management.in_training = True  # else Flux's rotary embedding has no gradient
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
                found = self.network(mixed, moment, *prompts)
        finally:
            comfy.model_management.in_training = False
        return (found.float() - (noise - image)).square().mean()

    def advance(self) -> None:
        """One step."""
        loss = self.loss()
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._weights, MOST_GRADIENT)
        self.losses.append(loss.item())
        step = len(self.losses)
        for group in self._optimizer.param_groups:
            group["lr"] = RATE * min(step / WARM_UP, 1, (CONSTANT / step) ** 0.5)
        self._optimizer.step()
        with torch.no_grad():
            new = 1 - (1 - 1 / step) ** (AVERAGE + 1)
            torch._foreach_lerp_(self._average, self._weights, new)

    def weights(self) -> dict[str, torch.Tensor]:
        """The average in BF16, under ComfyUI's names."""
        names = [name for name, _ in self.network.named_parameters()]
        return {n: w.bfloat16() for n, w in zip(names, self._average, strict=True)}

    def save(self, path: Path) -> None:
        state = {
            "seed": self.seed, "batch": self.batch, "losses": self.losses,
            "weights": self._weights, "average": self._average,
            "optimizer": self._optimizer.state_dict(),
        }  # fmt: skip
        part = path.with_name(path.name + ".part")
        torch.save(state, part)
        os.replace(part, path)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            ValueError: that was a run with another seed or batch.
        """
        state = torch.load(path, weights_only=True)
        for name in ("seed", "batch"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"{path} is of a run with {name} {state[name]}, not {getattr(self, name)}: "
                    "delete it to start anew"
                )
        self.losses = state["losses"]
        self._optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            torch._foreach_copy_(self._weights, state["weights"])
            torch._foreach_copy_(self._average, state["average"])


def train(training: Training, out: Path, steps: int, minutes: float) -> None:
    """Advance to a number of steps, or for some time, and write the files."""
    checkpoint = out.with_name(out.name + ".training")
    if checkpoint.exists():
        training.load(checkpoint)
        print(f"goes on after step {len(training.losses)}, from {checkpoint}", flush=True)
    warnings.filterwarnings("ignore", "Mismatch dtype")  # of RMSNorm, which keeps float32 weights
    start = line = written = time.monotonic()
    first = len(training.losses)  # not yet in a line
    while len(training.losses) < steps and time.monotonic() - start < 60 * minutes:
        training.advance()
        step, now = len(training.losses), time.monotonic()
        if step % STEPS_BETWEEN_LINES == 0 or step == steps:
            loss, seconds = mean(training.losses[first:]), (now - line) / (step - first)
            print(f"step {step}  loss {loss:.4f}  {seconds:.2f} s a step", flush=True)
            first, line = step, now
        if now - written > SECONDS_BETWEEN_FILES:
            write(training, out, checkpoint)
            written = now
    write(training, out, checkpoint)


def write(training: Training, out: Path, checkpoint: Path) -> None:
    training.save(checkpoint)
    part = out.with_name(out.name + ".part")
    save_file(training.weights(), part)
    os.replace(part, out)


def draw(path: Path, picture: Path, seed: int = 0) -> None:
    """Samples of 48 prompts above their emoji, in rows of 16; the last row is held out."""
    import comfy.sd

    known = len(NAMES) - HELD_OUT
    chosen = [*(known * i // 32 for i in range(32)), *range(known, len(NAMES))]
    emoji = latents()[chosen]
    noise = torch.randn(emoji.shape, generator=torch.Generator().manual_seed(seed))
    model = comfy.sd.load_diffusion_model(str(path))
    images = pixels(sample(model, *encode([NAMES[i] for i in chosen]), noise)), pixels(emoji)
    rows = torch.stack([x.unflatten(0, (-1, 16)) for x in images], 1).flatten(0, 1)
    values = rows.movedim(1, 2).flatten(0, 1).flatten(1, 2)
    image = Image.fromarray((values * 255).round().byte().numpy())
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the weights, a safetensors file")
    parser.add_argument("--steps", type=int, default=STEPS, help="those of earlier runs included")
    parser.add_argument("--minutes", type=float, default=120, help="the most this run trains")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="a PNG of samples")
    options = parser.parse_args()

    from comfyui import import_modules

    import_modules()
    train(Training(options.seed, options.batch), options.out, options.steps, options.minutes)
    if options.picture:
        draw(options.out, options.picture)


if __name__ == "__main__":
    main()
