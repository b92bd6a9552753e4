"""Small safetensors files for tests: written by hand where they must be wrong, read by the library.

Nothing here uses the package under test, so that both sides of a comparison stay independent.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from safetensors import safe_open

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def matrix(rows: int, cols: int, dtype=torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Normal values, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator).to(dtype)


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor of any dtype and shape."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes: NaN is equal to itself, -0.0 differs from 0.0."""
    return (a.dtype, a.shape, raw(a)) == (b.dtype, b.shape, raw(b))


def load(path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata, as the safetensors library reads them."""
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def write_raw(path: Path, header, data: bytes = b"") -> Path:
    """A file of this header (an object, or bytes as they are) and this data, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def flip(path: Path, offset: int, mask: int = 0x80) -> None:
    """Invert bits of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)
