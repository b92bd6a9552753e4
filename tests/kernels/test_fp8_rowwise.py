"""The row-wise scaled FP8 linear in plain torch: its bits, its error, its ops."""

from __future__ import annotations

import minilm
import pytest
import torch
from arithmetic import all_magnitudes
from cards import CARDS
from torch._dynamo.testing import AotEagerAndRecordGraphs

from mxfp8 import kernels
from mxfp8.kernels import dispatch, ops
from mxfp8.kernels.backends import fp8_rowwise, reference, torch_mx

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def equal(actual, expected) -> bool:
    """Equal codes and equal scales, NaN included."""
    (code, scale), (code2, scale2) = actual, expected
    return torch.equal(code.view(torch.uint8), code2.view(torch.uint8)) and torch.equal(
        scale.nan_to_num(-1.0), scale2.nan_to_num(-1.0)
    )


# ---- bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (33, 100), (300, 544), (0, 64)])
def test_a_rowwise_weight_has_the_bits_of_the_oracle(shape):
    stored = reference.quantize(all_magnitudes(*shape, torch.float32)) if shape[0] else (
        torch.empty(0, 64, dtype=torch.float8_e4m3fn), torch.empty(0, 4, dtype=torch.uint8)
    )  # fmt: skip
    assert equal(fp8_rowwise.to_rowwise_eager(*stored), reference.to_rowwise(*stored))


def test_row_scaling_changes_only_values_far_below_their_row():
    weight = normal(64, 256)
    weight[:, :128] *= torch.exp2(-torch.arange(64.0) / 4)[:, None]
    qdata, scale = reference.quantize(weight)
    code, row_scale = fp8_rowwise.to_rowwise_eager(qdata, scale)
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
        assert equal(fp8_rowwise.quantize_rowwise_eager(x), reference.quantize_rowwise(x))
    codes, scale = fp8_rowwise.quantize_rowwise_eager(x)
    assert codes.shape[0] == scale.shape[0] == shape[0]


def test_a_row_with_nan_or_infinity_is_nan_in_the_result():
    x, weight = normal(4, 64), normal(32, 64)
    x[1, 5], x[2, 6] = torch.nan, torch.inf
    stored = reference.quantize(weight)
    out = fp8_rowwise.linear(x, *stored, None, 32, 64)
    assert out[1:3].isnan().all()
    assert out[0].isfinite().all() and out[3].isfinite().all()


# ---- error -----------------------------------------------------------------------------------


def errors(x, weight) -> tuple[float, float]:
    """Relative error of the output: ours, and what activations in blocks of 32 have."""
    rows, cols = weight.shape
    expected = x.double() @ weight.double().t()
    stored = reference.quantize(weight)
    actual = fp8_rowwise.linear(x, *stored, None, rows, cols)
    native = reference.linear(x, *stored, None, rows, cols, "fast")
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
        code, row_scale = fp8_rowwise.to_rowwise_eager(qdata, scale)
        plain = reference.dequantize_exact(qdata, scale, *qdata.shape)
        scaled = code.double() * row_scale.double()[:, None]
        changes.append(float((scaled - plain).norm() / plain.norm()))
    print(f"change: mean {sum(changes) / len(changes):.1e}, largest {max(changes):.1e}")
    assert max(changes) < 1e-5


def test_the_matmul_is_that_of_torch():
    """Which on a CPU has one scale for each whole matrix."""
    a, b = (normal(*s, seed=s[0]).to(torch.float8_e4m3fn) for s in ((40, 96), (64, 96)))
    scales = torch.full((40,), 0.5), torch.full((64,), 0.25)
    bias = normal(64, seed=9).bfloat16()
    actual = fp8_rowwise.scaled_matmul(a, scales[0], b, scales[1], bias, torch.bfloat16, 64)
    expected = torch._scaled_mm(
        a, b.t(), torch.tensor(0.5), torch.tensor(0.25), bias, out_dtype=torch.bfloat16
    )
    difference = (actual.double() - expected.double()).abs()
    assert (difference <= expected.double().abs() * 2.0**-7 + 1e-5).all()


# ---- as ops ----------------------------------------------------------------------------------


@pytest.fixture
def fast_on_cpu(monkeypatch, forget):
    """Fast on the CPU, by plain torch."""
    record = next(b for b in dispatch.BACKENDS if b.input_form == "rowwise")
    others = tuple(b for b in dispatch.BACKENDS if b.input_form != "rowwise")

    def unsupported_reason(problem):
        return "no" if problem.op != "linear" or problem.precision == "exact" else small_m(problem)

    def small_m(problem):
        return "small M" if problem.small_m else None

    monkeypatch.setattr(
        dispatch,
        "BACKENDS",
        (dispatch.replace(record, unsupported_reason=unsupported_reason), *others),
    )
    forget()


X = normal(2, 50, 96, seed=3)
STORED = reference.quantize(normal(70, 96, seed=4))
BIAS = normal(70, seed=5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fast_runs_the_three_steps(fast_on_cpu, dtype):
    x = X.to(dtype)
    actual = kernels.linear(x, *STORED, BIAS, shape=(70, 96))
    expected = fp8_rowwise.linear(x.reshape(100, 96), *STORED, BIAS.to(dtype), 70, 96)
    assert torch.equal(actual, expected.reshape(2, 50, 70))
    assert actual.dtype == dtype
    exact = kernels.linear(x, *STORED, BIAS, shape=(70, 96), precision="exact")
    assert 0.01 < (actual.float() - exact.float()).norm() / exact.float().norm() < 0.06


def test_few_rows_run_exact_without_a_warning(fast_on_cpu, caplog):
    x = X[0, :50]
    actual = kernels.linear(x, *STORED, shape=(70, 96), precision="fast")
    assert torch.equal(actual, kernels.linear(x, *STORED, shape=(70, 96), precision="exact"))
    assert caplog.records == []


def test_a_prepared_weight_and_a_quantized_input_are_used_as_given(fast_on_cpu):
    expected = kernels.linear(X, *STORED, shape=(70, 96))
    prepared, quantized_input = kernels.to_rowwise(*STORED), kernels.quantize_input(X, "rowwise")
    arguments = {"prepared_weight": prepared, "quantized_input": quantized_input, "shape": (70, 96)}
    assert torch.equal(kernels.linear(X, *STORED, **arguments), expected)
    nothing = torch.zeros_like(STORED[0].view(torch.uint8)).view(torch.float8_e4m3fn)
    assert torch.equal(kernels.linear(X, nothing, STORED[1], **arguments), expected)


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
    assert sum(t.startswith(f"{name}.scaled_matmul") for t in targets) == 3
    assert sum(t.startswith(f"{name}.to_rowwise") for t in targets) == 3
    # Three in the trace, one after common subexpressions are merged, as inductor does it.
    from torch._functorch.compile_utils import fx_graph_cse

    merged = fx_graph_cse(recorder.fw_graphs[0].graph)
    assert sum(str(n.target).startswith(f"{name}.quantize_rowwise") for n in merged.nodes) == 1


def test_gradients_pass_straight_through(fast_on_cpu):
    x = X.clone().requires_grad_()
    kernels.linear(x, *STORED, shape=(70, 96)).sum().backward()
    weight = reference.dequantize(*STORED, torch.float32, 70, 96)
    assert torch.allclose(x.grad, weight.sum(0).expand_as(x), atol=1e-4)


@pytest.mark.parametrize("op", ["to_rowwise", "quantize_rowwise", "scaled_matmul"])
def test_ops_are_what_their_fakes_say(op):
    function = getattr(getattr(torch.ops, ops.NAMESPACE), op).default
    quantized_input, prepared = reference.quantize_rowwise(X[0]), reference.to_rowwise(*STORED)
    arguments = {
        "to_rowwise": STORED,
        "quantize_rowwise": (X[0],),
        "scaled_matmul": (*quantized_input, *prepared, BIAS, torch.bfloat16, 70),
    }
    torch.library.opcheck(function, arguments[op], test_utils="test_faketensor")


# ---- which backend runs ----------------------------------------------------------------------

LINEAR = [("exact", False), ("exact", True), ("auto", False), ("auto", True)]
# Card -> backends of LINEAR with Triton, and without it.
TRITON, FP8, EAGER, BLOCKS = "triton", "fp8", "eager", "torch_mx"
OLD = ([TRITON] * 4, [EAGER] * 4)
CHOSEN = {
    "Turing": OLD,
    "Ampere": OLD,
    "GeForce 30": OLD,
    "Ada": ([TRITON, TRITON, FP8, TRITON], [EAGER, EAGER, FP8, EAGER]),
    "Hopper": ([TRITON, TRITON, FP8, TRITON], [EAGER, EAGER, FP8, EAGER]),
    "Blackwell": ([TRITON, TRITON, BLOCKS, TRITON], [EAGER, EAGER, BLOCKS, EAGER]),
    "GeForce 50": ([TRITON, TRITON, BLOCKS, TRITON], [EAGER, EAGER, BLOCKS, EAGER]),
    "a later card": ([TRITON, TRITON, BLOCKS, TRITON], [EAGER, EAGER, BLOCKS, EAGER]),
}


def chosen(op="linear", precision="exact", small_m=False, dtype=torch.bfloat16) -> str:
    problem = dispatch.Problem(op, torch.device("cuda", 0), dtype, precision, small_m)
    return dispatch._choose(problem, None)[0].name


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("has_triton", [True, False])
def test_each_card_has_its_backends(name, has_triton, card):
    card(CARDS[name], None if has_triton else "needs Triton")
    expected = CHOSEN[name][0 if has_triton else 1]
    assert [chosen(precision=p, small_m=small_m) for p, small_m in LINEAR] == expected
    for op in ("quantize", "dequantize"):
        assert chosen(op) == (TRITON if has_triton else EAGER)


@pytest.mark.parametrize("capability", [(10, 0), (12, 1)])
def test_blackwell_says_what_block_scaled_matmuls_need(capability, card, monkeypatch):
    card(capability)
    problem = dispatch.Problem("linear", torch.device("cuda", 0), torch.bfloat16, "fast")
    assert torch_mx.unsupported_reason(problem) is None
    assert chosen(precision="auto", dtype=torch.float32) == FP8
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert (
        "needs a torch for CUDA 12.8 or later; this one is for 12.6"
        in torch_mx.unsupported_reason(problem)
    )
    card(capability)
    assert chosen(precision="auto") == FP8
    card(capability, "needs Triton")
    assert chosen(precision="auto") == EAGER
    monkeypatch.delattr(torch.nn.functional, "scaled_mm")
    assert "CUDA 12.8" in torch_mx.unsupported_reason(
        problem
    )  # and not torch: 2.7 has a private form
    monkeypatch.delattr(torch, "float8_e8m0fnu")
    assert "needs torch 2.10 or later" in torch_mx.unsupported_reason(problem)


def test_triton_multiplies_blocks_only_when_named(card):
    card((12, 0))
    problem = dispatch.Problem("linear", torch.device("cuda", 0), torch.bfloat16, "fast")
    named = dispatch.named("triton_mx")
    assert dispatch._choose(problem, named) == (named, "fast")
    assert "not chosen automatically" in {
        s.name: s.reason for s in kernels.list_backends("cuda:0")
    }["triton_mx"]  # fmt: skip
    card((9, 0))
    with pytest.raises(ValueError, match=r"needs block-scaled tensor cores .* this one has 9.0"):
        dispatch._choose(problem, named)


def test_ada_on_windows_needs_triton_for_fast(card):
    card((8, 9), "needs Triton: pip install triton-windows", "win32")
    assert chosen(precision="auto") == EAGER
    card((8, 9), None, "win32")
    assert chosen(precision="auto") == FP8
    assert not fp8_rowwise.torch_multiplies(torch.device("cuda", 0), torch.bfloat16)


def test_hopper_with_an_older_torch_needs_triton_for_fast(card):
    card((9, 0), "needs Triton: pip install triton", torch_runs=False)
    assert chosen(precision="auto") == EAGER
    card((9, 0), None, torch_runs=False)
    assert chosen(precision="auto") == FP8


def test_a_torch_without_the_matmul_is_detected():
    assert fp8_rowwise._torch_runs(torch.device("cpu")) is False


def test_the_list_says_why_a_backend_is_not_used(card):
    card((8, 6), "needs Triton: pip install triton")
    listed = {status.name: str(status) for status in kernels.list_backends("cuda:0")}
    assert "compute capability 8.9 (RTX 40) or later; this one has 8.6" in listed[FP8]
    assert "needs Triton: pip install triton" in listed[TRITON]
    card(None)
    listed = {status.name: str(status) for status in kernels.list_backends("cpu")}
    assert "this is cpu" in listed[FP8]
    assert "needs an NVIDIA or AMD GPU; this is cpu" in listed[TRITON]


def test_a_backend_that_fails_its_self_test_is_not_used(card, monkeypatch, caplog):
    card((9, 0))
    monkeypatch.setattr(
        dispatch,
        "_test",
        lambda b, d: "it scales weights by row wrongly" if b.input_form == "rowwise" else None,
    )
    assert chosen(precision="auto") == TRITON
    listed = {status.name: status for status in kernels.list_backends("cuda:0")}
    assert listed[FP8].reason == "it scales weights by row wrongly"


# ---- in blocks -------------------------------------------------------------------------------


@pytest.fixture
def blocks_here(prefer):
    """A block-scaled matmul on the CPU, in float64."""

    def matmul(quantized_input, weight, bias, dtype, M, N):
        assert quantized_input[0].dtype == torch.float8_e4m3fn
        K = quantized_input[0].shape[1]
        x, w = (
            reference.dequantize_exact(*part, part[0].shape[0], K)
            for part in (quantized_input, weight)
        )
        out = (x @ w.t())[:M, :N]
        return (out if bias is None else out + bias.double()).to(dtype)

    prefer(BLOCKS, matmul=matmul)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_activations_in_blocks_are_those_of_the_oracle(blocks_here, dtype):
    x = X.to(dtype)
    actual = kernels.linear(x, *STORED, BIAS, shape=(70, 96))
    expected = reference.linear(
        x.reshape(100, 96), *STORED, BIAS.to(dtype), 70, 96, "fast"
    ).reshape(2, 50, 70)  # fmt: skip
    assert torch.equal(actual, expected)
    quantized_input = kernels.quantize_input(x, kernels.input_form(x, "auto"))
    assert torch.equal(
        kernels.linear(x, *STORED, BIAS, shape=(70, 96), quantized_input=quantized_input), expected
    )


def test_compiled_layers_share_their_blocks_too(blocks_here):
    def attention(x):
        return [kernels.linear(x, *STORED, shape=(70, 96)) for _ in range(2)]

    with torch.no_grad():
        actual = torch.compile(attention, fullgraph=True, backend="aot_eager")(X)
    assert all(torch.equal(a, b) for a, b in zip(actual, attention(X), strict=True))


# ---- the bound on row scaling ----------------------------------------------------------------


@pytest.mark.parametrize("spread", [0, 2, 5, 10, 14, 20])
def test_the_bound_on_row_scaling_holds_and_is_not_far_off(spread):
    """Blocks that are up to 2**spread smaller than the largest of their row."""
    factor = torch.exp2(-spread * torch.rand(64, 16, generator=torch.Generator().manual_seed(1)))
    weight = normal(64, 512) * factor.repeat_interleave(32, 1)
    qdata, scale = reference.quantize(weight)
    code, row_scale = fp8_rowwise.to_rowwise_eager(qdata, scale)
    plain = reference.dequantize_exact(qdata, scale, 64, 512)
    change = (code.double() * row_scale.double()[:, None] - plain).view(64, 16, 32).norm(dim=-1)
    actual = float((change / plain.view(64, 16, 32).norm(dim=-1)).square().mean().sqrt())
    bound = kernels.rowwise_error_bound(qdata.shape, scale)
    assert actual <= bound
    if spread >= 14:  # where it comes near the limit at which layers run exact
        assert bound <= 10 * actual


def test_row_scaling_does_not_change_a_zero_matrix():
    qdata, scale = reference.quantize(torch.zeros(40, 64))
    assert kernels.rowwise_error_bound(qdata.shape, scale) == 0
