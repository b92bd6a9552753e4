"""Save a MODEL as a diffusion model file: MXFP8 layers in the stock format, the rest as it is."""

from __future__ import annotations

import json

import comfy.model_management
import comfy.utils
import torch
from comfy.cli_args import args
from comfy_api.latest import io

from .. import kernels
from ..kernels import layout
from ..quant import format
from ..quant.format import MARKER, SCALE, WEIGHT
from ..quant.report import gigabytes
from ..quant.source import HEADER_DTYPES, as_bytes
from ..quant.writer import Writer
from . import files, names
from .loading import CATEGORY, show
from .model_patch import check_movable
from .model_source import ModelSource


class MXFP8SaveModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8SaveModel",
            display_name="Save Model (MXFP8)",
            category=CATEGORY,
            description=(
                "Saves a diffusion model to output/, its MXFP8 layers in the format that stock "
                "ComfyUI and other tools read. LoRAs on the model are baked in. "
                "The file is read back and compared before it gets its name."
            ),
            search_aliases=["mxfp8", "save model", "export model", "quantized"],
            inputs=[
                io.Model.Input("model", tooltip="A model from Quantize Model (MXFP8) or a loader."),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/mxfp8",
                    tooltip=(
                        "Folder and name inside output/. Files in output/diffusion_models show "
                        "up in the model loaders."
                    ),
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, filename_prefix) -> io.NodeOutput:
        path = files.save_path(names.check_name("filename_prefix", filename_prefix))
        size = save_model(model, path, prompt_metadata(cls.hidden.prompt, cls.hidden.extra_pnginfo))
        text = f"{path.name}: {gigabytes(size)}"
        show(cls, text)
        return io.NodeOutput(ui={"text": [text]})


def prompt_metadata(prompt, extra_pnginfo) -> dict[str, str]:
    """The workflow, as stock's save nodes store it, unless the user switched that off."""
    if args.disable_metadata:
        return {}
    metadata = {"prompt": json.dumps(prompt)} if prompt is not None else {}
    return {**metadata, **{k: json.dumps(v) for k, v in (extra_pnginfo or {}).items()}}


def save_model(patcher, path, metadata: dict[str, str]) -> int:
    """Write a MODEL's diffusion model to `path`; returns the file's size in bytes.

    Raises:
        ValueError: a patched weight holds NaN or Inf, or something on the model cannot be saved.
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
    progress = comfy.utils.ProgressBar(len(source.tensors) + len(source.quantized))
    interrupted = comfy.model_management.throw_exception_if_processing_interrupted
    with Writer(path, tensors, metadata, tick=interrupted) as writer:
        for key in source.tensors:
            for piece in source.pieces(key):
                writer.write(key, piece)
            _step(progress)
        for name, module in source.quantized.items():
            for key, tensor in _stored(source, name, module, markers[name]).items():
                writer.write(key, as_bytes(tensor.to("cpu").contiguous()))
            _step(progress)
    return writer.nbytes


def _step(progress) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()
    progress.update(1)


def _marker(module) -> dict:
    """The stock marker of a loaded MXFP8 linear.

    Its dtype says what the weight computes in: on a CPU ComfyUI turns BF16 models into float32.
    """
    dtype = "F16" if module.weight.dtype == torch.float16 else "BF16"
    marker = format.marker(tuple(module.weight.shape), dtype)
    if module._full_precision_mm_config:
        marker["full_precision_matrix_mult"] = True
    return marker


def _stored(source: ModelSource, name: str, module, marker: dict) -> dict[str, torch.Tensor]:
    """The tensors of one quantised layer, LoRAs baked in."""
    weight = source.weight(name)  # float32 if patches change it
    original = source.original(f"diffusion_model.{name}{WEIGHT}")
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
        if (scale == layout.E8M0_NAN).any():
            raise ValueError(f"{name!r} holds NaN or Inf after its LoRAs; it was not saved")
    encoded = torch.frombuffer(bytearray(format.marker_bytes(marker)), dtype=torch.uint8)
    return {name + WEIGHT: qdata, name + SCALE: scale, name + MARKER: encoded}
