"""`mxfp8 budget`: what a model's size buys."""

from __future__ import annotations

import argparse
import io
import itertools
import shlex
from collections.abc import Iterable

from ..conversion import policy
from ..reports.budget import Budget, Point, snr
from ..reports.units import format_size
from . import MODEL, Answer, command, place
from .converting import add_calibration, add_selection, add_target, selection_of
from .outputs import check_outputs, read_calibration, write
from .terminal import progress, show, show_table

_MOST_ROWS = 20  # of the curve


def add(commands) -> None:
    budget = command(
        commands, "budget", _budget, "show what a model's size buys, from a calibration's figures"
    )
    budget.add_argument("source", metavar="SRC", type=place, help=f"original model: {MODEL}")
    add_calibration(budget, required=True)
    add_target(budget)
    add_selection(budget)
    budget.add_argument(
        "--advice",
        action="store_true",
        help="also score layers as quant_probe does, which reads every weight, and show its advice",
    )
    budget.add_argument("--report", metavar="FILE.json", type=place, help="write it as JSON")
    budget.add_argument("--png", metavar="FILE.png", type=place, help="draw it as a picture")
    budget.add_argument("--overwrite", action="store_true", help="replace existing files")


def _budget(arguments: argparse.Namespace) -> Answer:
    from ..budget.choice import choose, make_budget, sensitivity_of
    from ..checks.probe import KEEP, probe_file
    from ..conversion.convert import plan_source
    from ..sources.open import open_source

    check_outputs(arguments, "report", "png")
    calibration = read_calibration(arguments.calibration)
    advice = ()
    if arguments.advice:
        with progress("probe") as bar:
            probe = probe_file(arguments.source, progress=bar)
        advice = [layer.key for layer in probe.layers if layer.recommendation == KEEP]
    selection = selection_of(arguments)
    with open_source(arguments.source) as source:
        plan, chosen = plan_source(source, selection), None
        sensitivity = sensitivity_of(calibration, source)
        if arguments.budget is not None:
            _, chosen = choose(plan, sensitivity, arguments.budget)
        budget = make_budget(source, plan, sensitivity, chosen, advice=advice)
    written = []
    if arguments.report:
        written.append(write("report", arguments.report, budget.to_json().encode()))
    if arguments.png:
        from ..reports.budget_plot import draw

        picture = io.BytesIO()
        draw(budget).save(picture, "PNG")
        written.append(write("png", arguments.png, picture.getvalue()))
    return Answer(lambda: _show(budget, selection, written), budget.to_json)


def _show(budget: Budget, selection: policy.Selection, written: list[str]) -> None:
    stride = -(-len(budget.curve) // _MOST_ROWS)
    shown = [*budget.curve[::stride], *budget.others]
    rows = [_row(point, budget.bytes_before) for point in shown]
    right = ("size", "of original", "kept")
    show_table((*right, "predicted SNR", "also kept"), rows, "also kept", right)
    lines = ["", "Each line of the curve keeps its layer and those above it, also those not shown."]
    if budget.chosen is not None:
        lines += [budget.chosen.summary(), *(f"  {name}" for name in budget.chosen.layers)]
        if budget.chosen.exclude:
            options = _options(selection, budget.chosen.exclude)
            lines += ["to choose the same without a calibration:", f"  {options}"]
    lines += [f"NOTE: {note}" for note in budget.notes]
    show("\n".join([*lines, *written]))


def _options(selection: policy.Selection, exclude: Iterable[str]) -> str:
    """A selection without these tensors, as options of `mxfp8 convert`."""
    preset = [] if selection.preset == policy.AUTO else [("--preset", selection.preset)]
    include = (("--include", one) for one in selection.include or ())
    excluded = (("--exclude", one) for one in (*(selection.exclude or ()), *exclude))
    return shlex.join(itertools.chain(*preset, *include, *excluded))


def _row(point: Point, original: int) -> tuple[str, ...]:
    share = f"{100 * point.bytes / original:.1f}%"
    return format_size(point.bytes), share, str(point.kept), snr(point), point.label
