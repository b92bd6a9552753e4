"""Loaded models written as files: MXFP8 layers in the stock format, the rest as is."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...quant import format
from ...quant.container.header import nbytes
from ...quant.container.writer import Writer
from ...quant.progress import VERIFY, Meter, Progress
from .checkpoint import checkpoint_sources
from .source import ModelSource
from .text_encoder import TextEncoderSource
from .transfer import check_movable
from .weights import LoadedWeights

_PIECE = 1 << 22  # bytes written at a time


def save_model(patcher, path, metadata: Mapping[str, str], progress: Progress) -> int:
    """Write a MODEL's diffusion model to `path`; returns the file's size in bytes.

    Raises:
        ValueError: a LoRA cannot be merged, or something on the model cannot be saved.
        OSError: the file cannot be written; nothing is left behind.
    """
    check_movable(patcher)
    source = ModelSource(patcher)
    return _write([source], path, {**metadata, **source.detection_metadata({})}, progress)


def save_text_encoders(
    clip, files: Mapping[str, Path], metadata: Mapping[str, str], progress: Progress
) -> list[int]:
    """Write some of a CLIP's `encoders`, each to its file, all or none; returns the files' sizes.

    Raises:
        as `save_model`; files that were written already are removed.
    """
    check_movable(clip.patcher)
    sources = {encoder: TextEncoderSource(clip, encoder) for encoder in files}
    sizes = []
    with contextlib.ExitStack() as on_error:
        for encoder, path in files.items():
            sizes.append(_write([sources[encoder]], path, metadata, progress))
            on_error.callback(path.unlink, missing_ok=True)
        on_error.pop_all()
    return sizes


def save_checkpoint(model, clip, vae, path, metadata: Mapping[str, str], progress: Progress) -> int:
    """Write a MODEL, its CLIP and its VAE to `path` as one checkpoint, as `save_model`.

    Raises:
        ValueError: also if ComfyUI would not load the text encoder of such a checkpoint as it is.
    """
    check_movable(model)
    check_movable(clip.patcher)
    diffusion_model, *others = checkpoint_sources(model, clip, vae)
    metadata = {**metadata, **diffusion_model.detection_metadata({})}
    return _write([diffusion_model, *others], path, metadata, progress)


def _write(
    sources: Sequence[LoadedWeights], path, metadata: Mapping[str, str], progress: Progress
) -> int:
    """Write the tensors of all sources into one file; returns its size in bytes."""
    tensors = [(key, *info) for source in sources for key, info in source.tensors.items()]
    markers = {name: marker for source in sources for name, marker in source.markers.items()}
    metadata = format.with_markers(metadata, markers) if markers else dict(metadata)
    advance = Meter(sum(nbytes(dtype, shape) for _, dtype, shape in tensors), progress)
    with Writer(path, tensors, metadata, tick=lambda: advance(0, VERIFY)) as writer:
        for source in sources:
            for key in source.tensors:
                for piece in source.pieces(key):
                    _write_piece(writer, key, piece, advance)
    return writer.nbytes


def _write_piece(writer: Writer, key: str, data: memoryview, advance: Meter) -> None:
    """Write a tensor's next bytes in parts, between which the user can interrupt a slow disk."""
    for start in range(0, len(data), _PIECE):
        part = data[start : start + _PIECE]
        writer.write(key, part)
        advance(len(part), key)
