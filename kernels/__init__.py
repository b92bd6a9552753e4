"""MXFP8 kernels: quantize, dequantize and multiply, on whatever the machine has.

    qdata, scale = kernels.quantize(weight)            # E4M3 codes, E8M0 scales in tiled order
    y = kernels.linear(x, qdata, scale, bias)          # any rank of x, any device
    print(*kernels.list_backends(), sep="\n")          # what runs here, and why the rest does not

This room stands alone: it imports torch and nothing else of this package. Names resolve on first
use, so that reading a file's header costs no torch import.
"""

from importlib import import_module

_HOME = {
    "ExecutionPath": "dispatch",
    "quantize": "ops",
    "dequantize": "ops",
    "linear": "ops",
    "to_rowwise": "ops",
    "input_form": "ops",
    "quantize_input": "ops",
    "signal_and_noise": "sqnr",
    "rowwise_error_bound": "sqnr",
    "quantize_and_measure": "sqnr",
    "list_backends": "dispatch",
    "describe_paths": "dispatch",
    "execution_path": "dispatch",
    "machine": "device_facts",
    "use_backend": "dispatch",
}

__all__ = [
    "ExecutionPath",
    "dequantize",
    "describe_paths",
    "execution_path",
    "input_form",
    "linear",
    "list_backends",
    "machine",
    "quantize",
    "quantize_and_measure",
    "quantize_input",
    "rowwise_error_bound",
    "signal_and_noise",
    "to_rowwise",
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
