"""Which backend each device gets, why others do not support it, and when results prefer one.

The devices are not present: `kernels/device_facts.py` is patched with their facts.
"""

import json
from pathlib import Path

import pytest
import torch
from gpu import report

from mxfp8 import kernels
from mxfp8.kernels import dispatch, records
from mxfp8.kernels.backends import eager
from mxfp8.kernels.records import Problem

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"

# Device -> (its type, compute capability, AMD architecture).
DEVICES = {f"sm_{a * 10 + b}": ("cuda", (a, b), None) for a, b in (
    (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1),
    (13, 0), (14, 2),
)}  # fmt: skip
DEVICES |= {g: ("cuda", None, g) for g in ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")}
DEVICES |= {name: (name, None, None) for name in ("cpu", "mps", "xpu")}
FP8_CARDS = {"sm_89", "sm_90"}
BLOCK_CARDS = {"sm_100", "sm_103", "sm_110", "sm_120", "sm_121", "sm_130", "sm_142"}
ROTATES = {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "gfx1100", "gfx1201"}  # by comfy-kitchen
# By Triton; on Turing torch multiplies what it rotates.
INT8 = dict.fromkeys(
    ("sm_80", "sm_86", "sm_89", "gfx942", "gfx950", "gfx1100", "gfx1201"), "triton_int8"
)
INT8 |= {"sm_75": "torch_int8"}
NO_TRITON = "needs Triton: pip install triton"
NO_KITCHEN = "needs comfy-kitchen"


@pytest.fixture
def standing_on(monkeypatch, card):
    """standing_on(name, triton=reason or version, ...): a device of `DEVICES`; returns it."""

    def stand(name, triton="3.9.0", **rest):
        kind, capability, architecture = DEVICES[name]
        card(capability or architecture, triton if triton.startswith("needs") else None, **rest)
        monkeypatch.setattr("triton.__version__", triton)
        return torch.device(kind, 0) if kind != "cpu" else torch.device(kind)

    return stand


def path(device, precision, rows=None, dtype=torch.bfloat16):
    """What a layer gets whose weight may be prepared."""
    return kernels.execution_path(device, dtype, precision, rows, prepare="once")


@pytest.mark.parametrize("has_kitchen", [True, False])
@pytest.mark.parametrize("has_triton", [True, False])
@pytest.mark.parametrize("name", DEVICES)
def test_every_device_has_a_backend_for_everything(name, has_triton, has_kitchen, standing_on):
    # What comfy-kitchen runs on, its own tests say.
    kitchen = None if has_kitchen and name in ROTATES | BLOCK_CARDS else NO_KITCHEN
    device = standing_on(name, "3.9.0" if has_triton else NO_TRITON, kitchen=kitchen)
    triton = has_triton and device.type == "cuda"
    unpacks = "triton" if triton else "eager"
    old = name in ("sm_70", "sm_75")  # of which Triton knows no matrix instructions
    decodes = {1: "triton_w8a16", 64: unpacks if old else "triton_w8a16"} if triton else {}
    if kitchen is None and name == "sm_90":
        fast = "torch_fp8" if triton else "kitchen_int8"
    elif kitchen is None and name in ROTATES:
        fast = "kitchen_int8"
    elif name == "sm_90" and triton:
        fast = "torch_fp8"
    elif name in INT8 and triton:
        fast = INT8[name]
    elif name in BLOCK_CARDS and (triton or kitchen is None):
        fast = "torch_mx"
    else:
        fast = None
    for rows in (1, 64, None):
        for precision in ("exact", "auto"):
            exact = "torch_bf16" if name == "cpu" and cpu_keeps_bf16() else unpacks
            expected = decodes.get(rows, exact)
            as_many = rows is None or (fast == "torch_mx" and not triton)
            if as_many and precision == "auto" and fast is not None:
                expected = fast
            assert path(device, precision, rows).backend == expected, (precision, rows)
    for steps in (records.QUANTIZERS, records.DEQUANTIZERS):
        assert dispatch.choose_step(steps, device, torch.bfloat16).name == unpacks
    for status in kernels.list_backends(device):
        assert status.available or status.reason, status.name


def cpu_keeps_bf16() -> bool:
    problem = Problem(torch.device("cpu"), torch.bfloat16, prepare="once")
    return eager.bf16_unsupported_reason(problem) is None


def reasons(device) -> dict[str, str]:
    problem = Problem(device, torch.bfloat16, "fast")
    return {b.name: b.unsupported_reason(problem) for b in dispatch.BACKENDS}


@pytest.mark.parametrize("name", DEVICES)
def test_unsupported_reasons_say_what_a_device_lacks(name, standing_on):
    device = standing_on(name)
    _, capability, architecture = DEVICES[name]
    reason = reasons(device)
    here = (
        f"this one has {name[3:-1]}.{name[-1]}" if capability else f"this is {architecture or name}"
    )
    if name in BLOCK_CARDS:
        assert reason["torch_mx"] is None
    else:
        assert reason["torch_mx"].endswith(here) and "NVIDIA Blackwell" in reason["torch_mx"]
    if name not in FP8_CARDS | BLOCK_CARDS:
        for backend in ("torch_fp8", "triton_fp8"):
            assert reason[backend].endswith(here) and "8.9 (RTX 40)" in reason[backend]
    if name in ("sm_130", "sm_142"):
        version = "{}.{}".format(*capability)
        assert reason["triton_mx"] == f"was never compiled for compute capability {version}"
    elif name in BLOCK_CARDS or architecture == "gfx950":
        assert reason["triton_mx"] is None
    else:
        assert reason["triton_mx"].endswith(here)


@pytest.mark.parametrize("backend", ["triton_fp8", "triton_int8"])
@pytest.mark.parametrize(
    ("name", "triton", "expected"),
    [("sm_89", "3.3.1", None), ("sm_90", "3.4.0", None),
     ("sm_90", "3.3.1", "needs Triton 3.4 on Hopper; this is 3.3.1")],
)  # fmt: skip
def test_hopper_needs_a_triton_with_tensor_descriptors(
    name, triton, expected, backend, standing_on
):
    assert reasons(standing_on(name, triton))[backend] == expected


@pytest.mark.parametrize(
    ("name", "triton", "unsupported"),
    [("sm_100", "3.6.0", False), ("sm_120", "3.5.1", True), ("sm_121", "3.6.0", True),
     ("sm_110", "3.8.2", True), ("sm_110", "3.9.0", False), ("gfx950", "3.6.0", False)],
)  # fmt: skip
def test_a_triton_without_block_scales_is_unsupported(name, triton, unsupported, standing_on):
    """On sm_121, Triton 3.6 silently multiplies in bfloat16."""
    reason = reasons(standing_on(name, triton))["triton_mx"]
    if unsupported:
        assert reason.startswith("needs Triton 3.") and reason.endswith(f"this is {triton}")
    else:
        assert reason is None


@pytest.mark.parametrize("name", ["sm_130", "sm_142"])
def test_a_card_of_the_future_that_fails_its_self_test_runs_exact(name, standing_on):
    device = standing_on(name, fails=("torch_mx", "triton_fp8"))
    chosen = path(device, "auto")
    assert (chosen.backend, chosen.precision) == ("triton", "exact")
    listed = {status.name: status.reason for status in kernels.list_backends(device)}
    assert listed["torch_mx"] == listed["triton_fp8"] == "its self-test failed"


# ---- what a results file has to show ---------------------------------------------------------


def test_what_is_preferred_is_backed_by_a_results_file():
    """That it is right on that card, and faster than torch_mx in the same run."""
    for capability, preferred in dispatch.MEASURED.items():
        for name, file in preferred.items():
            assert name in [b.name for b in dispatch.BACKENDS]
            result = json.loads((RESULTS / file).read_text(encoding="utf-8"))
            assert report.prefers(result, name, capability) is None, (name, file)
    measured = {name for preferred in dispatch.MEASURED.values() for name in preferred}
    for backend in dispatch.BACKENDS:  # of those in blocks, only torch's needs no file
        if backend.input_form == "mxfp8" and backend.name not in measured:
            assert backend.automatic == (backend.name == "torch_mx"), backend.name


def test_only_the_card_that_was_measured_prefers_what_was_measured(standing_on, monkeypatch):
    monkeypatch.setattr(dispatch, "MEASURED", {(12, 0): {"triton_mx": "a card.json"}})
    expectations = ("sm_120", "triton_mx"), ("sm_100", "torch_mx"), ("sm_90", "torch_fp8")
    for name, expected in expectations:
        device = standing_on(name)
        assert path(device, "auto").backend == expected
        listed = {status.name: status for status in kernels.list_backends(device)}
        assert listed["triton_mx"].available == (name == "sm_120")
        assert path(device, "exact").backend == "triton"


def measured(**changes):
    """A made-up results file in which triton_mx is right and faster on an RTX 50."""
    shapes = [(4096, 10240, 3840), (1024, 5120, 5120)]
    rows = [
        {"op": "block_matmul", "backend": name, "M": M, "N": N, "K": K, "us": us}
        for M, N, K in shapes
        for name, us in (("torch_mx", 100.0), ("triton_mx", 90.0))
    ]
    checks = [{"check": f"block matmul, {n}", "shape": [], "wrong": None}
              for n in ("torch_mx", "triton_mx")]  # fmt: skip
    return {"machine": {"capability": "12.0"}, "rows": rows, "checks": checks} | changes


def test_a_results_file_that_shows_too_little_is_not_enough():
    right = measured()
    assert report.prefers(right, "triton_mx", (12, 0)) is None
    assert "is of compute capability 12.0" in report.prefers(right, "triton_mx", (10, 0))
    assert "no check of cute_mx" in report.prefers(right, "cute_mx", (12, 0))
    wrong = [{**right["checks"][0], "wrong": "noise"}, right["checks"][1]]
    assert "1 checks failed" in report.prefers(measured(checks=wrong), "triton_mx", (12, 0))
    one = measured(rows=right["rows"][:2])
    assert "in 1 problems" in report.prefers(one, "triton_mx", (12, 0))
    slow = [{**r, "us": 110.0} if r["backend"] == "triton_mx" else r for r in right["rows"]]
    reason = report.prefers(measured(rows=slow), "triton_mx", (12, 0))
    assert reason == "takes 1.10 of torch_mx's time over 2 problems"
