"""Inputs that several nodes have, and what those inputs mean."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io

from ..kernels.dispatch import PRECISIONS
from ..quant.conversion import policy
from .host import paths, settings

CATEGORY = "MXFP8"
NO_FILE = "none"

CalibrationType = io.Custom("MXFP8_CALIBRATION")
ComparisonType = io.Custom("MXFP8_COMPARISON")


class ModelNode(io.ComfyNode):
    """A node whose model runs LoRAs as the setting says; the setting is one of its inputs."""

    @classmethod
    def fingerprint_inputs(cls, **_):
        return settings.loras_beside()


def precision_input() -> io.Input:
    """The precision of MXFP8 layers, on every node that hands on a model that runs them."""
    return io.Combo.Input(
        "precision",
        options=list(PRECISIONS),
        default="auto",
        tooltip=(
            "exact: stored weights times unquantized activations. "
            "fast: activations are quantized too, for an 8-bit matmul: INT8 on RTX 20 to 40, "
            "RX 7000 and 9000, MI300, MI350, and CPUs with AVX-512 VNNI or AMX, "
            "FP8 on H100, MXFP8 on Blackwell. "
            "auto: fast on such GPUs, exact elsewhere, CPUs included. "
            "Layers that the file marks as full precision are always exact."
        ),
    )


def selection_inputs() -> list[io.Input]:
    """Preset, include and exclude: which layers become MXFP8."""
    return [
        io.Combo.Input(
            "preset",
            options=policy.presets(),
            default=policy.AUTO,
            extra_dict={"mxfp8_titles": policy.preset_titles()},  # web/mxfp8.js shows them
            tooltip=(
                "Which layers stay as they are. auto: the preset of the architecture that the "
                "tensor names show, which suits Z-Image-Turbo too, and embedders and final "
                "layers stay; none: quantize every linear; "
                "zimage-turbo: the recipe of the Z-Image-Turbo-MXFP8 model card, which keeps more."
            ),
        ),
        io.String.Input(
            "include",
            default="",
            optional=True,
            advanced=True,
            tooltip=(
                "Regular expression: quantize tensors whose name matches, even if the preset keeps "
                "them."
            ),
        ),
        io.String.Input(
            "exclude",
            default="",
            optional=True,
            advanced=True,
            tooltip="Regular expression: keep tensors whose name matches; it overrides the rest.",
        ),
    ]


def size_or_quality_input() -> io.Input:
    """What is asked for beside the preset; `models.budget.reach` keeps layers until it is there."""
    return io.String.Input(
        "size_or_quality",
        default="",
        optional=True,
        placeholder="55% / 50 dB",
        tooltip=(
            "The size of the file, as 6.5 GB or 55% of the original; or the quality of the latent, "
            "as 50 dB or 0.3% error. Layers that matter most for the picture stay unquantized "
            "until it is reached. Needs a calibration with sensitivity. Empty: the preset decides."
        ),
    )


def calibration_inputs() -> list[io.Input]:
    """The calibration to round the weights with, and one to measure the result on."""
    return [
        CalibrationType.Input(
            "calibration",
            optional=True,
            tooltip="From Calibrate (MXFP8): rounds the weights for the inputs that layers get.",
        ),
        CalibrationType.Input(
            "held_out",
            optional=True,
            tooltip=(
                "A second calibration, with other prompts or seeds: the report then has the output "
                "errors on these instead of on the data that the weights were rounded for."
            ),
        ),
    ]


def source_input() -> io.Input:
    """A model to convert, in the model folders."""
    return io.Combo.Input(
        "source",
        options=paths.list_sources(),
        tooltip="A BF16, FP16 or FP32 model in a model folder, in one file or several.",
    )


def target_input(suffix: str) -> io.Input:
    return io.String.Input(
        "target",
        default="",
        placeholder=f"*-{suffix}.safetensors",
        tooltip=(
            "Name of the new file in the same model folder. Empty: the source's name with "
            f"-{suffix}."
        ),
    )


def overwrite_input() -> io.Input:
    return io.Boolean.Input("overwrite", default=False, tooltip="Replace the target if it exists.")


def sampler_inputs(first_seed: io.Input, seeds: io.Input, sampler_note: str = "") -> list[io.Input]:
    """The inputs that `models.sampling.SamplerSettings` is made of.

    Args:
        first_seed, seeds: these two, which differ by node.
        sampler_note: what the tooltip of the sampler adds.
    """
    as_in = "As in KSampler."
    samplers, schedulers = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS
    return [
        io.Conditioning.Input("positive", tooltip="A prompt that is typical of your use."),
        io.Conditioning.Input("negative", tooltip=as_in),
        io.Latent.Input("latent_image", tooltip="An empty latent of the size that you use."),
        first_seed,
        seeds,
        io.Int.Input("steps", default=8, min=1, max=1000, tooltip=as_in),
        io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip=as_in),
        io.Combo.Input(
            "sampler_name", options=list(samplers), default="euler",
            tooltip=f"{as_in}{sampler_note}",
        ),
        io.Combo.Input(
            "scheduler", options=list(schedulers), default="simple", tooltip=as_in
        ),
        io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip=as_in),
    ]  # fmt: skip
