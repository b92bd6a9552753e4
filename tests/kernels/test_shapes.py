"""A path is tried at a model's shapes before it runs: what is wrong there is refused by name."""

import logging
import re
from dataclasses import replace

import pytest
import torch

from mxfp8 import kernels
from mxfp8.kernels import dispatch, self_test
from mxfp8.kernels.backends import reference

CPU = torch.device("cpu")
SHAPE, OTHER = (200, 512), (64, 512)


@pytest.fixture
def broken(prefer, monkeypatch):
    """broken(damage): a fast backend whose output, [M, N], is damaged; returns the rows it ran."""

    def insert(damage=lambda out: out, name="reference_int8", only_with_bias=False):
        prefer(name)
        backend, rows = dispatch.BACKENDS[0], []

        def matmul(quantized, prepared, bias, dtype, N):
            rows.append(quantized[0].shape[0])
            out = backend.matmul(quantized, prepared, bias, dtype, N)
            return out if only_with_bias and bias is None else damage(out)

        record = replace(backend, matmul=matmul, test=lambda device, dtype: None)
        monkeypatch.setattr(dispatch, "BACKENDS", (record, *dispatch.BACKENDS[1:]))
        return rows

    return insert


def path(shape=SHAPE, dtype=torch.bfloat16):
    return kernels.execution_path(CPU, dtype, "fast", None, shape, prepare="once")


def try_shape(shape=SHAPE, dtype=torch.bfloat16, bias=True):
    kernels.try_shape(CPU, dtype, "fast", shape, bias)


def last_tile(out):
    out[-1, -8:] += 100
    return out


def second_tile(out):
    out[128:160, 128:160] = out[:32, :32]
    return out


def nan(out):
    out[7, 7] = torch.nan
    return out


def raises(out):
    raise RuntimeError("an illegal instruction")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (raises, r"its self-test failed \(RuntimeError: an illegal instruction\)"),
        (last_tile, "with 300 rows of x, a part of its result is .* off"),
        (second_tile, "with 300 rows of x, a part of its result is .* off"),
        (nan, "with 300 rows of x, a part of its result is nan off"),
        (lambda out: out[:-1], r"it returns \[299, 200\] .* instead of \[300, 200\] "),
        (lambda out: out.float(), r"it returns .* torch.float32 instead of .* torch.bfloat16"),
    ],
)
def test_what_is_wrong_at_a_shape_is_refused_there(damage, message, broken, caplog):
    broken(damage)
    assert path().backend == path(OTHER).backend == "reference_int8"
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            try_shape()
    (warning,) = (r.getMessage() for r in caplog.records if "is not used for layers" in r.msg)
    assert warning.startswith("MXFP8: reference_int8 is not used for layers of 200 x 512 on cpu: ")
    assert path().backend != "reference_int8"
    assert re.search(message, dict(path().unsupported)["reference_int8"])
    assert path(OTHER).backend == path(dtype=torch.float16).backend == "reference_int8"
    with kernels.use_backend("reference_int8"):
        assert path().backend == "reference_int8"


@pytest.mark.parametrize("name", ["reference_mx", "reference_fp8", "reference_int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SHAPE, (33, 256)], ids=str)
def test_what_is_right_is_tried_once(name, dtype, shape, broken):
    rows = broken(name=name)
    for _ in range(2):
        try_shape(shape, dtype)
    assert len(rows) == len(self_test.ROWS_ON_CPUS)
    assert path(shape, dtype).backend == name


@pytest.mark.parametrize("damage", [last_tile, lambda out: out.zero_()])
def test_layers_with_a_bias_are_tried_with_one(damage, broken):
    broken(damage, only_with_bias=True)
    try_shape(bias=False)
    assert path().backend == "reference_int8"
    try_shape(bias=True)
    assert path().backend != "reference_int8"


@pytest.mark.parametrize("rows", [1, 300])
def test_a_step_that_a_pipeline_drops_shows(rows):
    weight = torch.randn(1024, 15360, generator=torch.Generator().manual_seed(0)).bfloat16()

    def linear(x, bias):
        return x @ weight.t()

    def dropping(x, bias):
        return x[:, :-64] @ weight[:, :-64].t()

    assert self_test.at_shape(linear, weight, False, rows, None) is None
    for form in self_test._AT_SHAPE:
        assert f"with {rows} rows of x" in self_test.at_shape(dropping, weight, False, rows, form)


def test_one_value_may_be_next_to_zero():
    x, weight = (torch.randn(1, 256, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    weight -= weight @ x.t() / (x @ x.t()) * x  # x as `at_shape` draws it

    def quantizing(x, bias):
        code, scale = reference.quantize_rowwise(x)
        return code.float() * scale[:, None] @ weight.t()

    assert self_test.at_shape(quantizing, weight, False, 1, "rowwise_fp8") is None


@pytest.mark.parametrize("wrong_at", [1, 40])
def test_few_rows_on_a_prepared_weight_are_tried_too(wrong_at, broken, monkeypatch):
    monkeypatch.setattr(self_test, "ROWS_ON_CPUS", self_test.ROWS[:3])
    broken(lambda out: out * (2 if out.shape[0] == wrong_at else 1))
    try_shape()
    assert path().backend != "reference_int8"


def test_one_after_the_other_is_refused_until_plain_torch(monkeypatch, forget):
    wrong = [
        replace(b, matmul=lambda *operands: raises(None), test=lambda device, dtype: None)
        for b in dispatch.BACKENDS
        if b.name.startswith("reference_")
    ]
    wrong = [replace(b, automatic=True, m_classes=("many",)) for b in wrong]
    plain = [b for b in dispatch.BACKENDS if b.name == "eager"]
    monkeypatch.setattr(dispatch, "BACKENDS", (*wrong, *plain))
    forget()
    try_shape()
    assert path().backend == "eager"
    assert [name for name, _ in path().unsupported] == [b.name for b in wrong]


def test_another_thread_may_refuse_at_the_same_time(broken, monkeypatch):
    class Paths(dict):
        def __iter__(self):
            known = list(super().__iter__())
            self.clear()
            return iter(known)

    broken(raises)
    monkeypatch.setattr(dispatch, "_paths", Paths())
    try_shape()
    assert path().backend != "reference_int8"


def test_what_is_named_is_not_tried(broken, monkeypatch):
    monkeypatch.setattr(self_test, "ROWS_ON_CPUS", self_test.ROWS[:3])
    rows = broken(last_tile)
    with kernels.use_backend("reference_int8"):
        try_shape()
    assert not rows and path().backend == "reference_int8"


@pytest.mark.parametrize("shape", [(0, 32), (32, 0)], ids=str)
def test_an_empty_weight_is_not_tried(shape, prefer, monkeypatch):
    prefer("reference")
    first = replace(dispatch.BACKENDS[0], test=lambda device, dtype: None)
    monkeypatch.setattr(dispatch, "BACKENDS", (first, *dispatch.BACKENDS[1:]))
    try_shape(shape)
    assert path(shape).backend == "reference"


@pytest.mark.parametrize("shape", [(1, 1), (33, 31), (96, 288)], ids=str)
def test_the_weight_that_is_tried_is_one(shape):
    qdata, scale = self_test.random_weight(*shape, CPU)
    value = reference.dequantize(qdata, scale, torch.float32, *qdata.shape)
    assert value.isfinite().all()
    assert not value[shape[0] :].any() and not value[:, shape[1] :].any()
    assert 0 < value[: shape[0], : shape[1]].abs().max() <= 448 * 2.0**-12


def test_without_memory_nothing_is_refused(broken):
    def full(out):
        raise RuntimeError("CUDA out of memory")

    rows = broken(full)
    for _ in range(2):
        try_shape()
    assert len(rows) == 2 and path().backend == "reference_int8"


def test_trying_draws_no_random_numbers_from_anyone(broken):
    broken()
    before = torch.random.get_rng_state()
    try_shape()
    assert torch.equal(torch.random.get_rng_state(), before)
