"""The `mxfp8` command: convert, inspect, verify, repair, probe, backends.

    mxfp8 convert model.safetensors model-mxfp8.safetensors
    mxfp8 inspect model-mxfp8.safetensors
    mxfp8 verify model-mxfp8.safetensors --source model.safetensors
    mxfp8 repair lost-markers.safetensors repaired.safetensors
    mxfp8 probe model.safetensors
    mxfp8 backends

Exit status: 0 done, 1 the file is bad or the work failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from . import format
from .conversion import policy
from .memory import is_out_of_memory

_MODEL = (
    "a safetensors file, the index of a sharded one (.safetensors.index.json), or a model folder"
)
_OVERWRITE = "replace DST if it exists"


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        with _termination_as_interrupt():
            return arguments.run(arguments)
    except (Exception, KeyboardInterrupt) as error:
        message = _message(error)
        if message is None:
            raise
        print(f"mxfp8: {message}", file=sys.stderr)
        return 1


def _message(error: BaseException) -> str | None:
    """What to tell the user about an error; None about a bug."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; nothing was left behind"
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
    """Let SIGTERM and a closed terminal end the work as cleanly as Ctrl-C."""

    def interrupt(number, frame):
        signal.signal(number, signal.SIG_IGN)  # cleaning up takes a moment
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():  # signals work only there
        for name in ("SIGTERM", "SIGHUP"):  # Windows has only the first
            if hasattr(signal, name):
                number = getattr(signal, name)
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

    convert = command("convert", _convert, "convert a BF16, F16 or F32 model to MXFP8")
    convert.add_argument("source", metavar="SRC", type=Path, help=f"model to convert: {_MODEL}")
    convert.add_argument(
        "target", metavar="DST", type=Path, help="file to write; it appears whole or not at all"
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
    convert.add_argument("--overwrite", action="store_true", help=_OVERWRITE)
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
        "--dry-run", action="store_true", help="list every decision with its reason; write nothing"
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
    repair.add_argument("target", metavar="DST", type=Path, help="file to write")
    repair.add_argument(
        "--scales",
        choices=format.ORDERS,
        default=format.AUTO,
        help="order of scales whose shape fits both; default: auto, by padding and statistics",
    )
    repair.add_argument("--overwrite", action="store_true", help=_OVERWRITE)

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
    selection = policy.Selection(
        arguments.preset, _any_of(arguments.include), _any_of(arguments.exclude)
    )
    if arguments.dry_run:
        return _dry_run(arguments, selection)

    from .container.pipeline import keep_freed_memory
    from .conversion.convert import convert_file

    if arguments.report:
        _check_output(arguments, "report")
    calibration, held_out = _calibration(arguments.calibration), _calibration(arguments.held_out)
    keep_freed_memory()
    with _progress("convert") as progress:
        report = convert_file(
            arguments.source, arguments.target, selection, overwrite=arguments.overwrite,
            progress=progress, device=arguments.device, calibration=calibration,
            held_out=held_out,
        )  # fmt: skip
    print(report.summary())
    if arguments.report:
        _write("report", arguments.report, report.to_json())
    return 0


def _write(label: str, path: Path, text: str) -> None:
    path.write_bytes(text.encode())  # with the line ends that it has
    print(f"{label}: {path}")


def _calibration(path: Path | None):
    """The calibration in a file, or None without one."""
    if path is None:
        return None
    from .conversion.calibration import load

    with _progress("calibration") as progress:
        return load(path, progress)


def _any_of(expressions: list[str] | None) -> str | None:
    """One expression that matches whatever any of these does."""
    if not expressions or len(expressions) == 1:
        return expressions[0] if expressions else None
    return "|".join(f"(?:{e})" for e in expressions)


def _check_output(arguments, option: str, kind: str = "json") -> None:
    """Raise ValueError for an output path that is not writable or is one of the files to read."""
    from .sources.open import files_of

    path = getattr(arguments, option)
    if path.is_dir():
        raise ValueError(f"--{option}: {str(path)!r} is a folder; give a .{kind} name")
    if not path.parent.is_dir():
        raise ValueError(f"--{option}: there is no folder {str(path.parent)!r}")
    taken = {file.resolve() for file in files_of(arguments.source)}
    others = (getattr(arguments, name, None) for name in ("target", "calibration", "held_out"))
    taken |= {other.resolve() for other in others if other}
    if path.resolve() in taken:
        raise ValueError(f"--{option} {path} would replace the model; give a .{kind} name")


def _dry_run(arguments, selection: policy.Selection) -> int:
    from .conversion.calibration import check_model
    from .conversion.convert import plan_source
    from .sources.open import open_source

    calibration = _calibration(arguments.calibration)
    with open_source(arguments.source) as opened:
        plan = plan_source(opened, selection)
        if calibration is not None:
            check_model(calibration, opened)
    for decision in plan.decisions:
        verdict = "mxfp8" if decision.quantize else "keep "
        shape = "x".join(map(str, decision.shape)) or "scalar"
        print(f"{verdict}  {decision.key}  {decision.dtype} {shape}  {decision.reason}")
    print(
        f"\n{len(plan.quantized)} of {len(plan.decisions)} tensors would be MXFP8 "
        f"(preset {plan.preset}, {plan.architecture or 'architecture not recognized'})"
    )
    return 0


def _inspect(arguments) -> int:
    from .checks.inspect import inspect_file

    with _progress("inspect") if not arguments.header else contextlib.nullcontext() as progress:
        result = inspect_file(arguments.file, every_byte=not arguments.header, progress=progress)
    print(result.to_json() if arguments.json else result.summary())
    return 1 if result.problems else 0


def _repair(arguments) -> int:
    from .checks.repair import repair_file
    from .checks.scan import check_file
    from .reports.conversion import listed

    with _progress("repair") as progress:
        result = repair_file(
            arguments.source,
            arguments.target,
            scales=arguments.scales,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    print(result.summary(), *listed("WARNING", check_file(arguments.target)), sep="\n")
    return 0


def _verify(arguments) -> int:
    from .checks.verify import verify_file

    with _progress("verify") as progress:
        result = verify_file(arguments.file, arguments.source, progress)
    print(result.summary())
    return 1 if result.problems else 0


def _probe(arguments) -> int:
    from .checks.probe import probe_file

    outputs = [kind for kind in ("json", "csv") if getattr(arguments, kind)]
    for kind in outputs:
        _check_output(arguments, kind, kind)
    calibration = _calibration(arguments.calibration)
    with _progress("probe") as progress:
        result = probe_file(arguments.source, calibration=calibration, progress=progress)
    print("score   advice  SQNR      " + "error     " * (calibration is not None) + "layer")
    for layer in sorted(result.layers, key=lambda layer: -layer.score):
        sqnr = "exact   " if layer.sqnr_db is None else f"{layer.sqnr_db:5.2f} dB"
        error = "" if layer.output_error is None else f"  {layer.output_error:.2e}"
        print(f"{layer.score:.4f}  {layer.recommendation:6}  {sqnr}{error}  {layer.key}")
    print(
        "\nscore and advice are quant_probe's, from statistics of the weights; `convert` does not "
        f"use them. SQNR is measured.\n{result.summary()}"
    )
    for kind in outputs:
        _write(kind, getattr(arguments, kind), getattr(result, f"to_{kind}")())
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
