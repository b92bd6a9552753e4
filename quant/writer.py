"""Write a safetensors file whole or not at all, with bounded memory.

The header is known before the first byte of data, so tensors are written as they come, in pieces,
each at its place. The file grows under a temporary name beside its target, is synced, read back
and compared with checksums taken while writing, and only then gets its name. Whatever goes wrong
before that leaves the target as it was.

Tensors are laid out so that each is aligned to its element size, and those whose size is a
multiple of 64 bytes (all MXFP8 data and scales) to 64 bytes: readers map files straight into
tensors. The same tensors in the same order, with the same metadata, give the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from . import format
from .format import DTYPES, FormatError, TensorInfo

ALIGNMENT = 64
_READ_BACK = 1 << 22  # bytes
_SYNC_EVERY = 1 << 28  # bytes


class Writer:
    """A context manager; leaving it without an error is what makes the file appear.

    Args:
        target: the file to make.
        tensors: (name, dtype, shape) of every tensor, in any order.
        metadata: the header's __metadata__, strings to strings.
        overwrite: whether an existing target may be replaced.
        tick: called every few megabytes while the file is synced and read back; what it raises
            stops the writer cleanly.

    Raises:
        FileExistsError: the target exists and overwrite is off.
        OSError: no space, no permission; nothing is left behind.
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
        self._tick = tick
        self._unsynced = 0
        self._header, self.tensors = _lay_out(tensors, metadata)
        self._position = {name: info.begin for name, info in self.tensors.items()}
        self._checksum = dict.fromkeys(self.tensors, 0)
        self._file = None
        token = f"{os.getpid()}-{secrets.token_hex(4)}"
        self.temporary = self.target.with_name(f"{self.target.name}.{token}.part")

    @property
    def nbytes(self) -> int:
        """Size of the finished file."""
        return max((t.end for t in self.tensors.values()), default=len(self._header))

    def __enter__(self) -> Writer:
        if not self.overwrite and self.target.exists():
            raise _exists(self.target)
        _check_space(self.target.parent, self.nbytes)
        self._file = self.temporary.open("xb", buffering=0)
        try:
            self._file.truncate(self.nbytes)
            _write_at(self._file.fileno(), self._header, 0)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, data) -> None:
        """Append a piece of a tensor's bytes (anything with a flat buffer) to what it has."""
        data = memoryview(data).cast("B")
        begin = self._position[name]
        if begin + len(data) > self.tensors[name].end:
            raise FormatError(f"{self.target.name}: tensor {name!r} got more bytes than it has")
        _write_at(self._file.fileno(), data, begin)
        self._unsynced += len(data)
        if self._unsynced >= _SYNC_EVERY:  # so that the last sync is short and can be interrupted
            os.fsync(self._file.fileno())
            self._unsynced = 0
        self._checksum[name] = zlib.crc32(data, self._checksum[name])
        self._position[name] = begin + len(data)

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:
            self._discard()
            return
        try:
            for name, info in self.tensors.items():
                if self._position[name] != info.end:
                    raise FormatError(f"{self.target.name}: tensor {name!r} was not fully written")
            self._tick()
            os.fsync(self._file.fileno())
            self._file.close()
            self._verify()
            self._publish()
        except BaseException:
            self._discard()
            raise

    def _verify(self) -> None:
        """Read the file back: its header as any reader would, its data against the checksums."""
        header = format.read_header(self.temporary)
        if dict(header.tensors) != self.tensors:
            raise FormatError(f"{self.target.name}: the header read back differs from the plan")
        buffer = memoryview(bytearray(_READ_BACK))
        with self.temporary.open("rb", buffering=0) as file:
            for name, info in header.tensors.items():
                file.seek(info.begin)
                left, checksum = info.nbytes, 0
                while left:
                    self._tick()
                    count = file.readinto(buffer[: min(left, _READ_BACK)])
                    if not count:
                        break
                    checksum = zlib.crc32(buffer[:count], checksum)
                    left -= count
                if left or checksum != self._checksum[name]:
                    raise FormatError(
                        f"{self.target.name}: tensor {name!r} reads back differently from what was "
                        "written; check the disk"
                    )

    def _publish(self) -> None:
        if self.overwrite:
            os.replace(self.temporary, self.target)
        else:
            _rename_new(self.temporary, self.target)
        _sync_folder(self.target.parent)

    def _discard(self) -> None:
        if self._file is not None:
            self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self.temporary.unlink()


def _lay_out(tensors, metadata) -> tuple[bytes, dict[str, TensorInfo]]:
    """Order the tensors, place them, and encode the header."""

    def key(tensor):
        _, dtype, shape = tensor
        bits = DTYPES[dtype]
        whole = format.numel(shape) * bits // 8 % ALIGNMENT == 0
        return not whole, 0 if whole else -bits

    entries, offset = {}, 0
    for name, dtype, shape in sorted(tensors, key=key):
        if name in entries:
            raise FormatError(f"two tensors are called {name!r}")
        size = format.numel(shape) * DTYPES[dtype] // 8
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    header = {"__metadata__": dict(metadata), **entries} if metadata else entries
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    data = 8 + len(text)
    placed = {
        name: TensorInfo(
            name, e["dtype"], tuple(e["shape"]), *(data + o for o in e["data_offsets"])
        )
        for name, e in entries.items()
    }
    return struct.pack("<Q", len(text)) + text, placed


def _check_space(folder: Path, size: int) -> None:
    """Refuse now what would fill the disk after minutes of work."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(
            errno.ENOSPC,
            f"{folder} has {free / 1e9:.2f} GB free, the file needs {size / 1e9:.2f} GB",
        )


def _write_at(descriptor: int, data, offset: int) -> None:
    """Write all of `data` at an offset; a single call may write less."""
    data = memoryview(data)
    os.lseek(descriptor, offset, os.SEEK_SET)
    while data:
        data = data[os.write(descriptor, data) :]


def _rename_new(source: Path, target: Path) -> None:
    """Rename unless the target exists, without a moment in which two writers could both pass."""
    if os.name == "nt":  # there, a rename never replaces
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


def _exists(target: Path) -> FileExistsError:
    return FileExistsError(
        errno.EEXIST,
        "the file exists; turn on overwrite to replace it, or give another name",
        str(target),
    )


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut, where the system can; the file is there already."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
