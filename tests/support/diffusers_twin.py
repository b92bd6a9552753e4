"""What ComfyUI makes of an MXFP8 file, for the inputs of the same model in diffusers.

    python tests/support/diffusers_twin.py COMFYUI FOLDER

FOLDER has mxfp8.safetensors and inputs.safetensors: the arguments of the model's forward. Writes
output.safetensors and prints nothing but null.
"""

from __future__ import annotations

from comfyui_modules import FOLDER

# isort: split
import comfy.model_management
import torch
from safetensors.torch import load_file, save_file

from mxfp8.nodes.models.load import load_diffusion_model
from mxfp8.nodes.runtime.patch import accelerate


@torch.no_grad()
def main() -> None:
    stock = load_diffusion_model(str(FOLDER / "mxfp8.safetensors"), disable_dynamic=True)
    patcher = accelerate(stock, "exact")
    comfy.model_management.load_models_gpu([patcher])
    inputs = load_file(FOLDER / "inputs.safetensors")
    result = patcher.model.diffusion_model(**inputs)
    save_file({"output": result.contiguous()}, FOLDER / "output.safetensors")
    print("null")


if __name__ == "__main__":
    main()
