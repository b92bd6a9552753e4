"""The subcommands of `mxfp8`, a file per family.

Each file has `add(commands)`, which declares its subcommands. The `run` of a subcommand takes the
parsed arguments and returns an `Answer`, which `quant.cli` prints: to people, or as JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MODEL = (
    "a safetensors file, the index of a sharded one (.safetensors.index.json), or a model folder"
)


@dataclass(frozen=True)
class Answer:
    """What a subcommand found.

    Attributes:
        show: prints it for people.
        document: makes it one JSON document.
        status: the exit status.
    """

    show: Callable[[], None]
    document: Callable[[], str]
    status: int = 0


def command(
    commands, name: str, run: Callable[[argparse.Namespace], Answer], summary: str, **defaults
) -> argparse.ArgumentParser:
    """A subcommand's parser, with `--json`."""
    description = f"{summary[0].upper()}{summary[1:]}."
    subparser = commands.add_parser(name, help=summary, description=description)
    subparser.set_defaults(run=run, prog=subparser.prog, **defaults)
    subparser.add_argument(
        "--json", action="store_true", help="print the result as one JSON document"
    )
    return subparser


def place(text: str) -> Path:
    """An argument's path. Empty, as an unset variable is, it would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)
