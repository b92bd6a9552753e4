"""The header of a safetensors file, checked against the file, without torch.

Everything that can be known without the data is checked before anything is allocated for it: the
header's length and JSON, every dtype, shape and offset, and that the tensors fill the file exactly.
No size that the header states is trusted before it is compared with the size of the file.

Rejected: reading with the safetensors library. Bounded memory needs rows of a tensor without
mapping the file, but its `get_slice` maps, and mapped pages count as resident. It also accepts
duplicate keys. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import reprlib
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

SUFFIXES = (".safetensors", ".sft")  # of files, in lower case
MAX_HEADER = 100_000_000  # bytes; the safetensors library refuses larger headers too
MAX_DIMENSIONS = 64  # torch's own limit
MAX_DEPTH = 32  # of JSON; ComfyUI parses markers again, deep in a stack

# dtype name in the header -> bits per element
DTYPES = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

_QUOTE = reprlib.Repr()
_QUOTE.maxstring = _QUOTE.maxother = 200
_QUOTE.maxlist = _QUOTE.maxdict = 8
quoted = _QUOTE.repr  # for values from a file: a hostile name may be 100 MB long


def plain(name: str) -> str:
    """A name from a file for a line of output: quoted if it is very long or cannot be printed.

    A line break in a name could forge a line, and an escape sequence rewrite others.
    """
    return name if name.isprintable() and len(name) <= _QUOTE.maxstring else quoted(name)


def first_of(names: Sequence[str], most: int, shown: Callable[[str], str] = quoted) -> str:
    """The first of some names, and how many more there are: "'a', 'b' and 3 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def one_line(text: str) -> str:
    """A text that may have names in it, with what cannot be printed as Python writes it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@contextlib.contextmanager
def reading(path: Path, **options) -> Iterator[BinaryIO]:
    """Open a file to read, and name it in every error: those of reads, as on a failing disk, do
    not."""
    try:
        with path.open("rb", **options) as file:
            yield file
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


class FormatError(ValueError):
    """A file that breaks a rule of its format; the message names file, tensor and rule."""


@contextlib.contextmanager
def advising(advice: str) -> Iterator[None]:
    """Add advice to a FormatError raised within."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{error}; {advice}") from error


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `begin` and `end` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Container:
    """A safetensors header whose offsets have been checked against the file's size.

    Attributes:
        tensors: by name, in the order of their data.
        file_size: bytes.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    file_size: int


def read_container(
    path: str | os.PathLike, kind: type[Container] = Container, *, whole: bool = True
):
    """Read and check the header of a safetensors file.

    Args:
        kind: the class to make, `Container` or one derived from it.
        whole: whether the data must be there to its end; if not, only its header must be.

    Raises:
        FormatError: the file is not a safetensors file, is truncated, or has overlapping tensors.
        OSError: it cannot be read.
    """
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):  # reading from a pipe would wait for ever
        raise FormatError(
            f"{path}: not a safetensors file but a folder, pipe or device; give the name of a "
            ".safetensors file (convert and --source take a model's folder, too)"
        )
    with advising("the file is damaged or incomplete: get it again"):
        return _read(path, kind, whole)


def _read(path: Path, kind: type[Container], whole: bool):
    text, size = _read_text(path)
    header = parse_object(f"{path.name}: the header", text)
    metadata = header.pop("__metadata__", None)
    if metadata is None:  # absent, or null
        metadata = {}
    if not isinstance(metadata, dict) or not all(map(is_text, (*metadata, *metadata.values()))):
        raise FormatError(f"{path.name}: __metadata__ must map strings to strings")
    data = 8 + len(text)
    tensors = [_tensor_info(path, name, entry, data) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.begin, t.end))
    end = tensors[-1].end if tensors else data
    _check_offsets(path, tensors, data, size if whole else max(size, end))
    return kind(path, {t.name: t for t in tensors}, metadata, size)


def _read_text(path: Path) -> tuple[bytes, int]:
    """The header's JSON and the file's size."""
    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if len(start) < 8:
            raise FormatError(f"{path.name}: {size} bytes are too few for a safetensors file")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER:
            raise FormatError(
                f"{path.name}: not a safetensors file (.ckpt, .pt and .gguf cannot be read), or a "
                f"damaged one: its header would have {length} bytes; the limit is {MAX_HEADER}"
            )
        if 8 + length > size:
            raise FormatError(
                f"{path.name}: truncated: the header needs {8 + length} bytes, the file has {size}"
            )
        return file.read(length), size


def read_json(path: Path, limit: int) -> dict:
    """The JSON object in a file of at most `limit` bytes.

    Raises:
        FormatError: it is larger, or anything else (`parse_object`).
        OSError: it cannot be read.
    """
    with reading(path) as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise FormatError(f"{path.name}: such a file has at most {limit} bytes")
    return parse_object(path.name, text)


def parse_object(where: str, text: str | bytes) -> dict:
    """A JSON object that all readers read alike.

    Python alone would accept NaN and Infinity, and take the last of two equal keys, where others
    take the first.

    Raises:
        FormatError: it is anything else.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_reject_number,
            parse_float=_float,
            parse_int=_int,
        )
    except KeyError as error:
        raise FormatError(f"{where} holds the key {quoted(error.args[0])} twice") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where} is not a JSON object")
    if not _is_shallow(value, MAX_DEPTH):
        raise FormatError(f"{where} is nested deeper than {MAX_DEPTH} levels")
    return value


def _is_shallow(value, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(
        _is_shallow(child, levels - 1) for child in children if isinstance(child, (dict, list))
    )


def _without_duplicates(pairs):
    result = {}
    for key, value in pairs:
        if key in result:
            raise KeyError(key)
        result[key] = value
    return result


def _reject_number(text):
    raise ValueError(f"{text[:40]} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    return value if abs(value) < float("inf") else _reject_number(text)


def _int(text: str) -> int:
    if len(text) > 300:  # other readers overflow
        _reject_number(f"a number of {len(text)} digits")
    return int(text) if text != "-0" else _reject_number(text)


def is_text(value) -> bool:
    """Whether a JSON value is a string that can be encoded: without unpaired surrogates."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _is_plain(value) -> bool:
    return is_text(value) or value is None or isinstance(value, (bool, int, float))


def nbytes(dtype: str, shape: Iterable[int]) -> int:
    """The bytes of a tensor of a header dtype."""
    return math.prod(shape) * DTYPES[dtype] // 8


def is_size(value) -> bool:
    """Whether a JSON value can be a size or an offset."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_shape(value) -> bool:
    """Whether a JSON value can be a shape with strides of at most 63 bits."""
    return (
        isinstance(value, list)
        and len(value) <= MAX_DIMENSIONS
        and all(map(is_size, value))
        and math.prod(size for size in value if size) < 2**63
    )


def _tensor_info(path: Path, name: str, entry, data: int) -> TensorInfo:
    where = f"{path.name}: tensor {quoted(name)}"
    if not is_text(name):
        raise FormatError(f"{where}: its name is not valid text")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise FormatError(f"{where} needs dtype, shape and data_offsets")
    dtype, shape, offsets = (entry.pop(key) for key in ("dtype", "shape", "data_offsets"))
    if not all(is_text(key) and _is_plain(value) for key, value in entry.items()):
        raise FormatError(f"{where} has a further field that is not a plain value")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{where} has the unknown dtype {quoted(dtype)}")
    if not is_shape(shape):
        raise FormatError(
            f"{where} has the shape {quoted(shape)}; it must be a list of sizes, at most "
            f"{MAX_DIMENSIONS}, for fewer than 2**63 elements"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise FormatError(f"{where} has the data_offsets {quoted(offsets)}; they must be two sizes")
    begin, end = offsets
    expected, odd = divmod(math.prod(shape) * DTYPES[dtype], 8)
    if odd or end - begin != expected:
        raise FormatError(
            f"{where} is {dtype} {shape}, {expected} bytes, but its data_offsets span {end - begin}"
        )
    return TensorInfo(name, dtype, tuple(shape), data + begin, data + end)


def _check_offsets(path: Path, tensors: list[TensorInfo], data: int, size: int) -> None:
    """Raise FormatError unless tensors, in order, fill the file without gap, overlap or rest."""
    position = data
    for tensor in tensors:
        if tensor.begin != position:
            problem = "overlaps the one before it" if tensor.begin < position else "leaves a gap"
            raise FormatError(
                f"{path.name}: tensor {quoted(tensor.name)} {problem}: it begins at byte "
                f"{tensor.begin}, expected {position}"
            )
        position = tensor.end
    if position != size:
        problem = "truncated" if position > size else "has bytes after its last tensor"
        raise FormatError(
            f"{path.name}: {problem}: the header describes {position} bytes, the file has {size}"
        )
