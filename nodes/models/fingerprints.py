"""Hashes that identify the weights of a MODEL, and whether patches change them.

A comparison or a report holds only for the weights that it was made from. Save Model bakes in every
patch, also on layers that are kept and on biases, so a model with any patch has no fingerprint.
"""

from __future__ import annotations

import torch
from comfy.quant_ops import QuantizedTensor

from ...quant.conversion import calibration
from ...quant.reports import comparison
from ..runtime.describe import linears
from ..runtime.forward import mxfp8_linears
from ..runtime.patch import PREFIX
from ..runtime.prepared import stored_weight

_COMPILED = "_orig_mod."  # torch.compile puts it into names


def is_patched(patcher) -> bool:
    """Whether LoRAs or patches change any parameter of the diffusion model."""
    return any(key.startswith(PREFIX) for key in patcher.patches)


def plain(name: str) -> str:
    """A module's name without what torch.compile puts into it."""
    return name.replace(_COMPILED, "")


def of_mxfp8(patcher) -> str | None:
    """`comparison.fingerprint` of a ModelPatcher; None if it is patched or has no MXFP8 layer."""
    if is_patched(patcher):
        return None
    rows = []
    for name, module in mxfp8_linears(patcher.model):
        codes = _original(patcher, name, module)._qdata[0].cpu().view(torch.uint8)
        rows.append((plain(name).removeprefix(PREFIX), codes.numpy().tobytes()))
    return comparison.fingerprint(rows)


def of_linears(patcher) -> str | None:
    """`calibration.fingerprint` of all linears of a ModelPatcher; None if it is patched.

    Of weights in other quantized formats, the stored codes are hashed.
    """
    if is_patched(patcher):
        return None
    weights = []
    for name, module in linears(patcher.model):
        weight = _original(patcher, name, module)
        row = (weight._qdata if isinstance(weight, QuantizedTensor) else weight)[0]
        if row.is_meta:  # not in the checkpoint; ComfyUI makes it zero when it is used
            row = torch.zeros(row.shape)
        weights.append((plain(name).removeprefix(PREFIX), tuple(weight.shape), row))
    return calibration.fingerprint(weights)


def _original(patcher, name: str, module) -> torch.Tensor:
    """A layer's weight without what another clone's LoRA has merged into it now."""
    backup = patcher.backup.get(f"{name}.weight")
    return stored_weight(module.weight if backup is None else backup.weight)
