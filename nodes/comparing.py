"""A node that compares two models on the same seeds."""

from __future__ import annotations

import logging

import nodes as comfy_nodes
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..quant.reports import plot
from ..quant.reports.comparison import FEWEST, Comparison
from .host.progress import ending_shown, output
from .models.paired_sampling import check_pair, compare_models
from .models.sampling import SamplerSettings
from .widgets import CATEGORY, ComparisonType, sampler_inputs

logger = logging.getLogger(__name__)


class MXFP8CompareModels(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8CompareModels",
            display_name="Compare Models (MXFP8)",
            category=CATEGORY,
            description=(
                "Samples two models on the same seeds and reports how close their outputs are: the "
                "signal-to-noise ratio of the latents with an interval, the difference at each "
                "step, PSNR and SSIM of the images if a VAE is connected, time and memory of each "
                "model, and how much the reference differs from itself. Save Model and Save "
                "Checkpoint (MXFP8) can store the result in the file."
            ),
            search_aliases=["mxfp8", "compare", "quality", "psnr", "ssim", "snr"],
            inputs=[
                io.Model.Input("reference", tooltip="The original model."),
                io.Model.Input("model", tooltip="The model to compare with it."),
                *sampler_inputs(
                    io.Int.Input("first_seed", default=1000, min=0, max=0xFFFFFFFFFFFFFFFF,
                                 tooltip="The first seed; the others follow it. If the model was "
                                 "calibrated, use seeds that the calibration did not."),
                    io.Int.Input("seeds", default=4, min=1, max=64,
                                 tooltip="How many seeds to sample on each model; the reference "
                                 f"runs once more. From {FEWEST} on, means have an interval."),
                    " A sampler that draws noise of its own takes another run of each seed, for "
                    "the noise floor.",
                ),
                io.Vae.Input("vae", optional=True,
                             tooltip="Decodes the latents, for PSNR, SSIM and a picture of both."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="picture",
                    tooltip="With a VAE the images of both models side by side; then charts.",
                ),
                io.String.Output(display_name="summary", tooltip="The result as text."),
                io.String.Output(display_name="json", tooltip="Every seed and step, as JSON."),
                ComparisonType.Output(
                    display_name="comparison", tooltip="For Save Model or Save Checkpoint (MXFP8)."
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @ending_shown
    def execute(cls, reference, model, vae=None, **sampling) -> io.NodeOutput:
        check_pair(reference, model)
        settings = SamplerSettings(**sampling)
        decode = None if vae is None else _decoder(vae)
        comparison, images = compare_models(cls, reference, model, settings, decode)
        summary, text = comparison.summary(), comparison.to_json()
        logger.info("MXFP8: %s", summary)
        strips = [plot.make_strip(*map(_picture, pair)) for pair in images]
        picture = _tensor(plot.draw(comparison, strips))
        shown = {"mxfp8_images": [_pairs(cls, comparison, strips)]} if strips else {}
        return output(cls, summary, picture, summary, text, comparison, document=text, **shown)


def _decoder(vae):
    """Samples -> images [B, H, W, C], as the stock node decodes them."""
    return lambda samples: comfy_nodes.VAEDecode().decode(vae, {"samples": samples})[0]


def _pairs(node: type[io.ComfyNode], comparison: Comparison, strips: list[plot.Strip]) -> dict:
    """The images of the first seeds as files in ComfyUI's temp folder, for the report view."""
    pairs = []
    for seed, strip in zip(comparison.seeds, strips, strict=False):
        both = torch.cat([_tensor(strip.reference), _tensor(strip.model)])
        first, second = ui.PreviewImage(both, cls=node).as_dict()["images"]
        pairs.append({"name": f"seed {seed.seed}", "first": first, "second": second})
    return {"labels": comparison.labels, "pairs": pairs}


def _picture(image: torch.Tensor) -> Image.Image:
    """The first of some images [B, H, W, C] in 0..1; gray if it has one channel."""
    rgb = image[0, ..., :3].nan_to_num(0).clamp(0, 1)
    data = (rgb * 255).round().to(torch.uint8).expand(*rgb.shape[:2], 3)
    return Image.fromarray(data.contiguous().numpy(), "RGB")


def _tensor(picture: Image.Image) -> torch.Tensor:
    """A picture as ComfyUI's IMAGE, [1, H, W, 3] in 0..1."""
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.reshape(1, picture.height, picture.width, 3).float() / 255
