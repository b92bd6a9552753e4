"""A node that compares two models on the same seeds."""

from __future__ import annotations

import logging

import comfy.model_management
import comfy.samplers
import comfyui_version
import nodes as comfy_nodes
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..quant.reports import plot
from ..quant.reports.comparison import Comparison, Setting, mean_of
from ..quant.version import version
from .host.progress import Progress, show
from .loading import CATEGORY
from .models.paired_sampling import Paired, Settings, check_pair

logger = logging.getLogger(__name__)

ComparisonType = io.Custom("MXFP8_COMPARISON")
_FEWEST = 4  # seeds; an interval over fewer says nothing


class MXFP8Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8Compare",
            display_name="Compare Models (MXFP8)",
            category=CATEGORY,
            description=(
                "Samples two models on the same seeds and says how near their outputs are: the "
                "latents' signal-to-noise ratio with an interval, the difference at each step, "
                "PSNR and SSIM of images if a VAE is connected, time and memory of each, and what "
                "the reference differs from itself by. Save Model (MXFP8) can keep the result in "
                "the file."
            ),
            search_aliases=["mxfp8", "compare", "quality", "psnr", "ssim", "snr"],
            inputs=[
                io.Model.Input("reference", tooltip="The original model."),
                io.Model.Input("model", tooltip="The model to hold against it."),
                io.Conditioning.Input("positive", tooltip="A prompt as you use them."),
                io.Conditioning.Input("negative", tooltip="What KSampler would be given."),
                io.Latent.Input("latent_image", tooltip="Of the size that you use."),
                io.Int.Input("first_seed", default=1000, min=0, max=0xFFFFFFFFFFFFFFFF,
                             tooltip="The others follow it. If the model was "
                             "calibrated, take seeds that the calibration did not."),
                io.Int.Input("seeds", default=_FEWEST, min=_FEWEST, max=64,
                             tooltip="How many seeds are sampled on each model, and one more on "
                             "the reference. The 95% interval is too narrow for few: with four "
                             "it holds the true mean about four times in five."),
                io.Int.Input("steps", default=8, min=1, max=1000, tooltip="As in KSampler."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1,
                               tooltip="As in KSampler."),
                io.Combo.Input("sampler_name", options=list(comfy.samplers.KSampler.SAMPLERS),
                               default="euler",
                               tooltip="As in KSampler. One that draws noise of its own takes a "
                               "run more for each seed, for the noise floor."),
                io.Combo.Input("scheduler", options=list(comfy.samplers.KSampler.SCHEDULERS),
                               default="simple", tooltip="As in KSampler."),
                io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01,
                               tooltip="As in KSampler."),
                io.Vae.Input("vae", optional=True,
                             tooltip="Decodes the latents, for PSNR, SSIM and a picture of both."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="picture",
                    tooltip="Charts, and the first seed's images side by side if there is a VAE.",
                ),
                io.String.Output(display_name="summary", tooltip="The result in words."),
                io.String.Output(display_name="json", tooltip="Every seed and step: JSON."),
                ComparisonType.Output(display_name="comparison", tooltip="For Save Model."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, reference, model, positive, negative, latent_image, first_seed, seeds, steps, cfg,
        sampler_name, scheduler, denoise, vae=None,
    ) -> io.NodeOutput:  # fmt: skip
        check_pair(reference, model)
        settings = Settings(
            steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise
        )
        decode = None if vae is None else _decoder(vae)
        paired = Paired(reference, model, settings, decode, Progress(cls, rate=False))
        paired.run([(first_seed + number) % 2**64 for number in range(seeds)])
        found = compare(paired, settings, model)
        summary, text = found.summary(), found.to_json()
        logger.info("MXFP8: %s", summary)
        show(cls, summary)
        picture = _tensor(plot.draw(found, _strip(paired)))
        shown = ui.PreviewImage(picture, cls=cls).as_dict()
        return io.NodeOutput(
            picture, summary, text, found,
            ui={**shown, "text": [summary], "mxfp8_report": [text]},
        )  # fmt: skip


def compare(paired: Paired, settings: Settings, patcher) -> Comparison:
    """What came of a comparison that has run."""
    reference, model = paired.sides
    device = patcher.load_device
    notes = list(paired.notes)
    if device.type != "cuda":
        notes.append(f"peak memory was not measured: {device} does not count it")
    elif patcher.is_dynamic():
        notes.append("peak memory is torch's count; dynamic VRAM may hold weights beside it")
    if paired.floor() is None:
        notes.append("no noise floor was measured: the reference's output cannot be compared")
    return Comparison(
        reference=reference,
        model=model,
        setting=Setting(
            sampler=settings.sampler,
            scheduler=settings.scheduler,
            steps=settings.steps,
            cfg=settings.cfg,
            denoise=settings.denoise,
            latent_shape=paired.shape,
            device=comfy.model_management.get_torch_device_name(device),
            versions={
                "torch": torch.__version__,
                "ComfyUI": comfyui_version.__version__,
                "MXFP8": version(),
            },
        ),
        latent_snr_db=mean_of([seed.latent_snr_db for seed in paired.seeds]),
        psnr_db=mean_of([seed.psnr_db for seed in paired.seeds]),
        ssim=mean_of([seed.ssim for seed in paired.seeds]),
        floor=paired.floor(),
        steps=tuple(paired.steps()),
        seeds=tuple(paired.seeds),
        notes=tuple(notes),
    )


def check_comparison(comparison, patcher_fingerprint: str | None) -> None:
    """Check that a comparison was measured on these weights.

    Raises:
        ValueError: it was measured on others, or the weights are not those that a file would hold.
    """
    if patcher_fingerprint is None:
        raise ValueError(
            "a comparison belongs to MXFP8 layers as they are; this model has none, or LoRAs or "
            "patches on it that saving bakes in. Save it, load that file, and compare that"
        )
    if comparison.model.fingerprint != patcher_fingerprint:
        raise ValueError(
            "this comparison was measured on other weights; connect the model that was compared"
        )


def _decoder(vae):
    """Samples -> images [B, H, W, C], as the stock node decodes them."""
    return lambda samples: comfy_nodes.VAEDecode().decode(vae, {"samples": samples})[0]


def _strip(paired: Paired) -> plot.Strip | None:
    if paired.images is None:
        return None
    return plot.make_strip(*map(_picture, paired.images))


def _picture(image: torch.Tensor) -> Image.Image:
    """The first of some images [B, H, W, C] in 0..1; grey if it has one channel."""
    rgb = image[0, ..., :3].nan_to_num(0).clamp(0, 1)
    data = (rgb * 255).round().to(torch.uint8).expand(*rgb.shape[:2], 3)
    return Image.fromarray(data.contiguous().numpy(), "RGB")


def _tensor(picture: Image.Image) -> torch.Tensor:
    """A picture as ComfyUI's IMAGE, [1, H, W, 3] in 0..1."""
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.reshape(1, picture.height, picture.width, 3).float() / 255
