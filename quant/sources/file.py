"""Where a conversion reads from: tensors by name, a few rows at a time.

`FileSource` is a safetensors file; `shards.ShardedSource` is a model in several; `PartSource` is a
source under other names. A model in memory offers the same four members (see
`nodes/model_source.py`), so file and in-graph conversion are one code path. `opening.open_source`
finds out which of them a path is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ..container.header import FormatError, TensorInfo, numel, quoted
from ..format import FLOATS, Header, read_header
from . import unsupported

_PIECE = 1 << 22  # bytes copied at a time

TORCH_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "BOOL": torch.bool, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "C64": torch.complex64,
}  # fmt: skip
HEADER_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class Source(Protocol):
    """What a conversion needs of its input."""

    name: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]  # key -> (header dtype, shape)

    def rows(self, key: str, first: int, last: int) -> torch.Tensor:
        """Rows first..last of a 2-D tensor, on the CPU."""

    def pieces(self, key: str) -> Iterator[memoryview]:
        """A tensor's bytes, in order, in pieces."""


class StoredSource(Source, Protocol):
    """A source on disk, a context manager.

    Attributes:
        files: every file it reads.
    """

    files: tuple[Path, ...]

    def close(self) -> None:
        """Close the files; reading opens them again."""

    def __enter__(self) -> StoredSource:
        """Nothing is opened but what reading needs."""

    def __exit__(self, *_) -> None:
        """Close the files."""


class FileSource:
    """A safetensors file, read with plain reads into memory of ours: nothing is mapped."""

    def __init__(self, path):
        path = Path(path)
        unsupported.check_file(path)
        self.header: Header = read_header(path)
        self.name = path.name
        self.files = (path,)
        self.metadata = self.header.metadata
        self.tensors = {t.name: (t.dtype, t.shape) for t in self.header.tensors.values()}
        self._file = None
        self._identity: tuple | None = None
        self._open()

    def __enter__(self) -> FileSource:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def rows(self, key: str, first: int, last: int) -> torch.Tensor:
        info = self.header.tensors[key]
        per_row = info.nbytes // max(1, info.shape[0])
        data = self._read(info, first * per_row, (last - first) * per_row)
        return data.view(TORCH_DTYPES[info.dtype]).reshape(last - first, *info.shape[1:])

    def pieces(self, key: str) -> Iterator[memoryview]:
        info = self.header.tensors[key]
        for offset in range(0, info.nbytes, _PIECE):
            yield as_bytes(self._read(info, offset, min(_PIECE, info.nbytes - offset)))

    def _open(self) -> None:
        self._file = self.files[0].open("rb", buffering=0)
        status = os.fstat(self._file.fileno())
        identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        if self._identity not in (None, identity):
            self.close()
            raise OSError(f"{self.name}: the file was changed or replaced while it was read")
        self._identity = identity

    def _read(self, info: TensorInfo, offset: int, count: int) -> torch.Tensor:
        data = torch.empty(count, dtype=torch.uint8)
        view = as_bytes(data)
        try:
            if self._file is None:
                self._open()
            self._file.seek(info.begin + offset)
            while view and (read := self._file.readinto(view)):
                view = view[read:]
        except OSError as error:
            if error.errno is None:  # the file was changed
                raise
            raise OSError(
                error.errno,
                f"reading {quoted(info.name)} failed ({error.strerror}); check the file and its "
                "disk",
                self.name,
            ) from error
        if view:
            raise OSError(f"{self.name}: the file became shorter while {info.name!r} was read")
        return data


@dataclass(frozen=True)
class Part:
    """Rows first..last of a tensor of another source; all of it where `last` is None."""

    key: str
    first: int = 0
    last: int | None = None


class PartSource:
    """A source under other names, with tensors that are rows of several put one below the other.

    Args:
        source: where the bytes are.
        parts: key -> what it is made of. Where dtypes differ the result is F32, which holds them
            all exactly.

    Raises:
        FormatError: the parts of a tensor do not go together.
    """

    def __init__(self, source: StoredSource, parts: Mapping[str, tuple[Part, ...]]):
        self.name, self.files, self.metadata = source.name, source.files, source.metadata
        self._source = source
        self._parts: dict[str, tuple[Part, ...]] = {}
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for key, wanted in parts.items():
            self._parts[key], self.tensors[key] = self._joined(key, wanted)

    def __enter__(self) -> PartSource:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._source.close()

    def rows(self, key: str, first: int, last: int) -> torch.Tensor:
        dtype = TORCH_DTYPES[self.tensors[key][0]]
        found, begin = [], 0
        for part in self._parts[key]:
            end = begin + part.last - part.first
            low, high = max(first, begin), min(last, end)
            if low < high:
                shift = part.first - begin
                found.append(self._source.rows(part.key, low + shift, high + shift).to(dtype))
            begin = end
        return found[0] if len(found) == 1 else torch.cat(found)

    def pieces(self, key: str) -> Iterator[memoryview]:
        parts, (dtype, shape) = self._parts[key], self.tensors[key]
        if self._source.tensors[parts[0].key] == (dtype, shape) and len(parts) == 1:
            yield from self._source.pieces(parts[0].key)
            return
        # Pieces of the same size as a file's, so that the two can be compared.
        per_row = numel(shape[1:]) * TORCH_DTYPES[dtype].itemsize
        step = max(1, _PIECE // max(1, per_row))
        buffer = bytearray()
        for first in range(0, shape[0], step):
            rows = self.rows(key, first, min(first + step, shape[0]))
            buffer += as_bytes(rows.contiguous())
            while len(buffer) >= _PIECE:
                yield memoryview(bytes(buffer[:_PIECE]))
                del buffer[:_PIECE]
        if buffer:
            yield memoryview(buffer)

    def _joined(self, key: str, wanted: tuple[Part, ...]):
        """A tensor's parts with their last rows, and its dtype and shape."""
        found = [self._source.tensors[part.key] for part in wanted]
        dtype, shape = found[0]
        if len(wanted) == 1 and wanted[0].last is None:
            rows = shape[0] if shape else 1
            return (Part(wanted[0].key, 0, rows),), (dtype, shape)
        parts = tuple(
            Part(p.key, p.first, s[0] if p.last is None and s else p.last)
            for p, (_, s) in zip(wanted, found, strict=True)
        )
        dtypes = sorted({d for d, _ in found})
        shapes = {part.key: shape for part, (_, shape) in zip(parts, found, strict=True)}
        if len({s[1:] for _, s in found}) > 1 or not all(s for _, s in found):
            said = " and ".join(f"{quoted(k)} {list(s)}" for k, s in shapes.items())
            raise FormatError(f"{self.name}: {said} cannot be joined to {quoted(key)}")
        if len(dtypes) > 1 and not FLOATS.keys() >= set(dtypes):
            raise FormatError(
                f"{self.name}: the parts of {quoted(key)} are {' and '.join(dtypes)}; "
                "they must be of one dtype, or F32, F16 and BF16"
            )
        rows = sum(part.last - part.first for part in parts)
        return parts, (dtype if len(dtypes) == 1 else "F32", (rows, *shape[1:]))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.view(torch.uint8).reshape(-1).numpy())
