"""What a size or a quality that a user asks for comes to: layers that stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...quant.budget.choice import choose, make_budget, sensitivity_of
from ...quant.budget.target import parse
from ...quant.conversion.calibration import Calibration
from ...quant.conversion.policy import Plan
from ...quant.reports.budget import Budget, Chosen
from ...quant.sources.file import Source

_KEY = "mxfp8_predicted_snr"  # of an attachment


@dataclass(frozen=True)
class Reached:
    """A plan, and what was asked for.

    Attributes:
        chosen, budget: what is predicted, and the whole curve; None if nothing was asked for.
    """

    plan: Plan
    chosen: Chosen | None = None
    budget: Budget | None = None

    @property
    def shown(self) -> dict[str, list[str]]:
        """The curve for the node's view."""
        return {} if self.budget is None else {"mxfp8_budget": [self.budget.to_json()]}


def reach(
    source: Source,
    plan: Plan,
    size_or_quality: str,
    calibration: Calibration | None,
    is_linear: Callable[[str], bool] | None = None,
) -> Reached:
    """The plan that reaches what was asked for; the plan itself if that is empty.

    Args:
        source: whose plan it is; is_linear: as for `plan_source`.

    Raises:
        ValueError: what was asked for is not understood or cannot be reached, or the calibration
            does not say how sensitive the layers are.
    """
    if not size_or_quality.strip():
        return Reached(plan)
    target = parse(size_or_quality)
    sensitivity = sensitivity_of(calibration, source)
    chosen_plan, chosen = choose(plan, sensitivity, target)
    budget = make_budget(source, plan, sensitivity, chosen, is_linear=is_linear)
    return Reached(chosen_plan, chosen, budget)


def keep_prediction(patcher, chosen: Chosen | None) -> None:
    """Have a ModelPatcher and its clones know the SNR that was predicted for their weights."""
    if chosen is not None and chosen.point.snr_db is not None:
        patcher.set_attachments(_KEY, chosen.point.snr_db)


def prediction(patcher) -> float | None:
    """The latent SNR in dB that was predicted for a ModelPatcher; None without one."""
    return patcher.get_attachment(_KEY)
