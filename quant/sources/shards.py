"""A model in several safetensors files with an index that says which tensor is in which.

The index is JSON: {"metadata": {"total_size": bytes}, "weight_map": {key: file}}. It is not
trusted: files are taken from the index's own folder only, every header is checked, and index and
headers must agree on every tensor. Rejected: reading the shards without the index, which would turn
a download that lacks one file into a model that lacks layers.
https://huggingface.co/docs/safetensors/metadata_parsing
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from ..container.header import SUFFIXES, FormatError, first_of, parse_object, quoted, reading
from .file import FileSource, StoredSource

logger = logging.getLogger(__name__)

MAX_INDEX = 100_000_000  # bytes, as for a header
# "model.safetensors.index.json"; diffusers puts a variant in: "model.safetensors.index.fp16.json".
INDEX = re.compile(r"\.(safetensors|sft)\.index(\.[^.]+)?\.json$", re.IGNORECASE)
# "model-00001-of-00003.safetensors"; older variants: "model-00001-of-00003.fp16.safetensors".
_SHARD = re.compile(r"-(\d+)-of-(\d+)(\.[^.]+)?\.(safetensors|sft)$", re.IGNORECASE)
_OPEN = 8  # files at a time
_NAMED = 5  # tensors in an error


def is_shard(name: str) -> bool:
    """Whether a file's name says that it is one of several."""
    match = _SHARD.search(name)
    return match is not None and int(match[2]) > 1


def model_name(name: str) -> str:
    """A file's or index's name without its suffixes; a folder's name as it is."""
    return re.sub(r"\.(safetensors|sft)$", "", INDEX.sub(r"\2", name), flags=re.IGNORECASE)


def indexes(folder: Path) -> list[Path]:
    """The indexes in a folder."""
    return sorted(path for path in folder.iterdir() if INDEX.search(path.name))


def check_not_shard(path: Path) -> None:
    """Raise FormatError, naming the index, if a file is one of several."""
    if not is_shard(path.name):
        return
    for index in indexes(path.parent):
        if path.name in read_index(index)[0].values():
            raise FormatError(
                f"{path.name} is one part of a model; give its index {index.name!r}, or the folder"
            )
    raise FormatError(
        f"{path.name} is one part of a model, and no index beside it names it; download "
        "the .safetensors.index.json too"
    )


def read_index(path: Path) -> tuple[dict[str, str], object]:
    """(key -> file name of every tensor, the total size as stated, which may be anything).

    Raises:
        FormatError: it is not an index, or names a file outside its folder.
    """
    if not path.is_file():
        raise FormatError(f"{path.name}: there is no such index file")
    with reading(path) as file:
        text = file.read(MAX_INDEX + 1)
    if len(text) > MAX_INDEX:
        raise FormatError(f"{path.name}: an index has at most {MAX_INDEX} bytes")
    index = parse_object(f"{path.name}: the index", text)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(
            f"{path.name}: not the index of a model: it has no object 'weight_map'; give the "
            "model's folder, its .safetensors.index.json or its .safetensors"
        )
    for key, file in weight_map.items():
        if not isinstance(file, str):
            raise FormatError(
                f"{path.name}: {quoted(key)} maps to {quoted(file)} instead of a file name"
            )
    for file in dict.fromkeys(weight_map.values()):
        _check_name(path, file)
    metadata = index.get("metadata")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _check_name(index: Path, file: str) -> None:
    """Raise FormatError unless a name is plain: no folder, drive or stream, on any system."""
    if not file.strip(". ") or re.search(r"[/\\:\0-\x1f]", file):
        raise FormatError(
            f"{index.name}: it places tensors in {quoted(file)}; a part must be a file in the "
            "index's own folder"
        )
    if not file.lower().endswith(SUFFIXES):
        raise FormatError(
            f"{index.name}: its part {quoted(file)} is not a .safetensors file; get the model's "
            "safetensors files"
        )


class ShardedSource(StoredSource):
    """A model in several files, of which at most a few are open at a time.

    Args:
        index: path of the index.
        name: what to call the model in messages; the index's name if empty.

    Raises:
        FormatError: index and files do not agree, or one of the files is damaged.
        OSError: one of them cannot be read.
    """

    def __init__(self, index, name: str = ""):
        index = Path(index)
        self.name = name or index.name
        weight_map, total_size = read_index(index)
        self._shards: dict[str, FileSource] = {}
        self._opened: list[str] = []
        self._home: dict[str, str] = {}
        for file in sorted(set(weight_map.values())):
            path = index.parent / file  # not resolved: a link may lead to a store of blobs
            if not path.is_file():
                raise FormatError(f"{index.name}: its part {quoted(file)} is missing; download it")
            with FileSource(path) as shard:
                self._shards[file] = shard
            for key in shard.tensors:
                if key in self._home:
                    raise FormatError(
                        f"{index.name}: {quoted(key)} is both in {quoted(self._home[key])} and in "
                        f"{quoted(file)}"
                    )
                self._home[key] = file
        self._check(index.name, weight_map)
        self.files = (index, *(shard.files[0] for shard in self._shards.values()))
        self.tensors = {key: self._shards[f].tensors[key] for key, f in self._home.items()}
        self.metadata: dict[str, str] = {}
        for shard in self._shards.values():
            self.metadata = {**shard.metadata, **self.metadata}  # the first file's entry counts
        size = sum(t.nbytes for s in self._shards.values() for t in s.header.tensors.values())
        if total_size is not None and total_size != size:
            logger.warning(
                "MXFP8: %s states a total_size of %s bytes; its tensors have %d",
                index.name, quoted(total_size), size,
            )  # fmt: skip

    def close(self) -> None:
        for file in self._opened:
            self._shards[file].close()
        self._opened = []

    def rows(self, key: str, first: int, last: int) -> torch.Tensor:
        return self._shard(key).rows(key, first, last)

    def pieces(self, key: str) -> Iterator[memoryview]:
        yield from self._shard(key).pieces(key)

    def _shard(self, key: str) -> FileSource:
        """The file with a tensor; reading opens it, so the least recently used may be closed."""
        file = self._home[key]
        if file in self._opened:
            self._opened.remove(file)
        elif len(self._opened) == _OPEN:
            self._shards[self._opened.pop(0)].close()
        self._opened.append(file)
        return self._shards[file]

    def _check(self, index: str, weight_map: dict[str, str]) -> None:
        """Raise FormatError unless the index names exactly the tensors in its files."""
        missing = [key for key, file in weight_map.items() if self._home.get(key) != file]
        extra = [key for key in self._home if key not in weight_map]
        for problem, keys in (
            ("tensors are not in the parts that it names", missing),
            ("its parts hold tensors that it does not name", extra),
        ):
            if keys:
                raise FormatError(
                    f"{index}: {problem}: {first_of(keys, _NAMED)}; download the index and all its "
                    "parts again"
                )
