"""Files that commands read beside the model and write: checked before any work."""

from __future__ import annotations

import argparse
import errno
import os
import shutil
from pathlib import Path

from ..container.header import SUFFIXES, plain
from ..container.part_file import create_part_file, discard
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
    return _resolved(one) == _resolved(other)


def _resolved(path: Path) -> Path:
    """The file that a path leads to; of a link that leads to itself, an OSError."""
    try:
        return path.resolve()
    except RuntimeError as error:  # until Python 3.13
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error


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
    if not _is_stream(path):
        discard(*create_part_file(_resolved(path)))


def write(option: str, path: Path, data: bytes) -> str:
    """Write an output, a file whole or not at all; returns a line that says so."""
    try:
        if _is_stream(path):
            path.write_bytes(data)
        else:
            _replace(_resolved(path), data)
    except OSError as error:
        if error.filename is not None:
            raise
        # A full disk's error does not name the file.
        raise OSError(error.errno, error.strerror, str(path)) from error
    return f"{option}: {plain(str(path))}"


def _is_stream(path: Path) -> bool:
    """Whether this is a device or a pipe, to be written as it is."""
    return path.exists() and not path.is_file()


def _replace(target: Path, data: bytes) -> None:
    """Make a file, or put it in the place of another."""
    part, file = create_part_file(target)
    try:
        part.write_bytes(data)
        if target.exists():
            shutil.copymode(target, part)
        if os.name == "nt":  # an open file cannot be renamed there
            file.close()
        part.replace(target)
    except BaseException:
        discard(part, file)
        raise
    file.close()
