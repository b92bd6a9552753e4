"""Open a path as a source: a file, an index of several, or a folder as model hubs have them.

The source has the tensors that ComfyUI reads: diffusers' names become ComfyUI's, and a tensor that
the file stores once for two names is there under both.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ..container.header import SUFFIXES, FormatError, quoted
from . import diffusers, shards, unsupported
from .file import FileSource, Part, PartSource, StoredSource

logger = logging.getLogger(__name__)

# Folders of a diffusers pipeline that hold the model to convert; some have two of them.
MODEL_FOLDERS = re.compile(r"^(transformer|unet)(_\d+)?$")
_SHARED = 10_000  # further names of tensors in metadata; a header has room for millions
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def open_source(path) -> StoredSource:
    """Open a model to convert, to be used as a context manager.

    Parts of it may be quantized; what is to be quantized must not be (`unsupported.quantized`).

    Args:
        path: a safetensors file; an index of several (`.safetensors.index.json`); a folder with one
            of these; or a diffusers pipeline, whose transformer or UNet is taken.

    Raises:
        FormatError: it is none of these, damaged, or a LoRA.
        OSError: it cannot be read.
    """
    source = open_stored(path)
    try:
        unsupported.check_no_lora(source)
        return _renamed(_unshared(source))
    except BaseException:
        source.close()
        raise


def open_stored(path) -> StoredSource:
    """As `open_source`, with the names that the tensors have on disk, and of any kind of file."""
    path = Path(path)
    place = find_model(path)
    if place.suffix.lower() == ".json":
        return shards.ShardedSource(place, path.name)
    shards.check_not_shard(place)
    return FileSource(place)


def files_of(path: Path) -> set[Path]:
    """The files that `open_source` reads, found without reading any header."""
    place = find_model(path)
    if place.suffix.lower() != ".json":
        return {place}
    return {place, *(place.with_name(name) for name in shards.read_index(place)[0].values())}


def find_model(path: Path) -> Path:
    """The file or index that a path stands for; a file stands for itself."""
    if not path.is_dir():
        return path
    models = shards.indexes(path)
    files = {
        p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not shards.is_shard(p.name)
    }
    if files:  # MLX gives an index to a single file, too
        files -= {path / name for index in models for name in shards.read_index(index)[0].values()}
    models += sorted(files)
    inner = sorted(p for p in path.iterdir() if MODEL_FOLDERS.match(p.name) and p.is_dir())
    if inner and ((path / "model_index.json").is_file() or not models):
        models = inner
    if len(models) > 1:
        raise FormatError(
            f"{path.resolve().name or path}: there are several models in this folder; give one of "
            f"{', '.join(quoted(p.name) for p in models)}"
        )
    if models:
        return find_model(models[0])
    instead = ""
    if any(p.suffix.lower() in PICKLES for p in path.iterdir()):
        instead = ", but torch files, which can run code when read: get the .safetensors"
    raise FormatError(
        f"{path.resolve().name or path}: there is no safetensors model in this folder (one in "
        f"several parts needs its index){instead}"
    )


def _unshared(source: StoredSource) -> StoredSource:
    """Give every name its tensor.

    If two names share one tensor, `safetensors.torch.save_model` stores it once and puts into the
    metadata {name left out: name stored}, which stock ComfyUI does not read.
    """
    tensors, metadata = source.tensors, source.metadata
    aliases = {
        k: v
        for k, v in metadata.items()
        if v in tensors and k not in tensors and k.isprintable() and k != "__metadata__"
    }
    if not aliases:
        return source
    if len(aliases) > _SHARED:
        raise FormatError(
            f"{source.name}: its metadata has {len(aliases)} further names for tensors; at most "
            f"{_SHARED} are converted"
        )
    parts = {key: (Part(key),) for key in tensors}
    shared = PartSource(source, parts | {key: (Part(value),) for key, value in aliases.items()})
    shared.metadata = {k: v for k, v in metadata.items() if k not in aliases}
    return shared


def _renamed(source: StoredSource) -> StoredSource:
    """Give every tensor ComfyUI's name for it."""
    try:
        renamed = diffusers.comfy_names(source.name, source.tensors)
    except FormatError:
        unsupported.check_unquantized(source)  # then that is why it has other names
        raise
    if renamed is None:
        return source
    unsupported.check_unquantized(source)
    model, parts = renamed
    logger.info("MXFP8: %s is %s with diffusers' tensor names: renamed", source.name, model)
    return PartSource(source, parts)
