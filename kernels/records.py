"""What there is to run: every backend, and the steps around its matmul.

A linear takes three steps: the weight is prepared, the input is quantized, the two are multiplied.
A backend is a record of a matmul with the forms of weight and input that it takes, and of who can
make them. Forms have names, so that they can be shared: siblings share a quantized input, and a
caller that keeps a prepared weight can hand it to any backend of its form.

    weight form     tensors
    "stored"        codes [N', K'] and tiled scales, as in the file
    "rowwise_fp8"   float8_e4m3fn [N', K'] and float32 [N'] (`fp8_rowwise`)
    "rowwise_fnuz"  float8_e4m3fnuz [N', K'] and float32 [N'] (MI300)
    "rotated_int8"  int8 [N', K'] and float32 [N'] (`int8`)
    "bf16"          bfloat16 [N', K']

    input form      tensors
    None            x [M, K] itself: exact backends, and those that quantize it inside their matmul
    "mxfp8"         codes [M', K'] and tiled scales, M' and K' rounded up to 32
    "rowwise_fp8"   float8_e4m3fn [M, K'] and float32 [M]
    "rowwise_fnuz"  float8_e4m3fnuz [M, K'] and float32 [M]
    "rotated_int8"  int8 [M, K] and float32 [M]

Nothing is chosen here: `dispatch` does that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module

import torch

from . import device_facts, self_test
from .backends import eager, fp8_rowwise, int8, kitchen, reference, torch_mx
from .backends.cute import mx

Tensors = tuple[torch.Tensor, ...]
FEW_ROWS = 64  # up to this many rows of x the weight's bytes decide
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # dtypes of x
PREPARE = ("never", "each call", "once")  # of `Problem`
M_CLASSES = ("one", "few", "many")  # 1 row of x, up to FEW_ROWS, more


def m_class(rows: int | None) -> str:
    """The class of M of an input with this many rows; None is many."""
    if rows is None or rows > FEW_ROWS:
        return "many"
    return "one" if rows == 1 else "few"


@dataclass(frozen=True)
class Problem:
    """A linear to find a backend for.

    Attributes:
        dtype: of x.
        precision: as asked for, "auto", "exact" or "fast".
        m_class: of `M_CLASSES`.
        shape: (N, K), unpadded; None if any.
        weight_form: of the weight at hand.
        prepare: of `PREPARE`, whether a weight that is at hand as stored may be prepared: "never";
            "each call", where one pass does it; "once", by a caller that keeps the result.
    """

    device: torch.device
    dtype: torch.dtype
    precision: str = "exact"
    m_class: str = "many"
    shape: tuple[int, int] | None = None
    weight_form: str = "stored"
    prepare: str = "never"


Reason = Callable[[Problem], "str | None"]


def _no_reason(problem: Problem) -> None:
    return None


@dataclass(frozen=True)
class Step:
    """One way to bring a weight or an input into a form.

    Attributes:
        run: (qdata, scale) or (x [M, K]) -> the form's tensors.
        one_pass: whether it reads its argument once; those in plain torch do not.
        test: (device, dtype) -> what is wrong with it there, or None; run once (`self_test`).
    """

    name: str
    run: Callable[..., Tensors]
    unsupported_reason: Reason = _no_reason
    one_pass: bool = True
    test: self_test.Test | None = None


@dataclass(frozen=True)
class Backend:
    """One way to multiply.

    Attributes:
        precision: "exact" or "fast" (with quantized inputs).
        matmul: (input's tensors, weight's tensors, bias, dtype, N) -> [M or more, N].
        preparers: who makes the weight form, in order of preference; none for "stored".
        quantizers: who makes the input form; none for None.
        m_classes: that it is for, if the weight is at hand as stored. A form that was prepared is
            multiplied whatever M is.
        automatic: whether it may be chosen without being named.
        test: as in `Step`.
    """

    name: str
    summary: str
    precision: str
    matmul: Callable[..., torch.Tensor]
    weight_form: str = "stored"
    input_form: str | None = None
    preparers: tuple[Step, ...] = ()
    quantizers: tuple[Step, ...] = ()
    m_classes: tuple[str, ...] = M_CLASSES
    unsupported_reason: Reason = _no_reason
    automatic: bool = True
    test: self_test.Test | None = None


def _triton(module: str, name: str) -> Callable:
    """A function of a Triton module, which is imported on first call because Triton is optional."""

    @cache  # `import_module` takes 1 us of every call
    def imported():
        return import_module(f".backends.triton.{module}", __package__)

    return lambda *args: getattr(imported(), name)(*args)


def _triton_unsupported_reason(problem: Problem) -> str | None:
    return device_facts.triton_on_unsupported_reason(problem.device)


def _w8a16_unsupported_reason(problem: Problem) -> str | None:
    if problem.m_class == "few":
        if problem.dtype == torch.float32:
            return "its matrix instructions would round float32"
        if (device_facts.capability(problem.device) or (8, 0)) < (8, 0):
            return "Triton knows no matrix instructions before Ampere's (sm_80)"
    return _triton_unsupported_reason(problem)


def _triton_mx_unsupported_reason(problem: Problem) -> str | None:
    return device_facts.block_scaled_unsupported_reason(problem.device)


_to_mxfp8 = _triton("cast", "quantize")
_to_rowwise, _x_rowwise = _triton("rowwise", "to_rowwise"), _triton("rowwise", "quantize_rowwise")
_to_fnuz = _triton("rowwise", "to_rowwise_fnuz")
_x_fnuz = _triton("rowwise", "quantize_rowwise_fnuz")
_to_int8, _x_int8 = _triton("int8", "prepare_weight"), _triton("int8", "quantize_input")

# In order of preference.
QUANTIZERS = (
    Step("triton", _to_mxfp8, _triton_unsupported_reason, test=self_test.quantizer(_to_mxfp8)),
    Step("eager", eager.quantize, one_pass=False),
)
DEQUANTIZERS = (
    Step(
        "triton",
        _triton("cast", "dequantize"),
        _triton_unsupported_reason,
        test=self_test.dequantizer(_triton("cast", "dequantize")),
    ),
    Step("eager", eager.dequantize, one_pass=False),
)
_TO_MXFP8 = (
    QUANTIZERS[0],
    Step(
        "kitchen",
        kitchen.quantize_mxfp8,
        kitchen.quantize_mxfp8_unsupported_reason,
        test=self_test.quantizer(kitchen.quantize_mxfp8, tiny=False),
    ),
    QUANTIZERS[1],
)
_WEIGHT_TO_ROWWISE = (
    Step(
        "triton",
        _to_rowwise,
        _triton_unsupported_reason,
        test=self_test.preparer(_to_rowwise, reference.to_rowwise),
    ),
    Step("torch", fp8_rowwise.to_rowwise, one_pass=False),
)
_INPUT_TO_ROWWISE = (
    Step(
        "triton",
        _x_rowwise,
        fp8_rowwise.quantize_by_triton_unsupported_reason,
        test=self_test.rowwise_quantizer(_x_rowwise, reference.quantize_rowwise),
    ),
    Step("torch", fp8_rowwise.quantize_rowwise, one_pass=False),
)
_WEIGHT_TO_FNUZ = (
    Step(
        "triton",
        _to_fnuz,
        _triton_unsupported_reason,
        test=self_test.preparer(_to_fnuz, reference.to_rowwise_fnuz),
    ),
)
_INPUT_TO_FNUZ = (
    Step(
        "triton",
        _x_fnuz,
        fp8_rowwise.quantize_by_triton_unsupported_reason,
        test=self_test.rowwise_quantizer(_x_fnuz, reference.quantize_rowwise_fnuz),
    ),
)
_WEIGHT_TO_INT8 = (
    Step(
        "triton",
        _to_int8,
        int8.one_pass_unsupported_reason,
        test=self_test.int8_preparer(_to_int8),
    ),
    Step(
        "kitchen",
        kitchen.prepare_weight,
        kitchen.unsupported_reason,
        one_pass=False,
        test=self_test.int8_preparer(kitchen.prepare_weight),
    ),
    Step("torch", int8.prepare_weight, one_pass=False),
)
_INPUT_TO_INT8 = (
    Step(
        "triton",
        _x_int8,
        int8.one_pass_unsupported_reason,
        test=self_test.int8_quantizer(_x_int8),
    ),
    Step("torch", int8.quantize_input, one_pass=False),
)


def _block_scaled(name: str, summary: str, kernel: Callable, unsupported_reason: Reason, **options):
    def matmul(quantized, prepared, bias, dtype, N):
        # The rows that pad x are multiplied too: at most 31, and slicing them off copies nothing.
        return kernel(quantized, prepared, bias, dtype, quantized[0].shape[0], N)

    return Backend(
        name, summary, "fast", matmul, input_form="mxfp8", quantizers=_TO_MXFP8,
        unsupported_reason=unsupported_reason, m_classes=("many",),
        test=self_test.matmul(matmul, "stored", "mxfp8"), **options,
    )  # fmt: skip


def _rowwise_fp8(name: str, summary: str, matmul: Callable, unsupported_reason: Reason):
    return Backend(
        name, summary, "fast", matmul, "rowwise_fp8", "rowwise_fp8", _WEIGHT_TO_ROWWISE,
        _INPUT_TO_ROWWISE, ("many",), unsupported_reason,
        test=self_test.matmul(matmul, "rowwise_fp8", "rowwise_fp8"),
    )  # fmt: skip


def _int8(name: str, summary: str, matmul: Callable, unsupported_reason: Reason, **options):
    return Backend(
        name, summary, "fast", matmul, "rotated_int8", "rotated_int8", _WEIGHT_TO_INT8,
        _INPUT_TO_INT8, unsupported_reason=unsupported_reason,
        test=self_test.matmul(matmul, "rotated_int8", "rotated_int8"), **options,
    )  # fmt: skip


def _oracle(
    name: str, weight_form: str, input_form: str | None, prepare=None, quantize=None, **options
):
    return Backend(
        name,
        f"the oracle in float64: weights {weight_form}, inputs {input_form or 'as they are'}",
        "exact" if input_form is None else "fast",
        partial(reference.matmul, weight_form, input_form),
        weight_form,
        input_form,
        () if prepare is None else (Step("reference", prepare),),
        () if quantize is None else (Step("reference", quantize),),
        automatic=False,
        **options,
    )


# In order of preference; `dispatch` says where another order holds.
BACKENDS: tuple[Backend, ...] = (
    _block_scaled(
        "torch_mx",
        "block-scaled tensor cores (Blackwell) by cuBLASLt, inputs in MXFP8",
        torch_mx.matmul,
        torch_mx.unsupported_reason,
    ),
    Backend(
        "kitchen_int8",
        "INT8 tensor cores by comfy-kitchen's compiled kernels, weights and inputs rotated",
        "fast",
        kitchen.matmul,
        "rotated_int8",
        preparers=_WEIGHT_TO_INT8,
        m_classes=("many",),
        unsupported_reason=kitchen.unsupported_reason,
        test=self_test.matmul(kitchen.matmul, "rotated_int8", "rotated_int8", takes_x=True),
    ),
    _int8(
        "triton_int8",
        "INT8 tensor cores (RTX 30, RX 7000, MI300) by Triton, weights and inputs rotated",
        _triton("int8", "matmul"),
        int8.triton_unsupported_reason,
        m_classes=("many",),
    ),
    _rowwise_fp8(
        "torch_fp8",
        "FP8 tensor cores (Hopper, Ada) by torch, a scale per row of weights and inputs",
        fp8_rowwise.matmul_by_torch,
        fp8_rowwise.torch_unsupported_reason,
    ),
    _rowwise_fp8(
        "triton_fp8",
        "FP8 tensor cores (Ada and later) by Triton, a scale per row of weights and inputs",
        fp8_rowwise.matmul_by_triton,
        fp8_rowwise.triton_unsupported_reason,
    ),
    Backend(
        "triton_fnuz",
        "FP8 tensor cores (MI300) by Triton, in E4M3fnuz with a scale per row",
        "fast",
        fp8_rowwise.matmul_by_triton,
        "rowwise_fnuz",
        "rowwise_fnuz",
        _WEIGHT_TO_FNUZ,
        _INPUT_TO_FNUZ,
        ("many",),
        fp8_rowwise.fnuz_unsupported_reason,
        test=self_test.matmul(fp8_rowwise.matmul_by_triton, "rowwise_fnuz", "rowwise_fnuz"),
    ),
    _int8(
        "torch_int8",
        "INT8 tensor cores (RTX 20 and later) by torch, its sums scaled by Triton",
        _triton("int8", "matmul_by_torch"),
        int8.torch_unsupported_reason,
        m_classes=("many",),
    ),
    Backend(
        "int8_one_row",
        "one row on CPUs with VNNI or AMX: rotated INT8 weights, inputs as they are",
        "fast",
        int8.matmul_one_row,
        "rotated_int8",
        preparers=_WEIGHT_TO_INT8,
        m_classes=("one",),
        unsupported_reason=int8.one_row_unsupported_reason,
        test=self_test.rotating(int8.matmul_one_row),
    ),
    _int8(
        "int8",
        "INT8 in plain torch: CPUs with VNNI or AMX, weights and inputs rotated",
        int8.matmul,
        int8.unsupported_reason,
    ),
    Backend(
        "triton_w8a16",
        "few rows: weights decoded in registers by Triton",
        "exact",
        _triton("exact", "decoding"),
        m_classes=("one", "few"),
        unsupported_reason=_w8a16_unsupported_reason,
        test=self_test.exact(_triton("exact", "decoding"), rows=(1, 5, 20, 40)),
    ),
    Backend(
        "triton",
        "weights unpacked by Triton on each call, multiplied by cuBLAS",
        "exact",
        _triton("exact", "unpacking"),
        unsupported_reason=_triton_unsupported_reason,
        test=self_test.exact(_triton("exact", "unpacking"), rows=(70,)),
    ),
    Backend(
        "torch_bf16",
        "CPUs with 16-bit matrix instructions: weights unpacked once",
        "exact",
        eager.matmul_bf16,
        "bf16",
        preparers=(Step("torch", eager.prepare_bf16, one_pass=False),),
        unsupported_reason=eager.bf16_unsupported_reason,
    ),
    Backend("eager", "plain torch on any device, weights unpacked on each call", "exact",
            eager.matmul),
    _block_scaled(
        "triton_mx",
        "block-scaled tensor cores (Blackwell, gfx950) by Triton, inputs in MXFP8",
        _triton("mx", "matmul"),
        _triton_mx_unsupported_reason,
        automatic=False,
    ),
    _block_scaled(
        "cute_mx",
        "block-scaled tensor cores (Blackwell) by CuTe DSL, not yet run on a GPU",
        mx.matmul,
        mx.unsupported_reason,
        automatic=False,
    ),
    _oracle("reference", "stored", None),
    _oracle("reference_mx", "stored", "mxfp8", quantize=reference.quantize),
    _oracle("reference_fp8", "rowwise_fp8", "rowwise_fp8", reference.to_rowwise,
            reference.quantize_rowwise),
    _oracle("reference_int8", "rotated_int8", "rotated_int8", reference.to_rotated_int8,
            reference.quantize_rotated_int8,
            unsupported_reason=int8.groups_unsupported_reason),
)  # fmt: skip
