"""Where a conversion reads from: tensors by name, a few rows at a time.

`FileSource` is a safetensors file, `shards.ShardedSource` a model in several of them, and
`PartSource` another source under other names; `open.open_source` finds out which of these a path
is. A model in memory has the same four members (`nodes/models/source.py`), so converting a file and
quantizing in the graph are one code path.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ..container.header import FormatError, TensorInfo, quoted
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
    """A source on disk, a context manager that closes its files; reading opens them again.

    Attributes:
        files: every file it reads.
    """

    files: tuple[Path, ...]

    def close(self) -> None:
        """Close the files."""

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


class FileSource(StoredSource):
    """A safetensors file, read into memory of our own: nothing is mapped.

    Args:
        header: the file's, if it was read already.
    """

    def __init__(self, path, header: Header | None = None):
        path = Path(path)
        if header is None:
            unsupported.check_file(path)
            header = read_header(path)
        self.header = header
        self.name = path.name
        self.files = (path,)
        self.metadata = self.header.metadata
        self.tensors = {t.name: (t.dtype, t.shape) for t in self.header.tensors.values()}
        self._file = None
        self._identity: tuple | None = None
        self._open()

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
    """Rows first..last of a tensor of another source; all of them if `last` is None."""

    key: str
    first: int = 0
    last: int | None = None


class PartSource(StoredSource):
    """A source under other names, some of whose tensors are joined from rows of several.

    Args:
        source: where the bytes are.
        parts: key -> parts, whose rows are stacked. If their dtypes differ, the result is F32,
            which holds them all exactly.

    Raises:
        FormatError: the parts of a tensor do not fit together.
    """

    def __init__(self, source: StoredSource, parts: Mapping[str, tuple[Part, ...]]):
        self.name, self.files, self.metadata = source.name, source.files, source.metadata
        self.header = getattr(source, "header", None)
        self._source = source
        self._parts: dict[str, tuple[Part, ...]] = {}
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for key, joined in parts.items():
            self._parts[key], self.tensors[key] = self._resolved(key, joined)

    def close(self) -> None:
        self._source.close()

    def rows(self, key: str, first: int, last: int) -> torch.Tensor:
        dtype = TORCH_DTYPES[self.tensors[key][0]]
        pieces, begin = [], 0
        for part in self._parts[key]:
            end = begin + part.last - part.first
            low, high = max(first, begin), min(last, end)
            if low < high:
                shift = part.first - begin
                pieces.append(self._source.rows(part.key, low + shift, high + shift).to(dtype))
            begin = end
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def pieces(self, key: str) -> Iterator[memoryview]:
        parts, (dtype, shape) = self._parts[key], self.tensors[key]
        if self._source.tensors[parts[0].key] == (dtype, shape) and len(parts) == 1:
            yield from self._source.pieces(parts[0].key)
            return
        # Pieces of the same size as a file's, so that `verify` can compare the two.
        per_row = math.prod(shape[1:]) * TORCH_DTYPES[dtype].itemsize
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

    def _resolved(self, key: str, parts: tuple[Part, ...]):
        """A tensor's parts with their last rows, and its (dtype, shape)."""
        infos = [self._source.tensors[part.key] for part in parts]
        dtype, shape = infos[0]
        if len(parts) == 1 and parts[0].last is None:
            return (Part(parts[0].key, 0, shape[0] if shape else 1),), (dtype, shape)
        if len({s[1:] for _, s in infos}) > 1 or not all(s for _, s in infos):
            shapes = {part.key: list(s) for part, (_, s) in zip(parts, infos, strict=True)}
            listed = " and ".join(f"{quoted(k)} {s}" for k, s in shapes.items())
            raise FormatError(f"{self.name}: {listed} cannot be joined to {quoted(key)}")
        dtypes = sorted({d for d, _ in infos})
        if len(dtypes) > 1 and not FLOATS.keys() >= set(dtypes):
            raise FormatError(
                f"{self.name}: the parts of {quoted(key)} are {' and '.join(dtypes)}; "
                "they must be of one dtype, or BF16, FP16 and FP32"
            )
        parts = tuple(
            Part(p.key, p.first, s[0] if p.last is None else p.last)
            for p, (_, s) in zip(parts, infos, strict=True)
        )
        rows = sum(part.last - part.first for part in parts)
        return parts, (dtype if len(dtypes) == 1 else "F32", (rows, *shape[1:]))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
