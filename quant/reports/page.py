"""A picture of charts, drawn with Pillow, which ComfyUI brings; it does not bring matplotlib.

Everything is drawn at twice the size and scaled down, because Pillow's lines have hard edges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

WIDTH = 1536  # pixels, as everything below
MARGIN = 32
SCALE = 2
PAPER, INK, PALE, GRID = "#ffffff", "#1f2328", "#656d76", "#e4e7eb"
LINE, BAND, RED = "#0b62d6", "#d6e6fb", "#b42318"


@dataclass(frozen=True)
class Axes:
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


class Page:
    """A drawing in units of the finished picture's pixels."""

    def __init__(self, width: int, height: int):
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def text(self, at, text: str, size: int = 16, color: str = INK, anchor: str = "la") -> None:
        font = ImageFont.load_default(size * SCALE)
        self._draw.text(_scaled(at), text, color, font, anchor=anchor)

    def fitted(self, at, text: str, width: float, size: int = 16, color: str = INK) -> None:
        """Text, cut off at a width."""
        font = ImageFont.load_default(size * SCALE)
        shown = text
        while font.getlength(shown) > width * SCALE:
            text = text[:-1]
            shown = text + "..."
        self.text(at, shown, size, color)

    def line(self, points, color: str, width: float = 1) -> None:
        coordinates = [_scaled(p) for p in points]
        self._draw.line(coordinates, color, round(width * SCALE), joint="curve")

    def rectangle(self, start, end, color: str) -> None:
        self._draw.rectangle([_scaled(start), _scaled(end)], color)

    def dot(self, at, color: str, radius: float = 5) -> None:
        x, y = at
        box = [_scaled((x - radius, y - radius)), _scaled((x + radius, y + radius))]
        self._draw.ellipse(box, color)


def _scaled(point) -> tuple[float, float]:
    return point[0] * SCALE, point[1] * SCALE


def draw_frame(
    page: Page, axes: Axes, titles, ticks: list[float], label: str, labels: dict[int, str]
) -> None:
    """What a chart has beside its data: titles at the left and right, a grid, labels of x."""
    page.text((axes.left - 72, axes.top - 44), titles[0], 18)
    page.text((axes.right, axes.top - 40), titles[1], 14, PALE, "ra")
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    for tick in ticks:
        y = axes.at(axes.x[0], tick)[1]
        page.line([(axes.left, y), (axes.right, y)], GRID)
        page.text((axes.left - 10, y), f"{tick:.{digits}f}", 14, PALE, "rm")
    page.line([(axes.left, axes.bottom), (axes.right, axes.bottom)], PALE)
    page.text(((axes.left + axes.right) / 2, axes.bottom + 30), label, 14, PALE, "ma")
    for x, text in labels.items():
        page.text((axes.at(x, ticks[0])[0], axes.bottom + 8), text, 14, PALE, "ma")


def ticks_of(low: float, high: float) -> list[float]:
    """Round values that enclose a range, spaced by 1, 2 or 5 times a power of ten."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= span / 4 * (1 - 1e-9))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * i for i in range(first, max(last, first + 1) + 1)]
