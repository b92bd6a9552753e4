"""Thumbnails of the example workflows: squares that ComfyUI's list of templates shows at 200 px.

Each has its number, one word, and a drawing of what the workflow is for. The sizes are the formats'
bits per weight (16, and 8 with a scale byte per 32); the errors are those of the report on trained
weights that the gallery shows, the curve is that of the trained image model.
"""

from __future__ import annotations

SIZE = 400  # px, twice what is shown
DRAWN_ERRORS, DRAWN_CURVE = "3", "6"  # the examples whose thumbnails show measurements
_BARS = 12  # layers that are drawn
_BLUE, _GRAY, _GREEN = "#3b8eea", "#8a8a8a", "#2f9e6e"
_PAGE = """
<style>
  * {{ box-sizing: border-box; margin: 0 }}
  body {{ width: {size}px; height: {size}px; background: #17181c; color: #fff;
    font: 600 46px "DejaVu Sans", system-ui, sans-serif; padding: 26px; overflow: hidden }}
  h1 {{ font-size: 42px; font-weight: 700; letter-spacing: -1px; white-space: nowrap }}
  h1 b {{ color: {blue}; margin-right: 14px }}
  svg {{ display: block; margin-top: 22px }}
  text {{ font: 600 30px "DejaVu Sans", sans-serif; fill: #fff }}
  .soft {{ fill: #b5b8c0 }}
</style>
<h1><b>{number}</b>{word}</h1>
<svg width="348" height="270" viewBox="0 0 348 270">{drawing}</svg>
"""


def page(
    name: str, errors: list[tuple[float, float]] = (), curve: list[tuple[float, float]] = ()
) -> str:
    """The page that is a thumbnail.

    Args:
        name: of the example, "MXFP8 <number> - ...".
        errors: (rounded to nearest, calibrated) of layers, for the chart of calibration.
        curve: (share of the original's size, dB) of choices, the smallest first; the second half of
            the layers that are kept is not drawn.
    """
    number = name.split()[1]
    if number == DRAWN_CURVE:
        return _page(number, "Choose", _curve(curve))
    if number == DRAWN_ERRORS:
        return _page(number, "Calibrate", _errors(errors))
    word, drawing = {
        "1": ("Run", _chain([("model.safetensors", _GRAY), ("Load (MXFP8)", _BLUE)], image=True)),
        "2": ("Quantize", _sizes("BF16", "MXFP8")),
        "4": ("Text encoder", _sizes("BF16", "MXFP8", letters=True)),
        "5": ("Accelerate", _chain([("Load", _GRAY), ("Accelerate", _BLUE), ("KSampler", _GRAY)])),
    }[number]
    return _page(number, word, drawing)


def _page(number: str, word: str, drawing: str) -> str:
    return _PAGE.format(size=SIZE, blue=_BLUE, number=number, word=word, drawing=drawing)


def _box(x: float, y: float, width: float, height: float, fill: str, radius: float = 8) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{fill}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" class="{kind}">{text}</text>'


def _sizes(before: str, after: str, letters: bool = False) -> str:
    """Two bars, 16 and 8.25 bits a weight."""
    full, half = 348, 348 * 8.25 / 16
    parts = [
        _text(0, 30, before, kind="soft"), _box(0, 44, full, 62, _GRAY), _text(16, 86, "16 bits"),
        _text(0, 156, after), _box(0, 170, half, 62, _BLUE), _text(14, 212, "8.25 bits"),
    ]  # fmt: skip
    if letters:
        parts.append('<text x="348" y="236" text-anchor="end" style="font-size: 92px">Aa</text>')
    return "".join(parts)


def _errors(errors: list[tuple[float, float]]) -> str:
    """A bar for each layer: outlined its error when rounded to nearest, filled when calibrated."""
    drawn = errors[:_BARS]
    step, most = 348 / len(drawn), max(nearest for nearest, _ in drawn)
    parts = []
    for index, (nearest, calibrated) in enumerate(drawn):
        x, outer, inner = index * step + 2, 200 * nearest / most, 200 * calibrated / most
        parts.append(f'<rect x="{x}" y="{200 - outer}" width="{step - 4}" height="{outer}" '
                     f'fill="none" stroke="{_GRAY}" stroke-width="2"/>')  # fmt: skip
        parts.append(_box(x, 200 - inner, step - 4, inner, _GREEN, 0))
    ratio = sum(calibrated / nearest for nearest, calibrated in errors) / len(errors)
    return "".join(parts) + _text(0, 246, f"{ratio:.2f}x the error")


def _curve(curve: list[tuple[float, float]]) -> str:
    """Quality over size, a point for each choice, and one of them marked."""
    drawn = curve[: len(curve) // 2 + 1]
    sizes, qualities = zip(*drawn, strict=True)

    def place(size: float, quality: float) -> tuple[float, float]:
        return (
            10 + 328 * (size - sizes[0]) / (sizes[-1] - sizes[0]),
            196 - 180 * (quality - qualities[0]) / (qualities[-1] - qualities[0]),
        )

    points = [place(*one) for one in drawn]
    line = " ".join(f"{x},{y}" for x, y in points)
    parts = [f'<polyline points="{line}" fill="none" stroke="{_BLUE}" stroke-width="5"/>']
    parts += [f'<circle cx="{x}" cy="{y}" r="7" fill="{_BLUE}"/>' for x, y in points]
    x, y = points[len(points) // 2]
    parts.append(f'<circle cx="{x}" cy="{y}" r="16" fill="{_GREEN}"/>')
    ends = (0, sizes[0], "start"), (348, sizes[-1], "end")
    return "".join(parts) + "".join(
        _text(left, 250, f"{100 * size:.0f}%", anchor, "soft") for left, size, anchor in ends
    )


def _chain(nodes: list[tuple[str, str]], image: bool = False) -> str:
    """Nodes below each other, joined by links; an image at the end."""
    parts, height = [], 62
    gap = (250 - 3 * height) / 2
    steps = [*nodes, ("", "")] if image else nodes
    for index, (label, color) in enumerate(steps):
        y = index * (height + gap)
        if index:
            parts.append(_box(172, y - gap, 5, gap, "#b39ddb", 0))
        if label:
            parts += [_box(0, y, 348, height, color), _text(174, y + 41, label, "middle")]
        else:
            parts.append(f'<g transform="translate(112 {y - 4})">{_PICTURE}</g>')
    return "".join(parts)


_PICTURE = (
    f'<rect width="124" height="80" rx="8" fill="#26303c" stroke="{_GRAY}" stroke-width="3"/>'
    '<circle cx="92" cy="24" r="11" fill="#f2c94c"/>'
    f'<path d="M8 72 44 30 70 58 86 44 116 72Z" fill="{_GREEN}"/>'
)
