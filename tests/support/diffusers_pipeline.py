"""A small Z-Image pipeline, its files, and a LoRA for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers_models import DTYPE, KINDS, TEXT, random, write
from PIL import Image
from quantized_files import plain
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3Model


def pipeline(
    transformer, tokenizer: PreTrainedTokenizerBase | None = None, levels: int = 2
) -> ZImagePipeline:
    """With random other parts, the same each time.

    Args:
        levels: of the VAE; each but the last halves the sides of a picture.
    """
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * levels}
    blocks |= {"block_out_channels": (8,) * levels}
    vae = AutoencoderKL(
        **blocks, norm_num_groups=4, latent_channels=16, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=0.36, shift_factor=0.1,
    )  # fmt: skip
    config = Qwen3Config(
        vocab_size=len(tokenizer or range(100)), hidden_size=TEXT, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    result = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae.to(DTYPE),
        text_encoder=Qwen3Model(config).to(DTYPE), tokenizer=tokenizer, transformer=transformer,
    )  # fmt: skip
    result.set_progress_bar_config(disable=True)
    return result


def write_files(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write transformer.safetensors and text_encoder.safetensors with ComfyUI's names, and the
    folder `pipeline`, which has everything else. It draws 1024 x 1024 pixels.

    Args:
        tokenizer: of Qwen3, with its chat template.
    """
    parts = folder / "pipeline"
    pipe = pipeline(None, tokenizer, levels=4)
    pipe.save_pretrained(parts)
    for path in (parts / "text_encoder").glob("*.safetensors"):
        path.unlink()
    state = {f"model.{key}": value for key, value in pipe.text_encoder.state_dict().items()}
    save_file(state, folder / "text_encoder.safetensors")
    kind = KINDS["Z-Image"]  # with positions for a prompt, and for 64 x 64 patches
    kind = dataclasses.replace(kind, config={**kind.config, "axes_lens": [512, 64, 64]})
    (parts / "transformer").mkdir()
    made = write(kind, parts / "transformer")
    made.original.rename(folder / "transformer.safetensors")
    made.mxfp8.unlink()


def draw_plain(parts: Path, folder: Path, prompt: str, seed: int) -> Image.Image:
    """What plain diffusers draws of the files that `write_files` wrote, converted and dequantized.

    Args:
        parts: the folder `pipeline`.
        folder: has transformer-mxfp8.safetensors and text_encoder-mxfp8.safetensors.
    """
    weights = {
        name: {k: v.float() for k, v in plain(folder / f"{name}-mxfp8.safetensors").items()}
        for name in ("transformer", "text_encoder")
    }
    options = {"dtype": torch.float32}
    transformer = ZImageTransformer2DModel.from_single_file(
        weights["transformer"], config=str(parts), subfolder="transformer", **options
    )
    encoder = Qwen3Model(Qwen3Config.from_pretrained(parts, subfolder="text_encoder"))
    encoder.load_state_dict(
        {k.removeprefix("model."): v for k, v in weights["text_encoder"].items()}
    )
    pipe = ZImagePipeline.from_pretrained(
        parts, transformer=transformer, text_encoder=encoder.float(), **options
    )
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        prompt, height=1024, width=1024, num_inference_steps=9, guidance_scale=0.0,
        generator=generator,
    ).images[0]  # fmt: skip


def sample(pipe: ZImagePipeline) -> torch.Tensor:
    """Two steps; the latent in float32."""
    return pipe(
        prompt_embeds=[random(7, TEXT, seed=2)], height=32, width=32, num_inference_steps=2,
        guidance_scale=0.0, generator=torch.Generator().manual_seed(0), output_type="latent",
    ).images.float()  # fmt: skip


def lora(transformer, rank: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA on every linear layer in a block, as its file has it."""
    result = {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and name.startswith("layers."):
            key = f"transformer.{name}.lora"
            result[f"{key}_A.weight"] = random(rank, layer.in_features, seed=3) * 0.1
            result[f"{key}_B.weight"] = random(layer.out_features, rank, seed=4) * 0.1
    return result
