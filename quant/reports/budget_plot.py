"""A budget's curve as one picture: size against predicted SNR, with other choices as points."""

from __future__ import annotations

from PIL import Image

from .budget import Budget, Point, snr
from .page import BAND, INK, LINE, MARGIN, PALE, RED, SCALE, WIDTH, Axes, Page, draw_frame, ticks_of
from .units import format_count, format_size

_HEIGHT, _TITLES = 720, 96  # pixels
_SHOWN = 0.97  # of the bytes between all MXFP8 and the original; the SNR goes up without end there
_MOST_LABELS = 24  # of points beside the curve
_LINE_HEIGHT = 18


def draw(budget: Budget) -> Image.Image:
    """Draw the picture, `page.WIDTH` pixels wide."""
    page = Page(WIDTH, _HEIGHT)
    room = WIDTH - 2 * MARGIN
    title = f"{budget.file}: what its size buys"
    page.fitted((MARGIN, MARGIN - 16), title, room, 24)
    basis = (
        f"rounding to nearest, predicted from {format_count(budget.runs, 'probe run')} on "
        f"{format_count(budget.samples, 'sample')}; the original has "
        f"{format_size(budget.bytes_before)}"
    )
    page.fitted((MARGIN, MARGIN + 20), basis, room, 16, PALE)
    if budget.chosen is not None:
        page.fitted((MARGIN, MARGIN + 42), budget.chosen.summary(), room, 16, RED)
    _draw_curve(page, budget)
    return page.image.reduce(SCALE)


def _draw_curve(page: Page, budget: Budget) -> None:
    chosen = [budget.chosen.point] if budget.chosen else []
    smallest = budget.curve[0].bytes
    most = smallest + _SHOWN * (budget.bytes_before - smallest)
    curve = [point for point in budget.curve if point.snr_db is not None]
    curve = [point for point in curve if point.bytes <= most] or curve[:1]
    others = [p for p in budget.others if p.snr_db is not None and p.bytes <= most]
    shown = [*curve, *others, *(point for point in chosen if point.snr_db is not None)]
    if not shown:
        page.text((WIDTH / 2, _HEIGHT / 2), "no layer loses anything", 18, PALE, "mm")
        return
    x = ticks_of(min(p.bytes for p in shown), max(p.bytes for p in shown))
    y = ticks_of(
        min(p.low if p.low is not None else p.snr_db for p in shown),
        max(p.high if p.high is not None else p.snr_db for p in shown),
    )
    box = MARGIN + 72, _TITLES + 60, WIDTH - MARGIN - 420, _HEIGHT - MARGIN - 48
    axes = Axes(*box, (x[0], x[-1]), (y[0], y[-1]))
    titles = "SNR of the model's output, dB", "bars: one standard error of the measurement"
    draw_frame(page, axes, titles, y, "size", {value: format_size(int(value)) for value in x})
    for point in curve:
        if point.low is not None:
            ends = [axes.at(point.bytes, limit) for limit in (point.low, point.high)]
            page.line(ends, BAND, 6)
    points = [axes.at(point.bytes, point.snr_db) for point in curve]
    page.line(points if len(points) > 1 else points * 2, LINE, 2.5)
    _draw_points(page, axes, others, chosen)


def _draw_points(page: Page, axes: Axes, others: list[Point], chosen: list[Point]) -> None:
    """Numbered dots, and what the numbers stand for at the right."""
    left, top = axes.right + 32, axes.top
    for point in chosen:
        if point.snr_db is not None:
            page.dot(axes.at(point.bytes, point.snr_db), RED, 7)
        page.dot((left + 6, top + 8), RED, 6)
        page.fitted((left + 24, top), str(point), WIDTH - MARGIN - left - 24, 14)
        top += 1.5 * _LINE_HEIGHT
    for number, point in enumerate(others[:_MOST_LABELS], 1):
        at = axes.at(point.bytes, point.snr_db)
        page.dot(at, INK, 5)
        page.text((at[0] + 8, at[1]), str(number), 14, INK, "lm")
        text = f"{number}  {point.label}, {format_size(point.bytes)}, {snr(point)}"
        page.fitted((left, top), text, WIDTH - MARGIN - left, 14, PALE)
        top += _LINE_HEIGHT
