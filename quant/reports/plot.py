"""A comparison as one picture: the verdict, the images if a VAE decoded any, and two charts.

Drawn with Pillow, which ComfyUI brings; it does not bring matplotlib. Everything is drawn at twice
the size and scaled down, because Pillow's lines have hard edges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps

from .comparison import Comparison, interval
from .verdict import BAD

WIDTH = 1536  # pixels, as everything below
_TITLES, _CHART, _STRIP = 96, 400, 512
_MARGIN, _GAP = 32, 24
_SCALE = 2
_PAPER, _INK, _PALE, _GRID = "#ffffff", "#1f2328", "#656d76", "#e4e7eb"
_LINE, _BAND = "#0b62d6", "#d6e6fb"
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


@dataclass(frozen=True)
class _Axes:
    """A chart's rectangle on the page in pixels, and the ranges of x and y that it shows."""

    left: float
    top: float
    right: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return (
            self.left + across * (self.right - self.left),
            self.bottom - up * (self.bottom - self.top),
        )


class _Page:
    """A drawing in units of the finished picture's pixels."""

    def __init__(self, width: int, height: int):
        self.image = Image.new("RGB", (width * _SCALE, height * _SCALE), _PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def text(self, at, text: str, size: int = 16, color: str = _INK, anchor: str = "la") -> None:
        font = ImageFont.load_default(size * _SCALE)
        self._draw.text(_scaled(at), text, color, font, anchor=anchor)

    def fitted(self, at, text: str, width: float, size: int = 16, color: str = _INK) -> None:
        """Text, cut off at a width."""
        font = ImageFont.load_default(size * _SCALE)
        shown = text
        while font.getlength(shown) > width * _SCALE:
            text = text[:-1]
            shown = text + "..."
        self.text(at, shown, size, color)

    def line(self, points, color: str, width: float = 1) -> None:
        coordinates = [_scaled(p) for p in points]
        self._draw.line(coordinates, color, round(width * _SCALE), joint="curve")

    def rectangle(self, start, end, color: str) -> None:
        self._draw.rectangle([_scaled(start), _scaled(end)], color)

    def dot(self, at, color: str, radius: float = 5) -> None:
        x, y = at
        box = [_scaled((x - radius, y - radius)), _scaled((x + radius, y + radius))]
        self._draw.ellipse(box, color)


def _scaled(point) -> tuple[float, float]:
    return point[0] * _SCALE, point[1] * _SCALE


def draw(comparison: Comparison, strips: Sequence[Strip] = ()) -> Image.Image:
    """Draw the picture, WIDTH pixels wide.

    Args:
        strips: the images of the first seeds, if a VAE decoded them.
    """
    page = _Page(WIDTH, _TITLES + _CHART + 2 * _MARGIN)
    _draw_titles(page, comparison)
    top, bottom = _TITLES + 60, _TITLES + _CHART
    middle = WIDTH * 0.56
    _draw_steps(page, comparison, (_MARGIN + 72, top, middle, bottom))
    _draw_seeds(page, comparison, (middle + 120, top, WIDTH - _MARGIN, bottom))
    drawn = page.image.reduce(_SCALE)
    return _with_strips(drawn, strips, comparison.labels) if strips else drawn


def make_strip(reference: Image.Image, model: Image.Image) -> Strip:
    """The two images and their difference, amplified as far as 8 bits allow."""
    difference = ImageChops.difference(reference, model)
    largest = max(high for _, high in difference.getextrema())
    factor = next((f for f in _AMPLIFY if f * largest <= 255), 1)
    return Strip(reference, model, difference.point(lambda value: value * factor), factor)


def _draw_titles(page: _Page, comparison: Comparison) -> None:
    room = WIDTH - 2 * _MARGIN
    verdict, setting = comparison.verdict, comparison.setting
    color = "#b42318" if verdict.level == BAD else _INK
    page.fitted((_MARGIN, _MARGIN - 16), verdict.text, room, 24, color)
    page.fitted((_MARGIN, _MARGIN + 20), comparison.title(), room, 16, _PALE)
    page.fitted((_MARGIN, _MARGIN + 42), f"{setting}, {setting.device}", room, 16, _PALE)


def _draw_steps(page: _Page, comparison: Comparison, box) -> None:
    """Divergence by step, from 0: the mean over seeds, and the worst seed in a lighter color."""
    title = "Relative difference of the predictions"
    steps, count = comparison.steps, len(comparison.steps)
    if not steps:
        _placeholder(page, box, title, "not measured")
        return
    ticks = _ticks(0, max(step.worst for step in steps) or 1.0)
    axes = _Axes(*box, (1, count) if count > 1 else (0, 2), (0, ticks[-1]))
    numbers = range(1, count + 1, math.ceil(count / _MOST_LABELS))
    legend = "mean over seeds, and the worst seed (lighter)"
    _draw_frame(page, axes, (title, legend), ticks, "sampler step", {n: str(n) for n in numbers})
    for name, color in (("worst", "#9fc3f2"), ("divergence", _LINE)):
        points = [axes.at(i, getattr(step, name)) for i, step in enumerate(steps, 1)]
        page.line(points if count > 1 else points * 2, color, 2.5)
        for point in points if count <= 32 else ():
            page.dot(point, color, 4)


def _draw_seeds(page: _Page, comparison: Comparison, box) -> None:
    """Latent SNR: a dot for each seed, the mean as a line, its interval as a band."""
    title, mean = "Latent SNR by seed", comparison.latent_snr_db
    if mean is None:
        reason = "identical on every seed" if comparison.identical else "not measured"
        _placeholder(page, box, title, reason)
        return
    seeds = [seed for seed in comparison.seeds if seed.latent_snr_db is not None]
    values = [seed.latent_snr_db for seed in seeds]
    band = [limit for limit in (mean.low, mean.high) if limit is not None]
    ticks = _ticks(min(values + band), max(values + band))
    axes = _Axes(*box, (0.5, len(seeds) + 0.5), (ticks[0], ticks[-1]))
    stride = math.ceil(len(seeds) / (_MOST_LABELS if seeds[-1].seed < 10**5 else 3))
    labels = {i + 1: str(seeds[i].seed) for i in range(0, len(seeds), stride)}
    _draw_frame(page, axes, (title, interval(mean, "dB")), ticks, "seed", labels)
    if band:
        low, high = (axes.at(1, limit)[1] for limit in band)
        page.rectangle((axes.left, high), (axes.right, low), _BAND)
    middle = axes.at(1, mean.mean)[1]
    page.line([(axes.left, middle), (axes.right, middle)], _LINE, 2)
    for i, value in enumerate(values, 1):
        page.dot(axes.at(i, value), _INK)


def _draw_frame(
    page: _Page, axes: _Axes, titles, ticks: list[float], label: str, labels: dict[int, str]
) -> None:
    """What a chart has beside its data: titles at the left and right, a grid, labels of x."""
    page.text((axes.left - 72, axes.top - 44), titles[0], 18)
    page.text((axes.right, axes.top - 40), titles[1], 14, _PALE, "ra")
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    for tick in ticks:
        y = axes.at(axes.x[0], tick)[1]
        page.line([(axes.left, y), (axes.right, y)], _GRID)
        page.text((axes.left - 10, y), f"{tick:.{digits}f}", 14, _PALE, "rm")
    page.line([(axes.left, axes.bottom), (axes.right, axes.bottom)], _PALE)
    page.text(((axes.left + axes.right) / 2, axes.bottom + 30), label, 14, _PALE, "ma")
    for x, text in labels.items():
        page.text((axes.at(x, ticks[0])[0], axes.bottom + 8), text, 14, _PALE, "ma")


def _placeholder(page: _Page, box, title: str, text: str) -> None:
    left, top, right, bottom = box
    page.text((left - 72, top - 44), title, 18)
    page.rectangle((left - 72, top), (right, bottom), "#f6f8fa")
    page.text(((left - 72 + right) / 2, (top + bottom) / 2), text, 18, _PALE, "mm")


def _ticks(low: float, high: float) -> list[float]:
    """Round values that enclose a range, spaced by 1, 2 or 5 times a power of ten."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= span / 4 * (1 - 1e-9))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


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
    image = Image.new("RGB", (WIDTH, height), _PAPER)
    top = 0
    titles = page.crop((0, 0, WIDTH, _TITLES))
    charts = page.crop((0, _TITLES, WIDTH, page.height))
    for part in (titles, *rows, charts):
        image.paste(part, (0, top))
        top += part.height
    return image


def _row(named: Sequence[tuple[str, Image.Image]], columns: int) -> Image.Image:
    """Pictures side by side, each under its label."""
    room = (WIDTH - 2 * _MARGIN - (columns - 1) * _GAP) // columns, _STRIP
    first = named[0][1]
    small = first.width < room[0] and first.height < room[1]
    # Of a small image, visible pixels are better than blur.
    resampling = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    pictures = [ImageOps.contain(picture, room, resampling) for _, picture in named]
    image = Image.new("RGB", (WIDTH, 28 + pictures[0].height + _GAP), _PAPER)
    draw = ImageDraw.Draw(image)
    for index, ((label, _), picture) in enumerate(zip(named, pictures, strict=True)):
        left = _MARGIN + index * (room[0] + _GAP)
        draw.text((left, 2), label, _INK, ImageFont.load_default(16))
        image.paste(picture, (left, 28))
    return image
