"""Where a conversion reads from: tensors by name, a few rows at a time.

`FileSource` is a safetensors file. A model in memory offers the same four members (see
`nodes/model_source.py`), so file and in-graph conversion are one code path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from .format import Header, TensorInfo, read_header

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


class FileSource:
    """A safetensors file, read with plain reads into memory of ours: nothing is mapped."""

    def __init__(self, path):
        self.header: Header = read_header(path)
        self.name = Path(path).name
        self.metadata = self.header.metadata
        self.tensors = {t.name: (t.dtype, t.shape) for t in self.header.tensors.values()}
        self._file = self.header.path.open("rb", buffering=0)

    def __enter__(self) -> FileSource:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def rows(self, key: str, first: int, last: int) -> torch.Tensor:
        info = self.header.tensors[key]
        per_row = info.nbytes // info.shape[0]
        data = self._read(info, first * per_row, (last - first) * per_row)
        return data.view(TORCH_DTYPES[info.dtype]).reshape(last - first, *info.shape[1:])

    def pieces(self, key: str) -> Iterator[memoryview]:
        info = self.header.tensors[key]
        for offset in range(0, info.nbytes, _PIECE):
            yield as_bytes(self._read(info, offset, min(_PIECE, info.nbytes - offset)))

    def _read(self, info: TensorInfo, offset: int, count: int) -> torch.Tensor:
        data = torch.empty(count, dtype=torch.uint8)
        view = as_bytes(data)
        self._file.seek(info.begin + offset)
        while view:
            got = self._file.readinto(view)
            if not got:
                raise OSError(f"{self.name}: the file became shorter while {info.name!r} was read")
            view = view[got:]
        return data


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.view(torch.uint8).reshape(-1).numpy())
