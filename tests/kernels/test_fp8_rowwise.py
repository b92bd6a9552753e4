"""The row-wise scaled FP8 linear in plain torch: its bits, its error, its ops."""

from __future__ import annotations

from functools import partial

import minilm
import pytest
import torch
from arithmetic import all_magnitudes
from cards import CARDS
from torch._dynamo.testing import AotEagerAndRecordGraphs

from mxfp8 import kernels
from mxfp8.kernels import device_facts, dispatch, ops, self_test
from mxfp8.kernels.backends import fp8_rowwise, reference, torch_mx
from mxfp8.kernels.records import DEQUANTIZERS, QUANTIZERS, Problem

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def equal(actual, expected) -> bool:
    """Equal codes and equal scales, NaN included."""
    (code, scale), (code2, scale2) = actual, expected
    return torch.equal(code.view(torch.uint8), code2.view(torch.uint8)) and torch.equal(
        scale.nan_to_num(-1.0), scale2.nan_to_num(-1.0)
    )


def linear(x, stored, N, bias=None):
    """The three steps: x @ W.T + bias of an MXFP8 weight, quantized by row."""
    operands = fp8_rowwise.quantize_rowwise(x), fp8_rowwise.to_rowwise(*stored)
    return reference.matmul("rowwise_fp8", "rowwise_fp8", *operands, bias, x.dtype, N)


# ---- bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (33, 100), (300, 544), (0, 64)])
def test_a_rowwise_weight_has_the_bits_of_the_oracle(shape):
    stored = reference.quantize(all_magnitudes(*shape, torch.float32)) if shape[0] else (
        torch.empty(0, 64, dtype=torch.float8_e4m3fn), torch.empty(0, 4, dtype=torch.uint8)
    )  # fmt: skip
    assert equal(fp8_rowwise.to_rowwise(*stored), reference.to_rowwise(*stored))


def test_row_scaling_changes_only_values_far_below_their_row():
    weight = normal(64, 256)
    weight[:, :128] *= torch.exp2(-torch.arange(64.0) / 4)[:, None]
    qdata, scale = reference.quantize(weight)
    code, row_scale = fp8_rowwise.to_rowwise(qdata, scale)
    scaled = code.double() * row_scale.double()[:, None]
    plain = reference.dequantize_exact(qdata, scale, 64, 256)
    size = plain.abs().amax(-1, keepdim=True)
    kept = plain.abs() >= size * 2.0**-13  # above E4M3's subnormals
    assert torch.equal(scaled[kept], plain[kept])
    assert ((scaled - plain).abs() <= size * 2.0**-17).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (33, 100), (5, 4097), (0, 64), (3, 0)])
def test_a_rowwise_input_has_the_bits_of_the_oracle(shape, dtype):
    x = all_magnitudes(*shape, dtype) if 0 not in shape else torch.empty(shape, dtype=dtype)
    if shape[1]:
        assert equal(fp8_rowwise.quantize_rowwise(x), reference.quantize_rowwise(x))
    codes, scale = fp8_rowwise.quantize_rowwise(x)
    assert codes.shape[0] == scale.shape[0] == shape[0]


def test_a_row_with_nan_or_infinity_is_nan_in_the_result():
    x, weight = normal(4, 64), normal(32, 64)
    x[1, 5], x[2, 6] = torch.nan, torch.inf
    stored = reference.quantize(weight)
    out = linear(x, stored, 32)
    assert out[1:3].isnan().all()
    assert out[0].isfinite().all() and out[3].isfinite().all()


# ---- error -----------------------------------------------------------------------------------


in_blocks = partial(reference.matmul, "stored", "mxfp8")


def errors(x, weight) -> tuple[float, float]:
    """Relative error of the output: ours, and what activations in blocks of 32 have."""
    rows = len(weight)
    expected = x.double() @ weight.double().t()
    stored = reference.quantize(weight)
    actual = linear(x, stored, rows)
    native = in_blocks(reference.quantize(x), stored, None, x.dtype, rows)[: len(x)]
    return tuple(float((y.double() - expected).norm() / expected.norm()) for y in (actual, native))


def heavy(*shape, seed):
    """Student's t with 3 degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)
    squares = torch.randn(3, *shape, generator=generator).square().mean(0)
    return torch.randn(shape, generator=generator) / squares.sqrt()


def outliers(*shape, seed):
    """Four columns that are 30 times the others."""
    x = normal(*shape, seed=seed)
    x[:, torch.arange(4) * (shape[1] // 4) + 5] *= 30
    return x


@pytest.mark.parametrize("kind", [normal, heavy, outliers])
def test_the_error_is_no_worse_than_that_of_blocks(kind):
    """On average over several weights: the two differ by chance as well."""
    actual = [
        errors(kind(96, 512, seed=s), make(128, 512, seed=s + 1))
        for s in (1, 2, 3, 4)
        for make in (normal, heavy)
    ]
    ours, native = torch.tensor(actual).mean(0)
    assert ours < native * 1.02
    assert ours < 0.05


def test_the_error_on_trained_layers_is_no_worse_than_that_of_blocks():
    actual = [errors(x, weight) for weight, x in minilm.layers().values()]
    assert len(actual) == 36
    ours, native = torch.tensor(actual).mean(0)
    print(f"output error {ours:.2e}, in blocks {native:.2e}")
    assert ours < native


def test_row_scaling_changes_trained_layers_by_less_than_1e_5():
    changes = []
    for weight, _ in minilm.layers().values():
        qdata, scale = reference.quantize(weight)
        code, row_scale = fp8_rowwise.to_rowwise(qdata, scale)
        plain = reference.dequantize_exact(qdata, scale, *qdata.shape)
        scaled = code.double() * row_scale.double()[:, None]
        changes.append(float((scaled - plain).norm() / plain.norm()))
    print(f"change: mean {sum(changes) / len(changes):.1e}, largest {max(changes):.1e}")
    assert max(changes) < 1e-5


@pytest.fixture
def torch_here(monkeypatch):
    """torch's matmul on a CPU: the rules of the one by row, then float64.

    What every torch has on a CPU takes one scale for each whole matrix, which is tried, too; the
    one by row runs in `test_torch_fp8.py`.
    """
    own = torch._scaled_mm
    calls = []

    def by_row(a, b, *, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        assert a.is_contiguous() and b.t().is_contiguous()  # K-major, for cuBLAS
        assert a.dtype == b.dtype == torch.float8_e4m3fn and a.shape[1] == b.shape[0]
        assert a.shape[1] % 16 == b.shape[1] % 16 == 0
        assert (scale_a.shape, scale_b.shape) == ((a.shape[0], 1), (1, b.shape[1]))
        assert scale_a.dtype == scale_b.dtype == torch.float32
        assert bias is None or (bias.dtype == out_dtype and bias.shape == b.shape[1:])
        calls.append((tuple(a.shape), tuple(b.shape)))
        out = (a.double() * scale_a) @ (b.double() * scale_b)
        return (out if bias is None else out + bias.double()).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", by_row)
    return own, calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("N", [70, 96, 40])
def test_torch_is_given_what_it_takes_and_the_product_is_right(N, bias, torch_here):
    """Rows of the weight are padded to 32, or stored without that."""
    a, (b, b_scale) = reference.quantize_rowwise(normal(33, 64)), reference.to_rowwise(
        *reference.quantize(normal(N, 64, seed=1))
    )  # fmt: skip
    added = normal(N, seed=2).bfloat16() if bias else None
    for weight in ((b, b_scale), (b[:N], b_scale[:N])):
        actual = fp8_rowwise.matmul_by_torch(a, weight, added, torch.bfloat16, N)
        expected = reference.matmul(
            "rowwise_fp8", "rowwise_fp8", a, weight, added, torch.bfloat16, N
        )
        assert torch.equal(actual, expected) and actual.is_contiguous()
    nothing = a[0][:0], a[1][:0]
    out = fp8_rowwise.matmul_by_torch(nothing, (b, b_scale), added, torch.bfloat16, N)
    assert (out.shape, out.dtype) == ((0, N), torch.bfloat16)
    _, calls = torch_here
    assert len(calls) == 2


def test_the_matmul_is_that_of_torch(torch_here):
    """By one scale for each whole matrix, which torch has on every CPU."""
    a, b = (normal(*s, seed=s[0]).to(torch.float8_e4m3fn) for s in ((40, 96), (64, 96)))
    scales = torch.full((40,), 0.5), torch.full((64,), 0.25)
    bias = normal(64, seed=9).bfloat16()
    actual = fp8_rowwise.matmul_by_torch((a, scales[0]), (b, scales[1]), bias, torch.bfloat16, 64)
    own, _ = torch_here
    expected = own(a, b.t(), torch.tensor(0.5), torch.tensor(0.25), bias, out_dtype=torch.bfloat16)
    difference = (actual.double() - expected.double()).abs()
    assert (difference <= expected.double().abs() * 2.0**-7 + 1e-5).all()


# ---- as ops ----------------------------------------------------------------------------------


@pytest.fixture
def fast_on_cpu(prefer):
    """Fast on the CPU, by the oracle's matmul."""
    prefer("reference_fp8", m_classes=("many",))


X = normal(2, 50, 96, seed=3)
STORED = reference.quantize(normal(70, 96, seed=4))
BIAS = normal(70, seed=5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fast_runs_the_three_steps(fast_on_cpu, dtype):
    x = X.to(dtype)
    actual = kernels.linear(x, *STORED, BIAS, shape=(70, 96))
    expected = linear(x.reshape(100, 96), STORED, 70, BIAS.to(dtype))
    assert torch.equal(actual, expected.reshape(2, 50, 70))
    assert actual.dtype == dtype
    exact = kernels.linear(x, *STORED, BIAS, shape=(70, 96), precision="exact")
    assert 0.01 < (actual.float() - exact.float()).norm() / exact.float().norm() < 0.06


def test_few_rows_run_exact_without_a_warning(fast_on_cpu, caplog):
    x = X[0, :50]
    actual = kernels.linear(x, *STORED, shape=(70, 96), precision="fast")
    assert torch.equal(actual, kernels.linear(x, *STORED, shape=(70, 96), precision="exact"))
    assert caplog.records == []


def test_compiled_layers_share_one_quantization_of_their_input(fast_on_cpu):
    others = [reference.quantize(normal(70, 96, seed=s)) for s in (6, 7)]

    def attention(x):
        return [kernels.linear(x, *stored, shape=(70, 96)) for stored in (STORED, *others)]

    recorder = AotEagerAndRecordGraphs()
    with torch.no_grad():
        actual = torch.compile(attention, fullgraph=True, backend=recorder)(X)
    expected = attention(X)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    targets = [str(node.target) for node in recorder.fw_graphs[0].graph.nodes]
    name = ops.NAMESPACE
    assert sum(t.startswith(f"{name}.matmul") for t in targets) == 3
    assert sum(t.startswith(f"{name}.prepare_weight") for t in targets) == 3
    # Three in the trace, one after common subexpressions are merged, as inductor does it.
    from torch._functorch.compile_utils import fx_graph_cse

    merged = fx_graph_cse(recorder.fw_graphs[0].graph)
    assert sum(str(n.target).startswith(f"{name}.quantize_input") for n in merged.nodes) == 1


def test_gradients_pass_straight_through(fast_on_cpu):
    x = X.clone().requires_grad_()
    kernels.linear(x, *STORED, shape=(70, 96)).sum().backward()
    weight = reference.dequantize(*STORED, torch.float32, 70, 96)
    assert torch.allclose(x.grad, weight.sum(0).expand_as(x), atol=1e-4)


# ---- which backend runs ----------------------------------------------------------------------

LINEAR = [("exact", None), ("exact", 64), ("auto", None), ("auto", 64)]
# Card -> backends of LINEAR with Triton, and without it; comfy-kitchen's kernels are not there.
TRITON, FEW, FP8, EAGER, BLOCKS = "triton", "triton_w8a16", "torch_fp8", "eager", "torch_mx"
INT8 = "triton_int8"
NOTHING = [EAGER] * 4  # torch's matmuls are not worth quantizing x in a dozen passes
CHOSEN = {
    "Turing": [TRITON, TRITON, "torch_int8", TRITON],
    "Ampere": [TRITON, FEW, INT8, FEW],
    "GeForce 30": [TRITON, FEW, INT8, FEW],
    "Ada": [TRITON, FEW, INT8, FEW],
    "Hopper": [TRITON, FEW, FP8, FEW],
    "Blackwell": [TRITON, FEW, BLOCKS, FEW],
    "GeForce 50": [TRITON, FEW, BLOCKS, FEW],
    "a later card": [TRITON, FEW, BLOCKS, FEW],
}
GPU = torch.device("cuda", 0)


def chosen(precision="exact", rows=None, dtype=torch.bfloat16) -> str:
    return kernels.execution_path(GPU, dtype, precision, rows, prepare="once").backend


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("has_triton", [True, False])
def test_each_card_has_its_backends(name, has_triton, card):
    card(CARDS[name], None if has_triton else "needs Triton")
    expected = CHOSEN[name] if has_triton else NOTHING
    assert [chosen(*problem) for problem in LINEAR] == expected
    for steps in (QUANTIZERS, DEQUANTIZERS):
        step = dispatch.choose_step(steps, GPU, torch.bfloat16)
        assert step.name == ("triton" if has_triton else "eager")


def test_float32_is_multiplied_by_triton(card):
    card((9, 0))
    assert chosen("auto", dtype=torch.float32) == "triton_fp8"
    assert chosen("exact", 1, dtype=torch.float32) == FEW
    assert chosen("exact", 5, dtype=torch.float32) == TRITON  # its instructions would round


@pytest.mark.parametrize("capability", [(10, 0), (12, 1)])
def test_blackwell_says_what_block_scaled_matmuls_need(capability, card, monkeypatch):
    card(capability)
    problem = Problem(GPU, torch.bfloat16, "fast")
    assert torch_mx.unsupported_reason(problem) is None
    assert chosen("auto", dtype=torch.float32) == "triton_fp8"
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert (
        "needs a torch for CUDA 12.8 or later; this one is for 12.6"
        in torch_mx.unsupported_reason(problem)
    )
    card(capability)
    assert chosen("auto") == "triton_fp8"
    card(capability, "needs Triton")
    assert chosen("auto") == EAGER
    monkeypatch.delattr(torch.nn.functional, "scaled_mm")
    assert "CUDA 12.8" in torch_mx.unsupported_reason(
        problem
    )  # and not torch: 2.7 has a private form
    monkeypatch.delattr(torch, "float8_e8m0fnu")
    assert "needs torch 2.10 or later" in torch_mx.unsupported_reason(problem)


def test_triton_multiplies_blocks_only_when_named(card):
    card((12, 0))
    with kernels.use_backend("triton_mx"):
        path = kernels.execution_path(GPU, torch.bfloat16, "fast")
    assert (path.backend, path.precision, path.quantizer) == ("triton_mx", "fast", "triton")
    assert "not chosen automatically" in {
        s.name: s.reason for s in kernels.list_backends("cuda:0")
    }["triton_mx"]  # fmt: skip
    card((9, 0))
    message = r"needs block-scaled tensor cores .* this one has 9.0"
    with kernels.use_backend("triton_mx"), pytest.raises(ValueError, match=message):
        kernels.execution_path(GPU, torch.bfloat16, "fast")


@pytest.mark.parametrize("name", ["Ada", "Hopper"])
def test_without_a_compiler_it_runs_when_it_is_named(name, card):
    """Triton is there and cannot compile; torch's matmul needs none, and plain torch its steps."""
    card(CARDS[name], fails=("triton", "triton_fp8", "triton_w8a16"))
    path = kernels.execution_path(GPU, torch.bfloat16, "auto", prepare="once")
    assert path.backend == EAGER
    reason = dict(path.unsupported)[FP8]
    assert reason.startswith("nothing here quantizes inputs in one pass (triton: its self-test ")
    assert reason.endswith("; use_backend('torch_fp8') runs it with plain torch's")
    for prepare in ("once", "each call"):
        with kernels.use_backend(FP8):
            path = kernels.execution_path(GPU, torch.bfloat16, "fast", prepare=prepare)
        assert (path.backend, path.preparer, path.quantizer) == (FP8, "torch", "torch")


def test_mi300_has_fp8_where_int8_does_not_run(card):
    card("gfx942", fails=("triton_int8",))
    assert chosen("auto") == "triton_fnuz"
    card("gfx950", fails=("triton_int8",))
    assert chosen("auto") == TRITON


def test_the_oracle_reads_every_code_of_mi300_as_torch_does():
    code = torch.arange(256, dtype=torch.uint8)
    expected = code.view(torch.float8_e4m3fnuz).double()
    actual = reference.decode_e4m3fnuz(code)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_ada_on_windows_needs_triton_for_fast(card):
    card((8, 9), "needs Triton: pip install triton-windows", platform="win32")
    assert chosen("auto") == EAGER
    card((8, 9), None, platform="win32", fails=("triton_int8",))
    assert chosen("auto") == "triton_fp8"


def test_a_torch_whose_matmul_does_not_run_leaves_it_to_triton(card):
    """Which an older torch does, on Hopper or in float16: its self-test finds that out."""
    card((9, 0), fails=("torch_fp8",))
    assert chosen("auto") == "triton_fp8"
    assert chosen("auto", dtype=torch.float16) == "triton_fp8"


def test_a_torch_without_the_matmul_is_detected(monkeypatch, forget):
    """One that has no scales by row, as 2.11 on a CPU, and one without the function."""

    def whole_only(*args, **kwargs):
        raise RuntimeError("only per-tensor scales")

    monkeypatch.setattr(torch, "_scaled_mm", whole_only)
    reason, final = self_test.verdict(
        "torch_fp8", dispatch.named("torch_fp8").test, torch.device("cpu"), torch.bfloat16
    )
    assert reason == "its self-test failed (RuntimeError: only per-tensor scales)" and final
    monkeypatch.delattr(torch, "_scaled_mm")
    monkeypatch.setattr(device_facts, "capability", lambda device: (9, 0))
    problem = Problem(GPU, torch.bfloat16, "fast")
    assert "has no _scaled_mm" in fp8_rowwise.torch_unsupported_reason(problem)


def test_the_list_says_why_a_backend_is_not_used(card):
    card((8, 6), "needs Triton: pip install triton")
    listed = {status.name: str(status) for status in kernels.list_backends("cuda:0")}
    assert "compute capability 8.9 (RTX 40) or later; this one has 8.6" in listed[FP8]
    assert "needs Triton: pip install triton" in listed[TRITON]
    card(None)
    listed = {status.name: str(status) for status in kernels.list_backends("cpu")}
    assert "this is cpu" in listed[FP8]
    assert "needs an NVIDIA or AMD GPU; this is cpu" in listed[TRITON]


def test_a_backend_that_fails_its_self_test_is_not_used(card):
    card((9, 0), fails=("torch_fp8", "triton_fp8", INT8, "torch_int8"))
    assert chosen("auto") == TRITON
    listed = {status.name: status for status in kernels.list_backends("cuda:0")}
    assert listed[FP8].reason == "its self-test failed"


# ---- in blocks -------------------------------------------------------------------------------


@pytest.fixture
def blocks_here(prefer):
    """A block-scaled matmul on the CPU, in float64."""
    prefer("reference_mx", m_classes=("many",))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_activations_in_blocks_are_those_of_the_oracle(blocks_here, dtype):
    x = X.to(dtype)
    actual = kernels.linear(x, *STORED, BIAS, shape=(70, 96))
    quantized = reference.quantize(x.reshape(100, 96))
    expected = in_blocks(quantized, STORED, BIAS.to(dtype), dtype, 70)[:100].reshape(2, 50, 70)
    assert torch.equal(actual, expected)
    path = kernels.execution_path(x.device, dtype, "auto", 100, (70, 96))
    quantized = kernels.quantize_input(path, x)
    assert torch.equal(kernels.linear_prepared(path, x, STORED, BIAS, 70, quantized), expected)


def test_compiled_layers_share_their_blocks_too(blocks_here):
    def attention(x):
        return [kernels.linear(x, *STORED, shape=(70, 96)) for _ in range(2)]

    with torch.no_grad():
        actual = torch.compile(attention, fullgraph=True, backend="aot_eager")(X)
    assert all(torch.equal(a, b) for a, b in zip(actual, attention(X), strict=True))
