"""Make small models that stock ComfyUI detects, with random weights.

Run with ComfyUI on the path, as a process of its own (ComfyUI parses the command line):

    python tests/support/tiny_models.py COMFYUI FOLDER NAME [NAME ...]

NAME: flux, flux2, wan, wan260 (its feed-forward is no multiple of 32), ltxv, zimage, qwen3,
checkpoint, sd15, vae, lora. Files go into the model folders of a ComfyUI base folder. zimage, qwen3
and the text encoder of sd15 have their real widths: ComfyUI recognizes no others.
"""

from __future__ import annotations

import json

from comfyui_modules import FOLDER, NAMES

# isort: split
import comfy.ops
import torch
from safetensors.torch import save_file

OPERATIONS = comfy.ops.disable_weight_init


def flux():
    from comfy.ldm.flux.model import Flux

    return Flux(
        image_model="flux", in_channels=16, out_channels=16, vec_in_dim=None,
        context_in_dim=1024, hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=1,
        depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True,
        guidance_embed=False, txt_ids_dims=[], operations=OPERATIONS,
    )  # fmt: skip


def flux2():
    from comfy.ldm.flux.model import Flux

    return Flux(
        image_model="flux2", in_channels=128, out_channels=128, vec_in_dim=None,
        context_in_dim=1024, hidden_size=128, mlp_ratio=3.0, num_heads=1, depth=1,
        depth_single_blocks=1, axes_dim=[32] * 4, theta=2000, patch_size=1, qkv_bias=False,
        guidance_embed=False, global_modulation=True, mlp_silu_act=True, ops_bias=False,
        txt_ids_dims=[3], operations=OPERATIONS,
    )  # fmt: skip


def wan(ffn_dim: int = 256):
    from comfy.ldm.wan.model import WanModel

    return WanModel(
        model_type="t2v", patch_size=(1, 2, 2), dim=128, ffn_dim=ffn_dim, num_heads=1, num_layers=1,
        in_dim=16, out_dim=16, text_dim=4096, operations=OPERATIONS,
    )  # fmt: skip


LTXV_CONFIG = {"causal_temporal_positioning": True, "positional_embedding_max_pos": [20, 64, 64]}


def ltxv():
    from comfy.ldm.lightricks.model import LTXVModel

    return LTXVModel(
        cross_attention_dim=256, attention_head_dim=8, num_attention_heads=32, num_layers=1,
        caption_channels=4096, operations=OPERATIONS, **LTXV_CONFIG,
    )  # fmt: skip


def zimage_shapes(layers: int = 1, width: int = 3840, hidden: int = 10240, text: int = 1024):
    """Keys and shapes of a Z-Image with few layers, at the width that stock detects it by."""
    shapes = {
        "cap_embedder.0.weight": (text,), "cap_embedder.1.weight": (width, text),
        "cap_embedder.1.bias": (width,), "cap_pad_token": (1, width), "x_pad_token": (1, width),
        "x_embedder.weight": (width, 64), "x_embedder.bias": (width,),
        "t_embedder.mlp.0.weight": (1024, 256), "t_embedder.mlp.0.bias": (1024,),
        "t_embedder.mlp.2.weight": (256, 1024), "t_embedder.mlp.2.bias": (256,),
        "final_layer.adaLN_modulation.1.weight": (width, 256),
        "final_layer.adaLN_modulation.1.bias": (width,),
        "final_layer.linear.weight": (64, width), "final_layer.linear.bias": (64,),
    }  # fmt: skip
    blocks = [f"layers.{i}" for i in range(layers)]
    blocks += [f"{kind}_refiner.{i}" for kind in ("noise", "context") for i in range(2)]
    for block in blocks:
        shapes |= {
            f"{block}.attention.qkv.weight": (3 * width, width),
            f"{block}.attention.out.weight": (width, width),
            f"{block}.attention.q_norm.weight": (128,),
            f"{block}.attention.k_norm.weight": (128,),
            f"{block}.feed_forward.w1.weight": (hidden, width),
            f"{block}.feed_forward.w2.weight": (width, hidden),
            f"{block}.feed_forward.w3.weight": (hidden, width),
            f"{block}.attention_norm1.weight": (width,),
            f"{block}.attention_norm2.weight": (width,),
            f"{block}.ffn_norm1.weight": (width,), f"{block}.ffn_norm2.weight": (width,),
        }  # fmt: skip
        if not block.startswith("context"):
            shapes[f"{block}.adaLN_modulation.0.weight"] = (4 * width, 256)
            shapes[f"{block}.adaLN_modulation.0.bias"] = (4 * width,)
    return shapes


def qwen3() -> dict[str, torch.Tensor]:
    """Qwen3 0.6B, the smallest text encoder that ComfyUI runs quantized; all layers alike."""
    width, hidden, heads, groups, head = 1024, 3072, 16, 8, 128
    layer = randomize({
        "self_attn.q_proj.weight": (heads * head, width),
        "self_attn.k_proj.weight": (groups * head, width),
        "self_attn.v_proj.weight": (groups * head, width),
        "self_attn.o_proj.weight": (width, heads * head),
        "self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,),
        "mlp.gate_proj.weight": (hidden, width), "mlp.up_proj.weight": (hidden, width),
        "mlp.down_proj.weight": (width, hidden),
        "input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,),
    })  # fmt: skip
    state = randomize({"model.embed_tokens.weight": (151936, width), "model.norm.weight": (width,)})
    for index in range(28):  # clones: the file format shares no memory
        state |= {f"model.layers.{index}.{key}": value.clone() for key, value in layer.items()}
    return state


def sd15() -> dict[str, torch.Tensor]:
    """A checkpoint of Stable Diffusion 1 with one block, a whole text encoder, in FP16 as ComfyUI
    holds it, and a tiny VAE."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.sd1_clip import SDClipModel

    unet = UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1],
        channel_mult=[1], transformer_depth=[1], transformer_depth_middle=0,
        transformer_depth_output=[1, 1], use_spatial_transformer=True, context_dim=768, num_heads=8,
        legacy=False, operations=OPERATIONS, device="meta",
    )  # fmt: skip
    parts = {"model.diffusion_model.": unet, "cond_stage_model.": SDClipModel(device="meta")}
    shapes = {p + k: v.shape for p, part in parts.items() for k, v in part.state_dict().items()}
    state = {k: v.half() if k.startswith("cond") else v for k, v in randomize(shapes).items()}
    for key in ("logit_scale", "transformer.text_projection.weight"):  # no file has them
        del state[f"cond_stage_model.{key}"]
    return state | {f"first_stage_model.{k}": v.bfloat16() for k, v in vae(4).items()}


def randomize(shapes: dict) -> dict[str, torch.Tensor]:
    """Random BF16 weights, each layer's output about as large as its input; norms are 1.

    Values come from one pool of 4 million, read from another start each time: drawing 900 million
    of their own takes half a minute.
    """
    generator = torch.Generator().manual_seed(1)
    pool = torch.randn(1 << 22, generator=generator)
    state = {}
    for key, shape in shapes.items():
        value = torch.empty(tuple(shape), dtype=torch.bfloat16)
        if "norm" in key and key.endswith(("weight", "scale")):
            state[key] = value.fill_(1.0)
            continue
        fan_in = value[0].numel() if value.ndim > 1 else 2500  # biases: a deviation of 0.02
        for piece in value.view(-1).split(pool.numel() // 2):
            start = int(torch.randint(pool.numel() // 2, (), generator=generator))
            torch.mul(pool[start : start + piece.numel()], fan_in**-0.5, out=piece)
        state[key] = value
    return state


def lora(state: dict[str, torch.Tensor], rank: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA on every linear inside a block, strong enough to be seen."""
    generator = torch.Generator().manual_seed(2)
    result = {}
    for key, weight in state.items():
        if key.endswith(".weight") and weight.ndim == 2 and "blocks" in key:
            name = "diffusion_model." + key.removesuffix(".weight")
            up = torch.randn(weight.shape[0], rank, generator=generator) * 0.05
            down = torch.randn(rank, weight.shape[1], generator=generator) * 0.05
            result[f"{name}.lora_up.weight"], result[f"{name}.lora_down.weight"] = up, down
    return result


def vae(channels: int = 16) -> dict[str, torch.Tensor]:
    """A tiny autoencoder; its last layer is set so that images fill their range."""
    from comfy.taesd.taesd import TAESD

    model = TAESD(latent_channels=channels)
    state = randomize({k: v.shape for k, v in model.state_dict().items()})
    state = {k: v.float() for k, v in state.items()}
    model.load_state_dict(state)
    latent = torch.randn(1, channels, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        pixels = model.decode(latent)  # 2 * (last layer - 0.5), one channel each for R, G, B
    gain, mean = 0.5 / pixels.std((0, 2, 3)), pixels.mean((0, 2, 3))
    last = [k for k in state if k.startswith("taesd_decoder") and k.endswith(".weight")][-1]
    bias = last.replace(".weight", ".bias")
    state[bias] = gain * (state[bias] - 0.5 - mean / 2) + 0.5
    state[last] = gain[:, None, None, None] * state[last]
    return state


FOLDERS = {
    "vae": "vae", "lora": "loras", "checkpoint": "checkpoints", "sd15": "checkpoints",
    "qwen3": "text_encoders",
}  # fmt: skip


def main() -> None:
    makers = {"flux": flux, "flux2": flux2, "wan": wan, "wan260": lambda: wan(260), "ltxv": ltxv}
    for name in NAMES:
        folder = FOLDERS.get(name, "diffusion_models")
        target = FOLDER / "models" / folder / f"{name}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == "vae":
            state = vae()
        elif name == "zimage":
            state = randomize(zimage_shapes())
        elif name in ("qwen3", "sd15"):
            state = {"qwen3": qwen3, "sd15": sd15}[name]()
        elif name == "checkpoint":
            model = randomize({k: v.shape for k, v in flux().state_dict().items()})
            state = {f"model.diffusion_model.{k}": v for k, v in model.items()}
            state |= {f"vae.{k}": v for k, v in vae().items()}
        elif name == "lora":
            state = lora(randomize({k: v.shape for k, v in flux().state_dict().items()}))
        else:
            state = randomize({k: v.shape for k, v in makers[name]().state_dict().items()})
        # ComfyUI reads this part of LTX's settings from metadata; it cannot be seen in the shapes.
        config = {"config": json.dumps({"transformer": LTXV_CONFIG})} if name == "ltxv" else None
        save_file(state, target, config)


if __name__ == "__main__":
    main()
