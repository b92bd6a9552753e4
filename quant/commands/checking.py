"""`mxfp8 inspect`, `verify`, `repair` and `probe`: what is in a file, and whether it is sound."""

from __future__ import annotations

import contextlib

from .. import format
from ..container.header import plain
from . import MODEL, Answer, command, place
from .outputs import check_outputs, read_calibration, target, write
from .terminal import progress, show, show_table


def add(commands) -> None:
    inspect = command(
        commands, "inspect", _inspect, "show what a file is, who runs it and what is wrong with it"
    )
    inspect.add_argument(
        "file",
        metavar="FILE",
        type=place,
        help="model's file of any kind, index or folder",
    )
    inspect.add_argument(
        "--header", action="store_true", help="read only the header, not every byte"
    )

    verify = command(commands, "verify", _verify, "compare an MXFP8 file with its original")
    verify.add_argument("file", metavar="FILE", type=place, help="MXFP8 file")
    verify.add_argument(
        "--source", metavar="SRC", type=place, required=True, help=f"its original: {MODEL}"
    )

    repair = command(
        commands, "repair", _repair, "rebuild lost markers, and rewrite row-major or F8_E8M0 scales"
    )
    repair.add_argument("source", metavar="SRC", type=place, help="MXFP8 file to repair")
    repair.add_argument("target", metavar="DST", type=target, help="safetensors file to write")
    repair.add_argument(
        "--scales",
        choices=format.ORDERS,
        default=format.AUTO,
        help="order of scales whose shape fits both; default: auto, by padding and statistics",
    )
    repair.add_argument("--overwrite", action="store_true", help="replace an existing DST")

    probe = command(
        commands, "probe", _probe, "compare quant_probe's sensitivity scores with MXFP8's error"
    )
    probe.add_argument("source", metavar="SRC", type=place, help=f"model to probe: {MODEL}")
    probe.add_argument(
        "--calibration",
        metavar="FILE",
        type=place,
        help="calibration (safetensors); measure the error of layer outputs on its data, too",
    )
    probe.add_argument("--report", metavar="FILE.json", type=place, help="write the result as JSON")
    probe.add_argument("--csv", metavar="FILE.csv", type=place, help="write the result as a table")
    probe.add_argument("--overwrite", action="store_true", help="replace existing files")


def _inspect(arguments) -> Answer:
    from ..checks.inspect import inspect_file

    with progress("inspect") if not arguments.header else contextlib.nullcontext() as bar:
        result = inspect_file(arguments.file, every_byte=not arguments.header, progress=bar)
    return Answer(lambda: show(result.summary()), result.to_json, int(bool(result.problems)))


def _verify(arguments) -> Answer:
    from ..checks.verify import verify_file

    with progress("verify") as bar:
        result = verify_file(arguments.file, arguments.source, bar)

    def show_result() -> None:
        rows = [
            ("exact" if sqnr.sqnr_db is None else f"{sqnr.sqnr_db:.2f} dB", plain(name))
            for name, sqnr in result.layers.items()
        ]
        if rows:
            show_table(("SQNR", "layer"), rows, "layer", right=("SQNR",))
            show("")
        show(result.summary())

    return Answer(show_result, result.to_json, int(bool(result.problems)))


def _repair(arguments) -> Answer:
    from ..checks.repair import repair_file
    from ..checks.scan import check_file

    with progress("repair") as bar:
        result = repair_file(
            arguments.source,
            arguments.target,
            scales=arguments.scales,
            overwrite=arguments.overwrite,
            progress=bar,
        )
    warnings = check_file(arguments.target)
    return Answer(
        lambda: show(result.summary(warnings)),
        lambda: result.to_json(warnings),
        int(bool(result.problems)),
    )


def _probe(arguments) -> Answer:
    from ..checks.probe import probe_file

    check_outputs(arguments, "report", "csv")
    calibration = read_calibration(arguments.calibration)
    with progress("probe") as bar:
        result = probe_file(arguments.source, calibration=calibration, progress=bar)
    written = [
        write(option, path, text().encode())
        for option, path, text in (
            ("report", arguments.report, result.to_json),
            ("csv", arguments.csv, result.to_csv),
        )
        if path
    ]

    def show_result() -> None:
        numbers = ("score", "SQNR", *(("error",) if calibration is not None else ()))
        rows = []
        for layer in sorted(result.layers, key=lambda layer: -layer.score):
            error = "" if layer.output_error is None else f"{layer.output_error:.2e}"
            cells = (
                f"{layer.score:.4f}",
                "exact" if layer.sqnr_db is None else f"{layer.sqnr_db:.2f} dB",
                *((error,) if calibration is not None else ()),
            )
            rows.append((*cells, layer.recommendation, plain(layer.key)))
        show_table((*numbers, "advice", "layer"), rows, "layer", right=numbers)
        show("\n".join([
            "",
            "score and advice are quant_probe's, from statistics of the weights; `convert` does "
            "not use them. SQNR is measured.",
            result.summary(),
            *written,
        ]))  # fmt: skip

    return Answer(show_result, result.to_json)
