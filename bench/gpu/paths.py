"""The methods of computing a linear that are compared: dense BF16, stock ComfyUI's, and ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mxfp8 import kernels
from mxfp8.kernels import dispatch, layout
from mxfp8.kernels.backends import eager, torch_mx
from mxfp8.kernels.records import Backend, Problem

try:
    import comfy_kitchen
    from comfy_kitchen.backends.eager import quantization as kitchen

    STOCK = "comfy-kitchen: unpacks in eager passes; from Blackwell on, quantizes x and multiplies"
except (ImportError, OSError, RuntimeError) as _error:
    kitchen = None
    STOCK = f"eager passes modeled on comfy-kitchen, which cannot be imported ({_error})"


@dataclass(frozen=True)
class Method:
    """One method: `store(weight)` makes what it keeps, `run(x, stored, bias)` multiplies.

    Attributes:
        precision: "exact" or "fast"; None for dense BF16.
        cached: whether the prepared weight is kept; None where there is none.
        shares: whether linears with the same input quantize it once.
        path: of the fast ones.
    """

    store: Callable
    run: Callable
    precision: str | None = None
    cached: bool | None = None
    shares: bool = False
    path: kernels.ExecutionPath | None = None


def stock_quantize(x: torch.Tensor):
    """(codes, tiled scales) as stock ComfyUI quantizes: on a GPU by comfy-kitchen's kernel."""
    if kitchen is not None and x.device.type == "cuda":
        return comfy_kitchen.quantize_mxfp8(x, pad_32x=True)
    if kitchen is not None:
        return kitchen.quantize_mxfp8(x, pad_32x=True)
    blocks = x.reshape(x.shape[0], -1, layout.BLOCK)
    amax = blocks.abs().amax(-1)
    needed = torch.clamp(amax.float() / 448.0, min=2.0**-127)
    byte = torch.clamp(torch.ceil(torch.log2(needed)).to(torch.int32) + 127, 0, 254)
    byte = byte.to(torch.uint8)
    scale = torch.where(amax == 0, 1.0, (byte.to(torch.int32) << 23).view(torch.float32))
    value = torch.clamp(blocks.float() / scale.unsqueeze(-1), -448.0, 448.0)
    return value.reshape(x.shape).to(torch.float8_e4m3fn), layout.tile(byte)


def stock_dequantize(qdata, scale, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The weight as stock ComfyUI unpacks it on every forward."""
    if kitchen is not None:
        return kitchen.dequantize_mxfp8(qdata, scale.view(torch.float8_e8m0fnu), dtype)
    rows, cols = qdata.shape
    byte = layout.untile(scale.view(torch.uint8), rows, cols // layout.BLOCK)
    factor = (byte.to(torch.int32) << 23).view(torch.float32)
    value = qdata.to(torch.float32).reshape(rows, -1, layout.BLOCK) * factor.unsqueeze(-1)
    return value.reshape(rows, cols).to(dtype)


def _stock(x, stored, bias):
    return torch.nn.functional.linear(x, stock_dequantize(*stored, x.dtype), bias)


def _stock_block_scaled(x, stored, bias):
    """Stock from Blackwell on: x is quantized for every linear, torch multiplies."""
    flat = x.reshape(-1, x.shape[-1])
    (x_q, x_scale), (qdata, scale) = stock_quantize(flat), stored
    out = comfy_kitchen.scaled_mm_mxfp8(
        x_q, qdata, x_scale, scale.view(torch.float8_e8m0fnu), bias, x.dtype
    )
    return out[: len(flat)].reshape(*x.shape[:-1], -1)


def _stock_multiplies(device: torch.device) -> bool:
    """Whether stock ComfyUI multiplies in MXFP8 here."""
    problem = Problem(device, torch.bfloat16, "fast")
    return kitchen is not None and torch_mx.unsupported_reason(problem) is None


STAND_INS = ("reference_fp8", "reference_mx")  # on a CPU, to try the script


def fast_backends(
    device: torch.device, input_form: str | None = None
) -> tuple[dict[str, Backend], dict[str, str]]:
    """(fast backends that run here, reasons why the others do not), both by name.

    Args:
        input_form: of those that are wanted; None: any.
    """
    found, reasons = {}, {}
    problem = Problem(device, torch.bfloat16, "fast", prepare="once")
    for backend in dispatch.BACKENDS:
        if device.type == "cuda":  # where `int8`, in plain torch, is not chosen
            wanted = not backend.name.startswith("reference") and backend.name != "int8"
        else:
            wanted = backend.name in STAND_INS
        wanted = wanted and backend.precision == "fast"
        if wanted and input_form in (None, backend.input_form):
            reason = dispatch._Verdicts().reason(backend, problem)
            if reason is None:
                found[backend.name] = backend
            else:
                reasons[backend.name] = reason
    return found, reasons


def path_of(device: torch.device, *names: str, prepare: str = "once") -> kernels.ExecutionPath:
    """How a fast linear of many rows runs: by these backends, or as it is chosen."""
    with kernels.use_backend(*names):
        return kernels.execution_path(device, torch.bfloat16, "fast", prepare=prepare)


def fast_path(device: torch.device) -> kernels.ExecutionPath:
    """That which is chosen on a GPU, though it may be exact; on a CPU an oracle stands in."""
    return path_of(device, *(() if device.type == "cuda" else STAND_INS[:1]))


def _fast(path: kernels.ExecutionPath, shares: bool = False) -> Method:
    """A path with the weight prepared once."""

    def store(weight):
        return kernels.prepare_weight(path, *kernels.quantize(weight))

    def run(x, prepared, bias, quantized=None):
        return kernels.linear_prepared(path, x, prepared, bias, prepared[0].shape[0], quantized)

    cached = None if path.weight_form == "stored" else True
    return Method(store, run, "fast", cached, shares, path)


def _on_each_call(path: kernels.ExecutionPath) -> Method:
    """The functional linear, which prepares the weight in one pass on each call."""

    def run(x, stored, bias):
        return kernels.linear(x, *stored, bias, precision="fast")

    return Method(kernels.quantize, run, "fast", False, path=path)


def _exact(x, stored, bias):
    return kernels.linear(x, *stored, bias, precision="exact")


def all_methods(device: torch.device) -> dict[str, Method]:
    """By name; "fast" ones only where the device has a backend for them."""
    stock = _stock_block_scaled if _stock_multiplies(device) else _stock
    methods = {
        "bf16": Method(lambda weight: weight, torch.nn.functional.linear),
        "stock": Method(kernels.quantize, stock, "exact"),
        "exact": Method(kernels.quantize, _exact, "exact"),
    }
    if fast_unsupported_reason(device) is not None:
        return methods
    path = fast_path(device)
    name = "fast" if path.weight_form == "stored" else "fast cached"
    methods[name] = _fast(path)
    if path.quantizer is not None:
        methods[f"{name} shared"] = _fast(path, shares=True)
    if device.type == "cuda":
        each = path_of(device, prepare="each call")
        if each.precision == "fast" and each.preparer is not None:
            methods["fast"] = _on_each_call(each)
    for other in sorted(fast_backends(device)[0].keys() - {path.backend}):
        methods[other] = _fast(path_of(device, other))
    return methods


def fast_unsupported_reason(device: torch.device) -> str | None:
    """Why there is no fast linear to measure, or None."""
    path = fast_path(device)
    if path.precision == "fast":
        return None
    return "; ".join(f"{name}: {reason}" for name, reason in path.unsupported)


def backend_name(device: torch.device, method: Method, rows: int) -> str:
    """The backend that runs one of our methods with this many rows."""
    if method.path is None:
        return kernels.execution_path(device, torch.bfloat16, method.precision, rows).backend
    return f"{method.path.backend}, shared input" if method.shares else method.path.backend


def exact_weight(qdata, scale) -> torch.Tensor:
    """The stored weight in float64, by plain torch: independent of what is measured."""
    return eager.dequantize(qdata, scale, torch.float32, *qdata.shape).double()


def relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    out, expected = out.double(), expected.double()
    return float((out - expected).norm() / expected.norm())
