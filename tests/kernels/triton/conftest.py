"""Triton kernels on whatever runs them: a GPU, or the CPU by Triton's interpreter.

The interpreter runs where TRITON_INTERPRET=1 (`tests/kernels/test_triton.py` starts it with a
Triton that has a whole one). Three of its operations are not those of a GPU: conversions to and
from bfloat16 and E4M3 do not round to even and lose subnormals and NaN, and a dot of bfloat16
multiplies their bits as integers. Torch's conversions replace them here, which are those of the
hardware.
"""

from __future__ import annotations

import pytest
import torch

from mxfp8.kernels import device_facts
from mxfp8.kernels.backends.triton import cast, int8, rowwise, w8a16

if device_facts.interpreted():
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    TORCH = {
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e4b8: torch.float8_e4m3fnuz,
    }
    BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}

    def convert(array, source, target, rounding=None):
        """Bits of `source` floats -> bits of `target` floats, as an array of integers."""
        data = torch.frombuffer(bytearray(array.tobytes()), dtype=TORCH[source.scalar])
        result = data.float().to(TORCH[target.scalar])
        bits = result.view(torch.uint8).numpy().view(BITS[result.itemsize])
        return bits.reshape(array.shape)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        wide = [
            convert(x.data, x.dtype, tl.float32).view(np.float32)
            if x.dtype.scalar in (tl.bfloat16, tl.float8e4nv, tl.float8e4b8)
            else x.data
            for x in (a, b)
        ]
        out = np.matmul(*wide, dtype=d.data.dtype) + d.data
        return interpreter.TensorHandle(out, d.dtype.scalar)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = create_dot


def pytest_collection_modifyitems(items):
    if not device_facts.interpreted():
        for item in items:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu") if device_facts.interpreted() else torch.device("cuda", 0)


@pytest.fixture(params=["bits", "instructions"])
def decoding(request, monkeypatch, device):
    """E4M3 by integers, as before Ada, and by instructions where the device has them."""
    instructions = request.param == "instructions"
    if instructions and not device_facts.interpreted() and not device_facts.hardware_e4m3(device):
        pytest.skip("this GPU has no instructions for E4M3")
    for module in (cast, int8, rowwise, w8a16):
        monkeypatch.setattr(module, "hardware_e4m3", lambda _: instructions)
    return request.param
