"""linear: every path against float64, gradients, and the ops under torch's transformations."""

import threading
from functools import cache, partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from mxfp8 import kernels
from mxfp8.kernels import device_facts, dispatch, ops, records
from mxfp8.kernels.backends import eager, int8, reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
N, K = 300, 130  # neither a multiple of 32; three slabs of 128 rows
CPU = torch.device("cpu")
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
OPS = getattr(torch.ops, ops.NAMESPACE)


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@cache
def weight(rows=N, cols=K):
    """A stored weight and the float64 matrix behind it."""
    stored = reference.quantize(numbers(rows, cols, seed=1))
    return stored, reference.dequantize_exact(*stored, rows, cols)


def assert_close_to_float64(got, x, dense, bias=None):
    """|error| <= (K + 2) u |x| @ |W|.T + 2 v |y|.

    A sum of K products in float32 (u = 2**-24), in any order, is off by at most K u times the sum
    of magnitudes; the bias is one more term. The result is rounded to x's dtype (v), twice where
    a matmul rounds before it adds the bias. The bias is first rounded to x's dtype.
    """
    bias = torch.zeros(len(dense)) if bias is None else bias.detach().to(x.dtype)
    x, bias = x.detach().double(), bias.double()
    expected = x @ dense.t() + bias
    size = x.abs() @ dense.t().abs() + bias.abs()
    bound = (dense.shape[1] + 2) * 2.0**-24 * size + 2 * ROUNDING[got.dtype] * expected.abs()
    assert got.shape == expected.shape
    assert ((got.detach().double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_oracle_is_the_float64_product_rounded_once(dtype):
    stored, dense = weight()
    x, bias = numbers(5, K, dtype=dtype), numbers(N, dtype=dtype, seed=2)
    quantized = reference.dequantize_exact(*reference.quantize(x), 5, K)
    forms = {None: ((x,), x.double()), "mxfp8": (reference.quantize(x), quantized)}
    for form, (operand, value) in forms.items():
        expected = value @ dense.t()
        multiply = partial(reference.matmul, "stored", form, operand, stored)
        assert torch.equal(multiply(None, dtype, N)[:5], expected.to(dtype))
        assert torch.equal(multiply(bias, dtype, N)[:5], (expected + bias.double()).to(dtype))


@pytest.fixture(params=["this CPU's", "slabs", "direct"])
def path(request, monkeypatch):
    """How eager multiplies: as it chooses here, in slabs of 128 rows, or by torch in x's dtype."""
    if request.param != "this CPU's":
        monkeypatch.setattr(device_facts, "cpu_multiplies", lambda dtype: request.param == "direct")
    if request.param == "slabs":
        monkeypatch.setattr(eager, "_CPU_CHUNK", 1000)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(K,), (37, K), (2, 3, K), (2, 1, 3, K)], ids=str)
def test_any_rank_and_dtype_of_x(shape, dtype):
    stored, dense = weight()
    x = numbers(*shape, dtype=dtype)
    got = kernels.linear(x, *stored, shape=(N, K))
    assert got.dtype == dtype
    assert_close_to_float64(got, x, dense)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias_dtype", FLOATS, ids=str)
def test_a_bias_of_any_dtype(bias_dtype, dtype):
    stored, dense = weight()
    x, bias = numbers(3, K, dtype=dtype), numbers(N, dtype=bias_dtype, seed=2)
    got = kernels.linear(x, *stored, bias, shape=(N, K))
    assert got.dtype == dtype
    assert_close_to_float64(got, x, dense, bias)


@pytest.mark.parametrize("rows", [0, 1, 5, 200])
@pytest.mark.parametrize("shape", [(1, 33), (300, 100)], ids=str)
def test_unpacked_weights_multiply_float32_exactly_in_slabs(shape, rows, monkeypatch, forget):
    monkeypatch.setattr(eager, "_CPU_CHUNK", 1000)
    stored, dense = weight(*shape)
    x, bias = numbers(rows, shape[1]), numbers(shape[0], seed=2).bfloat16()
    with kernels.use_backend("torch_bf16"):
        path = kernels.execution_path(x.device, x.dtype, "exact", rows, shape=shape, prepare="once")
        prepared = kernels.prepare_weight(path, *stored)
        out = kernels.linear_prepared(path, x, prepared, bias, shape[0])
    assert_close_to_float64(out, x, dense, bias)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("shape", [(1, 1), (33, 31), (31, 33), (129, 127), (256, 64)], ids=str)
def test_any_size_of_weight(shape):
    stored, dense = weight(*shape)
    x, bias = numbers(5, shape[1]), numbers(shape[0], seed=2)
    assert_close_to_float64(kernels.linear(x, *stored, bias, shape=shape), x, dense, bias)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sums_that_float32_holds_are_exact(dtype):
    """Every product is a multiple of 2**-9 and every sum below 2**15: no order of adding rounds."""
    generator = torch.Generator().manual_seed(0)
    code = torch.randint(0, 0x7F, (160, 64), generator=generator, dtype=torch.uint8)
    stored = code, torch.full((256, 4), 127, dtype=torch.uint8)
    x = torch.randint(-1, 2, (9, 64), generator=generator).to(dtype)
    expected = reference.matmul("stored", None, (x,), stored, None, dtype, 160)
    assert torch.equal(kernels.linear(x, *stored), expected)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("shape", [(0, K), (2, 0, K)], ids=str)
def test_no_rows_of_x_give_no_rows(shape):
    stored, _ = weight()
    x = numbers(*shape, dtype=torch.bfloat16)
    got = kernels.linear(x, *stored, shape=(N, K))
    assert (got.shape, got.dtype) == ((*shape[:-1], N), torch.bfloat16)


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0)], ids=str)
def test_a_weight_without_rows_or_columns_multiplies_and_differentiates(shape):
    stored, dense = weight(*shape)
    x, bias = numbers(3, shape[1]).requires_grad_(), numbers(shape[0]).requires_grad_()
    got = kernels.linear(x, *stored, bias, shape=shape)
    assert_close_to_float64(got, x, dense, bias)
    got.sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, shape[1]))
    assert torch.equal(bias.grad, torch.full((shape[0],), 3.0))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    "x",
    [
        numbers(K, 12).t(),
        numbers(12, 2 * K)[:, ::2],
        numbers(1, K).expand(12, K),
        numbers(4, K, 3).transpose(1, 2),
        numbers(3, 4, K).transpose(0, 1),
    ],
    ids=["transposed", "strided", "expanded", "inner transposed", "outer transposed"],
)
def test_any_strides_of_x(x):
    stored, dense = weight()
    assert_close_to_float64(kernels.linear(x, *stored, shape=(N, K)), x, dense)


def test_bytes_and_float8_mean_the_same():
    (qdata, scale), x = weight()[0], numbers(4, K)
    as_bytes = kernels.linear(x, qdata.view(torch.uint8), scale, shape=(N, K))
    as_float8 = kernels.linear(x, qdata, scale.view(torch.float8_e8m0fnu), shape=(N, K))
    assert torch.equal(as_bytes, as_float8)


def test_padding_of_the_weight_is_never_read():
    (qdata, scale), x = weight()[0], numbers(4, K)
    expected = kernels.linear(x, qdata, scale, shape=(N, K))
    dirty = qdata.view(torch.uint8).clone()
    dirty[N:], dirty[:, K:] = 0x7F, 0x7F
    assert torch.equal(kernels.linear(x, dirty, scale, shape=(N, K)), expected)


@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(K,), (0, K), (2, 3, K)], ids=str)
def test_gradients_are_those_of_the_dense_weight(shape, dtype, bias_dtype):
    """d/dx = grad @ W, a sum of N products; d/dbias sums grad over the M rows of x."""
    stored, dense = weight()
    x = numbers(*shape, dtype=dtype).requires_grad_()
    bias = None if bias_dtype is None else numbers(N, dtype=bias_dtype).requires_grad_()
    got = kernels.linear(x, *stored, bias, shape=(N, K))
    grad = numbers(*got.shape, dtype=dtype, seed=3)
    got.backward(grad)
    assert x.grad.dtype == dtype
    assert_close_to_float64(x.grad, grad, dense.t())
    if bias is not None:
        rows = grad.reshape(-1, N)
        assert bias.grad.dtype == bias_dtype
        expected, size = rows.double().sum(0), rows.double().abs().sum(0)
        bound = len(rows) * 2.0**-24 * size + ROUNDING[bias_dtype] * expected.abs()
        assert ((bias.grad.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("wanted", ["x", "bias"])
def test_only_what_requires_a_gradient_gets_one(wanted):
    stored, _ = weight()
    x, bias = numbers(2, K).requires_grad_(wanted == "x"), numbers(N).requires_grad_(wanted != "x")
    kernels.linear(x, *stored, bias, shape=(N, K)).sum().backward()
    assert (x.grad is not None, bias.grad is not None) == (wanted == "x", wanted == "bias")


@pytest.mark.parametrize("precision", dispatch.PRECISIONS)
def test_transformations_of_torch_func_are_those_of_the_dense_weight(precision):
    stored, dense = weight()
    x, tangent, bias = numbers(4, 3, K), numbers(4, 3, K, seed=5), numbers(N, seed=2)

    def linear(x, bias):
        return kernels.linear(x, *stored, bias, shape=(N, K), precision=precision)

    batched = torch.vmap(linear, in_dims=(1, None), out_dims=1)(x, bias)
    assert_close_to_float64(batched, x, dense, bias)
    _, along = torch.func.jvp(lambda x: linear(x, bias), (x,), (tangent,))
    assert_close_to_float64(along, tangent, dense)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        assert torch.equal(jacobian(linear)(x[0, 0], bias), dense.float())
    grad = torch.vmap(torch.func.grad(lambda x: linear(x, bias).sum()))(x)
    ones = torch.ones(4, 3, N)
    assert_close_to_float64(grad, ones, dense.t())


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_changes_neither_dtype_nor_value(compiled, dtype):
    """The dtype is what a compiled graph was told, and "exact" is of x's dtype."""
    stored, dense = weight()
    x, bias = numbers(5, K, dtype=dtype), numbers(N, seed=2)
    linear = partial(kernels.linear, shape=(N, K), precision="exact")
    if compiled:
        linear = torch.compile(linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear(x, *stored, bias)
    assert got.dtype == dtype
    assert_close_to_float64(got, x, dense, bias)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_modes_change_no_value(mode):
    w, x, bias = numbers(N, K), numbers(3, K).requires_grad_(), numbers(N).requires_grad_()
    qdata, scale = kernels.quantize(w)
    expected = kernels.linear(x, qdata, scale, bias, shape=(N, K))
    with mode():
        inside = kernels.quantize(w)
        got = kernels.linear(x, *inside, bias, shape=(N, K))
        value = kernels.dequantize(*inside, torch.float32, (N, K))
    assert expected.requires_grad
    assert not got.requires_grad
    assert torch.equal(got, expected)
    assert torch.equal(value, kernels.dequantize(qdata, scale, torch.float32, (N, K)))


def all_three(w, x, bias):
    shape = w.shape
    qdata, scale = kernels.quantize(w)
    value = kernels.dequantize(qdata, scale, x.dtype, shape)
    return qdata, scale, value, kernels.linear(x, qdata, scale, bias, shape=shape)


def assert_all_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_without_a_graph_break(dtype):
    given = numbers(N, K, dtype=dtype), numbers(2, 3, K, dtype=dtype), numbers(N)
    compiled = torch.compile(all_three, fullgraph=True, backend="aot_eager")
    assert_all_equal(compiled(*given), all_three(*given))


def test_one_compilation_serves_every_size():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(all_three, fullgraph=True, dynamic=True, backend=counter)
    for rows, cols, batch in ((70, 90, 3), (300, 130, 17), (64, 64, 5)):
        given = numbers(rows, cols), numbers(batch, cols), numbers(rows)
        assert_all_equal(compiled(*given), all_three(*given))
    assert counter.frame_count == 1


def test_compiled_gradients_are_those_of_eager():
    stored, _ = weight()

    def gradients(linear):
        x, bias = numbers(3, K).requires_grad_(), numbers(N).requires_grad_()
        linear(x, *stored, bias, shape=(N, K)).square().sum().backward()
        return x.grad, bias.grad

    compiled = torch.compile(kernels.linear, fullgraph=True, backend="aot_eager")
    assert_all_equal(gradients(compiled), gradients(kernels.linear))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["quantize", "dequantize", "linear", "linear with bias"])
def test_ops_are_registered_as_torch_wants_them(name, dtype):
    qdata, scale = kernels.quantize(numbers(40, 70))
    stored = qdata.view(torch.uint8), scale
    x, bias = numbers(3, 70, dtype=dtype).requires_grad_(), numbers(40).requires_grad_()
    op, args = {
        "quantize": (OPS.quantize, (numbers(40, 70, dtype=dtype),)),
        "dequantize": (OPS.dequantize, (*stored, dtype, 40, 70)),
        "linear": (OPS.linear, (x, *stored, None, 40, 70, "auto")),
        "linear with bias": (OPS.linear, (x, *stored, bias, 40, 70, "exact")),
    }[name]
    torch.library.opcheck(op.default, args)


# ---- every backend that runs here ------------------------------------------------------------


def here(shape, m_class="many", dtype=torch.bfloat16) -> list[str]:
    """The backends for those rows that take a weight [N, K] on this CPU, at their precision."""

    def takes(backend) -> bool:
        problem = records.Problem(CPU, dtype, backend.precision, m_class, shape, prepare="once")
        return backend.unsupported_reason(problem) is None

    return [backend.name for backend in records.BACKENDS if takes(backend)]


SIZES = [(1, 70, 96), (5, 300, 130), (64, 96, 320), (100, 257, 512)]
CASES = [(name, *size) for size in SIZES for name in here(size[1:])]


def forms(name, M, N, K, dtype=torch.bfloat16):
    """A named backend's path, and x, bias and stored weight of a problem."""
    x, bias = numbers(M, K, dtype=dtype), numbers(N, seed=2)
    stored, _ = weight(N, K)
    with kernels.use_backend(name):
        precision = dispatch.named(name).precision
        path = kernels.execution_path(x.device, dtype, precision, M, (N, K), prepare="once")
    return path, x, bias, stored


def test_plain_torch_and_the_oracles_run_everywhere():
    names = {name for name, *_ in CASES}
    assert names >= {"eager", "reference", "reference_mx", "reference_fp8", "reference_int8"}


@pytest.mark.parametrize(("name", "M", "N", "K"), CASES)
def test_every_backend_multiplies_as_the_oracle_does_what_its_steps_made(name, M, N, K):
    """Within the bound of `assert_close_to_float64`; sums of integers are exact."""
    path, x, bias, stored = forms(name, M, N, K)
    quantized, prepared = kernels.quantize_input(path, x), kernels.prepare_weight(path, *stored)
    actual = kernels.linear_prepared(path, x, prepared, bias, N, quantized)
    assert (actual.shape, actual.dtype) == ((M, N), x.dtype)
    assert torch.equal(kernels.linear_prepared(path, x, prepared, bias, N), actual)

    def product(bias):
        out = reference.matmul(
            path.weight_form, path.input_form, quantized, prepared, bias, torch.float64, N
        )
        return out[:M]

    expected, without = product(bias.to(x.dtype)), product(None)
    # Of the sum's terms: what rounding does to inputs changes their size by less than a fifth.
    size = 1.2 * x.double().abs() @ weight(N, K)[1].abs().t() + bias.abs()
    bound = (K + 2) * 2.0**-24 * size
    bound += ROUNDING[x.dtype] * (without.abs() + expected.abs())
    assert ((actual.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("name", here((70, 96), "one"))
def test_defaults_of_torch_change_no_bit(name, monkeypatch):
    """Constants that are kept, and buffers: a default device, or a default dtype that a loader of
    other models left behind."""
    backend = dispatch.named(name)
    path, x, bias, stored = forms(name, 5 if "many" in backend.m_classes else 1, 70, 96)
    x, bias = (x.float(), bias) if name == "eager" else (x, bias.to(x.dtype))
    prepare = next((s.run for s in backend.preparers if s.name == path.preparer), None)
    quantize = next((s.run for s in backend.quantizers if s.name == path.quantizer), None)

    def multiply():
        prepared = stored if prepare is None else prepare(*stored)
        quantized = (x,) if quantize is None else quantize(x)
        return *prepared, *quantized, backend.matmul(quantized, prepared, bias, x.dtype, 70)

    def forget():
        for kept in (int8._constants, int8._ones, reference.e4m3_magnitudes):
            kept.cache_clear()

    expected = multiply()
    forget()
    monkeypatch.setattr(int8, "_kept", threading.local())
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            got = multiply()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_all_equal(got, expected)
    forget()


@pytest.mark.parametrize("name", here((70, 96), "one"))
def test_operands_of_different_linears_are_refused(name):
    """Some backends would multiply a part of the weight, or repeat a bias of one value."""
    M = 5 if "many" in dispatch.named(name).m_classes else 1
    path, x, bias, stored = forms(name, M, 70, 96)
    prepared = kernels.prepare_weight(path, *stored)
    linear = partial(kernels.linear_prepared, path)
    assert linear(x, prepared, bias, 70).shape == (M, 70)
    for wrong in (
        (x[:, :64], prepared, bias, 70),
        (numbers(M, 128, dtype=x.dtype), prepared, bias, 70),
        (x, prepared, None, 97),
        (x, prepared, None, 64),
        (x, prepared, bias[:1], 70),
        (x, prepared, bias[:69], 70),
        (x, prepared, bias[None], 70),
    ):
        N, shape = wrong[-1], list(wrong[0].shape)
        with pytest.raises(ValueError) as error:
            linear(*wrong)
        message = str(error.value)
        assert f"x {shape} and N = {N} needs a {path.weight_form} weight of " in message
        assert "these are [96, 96] and " in message and "Pass what prepare_weight" in message


@pytest.mark.parametrize("name", here((70, 96), "one"))
def test_no_backend_looks_at_strides_ranks_or_the_start_of_x(name):
    M = 12 if "many" in dispatch.named(name).m_classes else 1
    path, x, bias, stored = forms(name, M, 70, 96)
    linear = partial(kernels.linear_prepared, path)
    prepared, scattered = kernels.prepare_weight(path, *stored), numbers(M, 192, dtype=x.dtype)
    expected = linear(x, prepared, bias, 70)
    scattered[:, ::2] = x
    later = torch.cat([x.new_zeros(5), x.flatten()])[5:].view(M, 96)
    for other in (x.t().contiguous().t(), scattered[:, ::2], later):
        assert torch.equal(linear(other, prepared, bias, 70), expected)
    row = linear(x[:1], prepared, bias, 70).expand(M, 70)
    assert torch.equal(linear(x[:1].expand(M, 96), prepared, bias, 70), row)
    for shape in ((M, 1), (1, M), (1, M, 1)):
        got = linear(x.view(*shape, 96), prepared, bias, 70)
        assert torch.equal(got, expected.view(*shape, 70))


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for dtype in FLOATS for name in here((70, 512), dtype=dtype)]
)
def test_nothing_overflows_and_nan_stays_where_it_is(name, dtype):
    """x at the end of float16's range; NaN and infinity in rows of x and of the weight."""
    N, K, largest = 70, 512, torch.finfo(torch.float16).max
    x = numbers(70, K).sign() * largest
    x[0] = largest
    weight = numbers(N, K, seed=1) / K
    stored = reference.quantize(weight)
    with kernels.use_backend(name):
        precision = dispatch.named(name).precision
        path = kernels.execution_path(CPU, dtype, precision, 70, (N, K), prepare="once")
    linear = partial(kernels.linear_prepared, path)
    exact = x.double() @ reference.dequantize_exact(*stored, N, K).t()
    got = linear(x.to(dtype), kernels.prepare_weight(path, *stored), None, N).double()
    assert got.isfinite().all()
    assert (got - exact).norm() < {"exact": 2.0**-8, "fast": 0.03}[precision] * exact.norm()

    x, weight = numbers(70, K), weight.clone()
    x[3, 5], x[4, 6], weight[7, 8] = torch.nan, torch.inf, torch.nan
    prepared = kernels.prepare_weight(path, *reference.quantize(weight))
    bad = torch.zeros(70, N, dtype=torch.bool)
    bad[3:5], bad[:, 7] = True, True
    assert torch.equal(~linear(x.to(dtype), prepared, None, N).isfinite(), bad)


@pytest.mark.parametrize("rows", [0, 1, 3, 70])
@pytest.mark.parametrize("shape", [(0, 64), (0, 256), (32, 0), (5, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_empty_weight_runs_exact(shape, rows, dtype):
    """Most of the steps of fast have no row to take the largest value of."""
    (N, K), stored = shape, reference.quantize(torch.empty(shape))
    path = kernels.execution_path(torch.device("cpu"), dtype, "fast", rows, shape, prepare="once")
    assert path.precision == "exact"
    x, bias = numbers(rows, K, dtype=dtype), numbers(N)
    got = kernels.linear_prepared(path, x, kernels.prepare_weight(path, *stored), bias, N)
    assert torch.equal(got, bias.to(dtype).expand(rows, N))


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_a_weight_that_is_none_is_not_prepared(precision):
    qdata, scale = reference.quantize(numbers(70, 96))
    path = kernels.execution_path(CPU, torch.float32, precision, 70, (70, 96), prepare="once")
    with pytest.raises(ValueError, match=r"scales have shape \[64, 4\]; data of shape \[96, 96\]"):
        kernels.prepare_weight(path, qdata, scale[:64])
    with pytest.raises(ValueError, match=r"qdata is torch\.float32; it must be one of"):
        kernels.prepare_weight(path, qdata.float(), scale)


def test_a_stored_weight_is_made_contiguous_as_kernels_read_it():
    (qdata, scale), _ = weight()
    path = kernels.execution_path(torch.device("cpu"), torch.float32, "exact", 5, (N, K))
    scattered = [part.view(torch.uint8).t().contiguous().t() for part in (qdata, scale)]
    for got, expected in zip(kernels.prepare_weight(path, *scattered), (qdata, scale), strict=True):
        assert got.is_contiguous() and torch.equal(got, expected.view(torch.uint8))


@pytest.mark.parametrize("name", here((70, 96), "one"))
def test_a_prepared_linear_runs_where_gradients_are_recorded(name):
    """It is not differentiable, and a layer's bias requires a gradient unless told otherwise."""
    M = 5 if "many" in dispatch.named(name).m_classes else 1
    path, x, bias, stored = forms(name, M, 70, 96)
    prepared = kernels.prepare_weight(path, *stored)
    expected = kernels.linear_prepared(path, x, prepared, bias, 70)
    for given in ((x, torch.nn.Parameter(bias)), (x.clone().requires_grad_(), bias)):
        got = kernels.linear_prepared(path, given[0], prepared, given[1], 70)
        assert torch.equal(got, expected)


FORMS = ["reference_mx", "reference_fp8", "reference_int8", "torch_bf16", "eager"]


@pytest.fixture
def anywhere(monkeypatch):
    """Unpacked weights are kept on any CPU."""
    monkeypatch.setattr(device_facts, "cpu_multiplies", lambda dtype: dtype == torch.bfloat16)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("op", ["prepare_weight", "quantize_input", "matmul"])
def test_the_ops_of_a_path_are_what_their_fakes_say(op, name, anywhere, forget):
    path, x, bias, stored = forms(name, 5, 70, 96)
    operands = kernels.quantize_input(path, x), kernels.prepare_weight(path, *stored)
    if op == "matmul":
        args = (*map(list, operands), bias.to(x.dtype), x.dtype, 70, path.backend)
    elif op == "prepare_weight" and path.preparer:
        args = (*stored, path.weight_form, path.preparer)
    elif op == "quantize_input" and path.quantizer:
        args = (x, path.input_form, path.quantizer)
    else:
        assert name in ("reference_mx", "torch_bf16", "eager")
        return
    # Its other checks multiply float8 tensors, which torch cannot.
    torch.library.opcheck(getattr(OPS, op).default, args, test_utils="test_faketensor")


@pytest.mark.parametrize("name", FORMS)
def test_a_prepared_linear_compiles_once_for_every_number_of_rows(name, anywhere, forget):
    path, x, bias, stored = forms(name, 70, 70, 96)
    prepared = kernels.prepare_weight(path, *stored)

    def siblings(x):
        quantized = kernels.quantize_input(path, x)
        return [kernels.linear_prepared(path, x, prepared, b, 70, quantized) for b in (bias, None)]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(siblings, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for M in (75, 80, 333):  # 160 rows need no padding
            x = numbers(2, M, 96, dtype=x.dtype, seed=M)
            assert_all_equal(compiled(x), siblings(x))
    assert counter.frame_count == 1


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace` is deprecated", "ignore::torch.jit.TracerWarning"
)
def test_a_plain_call_goes_past_the_ops_and_all_that_looks_sees_them(anywhere, forget, monkeypatch):
    path, x, bias, stored = forms("reference_int8", 5, 70, 96)
    prepared = kernels.prepare_weight(path, *stored)

    def linear(x):
        return kernels.linear_prepared(path, x, prepared, bias, 70)

    names = [f"{ops.NAMESPACE}.{name}.default" for name in ("quantize_input", "matmul")]
    with torch.no_grad():
        with Ops() as recorder:
            expected = linear(x)
        assert [name for name in recorder.names if name in names] == names
        traced = make_fx(linear)(x).graph.nodes
        assert [str(node.target) for node in traced if str(node.target) in names] == names
        graph = str(torch.jit.trace(linear, x, check_trace=False).graph)
        assert f"{ops.NAMESPACE}::matmul(" in graph
        with pytest.raises(RuntimeError, match=f"not implemented for {ops.NAMESPACE}::"):
            torch.vmap(linear)(x[:, None])
        out = kernels.linear_prepared(
            path, x.to("meta"), [t.to("meta") for t in prepared], None, 70
        )
        assert out.is_meta and out.shape == expected.shape
    monkeypatch.setattr(ops, "_ops", None)
    assert torch.equal(linear(x), expected)


X = torch.zeros(2, 96)
QDATA, SCALE = torch.zeros(64, 96, dtype=torch.uint8), torch.zeros(128, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 95)}, r"x has shape \[2, 95\]; its last size must be K = 96"),
        ({"x": torch.zeros(96, 2)}, r"x has shape \[96, 2\]; its last size must be K = 96"),
        ({"x": torch.tensor(1.0)}, r"x has shape \[\]; its last size must be K = 96"),
        ({"shape": (64, 95)}, r"x has shape \[2, 96\]; its last size must be K = 95"),
        ({"shape": (65, 96)}, r"shape \[65, 96\] pads to \[96, 96\]"),
        ({"x": X.double()}, "x is torch.float64; it must be one of float32, float16, bfloat16"),
        ({"x": X.to("meta")}, "x is on meta, the weight on cpu"),
        ({"bias": torch.zeros(96)}, r"bias has shape \[96\]; it must be \[64\]"),
        ({"bias": torch.zeros(1, 64)}, r"bias has shape \[1, 64\]; it must be \[64\]"),
        ({"bias": torch.zeros(64).cfloat()}, "bias is torch.complex64; it must be of a floating-"),
        ({"bias": torch.zeros(64, device="meta")}, "bias is on meta"),
        ({"precision": "exakt"}, "precision is 'exakt'; it must be one of auto, exact, fast"),
        ({"qdata": torch.zeros(64, 96)}, "qdata is torch.float32; it must be one of float8_e4m3fn"),
        ({"qdata": QDATA[:, :33]}, "must be 2-D with columns a multiple of 32"),
        ({"scale": SCALE.float()}, "scale is torch.float32; it must be one of uint8"),
        ({"scale": SCALE[:64]}, r"scales have shape \[64, 4\]; .* needs \[128, 4\]"),
        ({"scale": SCALE.to("meta")}, "the scales are on meta, the data on cpu"),
    ],
)
def test_what_does_not_belong_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        kernels.linear(**({"x": X, "qdata": QDATA, "scale": SCALE} | change))
