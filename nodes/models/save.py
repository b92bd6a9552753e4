"""A MODEL written as a diffusion model file: MXFP8 layers in the stock format, the rest as is."""

from __future__ import annotations

from ...quant.container.header import nbytes
from ...quant.container.writer import Writer
from ...quant.progress import VERIFY, Meter, Progress
from .source import ModelSource
from .transfer import check_movable

_PIECE = 1 << 22  # bytes written at a time


def save_model(patcher, path, metadata: dict[str, str], progress: Progress) -> int:
    """Write a MODEL's diffusion model to `path`; returns the file's size in bytes.

    Raises:
        ValueError: a LoRA cannot be merged, or something on the model cannot be saved.
        OSError: the file cannot be written; nothing is left behind.
    """
    check_movable(patcher)
    source = ModelSource(patcher)
    tensors = [(key, *info) for key, info in source.tensors.items()]
    metadata = {**metadata, **source.metadata, **source.detection_metadata({})}
    advance = Meter(sum(nbytes(dtype, shape) for _, dtype, shape in tensors), progress)
    with Writer(path, tensors, metadata, tick=lambda: advance(0, VERIFY)) as writer:
        for key, *_ in tensors:
            for piece in source.pieces(key):
                _write(writer, key, piece, advance)
    return writer.nbytes


def _write(writer: Writer, key: str, data: memoryview, advance: Meter) -> None:
    """Write a tensor's next bytes in pieces, between which the user can interrupt a slow disk."""
    for start in range(0, len(data), _PIECE):
        piece = data[start : start + _PIECE]
        writer.write(key, piece)
        advance(len(piece), key)
