"""`mxfp8 export` and `mxfp8 card`: a file for other programs, and a model hub's page about it."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..container.header import FormatError, advising
from ..reports.conversion import Report, listed
from . import Answer, command, place
from .outputs import check_outputs, write
from .terminal import progress, show, show_as_it_is


def add(commands) -> None:
    export = command(commands, "export", _export, "write an MXFP8 file in the form of MLX")
    export.add_argument("file", metavar="FILE", type=place, help="MXFP8 file")
    export.add_argument(
        "--mlx",
        metavar="FOLDER",
        type=place,
        required=True,
        help="folder to make for MLX; it appears whole or not at all",
    )
    export.add_argument(
        "--config",
        metavar="CONFIG.json",
        type=place,
        help="config.json of the original model; its fields are kept. Z-Image needs none",
    )

    card = command(
        commands, "card", _card, "write a model hub's page about an MXFP8 file: a README.md"
    )
    card.add_argument("source", metavar="FILE", type=place, help="MXFP8 file")
    card.add_argument(
        "-o",
        "--output",
        metavar="README.md",
        type=place,
        help="file to write; default: standard output",
    )
    card.add_argument(
        "--report",
        metavar="FILE.json",
        type=place,
        help="report of its conversion, from `convert --report`; default: the one in FILE",
    )
    card.add_argument(
        "--base",
        metavar="MODEL",
        type=_base,
        help="the original: owner/name on the hub, in Diffusers' form if there is one; or a URL",
    )
    card.add_argument(
        "--license", metavar="NAME", type=_name, help="its license, such as apache-2.0"
    )
    card.add_argument("--overwrite", action="store_true", help="replace an existing README.md")


def _base(text: str) -> str:
    from ...integrations.card import hub_name

    try:
        hub_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _name(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    return text.strip()


def _export(arguments) -> Answer:
    from ...integrations.mlx import export_mlx

    with progress("export") as bar:
        result = export_mlx(arguments.file, arguments.mlx, config=arguments.config, progress=bar)
    return Answer(lambda: show(result.summary()), result.to_json)


def _card(arguments) -> Answer:
    from ...integrations.card import make_card

    check_outputs(arguments, "output")
    report = _read_report(arguments.report)
    with progress("card") as bar:
        card = make_card(
            arguments.source, report=report, base=arguments.base, license=arguments.license,
            progress=bar,
        )  # fmt: skip
    if arguments.output is None:
        return Answer(lambda: show_as_it_is(card.text.rstrip("\n")), card.to_json)
    lines = [write("card", arguments.output, card.text.encode())]
    lines += [f"to fill in: {name}" for name in card.missing]
    lines += listed("WARNING", card.warnings)
    return Answer(lambda: show("\n".join(lines)), card.to_json)


def _read_report(path: Path | None) -> Report | None:
    if path is None:
        return None
    with advising("give the file that `mxfp8 convert --report` wrote"):
        try:
            return Report.from_json(path.read_bytes())
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from error
