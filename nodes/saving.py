"""Nodes that save models: a MODEL with what is known of how it was made, a CLIP, a checkpoint."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping

import torch
from comfy.cli_args import args
from comfy_api.latest import io

from ..kernels import layout
from ..quant import format
from ..quant.container.header import quoted
from ..quant.format import WEIGHT
from ..quant.reports.comparison import Comparison
from ..quant.reports.conversion import Report
from ..quant.reports.metadata import COMPARISON, REPORT, check_size, note_on_seeds
from ..quant.reports.units import format_size
from .host import paths
from .host.progress import Progress, ending_shown, output
from .models import fingerprints
from .models.save import save_checkpoint, save_model, save_text_encoders
from .models.text_encoder import encoders, names_in_file
from .runtime.forward import mxfp8_linears
from .widgets import CATEGORY, ComparisonType

logger = logging.getLogger(__name__)


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
                _comparison_input(),
                _report_input("Quantize Model"),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @ending_shown
    def execute(cls, model, filename_prefix, comparison=None, report=None) -> io.NodeOutput:
        report = Report.from_json(report) if report else None
        metadata = {
            **prompt_metadata(cls.hidden.prompt, cls.hidden.extra_pnginfo),
            **_provenance(model, comparison, report),
        }
        with paths.saving(filename_prefix) as path:
            size = save_model(model, path, metadata, Progress(cls))
        text = f"{path.name}: {format_size(size)}" + _warning_of_none("Quantize Model", model)
        return output(cls, text + _warning_of_seeds(path.name, report, comparison))


class MXFP8SaveTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8SaveTextEncoder",
            display_name="Save Text Encoder (MXFP8)",
            category=CATEGORY,
            description=(
                "Saves the text encoders of a CLIP to output/, each to a file of its own, MXFP8 "
                "layers in the format that stock ComfyUI and other tools read. LoRAs on them are "
                "baked in. Each file is read back and verified before it gets its name."
            ),
            search_aliases=["mxfp8", "save clip", "export text encoder", "quantized"],
            inputs=[
                io.Clip.Input("clip", tooltip="From Quantize Text Encoder (MXFP8) or a loader."),
                io.String.Input(
                    "filename_prefix",
                    default="clip/mxfp8",
                    tooltip=(
                        "Folder and name inside output/. The text encoder loaders list files in "
                        "output/clip. If there are several encoders, their names are added."
                    ),
                ),
                _report_input("Quantize Text Encoder"),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @ending_shown
    def execute(cls, clip, filename_prefix, report=None) -> io.NodeOutput:
        report = Report.from_json(report) if report else None
        metadata = {
            **prompt_metadata(cls.hidden.prompt, cls.hidden.extra_pnginfo),
            **_clip_provenance(clip, report),
        }
        names = encoders(clip)
        with contextlib.ExitStack() as folders:
            files = {}
            for name in names:
                prefix = f"{filename_prefix}_{name}" if len(names) > 1 else filename_prefix
                files[name] = folders.enter_context(paths.saving(prefix))
            sizes = save_text_encoders(clip, files, metadata, Progress(cls))
        text = "\n".join(
            f"{path.name}: {format_size(size)}"
            for path, size in zip(files.values(), sizes, strict=True)
        )
        return output(cls, text + _warning_of_none("Quantize Text Encoder", clip.patcher))


class MXFP8SaveCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8SaveCheckpoint",
            display_name="Save Checkpoint (MXFP8)",
            category=CATEGORY,
            description=(
                "Saves a diffusion model, its text encoders and its VAE to output/ as one file for "
                "Load Checkpoint, MXFP8 layers in the format that stock ComfyUI reads. LoRAs are "
                "baked in. The file is read back and verified before it gets its name."
            ),
            search_aliases=["mxfp8", "save checkpoint", "export checkpoint", "quantized"],
            inputs=[
                io.Model.Input("model", tooltip="From Quantize Model (MXFP8) or a loader."),
                io.Clip.Input(
                    "clip",
                    tooltip=(
                        "Its text encoders, from Quantize Text Encoder (MXFP8) or a loader. "
                        "In some checkpoints ComfyUI runs them only unquantized; this node says so."
                    ),
                ),
                io.Vae.Input("vae", tooltip="Its VAE."),
                io.String.Input(
                    "filename_prefix",
                    default="checkpoints/mxfp8",
                    tooltip=(
                        "Folder and name inside output/. The checkpoint loaders list files in "
                        "output/checkpoints."
                    ),
                ),
                _comparison_input(),
                _report_input("Quantize Model"),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @ending_shown
    def execute(
        cls, model, clip, vae, filename_prefix, comparison=None, report=None
    ) -> io.NodeOutput:
        report = Report.from_json(report) if report else None
        metadata = {
            **prompt_metadata(cls.hidden.prompt, cls.hidden.extra_pnginfo),
            **_provenance(model, comparison, report),
        }
        with paths.saving(filename_prefix) as path:
            size = save_checkpoint(model, clip, vae, path, metadata, Progress(cls))
        text = f"{path.name}: {format_size(size)}"
        text += _warning_of_none("Quantize Model", model, clip.patcher)
        return output(cls, text + _warning_of_seeds(path.name, report, comparison))


def _comparison_input() -> io.Input:
    return ComparisonType.Input(
        "comparison",
        optional=True,
        tooltip=(
            "From Compare Models (MXFP8), for this model: stored in the file's header, where "
            "`mxfp8 inspect` shows it."
        ),
    )


def _report_input(node: str) -> io.Input:
    return io.String.Input(
        "report",
        optional=True,
        force_input=True,
        tooltip=(
            f"From {node} (MXFP8): stored in the file's header, where `mxfp8 inspect` shows it."
        ),
    )


def _warning_of_none(node: str, *patchers) -> str:
    """What to add to a text if none of these models has an MXFP8 layer."""
    if any(next(iter(mxfp8_linears(patcher.model)), None) for patcher in patchers):
        return ""
    return (
        "\nWARNING: there is no MXFP8 layer in what was saved; to quantize it, put "
        f"{node} (MXFP8) before this node"
    )


def _warning_of_seeds(file: str, report: Report | None, comparison: Comparison | None) -> str:
    """What to add to a text if the comparison sampled what the weights were rounded for."""
    note = note_on_seeds(report, comparison)
    if note is None:
        return ""
    logger.warning("MXFP8: the comparison in %s was %s", file, note)
    return f"\nWARNING: the comparison was {note}"


def prompt_metadata(prompt, extra_pnginfo) -> dict[str, str]:
    """The workflow, as stock's save nodes store it, unless the user switched that off."""
    if args.disable_metadata:
        return {}
    metadata = {"prompt": json.dumps(prompt)} if prompt is not None else {}
    return {**metadata, **{k: json.dumps(v) for k, v in (extra_pnginfo or {}).items()}}


def _provenance(patcher, comparison: Comparison | None, report: Report | None) -> dict[str, str]:
    """The report on how a MODEL was made, and the comparison with the original, as metadata.

    Raises:
        ValueError: the comparison was measured on other weights, the report is another model's, or
            one of them is too long for a header.
    """
    documents = {}
    if comparison is not None:
        _check_comparison(patcher, comparison)
        documents[COMPARISON] = comparison.to_json()
    if report is not None:
        layers = {fingerprints.plain(name): module for name, module in mxfp8_linears(patcher.model)}
        _check_report(layers, fingerprints.is_patched(patcher), report)
        documents[REPORT] = report.to_json()
    return _as_metadata(documents)


def _clip_provenance(clip, report: Report | None) -> dict[str, str]:
    """The report on how a CLIP was made; of several encoders each file has all of it."""
    if report is None:
        return {}
    names = {}
    for encoder in encoders(clip):
        names |= names_in_file(clip, encoder)
    layers = {
        names[name + WEIGHT].removesuffix(WEIGHT): module
        for name, module in mxfp8_linears(clip.patcher.model)
    }
    _check_report(layers, bool(clip.patcher.patches), report)
    return _as_metadata({REPORT: report.to_json()})


def _as_metadata(documents: Mapping[str, str]) -> dict[str, str]:
    metadata = {}
    for key, text in documents.items():
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


def _check_report(layers: Mapping[str, torch.nn.Module], patched: bool, report: Report) -> None:
    """Check that a report is on these MXFP8 layers, by their names and shapes.

    Raises:
        ValueError: it is on other layers, or the weights were changed since.
    """
    if patched:
        raise ValueError(
            "LoRAs or patches were put on this model after the report was made; disconnect the "
            "report, or quantize the original again with the LoRAs on it"
        )
    actual = {
        format.bare(name): layout.padded_shape(*module.weight.shape)
        for name, module in layers.items()
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
