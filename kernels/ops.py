"""The public functions, each a registered torch op with a fake, so torch.compile can trace them.

Registered with `torch.library.Library`: a call costs 3.5 us, where a `custom_op` costs 6 to 11.
Ops look at shapes and dtypes, never at values: no synchronization, no data-dependent errors.
Whether a weight is finite is for the caller to check.
"""

from __future__ import annotations

import math

import torch

from . import layout
from .dispatch import PRECISIONS, ExecutionPath, choose_step, execution_path, named
from .records import BACKENDS, DEQUANTIZERS, FLOATS, QUANTIZERS, Step

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
    "linear(Tensor x, Tensor qdata, Tensor scale, Tensor? bias, SymInt N, SymInt K, "
    "str precision) -> Tensor"
)
_lib.define("prepare_weight(Tensor qdata, Tensor scale, str form, str by) -> Tensor[]")
_lib.define("quantize_input(Tensor x, str form, str by) -> Tensor[]")
_lib.define(
    "matmul(Tensor[] quantized, Tensor[] prepared, Tensor? bias, ScalarType dtype, SymInt N, "
    "str backend) -> Tensor"
)
_ops = getattr(torch.ops, NAMESPACE)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix to MXFP8 in blocks of 32 along K, straight from its own precision.

    Args:
        x: [M, K], float32, float16 or bfloat16, any strides.

    Returns:
        (qdata, scale): float8_e4m3fn [M', K'] with M', K' rounded up to 32 and padding zero;
        uint8 E8M0 bytes [roundup(M', 128), roundup(K'/32, 4)] in the tiled order (`layout`).
        A block holding NaN or Inf gets scale byte 0xFF and decodes to NaN (`reference`). Not
        differentiable.

    Raises:
        ValueError: x is not 2-D or of another dtype.
    """
    check_quantizable(x)
    return _ops.quantize(x.detach() if x.requires_grad else x)


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


def linear(x, qdata, scale, bias=None, *, shape=None, precision: str = "auto") -> torch.Tensor:
    """x @ W.T + bias with an MXFP8 weight.

    Args:
        x: [..., K], float32, float16 or bfloat16; any rank from 1, M = 0 included.
        qdata, scale: W [N, K] as `quantize` returns it.
        bias: [N] or None.
        shape: the unpadded (N, K) of W; default: nothing is padding.
        precision: "exact", "fast" or "auto" (see `dispatch`). Row-wise FP8 weights are made on each
            call where one pass does it; other forms are left to `linear_prepared`.

    Returns:
        [..., N] of x's dtype. Differentiable in x and bias; under torch.func exact, whatever the
        precision.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    N, K = _check_matrix(qdata, scale, shape)
    _check_operands(x, bias, N, K, qdata.device)
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    qdata, scale = qdata.contiguous(), scale.contiguous()  # nearly always a no-op
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        # Ops do not pass through torch.func: it would drop a tangent, and has no rule for lists.
        weight = _ops.dequantize(qdata, scale, x.dtype, N, K)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if _would_record(x, bias) or not _are_numbers(N, K):
        bias = None if bias is None else bias.contiguous()
        return _ops.linear(x, qdata, scale, bias, N, K, precision)
    return _linear(x, qdata, scale, bias, N, K, precision)


def _are_numbers(*sizes) -> bool:
    """Whether a path can be chosen for sizes now: torch.compile may trace with symbols instead."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return all(has_static_value(size) for size in sizes)


def linear_prepared(path: ExecutionPath, x, prepared, bias, N: int, quantized=None) -> torch.Tensor:
    """x @ W.T + bias with a weight in the form that a path takes.

    Args:
        path: `execution_path` for this device, dtype and number of rows.
        x: [..., K], as for `linear`.
        prepared: the weight's tensors: (qdata, scale) for form "stored", else of `prepare_weight`.
        bias: [N] or None.
        quantized: `quantize_input` of x, if several linears share it.

    Returns:
        [..., N] of x's dtype. Not differentiable.

    Raises:
        ValueError: x, weight, N and bias are not of one linear.
    """
    rows, cols = prepared[0].shape
    fits = 0 <= rows - N < layout.ROW_PAD and 0 <= cols - x.shape[-1] < layout.BLOCK
    if not fits or (bias is not None and bias.shape != (N,)):
        raise ValueError(_mismatch(path, x, prepared, bias, N))
    if _would_record(x, bias):
        with torch.no_grad():  # buffers that are written to have no gradient
            return linear_prepared(path, x, prepared, bias, N, quantized)
    plain = _is_plain_call(x)
    if quantized is None:
        quantized = _quantized(path, x, plain)
    if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous()):
        bias = bias.to(x.dtype).contiguous()
    matmul = _matmul if plain else _ops.matmul
    out = matmul(quantized, prepared, bias, x.dtype, N, path.backend)
    if path.input_form == "mxfp8":  # has rows of padding; whether here is no reason to recompile
        out = out[: math.prod(x.shape[:-1])]
    return out if x.ndim == 2 else out.reshape(*x.shape[:-1], N)


def _mismatch(path: ExecutionPath, x, prepared, bias, N: int) -> str:
    """What is wrong with the operands of `linear_prepared`."""
    rows, cols = layout.padded_shape(N, x.shape[-1])
    return (
        f"a linear with x {list(x.shape)} and N = {N} needs a {path.weight_form} weight of "
        f"{[rows, cols]} ({[N, cols]} without padding of rows) and a bias of {[N]} or None; these "
        f"are {list(prepared[0].shape)} and {bias if bias is None else list(bias.shape)}. "
        "Pass what prepare_weight made of this layer's weight, and the layer's own bias and N"
    )


def prepare_weight(path: ExecutionPath, qdata, scale) -> tuple[torch.Tensor, ...]:
    """A stored weight in the form that a path takes (`records`), to be kept by the caller.

    Args:
        path: `execution_path` with `prepare="once"`.
        qdata, scale: as for `dequantize`.

    Raises:
        ValueError: shapes or dtypes that do not match.
    """
    _check_matrix(qdata, scale, None)
    qdata, scale = qdata.contiguous(), scale.contiguous()
    if path.preparer is None:
        return qdata, scale
    return tuple(_ops.prepare_weight(qdata, scale, path.weight_form, path.preparer))


def quantize_input(path: ExecutionPath, x) -> tuple[torch.Tensor, ...]:
    """Quantize x [..., K] once, for all calls of `linear_prepared` that share it.

    Returns:
        Its tensors in the path's input form (`records`); x as [M, K] if the path leaves it alone.
    """
    if _would_record(x):
        with torch.no_grad():
            return _quantized(path, x, _is_plain_call(x))
    return _quantized(path, x, _is_plain_call(x))


def _quantized(path: ExecutionPath, x, plain: bool) -> tuple[torch.Tensor, ...]:
    flat = x.flatten(0, -2) if x.ndim > 1 else x[None]
    if path.quantizer is None:
        return (flat,)
    quantize = _quantize_input if plain else _ops.quantize_input
    return tuple(quantize(flat, path.input_form, path.quantizer))


def _would_record(x, bias=None) -> bool:
    """Whether autograd would record what is done with x and bias."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias))


def _is_plain_call(x) -> bool:
    """Whether nothing traces, records or transforms what is done with x, autocast included.

    Then the function behind an op is called: the way through torch's dispatcher and back into
    Python costs 5 us each time, and a linear takes two ops.
    """
    return not (
        torch.compiler.is_compiling()
        or type(x) is not torch.Tensor
        or x.is_meta
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._is_any_autocast_enabled()
    )


def _check_operands(x, bias, N: int, K: int, device: torch.device) -> None:
    _check_dtype("x", x, FLOATS)
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(
            f"x has shape {list(x.shape)}; its last size must be K = {K} of the weight"
        )
    if bias is not None and tuple(bias.shape) != (N,):
        raise ValueError(f"bias has shape {list(bias.shape)}; it must be [{N}]")
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"bias is {bias.dtype}; it must be of a floating-point dtype")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the weight on {device}")


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
    return choose_step(QUANTIZERS, x.device, x.dtype).run(x)


def _quantize_fake(x):
    stored = layout.padded_shape(*x.shape)
    scale = x.new_empty(layout.scale_shape(*x.shape), dtype=torch.uint8)
    return x.new_empty(stored, dtype=torch.float8_e4m3fn), scale


def _dequantize(qdata, scale, dtype, rows, cols):
    step = choose_step(DEQUANTIZERS, qdata.device, qdata.dtype)
    return step.run(qdata, scale, dtype, rows, cols)


def _dequantize_fake(qdata, scale, dtype, rows, cols):
    return qdata.new_empty((rows, cols), dtype=dtype)


def _linear(x, qdata, scale, bias, N, K, precision):
    M = math.prod(x.shape[:-1])
    path = execution_path(x.device, x.dtype, precision, M, (N, K), prepare="each call")
    stored = qdata, scale  # checked by `linear`
    prepared = stored if path.preparer is None else prepare_weight(path, *stored)
    return linear_prepared(path, x, prepared, bias, N)


def _linear_fake(x, qdata, scale, bias, N, K, precision):
    return x.new_empty((*x.shape[:-1], N))


# Of `prepare_weight` and `quantize_input`: (form, who makes it) -> the step.
_PREPARERS: dict[tuple[str, str], Step] = {
    (backend.weight_form, step.name): step for backend in BACKENDS for step in backend.preparers
}
_QUANTIZERS: dict[tuple[str, str], Step] = {
    (backend.input_form, step.name): step for backend in BACKENDS for step in backend.quantizers
}
_CODES = {
    "rowwise_fp8": torch.float8_e4m3fn,
    "rowwise_fnuz": torch.float8_e4m3fnuz,
    "rotated_int8": torch.int8,
}


def _prepare_weight(qdata, scale, form, by):
    return list(_PREPARERS[form, by].run(qdata, scale))


def _prepare_weight_fake(qdata, scale, form, by):
    if form == "bf16":
        return [torch.empty_like(qdata, dtype=torch.bfloat16)]
    row_scale = qdata.new_empty(qdata.shape[0], dtype=torch.float32)
    return [torch.empty_like(qdata, dtype=_CODES[form]), row_scale]


def _quantize_input(x, form, by):
    return list(_QUANTIZERS[form, by].run(x))


def _quantize_input_fake(x, form, by):
    if form == "mxfp8":
        return list(_quantize_fake(x))
    M, K = x.shape
    scale = x.new_empty(M, dtype=torch.float32)
    stored = K if form == "rotated_int8" else layout.round_up(K, layout.BLOCK)
    return [x.new_empty((M, stored), dtype=_CODES[form]), scale]


def _matmul(quantized, prepared, bias, dtype, N, backend):
    return named(backend).matmul(tuple(quantized), tuple(prepared), bias, dtype, N)


def _matmul_fake(quantized, prepared, bias, dtype, N, backend):
    return quantized[0].new_empty((quantized[0].shape[0], N), dtype=dtype)


def _linear_setup_context(ctx, inputs, output):
    _, qdata, scale, bias, ctx.N, ctx.K, _ = inputs
    ctx.save_for_backward(qdata, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx, grad):
    """The straight-through estimator for x: d/dx is W, d/dbias is 1; W is fixed."""
    qdata, scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ dequantize(qdata, scale, grad.dtype, (ctx.N, ctx.K))
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        flat = grad.reshape(math.prod(grad.shape[:-1]), ctx.N)
        grad_bias = flat.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, None, None


for _name, _kernel, _fake in (
    ("quantize", _quantize, _quantize_fake),
    ("dequantize", _dequantize, _dequantize_fake),
    ("linear", _linear, _linear_fake),
    ("prepare_weight", _prepare_weight, _prepare_weight_fake),
    ("quantize_input", _quantize_input, _quantize_input_fake),
    ("matmul", _matmul, _matmul_fake),
):
    _lib.impl(_name, _kernel, "CompositeExplicitAutograd")
    # The fake. `register_fake` looks its caller up in every module: 0.2 s of ComfyUI's start.
    _lib.impl(_name, _fake, "Meta")


def _without_autocast(key: str):
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.__members__[key])

    def matmul(*args):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return _ops.matmul(*args)

    return matmul


# A path is chosen for x's dtype, which autocast would change inside of it, and so that of the
# result, where a compiled graph relies on the fake's.
for _key in ("AutocastCPU", "AutocastCUDA", "AutocastMPS", "AutocastXPU"):
    _lib.impl("matmul", _without_autocast(_key), _key)
torch.library.register_autograd(
    f"{NAMESPACE}::linear", _linear_backward, setup_context=_linear_setup_context, lib=_lib
)
