"""Write a safetensors file whole or not at all, with bounded memory.

The header is known before the first byte of data, so tensors are written in pieces as they come,
each to its place, by any number of threads. The file grows as a part file beside its target
(`part_file`), is synced, read back and compared with checksums taken while writing, and only then
gets its name. Whatever goes wrong before that leaves the target as it was.

Each tensor is aligned to its element size, and one whose size is a multiple of 64 bytes (all MXFP8
data and scales) to 64 bytes, because readers map files straight into tensors. The same tensors in
the same order, with the same metadata, give the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .header import DTYPES, FormatError, TensorInfo, nbytes, quoted, read_container
from .part_file import create_part_file, discard, is_at
from .pipeline import Pipeline, cores

ALIGNMENT = 64
_PIECE = 1 << 22  # bytes that share a checksum
_READ_BACK = 1 << 18  # bytes read back at a time
_SYNC_EVERY = 1 << 27  # bytes; the disk works while more is computed, and the last sync is short
_READERS = 4  # threads that read back


class _Piece(NamedTuple):
    """A written stretch of a tensor's bytes; `begin` counts from the tensor's start."""

    begin: int
    end: int
    checksum: int
    tensor: TensorInfo

    @property
    def size(self) -> int:
        return self.end - self.begin


class Writer:
    """A context manager; the file appears when it is left without an error.

    Args:
        target: the file to make.
        tensors: (name, dtype, shape) of every tensor, in any order.
        metadata: the header's __metadata__, strings to strings.
        overwrite: whether an existing target may be replaced.
        tick: called every few megabytes while the file is synced and read back; what it raises
            stops the writer cleanly.

    Raises:
        FileExistsError: the target exists and overwrite is off.
        OSError: another writer is at work on the target; no space, no permission, no such folder.
            Nothing is left behind.
    """

    def __init__(
        self,
        target: str | os.PathLike,
        tensors: Iterable[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str],
        overwrite: bool = False,
        tick: Callable[[], None] = lambda: None,
    ):
        self.target = Path(target)
        self.overwrite = overwrite
        self.part_file: Path | None = None  # while the context is open
        self._tick = tick
        self._header, self.tensors = _lay_out(tensors, metadata)
        self._pieces: dict[str, list[_Piece]] = {name: [] for name in self.tensors}
        self._position = dict.fromkeys(self.tensors, 0)
        self._unsynced = 0
        self._lock = threading.Lock()  # of the three above
        self._file: BinaryIO | None = None

    @property
    def nbytes(self) -> int:
        """Size of the finished file."""
        return max((t.end for t in self.tensors.values()), default=len(self._header))

    def check(self) -> None:
        """Raise what entering would, and leave nothing."""
        self._open()
        self._discard()

    def __enter__(self) -> Writer:
        self._open()
        try:
            with self._explained():
                self._file.truncate(self.nbytes)
                _write_at(self._file.fileno(), self._header, 0)
        except BaseException:
            self._discard()
            raise
        return self

    def _open(self) -> None:
        """Create the part file, where the target can be written."""
        self.part_file, self._file = create_part_file(self.target)
        try:
            _check_target(self.target, self.overwrite)
            self._check_space()
        except BaseException:
            self._discard()
            raise

    def write(self, name: str, data, offset: int | None = None) -> None:
        """Write a piece of a tensor's bytes (anything with a flat buffer).

        Any thread may write any piece; the order does not matter.

        Args:
            offset: of the piece within the tensor; default: after the piece written before.
        """
        data = memoryview(data).cast("B")
        info = self.tensors[name]
        with self._lock:
            begin = self._position[name] if offset is None else offset
            end = self._position[name] = begin + len(data)
        if end > info.nbytes:
            raise FormatError(
                f"{self.target.name}: tensor {quoted(name)} got more bytes than it has"
            )
        for start in range(begin, end, _PIECE):
            piece = data[start - begin : start - begin + _PIECE]
            with self._explained():
                _write_at(self._file.fileno(), piece, info.begin + start)
            self._remember(_Piece(start, start + len(piece), zlib.crc32(piece), info))

    def _remember(self, piece: _Piece) -> None:
        """Record a written piece, and sync now and then while other threads go on."""
        with self._lock:
            self._pieces[piece.tensor.name].append(piece)
            self._unsynced += piece.size
            due = self._unsynced >= _SYNC_EVERY
            if due:
                self._unsynced = 0
        if due:
            self._sync()

    def _sync(self) -> None:
        with self._explained():
            os.fsync(self._file.fileno())

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:
            self._discard()
            return
        try:
            for info in self.tensors.values():
                self._check_complete(info)
            self._tick()
            self._sync()
            self._verify()
            self._publish()
        except BaseException:
            self._discard()
            raise

    def _check_complete(self, info: TensorInfo) -> None:
        """Raise FormatError unless every byte of a tensor was written exactly once."""
        pieces = self._pieces[info.name]
        pieces.sort()
        begins, ends = [piece.begin for piece in pieces], [piece.end for piece in pieces]
        if [*begins, info.nbytes] != [0, *ends]:
            raise FormatError(
                f"{self.target.name}: tensor {quoted(info.name)} was not fully written"
            )

    def _verify(self) -> None:
        """Read the file back: its header as any reader would, its data against the checksums."""
        header = read_container(self.part_file)
        if dict(header.tensors) != self.tensors:
            raise FormatError(f"{self.target.name}: the header read back differs from the plan")
        workers = min(_READERS, cores())
        pieces = (piece for name in header.tensors for piece in self._pieces[name])
        with Pipeline(self._compare, workers, 4 * workers * _PIECE) as pipeline:
            for _ in pipeline.run(pieces):
                self._tick()

    def _compare(self, piece: _Piece) -> None:
        """Read a piece back and compare it with its checksum."""
        buffer = memoryview(bytearray(_READ_BACK))
        left, checksum = piece.size, 0
        with self.part_file.open("rb", buffering=0) as file:
            file.seek(piece.tensor.begin + piece.begin)
            while left and (count := file.readinto(buffer[:left])):
                checksum = zlib.crc32(buffer[:count], checksum)
                left -= count
        if left or checksum != piece.checksum:
            raise FormatError(
                f"{self.target.name}: tensor {quoted(piece.tensor.name)} reads back differently "
                "from what was written; check the disk"
            )

    def _publish(self) -> None:
        """Rename the part file to the target; the lock is held until then."""
        if not is_at(self.part_file, self._file.fileno()):
            raise OSError(
                errno.ENOENT, f"{self.part_file.name!r} was deleted while it was written",
                str(self.target),
            )  # fmt: skip
        if os.name == "nt":  # an open file cannot be renamed there
            self._file.close()
        try:
            if self.overwrite:
                os.replace(self.part_file, self.target)
            else:
                _rename_new(self.part_file, self.target)
        except PermissionError as error:
            raise PermissionError(
                error.errno,
                "the file cannot be replaced; close the program that has it open (ComfyUI, say), "
                "or give another name",
                str(self.target),
            ) from error
        self._file.close()
        sync_folder(self.target.parent)

    def _check_space(self) -> None:
        """Raise OSError now for what would fill the disk after minutes of work."""
        free = shutil.disk_usage(self.target.parent).free
        if self.nbytes > free:
            raise OSError(
                errno.ENOSPC,
                f"the disk has {free / 1e9:.2f} GB free and the file needs "
                f"{self.nbytes / 1e9:.2f} GB; make room, or choose another folder",
                str(self.target),
            )

    def _discard(self) -> None:
        # The error that led here matters more than one of deleting.
        discard(self.part_file, self._file)

    @contextlib.contextmanager
    def _explained(self):
        """Say what to do about an error of the disk."""
        try:
            yield
        except OSError as error:
            if error.errno in _ADVICE:
                size = f"{self.nbytes / 1e9:.2f} GB"
                advice = _ADVICE[error.errno].format(size=size)
                raise OSError(error.errno, advice, str(self.target)) from error
            raise


_ADVICE = {
    errno.ENOSPC: "the disk is full; make room for {size}, or choose another folder",
    errno.EFBIG: "a file of {size} is over a limit of the file system; choose another folder",
    errno.EIO: "writing failed; check the disk",
}
if hasattr(errno, "EDQUOT"):  # not on Windows
    _ADVICE[errno.EDQUOT] = "your quota is used up; make room for {size}, or choose another folder"


def _check_target(target: Path, overwrite: bool) -> None:
    """Raise OSError if the target is not a file, or a file that may not be replaced."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "this is a folder; give a file name", str(target))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "this is not an ordinary file; give another name", str(target))
    if target.exists() and not overwrite:
        raise _exists(target)


def _lay_out(tensors, metadata) -> tuple[bytes, dict[str, TensorInfo]]:
    """Order the tensors, place them, and encode the header."""

    def order(tensor):
        _, dtype, shape = tensor
        whole = nbytes(dtype, shape) % ALIGNMENT == 0
        return not whole, 0 if whole else -DTYPES[dtype]

    header = {"__metadata__": dict(metadata)} if metadata else {}
    placed: dict[str, TensorInfo] = {}
    end = 0
    for name, dtype, shape in sorted(tensors, key=order):
        if name in placed:
            raise FormatError(f"two tensors are called {quoted(name)}")
        begin, end = end, end + nbytes(dtype, shape)
        placed[name] = TensorInfo(name, dtype, tuple(shape), begin, end)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    data = 8 + len(text)
    placed = {
        name: replace(info, begin=data + info.begin, end=data + info.end)
        for name, info in placed.items()
    }
    return struct.pack("<Q", len(text)) + text, placed


def _write_at(descriptor: int, data, offset: int) -> None:
    """Write all of `data` at an offset; a single call may write less."""
    data = memoryview(data)
    while data:
        count = _pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _seek_and_write(descriptor: int, data, offset: int) -> int:
    """`os.pwrite` for Windows, which has none. Not run there so far."""
    with _one_at_a_time:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, data)


_one_at_a_time = threading.Lock()
_pwrite = getattr(os, "pwrite", _seek_and_write)


def _rename_new(source: Path, target: Path) -> None:
    """Rename unless the target exists, in one step, so that of two writers only one succeeds."""
    if os.name == "nt":  # where a rename never replaces
        os.rename(source, target)
        return
    try:
        os.link(source, target)
    except FileExistsError:
        raise _exists(target) from None
    except OSError:  # a file system without hard links
        if target.exists():
            raise _exists(target) from None
        os.rename(source, target)
    else:
        source.unlink()


@contextlib.contextmanager
def new_folders(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; on an error, remove those that are new and empty.

    Raises:
        NotADirectoryError: a file has that name, or a parent's.
    """
    missing = [f for f in (folder, *folder.parents) if not f.exists()]  # innermost first
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            reason = "not a folder; choose another"
            raise NotADirectoryError(errno.ENOTDIR, reason, str(folder)) from error
        yield
    except BaseException:
        for new in missing:
            with contextlib.suppress(OSError):  # not empty by now
                new.rmdir()
        raise


def _exists(target: Path) -> FileExistsError:
    return FileExistsError(
        errno.EEXIST,
        "the file exists; turn on overwrite to replace it, or give another name",
        str(target),
    )


def sync_folder(folder: Path) -> None:
    """Have the new name survive a power cut, where the system can; the file is synced already."""
    if os.name == "posix":
        with contextlib.suppress(OSError):  # one that may be written but not read, for one
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
