"""The methods of computing a linear that are compared: dense BF16, stock ComfyUI's, and ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mxfp8 import kernels
from mxfp8.kernels import dispatch, layout
from mxfp8.kernels.backends import eager, fp8_rowwise, reference, torch_mx

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
        backend: the backend that is named; None: the one that is chosen.
    """

    store: Callable
    run: Callable
    precision: str | None = None
    cached: bool | None = None
    shares: bool = False
    backend: str | None = None


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
    return kitchen is not None and torch_mx.unsupported_reason(_fast_problem(device)) is None


def _fast_problem(device: torch.device) -> dispatch.Problem:
    return dispatch.Problem("linear", device, torch.bfloat16, "fast")


def block_backends(device: torch.device) -> tuple[dict[str, Callable], dict[str, str]]:
    """(block-scaled matmuls that run here, reasons why the others do not), both by backend.

    On a CPU that is the oracle alone, to try the script.
    """
    if device.type != "cuda":
        return {"reference": reference.block_matmul}, {}
    matmuls, reasons = {}, {}
    for record in dispatch.BACKENDS:
        if record.input_form == "mxfp8":
            reason = dispatch._unsupported_reason(record, _fast_problem(device))
            if reason is None:
                matmuls[record.name] = record.matmul
            else:
                reasons[record.name] = reason
    return matmuls, reasons


def _by_backend(name: str) -> Callable:
    """Our fast linear by one backend."""

    def run(x, stored, bias):
        with kernels.use_backend(name):
            return _fast(x, stored, bias)

    return run


def _exact(x, stored, bias):
    return kernels.linear(x, *stored, bias, precision="exact")


def _with_prepared_weight(weight):
    qdata, scale = kernels.quantize(weight)
    return qdata, scale, kernels.to_rowwise(qdata, scale)


def _fast(x, stored, bias, quantized_input=None):
    qdata, scale, *prepared = stored
    return kernels.linear(
        x, qdata, scale, bias, precision="fast",
        prepared_weight=prepared[0] if prepared else None, quantized_input=quantized_input,
    )  # fmt: skip


def _fast_in_torch(x, stored, bias, quantized_input=None):
    """Without FP8 tensor cores: the same three steps in plain torch, to try the script."""
    qdata, scale, *prepared = stored
    if quantized_input is None:
        quantized_input = fp8_rowwise.quantize_rowwise(x.reshape(-1, x.shape[-1]))
    weight = prepared[0] if prepared else fp8_rowwise.to_rowwise(qdata, scale)
    out = fp8_rowwise.scaled_matmul(*quantized_input, *weight, bias, x.dtype, qdata.shape[0])
    return out.reshape(*x.shape[:-1], -1)


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
    form_and_backend = dispatch.input_form(device, torch.bfloat16, "fast")
    if form_and_backend and form_and_backend[0] == "mxfp8":  # no weight is prepared
        methods["fast"] = Method(kernels.quantize, _fast, "fast")
        methods["fast shared"] = Method(kernels.quantize, _fast, "fast", shares=True)
        for name in sorted(block_backends(device)[0].keys() - {form_and_backend[1]}):
            methods[name] = Method(kernels.quantize, _by_backend(name), "fast", backend=name)
        return methods
    fast = _fast if form_and_backend else _fast_in_torch
    methods["fast"] = Method(kernels.quantize, fast, "fast", False)
    methods["fast cached"] = Method(_with_prepared_weight, fast, "fast", True)
    methods["fast cached shared"] = Method(_with_prepared_weight, fast, "fast", True, shares=True)
    return methods


def fast_unsupported_reason(device: torch.device) -> str | None:
    """Why there is no fast linear to measure, or None. On a CPU plain torch stands in."""
    if device.type != "cuda" or dispatch.input_form(device, torch.bfloat16, "fast"):
        return None
    return next(s.reason for s in kernels.list_backends(device) if s.name == "fp8")


def backend_name(device: torch.device, method: Method, rows: int) -> str:
    """The backend that runs one of our methods with this many rows."""
    if method.backend is not None:
        return method.backend
    probe = torch.empty(0, dtype=torch.bfloat16, device=device)
    name = dispatch.choose("linear", probe, method.precision, rows)[0].name
    if method.precision == "fast" and not dispatch.input_form(device, torch.bfloat16, "fast"):
        name = "plain torch"
    return f"{name}, shared input" if method.shares else name


def exact_weight(qdata, scale) -> torch.Tensor:
    """The stored weight in float64, by plain torch: independent of what is measured."""
    return eager.dequantize(qdata, scale, torch.float32, *qdata.shape).double()


def relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    out, expected = out.double(), expected.double()
    return float((out - expected).norm() / expected.norm())
