"""Save a MODEL as a diffusion model file: MXFP8 layers in the stock format, the rest as it is."""

from __future__ import annotations

import json
import logging

import torch
from comfy.cli_args import args
from comfy_api.latest import io

from .. import kernels
from ..kernels import layout
from ..quant import format
from ..quant.container.header import nbytes, quoted
from ..quant.container.writer import Writer
from ..quant.format import MARKER, SCALE, WEIGHT
from ..quant.progress import VERIFY, Meter
from ..quant.reports.comparison import Comparison
from ..quant.reports.conversion import Report, format_size
from ..quant.reports.metadata import COMPARISON, REPORT, check_size, note_on_seeds
from ..quant.sources.file import HEADER_DTYPES, as_bytes
from .host import paths
from .host.progress import Progress, output
from .models import fingerprints
from .models.source import PREFIX, ModelSource
from .models.transfer import check_movable
from .runtime.patch import mxfp8_linears
from .widgets import CATEGORY, ComparisonType

logger = logging.getLogger(__name__)

_PIECE = 1 << 22  # bytes written at a time


class MXFP8SaveModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8SaveModel",
            display_name="Save Model (MXFP8)",
            category=CATEGORY,
            description=(
                "Saves a diffusion model to output/, MXFP8 layers in the format that stock ComfyUI "
                "and other tools read. LoRAs on the model are baked in. The file is read "
                "back and verified before it gets its name."
            ),
            search_aliases=["mxfp8", "save model", "export model", "quantized"],
            inputs=[
                io.Model.Input("model", tooltip="A model from Quantize Model (MXFP8) or a loader."),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/mxfp8",
                    tooltip=(
                        "Folder and name inside output/. The model loaders list files in "
                        "output/diffusion_models."
                    ),
                ),
                ComparisonType.Input(
                    "comparison",
                    optional=True,
                    tooltip=(
                        "From Compare Models (MXFP8), for this model: stored in the file's header, "
                        "where `mxfp8 inspect` shows it."
                    ),
                ),
                io.String.Input(
                    "report",
                    optional=True,
                    force_input=True,
                    tooltip="From Quantize Model (MXFP8): stored there like the comparison.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, filename_prefix, comparison=None, report=None) -> io.NodeOutput:
        report = Report.from_json(report) if report else None
        metadata = {
            **prompt_metadata(cls.hidden.prompt, cls.hidden.extra_pnginfo),
            **_provenance(model, comparison, report),
        }
        with paths.saving(filename_prefix) as path:
            size = save_model(model, path, metadata, Progress(cls))
        text = f"{path.name}: {format_size(size)}"
        if note := note_on_seeds(report, comparison):
            logger.warning("MXFP8: the comparison in %s was %s", path.name, note)
            text += f"\nWARNING: the comparison was {note}"
        return output(cls, text)


def prompt_metadata(prompt, extra_pnginfo) -> dict[str, str]:
    """The workflow, as stock's save nodes store it, unless the user switched that off."""
    if args.disable_metadata:
        return {}
    metadata = {"prompt": json.dumps(prompt)} if prompt is not None else {}
    return {**metadata, **{k: json.dumps(v) for k, v in (extra_pnginfo or {}).items()}}


def _provenance(patcher, comparison: Comparison | None, report: Report | None) -> dict[str, str]:
    """The report on how the weights were made, and the comparison with the original, as metadata.

    Raises:
        ValueError: the comparison was measured on other weights, the report is another model's, or
            one of them is too long for a header.
    """
    metadata = {}
    if comparison is not None:
        _check_comparison(patcher, comparison)
        metadata[COMPARISON] = comparison.to_json()
    if report is not None:
        _check_report(patcher, report)
        metadata[REPORT] = report.to_json()
    for key, text in metadata.items():
        metadata[key] = json.dumps(json.loads(text), separators=(",", ":"))
        check_size(key, metadata[key])
    return metadata


def _check_comparison(patcher, comparison: Comparison) -> None:
    """Check that a comparison was measured on these weights.

    Raises:
        ValueError: it was measured on others, or the weights are not those that a file would hold.
    """
    fingerprint = fingerprints.of_mxfp8(patcher)
    if fingerprint is None:
        raise ValueError(
            "a comparison holds for MXFP8 layers as they are; this model has none, or has LoRAs or "
            "patches on it that saving bakes in. Save it without the comparison, load that file, "
            "and compare it"
        )
    if comparison.model.fingerprint != fingerprint:
        raise ValueError(
            "this comparison was measured on other weights; connect the model that was compared"
        )


def _check_report(patcher, report: Report) -> None:
    """Check that a report is on this model's MXFP8 layers, by their names and shapes.

    Raises:
        ValueError: it is on other layers, or the weights were changed since.
    """
    if fingerprints.is_patched(patcher):
        raise ValueError(
            "LoRAs or patches were put on this model after the report was made; disconnect the "
            "report, or quantize the original again with the LoRAs on it"
        )
    actual = {
        format.bare(fingerprints.plain(name)): layout.padded_shape(*module.weight.shape)
        for name, module in mxfp8_linears(patcher.model)
    }
    reported = {format.bare(x.name): layout.padded_shape(*x.shape) for x in report.quantized}
    if actual != reported:
        names = actual.keys() | reported.keys()
        name = min(k for k in names if actual.get(k) != reported.get(k))
        sizes = [list(x[name]) if name in x else "none" for x in (actual, reported)]
        raise ValueError(
            f"the report is another model's: MXFP8 layer {quoted(name)} is {sizes[0]} in the model "
            f"and {sizes[1]} in the report, padded to whole blocks; connect the report of the node "
            "that made this model, or disconnect it"
        )


def save_model(patcher, path, metadata: dict[str, str], progress: Progress) -> int:
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
    original = source.original(f"{PREFIX}{name}{WEIGHT}")
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
            raise ValueError(
                f"{name!r} holds NaN or Inf after its LoRAs; nothing was saved. Remove the LoRA "
                "that causes this, or lower its strength"
            )
    encoded = torch.frombuffer(bytearray(format.marker_bytes(marker)), dtype=torch.uint8)
    return {name + WEIGHT: qdata, name + SCALE: scale, name + MARKER: encoded}
