"""Files with MXFP8 layers for tests: as the package writes them, and with faults."""

from __future__ import annotations

import json

import torch
from bad_files import Draft, draft
from checkpoints import load, matrix
from safetensors.torch import save_file

from mxfp8 import kernels
from mxfp8.kernels import layout

LINEARS = {
    "blocks.0.lin": matrix(33, 100, torch.bfloat16, seed=1),
    "blocks.1.lin": matrix(300, 31, torch.float16, seed=2),
    "blocks.2.lin": matrix(257, 129, torch.float32, seed=3),
    "one": matrix(1, 1, torch.float32, seed=4),
    "zero": torch.zeros(40, 64, dtype=torch.bfloat16),
}
OTHERS = {
    "blocks.0.lin.bias": matrix(1, 33)[0],
    "conv.weight": matrix(8, 36).reshape(8, 4, 3, 3),
    "norm.lin.weight": matrix(8, 32, torch.float32),
    "double.weight": matrix(3, 5).double(),
    "ids.weight": torch.tensor([[1, -2], [2**62, 4]]),
    "mask": torch.tensor([[True, False, True]]),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
    "empty.weight": torch.zeros(4, 0),
    "scalar": torch.tensor(3.5),
    "nans": torch.tensor([torch.nan, torch.inf, -0.0], dtype=torch.bfloat16),
}
MODEL = {**{f"{name}.weight": weight for name, weight in LINEARS.items()}, **OTHERS}


def row_major(scale: torch.Tensor, qdata: torch.Tensor) -> torch.Tensor:
    """Tiled scales as another tool would store them, in a tensor of the same shape."""
    rows, blocks = qdata.shape[0], qdata.shape[1] // 32
    out = torch.zeros_like(scale)
    out[:rows, :blocks] = layout.untile(scale, rows, blocks)
    return out


def model(weights: dict[str, torch.Tensor], marked=True, order=lambda scale, qdata: scale, **more):
    """Tensors and metadata of a file with these layers quantized."""
    tensors, markers = {}, {}
    for name, weight in weights.items():
        qdata, scale = kernels.quantize(weight)
        tensors[f"{name}.weight"] = qdata
        tensors[f"{name}.weight_scale"] = order(scale, qdata)
        markers[name] = {"format": "mxfp8", "orig_shape": list(weight.shape)}
    metadata = {"_quantization_metadata": json.dumps({"layers": markers})} if marked else None
    return {**tensors, **more}, metadata


def save(folder, tensors, metadata=None):
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model", metadata)
    return folder / "model"


def make_row_major(d: Draft) -> None:
    for name, (_, shape, data) in d.tensors.items():
        if name.endswith(".weight_scale"):
            rows, cols = d.tensors[name.removesuffix("_scale")][1]
            scale = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(shape)
            qdata = torch.empty(rows, cols, dtype=torch.uint8)
            d.tensors[name][2] = row_major(scale, qdata).numpy().tobytes()


def write(comfy, name: str, edit, folder: str = "diffusion_models", source="flux-mxfp8") -> str:
    base = comfy.base / "models" / folder
    whole = draft(base / f"{source}.safetensors")
    edit(whole)
    file = f"form {name}.safetensors".replace(",", "").replace(" ", "-")
    (base / file).write_bytes(whole.encode())
    return file


def plain(path) -> dict[str, torch.Tensor]:
    """The tensors of an MXFP8 file, dequantized, in float32."""
    stored, _ = load(path)
    state = {}
    for key, tensor in stored.items():
        layer, _, leaf = key.rpartition(".")
        marker = stored.get(f"{layer}.comfy_quant")
        if marker is None or leaf == "bias":
            state[key] = tensor.float()
        elif leaf == "weight":
            shape = json.loads(bytes(marker.tolist())).get("orig_shape", tensor.shape)
            scale = stored[f"{key}_scale"].view(torch.uint8)
            state[key] = kernels.dequantize(tensor, scale, torch.float32, tuple(shape))
    return state
