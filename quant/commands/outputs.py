"""Files that commands read beside the model and write: checked before any work."""

from __future__ import annotations

import argparse
import errno
from pathlib import Path

from ..container.header import SUFFIXES
from .terminal import progress


def target(text: str) -> Path:
    """The argument that names a model to write."""
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not the name of a safetensors file; give one that ends in {SUFFIXES[0]}"
        )
    return path


def read_calibration(path: Path | None):
    """The calibration in a file, or None without one."""
    if path is None:
        return None
    from ..conversion.calibration import load

    with progress("calibration") as bar:
        return load(path, bar)


def check_outputs(arguments, *options: str, source: Path | None = None) -> None:
    """Raise, before any work, for an output that would replace another file or cannot be written.

    Args:
        options: those that name outputs beside DST.
        source: the model; default: the one that the arguments name.
    """
    from ..sources.open import files_of

    names = {"calibration", "held_out", "report"} - {*options}
    inputs = (getattr(arguments, name, None) for name in sorted(names))
    taken = [*files_of(source or arguments.source), *filter(None, inputs)]
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
    if path.suffix.lower() in SUFFIXES:
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


def write(option: str, path: Path, text: str) -> str:
    """Write an output, with the line ends that it has; returns a line that says so."""
    try:
        path.write_bytes(text.encode())
    except OSError as error:  # a full disk's error does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error
    return f"{option}: {path}"
