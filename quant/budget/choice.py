"""Which layers stay as they are so that a target is reached, and the curve of all such choices.

The layers that a selection quantizes may be kept, except those that the user's `include` names;
whatever the selection keeps stays kept. A choice is the cheapest set that reaches a quality, or the
best that fits a size, by dynamic programming (`Front`). It depends on nothing but the plan, the
sensitivities and the target.

The curve shows the sets that take one layer after the other, most damage per byte first. These
alone were rejected as choices: where one large layer did not fit, they left up to 5 times the
damage of the best set, among 10 layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..container.header import FormatError, first_of
from ..conversion import policy
from ..conversion.calibration import Calibration, check_model
from ..conversion.convert import plan_source
from ..conversion.policy import Decision, Plan
from ..conversion.stored import stored_bytes
from ..format import bare
from ..reports.budget import Budget, Chosen, LayerDamage, Point, make_point, snr
from ..reports.units import format_count, format_size
from ..sources.file import Source
from .patterns import patterns
from .sensitivity import Damages, Sensitivity
from .target import Target

_MOST_NAMED = 4
_MOST_SETS = 1 << 14


@dataclass(frozen=True)
class Layer:
    """A layer that may stay as it is.

    Attributes:
        decision: of its weight.
        damage: of rounding it.
        cost: bytes that keeping it takes, beside MXFP8; 0 or less for small ones, because of
            padding and markers.
    """

    decision: Decision
    damage: float
    cost: int

    @property
    def name(self) -> str:
        return bare(self.decision.layer)

    @property
    def rank(self) -> tuple:
        """Most damage per byte first; the name decides where that is the same."""
        density = self.damage / self.cost if self.cost > 0 else float("inf")
        return -density, self.cost, self.name


class Front:
    """The sets of layers that no other set beats in both bytes and damage, cheapest first.

    Layers are taken in one after the other, and sets that are beaten are dropped (Nemhauser and
    Ullmann, https://doi.org/10.1287/mnsc.15.9.494). Where more than `_MOST_SETS` are left, those
    of nearly the same size are thinned out to the best one.

    Args:
        layers: all of a cost above 0.
    """

    def __init__(self, layers: list[Layer]):
        self._layers = layers
        self._origins: list[torch.Tensor] = []  # of a set: the one that it was made of
        self._costs = torch.zeros(1, dtype=torch.int64)
        self._gains = torch.zeros(1, dtype=torch.float64)
        for layer in layers:
            self._add(layer)

    def _add(self, layer: Layer) -> None:
        costs = torch.cat([self._costs, self._costs + layer.cost])
        gains = torch.cat([self._gains, self._gains + layer.damage])
        order = gains.argsort(descending=True, stable=True)
        order = order[costs[order].argsort(stable=True)]  # by cost, the best of equal ones first
        best = gains[order].cummax(0).values
        order = order[torch.cat([torch.ones(1, dtype=torch.bool), best[1:] > best[:-1]])]
        if len(order) > _MOST_SETS:
            place = costs[order] * _MOST_SETS // (costs[order[-1]] + 1)
            last = torch.ones(len(order), dtype=torch.bool)
            last[1:-1] = place[1:-1] != place[2:]
            order = order[last]
        self._costs, self._gains = costs[order], gains[order]
        self._origins.append(order)

    def from_gain(self, gain: float) -> Iterator[list[Layer]]:
        """The sets of about this damage and of more."""
        first = int((self._gains < gain * (1 - 1e-9)).sum())  # sums in another order may be above
        return map(self._set, range(min(first, len(self._gains) - 1), len(self._gains)))

    def within(self, cost: int) -> list[Layer]:
        """The best set of at most this cost."""
        return self._set(int((self._costs <= cost).sum()) - 1)

    def _set(self, index: int) -> list[Layer]:
        found = []
        counts = [1, *map(len, self._origins)]
        for layer, origins, count in reversed(
            list(zip(self._layers, self._origins, counts, strict=False))
        ):
            index = int(origins[index])
            if index >= count:
                index -= count
                found.append(layer)
        return found[::-1]


class Problem:
    """A plan, what its layers cost and what their damage is.

    Attributes:
        bytes_before, smallest: of all tensors: the original's, and with all layers in MXFP8.
        layers: that may be kept, most damage per byte first.
        bound: names of those that `include` quantizes.
        unmeasured: names of those whose damage is not known; they are quantized.
    """

    def __init__(self, plan: Plan, damages: Damages):
        self.plan = plan
        self.damages = damages
        self.bytes_before = sum(d.nbytes for d in plan.decisions)
        self.smallest = stored_bytes(plan)
        layers, self.bound, self.unmeasured = [], [], []
        for decision in plan.quantized:
            name = bare(decision.layer)
            if name not in damages.values:
                self.unmeasured.append(name)
            elif decision.reason.startswith(policy.INCLUDED):
                self.bound.append(name)
            else:
                alone = stored_bytes(replace(plan, decisions=(decision,)))
                layers.append(Layer(decision, damages.values[name], decision.nbytes - alone))
        self.layers = sorted(layers, key=lambda layer: layer.rank)
        if not plan.quantized:
            raise ValueError(
                "a target needs layers to choose from, and none would be quantized; give another "
                "preset, or less in exclude"
            )
        if not self.layers and not self.bound:
            raise ValueError(
                "the calibration has sensitivities for none of the layers that would be quantized; "
                "calibrate again with the same preset, include and exclude"
            )

    @property
    def measured(self) -> list[str]:
        """Names of all quantized layers whose damage is known."""
        return [*(layer.name for layer in self.layers), *self.bound]

    def point(self, label: str, kept: Iterable[Layer]) -> Point:
        """The file in which some layers are kept."""
        kept = list(kept)
        rest = self._rest(kept)
        point = make_point(
            label,
            self.smallest + sum(layer.cost for layer in kept),
            len(kept),
            self.damages.total(rest),
            self.damages.deviation(rest),
        )
        return point if rest else replace(point, unmeasured=len(self.unmeasured))

    def _rest(self, kept: Iterable[Layer]) -> list[str]:
        """Names of the quantized layers whose damage is known."""
        names = {layer.name for layer in kept}
        return [name for name in self.measured if name not in names]

    def curve(self) -> list[Point]:
        """All in MXFP8, then each with one more layer kept."""
        every = self.layers
        names = ["all MXFP8", *(layer.name for layer in every)]
        return [self.point(name, every[:count]) for count, name in enumerate(names)]

    def choose(self, target: Target) -> list[Layer]:
        """The layers to keep.

        Raises:
            ValueError: the target cannot be reached, or only by the original; says what can.
        """
        kept = self._within(target) if target.is_size else self._as_good_as(target)
        if not self._rest(kept):
            if not self.unmeasured:
                raise self._unreachable(target, "only the original itself reaches it")
            if not target.is_size:
                left = format_count(len(self.unmeasured), "layer")
                raise self._unreachable(target, f"what rounding {left} does was not measured")
        return kept

    def _within(self, target: Target) -> list[Layer]:
        """The most damage that fits."""
        most = target.nbytes(self.bytes_before)
        left = most - self.smallest - sum(layer.cost for layer in self._free)
        if left < 0:
            least = most - left
            raise self._unreachable(target, f"all layers in MXFP8 are larger ({least} B)")
        if most >= self.bytes_before:
            raise self._unreachable(target, "the original itself is not larger; use it as it is")
        return self._free + self._front.within(left)

    def _as_good_as(self, target: Target) -> list[Layer]:
        """The fewest bytes."""
        if self._noise(self.layers) > target.noise:
            raise self._unreachable(target, "the layers that include names do more damage alone")
        if self._noise([]) <= target.noise:
            return []
        gain = self._noise(self._free) - target.noise
        found = (self._free + kept for kept in self._front.from_gain(gain))
        # The front lacks sets that differ by less than float64 tells; the curve goes to the end.
        curve = (self.layers[: count + 1] for count in range(len(self.layers)))
        return next(
            kept for kept in itertools.chain(found, curve) if self._noise(kept) <= target.noise
        )

    @property
    def _free(self) -> list[Layer]:
        """Layers that cost nothing to keep."""
        return [layer for layer in self.layers if layer.cost <= 0]

    @cached_property
    def _front(self) -> Front:
        return Front([layer for layer in self.layers if layer.cost > 0])

    def _noise(self, kept: list[Layer]) -> float:
        return self.damages.total(self._rest(kept))

    def _unreachable(self, target: Target, why: str) -> ValueError:
        least = self.point("", [])
        kept = self.layers
        if not self.bound:
            least_damaging = min(kept, key=lambda layer: layer.damage)
            kept = [layer for layer in kept if layer is not least_damaging]
        best = self.point("", kept)
        return ValueError(
            f"target {target.text} cannot be reached: {why}. All MXFP8 is "
            f"{format_size(least.bytes)} with {snr(least)}; keeping layers reaches up to "
            f"{format_size(best.bytes)} with {snr(best)}; the original is "
            f"{format_size(self.bytes_before)}"
        )


def sensitivity_of(calibration: Calibration | None, source: Source) -> Sensitivity:
    """A calibration's sensitivities, checked to be of this model.

    Raises:
        ValueError: there are none, or they are another model's; says how to get some.
    """
    if calibration is None:
        raise ValueError(
            f"{source.name}: a target needs a calibration with sensitivities; Calibrate (MXFP8) in "
            "ComfyUI makes one with sensitivity on, and quant.budget.probing for torch modules"
        )
    check_model(calibration, source)
    if calibration.sensitivity is None:
        raise ValueError(
            f"{source.name}: this calibration has no sensitivities, which a target needs; "
            "calibrate again with sensitivity on"
        )
    return calibration.sensitivity


def choose(plan: Plan, sensitivity: Sensitivity, target: Target) -> tuple[Plan, Chosen]:
    """The plan that reaches a target, and what is predicted of it.

    Args:
        plan: of the selection; its quantized layers may be kept.

    Raises:
        ValueError: the target cannot be reached; says what can.
    """
    problem = Problem(plan, sensitivity.damages)
    kept = problem.choose(target)
    total = problem.damages.total(problem.measured)
    reasons = {
        layer.decision.key: f"kept for the target {target.text}: "
        f"{_share(layer.damage, total)} of the damage in {format_size(max(0, layer.cost))}"
        for layer in kept
    }
    decisions = tuple(
        replace(d, quantize=False, reason=reasons[d.key]) if d.key in reasons else d
        for d in plan.decisions
    )
    warnings = plan.warnings
    if problem.unmeasured:
        warnings += (_unmeasured(problem.unmeasured),)
    keys = [d.key for d in plan.decisions]
    chosen = Chosen(
        target.text,
        problem.point(f"target {target.text}", kept),
        tuple(layer.name for layer in kept),
        patterns(reasons, keys),
    )
    return replace(plan, decisions=decisions, warnings=warnings), chosen


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2g}%" if whole else "0%"


def _unmeasured(names: list[str]) -> str:
    return (
        "layers that never ran while sensitivities were measured, or were not selected then, are "
        "quantized, and predictions leave them out: "
        f"{first_of(names, _MOST_NAMED)}"
    )


def make_budget(
    source: Source,
    plan: Plan,
    sensitivity: Sensitivity,
    chosen: Chosen | None = None,
    *,
    advice: Iterable[str] = (),
    is_linear: Callable[[str], bool] | None = None,
) -> Budget:
    """The curve of a model, with presets as points on it.

    Args:
        plan: of the source, before a choice; its quantized layers may be kept.
        sensitivity: of this model; see `sensitivity_of`.
        chosen: what a target comes to, from `choose`.
        advice: keys that quant_probe recommends to keep (`checks.probe`), for a point; empty: none.
        is_linear: as of `plan_source`.

    Raises:
        ValueError: there are sensitivities for none of the plan's layers.
    """
    damages = sensitivity.damages
    problem = Problem(plan, damages)
    kept = set(chosen.layers) if chosen else set()
    exclude = plan.selection.exclude or ()
    notes = [*plan.warnings]
    if problem.unmeasured:
        notes.append(_unmeasured(problem.unmeasured))
    notes.append("SNRs are predicted for rounding to nearest; calibrated rounding does better")
    budget = Budget(
        file=source.name,
        architecture=plan.architecture,
        preset=plan.preset,
        bytes_before=problem.bytes_before,
        layers=tuple(
            LayerDamage(
                layer.name,
                layer.damage,
                damages.deviation([layer.name]),
                layer.cost,
                layer.name in kept,
            )
            for layer in problem.layers
        ),
        curve=tuple(problem.curve()),
        others=tuple(_others(source, plan, damages, set(advice), is_linear)),
        chosen=chosen,
        together=sensitivity.together,
        samples=len(sensitivity.samples),
        runs=sensitivity.runs,
        exclude=exclude if isinstance(exclude, tuple) else (exclude,),
        notes=tuple(notes),
    )
    if budget.interaction:
        budget = replace(budget, notes=(*budget.notes, budget.interaction))
    return budget


def _others(source, plan: Plan, damages: Damages, advice: set[str], is_linear):
    """Points of presets that choose differently, and of quant_probe's advice."""
    seen = set()
    for preset in policy.presets():
        try:
            other = plan_source(
                source, replace(plan.selection, preset=preset), is_linear, log=False
            )
        except FormatError:  # it would quantize what is quantized already
            continue
        layers = frozenset(d.key for d in other.quantized)
        if not layers or layers in seen:
            continue
        seen.add(layers)
        yield _point_of(f"preset {preset}", other, damages)
    if advice:
        decisions = tuple(
            replace(d, quantize=d.quantize and d.key not in advice) for d in plan.decisions
        )
        yield _point_of("quant_probe's advice", replace(plan, decisions=decisions), damages)


def _point_of(label: str, plan: Plan, damages: Damages) -> Point:
    names = [bare(d.layer) for d in plan.quantized]
    known = [name for name in names if name in damages.values]
    point = make_point(
        label,
        stored_bytes(plan),
        len(damages.values) - len(known),
        damages.total(known),
        damages.deviation(known),
    )
    missing = len(names) - len(known)
    if missing:
        return replace(point, snr_db=None, low=None, high=None, unmeasured=missing)
    return point
