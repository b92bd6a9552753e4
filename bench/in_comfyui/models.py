"""The models of the benchmark, in a process of its own: ComfyUI reads the command line.

    python bench/in_comfyui/models.py COMFYUI FOLDER DEVICE LAYERS IMAGE_MODEL PROMPTS

With LAYERS above 0 a Z-Image of as many layers and four refiner blocks at full width, with random
weights; else a tiny Flux. IMAGE_MODEL is a trained diffusion model, whose encoded PROMPTS are
`context` [count, tokens, width] and `pooled` [count, width]. Each is written in BF16, converted to
MXFP8, and with a LoRA and inputs for a sampler. What is there already stays. Last, prints the facts
of the machine as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import working_copy

working_copy.load()
sys.path.insert(0, str(working_copy.ROOT / "tests" / "support"))

COMFYUI, FOLDER, DEVICE, LAYERS, IMAGE_MODEL, ENCODED = sys.argv[1:]
FOLDER, LAYERS = Path(FOLDER), int(LAYERS)
sys.argv = ["tiny_models.py", COMFYUI, str(FOLDER)]

import tiny_models  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from mxfp8.quant.conversion.convert import convert_file  # noqa: E402

RANK = 8
PROMPTS = 8


def lora(state: dict) -> dict[str, torch.Tensor]:
    """A LoRA on every linear inside a block, of about a fifth of its output."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for key, weight in state.items():
        inside = "blocks." in key or "layers." in key
        if inside and key.endswith(".weight") and weight.ndim == 2:
            name = "diffusion_model." + key.removesuffix(".weight")
            N, K = weight.shape
            size = 0.2 * weight.float().std() * (K / RANK) ** 0.5
            found[f"{name}.lora_up.weight"] = torch.randn(N, RANK, generator=generator) * size
            down = torch.randn(RANK, K, generator=generator) * K**-0.5
            found[f"{name}.lora_down.weight"] = down
    return found


def add(name: str, state: dict, inputs: dict, side: int) -> None:
    """
    Args:
        side: of the latent, an eighth of the image's.
    """
    count = len(inputs["context"])
    inputs["latent"] = torch.zeros(count, 16, side, side)
    source = FOLDER / f"{name}.safetensors"
    files = {"inputs": inputs, "lora": lora(state)}
    for kind, tensors in files.items():
        tensors = {key: value.contiguous() for key, value in tensors.items()}
        save_file(tensors, FOLDER / f"{name}-{kind}.safetensors")
    save_file(state, source)
    convert_file(source, FOLDER / f"{name}-mxfp8.safetensors", device="cpu")


def random_model(name: str, shapes: dict, side: int) -> None:
    text = torch.randn(1, 77, 1024, generator=torch.Generator().manual_seed(4)) * 0.3
    add(name, tiny_models.randomize(shapes), {"context": text}, side)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not list(FOLDER.glob("*-mxfp8.safetensors")):
        if LAYERS:
            random_model("zimage", tiny_models.zimage_shapes(LAYERS), 128)
        else:
            flux = tiny_models.flux().state_dict()
            random_model("flux", {key: value.shape for key, value in flux.items()}, 16)
        encoded = load_file(ENCODED)
        prompts = {name: encoded[name][:PROMPTS] for name in ("context", "pooled")}
        add("image", load_file(IMAGE_MODEL), prompts, 16)
    device = torch.device(DEVICE)
    machine = working_copy.machine(device) | {"slug": working_copy.slug(device)}
    print(json.dumps(machine))


if __name__ == "__main__":
    main()
