"""Which path a linear takes on every kind of machine, and that it costs no more than stock's there.

One row per machine: M = 4096 unless it says less, N = K = 3840, BF16, the weight prepared when it
was loaded. None of the cards is present. Torch and comfy-kitchen's registry are told about them
(`mocked_card`), self-tests pass, and the code of a path runs on tensors without data, which counts
its launches and the bytes that they read and write. A compiled kernel counts as one launch of its
operands. Stock's path is comfy-kitchen's own functions for MXFP8, as its registry would choose them
there.

On CPUs a launch costs nothing, and chunks are there to stay in the cache: `bench/cpu.py` measures
the time. On MPS stock does not run: torch has no float8 there.
"""

from __future__ import annotations

from dataclasses import dataclass

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.backends.eager import quantization as stock_eager
from launches import Launches
from mocked_card import Card, describe, forget, install
from torch._subclasses import FakeTensorMode

from mxfp8.kernels import device_facts, dispatch, layout
from mxfp8.kernels.backends import eager, int8
from mxfp8.kernels.dispatch import execution_path, named

N, K = 3840, 3840
NO_TRITON = "needs Triton: pip install triton"
CAPABILITIES = {  # of cards, and bytes of shared memory that a block may have
    "GTX 1660": ((7, 5), 65536), "RX 6800": ("gfx1030", 65536),
    "RTX 2060": ((7, 5), 65536), "RTX 3060": ((8, 6), 101376), "RTX 3090": ((8, 6), 101376),
    "RTX 4090": ((8, 9), 101376), "RTX 5090": ((12, 0), 101376), "A100": ((8, 0), 166912),
    "H100": ((9, 0), 232448), "B200": ((10, 0), 232448), "MI300X": ("gfx942", 65536),
    "RX 7900 XTX": ("gfx1100", 65536), "RX 9070 XT": ("gfx1201", 65536),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A machine, and what it does.

    Attributes:
        machine: a card of `CAPABILITIES`, then what it has: Triton, comfy-kitchen's CUDA or HIP
            kernels, cu128 (a torch for CUDA 12.8, with which ComfyUI disables them), Windows.
        fast: the backend for "fast" and "auto", and who quantizes its input in an op of its own.
        launches: of ours and of stock's.
        rows: of x.
    """

    machine: str
    fast: str
    launches: tuple[int, int]
    rows: int = 4096

    def __str__(self) -> str:
        return self.machine if self.rows == 4096 else f"{self.machine}, {self.rows} rows"

    @property
    def card(self) -> Card:
        name, _, _ = self.machine.partition(",")
        version, shared = CAPABILITIES[name]
        torch_for = (
            "12.8" if "cu128" in self.machine else "7.0" if name[:2] in ("MI", "RX") else "13.0"
        )
        return Card(name, version, torch_for, shared)

    @property
    def triton(self) -> bool:
        return "Triton" in self.machine


INT8, MX, FP8 = "kitchen_int8", "torch_mx", "torch_fp8"
BY_TRITON = "triton_int8 by triton"
ROWS = [
    # Turing: two launches multiply, into int32 and out of it. GTX cards have no tensor cores.
    Row("RTX 2060, Triton, kitchen", INT8, (3, 11)),
    Row("RTX 2060, Triton", "torch_int8 by triton", (3, 11)),
    Row("GTX 1660, Triton", "triton", (2, 11)),
    Row("RTX 2060, kitchen", INT8, (3, 11)),
    Row("RTX 2060", "eager", (5, 11)),
    Row("RTX 3060, Triton, kitchen", INT8, (2, 11)),
    Row("RTX 3060, Triton", BY_TRITON, (2, 11)),
    Row("RTX 3060, kitchen", INT8, (2, 11)),
    Row("RTX 3060", "eager", (5, 11)),
    Row("RTX 3090, Triton, kitchen", INT8, (2, 11)),
    Row("RTX 3090, Triton", BY_TRITON, (2, 11)),
    Row("RTX 3090, kitchen", INT8, (2, 11)),
    Row("RTX 3090", "eager", (5, 11)),
    Row("RTX 4090, Triton, kitchen", INT8, (2, 11)),
    Row("RTX 4090, Triton", BY_TRITON, (2, 11)),
    Row("RTX 4090, kitchen", INT8, (2, 11)),
    Row("RTX 4090", "eager", (5, 11)),
    Row("RTX 4090, Windows, Triton", BY_TRITON, (2, 11)),
    Row("RTX 4090, Windows, kitchen", INT8, (2, 11)),
    Row("RTX 4090, Windows, cu128", "eager", (5, 11)),
    Row("RTX 5090, Triton, kitchen", f"{MX} by triton", (2, 3)),
    Row("RTX 5090, Triton", f"{MX} by triton", (2, 30)),
    Row("RTX 5090, kitchen", f"{MX} by kitchen", (3, 3)),
    Row("RTX 5090", "eager", (5, 30)),
    Row("RTX 5090, Windows, kitchen", f"{MX} by kitchen", (3, 3)),
    Row("RTX 5090, Windows, cu128", "eager", (5, 30)),
    Row("A100, Triton, cu128", BY_TRITON, (2, 11)),
    Row("A100, Triton, kitchen", INT8, (2, 11)),
    Row("A100, cu128", "eager", (5, 11)),
    Row("H100, Triton, kitchen", f"{FP8} by triton", (2, 11)),
    Row("H100, Triton, cu128", f"{FP8} by triton", (2, 11)),
    Row("H100, kitchen", INT8, (2, 11)),
    # Few rows, for which plain torch would unpack the weight. Without kitchen's kernels the layer
    # is left to stock (`nodes/runtime/forward.py`).
    Row("RTX 5090, kitchen", f"{MX} by kitchen", (3, 3), rows=64),
    Row("RTX 5090, kitchen", f"{MX} by kitchen", (3, 3), rows=1),
    Row("RTX 5090, Windows, kitchen", f"{MX} by kitchen", (3, 3), rows=64),
    Row("B200, kitchen", f"{MX} by kitchen", (3, 3), rows=64),
    Row("B200, Triton, kitchen", f"{MX} by triton", (2, 3)),
    Row("B200, kitchen", f"{MX} by kitchen", (3, 3)),
    Row("MI300X, Triton", BY_TRITON, (2, 11)),
    Row("MI300X", "eager", (5, 11)),
    Row("RX 6800, Triton, kitchen", "triton", (2, 11)),
    Row("RX 7900 XTX, Triton, kitchen", INT8, (2, 11)),
    Row("RX 7900 XTX, kitchen", INT8, (2, 11)),
    Row("RX 7900 XTX, Triton", BY_TRITON, (2, 11)),
    Row("RX 9070 XT, Triton", BY_TRITON, (2, 11)),
    Row("RX 9070 XT, Triton, kitchen", INT8, (2, 11)),
    Row("RX 9070 XT, kitchen", INT8, (2, 11)),
]
FORMS = {  # backend -> precision, weight form, input form
    INT8: ("fast", "rotated_int8", None),
    "triton_int8": ("fast", "rotated_int8", "rotated_int8"),
    "torch_int8": ("fast", "rotated_int8", "rotated_int8"),
    "int8": ("fast", "rotated_int8", "rotated_int8"),
    MX: ("fast", "stored", "mxfp8"),
    FP8: ("fast", "rowwise_fp8", "rowwise_fp8"),
    "triton_fp8": ("fast", "rowwise_fp8", "rowwise_fp8"),
    "torch_bf16": ("exact", "bf16", None),
    "triton": ("exact", "stored", None),
    "eager": ("exact", "stored", None),
}


@pytest.fixture
def standing_on(monkeypatch):
    """standing_on(row): the card, Triton and comfy-kitchen of a row; returns the device."""

    def stand(row):
        install(row.card, monkeypatch, kitchen="kitchen" in row.machine or "cu128" in row.machine)
        platform = "win32" if "Windows" in row.machine else "linux"
        triton = None if row.triton else NO_TRITON
        describe(row.card.version, monkeypatch, triton, platform=platform, name=row.card.name)
        return row.card.device

    yield stand
    monkeypatch.undo()
    dispatch.forget()
    forget()


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_path_of_a_machine(row, standing_on):
    device = standing_on(row)
    exact = "triton" if row.triton else "eager"
    for precision, expected in (("auto", row.fast), ("fast", row.fast), ("exact", exact)):
        _check_path(device, precision, *expected.partition(" by ")[::2], row.rows)


def _check_path(
    device, precision: str, backend: str, quantizer: str, rows: int | None = None
) -> None:
    path = execution_path(device, torch.bfloat16, precision, rows, (N, K), prepare="once")
    assert path.backend == backend, path.unsupported
    assert (path.precision, path.weight_form, path.input_form) == FORMS[backend]
    assert path.quantizer == (quantizer or None)
    # The forward asks with the weight in that form at hand.
    later = execution_path(
        device, torch.bfloat16, precision, rows, (N, K), weight_form=path.weight_form
    )
    assert (later.backend, later.quantizer) == (path.backend, path.quantizer)


@pytest.mark.parametrize("precision", ["auto", "fast", "exact"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_no_machine_does_more_than_stock(row, precision, standing_on, monkeypatch):
    device = standing_on(row)
    path = execution_path(device, torch.bfloat16, precision, row.rows, (N, K), prepare="once")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # else it is initialized
    with FakeTensorMode():
        ours = _cost_of(path, row, monkeypatch)
        stock = _cost_of_stock(row, precision, monkeypatch)
    if precision != "exact":
        assert (len(ours.names), len(stock.names)) == row.launches, (ours.names, stock.names)
    assert len(ours.names) <= len(stock.names), ours.names
    assert ours.bytes <= stock.bytes, (ours.bytes, stock.bytes)


def _empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="cuda:0")


def _operands(row: Row) -> tuple:
    """x, qdata, scale, bias."""
    qdata, scale = _empty(N, K, dtype=torch.float8_e4m3fn), _empty(N, K // 32, dtype=torch.uint8)
    return _empty(row.rows, K), qdata, scale, _empty(N)


def _cost_of(path, row: Row, monkeypatch) -> Launches:
    x, *stored, bias = _operands(row)
    prepared = {
        "stored": tuple(stored),
        "rotated_int8": (_empty(N, K, dtype=torch.int8), _empty(N, dtype=torch.float32)),
        "rowwise_fp8": (stored[0], _empty(N, dtype=torch.float32)),
    }[path.weight_form]
    backend = named(path.backend)
    steps = {step.name: step.run for step in backend.quantizers}
    with Launches() as count:
        _count_compiled(count, row, monkeypatch)
        quantized = (x,) if path.quantizer is None else steps[path.quantizer](x)
        out = backend.matmul(quantized, prepared, bias, x.dtype, N)
    assert (len(quantized[0]), N) == out.shape and out.dtype == x.dtype
    return count


def _cost_of_stock(row: Row, precision: str, monkeypatch) -> Launches:
    x, qdata, scale, bias = _operands(row)
    version = row.card.version
    with Launches() as count:
        _count_compiled(count, row, monkeypatch)
        if not row.card.amd and version >= (10, 0) and precision != "exact":
            compiled = comfy_kitchen.registry.is_available("cuda")
            functions = comfy_kitchen if compiled else stock_eager
            x_q, x_scale = functions.quantize_mxfp8(x, pad_32x=True)
            named(MX).matmul((x_q, x_scale.view(torch.uint8)), (qdata, scale), bias, x.dtype, N)
        else:
            scale = scale.view(torch.float8_e8m0fnu)
            weight = stock_eager.dequantize_mxfp8(qdata, scale, x.dtype)
            torch.nn.functional.linear(x, weight, bias)
    return count


def _count_compiled(count: Launches, row: Row, monkeypatch) -> None:
    """Let kernels that torch's dispatcher does not see count too."""

    def launch(name: str, *tensors) -> None:
        count.names.append(name)
        count.bytes += sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))

    def triton_kernel(kernel, grid):
        return lambda *args, **_: launch(kernel.__name__, *args)

    def int8_linear(x, weight, weight_scale, bias, out_dtype, convrot, convrot_groupsize):
        assert convrot and convrot_groupsize == 256
        M = len(x)
        x_q, x_scale = _empty(M, K, dtype=torch.int8), _empty(M, dtype=torch.float32)
        out, factors = _empty(M, N, dtype=out_dtype), (x_scale, weight_scale, bias)
        launch("quantize", x, x_q, x_scale)
        if row.card.version == (7, 5) and N < 2 * K:  # `_prefer_turing_fused_int8`
            product = _empty(M, N, dtype=torch.int32)
            launch("gemm", x_q, weight, product)
            launch("dequantize", product, *factors, out)
        else:
            launch("gemm", x_q, weight, *factors, out)
        return out

    def quantize_mxfp8(x, pad_32x):
        M = layout.round_up(len(x), 32)
        x_q, x_scale = (
            _empty(M, K, dtype=torch.float8_e4m3fn),
            _empty(layout.round_up(M, 128), K // 32, dtype=torch.uint8),
        )
        launch("zeros", x_scale)
        launch("quantize", x, x_q, x_scale)
        return x_q, x_scale

    monkeypatch.setattr(comfy_kitchen, "int8_linear", int8_linear)
    monkeypatch.setattr(comfy_kitchen, "quantize_mxfp8", quantize_mxfp8)
    if row.triton:
        jit = pytest.importorskip("triton.runtime.jit", reason="needs Triton")
        monkeypatch.setattr(jit.KernelInterface, "__getitem__", triton_kernel)


@pytest.mark.parametrize("whose", ["ours", "stock"])
def test_what_is_counted_without_data_is_what_runs(whose, monkeypatch):
    def count(device):
        qdata = torch.zeros(256, 512, dtype=torch.float8_e4m3fn, device=device)
        scale = torch.zeros(layout.scale_shape(256, 512), dtype=torch.uint8, device=device)
        with Launches() as result:
            if whose == "ours":
                eager.dequantize(qdata, scale, torch.bfloat16, 256, 512)
            else:
                stock_eager.dequantize_mxfp8(qdata, scale.view(torch.float8_e8m0fnu))
        return result.names, result.bytes

    with FakeTensorMode():
        counted = count("cuda")
    monkeypatch.setattr(eager, "_decode_by_bits", eager._decode_by_cast)  # as on a GPU
    assert counted == count("cpu")


# Instructions of the CPU, whether it multiplies BF16 -> backend for auto, fast and exact.
CPUS = {
    "VNNI": (("VNNI",), False, "eager", "int8", "eager"),
    "VNNI and AVX512_BF16": (("VNNI",), True, "torch_bf16", "int8", "torch_bf16"),
    "AMX": (("AMX", "VNNI"), True, "torch_bf16", "int8", "torch_bf16"),
    "AVX2": ((), False, "eager", "eager", "eager"),
}


@pytest.mark.parametrize("cpu", CPUS)
def test_the_path_of_a_cpu(cpu, monkeypatch):
    instructions, bf16, *backends = CPUS[cpu]
    monkeypatch.setattr(int8, "cpu_instructions", lambda: instructions)
    monkeypatch.setattr(device_facts, "cpu_multiplies", lambda dtype: bf16)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    describe(None, monkeypatch)
    for precision, backend in zip(("auto", "fast", "exact"), backends, strict=True):
        quantizer = "torch" if backend == "int8" else ""
        _check_path(torch.device("cpu"), precision, backend, quantizer)
    # In float32, as ComfyUI computes on CPUs, unpacked weights are kept on all of them.
    path = dispatch.execution_path(torch.device("cpu"), torch.float32, "auto", prepare="once")
    assert path.backend == "torch_bf16"
    dispatch.forget()


@pytest.mark.parametrize(("prepare", "backend"), [("once", "triton_int8"), ("each call", "triton")])
def test_int8_weights_are_made_by_callers_that_look_at_them(prepare, backend, monkeypatch):
    describe((8, 6), monkeypatch)
    gpu = torch.device("cuda", 0)
    path = dispatch.execution_path(gpu, torch.bfloat16, "fast", 300, (3840, 3840), prepare=prepare)
    assert path.backend == backend


def test_the_path_of_mps(monkeypatch):
    describe(None, monkeypatch, NO_TRITON)
    for precision in ("auto", "fast", "exact"):
        _check_path(torch.device("mps"), precision, "eager", "")
    dispatch.forget()
