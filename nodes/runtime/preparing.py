"""Preparing the weight of one layer: whether there is room, and whether the form fits it.

It is prepared when ComfyUI has loaded it (`residency`); under dynamic VRAM, when it is called
(`slot`). The first call after loading shows whether a layer has few rows: such layers, modulations
for example, stay exact, as the bytes of their weights decide how long they take. Both that and a
form that changes a weight too much are remembered until the model is loaded anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import torch
from comfy.quant_ops import QuantizedTensor

from ... import kernels
from .cache import model_state
from .prepared import PreparedWeight

# A weight that a form would change by more runs exact; MXFP8 itself rounds by 0.027.
MAX_CHANGE = 0.02
RESERVE = 4 << 30  # bytes that stay free on a CPU, at least
SHARE = 4  # the reserve is total memory / SHARE
CALLED_WITH_FEW_ROWS = f"it is called with at most {kernels.FEW_ROWS} rows"


def nbytes(path: kernels.ExecutionPath, weight: torch.Tensor) -> int:
    """Bytes of a weight's prepared form, of which the scales count for little."""
    return weight.numel() * (2 if path.weight_form == "bf16" else 1)


def free_memory(device: torch.device) -> float:
    """Bytes that prepared weights may take beside the stored ones.

    On a GPU they take the place of those, and are as large.
    """
    if device.type != "cpu":
        return float("inf")
    free = comfy.model_management.get_free_memory(device)
    return free - max(RESERVE, comfy.model_management.get_total_memory(device) // SHARE)


def prepare(
    module: torch.nn.Module, codes: QuantizedTensor, stored: QuantizedTensor, path
) -> PreparedWeight | None:
    """A layer's weight in the form that a path takes; None if that changes it too much.

    Args:
        codes: the weight on the device.
        stored: the same in RAM.
        path: `kernels.execution_path` with `prepare="once"`.
    """
    qdata, scale = codes._qdata, codes._params.scale
    tensors = kernels.prepare_weight(path, qdata, scale)
    if path.precision == "fast":
        state = model_state(module)
        change = kernels.weight_change(qdata, scale, tensors, path.weight_form)
        state.changes[module] = change
        if change > MAX_CHANGE:
            state.stays_stored[module] = (
                f"{path.weight_form} would change its weight by {change:.2g}, more than "
                f"{MAX_CHANGE:g}"
            )
            return None
    return PreparedWeight.of(stored, path.weight_form, tensors)


def called_with_few_rows(module: torch.nn.Module, rows: int) -> bool:
    """Whether this is a layer's first call since it was loaded, and has few rows."""
    state = model_state(module)
    if module in state.called:
        return False
    state.called.add(module)
    if rows > kernels.FEW_ROWS:
        return False
    state.stays_stored[module] = CALLED_WITH_FEW_ROWS
    return True


def judge_uncompiled(executor, *args, **options):
    """A wrapper of a model's calls: the first one after loading is not compiled.

    It gives layers with few rows their codes back, which a compiled graph cannot.
    """
    state = model_state(executor.class_obj)
    if not state.unjudged:
        return executor(*args, **options)
    with torch.compiler.set_stance("force_eager"):
        result = executor(*args, **options)
    state.unjudged = False  # not if it was interrupted
    return result


@contextmanager
def judged_by_itself(module: torch.nn.Module) -> Iterator[None]:
    """Within it a call shows whether a layer has few rows; afterwards it is as if none had."""
    state = model_state(module)
    called, stays = module in state.called, module in state.stays_stored
    state.called.discard(module)
    try:
        yield
    finally:
        (state.called.add if called else state.called.discard)(module)
        if not stays:  # its weight is prepared again when the model is loaded next
            state.stays_stored.pop(module, None)


def give_back(module: torch.nn.Module, weight: PreparedWeight, exact) -> QuantizedTensor:
    """Replace a layer's prepared weight by its codes, or by the form that exact runs on.

    Args:
        exact: the path that it runs at from now on.
    """
    stored = weight.stored
    codes = stored.to(device=weight.device)
    if exact.weight_form != "stored" and nbytes(exact, codes) <= free_memory(weight.device):
        codes = prepare(module, codes, stored, exact)
    replace(module, codes)
    return codes


def replace(module: torch.nn.Module, weight: QuantizedTensor) -> None:
    """Give a layer another weight."""
    if not isinstance(weight, torch.nn.Parameter):  # one from outside inference mode cannot be
        weight = torch.nn.Parameter(weight, requires_grad=False)
    module.weight = weight
