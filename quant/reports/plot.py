"""A comparison as one picture: the verdict, the images if a VAE decoded any, and two charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps

from .comparison import Comparison, interval
from .page import (
    BAND,
    INK,
    LINE,
    MARGIN,
    PALE,
    PAPER,
    RED,
    SCALE,
    WIDTH,
    Axes,
    Page,
    draw_frame,
    ticks_of,
)
from .verdict import BAD

_TITLES, _CHART, _STRIP = 96, 400, 512  # pixels
_GAP = 24
_MOST_OTHERS = 3  # seeds beside the first whose images are drawn
_MOST_LABELS = 9  # along an axis
_AMPLIFY = (64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Strip:
    """The images of one seed, RGB, and the factor by which their difference is amplified."""

    reference: Image.Image
    model: Image.Image
    difference: Image.Image
    factor: int


def draw(comparison: Comparison, strips: Sequence[Strip] = ()) -> Image.Image:
    """Draw the picture, WIDTH pixels wide.

    Args:
        strips: the images of the first seeds, if a VAE decoded them.
    """
    page = Page(WIDTH, _TITLES + _CHART + 2 * MARGIN)
    _draw_titles(page, comparison)
    top, bottom = _TITLES + 60, _TITLES + _CHART
    middle = WIDTH * 0.56
    _draw_steps(page, comparison, (MARGIN + 72, top, middle, bottom))
    _draw_seeds(page, comparison, (middle + 120, top, WIDTH - MARGIN, bottom))
    drawn = page.image.reduce(SCALE)
    return _with_strips(drawn, strips, comparison.labels) if strips else drawn


def make_strip(reference: Image.Image, model: Image.Image) -> Strip:
    """The two images and their difference, amplified as far as 8 bits allow."""
    difference = ImageChops.difference(reference, model)
    largest = max(high for _, high in difference.getextrema())
    factor = next((f for f in _AMPLIFY if f * largest <= 255), 1)
    return Strip(reference, model, difference.point(lambda value: value * factor), factor)


def _draw_titles(page: Page, comparison: Comparison) -> None:
    room = WIDTH - 2 * MARGIN
    verdict, setting = comparison.verdict, comparison.setting
    color = RED if verdict.level == BAD else INK
    page.fitted((MARGIN, MARGIN - 16), verdict.text, room, 24, color)
    page.fitted((MARGIN, MARGIN + 20), comparison.title(), room, 16, PALE)
    page.fitted((MARGIN, MARGIN + 42), f"{setting}, {setting.device}", room, 16, PALE)


def _draw_steps(page: Page, comparison: Comparison, box) -> None:
    """Divergence by step, from 0: the mean over seeds, and the worst seed in a lighter color."""
    title = "Relative difference of the predictions"
    steps, count = comparison.steps, len(comparison.steps)
    if not steps:
        _placeholder(page, box, title, "not measured")
        return
    ticks = ticks_of(0, max(step.worst for step in steps) or 1.0)
    axes = Axes(*box, (1, count) if count > 1 else (0, 2), (0, ticks[-1]))
    numbers = range(1, count + 1, math.ceil(count / _MOST_LABELS))
    legend = "mean over seeds, and the worst seed (lighter)"
    draw_frame(page, axes, (title, legend), ticks, "sampler step", {n: str(n) for n in numbers})
    for name, color in (("worst", "#9fc3f2"), ("divergence", LINE)):
        points = [axes.at(i, getattr(step, name)) for i, step in enumerate(steps, 1)]
        page.line(points if count > 1 else points * 2, color, 2.5)
        for point in points if count <= 32 else ():
            page.dot(point, color, 4)


def _draw_seeds(page: Page, comparison: Comparison, box) -> None:
    """Latent SNR: a dot for each seed, the mean as a line, its interval as a band."""
    title, mean = "Latent SNR by seed", comparison.latent_snr_db
    if mean is None:
        reason = "identical on every seed" if comparison.identical else "not measured"
        _placeholder(page, box, title, reason)
        return
    seeds = [seed for seed in comparison.seeds if seed.latent_snr_db is not None]
    values = [seed.latent_snr_db for seed in seeds]
    band = [limit for limit in (mean.low, mean.high) if limit is not None]
    ticks = ticks_of(min(values + band), max(values + band))
    axes = Axes(*box, (0.5, len(seeds) + 0.5), (ticks[0], ticks[-1]))
    stride = math.ceil(len(seeds) / (_MOST_LABELS if seeds[-1].seed < 10**5 else 3))
    labels = {i + 1: str(seeds[i].seed) for i in range(0, len(seeds), stride)}
    draw_frame(page, axes, (title, interval(mean, "dB")), ticks, "seed", labels)
    if band:
        low, high = (axes.at(1, limit)[1] for limit in band)
        page.rectangle((axes.left, high), (axes.right, low), BAND)
    middle = axes.at(1, mean.mean)[1]
    page.line([(axes.left, middle), (axes.right, middle)], LINE, 2)
    for i, value in enumerate(values, 1):
        page.dot(axes.at(i, value), INK)


def _placeholder(page: Page, box, title: str, text: str) -> None:
    left, top, right, bottom = box
    page.text((left - 72, top - 44), title, 18)
    page.rectangle((left - 72, top), (right, bottom), "#f6f8fa")
    page.text(((left - 72 + right) / 2, (top + bottom) / 2), text, 18, PALE, "mm")


def _with_strips(page: Image.Image, strips: Sequence[Strip], labels: Sequence[str]) -> Image.Image:
    """The page with the images between its titles and its charts: the first seed's with their
    difference, and smaller the next ones'."""
    first, *others = strips
    named = [*zip(labels, (first.reference, first.model), strict=True),
             (f"difference, amplified {first.factor}x", first.difference)]  # fmt: skip
    rows = [_row(named, len(named))]
    rest = [
        (label, picture)
        for strip in others[:_MOST_OTHERS]
        for label, picture in zip(labels, (strip.reference, strip.model), strict=True)
    ]
    if rest:
        rows.append(_row(rest, max(len(rest), 4)))
    height = page.height + sum(row.height for row in rows)
    image = Image.new("RGB", (WIDTH, height), PAPER)
    top = 0
    titles = page.crop((0, 0, WIDTH, _TITLES))
    charts = page.crop((0, _TITLES, WIDTH, page.height))
    for part in (titles, *rows, charts):
        image.paste(part, (0, top))
        top += part.height
    return image


def _row(named: Sequence[tuple[str, Image.Image]], columns: int) -> Image.Image:
    """Pictures side by side, each under its label."""
    room = (WIDTH - 2 * MARGIN - (columns - 1) * _GAP) // columns, _STRIP
    first = named[0][1]
    small = first.width < room[0] and first.height < room[1]
    # Of a small image, visible pixels are better than blur.
    resampling = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    pictures = [ImageOps.contain(picture, room, resampling) for _, picture in named]
    image = Image.new("RGB", (WIDTH, 28 + pictures[0].height + _GAP), PAPER)
    draw = ImageDraw.Draw(image)
    for index, ((label, _), picture) in enumerate(zip(named, pictures, strict=True)):
        left = MARGIN + index * (room[0] + _GAP)
        draw.text((left, 2), label, INK, ImageFont.load_default(16))
        image.paste(picture, (left, 28))
    return image
