"""The header of a GGUF file: its architecture, and the kind of every tensor.

Inspect says of a GGUF file what it holds, whether it is whole, and what it would be as MXFP8; no
weight is read. Rejected: the gguf library, which ComfyUI does not install and which maps the whole
file. As with safetensors, no size that the file states is trusted before it is compared with the
size of the file. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..container.header import FormatError, quoted, reading
from ..progress import Meter, Progress

# Number of a tensor's kind -> name, weights per block, bytes per block. From ggml.h.
KINDS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}  # fmt: skip
PLAIN = frozenset({"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"})  # not quantized
_STRING, _ARRAY = 8, 9
# Number of a value's type -> how `struct` reads it.
_VALUES = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
MAX_HEADER = 50_000_000  # bytes; vocabularies take some 20 million
# Tensors, or entries of metadata: models have some thousands, and some dozens.
_MOST = 100_000
# In arrays: vocabularies have a quarter of a million words and twice as many merges.
_MOST_TEXTS = 4_000_000
_PIECE = 1 << 20  # bytes read at a time
_LENGTH = struct.Struct("<Q")  # of a text
_MAX_DIMENSIONS = 4
_LONGEST = 1_000  # characters of a text that is kept


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its shape as torch has it, its kind ("Q4_K", "F16", ...), and its size."""

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a header says.

    Attributes:
        about: the values under "general.", texts cut to 1,000 characters.
        needed: bytes of a file that is whole; file_size: those that there are.
    """

    version: int
    about: dict[str, str | float | bool]
    tensors: tuple[GgufTensor, ...]
    needed: int
    file_size: int


def read_header(path: Path, progress: Progress | None = None) -> GgufHeader:
    """Read a GGUF file's header.

    Args:
        progress: called after every megabyte.

    Raises:
        FormatError: it is damaged, of a version that is not known, or too large.
        OSError: it cannot be read.
    """
    with reading(path, buffering=0) as file:
        return _Reader(path.name, file, progress).header()


class _Reader:
    """Reads values one after another, never past the end of the file or of what a header may be."""

    def __init__(self, name: str, file, progress: Progress | None):
        self.name, self.file = name, file
        self.size = os.fstat(file.fileno()).st_size
        self.end = min(self.size, MAX_HEADER)
        self.position = 0
        self.data = bytearray()  # of the file, from its start
        self.inside = Counter()  # texts and arrays in arrays
        self.advance = Meter(self.end, progress)

    def header(self) -> GgufHeader:
        self.take(4)  # "GGUF"
        version = self.value("<I")
        if version not in (2, 3):
            raise FormatError(
                f"{self.name}: GGUF of version {version}; 2 and 3 can be read, little-endian"
            )
        count, pairs = self.value("<Q"), self.value("<Q")
        self.possible(pairs, 13)
        self.possible(count, 24)
        for number, what in ((count, "tensors"), (pairs, "entries of metadata")):
            self.check_most(number, _MOST, what)
        about, alignment = {}, 32
        for _ in range(pairs):
            key, value = self.text(), self.any(self.value("<I"))
            if key == "general.alignment" and isinstance(value, int) and value:
                alignment = value
            elif key.startswith("general.") and value is not None:
                about[key.removeprefix("general.")] = value
        tensors, end = [], 0
        for _ in range(count):
            tensor, offset = self.tensor()
            tensors.append(tensor)
            end = max(end, offset + tensor.nbytes)
        begin = -(-self.position // alignment) * alignment
        return GgufHeader(version, about, tuple(tensors), begin + end, self.size)

    def tensor(self) -> tuple[GgufTensor, int]:
        name = self.text()
        dimensions = self.value("<I")
        if dimensions > _MAX_DIMENSIONS:
            raise FormatError(
                f"{self.name}: tensor {quoted(name)} has {dimensions} dimensions; GGUF has at most "
                f"{_MAX_DIMENSIONS}"
            )
        shape = tuple(self.value("<Q") for _ in range(dimensions))[::-1]
        number, offset = self.value("<I"), self.value("<Q")
        if number not in KINDS:
            raise FormatError(
                f"{self.name}: tensor {quoted(name)} is of kind {number}, which is not known"
            )
        kind, weights, size = KINDS[number]
        return GgufTensor(name, shape, kind, -(-math.prod(shape) // weights) * size), offset

    def any(self, number: int, depth: int = 0):
        """The next value of a type; None for arrays, which are skipped."""
        if number == _STRING:
            return self.text()
        if number in _VALUES:
            return self.value(_VALUES[number])
        if number != _ARRAY or depth > 3:
            raise FormatError(f"{self.name}: its metadata has a value of type {number}")
        inner, count = self.value("<I"), self.value("<Q")
        if inner in _VALUES:
            self.skip(self.possible(count, struct.calcsize(_VALUES[inner])), _VALUES[inner])
            return None
        self.inside[inner] += self.possible(count, 8)
        if inner == _STRING:
            self.check_most(self.inside[inner], _MOST_TEXTS, "texts in its metadata")
            self.skip_texts(count)
        else:
            self.check_most(self.inside[inner], _MOST, "arrays in its metadata")
            for _ in range(count):
                self.any(inner, depth + 1)
        return None

    def skip(self, count: int, value: str) -> None:
        self.position += count * struct.calcsize(value)

    def skip_texts(self, count: int) -> None:
        """As `text` does, for hundreds of thousands of them."""
        read, size = _LENGTH.unpack_from, _LENGTH.size
        for _ in range(count):
            if self.position + size > len(self.data):
                self.fill(size)
            (length,) = read(self.data, self.position)
            self.position += size + length
            if self.position > self.end:
                self.position -= length
                self.possible(length, 1)

    def text(self) -> str:
        length = self.possible(self.value("<Q"), 1)
        kept = self.take(min(length, 4 * _LONGEST))
        self.skip(length - len(kept), "<B")
        return kept.decode("utf-8", errors="replace")[:_LONGEST]

    def value(self, layout: str):
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def take(self, count: int) -> bytes:
        if self.position + count > len(self.data):
            self.fill(count)
        self.position += count
        return bytes(self.data[self.position - count : self.position])

    def fill(self, count: int) -> None:
        """Read on, until there are so many bytes from the position."""
        self.possible(count, 1)
        while len(self.data) < self.position + count:
            piece = self.file.read(min(_PIECE, self.end - len(self.data)))
            if not piece:
                raise FormatError(f"{self.name}: truncated while it was read; get it again")
            self.data += piece
            self.advance(len(piece), self.name)

    def possible(self, count: int, least: int) -> int:
        """`count` of at least `least` bytes each, if the header can still hold them."""
        if count * least > self.end - self.position:
            raise FormatError(
                f"{self.name}: truncated or damaged: at byte {self.position} its header needs at "
                f"least {count * least} bytes more; the file has {self.size}"
            )
        return count

    def check_most(self, count: int, most: int, what: str) -> None:
        if count > most:
            raise FormatError(
                f"{self.name}: a header with {count} {what} is not read; the limit is {most}"
            )
