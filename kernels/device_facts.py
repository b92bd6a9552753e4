"""Facts of a device and of Triton that decide which kernels run there, and how they are launched.

Triton is optional; what keeps it from working is returned as a reason for the user.
"""

from __future__ import annotations

import contextlib
import os
import re
from functools import cache
from importlib import import_module

import torch

from . import memory

OLDEST = (3, 3)  # of Triton; the kernels were never compiled with earlier versions
DESCRIPTORS = (3, 4)  # the first Triton with `triton.tools.tensor_descriptor`
# Compute capability -> the first Triton whose machine code for it multiplies with block scales
# (`aot`, bench/results/compiled.json). 3.6 does not know sm_110, and on sm_121 it silently
# multiplies in bfloat16.
BLOCK_SCALED = {(10, 0): (3, 6), (10, 3): (3, 6), (11, 0): (3, 9), (12, 0): (3, 6), (12, 1): (3, 9)}
# Turing without tensor cores, on which INT8 is slow.
_NO_TENSOR_CORES = re.compile(r"GTX 16|MX[45]50|CMP 30HX|\bT(400|500|550|600|1000|1200|2000)\b")


@cache
def triton_unsupported_reason() -> str | None:
    """Why Triton cannot be used here, or None."""
    package = "triton-windows" if os.name == "nt" else "triton"
    return package_unsupported_reason("Triton", package, OLDEST, "triton")


def package_unsupported_reason(
    label: str, package: str, oldest: tuple[int, int], *modules: str
) -> str | None:
    """Why an optional package cannot be used here, or None; raises what says that memory ran out.

    Args:
        modules: to import; the first has the version.
    """
    try:
        first, *_ = [import_module(name) for name in modules]
        version = _version(first)
    except ModuleNotFoundError:
        return InstallReason(f"needs {label}: pip install {package}", label, label, package)
    except Exception as error:  # a broken installation may raise anything
        if memory.is_out_of_memory(error):  # which says nothing about it
            raise
        reason = f"{label} does not import here ({type(error).__name__}: {error})"
        return InstallReason(reason, label, label)
    if version < oldest:
        needed = ".".join(map(str, oldest))
        reason = f"{label} {first.__version__} is too old; {needed} or later works"
        return InstallReason(reason, label, f"{label} {needed} or later")
    return None


def triton_on_unsupported_reason(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device, or None."""
    if device.type != "cuda" and not interpreted():
        return needs("an NVIDIA or AMD GPU", device)
    return triton_unsupported_reason()


def block_scaled_unsupported_reason(device: torch.device) -> str | None:
    """Why Triton has no block-scaled matrix instructions for a device, or None."""
    version = capability(device)
    if amd_architecture(device) != "gfx950":
        if (version or (0, 0)) < (10, 0):
            return needs("block-scaled tensor cores (Blackwell, gfx950)", device)
        if version not in BLOCK_SCALED:
            return f"was never compiled for compute capability {version[0]}.{version[1]}"
    reason = triton_unsupported_reason()
    oldest = BLOCK_SCALED.get(version, OLDEST)
    if reason is not None or oldest == OLDEST:
        return reason
    return _older_triton_reason(oldest, "for this card")


def descriptors_unsupported_reason(device: torch.device) -> str | None:
    """Why Triton kernels that read by tensor descriptors on Hopper cannot run there, or None."""
    reason = triton_unsupported_reason()
    if reason is not None or (capability(device) or (0, 0))[0] != 9:
        return reason
    return _older_triton_reason(DESCRIPTORS, "on Hopper")


def _older_triton_reason(needed: tuple[int, int], what_for: str) -> str | None:
    """That the Triton here is older than needed, or None."""
    import triton

    if _version(triton) < needed:
        wanted = f"Triton {'.'.join(map(str, needed))} {what_for}"
        return InstallReason(f"needs {wanted}; this is {triton.__version__}", "Triton", wanted)
    return None


def int8_tensor_cores_unsupported_reason(device: torch.device) -> str | None:
    """Why an NVIDIA GPU has no INT8 tensor cores, or None."""
    if (capability(device) or (0, 0)) < (7, 5):
        card = "INT8 tensor cores: NVIDIA compute capability 7.5 (RTX 20) or later"
        return needs(card, device)
    if capability(device) == (7, 5) and _NO_TENSOR_CORES.search(card_name(device)):
        return DeviceReason(f"needs INT8 tensor cores; {card_name(device)} has none")
    return None


def _version(module) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def machine() -> str:
    """The versions and devices that kernels run on here, in a line."""
    parts = [f"torch {torch.__version__}"]
    if triton_unsupported_reason() is None:
        import triton

        parts.append(f"Triton {triton.__version__}")
    if not torch.cuda.is_available():
        return ", ".join([*parts, "no CUDA device"])
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        version = f"compute capability {card.major}.{card.minor}"
        parts.append(f"{card.name} ({version}, {card.total_memory / 1e9:.0f} GB)")
    return ", ".join(parts)


def capturing() -> bool:
    """Whether a CUDA graph is being captured, during which results cannot be read back."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU (for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def card_name(device: torch.device) -> str:
    """As its driver calls a GPU."""
    return torch.cuda.get_device_name(device)


@cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU, None for any other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


class DeviceReason(str):
    """Why a backend does not run here that only another device would change."""


class InstallReason(str):
    """Why a backend does not run here that installing something would change.

    Attributes:
        package: whose package: "Triton", "torch", "comfy-kitchen", "CuTe DSL".
        install: what to install, in words.
        pip: what pip calls it, if nothing of it is there; else None.
    """

    package: str
    install: str
    pip: str | None

    def __new__(cls, reason: str, package: str, install: str, pip: str | None = None):
        self = super().__new__(cls, reason)
        self.package, self.install, self.pip = package, install, pip
        return self

    def __getnewargs__(self):  # for copies
        return str(self), self.package, self.install, self.pip


class NamedReason(str):
    """Why a backend that runs here is not chosen unless it is named."""


def needs(what: str, device: torch.device) -> DeviceReason:
    """That a backend needs what a device is not or has not."""
    return lacks(f"needs {what}", device)


def lacks(sentence: str, device: torch.device) -> DeviceReason:
    """A sentence on what does not run on a device, ended by what that is."""
    version = capability(device)
    if version:
        return DeviceReason(f"{sentence}; this one has {version[0]}.{version[1]}")
    return DeviceReason(f"{sentence}; this is {amd_architecture(device) or device.type}")


@cache
def amd_architecture(device: torch.device) -> str | None:
    """The architecture of an AMD GPU ("gfx950"), None for any other device."""
    if device.type != "cuda" or torch.version.hip is None:
        return None
    return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU has matrix instructions for a 16-bit dtype, as oneDNN reports it."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return False


def has_float8(device: torch.device) -> bool:
    """Whether torch can hold float8 tensors on a device: not on Apple's GPUs (torch 2.14)."""
    return device.type != "mps"


def architecture(device: torch.device) -> int | str:
    """What kernels are compiled for: compute capability times 10, an AMD architecture, else 0."""
    major, minor = capability(device) or (0, 0)
    return amd_architecture(device) or major * 10 + minor


def hardware_e4m3(device: torch.device) -> bool:
    """Whether the device has instructions that convert E4M3: NVIDIA from Ada (sm_89) on."""
    return (capability(device) or (0, 0)) >= (8, 9)


def on_device(tensor: torch.Tensor):
    """A context in which kernels launch on a tensor's device."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
