"""The backend report as data: reasons on cards that are not there, and its words."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from cards import CARDS

from mxfp8 import kernels
from mxfp8.kernels import dispatch
from mxfp8.kernels.records import m_class
from mxfp8.quant.reports import execution
from mxfp8.quant.reports.adapters import AdapterUse
from mxfp8.quant.reports.execution import STOCK, BackendReport, LayerExecution, Memory, Timing

CUDA = torch.device("cuda", 0)


def path_of(precision="auto", rows=None, device=CUDA):
    return kernels.execution_path(device, torch.bfloat16, precision, rows, prepare="once")


def reason(precision="auto", rows=4096, change=2e-7) -> str:
    path, many = path_of(precision, rows), path_of(precision)
    return execution.layer_reason(path, many, precision, change)


NO_KITCHEN = "needs comfy-kitchen"
ROWWISE = "weight and inputs in FP8 with one scale per row; this changes the weight by 2e-07"
INT8 = "weight and inputs rotated, in INT8 with one scale per row; this changes the weight by 2e-07"
FEW = "exact: 64 rows or fewer"
BLOCKS = "inputs quantized to MXFP8, weights as stored"
CHOSEN = "triton: exact was chosen"
# The reason with precision auto and many rows, auto and few rows, exact and many rows; where
# comfy-kitchen's kernels are missing, and where they run.
REASONS = {
    "Ampere": ((INT8, FEW, CHOSEN), INT8),
    "Ada": ((INT8, FEW, CHOSEN), INT8),
    "Hopper": ((ROWWISE, FEW, CHOSEN), ROWWISE),
    "Blackwell": ((BLOCKS, FEW, CHOSEN), BLOCKS),
}


@pytest.mark.parametrize("name", REASONS)
def test_each_card_has_its_reasons(name, card):
    card(CARDS[name])
    without, with_kitchen = REASONS[name]
    reasons = reason(), reason(rows=64), reason("exact")
    for actual, expected in zip(reasons, without, strict=True):
        assert actual.startswith(expected)
    card(CARDS[name], kitchen=None)
    assert reason().startswith(with_kitchen)


def test_without_triton_the_reason_is_that(card):
    card(CARDS["Ampere"], "needs Triton: pip install triton")
    assert reason() == reason("exact") == "eager: needs Triton: pip install triton"


@pytest.mark.parametrize("name", [*REASONS])
@pytest.mark.parametrize("rows", [None, 1, 64, 65])
@pytest.mark.parametrize("precision", dispatch.PRECISIONS)
def test_an_explanation_is_of_what_is_chosen(name, rows, precision, card):
    """Of all that come before it and are for that precision and number of rows, in order."""
    card(CARDS[name])
    path, size = path_of(precision, rows), m_class(rows)
    order = [b for b in dispatch._automatic(CUDA) if size in b.m_classes]
    tried = [b.name for b in order if b.precision == "fast" and precision != "exact"]
    tried += [b.name for b in order if b.precision == "exact"]
    assert [name for name, _ in path.unsupported] == tried[: tried.index(path.backend)]


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("triton", [None, "needs Triton: pip install triton"])
@pytest.mark.parametrize("precision", ["auto", "fast"])
def test_a_loader_and_the_layers_give_one_reason(name, triton, precision, card):
    card(CARDS[name], triton)
    many = path_of(precision)
    limit = execution.limiting_reason("cuda", many, precision)
    if many.precision == "fast":
        assert limit is None
    else:
        assert reason(precision) == f"{many.backend}: {limit}"
        assert limit == triton


def test_what_can_be_installed_is_the_reason_and_not_what_the_card_lacks(card):
    """However it is worded: this one ends as those do that name the card."""
    old = "needs comfy-kitchen 0.2.15 or later; this is 0.2.8"
    card(CARDS["Ampere"], kitchen=old, fails=("triton_int8", "torch_int8"))
    path = path_of()
    lacking = [name for name, why in path.unsupported if isinstance(why, kernels.DeviceReason)]
    assert lacking == ["torch_mx", "torch_fp8", "triton_fp8", "triton_fnuz", "int8"]
    assert execution.limiting_reason("cuda", path, "auto") == old


def test_nobody_chose_that_text_encoders_run_exact(card):
    card(CARDS["Ampere"])
    path = path_of("exact")
    assert execution.limiting_reason("cuda", path, "exact") == "exact was chosen"
    limit = execution.limiting_reason("cuda", path, "exact", encoder=True)
    assert limit == "text encoders run exact, as in ComfyUI"
    reason = execution.layer_reason(path, path, "exact", None, encoder=True)
    assert reason == f"triton: {limit}"


def test_on_a_cpu_what_is_refused_is_what_a_gpu_would_have():
    path = path_of(device=torch.device("cpu"))
    assert (path.precision, path.input_form) == ("exact", None)
    why = dict(path.unsupported)
    assert {"torch_mx", "kitchen_int8", "torch_fp8", "triton_fp8", "int8", "triton"} <= why.keys()
    assert why["triton"] == "needs an NVIDIA or AMD GPU; this is cpu"
    assert why["torch_fp8"].endswith("or later; this is cpu")
    assert why["int8"] == "on a CPU, auto stays exact"
    assert execution.limiting_reason("cpu", path, "auto") == "no GPU"


def test_a_forced_backend_is_explained():
    with kernels.use_backend("reference", "reference_mx"):
        path = path_of("fast", device=torch.device("cpu"))
    assert (path.backend, path.precision) == ("reference_mx", "fast")


def layer(name: str, backend="torch_fp8", precision="fast", decision="mxfp8", **options):
    forms = {"fast": "rowwise_fp8", "exact": "stored", None: None}
    options.setdefault("weight_form", forms[precision])
    return LayerExecution(
        name=name, shape=(64, 32), decision=decision, reason="because", dtype="BF16",
        bytes=2_000_000, device="cuda:0", backend=backend, precision=precision, **options,
    )  # fmt: skip


def made(*layers, **options) -> BackendReport:
    about = {
        "model": "Flux", "machine": "torch", "device": "cuda:0", "dtype": "BF16", "rows": 4096,
        "small_m": "triton, exact (up to 64)", "unsupported": ("torch_mx: no",), "limited_by": None,
        "memory": {"codes": Memory(3_000_000, 1_000_000), "scales": Memory()},
    }  # fmt: skip
    return BackendReport(**{**about, **options}, layers=layers)


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (made(layer("a"), layer("b")), "2 MXFP8 layers, 4.00 MB: torch_fp8, fast"),
        (made(layer("a"), limited_by="no GPU"), "1 MXFP8 layer, 2.00 MB: torch_fp8, fast (no GPU)"),
        (
            made(layer("a"), layer("b"), layer("c", STOCK, None)),
            "3 MXFP8 layers, 6.00 MB: 2 torch_fp8, fast; 1 stock",
        ),
        (
            made(layer("a", STOCK, None, decision="kept")),
            "no MXFP8 layers; it runs as ComfyUI loaded it",
        ),
    ],
)
def test_a_line_for_a_loader(report, line):
    assert report.line() == line


LORA = AdapterUse(
    ("LoRA", "LoKr"), (4, 32), 0.8, 34, 2, {"beside the weight: low rank": 34, "left out: x": 1},
    2_500_000,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, "LoRA, LoKr, rank 4 to 32, strength 0.8: changes 34 of 36 linear layers (all beside "
         "the weights; 1 more left out: x), 2.50 MB"),
        ({"ranks": (4, 4), "applied": {"beside the weight: low rank": 34}},
         "LoRA, LoKr, rank 4, strength 0.8: changes 34 of 36 linear layers, all beside the "
         "weights, 2.50 MB"),
        ({"ranks": (4, 4), "bytes": 0, "others": 6, "applied": {
            "left out: x": 2, "beside the weight: low rank": 1, "merged by ComfyUI": 39}},
         "LoRA, LoKr, rank 4, strength 0.8: changes 34 of 36 linear layers and 6 others (1 beside "
         "the weight; 39 merged by ComfyUI; 2 more left out: x)"),
        ({"kinds": ("merged model",), "ranks": (), "strength": None, "bytes": 0,
          "applied": {f"left out: {i}": 9 - i for i in range(6)}},
         "merged model: changes 34 of 36 linear layers (9 left out: 0; 8 left out: 1; "
         "7 left out: 2; 6 left out: 3; 9 in other ways)"),
    ],
)  # fmt: skip
def test_a_lora_is_one_line(change, line):
    use = replace(LORA, **change)
    assert use.line() == line
    report = made(layer("a"), adapters=(use,))
    assert report.summary().splitlines()[1] == line
    assert json.loads(report.to_json())["adapters"] == [json.loads(json.dumps(asdict(use)))]


def test_json_and_words_have_everything():
    timing = Timing((64, 32), "torch_fp8", "fast", 2, 256, 10.0, 20.0, 50.0)
    report = made(layer("a", microseconds=10.0), layer("b"), timings=(timing,))
    data = json.loads(report.to_json())
    assert data["mxfp8_backend_report"] == 1
    assert data["layers"][0]["microseconds"] == 10.0
    assert data["layers"][0]["weight_form"] == "rowwise_fp8"
    assert data["layers"][0]["expected_error"] == execution.EXPECTED_ERROR["rowwise_fp8"]
    assert (data["rows"], data["timings"][0]["rows"]) == (4096, 256)
    assert data["timings"][0]["faster_than_dense"] == 2.0
    assert data["timings"][0]["faster_than_stock"] == 5.0
    assert data["memory"]["codes"] == {"device": 3_000_000, "offloaded": 1_000_000}
    summary = report.summary()
    assert "2 layers: because" in summary
    assert "expected error of rowwise_fp8: 1.99 times that of exact" in summary
    assert "not used: torch_mx: no" in summary
    assert "offloaded: 1.00 MB" in summary
    assert "2 layers [64, 32] on torch_fp8, 256 rows: 10.0 us" in summary
    assert "2.00x as fast as dense BF16, 5.00x as fast as stock" in summary


def test_a_slower_layer_is_said_to_be_slower_and_loras_are_in_its_time():
    timing = Timing((64, 32), "eager", "exact", 1, 256, 100.0, 40.0, 200.0)
    last = made(layer("a"), timings=(timing,), adapters=(LORA,)).summary().splitlines()[-1]
    assert last == (
        "1 layer [64, 32] on eager, 256 rows: 100 us with its LoRAs (the others without), "
        "2.50 times slower than dense BF16, 2.00x as fast as stock"
    )
