"""A MODEL written as a diffusion model file: MXFP8 layers in the stock format, the rest as is."""

from __future__ import annotations

import json

import torch

from ... import kernels
from ...quant import format
from ...quant.container.header import nbytes
from ...quant.container.writer import Writer
from ...quant.format import MARKER, SCALE, WEIGHT
from ...quant.progress import VERIFY, Meter, Progress
from ...quant.sources.file import HEADER_DTYPES, as_bytes
from .source import ModelSource
from .transfer import check_movable

_PIECE = 1 << 22  # bytes written at a time


def save_model(patcher, path, metadata: dict[str, str], progress: Progress) -> int:
    """Write a MODEL's diffusion model to `path`; returns the file's size in bytes.

    Raises:
        ValueError: a LoRA cannot be merged, or something on the model cannot be saved.
        OSError: the file cannot be written; nothing is left behind.
    """
    check_movable(patcher)
    source = ModelSource(patcher)
    markers: dict[str, dict] = {}
    tensors = [(key, *info) for key, info in source.tensors.items()]
    for name, module in source.quantized.items():
        if module.quant_format == "mxfp8":
            markers[name] = _marker(module)
            marker = format.marker_bytes(markers[name])
            tensors += [
                (name + WEIGHT, "F8_E4M3", tuple(module.weight._qdata.shape)),
                (name + SCALE, "U8", tuple(module.weight._params.scale.shape)),
                (name + MARKER, "U8", (len(marker),)),
            ]
        else:
            state = module.state_dict(prefix=f"{name}.")
            markers[name] = json.loads(bytes(state[name + MARKER].tolist()))
            state.pop(f"{name}.bias", None)
            tensors += [(k, HEADER_DTYPES[v.dtype], tuple(v.shape)) for k, v in state.items()]

    metadata = {**metadata, **source.detection_metadata({key: shape for key, _, shape in tensors})}
    if markers:
        metadata = format.with_markers(metadata, markers)
    advance = Meter(sum(nbytes(dtype, shape) for _, dtype, shape in tensors), progress)
    with Writer(path, tensors, metadata, tick=lambda: advance(0, VERIFY)) as writer:
        for key in source.tensors:
            for piece in source.pieces(key):
                _write(writer, key, piece, advance)
        for name, module in source.quantized.items():
            for key, tensor in _stored(source, name, module, markers[name]).items():
                _write(writer, key, as_bytes(tensor.to("cpu").contiguous()), advance)
    return writer.nbytes


def _write(writer: Writer, key: str, data: memoryview, advance: Meter) -> None:
    """Write a tensor's next bytes in pieces, between which the user can interrupt a slow disk."""
    for start in range(0, len(data), _PIECE):
        piece = data[start : start + _PIECE]
        writer.write(key, piece)
        advance(len(piece), key)


def _marker(module) -> dict:
    """The stock marker of a loaded MXFP8 linear.

    Its dtype is what the weight computes in; BF16 where ComfyUI holds it in float32, as on a CPU.
    """
    dtype = "F16" if module.weight.dtype == torch.float16 else "BF16"
    marker = format.marker(tuple(module.weight.shape), dtype)
    if module._full_precision_mm_config:
        marker["full_precision_matrix_mult"] = True
    return marker


def _stored(source: ModelSource, name: str, module, marker: dict) -> dict[str, torch.Tensor]:
    """The tensors of one quantized layer, LoRAs baked in."""
    weight = source.weight(name)  # float32 if patches change it
    original = source.original(source.full(name + WEIGHT))
    if module.quant_format != "mxfp8":
        if weight is not None:
            original = original.requantize_from_float(weight, scale="recalculate")
        state = module.state_dict(prefix=f"{name}.")
        state.pop(f"{name}.bias", None)
        return {**state, **original.state_dict(name + WEIGHT)}
    if weight is None:
        qdata, scale = original._qdata, original._params.scale
    else:
        qdata, scale = kernels.quantize(weight)
    encoded = torch.frombuffer(bytearray(format.marker_bytes(marker)), dtype=torch.uint8)
    return {name + WEIGHT: qdata, name + SCALE: scale, name + MARKER: encoded}
