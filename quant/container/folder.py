"""Write a folder whole or not at all.

Its files are written in a folder beside it, `<name>.mxfp8.parts`, which gets the name at the end. A
part file with a lock (`part_file`) tells a writer that is at work from one that was killed, whose
folder the next writer removes. A folder that holds something is never replaced: files that others
added to it would be lost.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .part_file import create_part_file, discard
from .writer import Writer, sync_folder

SUFFIX = ".mxfp8.parts"
_PIECE = 1 << 22  # bytes copied at a time


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
        discard(lock, file)
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
    """Remove a folder, if it is there."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)


@dataclass(frozen=True)
class ModelFile:
    """One safetensors file of a folder.

    Attributes:
        name: may have a folder before it.
        tensors: (name, dtype, shape) of each; metadata: of its header.
    """

    name: str
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    metadata: Mapping[str, str]


class FolderWriter:
    """Writes tensors to several files of a new folder, as `Writer` does to one, and other files.

    A context manager; the folder appears when it is left without an error. Arguments and errors as
    for `new_folder` and `Writer`.

    Args:
        models: the safetensors files; each tensor is in one of them.
        texts: name -> content of small files.
        copies: name -> file that is copied under it.
        tick: called every few megabytes while files are synced, read back and copied.
    """

    def __init__(
        self,
        target: str | os.PathLike,
        models: Iterable[ModelFile],
        texts: Mapping[str, str],
        copies: Mapping[str, Path],
        tick: Callable[[], None] = lambda: None,
    ):
        self.target = Path(os.path.abspath(target))
        folder = self.target.with_name(self.target.name + SUFFIX)
        self._writers = [Writer(folder / m.name, m.tensors, m.metadata, tick=tick) for m in models]
        self._texts, self._copies, self._tick = texts, copies, tick
        self._home = {name: writer for writer in self._writers for name in writer.tensors}
        self.tensors = {name: writer.tensors[name] for name, writer in self._home.items()}

    @property
    def nbytes(self) -> int:
        """Size of all files but the texts."""
        copied = sum(path.stat().st_size for path in self._copies.values())
        return copied + sum(writer.nbytes for writer in self._writers)

    def check(self) -> None:
        """Raise what entering would, and leave nothing."""
        lock, file = create_part_file(self.target)
        try:
            _check_target(self.target, self.nbytes)
        finally:
            discard(lock, file)

    def __enter__(self) -> FolderWriter:
        with contextlib.ExitStack() as stack:
            self._folder = stack.enter_context(new_folder(self.target, self.nbytes))
            stack.push(self._write_others)  # once the models are there
            for writer in self._writers:
                writer.target.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(writer)
            self._stack = stack.pop_all()
        return self

    def write(self, name: str, data, offset: int | None = None) -> None:
        """Write a piece of a tensor's bytes, as `Writer.write`."""
        self._home[name].write(name, data, offset)

    def __exit__(self, kind, error, trace) -> None:
        self._stack.__exit__(kind, error, trace)

    def _write_others(self, kind, error, trace) -> None:
        if error is not None:
            return
        for name, text in self._texts.items():
            self._write_other(name, [text.encode()])
        for name, source in self._copies.items():
            with source.open("rb") as file:
                self._write_other(name, iter(functools.partial(file.read, _PIECE), b""))

    def _write_other(self, name: str, pieces: Iterable[bytes]) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            for piece in pieces:
                file.write(piece)
                self._tick()
            file.flush()
            os.fsync(file.fileno())
