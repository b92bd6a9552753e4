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
from collections.abc import Collection, Iterable, Iterator, Sequence

from ..container.header import one_line, plain
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


def show_as_it_is(text: str) -> None:
    """Print a text that another program reads: not folded, without color."""
    print(text)


def show_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    name: str,
    right: Collection[str] = (),
) -> None:
    """Print a table.

    Where a terminal is too narrow for it, a row goes on below its name: with its texts, and with
    its numbers too where those do not fit either.

    Args:
        name: the column that says what a row is about.
        right: the columns of numbers, which are aligned to the right.
    """
    rows, console = [*rows], _console()
    if console is None:
        print(*_aligned(columns, rows, right), sep="\n")
        return
    from rich import box
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    shown = _that_fit(columns, _widths(columns, rows), console.width, name, right)
    for column in shown:
        table.add_column(
            column,
            justify="right" if column in right else "left",
            no_wrap=column != name,
            overflow="fold",
        )
    for row in rows:
        cells = dict(zip(columns, row, strict=True))
        texts = {column: Text(cells[column], _style(cells[column])) for column in shown}
        below = _below({c: cell for c, cell in cells.items() if cell and c not in shown}, right)
        if below:
            lines = (Padding(Text(line, "dim"), (0, 0, 0, 2)) for line in below)
            texts[name] = Group(texts[name], *lines)
        table.add_row(*texts.values())
    console.print(table)


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, int]:
    return {
        column: max(map(len, cells))
        for column, cells in zip(columns, zip(columns, *rows, strict=True), strict=True)
    }


def _that_fit(columns, widths: dict[str, int], width: int, name: str, right) -> list[str]:
    """The columns of a table that fit into a terminal; at least those up to `name`."""
    first = columns[: columns.index(name) + 1]
    numbers = [column for column in columns if column in first or column in right]
    for shown in (columns, numbers):
        if sum(widths[column] + 2 for column in shown) - 2 <= width:
            return [*shown]
    return [*first]


def _below(cells: dict[str, str], right: Collection[str]) -> list[str]:
    """Cells as lines: numbers on one, with what they are, and each text on its own."""
    numbers = [f"{column} {cell}" for column, cell in cells.items() if column in right]
    texts = [cell for column, cell in cells.items() if column not in right]
    return [*([", ".join(numbers)] if numbers else []), *texts]


def show_error(prog: str, label: str, message: str) -> None:
    """Print an error on standard error, in argparse's form."""
    message = one_line(message)
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
    widths = _widths(columns, rows)
    for row in (columns, *rows):
        cells = (
            cell.rjust(widths[name]) if name in right else cell.ljust(widths[name])
            for name, cell in zip(columns, row, strict=True)
        )
        yield "  ".join(cells).rstrip()


@contextlib.contextmanager
def progress(label: str) -> Iterator[Bar]:
    """A bar with throughput and time left on standard error, if that is a terminal."""
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
        yield Bar(bar)


class Bar:
    """A `progress.Progress` that draws tqdm's bar in the width of the terminal."""

    def __init__(self, bar):
        self._bar = bar
        self._start = self._drawn = time.monotonic()

    def __call__(self, done: int, total: int, key: str) -> None:
        bar, now = self._bar, time.monotonic()
        if bar.disable:
            return
        bar.total = total
        verifying = key == VERIFY and done >= total
        bar.bar_format = _VERIFYING if verifying else _bar_format(key, _width())
        if bar.update(done - bar.n):
            self._drawn = now
        elif now - self._drawn > _EVERY and now - self._start > _DELAY:
            self._drawn = now  # nothing was added, which tqdm draws only when asked
            bar.refresh()

    def clear(self) -> None:
        """Make room for a line; the next call draws the bar below it."""
        if not self._bar.disable:
            self._bar.clear()


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
