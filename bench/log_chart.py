"""Lines over categories on a logarithmic axis of percentages, as SVG for the documentation.

SVG, because its text can be compared with what the results give, and the standard library writes
it. It has its own background, for readers whose page is dark.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 590, 360  # px, of a panel
LEFT, RIGHT, TOP, BOTTOM = 96, 210, 60, 66
STYLE = (
    "text { font: 17px system-ui, sans-serif; fill: #1f2328; } .pale { fill: #656d76; } "
    ".title { font-size: 20px; font-weight: 600; } polyline { fill: none; stroke-width: 2.5; }"
)


@dataclass(frozen=True)
class Line:
    """A value above 0 for each category."""

    label: str
    color: str
    values: tuple[float, ...]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    lines: tuple[Line, ...]


def draw(panels: list[Panel], categories: list[str], across: str) -> str:
    """Panels side by side, with one axis for all; `across` is what the categories are."""
    values = [v for panel in panels for line in panel.lines for v in line.values]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * len(panels)}" '
        f'height="{HEIGHT}" viewBox="0 0 {WIDTH * len(panels)} {HEIGHT}">',
        f"<style>{STYLE}</style>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for index, panel in enumerate(panels):
        parts.append(f'<g transform="translate({WIDTH * index} 0)">')
        parts += _panel(panel, categories, across, low, high)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, categories: list[str], across: str, low: int, high: int):
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(index: int) -> float:
        return LEFT + (index + 0.5) * (right - LEFT) / len(categories)

    def y(value: float) -> float:
        return bottom - (math.log10(value) - low) / (high - low) * (bottom - TOP)

    yield _text(LEFT, 32, panel.title, kind="title")
    for power in range(low, high + 1):
        at = y(10.0**power)
        yield f'<path d="M{LEFT} {at:.1f}H{right}" stroke="#e4e7eb"/>'
        yield _text(LEFT - 8, at + 6, f"{100 * 10.0**power:g}%", "end", "pale")
    for index, name in enumerate(categories):
        yield _text(x(index), bottom + 25, name, "middle", "pale")
    yield _text((LEFT + right) / 2, bottom + 52, across, "middle", "pale")
    for line in panel.lines:
        points = [(x(i), y(v)) for i, v in enumerate(line.values)]
        drawn = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        yield f'<polyline points="{drawn}" stroke="{line.color}"{dash}/>'
        for a, b in points:
            yield f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{line.color}"/>'
        yield _text(points[-1][0] + 12, points[-1][1] + 6, line.label)


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    extra = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'
