"""`mxfp8 backends` and `mxfp8 recommend`: what this machine has, and what suits it."""

from __future__ import annotations

from dataclasses import asdict

from ..container.header import plain
from ..reports import document
from . import MODEL, Answer, command, place
from .terminal import show, show_table

_BACKENDS = "mxfp8_backends"


def add(commands) -> None:
    command(
        commands, "backends", _backends, "list the backends, and which of them run on this machine"
    )
    recommend = command(
        commands,
        "recommend",
        _recommend,
        "say which format suits this machine and a model, and what to install",
    )
    recommend.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        type=place,
        help=f"model, or MXFP8 file: {MODEL}",
    )
    recommend.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; default: the GPU, if there is one"
    )


def _recommend(arguments) -> Answer:
    from ..advice.recommend import recommend

    found = recommend(arguments.file, arguments.device)

    def show_result() -> None:
        model = [found.model, found.architecture or "architecture not recognized"]
        heading = f"{plain(model[0])} ({model[1]})" if found.model else "Formats"
        show("\n".join([*found.here(), "", f"{heading}:", ""]))
        right = ("bits", "error", "size", "fits", "needs")
        show_table(found.columns(), found.rows(), "format", right)
        show("\n".join(["", *found.notes()]))

    return Answer(show_result, found.to_json)


def _backends(arguments) -> Answer:
    from ...kernels import describe_paths, list_backends, machine

    here, backends, paths = machine(), list_backends(), describe_paths()

    def show_result() -> None:
        show(f"{here}\n\nBackends, in order of preference:\n")
        rows = [
            (
                backend.name,
                "available" if backend.available else f"not used: {backend.reason}",
                backend.summary,
            )
            for backend in backends
        ]
        show_table(("backend", "here", "what it does"), rows, "backend")
        show("\nLinear layers, by precision:\n")
        show_table(("precision", "backend"), [path.split(": ", 1) for path in paths], "precision")

    def to_json() -> str:
        fields = {
            "machine": here,
            "backends": [asdict(backend) for backend in backends],
            "linear_layers": dict(path.split(": ", 1) for path in paths),
        }
        return document.write(_BACKENDS, fields)

    return Answer(show_result, to_json)
