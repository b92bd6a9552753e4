"""Where Triton kernels run: the facts of a device that they are compiled and launched by.

Triton is optional, and whatever keeps it from working is remembered as a reason for the user.
"""

from __future__ import annotations

import contextlib
import os
from functools import cache
from importlib import import_module

import torch

OLDEST = (3, 3)  # Triton; earlier ones were never compiled
# Compute capability -> the first Triton whose machine code for it multiplies with block scales
# (`aot`, bench/results/compiled.json). 3.6 does not know sm_110, and multiplies in bfloat16 on
# sm_121 without a word.
BLOCK_SCALED = {(10, 0): (3, 6), (10, 3): (3, 6), (11, 0): (3, 9), (12, 0): (3, 6), (12, 1): (3, 9)}


@cache
def triton_unsupported_reason() -> str | None:
    """Why there is no Triton here, or None."""
    package = "triton-windows" if os.name == "nt" else "triton"
    return package_unsupported_reason("Triton", package, OLDEST, "triton")


def package_unsupported_reason(
    label: str, package: str, oldest: tuple[int, int], *modules: str
) -> str | None:
    """Why an optional package cannot be used here, or None.

    Args:
        modules: what is imported of it; the first has the version.
    """
    try:
        first, *_ = [import_module(name) for name in modules]
        version = _version(first)
    except ModuleNotFoundError:
        return f"needs {label}: pip install {package}"
    except Exception as error:  # a broken installation raises whatever it likes
        return f"{label} does not import here ({type(error).__name__}: {error})"
    if version < oldest:
        wanted = ".".join(map(str, oldest))
        return f"{label} {first.__version__} is too old; {wanted} or later works"
    return None


def block_scaled_unsupported_reason(device: torch.device) -> str | None:
    """Why Triton has no block-scaled matrix instructions here, or None."""
    found = capability(device)
    if amd_architecture(device) != "gfx950":
        if found is None or found < (10, 0):
            return f"needs block-scaled tensor cores (Blackwell, gfx950); {described(device)}"
        if found not in BLOCK_SCALED:
            return f"was never compiled for compute capability {found[0]}.{found[1]}"
    reason = triton_unsupported_reason()
    wanted = BLOCK_SCALED.get(found, OLDEST)
    if reason is not None or wanted == OLDEST:
        return reason
    import triton

    if _version(triton) < wanted:
        needed = ".".join(map(str, wanted))
        return f"needs Triton {needed} for this card; this is {triton.__version__}"
    return None


def _version(module) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def machine() -> str:
    """What kernels would run on here, in a line."""
    parts = [f"torch {torch.__version__}"]
    if triton_unsupported_reason() is None:
        import triton

        parts.append(f"Triton {triton.__version__}")
    if not torch.cuda.is_available():
        return ", ".join([*parts, "no CUDA device"])
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        version = f"compute capability {found.major}.{found.minor}"
        parts.append(f"{found.name} ({version}, {found.total_memory / 1e9:.0f} GB)")
    return ", ".join(parts)


def capturing() -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be compared."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU, None for any other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def described(device: torch.device) -> str:
    """What a device is, where a refusal says what it would have to be."""
    found = capability(device)
    if found:
        return f"this one has {found[0]}.{found[1]}"
    return f"this is {amd_architecture(device) or device.type}"


@cache
def amd_architecture(device: torch.device) -> str | None:
    """The name of an AMD GPU's architecture ("gfx950"), None for any other device."""
    if device.type != "cuda" or torch.version.hip is None:
        return None
    return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]


def hardware_e4m3(device: torch.device) -> bool:
    """Whether the device converts E4M3 by instructions: NVIDIA from Ada (sm_89) on."""
    return (capability(device) or (0, 0)) >= (8, 9)


def on_device(tensor: torch.Tensor):
    """A context in which kernels are launched on a tensor's device."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
