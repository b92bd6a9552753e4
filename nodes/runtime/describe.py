"""The backend report of a loaded model: how each of its linears runs here, and where its bytes are.

Nothing is decided here: a layer's forward is the patch that is on it, and what that does is asked
of `forward` and `kernels.execution_path`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import comfy.model_management
import torch
from comfy.model_base import BaseModel
from comfy.quant_ops import QuantizedTensor

from ... import kernels
from ...kernels import FEW_ROWS
from ...quant.reports import execution
from ...quant.reports.conversion import KEPT, MXFP8
from ...quant.reports.execution import STOCK, BackendReport, LayerExecution, Memory, Timing
from ...quant.sources.file import HEADER_DTYPES
from ..host.progress import Progress
from . import cache, forward
from .adapter_uses import adapter_uses, applied_patches
from .forward import compute_dtype
from .lora import SideBranches, tensors_of
from .patch import PREFIX
from .prepared import PreparedWeight, stored_weight
from .preparing import judged_by_itself
from .residency import is_resident
from .timer import median_microseconds

ROWS = 4096  # M of the inputs that layers are described for: an image of a megapixel
# Most rows that a layer is timed with on a CPU. A call of the largest layers then takes less than a
# second, and interrupts are checked between calls.
_CPU_ROWS = 256


def linears(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name, module) of every linear with a 2-D weight, quantized or not, in module order."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "in_features") and getattr(weight, "ndim", None) == 2:
            yield name, module


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as files call it."""
    return HEADER_DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def describe(patcher, rows: int = ROWS) -> BackendReport:
    """The backend report of a ModelPatcher, without timings.

    Before it is loaded, the report is about what loading will do.

    Args:
        rows: M of the inputs that layers are described for.
    """
    device, dtype = patcher.load_device, compute_dtype(patcher)
    side, modules = applied_patches(patcher), dict(linears(patcher.model))
    layers = [_layer(patcher, side, name, module, rows) for name, module in modules.items()]
    asked = _asked(patcher)
    many = kernels.execution_path(device, dtype, asked, prepare="once")
    exact = kernels.execution_path(device, dtype, "exact", prepare="once")
    small_m = kernels.execution_path(device, dtype, asked, 1, weight_form=exact.weight_form)
    limited_by = execution.limiting_reason(device.type, many, asked, _is_encoder(patcher))
    ours = any(x.backend != STOCK for x in layers)
    return BackendReport(
        model=type(patcher.model).__name__,
        machine=kernels.machine(),
        device=str(device),
        dtype=dtype_name(dtype),
        rows=rows,
        small_m=f"{small_m.backend}, {small_m.precision} (up to {FEW_ROWS})" if ours else STOCK,
        unsupported=tuple(f"{name}: {reason}" for name, reason in many.unsupported),
        limited_by=limited_by if ours else None,
        memory=_memory(patcher, side),
        layers=tuple(layers),
        adapters=adapter_uses(patcher, side, modules),
    )


def _asked(patcher) -> str:
    """The precision chosen for a model: that of most of its patches."""
    patches = [getattr(p, "__func__", None) for p in patcher.object_patches.values()]
    asked = [forward.PRECISION_OF[f] for f in patches if f in forward.FORWARDS.values()]
    return max(set(asked), key=asked.count) if asked else "auto"


def _is_encoder(patcher) -> bool:
    """Whether a model is a text encoder, which `patch.accelerate_clip` always runs exact."""
    return not isinstance(patcher.model, BaseModel)


def _layer(patcher, side: SideBranches, name: str, module, rows: int) -> LayerExecution:
    weight = module.weight
    dtype = dtype_name(weight.dtype)
    kind = getattr(module, "quant_format", None) if isinstance(weight, QuantizedTensor) else None
    reason = f"not MXFP8: {kind or dtype}"
    backend, precision, form = STOCK, None, None
    patch = patcher.object_patches.get(f"{name}.forward")
    if kind == MXFP8:
        path, reason = _path(patcher, side, name, module, rows)
        if path is not None:
            backend, precision, form = path.backend, path.precision, path.weight_form
    elif patch is not None and not forward.is_ours(patch):
        reason = f"{reason}, patched by another node"
    branch = side.branches.get(name)
    if branch is not None and any(applied.problem is None for applied in branch.applied):
        reason = f"{reason}; LoRA beside the weight"
    return LayerExecution(
        name=name.removeprefix(PREFIX),
        shape=tuple(weight.shape),
        decision=kind or KEPT,
        reason=reason,
        dtype=dtype,
        bytes=sum(part.nbytes for _, part in _parts(stored_weight(weight))),
        device=str(weight.device),
        backend=backend,
        precision=precision,
        weight_form=form,
    )


def _path(patcher, side: SideBranches, name: str, module, rows: int) -> tuple:
    """(path or None for stock's forward, reason) of an MXFP8 linear, by the patch that is on it."""
    patch = patcher.object_patches.get(f"{name}.forward")
    function = getattr(patch, "__func__", None)
    if patch is None:
        return None, "as ComfyUI runs it: Accelerate Model (MXFP8) is not on it"
    if function not in forward.PRECISION_OF:
        return None, "patched by another node"
    asked = forward.PRECISION_OF[function]
    device, dtype = patcher.load_device, compute_dtype(patcher)
    left = forward.left_to_stock(module, asked, device, dtype)
    if left is None and patcher.is_dynamic() and f"{name}.weight" in side.merged:
        left = "ComfyUI applies a patch while it casts the weight, as it does under dynamic VRAM"
    if left is not None:
        return None, left
    encoder = _is_encoder(patcher)
    # An encoder is exact anyway; ComfyUI's flag to cast its weights is set only by loading it.
    held = None if encoder else forward.held_exact(module)
    state = cache.model_state(module)
    many = forward.wanted_path(module, asked, device, dtype)
    stays = state.stays_stored.get(module) or _offloaded(patcher, name, module, many)
    shape, precision = tuple(module.weight.shape), asked if held is None else "exact"
    if stays is not None:
        form, _ = forward.form_and_tensors(module.weight)
        many = kernels.execution_path(device, dtype, precision, None, shape, weight_form=form)
    path = many
    if rows <= FEW_ROWS:  # a layer that is called with few rows is given back what exact runs on
        exact = forward.wanted_path(module, "exact", device, dtype)
        form = (exact if many.precision == "fast" else many).weight_form
        path = kernels.execution_path(device, dtype, precision, rows, shape, weight_form=form)
    if held is not None:
        return path, f"exact: {held}"
    if stays is not None and path.precision == "exact":
        return path, f"exact: {stays}"
    change = state.changes.get(module)
    return path, execution.layer_reason(path, many, asked, change, encoder)


def _offloaded(patcher, name: str, module, path) -> str | None:
    """Why a layer of a loaded model does not run as this path would have it, or None.

    One that is on the device and not prepared was loaded by stock, and is prepared before it runs.
    """
    loaded = patcher.model.current_weight_patches_uuid is not None and not patcher.is_dynamic()
    prepared = isinstance(module.weight, PreparedWeight)
    here = prepared or is_resident(patcher, name, module)
    if loaded and path.weight_form != "stored" and not here:
        return "offloaded by ComfyUI, so its weight is not prepared"
    return None


def _parts(tensor) -> list[tuple[str, torch.Tensor]]:
    """(kind of memory, tensor) of what a parameter or buffer consists of."""
    if isinstance(tensor, PreparedWeight):
        prepared = [("prepared weights", part) for part in tensor.tensors]
        return prepared + _parts(tensor.stored)
    if isinstance(tensor, QuantizedTensor):
        params = vars(tensor._params).values()
        scales = [value for value in params if isinstance(value, torch.Tensor)]
        return [("codes", tensor._qdata), *(("scales", scale) for scale in scales)]
    return [("other weights", tensor)]


def _memory(patcher, side: SideBranches) -> dict[str, Memory]:
    """Bytes by kind, of the weights as they are now."""
    kinds = ("codes", "scales", "other weights", "prepared weights")
    sizes = {kind: [0, 0] for kind in kinds}
    model = patcher.model
    for tensor in (*model.parameters(), *model.buffers()):
        for kind, part in _parts(tensor):
            sizes[kind][forward.is_away(part, patcher)] += part.nbytes
    beside = [t for b in side.branches.values() for t in (*b.parameters(), *b.buffers())]
    merged = tensors_of(list(side.merged.values()))
    for kind, parts in (("LoRAs beside the weights", beside), ("LoRAs to merge", merged)):
        sizes[kind] = [0, 0]
        for part in parts:
            sizes[kind][forward.is_away(part, patcher)] += part.nbytes
    return {kind: Memory(*size) for kind, size in sizes.items()}


def load_for_report(patcher) -> None:
    """Load a model as for a run; only then is it known what is offloaded and who applies a LoRA."""
    comfy.model_management.load_models_gpu([patcher])


def measure(patcher, report: BackendReport, progress: Progress) -> BackendReport:
    """The report with timings of one MXFP8 layer of each size, as the patch on it runs it.

    Args:
        report: of the model after `load_for_report`. The time of an offloaded layer includes its
            transfer to the device.
    """
    groups: dict[tuple, list[LayerExecution]] = {}
    for layer in report.mxfp8:
        if layer.backend != STOCK:
            groups.setdefault((layer.shape, layer.backend, layer.precision), []).append(layer)
    timings, times = [], {}
    for index, (key, layers) in enumerate(groups.items()):
        name = layers[0].name

        def step(part: int, first=3 * index, name=name) -> None:
            progress(first + part, 3 * len(groups), name)

        timing = _time(patcher, name, report.rows, len(layers), key, step)
        timings.append(timing)
        times |= {layer.name: timing.microseconds for layer in layers}
    memory = _memory(patcher, applied_patches(patcher))
    layers = tuple(replace(x, microseconds=times.get(x.name)) for x in report.layers)
    return replace(report, layers=layers, timings=tuple(timings), memory=memory)


def _time(patcher, name: str, rows: int, count: int, key: tuple, step) -> Timing:
    """The times of one layer, of a dense one of its size, and of stock's forward on it."""
    full = name if f"{name}.forward" in patcher.object_patches else PREFIX + name
    patch = patcher.object_patches[f"{full}.forward"]
    module = patch.__self__
    device, dtype = patcher.load_device, compute_dtype(patcher)
    shape, backend, precision = key
    if device.type == "cpu":
        rows = min(rows, _CPU_ROWS)
    x = torch.randn(rows, shape[1], device=device).to(dtype)
    dense = module.weight.dequantize().to(device, dtype)
    calls = (
        lambda: patch(x),
        lambda: torch.nn.functional.linear(x, dense),
        lambda: type(module).forward(module, x),
    )
    wait = functools.partial(synchronize, device)
    with judged_by_itself(module):
        times = [
            median_microseconds(call, wait, functools.partial(step, part))
            for part, call in enumerate(calls)
        ]
    return Timing(shape, backend, precision, count, rows, *times)


def synchronize(device: torch.device) -> None:
    """Wait for the work that is queued on a device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
