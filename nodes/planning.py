"""A node that says what converting a file would do.

The browser has it executed for Convert File and the Quantize nodes when their inputs change
(`web/plan.mjs`), so that no route is needed: ComfyUI's queue runs it like any node.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io

from ..quant.budget.choice import choose
from ..quant.budget.target import parse
from ..quant.conversion import architectures, calibration, preview, text_encoders
from ..quant.conversion.convert import plan_source
from ..quant.conversion.policy import Plan, Selection
from ..quant.reports.verdict import say
from ..quant.sources.file import FileSource, StoredSource
from ..quant.sources.open import open_source
from .host import paths
from .host.progress import output
from .models.quantize import device
from .widgets import CATEGORY, selection_inputs, size_or_quality_input, source_input

_WHOLE, _MODEL, _ENCODERS = "whole file", "diffusion model", "text encoders"


class MXFP8PlanConversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8PlanConversion",
            display_name="Plan Conversion (MXFP8)",
            category=CATEGORY,
            description=(
                "Says what converting a file would do, from its header alone: the size after, "
                "which layers are kept and why, and the time and memory it takes. Nothing is "
                "written."
            ),
            search_aliases=["mxfp8", "dry run", "preview", "estimate size", "plan"],
            inputs=[
                source_input(),
                *selection_inputs(),
                io.Combo.Input(
                    "part",
                    options=[_WHOLE, _MODEL, _ENCODERS],
                    default=_WHOLE,
                    optional=True,
                    advanced=True,
                    tooltip="Which part of a checkpoint to count.",
                ),
                io.String.Input(
                    "target",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="As in Convert File, whose new file the plan then names.",
                ),
                size_or_quality_input(),
                io.String.Input(
                    "calibration_name",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "For a size or a quality: the calibration with sensitivity, a file in "
                        f"output/{paths.CALIBRATIONS}."
                    ),
                ),
            ],
            outputs=[io.String.Output(display_name="plan", tooltip="The plan as text.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        return float("nan")  # equal to none: the file may be another one by now

    @classmethod
    def execute(
        cls, source, preset, include="", exclude="", part=_WHOLE, target=None, size_or_quality="",
        calibration_name="",
    ):  # fmt: skip
        reached = []
        try:
            path = paths.source_path(source)
            with open_source(path) as opened:
                plan = _part(plan_source(opened, Selection(preset, include, exclude)), opened, part)
            if size_or_quality.strip():
                plan, line = _reach(plan, size_or_quality.strip(), calibration_name)
                reached = [line]
            new = "" if target is None else _target(path, source, target)
        except (ValueError, OSError) as error:
            text = str(error)
        else:
            sizes, *others = preview.summary(plan, preview.speed(device()), new).split("\n")
            text = "\n".join([sizes, *reached, *others])
        return output(cls, text, text)


def _reach(plan: Plan, wanted: str, calibration_name: str) -> tuple[Plan, str]:
    """The plan for a size or a quality, and what is predicted of it."""
    target = parse(wanted)
    if not calibration_name:
        later = say(
            "target [target]: what it keeps is known when the calibration is there", target=wanted
        )
        return plan, str(later)
    with FileSource(paths.calibration_path(calibration_name)) as file:
        sensitivity = calibration.read_sensitivity(file)
    if sensitivity is None:
        raise ValueError(
            f"{calibration_name} has no sensitivities, which a target needs; calibrate again with "
            "sensitivity on"
        )
    plan, chosen = choose(plan, sensitivity, target)
    return plan, chosen.summary()


def _target(path: Path, source: str, target: str) -> str:
    """What Convert File will write, and whether something has that name."""
    new = paths.target_beside(path, source, target, "mxfp8")
    name = paths.listed_name(source, new)
    return str(say("[file] (exists)", file=name)) if new.exists() else name


def _part(plan: Plan, source: StoredSource, part: str) -> Plan:
    """A plan's decisions on one part of a checkpoint."""
    if part == _WHOLE:
        return plan
    _, prefix = architectures.detect(source.tensors) or (None, "")
    prefixes = prefix if part == _MODEL else text_encoders.PREFIXES
    decisions = tuple(d for d in plan.decisions if d.key.startswith(prefixes))
    return replace(plan, decisions=decisions or plan.decisions)
