"""A configuration of each of ComfyUI's model classes, as its detection reads it from a file.

What stands here is what a class cannot be built without: what `comfy.model_detection` would find in
a published file of it. Depths are smaller where nothing depends on them.
"""

from __future__ import annotations

import json

import torch


def _unet(**changes) -> dict:
    return {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
        "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1, "use_spatial_transformer": True, "legacy": False,
        "context_dim": 1024, "use_temporal_resblock": False, **changes,
    }  # fmt: skip


def _sdxl(depth, output, middle, **changes) -> dict:
    stages = [2, 2, 2] if len(depth) == 6 else [1, 1, 1]
    return _unet(
        num_res_blocks=stages, channel_mult=[1, 2, 4], transformer_depth=depth,
        transformer_depth_output=output, transformer_depth_middle=middle, context_dim=2048,
        num_classes="sequential", adm_in_channels=2816, **changes,
    )  # fmt: skip


def _video_unet(adm: int) -> dict:
    return _unet(
        in_channels=8, num_classes="sequential", adm_in_channels=adm, extra_ff_mix_layer=True,
        use_spatial_context=True, merge_strategy="learned_with_images", merge_factor=0.0,
        video_kernel_size=[3, 1, 1], use_temporal_resblock=True, use_temporal_attention=True,
        disable_temporal_crossattention=False,
    )  # fmt: skip


def _flux(**changes) -> dict:
    return {
        "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096,
        "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 2,
        "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2,
        "qkv_bias": True, "txt_ids_dims": [], **changes,
    }  # fmt: skip


def _chroma(**changes) -> dict:
    return {
        **_flux(vec_in_dim=None), "in_channels": 64, "out_channels": 64, "in_dim": 64,
        "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5, **changes,
    }  # fmt: skip


def _hunyuan(**changes) -> dict:
    return {
        "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "vec_in_dim": 768,
        "axes_dim": [16, 56, 56], "meanflow": False, "context_in_dim": 4096, "hidden_size": 3072,
        "mlp_ratio": 4.0, "num_heads": 24, "depth": 2, "depth_single_blocks": 2, "theta": 256,
        "qkv_bias": True, "byt5": False, "guidance_embed": True, "use_cond_type_embedding": False,
        "vision_in_dim": None, "meanflow_sum": False, **changes,
    }  # fmt: skip


_HUNYUAN15 = _hunyuan(
    in_channels=65, out_channels=32, patch_size=[1, 1, 1], vec_in_dim=None, context_in_dim=3584,
    hidden_size=2048, num_heads=16, depth_single_blocks=0, byt5=True, guidance_embed=False,
    use_cond_type_embedding=True, vision_in_dim=1152, meanflow_sum=True,
)  # fmt: skip


def _cosmos(channels: int, **changes) -> dict:
    return {
        "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": channels,
        "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "concat_padding_mask": True,
        "pos_emb_cls": "rope3d", "pos_emb_interpolation": "crop", "use_adaln_lora": True,
        "adaln_lora_dim": 256, "extra_per_block_abs_pos_emb": False, **changes,
    }  # fmt: skip


def _cosmos1(channels: int) -> dict:
    return _cosmos(
        channels, model_channels=4096, num_blocks=28, num_heads=32, block_config="FA-CA-MLP",
        pos_emb_learnable=False, block_x_format="THWBD", affline_emb_norm=True,
        extra_per_block_abs_pos_emb_type="learnable",
    )  # fmt: skip


def _cosmos2(channels: int) -> dict:
    return _cosmos(
        channels, model_channels=2048, num_blocks=28, num_heads=16, crossattn_emb_channels=1024,
        pos_emb_learnable=True,
    )  # fmt: skip


def _lumina(**changes) -> dict:
    return {
        "patch_size": 2, "in_channels": 16, "dim": 2304, "cap_feat_dim": 2304, "n_layers": 2,
        "qk_norm": True, "n_heads": 24, "n_kv_heads": 8, "axes_dims": [32, 32, 32],
        "axes_lens": [300, 512, 512], "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0, **changes,
    }  # fmt: skip


_ZIMAGE = _lumina(
    dim=3840, cap_feat_dim=2560, n_heads=30, n_kv_heads=30, axes_dims=[32, 48, 48],
    axes_lens=[1536, 512, 512], rope_theta=256.0, ffn_dim_multiplier=8.0 / 3.0,
    z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32,
)  # fmt: skip

# Whose defaults are real sizes; detection counts their layers.
_SHALLOW = (
    "WAN22_T2V", "WAN21_CausalAR_T2V", "WAN21_T2V", "WAN21_I2V", "WAN21_FunControl2V",
    "WAN21_Camera", "WAN22_Camera", "WAN21_HuMo", "WAN21_FlowRVS", "WAN21_SCAIL", "WAN21_SCAIL2",
    "LTXV", "QwenImage", "MageFlow", "Lens", "JoyImage", "Omnigen2", "CogVideoX_T2V",
    "CogVideoX_I2V", "CogVideoX_Inpaint",
)  # fmt: skip

CONFIGS: dict[str, dict] = {
    "LotusD": _unet(adm_in_channels=4),
    "Stable_Zero123": _unet(in_channels=8, context_dim=768, use_linear_in_transformer=False),
    "SD15_instructpix2pix": _unet(context_dim=768),
    "SD15": _unet(context_dim=768),
    "SD20": _unet(),
    "SD21UnclipL": _unet(num_classes="sequential", adm_in_channels=1536),
    "SD21UnclipH": _unet(num_classes="sequential", adm_in_channels=2048),
    "SDXL_instructpix2pix": _sdxl([0, 0, 2, 2, 10, 10], [0, 0, 0, 2, 2, 2, 10, 10, 10], 10),
    "SDXLRefiner": _unet(
        model_channels=384, transformer_depth=[0, 0, 4, 4, 4, 4, 0, 0],
        transformer_depth_output=[0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0], transformer_depth_middle=4,
        context_dim=1280, num_classes="sequential", adm_in_channels=2560,
    ),
    "SDXL": _sdxl([0, 0, 2, 2, 10, 10], [0, 0, 0, 2, 2, 2, 10, 10, 10], 10),
    "SSD1B": _sdxl([0, 0, 2, 2, 4, 4], [0, 0, 0, 1, 1, 2, 10, 4, 4], -1),
    "KOALA_700M": _sdxl([0, 2, 5], [0, 0, 2, 2, 5, 5], -2),
    "KOALA_1B": _sdxl([0, 2, 6], [0, 0, 2, 2, 6, 6], 6),
    "Segmind_Vega": _sdxl([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2], -1),
    "SD_X4Upscaler": _unet(
        model_channels=256, channel_mult=[1, 2, 2, 4], transformer_depth=[0, 0, 1, 1, 1, 1, 1, 1],
        transformer_depth_output=[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ),
    "SV3D_u": _video_unet(256),
    "SV3D_p": _video_unet(1280),
    "SVD_img2vid": _video_unet(768),
    "SD3": {
        "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 24, "input_size": None,
        "adm_in_channels": 2048, "num_patches": 36864, "pos_embed_max_size": 192,
        "context_embedder_config": {
            "target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536},
        },
    },
    "StableAudio3": {
        "timestep_features_type": "expo", "io_channels": 256, "embed_dim": 1024, "num_heads": 16,
        "cond_token_dim": 768, "global_cond_dim": 768, "project_cond_tokens": True, "depth": 2,
        "num_memory_tokens": 64, "global_cond_type": "adaLN", "local_add_cond_dim": 257,
        "attn_kwargs": {"qk_norm": "rms", "differential": True}, "norm_type": "rms_norm",
    },
    "StableAudio": {"num_memory_tokens": 0},
    "PixArtSigma": {"micro_condition": False, "model_max_length": 300},
    "PixArtAlpha": {"micro_condition": True},
    "HunyuanDiT": {"depth": 4, "hidden_size": 1408},
    "HunyuanDiT1": {
        "depth": 4, "hidden_size": 1408, "size_cond": True, "use_style_cond": True,
    },
    "FluxInpaint": _flux(),
    "Flux": _flux(),
    "LongCatImage": _flux(),
    "FluxSchnell": _flux(),
    "Flux2": _flux(
        in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=15360, hidden_size=6144,
        mlp_ratio=3.0, num_heads=48, axes_dim=[32] * 4, theta=2000, patch_size=1, qkv_bias=False,
        guidance_embed=True, global_modulation=True, mlp_silu_act=True, ops_bias=False,
        txt_ids_dims=[3],
    ),
    "GenmoMochi": {
        "depth": 4, "patch_size": 2, "num_heads": 24, "hidden_size_x": 3072, "hidden_size_y": 1536,
        "mlp_ratio_x": 4.0, "mlp_ratio_y": 4.0, "in_channels": 12, "qkv_bias": False,
        "patch_embed_bias": True, "timestep_mlp_bias": True, "use_t5": True, "t5_feat_dim": 4096,
        "t5_token_length": 256, "qk_norm": True, "attend_to_padding": False,
    },
    "HunyuanVideo15_SR_Distilled": {**_HUNYUAN15, "in_channels": 98},
    "HunyuanVideo15": _HUNYUAN15,
    "HunyuanImage21Refiner": _hunyuan(
        in_channels=128, out_channels=64, patch_size=[1, 1, 1], vec_in_dim=None,
        context_in_dim=3584, hidden_size=3328, num_heads=26,
    ),
    "HunyuanImage21": _hunyuan(
        in_channels=64, out_channels=64, patch_size=[1, 1], vec_in_dim=None, context_in_dim=3584,
        hidden_size=3584, num_heads=28, axes_dim=[64, 64], byt5=True,
    ),
    "HunyuanVideoSkyreelsI2V": _hunyuan(),
    "HunyuanVideoI2V": _hunyuan(),
    "HunyuanVideo": _hunyuan(),
    "CosmosT2V": _cosmos1(16),
    "CosmosI2V": _cosmos1(17),
    "CosmosT2IPredict2": _cosmos2(16),
    "CosmosI2VPredict2": _cosmos2(17),
    "Anima": _cosmos2(16),
    "ZImagePixelSpace": {
        **_ZIMAGE, "in_channels": 3, "patch_size": 32, "decoder_in_channels": 3,
        "decoder_hidden_size": 64, "decoder_num_res_blocks": 4, "decoder_max_freqs": 8,
    },
    "ZImage": _ZIMAGE,
    "Lumina2": _lumina(),
    "WAN21_Vace": {"num_layers": 2, "vace_layers": 2, "vace_in_dim": 96},
    "HiDream": {
        "attention_head_dim": 128, "axes_dims_rope": [64, 32, 32], "caption_channels": [4096, 4096],
        "max_resolution": [128, 128], "in_channels": 16, "llama_layers": [*range(32)],
        "num_attention_heads": 20, "num_routed_experts": 4, "num_activated_experts": 2,
        "num_layers": 2, "num_single_layers": 2, "out_channels": 16, "patch_size": 2,
        "text_emb_dim": 2048,
    },
    "Chroma": _chroma(),
    "ChromaRadiance": _chroma(
        in_channels=3, out_channels=3, patch_size=16, nerf_hidden_size=64, nerf_mlp_ratio=4,
        nerf_depth=4, nerf_max_freqs=8, nerf_tile_size=512, nerf_final_head_type="conv",
        nerf_embedder_dtype=None, use_x0=False, use_sequential_txt_ids=False,
    ),
    "ACEStep15": {"num_dit_layers": 2},
    **{name: {"num_layers": 2} for name in _SHALLOW},
    "LTXAV": {"num_layers": 4},  # its preset keeps the first two
    "Boogu": {"num_layers": 2, "num_double_stream_layers": 2},
    "Kandinsky5": {"num_visual_blocks": 2},
    "Kandinsky5Image": {"num_visual_blocks": 2},
    "SeedVR2": {
        "vid_dim": 2560, "heads": 20, "num_layers": 32, "norm_eps": 1e-5, "mlp_type": "swiglu",
        "vid_out_norm": True,
    },
}  # fmt: skip

# Published models of those classes that have other layers.
VARIANTS: dict[str, list[dict]] = {
    # SD 3.5 Medium: attention in the image branch
    "SD3": [{**CONFIGS["SD3"], "qk_norm": "rms", "x_block_self_attn_layers": [*range(13)]}],
    # Ovis: a gated feed-forward
    "FluxSchnell": [_flux(vec_in_dim=None, context_in_dim=2048, yak_mlp=True, txt_norm=True)],
    # NewBie: CLIP beside the text encoder
    "Lumina2": [_lumina(clip_text_dim=1024)],
    # PiD 1.5 for Flux: gates per token
    "PiD": [{
        "lq_latent_channels": 16, "latent_spatial_down_factor": 8, "lq_gate_per_token": True,
        "lq_latent_unpatchify_factor": 1, "lq_conv_padding_mode": "replicate",
        "pit_lq_inject": True,
    }],
    "SeedVR2": [  # 7B, both kinds
        {
            "vid_dim": 3072, "heads": 24, "num_layers": 36, "mm_layers": 36, "norm_eps": 1e-5,
            "rope_type": "rope3d", "rope_dim": 64, "mlp_type": "normal",
        },
        {
            "vid_dim": 3072, "heads": 24, "num_layers": 36, "mm_layers": 10, "norm_eps": 1e-5,
            "rope_type": "rope3d", "rope_dim": 64, "mlp_type": "swiglu",
        },
    ],
    # CogVideoX 1.5: patches by a matrix
    "CogVideoX_I2V": [{"patch_size_t": 2, "ofs_embed_dim": 512, "num_layers": 4}],
    # the two linear heads of Radiance
    "ChromaRadiance": [{**CONFIGS["ChromaRadiance"], "nerf_final_head_type": "linear"}],
    # cameras
    "DepthAnything3": [{
        "alt_start": 8, "qknorm_start": 8, "rope_start": 8, "cat_token": True,
        "head_type": "dualdpt", "head_dim_in": 2048, "has_cam_enc": True, "has_cam_dec": True,
        "head_output_dim": 2,
    }],
}  # fmt: skip

# What detection reads from a file's metadata, where its tensors are those of another class.
METADATA = {
    name: {"config": json.dumps({"transformer": config})}
    for name, config in {
        "WAN21_CausalAR_T2V": {"causal_ar": True}, "WAN21_FlowRVS": {"model_type": "flow_rvs"},
    }.items()
}  # fmt: skip

# Tensors beside the diffusion model that a class cannot be built without.
BESIDE = {
    "Stable_Zero123": {"cc_projection.weight": (768, 772), "cc_projection.bias": (768,)},
    "StableAudio": {
        f"conditioner.conditioners.seconds_{x}.embedder.embedding.{part}": shape
        for x in ("start", "total")
        for part, shape in {"0.weights": (128,), "1.weight": (768, 257), "1.bias": (768,)}.items()
    },
    "StableAudio3": {
        f"conditioner.conditioners.seconds_total.embedder.embedding.1.{part}": shape
        for part, shape in {"weight": (768, 256), "bias": (768,)}.items()
    },
}
IN_MEMORY = ("ACEStep15",)  # calls item() while it is built, which the meta device cannot


def configs(name: str) -> list[dict]:
    """The configurations of a class, to be completed by its own."""
    return [CONFIGS.get(name, {}), *VARIANTS.get(name, [])]


def as_stored(name: str, state: dict) -> dict:
    """A model's state dict by the names, and with the tensors, that files of its class have."""
    if name not in ("PixelDiTT2I", "PiD"):
        return state
    stored = {}
    for key, value in state.items():
        if "adaLN_modulation_mlp" not in key:  # half of a tensor that loading splits
            whole = key.replace("adaLN_modulation_msa", "adaLN_modulation.0")
            stored[whole] = value if whole == key else torch.cat([value, value])
    return {f"core.{k}": v for k, v in stored.items()} if name == "PixelDiTT2I" else stored
