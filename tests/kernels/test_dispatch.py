"""Choosing a path: what runs a problem, why the rest does not, and one choice per kind of it."""

import errno
import logging
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from cards import CARDS
from torch._subclasses import FakeTensorMode

from mxfp8 import kernels
from mxfp8.kernels import device_facts, dispatch, records, self_test
from mxfp8.kernels.backends import fp8_rowwise, int8, reference
from mxfp8.kernels.backends.cute import mx
from mxfp8.kernels.dispatch import BackendStatus
from mxfp8.kernels.records import Backend, Problem, Step


@pytest.fixture(autouse=True)
def no_earlier_choice(forget):
    """Each test chooses anew."""


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


X = numbers(70, 512)
STORED = reference.quantize(numbers(64, 512))
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def oracle(precision, x=X):
    form, quantized = (None, (x,)) if precision == "exact" else ("mxfp8", reference.quantize(x))
    return reference.matmul("stored", form, quantized, STORED, None, x.dtype, 64)[: len(x)]


class Made:
    """Made-up backends, which record what they are asked."""

    def __init__(self):
        self.asked = []

    def backend(self, name, precision, reason=None, **rest):
        """Its results are 1 if it is exact and 2 if it is fast."""

        def unsupported_reason(problem):
            self.asked.append((name, problem))
            return reason

        def matmul(quantized, prepared, bias, dtype, N):
            return torch.full((quantized[0].shape[0], N), {"exact": 1.0, "fast": 2.0}[precision])

        return Backend(
            name, "made up", precision, matmul, unsupported_reason=unsupported_reason, **rest
        )


@pytest.fixture
def offer(monkeypatch):
    """offer(name=precision, or (precision, why it cannot), ...) replaces the backends; a `Made`."""

    def offer(**backends):
        made = Made()
        both = ((name, (p,) if isinstance(p, str) else p) for name, p in backends.items())
        records = tuple(made.backend(name, *parts) for name, parts in both)
        monkeypatch.setattr(dispatch, "BACKENDS", records)
        return made

    return offer


def ran(precision, x=X):
    """What the made-up backend ran as, at the precision asked for."""
    return {1.0: "exact", 2.0: "fast"}[float(kernels.linear(x, *STORED, precision=precision)[0, 0])]


def chosen(precision="auto", rows=None, device=CPU, dtype=torch.bfloat16, **rest) -> str:
    return kernels.execution_path(device, dtype, precision, rows, **rest).backend


# ---- what there is ---------------------------------------------------------------------------


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
    made = offer(a="exact")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(device_facts, "capability", lambda device: None)
    kernels.list_backends()
    assert [problem.device.type for _, problem in made.asked] == [expected]


def test_the_list_says_why_a_backend_is_not_used(offer):
    offer(a=("exact", "a cannot"), b="exact")
    assert [str(status) for status in kernels.list_backends("cpu")] == [
        "a: made up (not used: a cannot)",
        "b: made up (available)",
    ]


def test_a_description_has_a_line_for_each_precision(offer, monkeypatch):
    offer(a="exact", b="fast")
    assert kernels.describe_paths("cpu") == [
        "auto: b (fast)", "exact: a (exact)", "fast: b (fast)",
    ]  # fmt: skip
    made = Made()
    few = made.backend("a", "exact", m_classes=("one", "few"))
    monkeypatch.setattr(dispatch, "BACKENDS", (few, made.backend("b", "exact")))
    dispatch.forget()
    assert (
        kernels.describe_paths("cpu")[1] == "exact: up to 64 rows: a (exact), more rows: b (exact)"
    )


@pytest.mark.parametrize(
    ("precision", "name"), [("exact", "reference"), ("fast", "reference_mx"), ("auto", "both")]
)
def test_the_oracles_run_when_named(precision, name):
    names = ("reference", "reference_mx") if name == "both" else (name,)
    with kernels.use_backend(*names):
        got = kernels.linear(X, *STORED, precision=precision)
    assert torch.equal(got, oracle("fast" if precision == "auto" else precision))
    assert not torch.equal(oracle("exact"), oracle("fast"))


def test_the_oracles_never_run_unnamed():
    for precision in dispatch.PRECISIONS:
        for rows in (1, 5, None):
            assert not chosen(precision, rows, prepare="once").startswith("reference")


# With steps in plain torch, which E4M3fnuz has not.
FAST = [b.name for b in records.BACKENDS if b.precision == "fast" and b.name != "triton_fnuz"]


@pytest.mark.parametrize("name", FAST)
def test_a_fast_backend_that_is_named_multiplies_and_leaves_the_rest_to_others(name, monkeypatch):
    """It takes any number of rows, and the forms that it needs are made on every call."""
    backend = dispatch.named(name)
    matmul = partial(reference.matmul, backend.weight_form, backend.input_form)
    simulated = replace(backend, matmul=matmul, unsupported_reason=lambda problem: None, test=None)
    made = tuple(simulated if b.name == name else b for b in dispatch.BACKENDS)
    monkeypatch.setattr(dispatch, "BACKENDS", made)
    with kernels.use_backend(name):
        for x in (X, X[:1]):
            path = kernels.execution_path(CPU, x.dtype, "auto", len(x), prepare="each call")
            operands = kernels.quantize_input(path, x), kernels.prepare_weight(path, *STORED)
            expected = matmul(*operands, None, x.dtype, 64)[: len(x)]
            assert torch.equal(kernels.linear(x, *STORED, precision="auto"), expected)
        assert torch.equal(kernels.quantize(X)[0].view(torch.uint8),
                           reference.quantize(X)[0].view(torch.uint8))  # fmt: skip
        x = X.clone().requires_grad_()
        kernels.linear(x, *STORED, precision="fast").sum().backward()
        assert x.grad is not None
        with pytest.raises(ValueError, match=r"takes a linear of .* at precision 'exact'"):
            kernels.linear(X, *STORED, precision="exact")


def test_choosing_imports_no_compiler():
    code = "import sys, mxfp8.kernels.ops; print('torch._dynamo' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_an_unknown_name_is_no_attribute_of_kernels():
    with pytest.raises(AttributeError, match="no attribute 'multiply'"):
        _ = kernels.multiply


# ---- one choice for each kind of problem -----------------------------------------------------


def test_the_first_backend_that_supports_a_problem_is_chosen(offer):
    made = offer(a=("exact", "a cannot"), b="exact", c="exact")
    path = kernels.execution_path(CPU, torch.float32, "exact", 7, (64, 512))
    assert (path.backend, path.unsupported) == ("b", (("a", "a cannot"),))
    problem = Problem(CPU, torch.float32, "exact", "few", (64, 512))
    assert made.asked == [("a", problem), ("b", problem)]


KIND = {
    "device": (torch.device("cpu", 0),),
    "dtype": (torch.bfloat16,),
    "precision": ("exact", "fast"),
    "rows": (1, 64),
    "shape": ((64, 512), None),
    "weight_form": ("bf16",),
    "prepare": ("each call", "once"),
}


def test_a_path_is_chosen_once_for_each_kind_of_problem(monkeypatch):
    made = Made()
    backends = tuple(made.backend(form, "exact", weight_form=form) for form in ("stored", "bf16"))
    monkeypatch.setattr(dispatch, "BACKENDS", backends)
    first = {
        "device": CPU, "dtype": torch.float32, "precision": "auto", "rows": 70, "shape": (32, 32)
    }  # fmt: skip
    kinds = [first, *({**first, name: v} for name, values in KIND.items() for v in values)]
    paths = [kernels.execution_path(**kind) for kind in kinds]
    problems = {problem for _, problem in made.asked}
    assert len(problems) == len(kinds) == 12
    asked = len(made.asked)
    assert all(kernels.execution_path(**k) is p for k, p in zip(kinds, paths, strict=True))
    for rows in (65, 4096, None):
        assert kernels.execution_path(**{**first, "rows": rows}) is paths[0]
    assert len(made.asked) == asked
    with kernels.use_backend("stored"):
        kernels.execution_path(**first)
    assert len(made.asked) == asked + 1


def test_a_forward_asks_no_one_again(offer):
    made = offer(a="exact")
    for rows in (70, 3000, 70):
        kernels.linear(numbers(rows, 512), *STORED, precision="exact")
    assert len(made.asked) == 1
    kernels.linear(X[:5], *STORED, precision="exact")
    assert len(made.asked) == 2


@pytest.mark.parametrize(
    ("first", "second", "asked", "expected"),
    [
        ("exact", "fast", "auto", "fast"),
        ("exact", ("fast", "cannot"), "auto", "exact"),
        ("exact", "fast", "exact", "exact"),
        ("fast", "exact", "fast", "fast"),
    ],
)
def test_auto_is_fast_where_any_backend_offers_it(first, second, asked, expected, offer):
    offer(a=first, b=second)
    assert ran(asked) == expected


@pytest.mark.parametrize("rows", [1, 64])
def test_few_rows_are_for_the_backends_that_take_them(rows, offer, monkeypatch, caplog):
    made = Made()
    many = made.backend("many", "fast", m_classes=("many",))
    monkeypatch.setattr(dispatch, "BACKENDS", (many, made.backend("a", "exact")))
    assert ran("fast", X[:rows]) == "exact"
    assert ran("fast", X[:65]) == "fast"
    assert caplog.records == []
    with kernels.use_backend("many"):
        assert ran("fast", X[:rows]) == "fast"


# ---- running exact instead of fast, and errors -----------------------------------------------


def test_fast_without_a_fast_backend_runs_exact_and_says_so_once(offer, caplog):
    offer(a=("fast", "a cannot"), b="exact")
    with caplog.at_level(logging.WARNING, logger="mxfp8.kernels"):
        assert [ran("fast") for _ in range(3)] == ["exact"] * 3
        assert ran("fast", X.bfloat16()) == "exact"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "running exact instead of fast on cpu. a: a cannot." in caplog.text


def test_a_layer_whose_shape_is_not_for_fast_gives_no_warning(monkeypatch, caplog):
    def unsupported_reason(problem):
        return "K is odd" if problem.shape and problem.shape[1] % 2 else cannot

    made = Made()
    fast = replace(made.backend("f", "fast"), unsupported_reason=unsupported_reason)
    monkeypatch.setattr(dispatch, "BACKENDS", (fast, made.backend("a", "exact")))
    for cannot in (None, "it cannot"):
        dispatch.forget()
        path = kernels.execution_path(CPU, X.dtype, "fast", shape=(64, 35), prepare="once")
        assert (path.backend, path.unsupported) == ("a", (("f", "K is odd"),))
        assert len(caplog.records) == (cannot is not None)
    assert "running exact instead of fast on cpu. f: it cannot." in caplog.text


@pytest.mark.parametrize("precision", ["auto", "exact"])
def test_exact_gives_no_warning_unless_fast_was_requested(precision, offer, caplog):
    offer(a=("fast", "a cannot"), b="exact")
    assert ran(precision) == "exact"
    assert caplog.records == []


def test_a_weight_at_hand_that_runs_exact_gives_no_warning(offer, caplog):
    """Who loaded it was told."""
    offer(a=("fast", "a cannot"), b="exact")
    assert chosen("fast", prepare="never") == "b"
    assert caplog.records == []


def test_eager_runs_exact_when_fast_is_asked_of_it(caplog):
    with kernels.use_backend("eager"):
        exact = kernels.linear(X, *STORED, precision="exact")
        assert caplog.records == []
        assert torch.equal(kernels.linear(X, *STORED, precision="fast"), exact)
        assert torch.equal(kernels.linear(X, *STORED, precision="fast"), exact)
    (record,) = caplog.records
    assert "Those that are named are exact" in record.getMessage()


def test_a_problem_that_no_backend_supports_is_an_error_every_time(offer):
    offer(a=("fast", "a cannot"), b=("exact", "b cannot"))
    message = r"takes a linear of torch.float32 on cpu at precision 'auto' .*: a: a cannot; b: b"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            kernels.linear(X, *STORED)


def test_a_forced_backend_without_support_is_an_error_though_others_have_it(offer):
    offer(a=("exact", "a cannot"), b="exact")
    with kernels.use_backend("a"), pytest.raises(ValueError, match=r": a: a cannot$"):
        kernels.linear(X, *STORED)
    assert ran("exact") == "exact"


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ({"precision": "quick"}, "precision is 'quick'; it must be one of auto, exact, fast"),
        ({"dtype": torch.float64}, "x's dtype is torch.float64; it must be one of float32, "),
        ({"prepare": "twice"}, "prepare is 'twice'; it must be one of never, each call, once"),
    ],
)
def test_a_problem_that_there_is_not_is_refused(problem, words):
    problem = {"device": CPU, "dtype": torch.float32, "precision": "exact", **problem}
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            kernels.execution_path(**problem)


def test_an_unknown_backend_raises_with_the_known_names(offer):
    offer(a="exact", b="fast")
    message = "unknown backend 'quick'; choose one of: a, b"
    with pytest.raises(ValueError, match=message), kernels.use_backend("a", "quick"):
        pass
    assert dispatch._forced == ()


def test_leaving_a_context_restores_the_one_around_it():
    automatic = chosen("exact")
    with kernels.use_backend("reference"):
        with kernels.use_backend("eager"):
            assert chosen("exact") == "eager"
        assert chosen("exact") == "reference"
        with pytest.raises(KeyError), kernels.use_backend("eager"):
            raise KeyError
        assert chosen("exact") == "reference"
    assert chosen("exact") == automatic


def test_contexts_of_threads_may_overlap():
    automatic = chosen("exact")
    first, second = kernels.use_backend("reference"), kernels.use_backend("eager")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert chosen("exact") == "eager"
    second.__exit__(None, None, None)
    assert chosen("exact") == automatic


def test_a_forced_backend_holds_in_every_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(chosen("exact")))
    with kernels.use_backend("reference"):
        thread.start()
        thread.join()
    assert seen == ["reference"]


# ---- weights at hand -------------------------------------------------------------------------


def test_a_form_is_prepared_as_often_as_the_caller_allows(monkeypatch):
    made = Made()
    slow, quick = Step("slow", reference.to_rowwise, one_pass=False), Step("quick", lambda: None)

    def offered(*steps):
        fast = made.backend("fast", "fast", weight_form="rowwise_fp8", preparers=steps)
        monkeypatch.setattr(dispatch, "BACKENDS", (fast, made.backend("a", "exact")))
        dispatch.forget()
        paths = [kernels.execution_path(CPU, X.dtype, "auto", prepare=prepare)
                 for prepare in ("never", "each call", "once")]  # fmt: skip
        return [(path.backend, path.preparer) for path in paths]

    assert offered(slow) == [("a", None), ("a", None), ("fast", "slow")]
    assert offered(slow, quick) == [("a", None), ("fast", "quick"), ("fast", "slow")]
    reasons = kernels.execution_path(CPU, X.dtype, "auto").unsupported
    assert reasons == (("fast", "needs a weight prepared as rowwise_fp8"),)


@pytest.mark.parametrize("rows", [1, 5, None])
@pytest.mark.parametrize(
    ("name", "weight_form", "expected"),
    [
        ("Hopper", "rowwise_fp8", "torch_fp8"),
        ("Ada", "rotated_int8", "kitchen_int8"),
        ("GeForce 50", "rotated_int8", "kitchen_int8"),
    ],
)
def test_a_weight_at_hand_is_multiplied_whatever_m_is(name, weight_form, expected, rows, card):
    card(CARDS[name], kitchen=None)
    path = kernels.execution_path(GPU, torch.bfloat16, "auto", rows, weight_form=weight_form)
    assert (path.backend, path.weight_form, path.preparer) == (expected, weight_form, None)
    with pytest.raises(ValueError, match=f"with a weight that is {weight_form}"):
        kernels.execution_path(GPU, torch.bfloat16, "exact", rows, weight_form=weight_form)


@pytest.mark.parametrize("M", [1, 3, 100])
@pytest.mark.parametrize("form", ["rowwise_fp8", "rotated_int8", "bf16", "mxfp8"])
def test_a_prepared_weight_and_a_shared_input_are_used_as_given(form, M):
    """By the oracle of the form: every N' and M' may be more than N and M."""
    name = {"rowwise_fp8": "reference_fp8", "rotated_int8": "reference_int8", "bf16": "torch_bf16",
            "mxfp8": "reference_mx"}[form]  # fmt: skip
    x, bias = numbers(2, M, 96).bfloat16(), numbers(70)
    stored = reference.quantize(numbers(70, 96))
    problem = CPU, x.dtype, "fast"
    with kernels.use_backend(name):
        weight_form = "stored" if form == "mxfp8" else form
        path = kernels.execution_path(*problem, 2 * M, weight_form=weight_form)
        if form == "bf16":
            prepared = (reference.dequantize(*stored, torch.bfloat16, 96, 96),)
        else:
            prepared = self_test._PREPARE[weight_form](*stored)
        quantized = kernels.quantize_input(path, x)
        out = kernels.linear_prepared(path, x, prepared, bias, 70)
        expected = reference.matmul(
            path.weight_form, path.input_form, quantized, prepared, bias.bfloat16(), x.dtype, 70
        )[: 2 * M].reshape(2, M, 70)  # fmt: skip
        torch.testing.assert_close(out, expected, rtol=2.0**-7, atol=1e-5)
        assert out.is_contiguous() and out.dtype == x.dtype
        nothing = torch.full_like(x, torch.nan)
        again = kernels.linear_prepared(path, nothing, prepared, bias, 70, quantized)
        assert torch.equal(again, out)


# ---- quantizers on GPUs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("triton", "kitchen", "fails", "expected"),
    [
        (None, None, (), "triton"),
        ("no Triton", None, (), "kitchen"),
        (None, None, ("triton",), "kitchen"),
        ("no Triton", "no kernels", (), None),
        ("no Triton", None, ("kitchen",), None),
    ],
)
def test_a_fast_matmul_on_a_gpu_has_a_quantizer_of_one_pass(triton, kitchen, fails, expected, card):
    card((12, 0), triton, kitchen=kitchen, fails=fails)
    path = kernels.execution_path(GPU, torch.bfloat16, "auto", prepare="once")
    if expected is not None:
        assert (path.backend, path.quantizer) == ("torch_mx", expected)
        return
    assert (path.backend, path.precision, path.quantizer) == ("eager", "exact", None)
    reasons = dict(path.unsupported)
    assert reasons["torch_mx"].startswith("nothing here quantizes inputs in one pass (triton: ")
    listed = {status.name: status for status in kernels.list_backends(GPU)}
    assert listed["torch_mx"].reason == reasons["torch_mx"]
    with kernels.use_backend("torch_mx"):  # whoever names it knows
        path = kernels.execution_path(GPU, torch.bfloat16, "fast")
    assert path.quantizer == "eager"


def test_an_input_too_wide_for_the_quantizer_runs_exact(card):
    card((9, 0))
    options = {"precision": "auto", "prepare": "once"}
    assert chosen(device=GPU, shape=(64, 4096), **options) == "torch_fp8"
    path = kernels.execution_path(GPU, torch.bfloat16, shape=(64, 65536), **options)
    assert path.precision == "exact"
    assert "holds a row of x in registers" in dict(path.unsupported)["torch_fp8"]


# ---- which comes first -----------------------------------------------------------------------


def order(device=GPU, **rest) -> list[str]:
    """The fast backends in the order in which they are tried."""
    problem = Problem(device, torch.bfloat16, "fast", prepare="once", **rest)
    return [b.name for b in dispatch._candidates(problem, ()) if b.precision == "fast"]


def test_hopper_tries_fp8_before_int8(card):
    card(CARDS["Hopper"], kitchen=None)
    names = order()
    assert names.index("torch_fp8") < names.index("triton_fp8") < names.index("kitchen_int8")
    assert chosen(device=GPU, prepare="once") == "torch_fp8"
    card(CARDS["Hopper"], kitchen=None, fails=("torch_fp8", "triton_fp8"))
    assert chosen(device=GPU, prepare="once") == "kitchen_int8"


def test_other_cards_try_int8_before_fp8(card):
    card(CARDS["Ada"], kitchen=None)
    names = order()
    assert names.index("kitchen_int8") < names.index("torch_fp8") < names.index("triton_fp8")
    assert chosen(device=GPU, prepare="once") == "kitchen_int8"


@pytest.mark.parametrize("capability", [(10, 0), (12, 0), (13, 7)])
def test_cards_with_block_scales_run_int8_only_when_it_is_named(capability, card):
    card(capability, kitchen=None, fails=("torch_mx", "triton_fp8"))
    path = kernels.execution_path(GPU, torch.bfloat16, "auto", prepare="once")
    assert path.precision == "exact"
    assert "when it is named" in dict(path.unsupported)["kitchen_int8"]
    with kernels.use_backend("kitchen_int8"):
        assert chosen(device=GPU, prepare="once") == "kitchen_int8"


def test_few_rows_run_as_many_do_where_plain_torch_would_unpack_the_weight(card):
    card((12, 0), kitchen=None)
    assert chosen("auto", 1, device=GPU) == "triton_w8a16"
    card((12, 0), "needs Triton", kitchen=None)
    assert chosen("auto", 1, device=GPU) == chosen("fast", 64, device=GPU) == "torch_mx"
    assert chosen("exact", 1, device=GPU) == "eager"
    card((8, 6), "needs Triton", kitchen=None)  # there a weight would have to be prepared
    assert chosen("auto", 1, device=GPU) == "eager"
    assert chosen("auto", 1, device=GPU, prepare="once") == "eager"


def test_a_cpu_runs_int8_when_fast_is_asked_for(monkeypatch):
    """And auto stays exact there, where it is not so much faster as to change results unasked."""
    quick = replace(dispatch.named("int8"), unsupported_reason=lambda problem: None, test=None)
    made = tuple(quick if b.name == "int8" else b for b in dispatch.BACKENDS)
    monkeypatch.setattr(dispatch, "BACKENDS", made)
    for rows in (2, 64, None):
        assert chosen("fast", rows, prepare="once") == "int8"
        path = kernels.execution_path(CPU, torch.bfloat16, "auto", rows, prepare="once")
        assert path.precision == "exact"
        assert dict(path.unsupported)["int8"] == "on a CPU, auto stays exact"
        assert chosen("auto", rows, weight_form="rotated_int8") == "int8"


# ---- self-tests ------------------------------------------------------------------------------


class SelfTest:
    """One that says or raises one thing after another."""

    def __init__(self, *outcomes):
        self.outcomes, self.runs = list(outcomes), []

    def __call__(self, device, dtype):
        self.runs.append((device, dtype))
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def with_self_test(monkeypatch, *outcomes):
    """A fast backend whose quantizer has such a self-test, before an exact backend."""
    test, made = SelfTest(*outcomes), Made()
    step = Step("step", reference.quantize, test=test)
    fast = [
        made.backend(name, "fast", input_form="mxfp8", quantizers=(step,)) for name in ("f", "g")
    ]
    monkeypatch.setattr(dispatch, "BACKENDS", (*fast, made.backend("a", "exact")))
    return test


def test_there_is_one_verdict_for_a_step_a_device_and_a_dtype(monkeypatch, caplog):
    test = with_self_test(monkeypatch, "it is wrong")
    for precision in ("auto", "fast"):
        for rows in (1, None):
            path = kernels.execution_path(CPU, torch.float32, precision, rows)
            assert path.backend == "a"
            reason = "nothing here quantizes inputs in one pass (step: it is wrong)"
            assert dict(path.unsupported) == {"f": reason, "g": reason}
    assert test.runs == [(CPU, torch.float32)]
    assert next(r.getMessage() for r in caplog.records if "step" in r.getMessage()) == (
        "MXFP8: step is not used on cpu: it is wrong."
    )
    assert chosen() == "a"
    assert test.runs == [(CPU, torch.float32), (CPU, torch.bfloat16)]


def test_steps_that_several_backends_use_are_the_same_step():
    """So that they are tested once."""
    quantizers = {}
    for backend in records.BACKENDS:
        for step in (*backend.quantizers, *backend.preparers):
            form = backend.input_form if step in backend.quantizers else backend.weight_form
            quantizers.setdefault((form, step.name, step in backend.quantizers), set()).add(step)
    assert all(len(steps) == 1 for steps in quantizers.values())


def test_an_exception_in_a_self_test_is_a_reason(monkeypatch):
    test = with_self_test(monkeypatch, RuntimeError("no kernel image\nat line 3"))
    for _ in range(2):
        path = kernels.execution_path(CPU, torch.float32, "auto")
    reason = "its self-test failed (RuntimeError: no kernel image)"
    assert reason in dict(path.unsupported)["f"]
    assert len(test.runs) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling cublasCreate(handle)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        Exception("DSLCudaRuntimeError: CUDA_ERROR_OUT_OF_MEMORY"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        MemoryError(),
    ],
    ids=str,
)
def test_a_self_test_without_memory_says_nothing_and_is_run_again(error, monkeypatch):
    test = with_self_test(monkeypatch, error, None)
    with pytest.raises((torch.OutOfMemoryError, MemoryError)):
        chosen()
    assert chosen() == "f"
    assert len(test.runs) == 2


class PagingError(OSError):
    winerror = 1455


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        PagingError(22, "The paging file is too small"),
        ImportError("DLL load failed while importing libtriton: The paging file is too small for"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("what", ["triton", "cutlass"])
def test_no_memory_to_import_an_optional_package_is_not_a_verdict(what, error, monkeypatch):
    ask = {
        "triton": device_facts.triton_unsupported_reason, "cutlass": mx.dsl_unsupported_reason,
    }[what]  # fmt: skip
    ask.cache_clear()
    with monkeypatch.context() as full:

        def fail(name):
            raise error

        full.setattr(device_facts, "import_module", fail)
        with pytest.raises(type(error)):
            ask()
    reason = ask()
    assert reason is None or reason.startswith("needs ")


@pytest.mark.parametrize("around", [FakeTensorMode, partial(torch.device, "meta")])
def test_a_verdict_does_not_depend_on_who_asks_first(around):
    """Nor does what is kept: tensors without values would stay in the constants of a backend."""
    for name in ("reference_int8", "int8", "reference_fp8", "eager"):
        reference.e4m3_magnitudes.cache_clear()
        int8._constants.cache_clear()
        backend = dispatch.named(name)
        test = (
            self_test.exact(backend.matmul, (5,))
            if name == "eager"
            else self_test.matmul(backend.matmul, backend.weight_form, backend.input_form)
        )
        for _ in range(2):
            with around():
                assert self_test.verdict(name, test, CPU, torch.bfloat16) == (None, True)
            self_test.forget()
        assert test(CPU, torch.bfloat16) is None


def test_while_a_graph_is_captured_nothing_is_tested_or_kept(monkeypatch):
    test = with_self_test(monkeypatch, "it is wrong")
    with monkeypatch.context() as capturing:
        capturing.setattr(device_facts, "capturing", lambda: True)
        assert chosen() == "f"
        assert test.runs == []
    assert chosen() == "a"
    with monkeypatch.context() as capturing:
        capturing.setattr(device_facts, "capturing", lambda: True)
        assert chosen() == "a"
    assert len(test.runs) == 1


def test_who_quantizes_is_chosen_once_and_not_while_a_graph_is_captured(monkeypatch):
    test = SelfTest("it is wrong")
    steps = Step("step", reference.quantize, test=test), Step("last", reference.quantize)

    def choose():
        return dispatch.choose_step(steps, CPU, torch.float32).name

    with monkeypatch.context() as capturing:
        capturing.setattr(device_facts, "capturing", lambda: True)
        assert choose() == "step"
    assert [choose(), choose()] == ["last", "last"]
    assert len(test.runs) == 1


@pytest.mark.parametrize("name", ["reference_mx", "reference_fp8", "reference_int8"])
def test_the_oracles_pass_the_self_tests_and_what_is_wrong_does_not(name):
    backend = dispatch.named(name)
    forms = backend.weight_form, backend.input_form
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert self_test.matmul(backend.matmul, *forms)(CPU, dtype) is None

    def wrong(*arguments):
        return backend.matmul(*arguments) * 1.1

    assert "off" in self_test.matmul(wrong, *forms)(CPU, torch.bfloat16)


def test_self_tests_of_rotated_int8_allow_ties_alone():
    def altered(run, change):
        def wrong(*arguments):
            codes, scale = run(*arguments)
            return change(codes, scale)

        return wrong

    changes = (
        lambda codes, scale: (codes, scale * (1 + 2.0**-14)),
        lambda codes, scale: (codes + (torch.arange(256) % 100 == 0).to(torch.int8), scale),
        lambda codes, scale: (codes.flip(1), scale),
    )
    for test, run in (
        (self_test.int8_quantizer, reference.quantize_rotated_int8),
        (self_test.int8_preparer, int8.prepare_weight),
    ):
        for dtype in (torch.float32, torch.float16):
            assert test(run)(CPU, dtype) is None
            for change in changes:
                assert test(altered(run, change))(CPU, dtype) is not None


def test_self_tests_of_steps_compare_bits():
    def off_by_one(run):
        def wrong(*arguments):
            codes, scale = run(*arguments)
            codes.view(torch.uint8)[-1, -1] += 1
            return codes, scale

        return wrong

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for test, run in (
            (self_test.quantizer, reference.quantize),
            (
                lambda run: self_test.rowwise_quantizer(run, reference.quantize_rowwise),
                fp8_rowwise.quantize_rowwise,
            ),
            (lambda run: self_test.preparer(run, reference.to_rowwise), fp8_rowwise.to_rowwise),
        ):
            assert test(run)(CPU, dtype) is None
            assert test(off_by_one(run))(CPU, dtype) is not None
    assert self_test.dequantizer(reference.dequantize)(CPU, torch.uint8) is None
    doubled = self_test.dequantizer(lambda *a: reference.dequantize(*a) * 2)
    assert doubled(CPU, torch.uint8) == "it dequantizes wrongly"
    exact = partial(reference.matmul, "stored", None)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert self_test.exact(exact, (1, 5, 70))(CPU, dtype) is None
    wrong = self_test.exact(lambda *a: exact(*a) * 1.1, (1,))
    assert wrong(CPU, torch.bfloat16).startswith("with 1 rows, its result is 1.0e-01 off")
