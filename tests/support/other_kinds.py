"""Print the tensors in files of ComfyUI's other kinds of models, as JSON.

    python tests/support/other_kinds.py COMFYUI

{kind: {name of a model: {key: shape}}}. The classes are ComfyUI's own (upscalers are spandrel's),
built on the meta device; sizes are small where nothing depends on them.
"""

from __future__ import annotations

import json
import logging
import warnings

from comfyui_modules import COMFYUI

# isort: split
import comfy.audio_encoders.audio_encoders
import comfy.cldm.cldm
import comfy.cldm.dit_embedder
import comfy.clip_vision
import comfy.ldm.cascade.controlnet
import comfy.ldm.flux.controlnet
import comfy.ldm.flux.redux
import comfy.ldm.hunyuan_video.upsampler
import comfy.ldm.hydit.controlnet
import comfy.ldm.lumina.controlnet
import comfy.ldm.models.autoencoder
import comfy.ldm.qwen_image.controlnet
import comfy.ldm.wan.vae
import comfy.ops
import comfy.t2i_adapter.adapter
import comfy_extras.nodes_model_patch as patches
import spandrel.architectures as upscalers
import torch

OPERATIONS = {"operations": comfy.ops.manual_cast}
BUILD = {"device": "meta", "dtype": torch.float16, **OPERATIONS}


def vision(name: str):
    path = f"{COMFYUI}/comfy/{name}.json"
    return comfy.clip_vision.ClipVisionModel(path).model


def audio(**config):
    return comfy.audio_encoders.audio_encoders.AudioEncoderModel(config).model


def on_cpu(kind, **config):
    """For a class that reads values while it is built."""
    with torch.device("cpu"):
        return kind(**config)


DD = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3,
      "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [],
      "dropout": 0.0}  # fmt: skip
KINDS = {
    "a ControlNet": {
        "Stable Diffusion": lambda: comfy.cldm.cldm.ControlNet(
            32, 4, 32, 3, [1, 1], channel_mult=[1, 2], num_heads=1, transformer_depth=[1, 1],
            use_spatial_transformer=True, context_dim=32, transformer_depth_middle=1,
            **OPERATIONS,
        ),
        "Flux": lambda: comfy.ldm.flux.controlnet.ControlNetFlux(
            image_model="flux", in_channels=16, out_channels=16, vec_in_dim=32, context_in_dim=64,
            hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=1, depth_single_blocks=1,
            axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True,
            guidance_embed=False, txt_ids_dims=[], **OPERATIONS,
        ),
        "Z-Image": lambda: comfy.ldm.lumina.controlnet.ZImage_Control(**BUILD),
        "Qwen-Image, by block": lambda: patches.QwenImageBlockWiseControlNet(**BUILD),
        "Qwen-Image": lambda: comfy.ldm.qwen_image.controlnet.QwenImageControlNetModel(
            num_layers=1, **BUILD
        ),
        "HunyuanDiT": lambda: comfy.ldm.hydit.controlnet.HunYuanControlNet(
            depth=40, hidden_size=64, num_heads=1, **OPERATIONS
        ),
    },
    "a T2I-Adapter": {
        "full": lambda: comfy.t2i_adapter.adapter.Adapter(cin=64),
        "light": lambda: comfy.t2i_adapter.adapter.Adapter_light(
            cin=64, channels=[320, 640, 1280, 1280], nums_rb=4
        ),
        "Stable Cascade": lambda: comfy.ldm.cascade.controlnet.ControlNet(c_in=3, proj_blocks=[0]),
    },
    "a style model": {
        "Redux": lambda: comfy.ldm.flux.redux.ReduxImageEncoder(),
        "T2I style": lambda: comfy.t2i_adapter.adapter.StyleAdapter(
            width=1024, context_dim=768, num_head=8, n_layes=3, num_token=8
        ),
    },
    "a model patch": {"MultiTalk": lambda: patches.MultiTalkModelPatch(**OPERATIONS)},
    "a CLIP vision model": {
        "CLIP": lambda: vision("clip_vision_config_h"),
        "SigLIP": lambda: vision("clip_vision_siglip_384"),
        "DINOv2": lambda: vision("image_encoders/dino2_large"),
    },
    "an audio encoder": {
        "wav2vec2": lambda: audio(
            model_type="wav2vec2", embed_dim=768, num_heads=12, num_layers=2, conv_norm=False,
            conv_bias=False, do_normalize=False, do_stable_layer_norm=False,
        ),
    },
    "an upscaler": {
        "SwinIR": lambda: on_cpu(upscalers.SwinIR.SwinIR, depths=[1]),
        "DAT": lambda: on_cpu(upscalers.DAT.DAT, depth=[1], num_heads=[2]),
    },
    "a latent upscaler": {
        "HunyuanVideo 1.5": lambda: comfy.ldm.hunyuan_video.upsampler.HunyuanVideo15SRModel(
            "720p", {"in_channels": 8, "out_channels": 8, "hidden_channels": 8, "num_blocks": 1,
                     "global_residual": False},
        ).model,
    },
    "a VAE": {
        "Stable Diffusion": lambda: comfy.ldm.models.autoencoder.AutoencoderKL(
            ddconfig=DD, embed_dim=4
        ),
        "Wan": lambda: comfy.ldm.wan.vae.WanVAE(dim=16),
    },
}  # fmt: skip


def main() -> None:
    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    with torch.device("meta"):
        states = {
            kind: {name: build().state_dict() for name, build in models.items()}
            for kind, models in KINDS.items()
        }
    print(json.dumps({
        kind: {name: {k: list(v.shape) for k, v in state.items()} for name, state in named.items()}
        for kind, named in states.items()
    }))  # fmt: skip


if __name__ == "__main__":
    main()
