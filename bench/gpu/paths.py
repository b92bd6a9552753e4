"""The ways to compute a linear that are compared: dense BF16, stock ComfyUI's, and ours."""

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

    STOCK = "comfy-kitchen: unpacked in eager passes; from Blackwell on, quantized and multiplied"
except (ImportError, OSError, RuntimeError) as _error:
    kitchen = None
    STOCK = f"several eager passes written after comfy-kitchen's, which is not here ({_error})"


@dataclass(frozen=True)
class Way:
    """One way: `store` makes of a BF16 weight what it keeps, `run(x, stored, bias)` multiplies.

    Attributes:
        precision: "exact" or "fast"; None for dense BF16.
        cached: whether the row fold is kept; None where there is none.
        shares: whether linears that take one input quantize it once.
        by: the backend that is named; None: that which is chosen.
    """

    store: Callable
    run: Callable
    precision: str | None = None
    cached: bool | None = None
    shares: bool = False
    by: str | None = None


def stock_quantize(x: torch.Tensor):
    """(codes, tiled scales) as stock ComfyUI makes them: on a GPU by comfy-kitchen's own kernel."""
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


def _stock_in_blocks(x, stored, bias):
    """Stock's way from Blackwell on: x is quantized for every linear, torch multiplies."""
    flat = x.reshape(-1, x.shape[-1])
    tokens, (qdata, scale) = stock_quantize(flat), stored
    out = comfy_kitchen.scaled_mm_mxfp8(
        tokens[0], qdata, tokens[1], scale.view(torch.float8_e8m0fnu), bias, x.dtype
    )
    return out[: len(flat)].reshape(*x.shape[:-1], -1)


def _stock_multiplies(device: torch.device) -> bool:
    """Whether stock ComfyUI multiplies in MXFP8 here."""
    return kitchen is not None and torch_mx.unsupported_reason(_fast_problem(device)) is None


def _fast_problem(device: torch.device) -> dispatch.Problem:
    return dispatch.Problem("linear", device, torch.bfloat16, "fast")


def block_backends(device: torch.device) -> tuple[dict[str, Callable], dict[str, str]]:
    """Block-scaled matmuls that run here by name, and of the others why not.

    On a CPU that is the oracle alone, to try the script.
    """
    runs, refused = {}, {}
    for record in dispatch.BACKENDS:
        if record.input_form == "mxfp8":
            reason = dispatch._unsupported_reason(record, _fast_problem(device))
            if reason is None:
                runs[record.name] = record.matmul
            else:
                refused[record.name] = reason
    return (runs, refused) if device.type == "cuda" else ({"reference": reference.block_matmul}, {})


def _named(name: str) -> Callable:
    """Our fast linear by one backend."""

    def run(x, stored, bias):
        with kernels.use_backend(name):
            return _fast(x, stored, bias)

    return run


def _exact(x, stored, bias):
    return kernels.linear(x, *stored, bias, precision="exact")


def _with_fold(weight):
    qdata, scale = kernels.quantize(weight)
    return qdata, scale, kernels.to_rowwise(qdata, scale)


def _fast(x, stored, bias, tokens=None):
    qdata, scale, *folded = stored
    return kernels.linear(
        x,
        qdata,
        scale,
        bias,
        precision="fast",
        prepared_weight=folded[0] if folded else None,
        quantized_input=tokens,
    )


def _fast_in_torch(x, stored, bias, tokens=None):
    """Where no FP8 tensor cores are: the same three steps in plain torch, to try the script."""
    qdata, scale, *folded = stored
    flat = x.reshape(-1, x.shape[-1])
    code, token_scale = fp8_rowwise.quantize_rowwise(flat) if tokens is None else tokens
    weight, row_scale = folded[0] if folded else fp8_rowwise.to_rowwise(qdata, scale)
    out = fp8_rowwise.scaled_matmul(
        code, token_scale, weight, row_scale, bias, x.dtype, qdata.shape[0]
    )
    return out.reshape(*x.shape[:-1], -1)


def ways(device: torch.device) -> dict[str, Way]:
    """By name; "fast" ones only where the device has a backend for them."""
    found = {
        "bf16": Way(lambda weight: weight, torch.nn.functional.linear),
        "stock": Way(
            kernels.quantize, _stock_in_blocks if _stock_multiplies(device) else _stock, "exact"
        ),
        "exact": Way(kernels.quantize, _exact, "exact"),
    }
    if fast_unsupported_reason(device) is None:
        here = dispatch.input_form(device, torch.bfloat16, "fast")
        if here and here[0] == "mxfp8":  # nothing is derived from a weight that could be kept
            found["fast"] = Way(kernels.quantize, _fast, "fast")
            found["fast shared"] = Way(kernels.quantize, _fast, "fast", shares=True)
            others = block_backends(device)[0].keys() - {here[1]}
            found |= {n: Way(kernels.quantize, _named(n), "fast", by=n) for n in sorted(others)}
            return found
        fast = _fast if here else _fast_in_torch
        found["fast"] = Way(kernels.quantize, fast, "fast", False)
        found["fast cached"] = Way(_with_fold, fast, "fast", True)
        found["fast cached shared"] = Way(_with_fold, fast, "fast", True, shares=True)
    return found


def fast_unsupported_reason(device: torch.device) -> str | None:
    """Why there is no fast linear to measure, or None. On a CPU plain torch stands in."""
    if device.type != "cuda" or dispatch.input_form(device, torch.bfloat16, "fast"):
        return None
    reasons = [s.reason for s in kernels.list_backends(device) if s.name == "fp8"]
    return reasons[0] if reasons else "no backend folds"


def backend(device: torch.device, way: Way, rows: int) -> str:
    """The name of the backend that runs one of our ways with this many rows."""
    if way.by is not None:
        return way.by
    probe = torch.empty(0, dtype=torch.bfloat16, device=device)
    name = dispatch.choose("linear", probe, way.precision, rows)[0].name
    if way.precision == "fast" and not dispatch.input_form(device, torch.bfloat16, "fast"):
        name = "plain torch"
    return f"{name}, shared tokens" if way.shares else name


def exact_weight(qdata, scale) -> torch.Tensor:
    """The stored weight in float64. Plain torch: nothing that is measured has a part in it."""
    return eager.dequantize(qdata, scale, torch.float32, *qdata.shape).double()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over norm of what is wanted."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm())
