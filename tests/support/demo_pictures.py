"""Eight prompts on a trained model before and after quantizing, side by side in one picture.

The model is that of bench/emoji: 5.9 million parameters, pictures of 32 x 32 pixels. It is the only
trained image model that a fresh machine has.
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from statistics import fmean

import torch
from comfyui import TESTS, Server
from graphs import Graph, latents, saved_tensor
from PIL import Image, ImageDraw, ImageFont

from mxfp8.quant.reports import metrics
from mxfp8.quant.reports.conversion import MXFP8, Report, format_size

MODEL = TESTS / "models" / "emoji.safetensors"
NODES = TESTS / "comfy_nodes" / "mxfp8_test_nodes"  # a text encoder and a VAE for it
PROMPTS = (
    "smiling face with sunglasses", "face screaming in fear", "panda face", "fox face",
    "strawberry", "slice of pizza", "robot face", "jack-o-lantern",
)  # fmt: skip
# Others to calibrate on: rounding is judged on prompts and a seed that it was not chosen for.
CALIBRATION = (
    "grinning face", "winking face", "loudly crying face", "face with rolling eyes", "angry face",
    "kissing face", "tiger face", "cow face", "koala", "chicken", "tomato", "red apple",
    "watermelon", "sun with face", "skull", "large blue circle",
)  # fmt: skip
WIDTH = 128  # pixels for ComfyUI: a latent of 16 x 16, which is a picture of 32 x 32
_SAMPLER = {"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
_SEED, _STEPS = 7, 20

# Of the sheet, in pixels; a column in characters.
_ZOOM, _GAP, _MARGIN, _HEADER, _LABEL, _CAPTION, _COLUMN = 4, 16, 24, 44, 200, 76, 18
_PAPER, _INK, _PALE = "#ffffff", "#1f2328", "#656d76"


@dataclass(frozen=True)
class Similarity:
    """How close a picture is to that of the BF16 model.

    Attributes:
        latent_snr_db, psnr_db: None if it is identical.
        ssim: of the RGB pixels, as PSNR.
    """

    latent_snr_db: float | None
    psnr_db: float | None
    ssim: float

    def caption(self) -> list[str]:
        if self.latent_snr_db is None or self.psnr_db is None:
            return ["identical"]
        return [
            f"latent SNR {self.latent_snr_db:.1f} dB",
            f"PSNR {self.psnr_db:.1f} dB",
            f"SSIM {self.ssim:.4f}",
        ]


def mean_of(similarities: Sequence[Similarity]) -> Similarity:
    """The means, of pictures that are not identical."""
    columns = zip(*map(astuple, similarities), strict=True)
    return Similarity(*(fmean(x for x in column if x is not None) for column in columns))


@dataclass(frozen=True)
class Variant:
    """The model in one form, and what it drew.

    Attributes:
        details: its size, and what multiplies its layers on this machine.
        latents: [N, 16, 16, 16]; images: RGB [N, 32, 32, 3], 0 to 1.
    """

    title: str
    details: list[str]
    latents: torch.Tensor
    images: torch.Tensor

    def similarities(self, reference: Variant) -> list[Similarity]:
        """Of every picture to the reference's."""
        return [
            Similarity(
                metrics.snr_db(reference.latents[i], self.latents[i]),
                *metrics.quality(reference.images[i : i + 1], self.images[i : i + 1]),
            )
            for i in range(len(self.images))
        ]


def draw_variants(server: Server) -> list[Variant]:
    """The model as it is, rounded to nearest, calibrated, and calibrated with INT8 matmuls."""
    graph = Graph()
    loader = graph.loader(MODEL.name)
    clip, vae = graph.add("TestEmojiTextEncoder"), graph.add("TestEmojiVAE")
    prompts = _conditioning(graph, clip, PROMPTS)
    calibration = graph.add(
        "MXFP8Calibrate", model=loader, first_seed=1000, seeds=2, steps=_STEPS, preset="auto",
        **_conditioning(graph, clip, CALIBRATION), **_SAMPLER,
    )  # fmt: skip
    models = {
        "BF16": loader,
        "MXFP8, nearest": _quantized(graph, loader),
        "MXFP8, calibrated": _quantized(graph, loader, calibration=calibration),
        "calibrated, fast": _quantized(graph, loader, calibration=calibration, precision="fast"),
    }
    saved, reports = {}, {}
    for title, node in models.items():
        samples = graph.add("KSampler", model=node, seed=_SEED, steps=_STEPS, **prompts, **_SAMPLER)
        images = graph.add("VAEDecode", samples=samples, vae=vae)
        graph.add("TestSaveTensor", tensor=images, name=title)
        saved[title] = graph.save_latent(samples)
        reports[title] = graph.add("MXFP8BackendReport", model=node, measure=False, rows=640)
    outputs = server.run(graph)

    def details(title: str) -> list[str]:
        node, _ = models[title]
        if node == loader[0]:
            return [format_size(MODEL.stat().st_size)]
        conversion = Report.from_json(outputs[node]["mxfp8_report"][0])
        backends = json.loads(outputs[reports[title][0]]["mxfp8_report"][0])
        layers = (layer for layer in backends["layers"] if layer["decision"] == MXFP8)
        paths = Counter(f"{layer['backend']}, {layer['precision']}" for layer in layers)
        lines = (f"{count} layers: {path}" for path, count in paths.items())
        return [format_size(conversion.bytes_after), *lines]

    return [
        Variant(
            title,
            details(title),
            latents(outputs, saved[title], server.base),
            saved_tensor(server.base, title),
        )
        for title in models
    ]


def _conditioning(graph: Graph, clip: list, prompts: Sequence[str]) -> dict[str, list]:
    """The inputs of a sampler that draws every prompt once."""
    text = graph.add("CLIPTextEncode", clip=clip, text="\n".join(prompts))
    empty = graph.add("EmptySD3LatentImage", width=WIDTH, height=WIDTH, batch_size=len(prompts))
    return {"positive": text, "negative": text, "latent_image": empty}


def _quantized(graph: Graph, model: list, **options) -> list:
    options = {"precision": "exact", **options}
    return graph.add("MXFP8Quantize", model=model, preset="auto", **options)


def draw_sheet(variants: Sequence[Variant]) -> Image.Image:
    """A row for each variant, a column for each prompt, and under each picture how close it is."""
    side = variants[0].images.shape[1] * _ZOOM
    width = 2 * _MARGIN + _LABEL + (side + _GAP) * len(PROMPTS)
    first = _MARGIN + _HEADER  # which has no captions
    tops = [first, *(first + side + _GAP + i * (side + _CAPTION) for i in range(len(variants) - 1))]
    height = tops[-1] + side + _CAPTION
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)

    def text(left: int, top: int, lines: str, size: int = 13, color: str = _PALE) -> None:
        draw.multiline_text((left, top), lines, color, ImageFont.load_default(size), spacing=4)

    columns = [_MARGIN + _LABEL + index * (side + _GAP) for index in range(len(PROMPTS))]
    for left, prompt in zip(columns, PROMPTS, strict=True):
        text(left, _MARGIN, "\n".join(textwrap.wrap(prompt, _COLUMN)))
    for top, variant in zip(tops, variants, strict=True):
        text(_MARGIN, top, variant.title, 18, _INK)
        text(_MARGIN, top + 28, "\n".join(variant.details))
        similarities = variant.similarities(variants[0])
        for left, image, similarity in zip(columns, variant.images, similarities, strict=True):
            picture = Image.fromarray((image * 255).round().byte().numpy())
            sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, top))
            if variant is not variants[0]:
                text(left, top + side + 4, "\n".join(similarity.caption()))
    return sheet
