"""MXFP8 kernels: quantize, dequantize and multiply, on whatever the machine has.

    qdata, scale = kernels.quantize(weight)            # E4M3 codes, E8M0 scales in tiled order
    y = kernels.linear(x, qdata, scale, bias)          # any rank of x, any device
    print(*kernels.list_backends(), sep="\n")          # what runs here, and why the rest does not

This room stands alone: it imports torch and nothing else of this package. Names resolve on first
use, so that reading a file's header does not import torch.
"""

from importlib import import_module

_MODULES = {
    "device_facts": ("DeviceReason", "has_float8", "machine"),
    "dispatch": (
        "ExecutionPath", "describe_paths", "execution_path", "list_backends", "try_shape",
        "use_backend",
    ),
    "ops": (
        "dequantize", "linear", "linear_prepared", "prepare_weight", "quantize", "quantize_input",
    ),
    "records": ("FEW_ROWS",),
    "sqnr": ("quantize_and_measure", "signal_and_noise", "weight_change"),
}  # fmt: skip
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
