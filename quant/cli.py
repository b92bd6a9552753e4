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

_MOST_PROBLEMS = 20  # printed


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        with _termination_as_interrupt():
            return arguments.run(arguments)
    except ModuleNotFoundError as error:
        print(
            f"mxfp8: {error.name} is missing; use ComfyUI's Python, or pip install "
            '"mxfp8[standalone]"',
            file=sys.stderr,
        )
        return 1
    except FileExistsError as error:
        print(f"mxfp8: {error.filename} exists; --overwrite replaces it", file=sys.stderr)
        return 1
    except OSError as error:
        said = error.strerror or str(error)
        if error.filename and error.strerror:
            said = f"{error.filename}: {said}"
        print(f"mxfp8: {said}", file=sys.stderr)
        return 1
    except (ValueError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        said = "" if isinstance(error, RuntimeError) else str(error)
        print(f"mxfp8: {said or 'out of memory; close other programs'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mxfp8: interrupted; nothing was left behind", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Make SIGTERM and a closed terminal end the work as Ctrl-C does: cleanly."""

    def interrupt(number, frame):
        signal.signal(number, signal.SIG_IGN)  # once is enough; cleaning up takes a moment
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere there are no signals
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
        prog="mxfp8", description="MXFP8 (8-bit microscaling) for safetensors models."
    )
    parser.add_argument("--version", action="version", version=f"mxfp8 {version('mxfp8')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    convert = commands.add_parser("convert", help="convert a BF16, F16 or F32 model to MXFP8")
    convert.add_argument(
        "source",
        metavar="SRC",
        type=Path,
        help="safetensors file, index of several (.safetensors.index.json), or model folder",
    )
    convert.add_argument(
        "target", metavar="DST", type=Path, help="file to make, whole or not at all"
    )
    names = list(policy.presets())
    convert.add_argument(
        "--preset",
        default=policy.AUTO,
        choices=names,
        metavar="NAME",
        help=f"which layers stay: {', '.join(names)}",
    )
    convert.add_argument(
        "--include",
        metavar="RE",
        type=_expression,
        action="append",
        help="quantize keys this finds, even if the preset keeps them; may be repeated",
    )
    convert.add_argument(
        "--exclude",
        metavar="RE",
        type=_expression,
        action="append",
        help="keep keys this finds, whatever else; may be repeated",
    )
    convert.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    convert.add_argument(
        "--device",
        metavar="NAME",
        help="where to quantize: cpu, cuda, cuda:1, ...; default: the accelerator, if there is one",
    )
    convert.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help="what the layers are given (safetensors); rounds them for that, which takes longer",
    )
    convert.add_argument("--report", metavar="FILE.json", type=Path, help="write a report")
    convert.add_argument(
        "--dry-run", action="store_true", help="list every decision with its reason; write nothing"
    )
    convert.set_defaults(run=_convert)

    inspect = commands.add_parser("inspect", help="what a file holds, and what is wrong with it")
    inspect.add_argument("file", metavar="FILE", type=Path, help="safetensors file")
    inspect.add_argument("--json", action="store_true", help="print JSON, with every layer")
    inspect.add_argument(
        "--header", action="store_true", help="read the header only, not every byte"
    )
    inspect.set_defaults(run=_inspect)

    repair = commands.add_parser(
        "repair", help="rebuild lost markers, the order of scales, their dtype"
    )
    repair.add_argument("source", metavar="SRC", type=Path, help="MXFP8 file to read")
    repair.add_argument("target", metavar="DST", type=Path, help="file to make")
    repair.add_argument(
        "--scales",
        choices=format.ORDERS,
        default=format.AUTO,
        help="order of scales whose shape fits both; auto: what padding and statistics show",
    )
    repair.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    repair.set_defaults(run=_repair)

    verify = commands.add_parser("verify", help="compare an MXFP8 file with its original")
    verify.add_argument("file", metavar="FILE", type=Path, help="MXFP8 file")
    verify.add_argument(
        "--source", metavar="SRC", type=Path, required=True, help="what it was made from"
    )
    verify.set_defaults(run=_verify)

    probe = commands.add_parser(
        "probe", help="quant_probe's scores of an original's layers, beside their measured error"
    )
    probe.add_argument(
        "source", metavar="FILE", type=Path, help="a model to convert, as for `convert`"
    )
    probe.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help="what the layers are given (safetensors): measures what they put out, too",
    )
    probe.add_argument("--json", metavar="FILE.json", type=Path, help="write it as JSON")
    probe.add_argument("--csv", metavar="FILE.csv", type=Path, help="write it as a table")
    probe.set_defaults(run=_probe)

    backends = commands.add_parser("backends", help="what would run on this machine, and why")
    backends.set_defaults(run=_backends)
    return parser


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    return text


@contextlib.contextmanager
def _progress(label: str) -> Iterator:
    """A progress bar with throughput and ETA, as a callback."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # its thread never starts, and never returns, for want of memory
    with tqdm(
        desc=label,
        unit="B",
        unit_scale=True,
        unit_divisor=1000,
        leave=False,
        file=sys.stderr,
        disable=None,  # where nobody watches
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
    calibration = _calibration(arguments)
    keep_freed_memory()
    with _progress("convert") as progress:
        report = convert_file(
            arguments.source, arguments.target, selection, overwrite=arguments.overwrite,
            progress=progress, device=arguments.device, calibration=calibration,
        )  # fmt: skip
    print(report.summary())
    if arguments.report:
        arguments.report.write_text(report.to_json(), encoding="utf-8")
        print(f"report: {arguments.report}")
    return 0


def _calibration(arguments):
    """What --calibration names, or None."""
    if not arguments.calibration:
        return None
    from .conversion.calibration import load

    with _progress("calibration") as progress:
        return load(arguments.calibration, progress)


def _any_of(expressions: list[str] | None) -> str | None:
    """One expression that finds what any of several finds."""
    if not expressions or len(expressions) == 1:
        return expressions[0] if expressions else None
    return "|".join(f"(?:{e})" for e in expressions)


def _check_output(arguments, option: str, kind: str = "json") -> None:
    """Refuse an output path that cannot be written or would replace a file that is read."""
    from .sources.open import open_source

    path = getattr(arguments, option)
    if path.is_dir():
        raise ValueError(f"--{option}: {str(path)!r} is a folder; give a .{kind} name")
    if not path.parent.is_dir():
        raise ValueError(f"--{option}: there is no folder {str(path.parent)!r}")
    with open_source(arguments.source) as source:
        taken = {file.resolve() for file in source.files}
    others = (getattr(arguments, "target", None), arguments.calibration)
    taken |= {other.resolve() for other in others if other}
    if path.resolve() in taken:
        raise ValueError(f"--{option} {path} would replace the model; give a .{kind} name")


def _dry_run(arguments, selection: policy.Selection) -> int:
    from .conversion.calibration import check_model
    from .conversion.convert import plan_source
    from .sources.open import open_source

    calibration = _calibration(arguments)
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
        found = inspect_file(arguments.file, every_byte=not arguments.header, progress=progress)
    if arguments.json:
        print(found.to_json())
    else:
        print(found.summary())
        _print_all("WARNING", found.warnings)
        _print_all("PROBLEM", found.problems)
    return 1 if found.problems else 0


def _print_all(label: str, sentences: list[str]) -> None:
    from .reports.conversion import listed

    for line in listed(label, sentences, _MOST_PROBLEMS):
        print(line)


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
    print(result.summary())
    _print_all("WARNING", check_file(arguments.target))
    return 0


def _verify(arguments) -> int:
    from .checks.verify import verify_file

    with _progress("verify") as progress:
        result = verify_file(arguments.file, arguments.source, progress)
    for name, energy in result.layers.items():
        value = "exact" if energy.sqnr_db is None else f"{energy.sqnr_db:6.2f} dB"
        print(f"{value}  {name}")
    if result.sqnr_db is not None:
        worst = result.layers[result.worst].sqnr_db
        print(
            f"\n{len(result.layers)} MXFP8 layers, SQNR {result.sqnr_db:.2f} dB; "
            f"worst {result.worst}: {worst:.2f} dB"
        )
    _print_all("PROBLEM", result.problems)
    return 1 if result.problems else 0


def _probe(arguments) -> int:
    from .checks.probe import probe_file

    outputs = [kind for kind in ("json", "csv") if getattr(arguments, kind)]
    for kind in outputs:
        _check_output(arguments, kind, kind)
    calibration = _calibration(arguments)
    with _progress("probe") as progress:
        found = probe_file(arguments.source, calibration=calibration, progress=progress)
    print("score   advice  SQNR      " + "error     " * (calibration is not None) + "layer")
    for layer in sorted(found.layers, key=lambda layer: -layer.score):
        sqnr = "exact   " if layer.sqnr_db is None else f"{layer.sqnr_db:5.2f} dB"
        error = "" if layer.output_error is None else f"  {layer.output_error:.2e}"
        print(f"{layer.score:.4f}  {layer.recommendation:6}  {sqnr}{error}  {layer.key}")
    print(
        "\nscore and advice: quant_probe's, by statistics of the weights; SQNR: measured. "
        f"`convert` does not follow the advice.\n{found.summary()}"
    )
    for kind in outputs:
        path, text = getattr(arguments, kind), getattr(found, f"to_{kind}")()
        path.write_bytes(text.encode())  # as it is: a table's lines end as its format has them
        print(f"{kind}: {path}")
    return 0


def _backends(arguments) -> int:
    from ..kernels import describe_paths, list_backends, machine

    print(machine())
    print("\nBackends, in order of preference:")
    for status in list_backends():
        print(f"  {status}")
    print("\nA linear runs, at precision")
    for choice in describe_paths():
        print(f"  {choice}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
