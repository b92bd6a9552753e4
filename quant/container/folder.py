"""Write a folder whole or not at all.

Its files are written in a folder beside it, `<name>.mxfp8.parts`, which gets the name at the end. A
part file with a lock (`part_file`) tells a writer that is at work from one that was killed, whose
folder the next writer removes. A folder that holds something is never replaced: files that others
added to it would be lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .part_file import create_part_file, delete_if_open
from .writer import sync_folder

SUFFIX = ".mxfp8.parts"


@contextlib.contextmanager
def new_folder(target: Path, size: int) -> Iterator[Path]:
    """A folder to write flat files into; it becomes `target` if no error leaves the context.

    Args:
        target: a folder that does not exist, or is empty; the one that it is in must exist.
        size: bytes that the files will take.

    Raises:
        OSError: the target is there and not empty, another writer is at work on it, or the disk has
            no room for it. Whatever is raised, nothing is left behind.
    """
    target = Path(os.path.abspath(target))  # else "." and "a/.." have no name
    lock, file = create_part_file(target)
    try:
        _check_target(target, size)
        folder = target.with_name(target.name + SUFFIX)
        _remove(folder)  # what a killed writer left
        try:
            folder.mkdir()
            yield folder
            sync_folder(folder)
            if target.exists():  # empty; renaming onto it fails on Windows
                target.rmdir()
            folder.rename(target)
        except BaseException:
            _remove(folder)
            raise
    finally:
        delete_if_open(lock, file)
        file.close()
        if os.name == "nt":  # where an open file cannot be deleted
            lock.unlink(missing_ok=True)
    sync_folder(target.parent)


def _check_target(target: Path, size: int) -> None:
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, "this is a file; give another name for the folder", str(target)
        )
    if target.exists() and any(target.iterdir()):
        raise OSError(
            errno.ENOTEMPTY,
            "the folder is there and not empty; give another name, or remove it",
            str(target),
        )
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise OSError(
            errno.ENOSPC,
            f"the disk has {free / 1e9:.2f} GB free and the folder needs {size / 1e9:.2f} GB; "
            "make room, or choose another folder",
            str(target),
        )


def _remove(folder: Path) -> None:
    """Remove a folder of files, if it is there."""
    if folder.is_dir() and not folder.is_symlink():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
