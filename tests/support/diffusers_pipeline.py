"""A small Z-Image pipeline, and a LoRA for it."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline
from diffusers_models import DTYPE, TEXT, random
from torch import nn
from transformers import Qwen3Config, Qwen3Model


def pipeline(transformer) -> ZImagePipeline:
    """With random other parts, the same each time, and no tokenizer."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * 2, "block_out_channels": (8, 8)}
    vae = AutoencoderKL(
        **blocks, norm_num_groups=4, latent_channels=16, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=0.36, shift_factor=0.1,
    )  # fmt: skip
    config = Qwen3Config(
        vocab_size=100, hidden_size=TEXT, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    result = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae.to(DTYPE),
        text_encoder=Qwen3Model(config).to(DTYPE), tokenizer=None, transformer=transformer,
    )  # fmt: skip
    result.set_progress_bar_config(disable=True)
    return result


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
