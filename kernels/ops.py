"""The public functions, each a registered torch op with a fake, so torch.compile can trace them.

Registered with `torch.library.Library`: a call costs 3.5 us, where a `custom_op` costs 6 to 11.
Ops look at shapes and dtypes, never at values: no synchronization, no data-dependent errors.
Whether a weight is finite is for the caller to check.
"""

from __future__ import annotations

import math

import torch

from . import layout
from .backends import fp8_rowwise
from .dispatch import PRECISIONS, choose, named
from .dispatch import input_form as _input_form

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DATA = (torch.float8_e4m3fn, torch.uint8)
SCALES = (torch.uint8, torch.float8_e8m0fnu)


def _library() -> tuple[torch.library.Library, str]:
    """A namespace of our own, even where the process has a second copy of this package."""
    for suffix in ("", *range(2, 100)):
        name = f"mxfp8{suffix}"
        try:
            return torch.library.Library(name, "DEF"), name
        except RuntimeError:  # "Only a single TORCH_LIBRARY can be used to register the namespace"
            continue
    raise RuntimeError("100 copies of mxfp8 are loaded in this process")


_lib, NAMESPACE = _library()
_lib.define("quantize(Tensor x) -> (Tensor, Tensor)")
_lib.define(
    "dequantize(Tensor qdata, Tensor scale, ScalarType dtype, SymInt rows, SymInt cols) -> Tensor"
)
_lib.define(
    "linear(Tensor x, Tensor qdata, Tensor scale, Tensor? bias, SymInt rows, SymInt cols, "
    "str precision) -> Tensor"
)
_lib.define("to_rowwise(Tensor qdata, Tensor scale) -> (Tensor, Tensor)")
_lib.define("quantize_rowwise(Tensor x) -> (Tensor, Tensor)")
_lib.define(
    "scaled_matmul(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor? bias, "
    "ScalarType dtype, SymInt columns) -> Tensor"
)
_lib.define(
    "block_matmul(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor? bias, "
    "ScalarType dtype, SymInt rows, SymInt columns, str backend) -> Tensor"
)
_ops = getattr(torch.ops, NAMESPACE)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix to MXFP8 in blocks of 32 along K, straight from its own precision.

    Args:
        x: [M, K], float32, float16 or bfloat16, any strides.

    Returns:
        (qdata, scale): float8_e4m3fn [M', K'] with M', K' rounded up to 32 and padding zero;
        uint8 E8M0 bytes [roundup(M', 128), roundup(K'/32, 4)] in the tiled order (`layout`).
        A block holding NaN or Inf gets scale byte 0xFF and decodes to NaN (`reference`).

    Raises:
        ValueError: x is not 2-D or of another dtype.
    """
    check_quantizable(x)
    return _ops.quantize(x)


def check_quantizable(x: torch.Tensor) -> None:
    """Raise ValueError unless x is a matrix of a dtype that `quantize` takes."""
    if x.ndim != 2:
        raise ValueError(f"x has shape {list(x.shape)}; MXFP8 quantizes 2-D matrices")
    _check_dtype("x", x, FLOATS)


def dequantize(qdata, scale, dtype: torch.dtype, shape=None) -> torch.Tensor:
    """Unpack an MXFP8 matrix, rounding once to `dtype`.

    Args:
        qdata: float8_e4m3fn (or its bytes as uint8) [N', K'].
        scale: uint8 or float8_e8m0fnu, tiled order.
        dtype: float32, float16 or bfloat16.
        shape: the unpadded (N, K); default: nothing is padding.

    Returns:
        [N, K] of `dtype`. Scale byte 0 is 2**-127, 0xFF is NaN, NaN codes stay NaN.

    Raises:
        ValueError: shapes or dtypes that do not match.
    """
    rows, cols = _check_matrix(qdata, scale, shape)
    if dtype not in FLOATS:
        raise ValueError(f"MXFP8 dequantizes to float32, float16 or bfloat16, not {dtype}")
    return _ops.dequantize(qdata.contiguous(), scale.contiguous(), dtype, rows, cols)


def to_rowwise(qdata, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Prepare an MXFP8 weight as E4M3 with one scale per row, for `linear` (`fp8_rowwise`).

    Args:
        qdata, scale: as for `dequantize`.

    Returns:
        (codes, scale): float8_e4m3fn [N', K'] and float32 [N'], as large as the weight.

    Raises:
        ValueError: shapes or dtypes that do not match.
    """
    _check_matrix(qdata, scale, None)
    return _ops.to_rowwise(qdata.contiguous(), scale.contiguous())


def linear(
    x,
    qdata,
    scale,
    bias=None,
    *,
    shape=None,
    precision: str = "auto",
    prepared_weight=None,
    quantized_input=None,
) -> torch.Tensor:
    """x @ W.T + bias with an MXFP8 weight.

    Args:
        x: [..., K], float32, float16 or bfloat16; any rank from 1, M = 0 included.
        qdata, scale: W [N, K] as `quantize` returns it.
        bias: [N] or None.
        shape: the unpadded (N, K) of W; default: nothing is padding.
        precision: "exact", "fast" or "auto" (see `dispatch`).
        prepared_weight: `to_rowwise` of this weight, where `input_form` is "rowwise"; default: it
            is computed on every call.
        quantized_input: `quantize_input` of x, where `input_form` is not None; likewise.

    Returns:
        [..., N] of x's dtype. Differentiable in x and bias.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    rows, cols = _check_matrix(qdata, scale, shape)
    _check_dtype("x", x, FLOATS)
    if x.ndim == 0 or x.shape[-1] != cols:
        raise ValueError(
            f"x has shape {list(x.shape)}; its last size must be K = {cols} of the weight"
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias has shape {list(bias.shape)}; it must be [{rows}]")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.device != qdata.device:
            raise ValueError(f"{name} is on {tensor.device}, the weight on {qdata.device}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    qdata, scale = qdata.contiguous(), scale.contiguous()  # nearly always a no-op
    bias = None if bias is None else bias.contiguous()
    form_and_backend = None if _needs_grad(x, bias) else _form_and_backend(x, precision)
    if form_and_backend is None:
        return _ops.linear(x, qdata, scale, bias, rows, cols, precision)
    form, backend = form_and_backend
    x_q, x_scale = quantize_input(x, form) if quantized_input is None else quantized_input
    if bias is not None:
        bias = bias.to(x.dtype)
    if form == "rowwise":
        if prepared_weight is None:
            prepared_weight = _ops.to_rowwise(qdata, scale)
        out = _ops.scaled_matmul(x_q, x_scale, *prepared_weight, bias, x.dtype, rows)
    else:
        M = math.prod(x.shape[:-1])
        out = _ops.block_matmul(x_q, x_scale, qdata, scale, bias, x.dtype, M, rows, backend)
    return out.reshape(*x.shape[:-1], rows)


def quantize_input(x: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x once for several calls of `linear` that share it.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        form: `input_form` of x.

    Returns:
        (x_q, x_scale). "rowwise": float8_e4m3fn [M, K'], K' rounded up to 32, and float32 [M];
        "mxfp8": as `quantize` of x as [M, K].
    """
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return _ops.quantize_rowwise(flat) if form == "rowwise" else _ops.quantize(flat)


def input_form(x: torch.Tensor, precision: str) -> str | None:
    """The form into which `linear` quantizes this x, "rowwise" or "mxfp8"; None if it does not."""
    form_and_backend = _form_and_backend(x, precision)
    return form_and_backend and form_and_backend[0]


def _form_and_backend(x: torch.Tensor, precision: str) -> tuple[str, str] | None:
    result = None if precision == "exact" else _input_form(x.device, x.dtype, precision)
    if result is None or math.prod(x.shape[:-1]) <= fp8_rowwise.SMALL_M:  # last: it is a guard
        return None
    return result


def _needs_grad(*tensors) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check_dtype(name: str, tensor: torch.Tensor, allowed) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(f"{name} is {tensor.dtype}; it must be one of {names}")


def _check_matrix(qdata, scale, shape) -> tuple[int, int]:
    _check_dtype("qdata", qdata, DATA)
    _check_dtype("scale", scale, SCALES)
    rows, cols = layout.true_shape(qdata.shape, shape)
    layout.check_scale(qdata.shape, scale.shape)
    if scale.device != qdata.device:
        raise ValueError(f"the scales are on {scale.device}, the data on {qdata.device}")
    return rows, cols


def _quantize(x):
    return choose("quantize", x)[0].quantize(x)


def _quantize_fake(x):
    stored = layout.padded_shape(*x.shape)
    scale = x.new_empty(layout.scale_shape(*x.shape), dtype=torch.uint8)
    return x.new_empty(stored, dtype=torch.float8_e4m3fn), scale


def _dequantize(qdata, scale, dtype, rows, cols):
    return choose("dequantize", qdata)[0].dequantize(qdata, scale, dtype, rows, cols)


def _dequantize_fake(qdata, scale, dtype, rows, cols):
    return qdata.new_empty((rows, cols), dtype=dtype)


def _linear(x, qdata, scale, bias, rows, cols, precision):
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    flat = x.reshape(math.prod(x.shape[:-1]), cols)  # [M, K]
    backend, precision = choose("linear", x, precision, flat.shape[0])
    out = backend.linear(flat, qdata, scale, bias, rows, cols, precision)
    return out.reshape(*x.shape[:-1], rows)


def _linear_fake(x, qdata, scale, bias, rows, cols, precision):
    return x.new_empty((*x.shape[:-1], rows))


def _to_rowwise_fake(qdata, scale):
    row_scale = qdata.new_empty(qdata.shape[0], dtype=torch.float32)
    return torch.empty_like(qdata, dtype=torch.float8_e4m3fn), row_scale


def _quantize_rowwise_fake(x):
    stored = layout.round_up(x.shape[1], layout.BLOCK)
    codes = x.new_empty((x.shape[0], stored), dtype=torch.float8_e4m3fn)
    return codes, x.new_empty(x.shape[0], dtype=torch.float32)


def _scaled_matmul_fake(a, a_scale, b, b_scale, bias, dtype, columns):
    return a.new_empty((a.shape[0], columns), dtype=dtype)


def _block_matmul(a, a_scale, b, b_scale, bias, dtype, rows, columns, backend):
    return named(backend).matmul((a, a_scale), (b, b_scale), bias, dtype, rows, columns)


def _block_matmul_fake(a, a_scale, b, b_scale, bias, dtype, rows, columns, backend):
    return a.new_empty((rows, columns), dtype=dtype)


def _linear_setup_context(ctx, inputs, output):
    _, qdata, scale, bias, ctx.rows, ctx.cols, _ = inputs
    ctx.save_for_backward(qdata, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx, grad):
    """The straight-through estimator for x: d/dx is W, d/dbias is 1; W is fixed."""
    qdata, scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ dequantize(qdata, scale, grad.dtype, (ctx.rows, ctx.cols))
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        flat = grad.reshape(math.prod(grad.shape[:-1]), ctx.rows)
        grad_bias = flat.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, None, None


for _name, _kernel, _fake in (
    ("quantize", _quantize, _quantize_fake),
    ("dequantize", _dequantize, _dequantize_fake),
    ("linear", _linear, _linear_fake),
    ("to_rowwise", fp8_rowwise.to_rowwise, _to_rowwise_fake),
    ("quantize_rowwise", fp8_rowwise.quantize_rowwise, _quantize_rowwise_fake),
    ("scaled_matmul", fp8_rowwise.scaled_matmul, _scaled_matmul_fake),
    ("block_matmul", _block_matmul, _block_matmul_fake),
):
    _lib.impl(_name, _kernel, "CompositeExplicitAutograd")
    # The fake. `register_fake` looks its caller up in every module: 0.2 s of ComfyUI's start.
    _lib.impl(_name, _fake, "Meta")
torch.library.register_autograd(
    f"{NAMESPACE}::linear", _linear_backward, setup_context=_linear_setup_context, lib=_lib
)
