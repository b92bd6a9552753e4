"""`mxfp8 backends`: what this machine has."""

from __future__ import annotations

from dataclasses import asdict

from ..reports import document
from . import Answer, command
from .terminal import show, show_table

_BACKENDS = "mxfp8_backends"


def add(commands) -> None:
    command(
        commands, "backends", _backends, "list the backends, and which of them run on this machine"
    )


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
