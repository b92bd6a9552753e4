"""bench/quality.py: what it multiplies in each form, and how near rotated INT8 is to exact."""

from __future__ import annotations

import json
from dataclasses import replace

import minilm
import onnx
import pytest
import quality
import torch
import vit
from forms import FORMS, fast_linear_in, linear_in
from onnx.reference import ReferenceEvaluator

from mxfp8 import kernels
from mxfp8.kernels.backends import fp8_rowwise, int8
from mxfp8.quant.linear import MXFP8Linear
from mxfp8.quant.reports import execution


def test_rounding_to_nearest_is_measured_where_ratios_to_it_would_be_missing():
    row = {"layer_output_error": 0.02, "end_to_end": 1e-4, "seconds": 1.0}
    assert quality.needed(["gptq"], {}) == ["nearest", "gptq"]
    assert quality.needed(["gptq", "nearest"], {}) == ["nearest", "gptq"]
    assert quality.needed(["gptq"], {"nearest": row}) == ["gptq"]
    assert quality.needed([], {}) == []
    assert "| gptq | 2.00e-02 (1.00)" in quality.table(
        dict.fromkeys(quality.needed(["gptq"], {}), row)
    )


def scaled(codes, scale):
    return codes.float() * scale[:, None]


def products(x, weight, stored) -> dict[str, torch.Tensor]:
    """The product in each form by the plain-torch functions that the pack runs, not the oracle."""
    mxfp8 = kernels.dequantize(*kernels.quantize(x), torch.float32, tuple(x.shape))
    rows = tuple(
        scaled(*f) for f in (fp8_rowwise.quantize_rowwise(x), fp8_rowwise.to_rowwise(*stored))
    )
    ints = tuple(scaled(*f) for f in (int8.quantize_input(x), int8.prepare_weight(*stored)))
    pairs = {
        "exact": (x, weight), "mxfp8": (mxfp8, weight), "rowwise_fp8": rows, "rotated_int8": ints,
    }  # fmt: skip
    return {name: a[:, : b.shape[1]] @ b[: len(weight)].t() for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("fast", [False, True])
@torch.no_grad()
def test_each_form_multiplies_what_its_backends_do(fast):
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(320, 40)
    x = torch.randn(3, 7, 320, generator=generator) * torch.randn(320, generator=generator).exp()
    layer = MXFP8Linear.from_linear(linear)
    stored = layer.qdata.view(torch.float8_e4m3fn), layer.weight_scale
    rows = x.reshape(-1, 320)
    expected = products(rows, layer.dequantize(torch.float32), stored)
    assert expected.keys() == FORMS.keys()

    for name, form in FORMS.items():
        arguments = layer.qdata, layer.weight_scale, layer.shape, layer.bias
        out = (fast_linear_in(name, *arguments) if fast else linear_in(form, *arguments))(x)
        assert out.shape == (3, 7, 40) and out.dtype == x.dtype
        product = out.reshape(21, 40) - layer.bias
        errors = {n: float((product - p).norm() / p.norm()) for n, p in expected.items()}
        assert errors.pop(name) < 1e-4  # ties of INT8, which rotates in float32
        assert min(errors.values()) > 5e-3, errors


@pytest.mark.parametrize(
    ("form", "figure", "value", "missed"),
    [
        ("rotated_int8", "layer_output_error", 1.29, []),
        ("rotated_int8", "layer_output_error", 1.31, ["gptq/rotated_int8 to gptq/exact"]),
        ("mxfp8", "layer_output_error", 1.5, ["gptq/rotated_int8 to gptq/mxfp8"]),
        ("rotated_int8", "end_to_end", 1.59, []),
        ("rotated_int8", "end_to_end", 1.61, ["gptq/rotated_int8 to gptq/exact"]),
        ("exact", "layer_output_error", 1.21, ["gptq/exact to nearest/exact"]),
    ],
)
def test_a_bound_that_is_missed_is_named(form, figure, value, missed):
    forms = {name: {"layer_output_error": 1.0, "end_to_end": 1.0} for name in FORMS}
    forms["mxfp8"]["layer_output_error"] = 2.1
    forms[form][figure] = value
    plain = {"exact": {"layer_output_error": 2.0, "end_to_end": 4.0}}
    results = {"nearest": {"forms": plain}, "gptq": {"forms": forms}}
    found = quality.misses({"minilm": results}, None)
    assert [line.partition(":")[0] for line in found] == [
        f"minilm, {figure} of {what}" for what in missed
    ]


def measured() -> dict[str, dict]:
    """Model -> method -> figures."""
    return json.loads(quality.RESULTS.read_text("utf-8"))["models"]


@pytest.mark.parametrize("name", quality.MODELS)
def test_the_results_have_every_form_of_what_converts_files_here(name):
    methods = measured()[name]
    for method in quality.FORMED:
        assert methods[method]["forms"].keys() == FORMS.keys()
        exact = methods[method]["forms"]["exact"]
        assert {key: methods[method][key] for key in exact} == exact
    bounds = [bound for bound in quality.MODELS[name].bounds if bound.figure == quality.LAYERS]
    assert len(bounds) == 3 and all(bound.ratio(methods) <= bound.most for bound in bounds)


def test_the_backend_report_expects_the_error_that_was_measured():
    forms = measured()["minilm"]["gptq"]["forms"]
    expected = {name: round(form["layer_output_error"], 4) for name, form in forms.items()}
    assert expected == execution.EXPECTED_ERROR


def test_the_vision_transformer_computes_what_its_onnx_graph_does():
    """By ONNX's own evaluator in numpy: float32 sums in another order, 1.3e-6 when written."""
    graph = onnx.load(vit.ONNX)
    nodes = graph.graph.node
    last = [node.name for node in nodes].index("/backbone/layernorm/Add_1")
    del nodes[last + 1 :], graph.graph.output[:]  # the decoder
    graph.graph.output.append(onnx.ValueInfoProto(name=nodes[last].output[0]))
    batch = vit.batches(["chelsea.png"], crops=1)[0]
    feeds = {"input_image": batch["pixel_values"].numpy()}
    expected = torch.from_numpy(ReferenceEvaluator(graph).run(None, feeds)[0])

    model = vit.trained().eval()
    with torch.no_grad():
        features = model(**batch).last_hidden_state
    assert features.shape == (1, 257, 384)
    assert (features - expected).norm() < 1e-5 * expected.norm()
    assert len(quality.encoder(model)) == 72


@pytest.mark.slow
def test_rotated_int8_of_a_calibrated_file_is_nearly_as_exact_as_exact(tmp_path):
    """All layers, but 40 texts calibrate and 8 test, not 160 each: a quarter of a minute."""
    texts = minilm.paragraphs()
    model = replace(quality.MODELS["minilm"], seen=lambda: minilm.batches(texts[:40], size=1))
    target = tmp_path / "model.safetensors"
    quality.calibrated(model, minilm.WEIGHTS, target)
    unseen = minilm.batches(texts[quality.TEXTS :][:8])
    forms = quality.measure(model, target, unseen, ["exact", "mxfp8", "rotated_int8"])
    assert quality.misses({"minilm": {"gptq": {"forms": forms}}}, None) == []
