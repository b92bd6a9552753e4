"""The `mxfp8` command: one subcommand, its answer, its errors and its exit status.

    mxfp8 convert model.safetensors model-mxfp8.safetensors
    mxfp8 batch models/ --to converted/
    mxfp8 inspect model-mxfp8.safetensors
    mxfp8 verify model-mxfp8.safetensors --source model.safetensors
    mxfp8 repair lost-markers.safetensors repaired.safetensors
    mxfp8 probe model.safetensors
    mxfp8 budget model.safetensors --calibration calibration.safetensors
    mxfp8 export model-mxfp8.safetensors --mlx model-mlx/
    mxfp8 card model-mxfp8.safetensors
    mxfp8 backends
    mxfp8 recommend model.safetensors
    mxfp8 completion bash

Standard output has the answer, and with --json nothing but one JSON document, an error's included;
standard error has errors and progress.

Exit status: 0 done, 1 the file is bad or the work failed, 2 wrong usage, 128 + n ended by signal n:
130 by Ctrl-C, 143 by SIGTERM, 129 by a closed terminal, 141 by a closed pipe.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from ..kernels.memory import is_out_of_memory
from .commands import budgeting, checking, completion, converting, machine, publishing
from .commands.terminal import show_error
from .conversion import policy
from .reports import document
from .version import version

_ERROR = "mxfp8_error"
_SIGPIPE = 13  # Windows has no name for it


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    _wait_passively()
    _prepare_streams()
    policy.logger.addHandler(logging.NullHandler())  # results have its warnings
    arguments = parser().parse_args(argv)
    try:
        with _signals_as_interrupts(lambda error: _fail(arguments, error, _message(error))):
            answer = arguments.run(arguments)
            if arguments.json:
                print(answer.document())
            else:
                answer.show()
            print(end="", flush=True)  # what cannot be printed is an error of this run
            return answer.status
    except BrokenPipeError:
        return 128 + _SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        message = _message(error)
        if message is None:
            raise
        return _fail(arguments, error, message)
    finally:
        _drop_what_cannot_be_printed()


def _fail(arguments: argparse.Namespace, error: BaseException, message: str) -> int:
    """Say what went wrong, and return the exit status."""
    status, label = _status(error), "error: "
    if isinstance(error, KeyboardInterrupt):
        message, label = message + getattr(arguments, "interrupted", ""), ""
    show_error(arguments.prog, label, message)
    if arguments.json:
        with contextlib.suppress(OSError):  # it may be what could not be printed
            print(document.write(_ERROR, {"message": message, "status": status}), flush=True)
    return status


class _Parser(argparse.ArgumentParser):
    """A parser, whose subcommands' parsers are of this class too, that heeds --json on errors."""

    _json = False

    def parse_known_args(self, args=None, namespace=None):
        self._json = "--json" in (sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if self._json:
            with contextlib.suppress(OSError):
                print(document.write(_ERROR, {"message": message, "status": 2}), flush=True)
        super().error(message)


def _wait_passively() -> None:
    """Have torch's threads sleep while they wait for each other.

    OpenMP's spin by default, and beside other programs they take the time of the threads that they
    wait for: `inspect` of 0.27 GB on two busy cores took 30 and 48 s (10 s of CPU time), and 12 and
    19 s (3 s) when they slept (2026-11). OpenMP reads this when torch is imported, later on.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _prepare_streams() -> None:
    """Have prints succeed on every console, and no file get a closed one's number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # as they are numbered
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_what_cannot_be_printed() -> None:
    """Python would print it as it ends, fail again, and put 120 in place of the exit status."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _status(error: BaseException) -> int:
    """The exit status after an error; that of a signal is what shells give to its number."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    return 1


def _message(error: BaseException) -> str | None:
    """What to tell the user about an error; None about a bug."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; nothing unfinished was left behind"
    if isinstance(error, ModuleNotFoundError):
        return (
            f"{error.name} is missing; use ComfyUI's Python, or pip install '.[standalone]' in a "
            "clone of this pack"
        )
    if isinstance(error, FileExistsError):
        return f"{error.filename} exists; --overwrite replaces it"
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return f"{error.filename}: {reason}" if error.filename and error.strerror else reason
    if isinstance(error, (ValueError, MemoryError)) and str(error):
        return str(error)
    return "out of memory; close other programs" if is_out_of_memory(error) else None


@contextlib.contextmanager
def _signals_as_interrupts(fail: Callable[[KeyboardInterrupt], int]) -> Iterator[None]:
    """Let SIGTERM and a closed terminal end the work as cleanly as Ctrl-C.

    Signals that are ignored stay so: under nohup a closed terminal ends nothing. While torch is
    imported, all three end the process at once: where its C++ imports Python modules, it drops an
    exception, or aborts.

    Args:
        fail: says that the work was interrupted; returns the exit status.
    """

    def interrupt(number, frame):
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)  # cleaning up takes a moment
        error = KeyboardInterrupt(number)
        if not _is_importing_torch(frame):
            raise error
        # Nothing is to be cleaned up: no file is begun before torch is there.
        status = _status(error)
        try:
            fail(error)
            sys.stderr.flush()
        finally:
            os._exit(status)

    before = {}
    if threading.current_thread() is threading.main_thread():  # signals work only there
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_importing_torch(frame: FrameType | None) -> bool:
    """Whether the body of torch's package is running."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "torch":
            return True
        frame = frame.f_back
    return False


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = _Parser(
        prog="mxfp8",
        description="Convert, inspect, verify and repair models in MXFP8 (8-bit microscaling).",
        epilog="Each command has --help, and --json for programs.",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=18),
    )
    parser.add_argument("--version", action="version", version=f"mxfp8 {version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND [OPTIONS]")
    for family in (converting, budgeting, checking, publishing, machine, completion):
        family.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
