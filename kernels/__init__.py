"""MXFP8 kernels: quantise, dequantise and multiply, on whatever the machine has.

    qdata, scale = kernels.quantize(weight)            # E4M3 codes, E8M0 scales in tiled order
    y = kernels.linear(x, qdata, scale, bias)          # any rank of x, any device
    for status in kernels.list_backends(): print(status)    # what would run here, and why not the rest

This room stands alone: it imports torch and nothing else of this package. Names resolve on first
use, so that reading a file's header costs no torch import.
"""

from importlib import import_module

_HOME = {
    "Choice": "dispatch",
    "quantize": "ops",
    "dequantize": "ops",
    "linear": "ops",
    "fold_rows": "ops",
    "steps_here": "ops",
    "quantize_activations": "ops",
    "block_energy": "sqnr",
    "fold_bound": "sqnr",
    "quantize_measured": "sqnr",
    "list_backends": "dispatch",
    "choices": "dispatch",
    "explain": "dispatch",
    "machine": "device_facts",
    "use_backend": "dispatch",
}

__all__ = [
    "Choice",
    "block_energy",
    "choices",
    "dequantize",
    "explain",
    "fold_bound",
    "fold_rows",
    "linear",
    "list_backends",
    "machine",
    "quantize",
    "quantize_activations",
    "quantize_measured",
    "steps_here",
    "use_backend",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
