"""`mxfp8 convert` and `mxfp8 batch`: one model, and several."""

from __future__ import annotations

import argparse
import itertools
import re
from pathlib import Path

from ..container.header import plain
from ..conversion import policy
from ..progress import duration
from ..reports import document
from ..reports.conversion import KEPT, MXFP8, listed
from ..reports.units import format_size
from . import MODEL, Answer, command, place
from .outputs import check_outputs, read_calibration, target, write
from .terminal import progress, show, show_table

_PLAN = "mxfp8_plan"
COMFYUI, DIFFUSERS = "comfyui", "diffusers"  # what --format takes


def add(commands) -> None:
    convert = command(commands, "convert", _convert, "convert a BF16, FP16 or FP32 model to MXFP8")
    convert.add_argument("source", metavar="SRC", type=place, help=f"model to convert: {MODEL}")
    convert.add_argument(
        "target",
        metavar="DST",
        type=place,
        help="safetensors file to write, or the folder; it appears whole or not at all",
    )
    convert.add_argument(
        "--format",
        choices=(COMFYUI, DIFFUSERS),
        default=COMFYUI,
        help=f"{COMFYUI} (default): a file. {DIFFUSERS}: a folder of diffusers or transformers "
        "becomes such a folder; of a pipeline, the transformer is converted, the rest copied",
    )
    convert.set_defaults(usage_error=convert.error)
    add_selection(convert)
    _add_device(convert)
    convert.add_argument(
        "--overwrite", action="store_true", help="replace an existing DST or report"
    )
    add_calibration(convert)
    add_target(convert)
    convert.add_argument(
        "--held-out",
        metavar="FILE",
        type=place,
        help="second calibration, on other data; report the errors of layer outputs on that",
    )
    convert.add_argument(
        "--report",
        metavar="FILE.json",
        type=place,
        help="write the report of every layer as JSON",
    )
    convert.add_argument(
        "--dry-run",
        action="store_true",
        help="list every decision with its reason, and check everything that can be checked before "
        "the work; write nothing",
    )

    batch = command(
        commands,
        "batch",
        _batch,
        "convert several models, and go on where an earlier run stopped",
        interrupted="; the same command goes on from here",
    )
    batch.add_argument(
        "sources",
        metavar="SRC",
        nargs="+",
        type=place,
        help=f"{MODEL}; a folder of models, subfolders included; or a pattern in quotes ('*.sft')",
    )
    batch.add_argument(
        "--to",
        metavar="FOLDER",
        type=place,
        help="where to write NAME-mxfp8.safetensors; default: beside each model",
    )
    add_selection(batch)
    _add_device(batch)
    batch.add_argument(
        "--overwrite",
        action="store_true",
        help="replace targets that are other files; finished ones are skipped all the same",
    )
    batch.add_argument(
        "--dry-run", action="store_true", help="check and list what would be done; write nothing"
    )


def add_calibration(parser: argparse.ArgumentParser, required: bool = False) -> None:
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        type=place,
        required=required,
        help="calibration (safetensors); choose the rounding with the least error of layer "
        "outputs on its data, which takes longer",
    )


def add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        metavar="TARGET",
        dest="budget",
        type=_target,
        help="a size ('6.5 GB'; '55%%' of the original) or a quality of the model's output "
        "('50 dB'; '0.003 error'): keep the layers that reach it with the least error, or the "
        "fewest bytes; needs a calibration with sensitivities",
    )


def _target(text: str):
    from ..budget.target import parse

    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_selection(parser: argparse.ArgumentParser) -> None:
    names = policy.presets()
    parser.add_argument(
        "--preset",
        default=policy.AUTO,
        choices=names,
        metavar="NAME",
        help=f"which layers to quantize; default: auto; one of: {', '.join(names)}",
    )
    parser.add_argument(
        "--include",
        metavar="RE",
        type=_expression,
        action="append",
        help="quantize tensors whose names RE matches, even if the preset keeps them; may be "
        "repeated",
    )
    parser.add_argument(
        "--exclude",
        metavar="RE",
        type=_expression,
        action="append",
        help="keep tensors whose names RE matches, whatever else is given; may be repeated",
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="where to quantize: cpu, cuda, cuda:1, ...; default: the accelerator, if there is one",
    )


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a regular expression: {error}"
        ) from error
    return text


def selection_of(arguments) -> policy.Selection:
    include, exclude = (tuple(x or ()) for x in (arguments.include, arguments.exclude))
    return policy.Selection(arguments.preset, include, exclude)


def _convert(arguments) -> Answer:
    from ..budget.choice import choose, sensitivity_of
    from ..container.pipeline import keep_freed_memory
    from ..conversion.convert import check_calibrations, check_conversion, convert, plan_source
    from ..sources.open import open_source

    if arguments.format == DIFFUSERS:
        return _convert_folder(arguments)
    try:
        target(str(arguments.target))
    except argparse.ArgumentTypeError as error:
        arguments.usage_error(f"argument DST: {error}")
    check_outputs(arguments, "report")
    with open_source(arguments.source) as source:
        plan = plan_source(source, selection_of(arguments))
        chosen = calibration = None
        if arguments.budget is not None:
            calibration = read_calibration(arguments.calibration)
            plan, chosen = choose(plan, sensitivity_of(calibration, source), arguments.budget)
        if arguments.dry_run and not arguments.json:
            _show_plan(plan)  # before what may fail: it has the reasons
        check_conversion(source, arguments.target, plan, arguments.overwrite, arguments.device)
        if calibration is None:
            calibration = read_calibration(arguments.calibration)
        held_out = read_calibration(arguments.held_out)
        if arguments.dry_run:
            check_calibrations(source, calibration, held_out)
            summary = chosen.summary() if chosen else ""
            return Answer(lambda: show(summary) if summary else None, lambda: _document(plan))
        keep_freed_memory()
        with progress("convert") as bar:
            report = convert(
                source, arguments.target, plan, overwrite=arguments.overwrite, progress=bar,
                device=arguments.device, calibration=calibration, held_out=held_out,
                chosen=chosen,
            )  # fmt: skip
    return _converted(arguments, report)


def _convert_folder(arguments) -> Answer:
    from ...integrations.model_folder import (
        check_folder,
        convert_planned,
        open_folder,
        plan_folder,
        with_own_names,
    )
    from ..container.pipeline import keep_freed_memory
    from ..conversion.convert import check_calibrations

    for option, name in {"overwrite": "overwrite", "budget": "target"}.items():
        if getattr(arguments, option):
            arguments.usage_error(f"--{name} does not go with --format {DIFFUSERS}")
    folder = open_folder(arguments.source)
    check_outputs(arguments, "report", source=folder.model)
    with folder.open() as source:
        plan = plan_folder(source, selection_of(arguments))
        if arguments.dry_run and not arguments.json:
            _show_plan(plan)
        check_folder(folder, source, arguments.target, plan, arguments.device)
        calibration, held_out = (
            with_own_names(read_calibration(path), source)
            for path in (arguments.calibration, arguments.held_out)
        )
        if arguments.dry_run:
            check_calibrations(source, calibration, held_out)
            return Answer(lambda: None, lambda: _document(plan))
        keep_freed_memory()
        with progress("convert") as bar:
            report = convert_planned(
                folder, source, arguments.target, plan, progress=bar, device=arguments.device,
                calibration=calibration, held_out=held_out,
            )  # fmt: skip
    return _converted(arguments, report)


def _converted(arguments, report) -> Answer:
    """A conversion's report, shown and written where the user asked for it."""
    written = []
    if arguments.report:
        written.append(write("report", arguments.report, report.to_json().encode()))
    return Answer(lambda: show("\n".join([report.summary(), *written])), report.to_json)


def _show_plan(plan: policy.Plan) -> None:
    """Every decision of a plan with its reason, and the sum of them."""
    rows = [
        (
            "mxfp8" if decision.quantize else "keep",
            plain(decision.key),
            f"{decision.dtype} {'x'.join(map(str, decision.shape)) or 'scalar'}",
            decision.reason,
        )
        for decision in plan.decisions
    ]
    show_table(("", "tensor", "stored as", "reason"), rows, "tensor")
    before, after = _sizes(plan)
    show("\n".join([
        "",
        *listed("WARNING", plan.warnings),
        f"{len(plan.quantized)} of {len(plan.decisions)} tensors would be MXFP8 "
        f"(preset {plan.preset}, {plan.architecture or 'architecture not recognized'}): "
        f"{format_size(before)} -> {format_size(after)}",
    ]))  # fmt: skip


def _sizes(plan: policy.Plan) -> tuple[int, int]:
    """Bytes of all tensors before and after."""
    from ..conversion.stored import stored_bytes

    return sum(decision.nbytes for decision in plan.decisions), stored_bytes(plan)


def _document(plan: policy.Plan) -> str:
    before, after = _sizes(plan)
    tensors = [
        {
            "name": decision.key,
            "decision": MXFP8 if decision.quantize else KEPT,
            "reason": decision.reason,
            "dtype": decision.dtype,
            "shape": decision.shape,
        }
        for decision in plan.decisions
    ]
    fields = {
        "preset": plan.preset,
        "architecture": plan.architecture,
        "bytes_before": before,
        "bytes_after": after,
        "warnings": plan.warnings,
        "tensors": tensors,
    }
    return document.write(_PLAN, fields)


def _batch(arguments) -> Answer:
    from ..container.pipeline import keep_freed_memory
    from ..conversion.batch import FAILED, convert_all, find_jobs

    jobs = find_jobs(arguments.sources, arguments.to)
    keep_freed_memory()
    told = itertools.count(1)

    with progress("batch") as bar:

        def tell(outcome) -> None:
            bar.clear()
            show(f"{next(told)} of {len(jobs)}: {outcome.line()}")

        batch = convert_all(
            jobs, selection_of(arguments), overwrite=arguments.overwrite, progress=bar,
            device=arguments.device, dry_run=arguments.dry_run,
            tell=(lambda outcome: None) if arguments.json else tell,
        )  # fmt: skip
    status = int(bool(batch.of(FAILED)))
    return Answer(lambda: _show_batch(batch), batch.to_json, status)


def _show_batch(batch) -> None:
    rows = []
    for outcome in batch.outcomes:
        sizes = (outcome.bytes_before, outcome.bytes_after)
        rows.append((
            outcome.state,
            plain(Path(outcome.source).name),
            *("" if size is None else format_size(size) for size in sizes),
            "" if outcome.sqnr_db is None else f"{outcome.sqnr_db:.2f} dB",
            "" if outcome.seconds is None else duration(outcome.seconds),
        ))  # fmt: skip
    show("")
    right = ("before", "after", "SQNR", "time")
    show_table(("", "model", *right), rows, "model", right)
    named: dict[str, list[str]] = {}  # by warning, which many models may share
    for outcome in batch.outcomes:
        for warning in outcome.warnings:
            named.setdefault(warning, []).append(plain(Path(outcome.source).name))
    warnings = [f"{', '.join(names)}: {warning}" for warning, names in named.items()]
    show("\n".join(["", *listed("WARNING", warnings), batch.total()]))
