"""The models and LoRAs of the benchmark, in a process of its own: ComfyUI reads the command line.

    python bench/in_comfyui/models.py COMFYUI FOLDER LAYERS

Writes a tiny Flux, and with LAYERS above 0 a Z-Image of as many layers and four refiner blocks at
full width, each in BF16, converted to MXFP8, and with a LoRA on the linears of its blocks.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import working_copy

working_copy.load()
sys.path.insert(0, str(working_copy.ROOT / "tests" / "support"))

COMFYUI, FOLDER, LAYERS = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
sys.argv = ["tiny_models.py", COMFYUI, str(FOLDER)]

import tiny_models  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from mxfp8.quant.conversion.convert import convert_file  # noqa: E402

RANK = 8


def lora(shapes: dict) -> dict[str, torch.Tensor]:
    """A LoRA on every linear inside a block, of about a fifth of its output."""
    generator = torch.Generator().manual_seed(2)
    state = {}
    for key, shape in shapes.items():
        inside = "blocks." in key or "layers." in key
        if inside and key.endswith(".weight") and len(shape) == 2:
            name = "diffusion_model." + key.removesuffix(".weight")
            up = torch.randn(shape[0], RANK, generator=generator) * (0.2 * RANK**-0.5)
            down = torch.randn(RANK, shape[1], generator=generator) * shape[1] ** -0.5
            state[f"{name}.lora_up.weight"], state[f"{name}.lora_down.weight"] = up, down
    return state


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    makers = {"flux": {k: v.shape for k, v in tiny_models.flux().state_dict().items()}}
    if LAYERS:
        makers["zimage"] = tiny_models.zimage_shapes(LAYERS)
    for name, shapes in makers.items():
        source = FOLDER / f"{name}.safetensors"
        save_file(tiny_models.randomize(shapes), source)
        save_file(lora(shapes), FOLDER / f"{name}-lora.safetensors")
        convert_file(source, FOLDER / f"{name}-mxfp8.safetensors", device="cpu")


if __name__ == "__main__":
    main()
