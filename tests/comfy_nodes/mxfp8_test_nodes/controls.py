"""A node that runs a control model which stock builds from the weights of the model it controls.

ControlLora exists for Stable Diffusion's UNets only: here a small one, in MXFP8 and as the values
that its codes stand for.
"""

import json
import sys

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.supported_models
import torch

UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64,
    "num_res_blocks": [1, 1], "channel_mult": (1, 2), "transformer_depth": [1, 1],
    "transformer_depth_middle": 1, "transformer_depth_output": [1] * 4, "num_heads": 4,
    "num_head_channels": -1, "context_dim": 64, "use_spatial_transformer": True, "legacy": False,
    "use_linear_in_transformer": True, "use_temporal_attention": False,
}  # fmt: skip


def _pack(module: str):
    return next(m for name, m in sys.modules.items() if name.endswith(f"ComfyUI-MXFP8.{module}"))


def _random(shape) -> torch.Tensor:
    return torch.randn(shape) * (0.05 if len(shape) > 1 else 0.1)


def _patcher(operations, state=None):
    config = comfy.supported_models.SD15(dict(UNET))
    config.custom_operations = operations
    model = config.get_model({}, "")
    if state is not None:
        model.diffusion_model.load_state_dict(state)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def _unets():
    """(plain, MXFP8, accelerated) patchers of one UNet."""
    kernels, patch = _pack("kernels"), _pack("nodes.runtime.patch")
    shapes = _patcher(comfy.ops.manual_cast).model.diffusion_model.state_dict()
    plain = {key: _random(value.shape) for key, value in shapes.items()}
    stored = dict(plain)
    marker = torch.tensor(list(json.dumps({"format": "mxfp8"}).encode()), dtype=torch.uint8)
    for key, weight in plain.items():
        if weight.ndim == 2 and ("attn" in key or "time_embed" in key):
            stored[key], stored[f"{key}_scale"] = kernels.quantize(weight)
            stored[key.replace("weight", "comfy_quant")] = marker
            plain[key] = kernels.dequantize(stored[key], stored[f"{key}_scale"], torch.float32)
    operations = comfy.ops.mixed_precision_ops({}, torch.float32, disabled={"mxfp8"})
    quantized = _patcher(operations, stored)
    accelerated = patch.accelerate(quantized, "exact")
    return _patcher(comfy.ops.manual_cast, plain), quantized, accelerated


def _control_lora():
    config = {k: v for k, v in UNET.items() if k != "out_channels"}
    control = comfy.cldm.cldm.ControlNet(
        **config, hint_channels=3, operations=comfy.ops.disable_weight_init, dtype=torch.float32
    )
    weights = {"lora_controlnet": torch.zeros(1)}
    for key, value in control.state_dict().items():
        if key.startswith(("input_hint_block", "zero_convs", "middle_block_out")):
            weights[key] = 3 * _random(value.shape)
        elif value.ndim == 2 and "attn" in key:
            name = key.removesuffix(".weight")
            weights[f"{name}.up"] = _random((value.shape[0], 4))
            weights[f"{name}.down"] = _random((4, value.shape[1]))
    return comfy.controlnet.ControlLora(weights)


class TestControl:
    """How far a UNet's samples with a ControlLora are from those of its values: in stock,
    accelerated, and without the ControlLora. Then how far an embedder is from the model's that was
    copied from it on the way, as SD3.5's control models do; and what the model's own state dict
    holds in the end."""

    CATEGORY = "test"
    FUNCTION = "run"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def run(self):
        with torch.inference_mode(False), torch.no_grad():
            return {"ui": {"result": [json.dumps(self.measure())]}}

    def measure(self):
        torch.manual_seed(0)
        plain, quantized, accelerated = _unets()
        control = _control_lora().set_cond_hint(torch.rand(1, 3, 64, 64), 1.0, (0.0, 1.0))
        text, noise = torch.randn(1, 7, 64), torch.randn(1, 4, 8, 8)
        linear = torch.nn.Linear
        copy = torch.nn.Sequential(linear(64, 256), torch.nn.SiLU(), linear(256, 256))

        def sample(unet, control, callback=None):
            extra = {"control": control, "control_apply_to_uncond": True} if control else {}
            positive = [[text, extra]]
            return comfy.sample.sample(
                unet, noise, 2, 1.0, "euler", "simple", positive, positive,
                torch.zeros_like(noise), callback=callback, seed=1,
            )  # fmt: skip

        def copy_embedder(*_):
            source = accelerated.model.diffusion_model.time_embed
            copy.load_state_dict(source.state_dict(), strict=False)

        wanted = sample(plain, control)
        latents = {
            "without": sample(plain, None),
            "stock": sample(quantized, control),
            "ours": sample(accelerated, control, copy_embedder),
        }
        result = {n: float((x - wanted).norm() / wanted.norm()) for n, x in latents.items()}
        embedder = plain.model.diffusion_model.time_embed[2].weight
        result["embedder"] = float((copy[2].weight - embedder).norm() / embedder.norm())
        key = "diffusion_model.time_embed.2.weight"
        result["stored"] = str(accelerated.model.state_dict()[key].dtype)
        return result


NODES = {node.__name__: node for node in (TestControl,)}
