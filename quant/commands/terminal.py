"""What people see: lines, tables, colors, and progress.

rich draws tables and colors where it is installed and standard output is a terminal; NO_COLOR takes
the colors away. Anywhere else the same words come as plain text, a table as aligned columns, so
that a pipe never gets what only a terminal understands. Rejected: requiring rich, which ComfyUI
does not; tqdm, which it does require, shows progress everywhere.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from ..container.header import plain
from ..progress import VERIFY

# What a line or a cell begins with -> how it looks.
_STYLES = {
    "OK": "bold green", "NOT OK": "bold red", "PROBLEM": "red", "WARNING": "yellow",
    "converted": "green", "skipped": "yellow", "failed": "red", "mxfp8": "green", "keep": "dim",
    "available": "green", "not used": "dim", "error": "bold red",
}  # fmt: skip
_DELAY = 0.2  # seconds before a bar is drawn: what is done by then needs none
_EVERY = 0.2  # seconds between two drawings of a bar whose count does not change
_WIDE = 100  # columns from which a bar has the bytes that are done
_VERIFYING = "{desc} 100%, reading the written file back, {elapsed}"


def show(text: str) -> None:
    """Print lines; on a terminal those that begin with a verdict have its color."""
    console = _console()
    if console is None:
        print(text)
        return
    from rich.text import Text

    for line in text.splitlines():
        console.print(Text(line, _style(line)))


def show_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = ()
) -> None:
    """Print a table, whose last column is folded where a terminal is narrow.

    Args:
        right: the columns that are aligned to the right.
    """
    rows, console = [*rows], _console()
    if console is None:
        print(*_aligned(columns, rows, right), sep="\n")
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(
            name,
            justify="right" if name in right else "left",
            no_wrap=name in right,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(cell, _style(cell)) for cell in row))
    console.print(table)


def show_error(prog: str, label: str, message: str) -> None:
    """Print an error on standard error, in argparse's form."""
    console = _console(sys.stderr)
    if console is None:
        print(f"{prog}: {label}{message}", file=sys.stderr)
        return
    from rich.text import Text

    console.print(Text.assemble(f"{prog}: ", (label, _style(label)), message))


def _console(file=None):
    """rich's console, or None where text is plain."""
    file = file or sys.stdout
    if not file.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=file, highlight=False, markup=False, emoji=False)


def _style(text: str) -> str:
    return next((style for start, style in _STYLES.items() if _begins(text, start)), "")


def _begins(text: str, start: str) -> bool:
    return text == start or text.startswith((f"{start}:", f"{start} ("))


def _aligned(columns, rows, right) -> Iterator[str]:
    """The lines of a table in plain text, two spaces between its columns."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = (
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(columns, row, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar with throughput and time left, as a `progress.Progress`.

    It is drawn on standard error, if that is a terminal.
    """
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # starting its thread hangs when memory is short
    with tqdm(
        desc=label,
        unit="B",
        unit_scale=True,
        unit_divisor=1000,
        leave=False,
        file=sys.stderr,
        dynamic_ncols=True,
        delay=_DELAY,
        disable=None,  # if stderr is no terminal
    ) as bar:
        drawn = time.monotonic()

        def update(done: int, total: int, key: str) -> None:
            nonlocal drawn
            if bar.disable:
                return
            bar.total = total
            verifying = key == VERIFY and done >= total
            bar.bar_format = _VERIFYING if verifying else _bar_format(key, _width())
            if bar.update(done - bar.n):
                drawn = time.monotonic()
            elif time.monotonic() - drawn > _EVERY and bar.format_dict["elapsed"] > _DELAY:
                drawn = time.monotonic()  # nothing was added, which tqdm draws only when asked
                bar.refresh()

        yield update


def _bar_format(key: str, width: int) -> str:
    """How tqdm draws a bar in so many columns; the bar takes those that are left."""
    size = " {n_fmt} of {total_fmt}," if width >= _WIDE else ""
    key = _shortened(key, width // 4).replace("{", "{{").replace("}", "}}")
    return f"{{desc}} {{percentage:3.0f}}%|{{bar}}|{size} {{rate_fmt}}, {{remaining}} left  {key}"


def _shortened(text: str, length: int) -> str:
    """A text without its middle, of which names of layers begin and end differently."""
    text = plain(text)
    if len(text) <= length:
        return text
    head = length // 3
    return f"{text[:head]}..{text[len(text) - (length - head - 2) :]}"


def _width() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):  # no terminal
        return 80


@contextlib.contextmanager
def beside_progress() -> Iterator[None]:
    """Print within while a bar is there."""
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stdout):
        yield
