"""`mxfp8 export` and `mxfp8 card`: a file for other programs, and the page of a hub about it."""

from __future__ import annotations

from . import Answer, command, place
from .terminal import progress, show


def add(commands) -> None:
    export = command(commands, "export", _export, "write an MXFP8 file in the form of MLX")
    export.add_argument("file", metavar="FILE", type=place, help="MXFP8 file")
    export.add_argument(
        "--mlx",
        metavar="FOLDER",
        type=place,
        required=True,
        help="folder to make for MLX; it appears whole or not at all",
    )
    export.add_argument(
        "--config",
        metavar="CONFIG.json",
        type=place,
        help="config.json of the original model; its fields are kept. Z-Image needs none",
    )


def _export(arguments) -> Answer:
    from ...integrations.mlx import export_mlx

    with progress("export") as bar:
        result = export_mlx(arguments.file, arguments.mlx, config=arguments.config, progress=bar)
    return Answer(lambda: show(result.summary()), result.to_json)
