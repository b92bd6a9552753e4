"""comfy-kitchen's compiled kernels: rotated INT8 on CUDA and HIP, and MXFP8 inputs on CUDA.

ComfyUI depends on comfy-kitchen, so these kernels are there on Windows and without a compiler, and
thousands run them daily. Its registry says which of its backends would run a function here. Only
compiled ones are used: its plain-torch functions take more passes than ours, and its Triton kernels
are off in ComfyUI.

INT8. `int8_linear(convrot=True)` rotates and quantizes its input, then multiplies: two launches on
Ampere and later. The weight is what `reference.to_rotated_int8` makes, with groups of 256. Read in
its sources (0.2.15 to 0.2.31), as nobody has run them for this project:

* Values are rotated in float32. Before it is quantized, CUDA rounds the value, the row's scale and
  their quotient to x's dtype; HIP rounds the value. Computed so in torch, the result in bfloat16 is
  0.8e-2 from the oracle's, and 1.05e-2 instead of 0.98e-2 from the exact one (tests). Weights are
  therefore unpacked to float32, which loses nothing.
* On CUDA rotated float16 values above 65504 are clamped; HIP returns NaN before 0.2.31, so float16
  is refused there. Where its fused kernel does not fit, `int8_linear` takes several passes and
  rotates in x's dtype, in which float16 overflows: that is refused too.
* NaN and Inf in x come out finite on CUDA, as in stock. NaN weights stay NaN.

MXFP8. `quantize_mxfp8` has the bits of `reference.quantize` except that blocks below 2**-118 get
scale byte 0 (2**-127) instead of 1, that -0.0 keeps its sign in a block of zeros, and that NaN and
Inf come out finite.

Rejected: calling its compiled extension, whose signatures change between versions; unpacking
weights to bfloat16, which its quantizer would round again.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module, metadata

import torch

from .. import device_facts, layout, memory
from . import eager

_PACKAGE = "comfy-kitchen"
GROUP = 256  # values along K that the fused kernel rotates together
_WIDEST = 16384  # K that it takes, whatever the memory
_SLAB = 1 << 24  # weights at a time: 64 MB of float32
_INT8 = ("int8_linear", "quantize_int8_convrot_weight"), "0.2.15"  # the first version with both
_MXFP8 = ("quantize_mxfp8",), "0.2.8"


def prepare_weight(qdata, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewrite a stored weight as rotated INT8, a slab at a time.

    Args:
        qdata, scale: [N', K'] and its tiled scales.

    Returns:
        (codes, scale): int8 [N', K'] and float32 [N']; NaN where the row holds NaN or Inf.
    """
    rows, cols = qdata.shape
    codes = torch.empty(rows, cols, dtype=torch.int8, device=qdata.device)
    row_scale = torch.empty(rows, dtype=torch.float32, device=qdata.device)
    arguments = {"weight": torch.float32, "group_size": GROUP}
    quantize = _registry().get_implementation("quantize_int8_convrot_weight", kwargs=arguments)
    with device_facts.on_device(qdata):
        for first, last in layout.slabs(rows, cols, _SLAB):
            tiles = scale[first : layout.round_up(last, layout.TILE_ROWS)]
            value = eager.dequantize(qdata[first:last], tiles, torch.float32, last - first, cols)
            codes[first:last], part = quantize(value, GROUP)
            finite = value.sum(-1).isfinite()
            row_scale[first:last] = torch.where(finite, part.squeeze(-1), torch.nan)
    return codes, row_scale


def matmul(quantized, prepared, bias, dtype: torch.dtype, N: int) -> torch.Tensor:
    """x @ W.T + bias; x is rotated and quantized on the way. [M, N] of `dtype`.

    Args:
        quantized: (x [M, K],), not quantized.
        prepared: (codes, scale) of W [N', K]; N' is at least N.
        bias: [N] or None.
    """
    (x,), (codes, scale) = quantized, prepared
    if x.shape[0] == 0 or N == 0:
        return x.new_empty((x.shape[0], N), dtype=dtype)
    linear = import_module("comfy_kitchen").int8_linear
    with device_facts.on_device(x):
        return linear(x, codes[:N], scale[:N], bias, dtype, convrot=True, convrot_groupsize=GROUP)


def quantize_mxfp8(x) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> (float8_e4m3fn [M', K'], uint8 tiled scales), in one pass.

    Args:
        x: float16 or bfloat16.
    """
    with device_facts.on_device(x):
        codes, scale = import_module("comfy_kitchen").quantize_mxfp8(x.contiguous(), pad_32x=True)
    return codes, scale.view(torch.uint8)


def unsupported_reason(problem) -> str | None:
    """Why rotated INT8 cannot take a `records.Problem`, or None."""
    reason = _compiled_unsupported_reason(*_INT8, problem.device, problem.dtype)
    if reason is not None:
        return reason
    if torch.version.hip and problem.dtype == torch.float16:
        return "its HIP kernels overflow in float16"
    if torch.version.hip is None:
        reason = device_facts.int8_tensor_cores_unsupported_reason(problem.device)
        if reason is not None:
            return reason
    return None if problem.shape is None else _passes_reason(problem, problem.shape[1])


def quantize_mxfp8_unsupported_reason(problem) -> str | None:
    """Why `quantize_mxfp8` cannot take a `records.Problem`, or None."""
    if problem.dtype == torch.float32:
        return "its kernel reads float16 and bfloat16; this input is float32"
    return _compiled_unsupported_reason(*_MXFP8, problem.device, problem.dtype)


def _passes_reason(problem, K: int) -> str | None:
    """Why `int8_linear` would not quantize its input in one pass, or None.

    Its fused kernel keeps a row in shared memory, and two groups of scratch per 64 threads.
    """
    if K % GROUP:
        return f"rotates groups of {GROUP} values in one pass; K is {K}"
    element = problem.dtype.itemsize if torch.version.hip else 4
    needed = K * element + 1024 // 64 * 2 * GROUP * 4  # with its largest block, of 1,024 threads
    if not torch.version.hip:  # where the block's size differs between versions
        module = import_module("comfy_kitchen.backends.cuda")
        ask = getattr(module, "_convrot_int8_fused_shared_memory_bytes", lambda M, K: needed)
        needed = ask(2, K)  # M = 1 never needs more than what fits for more
    if K > _WIDEST or needed >= _shared_memory(problem.device):
        return f"a row of K = {K} does not fit its one-pass kernel on this card"
    return None


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a block of comfy-kitchen's may have."""
    card = torch.cuda.get_device_properties(device)
    larger = (device_facts.capability(device) or (0, 0)) >= (8, 0)
    return card.shared_memory_per_block_optin if larger else card.shared_memory_per_block


def _compiled_unsupported_reason(
    functions: tuple[str, ...], oldest: str, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why comfy-kitchen would not run compiled kernels for functions on a device, or None."""
    if device.type != "cuda":
        return device_facts.needs("an NVIDIA or AMD GPU", device)
    reason = _import_error()
    if reason is not None:
        return reason
    registry = _registry()
    backends = registry.list_backends()
    platform = "hip" if torch.version.hip else "cuda"
    kernels = f"comfy-kitchen's {platform.upper()} kernels"
    known = backends.get(platform, {})
    for function in functions:
        if not any(function in backend["capabilities"] for backend in backends.values()):
            needed = f"comfy-kitchen {oldest} or later"
            reason = f"needs {needed}; this is {_version()}"
            return device_facts.InstallReason(reason, _PACKAGE, needed)
        if known.get("disabled"):
            return _disabled_reason(f"{kernels} are disabled")
        if not known.get("available"):
            found = known.get("unavailable_reason") or f"version {_version()} has none"
            reason = f"{kernels} are not available ({found})"
            return device_facts.InstallReason(reason, _PACKAGE, kernels)
        if function not in known["capabilities"]:
            return device_facts.lacks(f"{kernels} have no {function}", device)
        oldest_card = registry.get_constraints(platform, function).min_compute_capability
        if oldest_card and (device_facts.capability(device) or oldest_card) < oldest_card:
            needed = ".".join(map(str, oldest_card))
            return device_facts.needs(f"compute capability {needed}", device)
        # Dtypes stand for tensors. It checks those, and the capability of the current GPU.
        weight = torch.int8 if function == "int8_linear" else torch.float32
        arguments = {"x": dtype, "weight": weight}
        result = registry.validate_backend_for_call(platform, function, arguments)
        if not result.success:
            return f"{kernels} do not take this: {result.failure_reason}"
        chosen = registry.get_capable_backend(function, arguments)
        if chosen != platform:
            return f"comfy-kitchen is set to prefer its {chosen} backend"
    return None


def _disabled_reason(disabled: str) -> str:
    """That they are, and what ComfyUI does it for, where that is so."""
    cuda = torch.version.cuda
    if cuda is None or int(cuda.partition(".")[0]) >= 13:
        return disabled
    needed = "a torch for CUDA 13 (cu130)"
    reason = f"{disabled}: they need {needed}; this one is for CUDA {cuda}"
    return device_facts.InstallReason(reason, "torch", needed)


def _version() -> str:
    try:
        return metadata.version("comfy-kitchen")
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _registry():
    return import_module("comfy_kitchen.registry").registry


@cache
def _import_error() -> str | None:
    """Why comfy-kitchen does not import here, or None."""
    try:
        import_module("comfy_kitchen")
    except Exception as error:  # a broken installation may raise anything
        if memory.is_out_of_memory(error):  # which says nothing about it
            raise
        if isinstance(error, ModuleNotFoundError) and error.name == "comfy_kitchen":
            reason = f"needs {_PACKAGE}: pip install {_PACKAGE}"
            return device_facts.InstallReason(reason, _PACKAGE, _PACKAGE, _PACKAGE)
        reason = f"{_PACKAGE} does not import here ({type(error).__name__}: {error})"
        return device_facts.InstallReason(reason, _PACKAGE, _PACKAGE)
    return None
