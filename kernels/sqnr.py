"""SQNR of a quantized weight: signal and noise energy per block of 32.

SQNR in dB is 10 log10(signal / noise) over any set of blocks. Energies are float64 sums of squares
in the units of the weight, so they add up over slabs and layers.
"""

from __future__ import annotations

import torch

from . import layout, ops
from .backends import eager, reference
from .dispatch import choose_step
from .layout import BLOCK
from .records import QUANTIZERS

_SLAB = 1 << 22  # values compared at a time: 32 MB of float64


@torch.no_grad()
def quantize_and_measure(x: torch.Tensor):
    """Quantize and measure; in one pass where plain torch is the backend that runs.

    Args:
        x: [M, K], as for `quantize`.

    Returns:
        (qdata, scale, signal, noise): as `quantize` returns them, and float64 [M, K'/32] sums of
        x**2 and of (dequantized - x)**2 on the CPU; not finite in blocks with NaN or Inf.
    """
    ops.check_quantizable(x)
    if choose_step(QUANTIZERS, x.device, x.dtype).run is not eager.quantize:
        qdata, scale = ops.quantize(x)
        return qdata, scale, *(energy.cpu() for energy in signal_and_noise(x, qdata, scale))
    rows, blocks = x.shape[0], layout.padded_shape(*x.shape)[1] // BLOCK
    energy = [torch.empty(rows, blocks, dtype=torch.float32, device=x.device) for _ in range(2)]
    qdata, scale = eager.quantize(x, energy)
    # On the CPU: not every device has float64.
    unit = eager.decode_e8m0(layout.untile(scale.cpu(), rows, blocks)).double().square_()
    return qdata, scale, *(part.cpu().double().mul_(unit) for part in energy)


@torch.no_grad()
def signal_and_noise(x: torch.Tensor, qdata, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Signal and noise of a stored matrix against the one it was quantized from.

    Args:
        x: [N, K], the original.
        qdata, scale: the stored matrix with tiled scales, padded from [N, K].

    Returns:
        (signal, noise): float64 [N, K'/32].
    """
    rows, cols = layout.true_shape(qdata.shape, x.shape)
    blocks = qdata.shape[1] // BLOCK
    signal = torch.zeros(rows, blocks, dtype=torch.float64, device=x.device)
    noise = torch.zeros_like(signal)
    for r0, r1 in layout.slabs(rows, cols, _SLAB):
        stored = qdata[r0 : layout.round_up(r1, layout.ROW_PAD)]
        tiles = scale[r0 : layout.round_up(r1, layout.TILE_ROWS)]
        value = ops.dequantize(stored, tiles, torch.float32)[: r1 - r0]  # [m, K']
        wide = torch.zeros_like(value)
        wide[:, :cols] = x[r0:r1]
        for total, part in ((noise, value.sub_(wide)), (signal, wide)):
            square = part.double().square_()  # in float32, values of 1e-30 would vanish
            total[r0:r1] = square.view(r1 - r0, blocks, BLOCK).sum(-1)
    return signal, noise


def weight_change(qdata, scale, prepared: tuple[torch.Tensor, ...], form: str) -> float:
    """How much a form changes a weight: the norm of the change, relative to the weight's.

    Args:
        qdata, scale: the stored weight [N', K'] with tiled scales.
        prepared: (codes [N', K'], scale [N']), made of it by `prepare_weight`.
        form: of those with a scale per row; rotated ones are compared where they are rotated.

    Returns:
        0 for a weight of zeros, NaN for one that holds NaN.
    """
    rows, cols = qdata.shape
    codes, row_scale = prepared
    square = torch.zeros(2, dtype=torch.float64, device=qdata.device)  # of the weight, the change
    matrix = None
    if form == "rotated_int8":
        matrix = reference.hadamard(reference.group(cols)).to(qdata.device, torch.float32)
    for r0, r1 in layout.slabs(rows, cols, _SLAB):
        tiles = scale[r0 : layout.round_up(r1, layout.TILE_ROWS)]
        value = ops.dequantize(qdata[r0:r1], tiles, torch.float32)
        if matrix is not None:
            value = (value.view(-1, len(matrix)) @ matrix).view(value.shape)
        change = value - codes[r0:r1].float() * row_scale[r0:r1, None]
        for total, part in zip(square, (value, change), strict=True):
            total += part.double().square_().sum()
    signal, noise = square.tolist()
    return (noise / signal) ** 0.5 if signal else 0.0
