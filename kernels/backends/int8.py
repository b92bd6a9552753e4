"""Rotated INT8 in plain torch: the fast linear of CPUs with VNNI or AMX.

It computes `x @ W.T` from int8 codes with one float32 scale per row of either matrix. Both are
rotated along K first, in groups of 256 (64 or 16 where K needs it), by an orthogonal matrix that is
its own inverse, so that the product stays the same while outliers are spread over their group
(ConvRot, `reference.hadamard`). The rules of rounding are those of `reference`.

What is rounded where: weights, and inputs in float32 or float16, are rotated in float32. Inputs in
bfloat16 are rotated by bfloat16 matrix instructions where the CPU has them, which sum in float32
and round the result to bfloat16: at most 2**-9 of a value, while a step is 1/127 of the row's
largest.

How the time is kept down on a CPU, where the matmul takes half of bfloat16's:

* Chunks of rows are quantized and tiles of the result are scaled while they are in the cache, in
  memory that is kept from call to call.
* `_int_mm` packs its second matrix on every call. For a single row, `W @ x.T` is computed; in
  bfloat16 there is a matmul of its own (`matmul_one_row`).

Rejected: a single `_int_mm` (its int32 result leaves the cache); oneDNN's prepacked `qlinear`
(applies one scale to all of x, and weights would be opaque); rotating by sums and differences
(a dozen passes where a matmul with 256 x 256 takes one).
"""

from __future__ import annotations

import math
import threading
from functools import cache

import torch

from .. import device_facts, layout
from ..layout import BLOCK
from . import eager, reference

SMALLEST_SCALE = 1e-30
_CHUNK = 1 << 19  # values quantized at a time
_TILE = 1 << 20  # results scaled at a time: 4 MB
_TALLEST = 512  # rows of such a tile
_GPU_CHUNK = 1 << 24
_AMD = ("gfx942", "gfx950", "gfx11", "gfx12")  # that Triton's INT8 matmul was compiled for
_TO_INTEGER = 1.5 * 2.0**23  # from here to 2**24, floats are integers


@cache
def cpu_instructions() -> tuple[str, ...]:
    """What this CPU has to multiply int8 with: of "AMX" and "VNNI" (with AVX-512)."""
    asked = {"AMX": "_is_amx_tile_supported", "VNNI": "_is_vnni_supported"}
    return tuple(name for name, ask in asked.items() if getattr(torch.cpu, ask, bool)())


def unsupported_reason(problem) -> str | None:
    """Why this cannot take a `records.Problem`, or None."""
    reason = groups_unsupported_reason(problem)
    if reason is not None:
        return reason
    if problem.device.type != "cpu":
        return device_facts.DeviceReason("multiplies in plain torch on CPUs")
    if not cpu_instructions():
        return "needs a CPU with INT8 matrix instructions (VNNI with AVX-512, or AMX)"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN, which multiplies INT8 on CPUs"
    return None


def one_pass_unsupported_reason(problem) -> str | None:
    """Why Triton cannot rotate and quantize rows in one pass for a `records.Problem`, or None."""
    reason = device_facts.triton_on_unsupported_reason(problem.device)
    reason = reason or groups_unsupported_reason(problem)
    if reason is None and problem.shape is not None:
        from .triton import int8

        if problem.shape[1] > int8.WIDEST:
            return f"holds a row in registers, at most {int8.WIDEST} values"
    return reason


def triton_unsupported_reason(problem) -> str | None:
    """Why the matmul in Triton cannot take a `records.Problem`, or None.

    INT8 matmuls in Triton were reported to hang RDNA1 and RDNA2: not even a self-test runs there.
    """
    capability = device_facts.capability(problem.device) or (0, 0)
    amd = device_facts.amd_architecture(problem.device) or ""
    if capability < (8, 0) and not amd.startswith(_AMD):
        cards = "NVIDIA compute capability 8.0 (RTX 30) or later, RX 7000 or later, MI300, MI350"
        return device_facts.needs(f"INT8 that Triton multiplies: {cards}", problem.device)
    reason = device_facts.descriptors_unsupported_reason(problem.device)
    return reason or groups_unsupported_reason(problem)


def torch_unsupported_reason(problem) -> str | None:
    """Why torch's matmul on GPUs, scaled by Triton, cannot take a `records.Problem`, or None."""
    reason = device_facts.int8_tensor_cores_unsupported_reason(problem.device)
    reason = reason or device_facts.triton_unsupported_reason()
    return reason or groups_unsupported_reason(problem)


def groups_unsupported_reason(problem) -> str | None:
    """Why K cannot be rotated in whole groups, or None."""
    if problem.shape is not None and problem.shape[1] % BLOCK:
        return f"rotates whole groups along K, which is {problem.shape[1]}: not a multiple of 32"
    return None


def prepare_weight(qdata, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """An MXFP8 weight as rotated INT8: `reference.to_rotated_int8`, but for ties.

    Args:
        qdata: float8_e4m3fn (or its bytes as uint8) [N', K'].
        scale: its tiled scales.

    Returns:
        (codes, scale): int8 [N', K'] and float32 [N'].
    """
    rows, cols = qdata.shape
    factor = layout.untile(scale.view(torch.uint8), rows, cols // BLOCK)
    result = _empty(rows, cols, qdata.device)
    height = _height(rows, cols, qdata.device)
    values = torch.empty(height, cols, dtype=torch.float32, device=qdata.device)
    quantizer = _Quantizer(height, cols, torch.float32, qdata.device)
    for first in range(0, rows, height):
        part = values[: min(height, rows - first)]
        eager.dequantize_rows(qdata, factor, part, first)
        quantizer.run(part, *(tensor[first : first + height] for tensor in result))
    return result


def quantize_input(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate x and quantize every row of it; see the module docstring.

    Args:
        x: [M, K], K a multiple of 16.

    Returns:
        (codes, scale): int8 [M, K] and float32 [M]; scale NaN and codes 0 in rows with NaN or Inf.
    """
    rows, cols = x.shape
    result = _empty(rows, cols, x.device)
    height = _height(rows, cols, x.device)
    quantizer = _Quantizer(height, cols, _rotation_dtype(x), x.device)
    for first in range(0, rows, height):
        span = slice(first, first + height)
        quantizer.run(x[span], *(tensor[span] for tensor in result))
    return result


def _empty(rows: int, cols: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty(rows, cols, dtype=torch.int8, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
    )


def _height(rows: int, cols: int, device: torch.device) -> int:
    """Rows of a chunk."""
    chunk = _CHUNK if device.type == "cpu" else _GPU_CHUNK
    return max(1, min(rows, chunk // max(1, cols)))


def _rotation_dtype(x: torch.Tensor) -> torch.dtype:
    native = x.device.type == "cpu" and device_facts.cpu_multiplies(torch.bfloat16)
    return torch.bfloat16 if native and x.dtype == torch.bfloat16 else torch.float32


def _scratch(size: int, device: torch.device) -> torch.Tensor:
    """Memory for one step, in bytes; on a CPU the same on every call of a thread.

    Fresh memory costs page faults, as much as the arithmetic where x has few rows. 4 MB are kept.
    """
    kept = getattr(_kept, "scratch", None) if device.type == "cpu" else None
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):  # usable in any mode
            kept = torch.empty(size, dtype=torch.uint8, device=device)
        if device.type == "cpu":
            _kept.scratch = kept
    return kept[:size]


_kept = threading.local()


@cache
def _constants(cols: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The rotation, the bits of a magnitude, and the number of steps: numbers cost conversions."""
    integer = torch.int16 if dtype == torch.bfloat16 else torch.int32
    with torch.inference_mode(False):  # usable in any mode
        return (
            reference.hadamard(reference.group(cols)).to(device, dtype),
            torch.tensor(torch.iinfo(integer).max, dtype=integer, device=device),
            torch.full((1, 1), 127.0, dtype=torch.float32, device=device),
        )


class _Quantizer:
    """Rotates and quantizes chunks of at most `rows` rows, in the scratch memory."""

    def __init__(self, rows: int, cols: int, dtype: torch.dtype, device: torch.device):
        self.matrix, self.magnitude, self.steps = _constants(cols, dtype, device)
        count = rows * cols
        memory = _scratch(8 * count, device)
        self.value = memory[: 4 * count].view(torch.float32).view(rows, cols)
        self.rotated = self.value
        if dtype != torch.float32:
            self.rotated = memory[6 * count :].view(dtype).view(rows, cols)
        self.bits = memory[4 * count :].view(self.magnitude.dtype)[:count].view(rows, cols)

    def run(self, x, code, scale) -> None:
        """Fill code [m, K] and scale [m] from x [m, K]."""
        rows, size = x.shape[0], self.matrix.shape[0]
        rotated, value, bits = self.rotated[:rows], self.value[:rows], self.bits[:rows]
        groups = x.to(rotated.dtype).reshape(-1, size)
        torch.mm(groups, self.matrix, out=rotated.view(-1, size))
        # Magnitudes of floats compare as their bits do, and NaN is above infinity: no NaN is lost.
        torch.bitwise_and(rotated.view(bits.dtype), self.magnitude, out=bits)
        amax = bits.amax(-1, keepdim=True).view(rotated.dtype).float()
        step = torch.div(amax, self.steps, out=scale.unsqueeze(-1)).clamp_min_(SMALLEST_SCALE)
        if value is not rotated:
            value.copy_(rotated)
        # At most 127: amax / step rounds to that. The sum has the rounded value in its low bits;
        # torch's `round` starts its threads for as few as 2,048 values.
        code.copy_(value.div_(step).add_(_TO_INTEGER).view(torch.int32))
        if code.device.type != "cpu" or not math.isfinite(step.sum()):  # no look at a GPU's values
            bad = ~step.isfinite()
            code.masked_fill_(bad, 0)
            step.masked_fill_(bad, torch.nan)


def matmul(quantized, prepared, bias, dtype: torch.dtype, N: int) -> torch.Tensor:
    """x @ W.T + bias from rotated INT8, summed exactly and scaled in float32.

    Args:
        quantized, prepared: (codes, scale) of x [M, K] and of W [N', K]; N' is at least N.
        bias: [N] or None.

    Returns:
        [M, N] of `dtype`.
    """
    (a, a_scale), (b, b_scale) = quantized, prepared
    M = a.shape[0]
    out = torch.empty(M, N, dtype=dtype, device=a.device)
    if M == 0:
        return out
    bias = None if bias is None else bias.float()
    if M == 1:  # the second matrix is packed on every call: let that be x, and not the weight
        product = torch._int_mm(b[:N], a.t()).view(1, N)
        _scale(product.float(), a_scale, b_scale[:N], bias, out)
    else:
        for rows, columns, product in _tiles(M, N):
            torch._int_mm(a[rows], b[columns].t(), out=product)
            value = product.view(torch.float32).copy_(product)  # in place: half the memory
            part = None if bias is None else bias[columns]
            _scale(value, a_scale[rows, None], b_scale[None, columns], part, out[rows, columns])
    return out


def one_row_unsupported_reason(problem) -> str | None:
    """Why `matmul_one_row` cannot take a `records.Problem`, or None."""
    if problem.device.type != "cpu":
        return device_facts.DeviceReason("torch has this matmul for CPUs")
    if problem.m_class != "one" or problem.dtype != torch.bfloat16:
        return "takes one row of bfloat16"
    if not hasattr(torch, "_weight_int8pack_mm"):
        return f"this torch ({torch.__version__}) has no _weight_int8pack_mm"
    return unsupported_reason(problem)


def matmul_one_row(quantized, prepared, bias, dtype: torch.dtype, N: int) -> torch.Tensor:
    """x @ W.T + bias for one row of bfloat16, which is rotated but not quantized.

    The bytes of the weight decide how long that takes, so that a row in 8 bits would gain nothing.
    The rotated row and the sum are rounded to bfloat16.

    Args:
        quantized: (x,), [1, K] bfloat16; prepared, bias: as for `matmul`.

    Returns:
        [1, N] bfloat16.
    """
    (x,), (code, scale) = quantized, prepared
    matrix, *_ = _constants(x.shape[1], dtype, x.device)
    rotated = (x.reshape(-1, matrix.shape[0]) @ matrix).view(1, -1)
    out = torch._weight_int8pack_mm(rotated, code[:N], _ones(N, dtype))
    _scale(out.float(), None, scale[:N], None if bias is None else bias.float(), out)
    return out


@cache
def _ones(N: int, dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode(False):  # usable in any mode
        return torch.ones(N, dtype=dtype, device="cpu")


def _tiles(M: int, N: int):
    """Cut [M, N] into tiles (rows, columns, int32 buffer [m, n])."""
    height = min(M, _TALLEST if M >= _TALLEST else _TALLEST // 4)  # 2 times 128: 0.8 of one 256
    width = min(N, _TILE // height)
    buffer = _scratch(4 * height * width, torch.device("cpu")).view(torch.int32)
    for c0 in range(0, N, width):
        for r0 in range(0, M, height):
            r1, c1 = min(M, r0 + height), min(N, c0 + width)
            product = buffer[: (r1 - r0) * (c1 - c0)].view(r1 - r0, c1 - c0)
            yield slice(r0, r1), slice(c0, c1), product


def _scale(value, row_scale, column_scale, bias, out) -> None:
    """out = value * row_scale * column_scale + bias; value is overwritten.

    Args:
        row_scale: None for 1.
    """
    if row_scale is not None:
        value.mul_(row_scale)
    if bias is None:
        value.mul_(column_scale)
    else:
        torch.addcmul(bias, value, column_scale, out=value)
    out.copy_(value)
