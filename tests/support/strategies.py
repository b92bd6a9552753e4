"""What hypothesis draws from: texts, metadata and tensors of any dtype."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from mxfp8.quant.sources.file import TORCH_DTYPES

DTYPES = sorted(TORCH_DTYPES)
CODES = [name for name in DTYPES if name.startswith("F8_")]
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
metadata = st.dictionaries(text, text, max_size=3)


def tensor_of(dtype: str, shape, seed: int) -> torch.Tensor:
    """Any bytes as a tensor; of booleans, 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == "BOOL":
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
    data = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
    return data.view(TORCH_DTYPES[dtype]).reshape(shape)
