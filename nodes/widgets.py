"""The inputs by which nodes let a user choose layers."""

from __future__ import annotations

from comfy_api.latest import io

from ..quant.conversion import policy


def selection_inputs() -> list[io.Input]:
    """Preset, include and exclude: which layers become MXFP8."""
    return [
        io.Combo.Input(
            "preset",
            options=list(policy.presets()),
            default=policy.AUTO,
            tooltip=(
                "Which layers stay as they are. auto: the preset of the architecture that the "
                "keys show, which suits Z-Image-Turbo too; none: quantize every linear; "
                "zimage-turbo: the recipe of the Z-Image-Turbo-MXFP8 model card, which keeps more."
            ),
        ),
        io.String.Input(
            "include",
            default="",
            optional=True,
            advanced=True,
            tooltip="Regular expression: quantize keys it finds, even if the preset keeps them.",
        ),
        io.String.Input(
            "exclude",
            default="",
            optional=True,
            advanced=True,
            tooltip="Regular expression: keep keys it finds, whatever else is chosen.",
        ),
    ]
