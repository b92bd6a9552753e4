"""The methods of computing a linear that are compared: dense BF16, stock ComfyUI's, and ours.

Ours are those of `records.BACKENDS` that run here, each named to `use_backend`. Stock's run
comfy-kitchen's tensors as ComfyUI does: MXFP8, and INT8 with rotation made from the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import linear

from mxfp8 import kernels
from mxfp8.kernels.backends import eager, reference, torch_mx
from mxfp8.kernels.dispatch import named
from mxfp8.kernels.records import BACKENDS, Backend, Problem, m_class

try:
    import comfy_kitchen
    from comfy_kitchen.tensor import QuantizedTensor, TensorCoreMXFP8Layout

    NO_STOCK = None
    # As ComfyUI does when it starts.
    comfy_kitchen.registry.disable("triton")
    if int((torch.version.cuda or "0").partition(".")[0]) < 13:
        comfy_kitchen.registry.disable("cuda")
except (ImportError, OSError, RuntimeError) as _error:
    NO_STOCK = f"needs comfy-kitchen ({_error}): pip install comfy-kitchen"

_ORACLES = ("reference_mx", "reference_fp8", "reference_int8")  # run on a CPU, to try the script


@dataclass(frozen=True)
class Method:
    """One method: `run(x, stored, bias)` multiplies what `store(weight)` made.

    Attributes:
        form: of what is stored. Methods of the same form share it (`Weight`).
        precision: "exact" or "fast"; None for dense BF16.
        backend, path: of ours.
        chosen: whether it is what runs here unless another backend is named; None for rivals.
    """

    name: str
    form: str
    store: Callable
    run: Callable
    precision: str | None = None
    backend: Backend | None = None
    path: kernels.ExecutionPath | None = None
    chosen: bool | None = None

    @property
    def cached(self) -> bool | None:
        """True if the prepared weight is kept; None where there is none."""
        return True if self.path is not None and self.form != "stored" else None


class Weight:
    """A weight [N, K] in every form that is asked for, each made once."""

    def __init__(self, plain: torch.Tensor):
        self.plain = plain
        self._forms: dict[str, object] = {}

    @cached_property
    def codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        return kernels.quantize(self.plain)

    def form(self, method: Method):
        if method.form not in self._forms:
            self._forms[method.form] = method.store(self)
        return self._forms[method.form]


def rivals(device: torch.device) -> list[Method]:
    methods = [Method("bf16", "plain", lambda weight: weight.plain, linear)]
    if NO_STOCK is None:
        multiplies = torch_mx.unsupported_reason(Problem(device, torch.bfloat16, "fast")) is None
        run, precision = (_stock_fast, "fast") if multiplies else (_stock_exact, "exact")
        methods += [
            Method("stock", "stock", _stock_tensor, run, precision),
            Method("stock_int8", "stock_int8", _stock_int8_tensor, linear, "fast"),
        ]
    return methods


def _stock_tensor(weight: Weight):
    (qdata, scale), plain = weight.codes, weight.plain
    layout = TensorCoreMXFP8Layout.Params(
        scale=scale.view(torch.float8_e8m0fnu), orig_dtype=plain.dtype, orig_shape=plain.shape
    )
    return QuantizedTensor(qdata, "TensorCoreMXFP8Layout", layout)


def _stock_exact(x, stored, bias):
    """Stock where torch multiplies no MXFP8: the weight is unpacked on every call."""
    return linear(x, stored.dequantize(), bias)


def _stock_fast(x, stored, bias):
    """Stock from Blackwell on: x is quantized for every linear."""
    flat = QuantizedTensor.from_float(x.reshape(-1, x.shape[-1]), "TensorCoreMXFP8Layout")
    return linear(flat, stored, bias).reshape(*x.shape[:-1], -1)


def _stock_int8_tensor(weight: Weight):
    return QuantizedTensor.from_float(
        weight.plain, "TensorWiseINT8Layout", per_channel=True, is_weight=True, convrot=True,
        convrot_groupsize=reference.group(weight.plain.shape[1]),
    )  # fmt: skip


def ours(
    device: torch.device, rows: int, shape: tuple[int, int] | None = None
) -> tuple[list[Method], dict[str, str]]:
    """(our methods for a linear, backend -> why it does not run), in order of preference."""
    methods, reasons = [], {}
    for backend in BACKENDS:
        if backend.name.startswith("reference"):
            if device.type == "cuda" or backend.name not in _ORACLES:
                continue
        elif backend.weight_form == "stored" and m_class(rows) not in backend.m_classes:
            continue
        try:
            path = path_of(device, backend.precision, rows, shape, backend.name)
        except ValueError as error:
            reasons[backend.name] = str(error).partition(f" {backend.name}: ")[2] or str(error)
            continue
        chosen = path_of(device, backend.precision, rows, shape).backend == backend.name
        methods.append(_ours(backend, path, chosen))
    return methods, reasons


def path_of(
    device: torch.device, precision: str, rows: int, shape=None, *names: str
) -> kernels.ExecutionPath:
    """How a linear runs whose weight is prepared once: by these backends, or as it is chosen."""
    if not names:
        return kernels.execution_path(
            device, torch.bfloat16, precision, rows, shape, prepare="once"
        )
    with kernels.use_backend(*names):
        return path_of(device, precision, rows, shape)


def _ours(backend: Backend, path: kernels.ExecutionPath, chosen: bool) -> Method:
    def store(weight: Weight):
        return kernels.prepare_weight(path, *weight.codes)

    def run(x, prepared, bias, quantized=None):
        N = prepared[0].shape[0] if bias is None else bias.shape[0]
        return kernels.linear_prepared(path, x, prepared, bias, N, quantized)

    return Method(
        backend.name, path.weight_form, store, run, backend.precision, backend, path, chosen
    )


def the_chosen(device: torch.device, rows: int, shape=None) -> dict[str, Method]:
    """Precision -> our method that is chosen here; "fast" only if there is one."""
    found = {}
    for precision in ("exact", "fast"):
        path = path_of(device, precision, rows, shape)
        if path.precision == precision:
            found[precision] = _ours(named(path.backend), path, True)
    return found


def exact_weight(qdata, scale) -> torch.Tensor:
    """The stored weight in float64, by plain torch: independent of what is measured."""
    return eager.dequantize(qdata, scale, torch.float32, *qdata.shape).double()


def relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    out, expected = out.double(), expected.double()
    return float((out - expected).norm() / expected.norm())
