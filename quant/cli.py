"""The `mxfp8` command: convert, inspect, verify, repair, probe, backends.

    mxfp8 convert model.safetensors model-mxfp8.safetensors
    mxfp8 inspect model-mxfp8.safetensors
    mxfp8 verify model-mxfp8.safetensors --source model.safetensors
    mxfp8 repair lost-markers.safetensors repaired.safetensors
    mxfp8 probe model.safetensors
    mxfp8 backends

Exit status: 0 done, 1 the file is bad or the work failed, 2 wrong usage, 128 + n ended by signal n:
130 by Ctrl-C, 143 by SIGTERM, 129 by a closed terminal, 141 by a closed pipe.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from ..kernels.memory import is_out_of_memory
from . import format
from .container.header import plain
from .conversion import policy
from .reports.conversion import listed

_MODEL = (
    "a safetensors file, the index of a sharded one (.safetensors.index.json), or a model folder"
)
_SUFFIXES = (".safetensors", ".sft")  # of files that are written; readers go by them
_SIGPIPE = 13  # Windows has no name for it


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    _wait_passively()
    _prepare_streams()
    policy.logger.addHandler(logging.NullHandler())  # results have its warnings
    arguments = _parser().parse_args(argv)
    try:
        with _termination_as_interrupt():
            status = arguments.run(arguments)
            print(end="", flush=True)  # what cannot be printed is an error of this run
            return status
    except BrokenPipeError:
        return 128 + _SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        message = _message(error)
        if message is None:
            raise
        print(f"mxfp8: {message}", file=sys.stderr)
        return _status(error)
    finally:
        _drop_what_cannot_be_printed()


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
def _termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end the work as cleanly as Ctrl-C.

    Signals that are ignored stay so: under nohup a closed terminal ends nothing.
    """

    def interrupt(number, frame):
        signal.signal(number, signal.SIG_IGN)  # cleaning up takes a moment
        raise KeyboardInterrupt(number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # signals work only there
        for name in ("SIGTERM", "SIGHUP"):  # Windows has only the first
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mxfp8",
        description="Convert, inspect, verify and repair models in MXFP8 (8-bit microscaling).",
    )
    parser.add_argument("--version", action="version", version=f"mxfp8 {version('mxfp8')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, summary: str) -> argparse.ArgumentParser:
        description = f"{summary[0].upper()}{summary[1:]}."
        subparser = commands.add_parser(name, help=summary, description=description)
        subparser.set_defaults(run=run)
        return subparser

    convert = command("convert", _convert, "convert a BF16, FP16 or FP32 model to MXFP8")
    convert.add_argument("source", metavar="SRC", type=Path, help=f"model to convert: {_MODEL}")
    convert.add_argument(
        "target",
        metavar="DST",
        type=_target,
        help="safetensors file to write; it appears whole or not at all",
    )
    names = policy.presets()
    convert.add_argument(
        "--preset",
        default=policy.AUTO,
        choices=names,
        metavar="NAME",
        help=f"which layers to quantize; default: auto; one of: {', '.join(names)}",
    )
    convert.add_argument(
        "--include",
        metavar="RE",
        type=_expression,
        action="append",
        help="quantize tensors whose names RE matches, even if the preset keeps them; may be "
        "repeated",
    )
    convert.add_argument(
        "--exclude",
        metavar="RE",
        type=_expression,
        action="append",
        help="keep tensors whose names RE matches, whatever else is given; may be repeated",
    )
    convert.add_argument(
        "--overwrite", action="store_true", help="replace an existing DST or report"
    )
    convert.add_argument(
        "--device",
        metavar="NAME",
        help="where to quantize: cpu, cuda, cuda:1, ...; default: the accelerator, if there is one",
    )
    convert.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help="calibration (safetensors); choose the rounding with the least error of layer "
        "outputs on its data, which takes longer",
    )
    convert.add_argument(
        "--held-out",
        metavar="FILE",
        type=Path,
        help="second calibration, on other data; report the errors of layer outputs on that",
    )
    convert.add_argument(
        "--report", metavar="FILE.json", type=Path, help="write the report of every layer as JSON"
    )
    convert.add_argument(
        "--dry-run",
        action="store_true",
        help="list every decision with its reason, and check everything that can be checked before "
        "the work; write nothing",
    )

    inspect = command("inspect", _inspect, "show what a file holds and what is wrong with it")
    inspect.add_argument("file", metavar="FILE", type=Path, help="safetensors file")
    inspect.add_argument("--json", action="store_true", help="print JSON with every layer")
    inspect.add_argument(
        "--header", action="store_true", help="read only the header, not every byte"
    )

    repair = command(
        "repair", _repair, "rebuild lost markers, and rewrite row-major or F8_E8M0 scales"
    )
    repair.add_argument("source", metavar="SRC", type=Path, help="MXFP8 file to repair")
    repair.add_argument("target", metavar="DST", type=_target, help="safetensors file to write")
    repair.add_argument(
        "--scales",
        choices=format.ORDERS,
        default=format.AUTO,
        help="order of scales whose shape fits both; default: auto, by padding and statistics",
    )
    repair.add_argument("--overwrite", action="store_true", help="replace an existing DST")

    verify = command("verify", _verify, "compare an MXFP8 file with its original")
    verify.add_argument("file", metavar="FILE", type=Path, help="MXFP8 file")
    verify.add_argument(
        "--source", metavar="SRC", type=Path, required=True, help=f"its original: {_MODEL}"
    )

    probe = command(
        "probe", _probe, "compare quant_probe's sensitivity scores with the error of MXFP8"
    )
    probe.add_argument("source", metavar="SRC", type=Path, help=f"model to probe: {_MODEL}")
    probe.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help="calibration (safetensors); measure the error of layer outputs on its data, too",
    )
    probe.add_argument("--json", metavar="FILE.json", type=Path, help="write the result as JSON")
    probe.add_argument("--csv", metavar="FILE.csv", type=Path, help="write the result as a table")
    probe.add_argument("--overwrite", action="store_true", help="replace existing files")

    command("backends", _backends, "list the backends, and which of them run on this machine")
    return parser


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a regular expression: {error}"
        ) from error
    return text


def _target(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in _SUFFIXES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not the name of a safetensors file; give one that ends in {_SUFFIXES[0]}"
        )
    return path


@contextlib.contextmanager
def _progress(label: str) -> Iterator:
    """A progress bar with throughput and ETA, as a callback."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # starting its thread hangs when memory is short
    with tqdm(
        desc=label,
        unit="B",
        unit_scale=True,
        unit_divisor=1000,
        leave=False,
        file=sys.stderr,
        disable=None,  # if stderr is no terminal
    ) as bar:

        def update(done: int, total: int, key: str) -> None:
            bar.total = total
            bar.set_postfix_str(key, refresh=False)
            bar.update(done - bar.n)

        yield update


def _convert(arguments) -> int:
    from .container.pipeline import keep_freed_memory
    from .conversion.convert import check_calibrations, check_conversion, convert, plan_source
    from .sources.open import open_source

    _check_outputs(arguments, "report")
    selection = policy.Selection(
        arguments.preset, tuple(arguments.include or ()), tuple(arguments.exclude or ())
    )
    with open_source(arguments.source) as source:
        plan = plan_source(source, selection)
        if arguments.dry_run:
            print(_listing(plan))
        check_conversion(source, arguments.target, plan, arguments.overwrite, arguments.device)
        calibration = _calibration(arguments.calibration)
        held_out = _calibration(arguments.held_out)
        if arguments.dry_run:
            check_calibrations(source, calibration, held_out)
            return 0
        keep_freed_memory()
        with _progress("convert") as progress:
            report = convert(
                source, arguments.target, plan, overwrite=arguments.overwrite, progress=progress,
                device=arguments.device, calibration=calibration, held_out=held_out,
            )  # fmt: skip
    written = []
    if arguments.report:
        written.append(_write("report", arguments.report, report.to_json()))
    print(report.summary(), *written, sep="\n")
    return 0


def _listing(plan: policy.Plan) -> str:
    """Every decision of a plan with its reason, and the sum of them."""
    lines = []
    for decision in plan.decisions:
        name = f"{'mxfp8' if decision.quantize else 'keep '}  {plain(decision.key)}"
        shape = "x".join(map(str, decision.shape)) or "scalar"
        lines.append(f"{name}  {decision.dtype} {shape}  {decision.reason}")
    return "\n".join([
        *lines,
        "",
        *listed("WARNING", plan.warnings),
        f"{len(plan.quantized)} of {len(plan.decisions)} tensors would be MXFP8 "
        f"(preset {plan.preset}, {plan.architecture or 'architecture not recognized'})",
    ])  # fmt: skip


def _calibration(path: Path | None):
    """The calibration in a file, or None without one."""
    if path is None:
        return None
    from .conversion.calibration import load

    with _progress("calibration") as progress:
        return load(path, progress)


def _check_outputs(arguments, *options: str) -> None:
    """Raise, before any work, for an output that would replace another file or cannot be written.

    Args:
        options: those that name outputs beside DST.
    """
    from .sources.open import files_of

    inputs = (getattr(arguments, name, None) for name in ("calibration", "held_out"))
    taken = [*files_of(arguments.source), *filter(None, inputs)]
    for option in ("target", *options):
        path = getattr(arguments, option, None)
        if path is None:
            continue
        label = "DST" if option == "target" else f"--{option}"
        other = next((other for other in taken if _is_same(path, other)), None)
        if other is not None:
            raise ValueError(f"{label} {path} would replace {other}; give another name")
        if option != "target":  # the writer of the model checks that
            _check_output(label, path, arguments.overwrite)
        taken.append(path)


def _is_same(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


def _check_output(label: str, path: Path, overwrite: bool) -> None:
    """Raise for an output that is a folder, exists, or cannot be made; leaves nothing.

    A model's name is refused even where existing files may be replaced.
    """
    if path.suffix.lower() in _SUFFIXES:
        raise ValueError(f"{label} {path} has a model's name; give another suffix")
    if path.is_dir():
        raise ValueError(f"{label}: {str(path)!r} is a folder; give a file name")
    if not path.parent.is_dir():
        raise ValueError(f"{label}: there is no folder {str(path.parent)!r}")
    if path.is_file() and not overwrite:
        raise FileExistsError(errno.EEXIST, "", str(path))
    if path.is_file():
        path.open("ab").close()
    elif not path.exists():  # else a device or a pipe
        path.open("xb").close()
        path.unlink()


def _write(option: str, path: Path, text: str) -> str:
    """Write an output, with the line ends that it has; returns a line that says so."""
    try:
        path.write_bytes(text.encode())
    except OSError as error:  # a full disk's error does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error
    return f"{option}: {path}"


def _inspect(arguments) -> int:
    from .checks.inspect import inspect_file

    with _progress("inspect") if not arguments.header else contextlib.nullcontext() as progress:
        result = inspect_file(arguments.file, every_byte=not arguments.header, progress=progress)
    print(result.to_json() if arguments.json else result.summary())
    return 1 if result.problems else 0


def _repair(arguments) -> int:
    from .checks.repair import repair_file
    from .checks.scan import check_file

    with _progress("repair") as progress:
        result = repair_file(
            arguments.source,
            arguments.target,
            scales=arguments.scales,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    print(result.summary(check_file(arguments.target)))
    return 1 if result.problems else 0


def _verify(arguments) -> int:
    from .checks.verify import verify_file

    with _progress("verify") as progress:
        result = verify_file(arguments.file, arguments.source, progress)
    print(result.summary())
    return 1 if result.problems else 0


def _probe(arguments) -> int:
    from .checks.probe import probe_file

    _check_outputs(arguments, "json", "csv")
    calibration = _calibration(arguments.calibration)
    with _progress("probe") as progress:
        result = probe_file(arguments.source, calibration=calibration, progress=progress)
    written = [
        _write(kind, path, getattr(result, f"to_{kind}")())
        for kind in ("json", "csv")
        if (path := getattr(arguments, kind))
    ]
    print("score   advice  SQNR      " + "error     " * (calibration is not None) + "layer")
    for layer in sorted(result.layers, key=lambda layer: -layer.score):
        sqnr = "exact   " if layer.sqnr_db is None else f"{layer.sqnr_db:5.2f} dB"
        error = "" if layer.output_error is None else f"  {layer.output_error:.2e}"
        print(f"{layer.score:.4f}  {layer.recommendation:6}  {sqnr}{error}  {plain(layer.key)}")
    print(
        "\nscore and advice are quant_probe's, from statistics of the weights; `convert` does not "
        f"use them. SQNR is measured.\n{result.summary()}",
        *written,
        sep="\n",
    )
    return 0


def _backends(arguments) -> int:
    from ..kernels import describe_paths, list_backends, machine

    print(machine())
    print("\nBackends, in order of preference:")
    for status in list_backends():
        print(f"  {status}")
    print("\nLinear layers, by precision:")
    for path in describe_paths():
        print(f"  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
