"""Choosing a backend: which ones support a problem, why others do not, and one choice per kind."""

import logging
import subprocess
import sys
import threading

import pytest
import torch

from mxfp8 import kernels
from mxfp8.kernels import dispatch
from mxfp8.kernels.backends import reference
from mxfp8.kernels.dispatch import Backend, BackendStatus, Problem


@pytest.fixture(autouse=True)
def no_earlier_choice(forget):
    """Each test chooses anew."""


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


X = numbers(7, 512)
STORED = reference.quantize(numbers(64, 512))


def oracle(precision):
    return reference.linear(X, *STORED, None, 64, 512, precision)


class Recorder:
    """Backends that record each problem, and do not support some precisions."""

    def __init__(self):
        self.asked = []

    def backend(self, name, unsupported=(), automatic=True):
        def unsupported_reason(problem):
            self.asked.append((name, problem))
            return f"{name} cannot" if problem.precision in unsupported else None

        def linear(x, qdata, scale, bias, rows, cols, precision):
            return torch.full((x.shape[0], rows), {"exact": 1.0, "fast": 2.0}[precision])

        return Backend(name, "made up", linear, unsupported_reason, automatic=automatic)


@pytest.fixture
def offer(monkeypatch):
    """offer(name=unsupported precisions, ...) replaces the backends and returns a Recorder."""

    def replace(**backends):
        recorder = Recorder()
        made = tuple(recorder.backend(*item) for item in backends.items())
        monkeypatch.setattr(dispatch, "BACKENDS", made)
        return recorder

    return replace


def ran(precision):
    """What the made-up backend ran as, at the precision asked for."""
    return {1.0: "exact", 2.0: "fast"}[float(kernels.linear(X, *STORED, precision=precision)[0, 0])]


def test_every_backend_is_listed_with_its_state():
    listed = {status.name: status for status in kernels.list_backends("cpu")}
    assert listed["eager"].available
    assert listed["eager"].reason == ""
    assert not listed["reference"].available
    assert "use_backend" in listed["reference"].reason
    assert list(listed) == [backend.name for backend in dispatch.BACKENDS]


@pytest.mark.parametrize(
    ("available", "reason", "text"),
    [(True, "", "a: does b (available)"), (False, "no c", "a: does b (not used: no c)")],
)
def test_a_state_prints_as_a_line(available, reason, text):
    assert str(BackendStatus("a", "does b", available, reason)) == text


@pytest.mark.parametrize(("cuda", "expected"), [(True, "cuda"), (False, "cpu")])
def test_the_list_is_for_the_gpu_where_there_is_one(cuda, expected, offer, monkeypatch):
    recorder = offer(a=())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    kernels.list_backends()
    assert [problem.device.type for _, problem in recorder.asked] == [expected]


def test_the_list_says_why_a_backend_is_not_used(offer):
    offer(a=("exact",), b=())
    assert [str(status) for status in kernels.list_backends("cpu")] == [
        "a: made up (not used: a cannot)",
        "b: made up (available)",
    ]


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_the_reference_runs_when_named(precision):
    with kernels.use_backend("reference"):
        got = kernels.linear(X, *STORED, precision=precision)
    assert torch.equal(got, oracle(precision))
    assert not torch.equal(oracle("exact"), oracle("fast"))


@pytest.mark.parametrize("name", ["torch_mx", "fp8", "triton_mx", "cute_mx"])
def test_a_backend_that_only_multiplies_leaves_the_rest_to_others(name, monkeypatch):
    made = [
        dispatch.replace(
            b, test=None,
            unsupported_reason=lambda problem: None if problem.precision == "fast" else "no",
            matmul=lambda x, w, bias, dtype, M, N: reference.linear(X, *w, bias, N, 512).to(dtype),
            linear=lambda x, q, s, bias, rows, cols, precision: reference.linear(
                x, q, s, bias, rows, cols
            ),
        ) if b.name == name else b for b in dispatch.BACKENDS
    ]  # fmt: skip
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(made))
    with kernels.use_backend(name):
        assert torch.equal(kernels.linear(X, *STORED, precision="auto"), oracle("exact"))
        assert torch.equal(kernels.quantize(X)[0].view(torch.uint8),
                           reference.quantize(X)[0].view(torch.uint8))  # fmt: skip
        x = X.clone().requires_grad_()
        kernels.linear(x, *STORED, precision="fast").sum().backward()
        assert x.grad is not None
        with pytest.raises(ValueError, match=r"takes linear of .* at precision 'exact'"):
            kernels.linear(X, *STORED, precision="exact")


def test_choosing_imports_no_compiler():
    code = "import sys, mxfp8.kernels.ops; print('torch._dynamo' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_the_reference_never_runs_unnamed():
    for precision in dispatch.PRECISIONS:
        assert dispatch.choose("linear", X, precision)[0].name != "reference"


def test_the_first_backend_that_supports_a_problem_is_chosen(offer):
    recorder = offer(a=("exact", "fast"), b=(), c=())
    assert ran("exact") == "exact"
    problem = Problem("linear", X.device, X.dtype, "exact", small_m=True)
    assert recorder.asked == [("a", problem), ("b", problem)]


def test_a_choice_is_made_once_per_kind_of_problem(offer):
    recorder = offer(a=())
    for _ in range(3):
        kernels.linear(X, *STORED, precision="exact")
    assert len(recorder.asked) == 1
    kernels.linear(X.bfloat16(), *STORED, precision="exact")
    assert len(recorder.asked) == 2


@pytest.mark.parametrize(
    ("first", "second", "asked", "expected"),
    [
        (("fast",), (), "auto", "fast"),
        (("fast",), ("fast",), "auto", "exact"),
        (("fast",), (), "exact", "exact"),
        ((), (), "fast", "fast"),
    ],
)
def test_auto_is_fast_where_any_backend_offers_it(first, second, asked, expected, offer):
    offer(a=first, b=second)
    assert ran(asked) == expected


def test_fast_without_a_fast_backend_runs_exact_and_says_so_once(offer, caplog):
    offer(a=("fast",))
    with caplog.at_level(logging.WARNING, logger="mxfp8.kernels"):
        assert [ran("fast") for _ in range(3)] == ["exact"] * 3
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "running exact instead of fast" in caplog.text


@pytest.mark.parametrize("precision", ["auto", "exact"])
def test_exact_gives_no_warning_unless_fast_was_requested(precision, offer, caplog):
    offer(a=("fast",))
    assert ran(precision) == "exact"
    assert caplog.records == []


def test_eager_runs_exact_when_fast_is_asked_of_it(caplog):
    with kernels.use_backend("eager"):
        exact = kernels.linear(X, *STORED, precision="exact")
        assert caplog.records == []
        assert torch.equal(kernels.linear(X, *STORED, precision="fast"), exact)
        assert torch.equal(kernels.linear(X, *STORED, precision="fast"), exact)
    assert len(caplog.records) == 1


def test_a_problem_that_no_backend_supports_is_an_error_every_time(offer):
    offer(a=("exact", "fast"), b=("exact", "fast"))
    message = r"takes linear of torch.float32 on cpu at precision 'auto': .*; b \(exact\): b cannot"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            kernels.linear(X, *STORED)


def test_a_forced_backend_without_support_is_an_error_though_others_have_it(offer):
    offer(a=("exact", "fast"), b=())
    with (
        kernels.use_backend("a"),
        pytest.raises(ValueError, match=r": a \(fast\): a cannot; a \(exact\): a cannot$"),
    ):
        kernels.linear(X, *STORED)
    assert ran("exact") == "exact"


def test_an_unknown_backend_raises_with_the_known_names(offer):
    offer(a=(), b=())
    message = "unknown backend 'quick'; choose one of: a, b"
    with pytest.raises(ValueError, match=message), kernels.use_backend("quick"):
        pass
    assert dispatch._forced is None


def test_leaving_a_context_restores_the_one_around_it():
    def chosen():
        return dispatch.choose("linear", X)[0].name

    automatic = chosen()
    with kernels.use_backend("reference"):
        with kernels.use_backend("eager"):
            assert chosen() == "eager"
        assert chosen() == "reference"
        with pytest.raises(KeyError), kernels.use_backend("eager"):
            raise KeyError
        assert chosen() == "reference"
    assert chosen() == automatic


def test_a_forced_backend_holds_in_every_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(dispatch.choose("linear", X)[0].name))
    with kernels.use_backend("reference"):
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_an_unknown_name_is_no_attribute_of_kernels():
    with pytest.raises(AttributeError, match="no attribute 'multiply'"):
        _ = kernels.multiply
