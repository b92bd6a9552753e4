"""What holds for every model that is converted, and for every module that is saved."""

from __future__ import annotations

import json
import re

import pytest
import torch
from checkpoints import load, raw, same
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import CODES, DTYPES, metadata, tensor_of, text
from torch import nn

from mxfp8.kernels.backends import reference
from mxfp8.quant import format
from mxfp8.quant.checks.inspect import inspect_file
from mxfp8.quant.checks.scan import check_file
from mxfp8.quant.checks.verify import verify_file
from mxfp8.quant.container.header import parse_object, read_container
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.conversion.policy import Selection, plan
from mxfp8.quant.linear import MXFP8Linear
from mxfp8.quant.reports.conversion import Report

NONE = Selection("none")
QUICK = settings(max_examples=40)
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PLAIN = sorted(set(DTYPES) - set(CODES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def weight_of(dtype: str, shape, seed: int) -> torch.Tensor:
    """Normal values, times a power of two that leaves them normal numbers of their dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 2.0 ** (seed % 11 - 5)).to(FLOATS[dtype])


names = st.one_of(
    text,
    st.builds("blocks.{}.{}".format, st.integers(0, 3), st.sampled_from(["q", "fc1", "norm"])),
    st.sampled_from(["model.diffusion_model.a", "vae.a", "wte", "a", "a.b", "a/../b", "NUL"]),
)
sizes = st.integers(1, 140)
dtypes = st.sampled_from(sorted(FLOATS))
weights = st.dictionaries(
    names.map("{}.weight".format),
    st.builds(weight_of, dtypes, st.tuples(sizes, sizes), st.integers(0, 99)),
    min_size=1,
    max_size=3,
)
others = st.dictionaries(
    st.builds("{}{}".format, names, st.sampled_from(["", ".bias", ".scale", ".table"])),
    st.builds(
        tensor_of,
        st.sampled_from(PLAIN),
        st.lists(st.integers(0, 9), max_size=4),
        st.integers(0, 99),
    ),
    max_size=4,
)


# ---- conversion --------------------------------------------------------------------------------


@QUICK
@given(weights, others, metadata)
def test_any_model_converts_to_what_the_oracle_says(folder, weights, others, metadata):
    tensors = {**weights, **others}
    assume("__metadata__" not in tensors and not tensors.keys() & set(metadata.values()))
    assume(format.QUANTIZATION_METADATA not in metadata)
    source, target = folder / "source.safetensors", folder / "target.safetensors"
    save_file(tensors, source, metadata)
    shapes = {t.name: (t.dtype, t.shape) for t in read_container(source).tensors.values()}
    chosen = {d.key for d in plan(shapes, NONE).quantized}
    assume(chosen)

    report = convert_file(source, target, NONE, overwrite=True)
    stored, header = load(target)
    markers = json.loads(header.pop("_quantization_metadata"))["layers"]
    assert header == metadata
    assert markers.keys() == {key.removesuffix(".weight") for key in chosen}
    expected = {key: tensor for key, tensor in tensors.items() if key not in chosen}
    for key in chosen:
        layer, weight = key.removesuffix(".weight"), tensors[key]
        conf = {"format": "mxfp8", "group_size": 32, "orig_dtype": str(weight.dtype),
                "orig_shape": list(weight.shape)}  # fmt: skip
        assert markers[layer] == conf == json.loads(raw(stored.pop(f"{layer}.comfy_quant")))
        expected[key], expected[f"{layer}.weight_scale"] = reference.quantize(weight)
    assert stored.keys() == expected.keys()
    assert all(same(stored[key], tensor) for key, tensor in expected.items())

    assert Report.from_json(report.to_json()) == report
    assert {x.name for x in report.quantized} == markers.keys()
    inspection = inspect_file(target)
    assert inspection.problems == []
    assert {x.name: x.shape for x in inspection.mxfp8} == {
        key.removesuffix(".weight"): tuple(tensors[key].shape) for key in chosen
    }
    assert check_file(target) == []
    if all(min(tensors[key].shape) > 15 for key in chosen):  # of fewer, rounding can be unlucky
        verification = verify_file(target, source)
        assert verification.problems == []
        assert verification.sqnr_db == pytest.approx(report.sqnr_db, abs=1e-3)


@pytest.mark.parametrize("value", [1.0625, -17.0])
def test_rounding_at_its_worst_is_no_problem(folder, value):
    """Half a spacing of a value just above a power of two is 24.6 dB from it."""
    source, target = folder / "source.safetensors", folder / "target.safetensors"
    save_file({"a.weight": torch.full((1, 1), value)}, source)
    convert_file(source, target, NONE, overwrite=True)
    assert verify_file(target, source).problems == []


suffixed = st.builds(
    "a{}".format, st.sampled_from([".weight_scale", ".comfy_quant", ".scale_weight", ".bias"])
)


@QUICK
@given(st.dictionaries(suffixed, st.tuples(st.sampled_from(PLAIN), st.integers(0, 9))))
def test_tensors_under_names_that_conversion_uses_are_kept_or_refused(folder, extra):
    weight = weight_of("BF16", (33, 70), 0)
    others = {name: tensor_of(dtype, (size,), 1) for name, (dtype, size) in extra.items()}
    source, target = folder / "source.safetensors", folder / "target.safetensors"
    save_file({"a.weight": weight, **others}, source)
    target.unlink(missing_ok=True)
    try:
        convert_file(source, target, NONE)
    except ValueError as error:
        assert re.search(r"'a\.(weight|weight_scale|comfy_quant|scale_weight)'", str(error))
        assert others.keys() & {"a.weight_scale", "a.comfy_quant"}
        assert not target.exists()
        return
    stored, _ = load(target)
    assert all(same(stored[name], tensor) for name, tensor in others.items())
    for actual, expected in zip(
        (stored["a.weight"], stored["a.weight_scale"]), reference.quantize(weight), strict=True
    ):
        assert same(actual, expected)


def test_a_name_that_conversion_uses_is_refused_by_file(folder):
    source, target = folder / "source.safetensors", folder / "target.safetensors"
    weight = weight_of("BF16", (33, 70), 0)
    save_file({"a.weight": weight, "a.weight_scale": torch.zeros(1)}, source)
    with pytest.raises(ValueError, match=r"(source|target)\.safetensors"):
        convert_file(source, target, NONE, overwrite=True)


@QUICK
@given(
    text, st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)), st.sampled_from(sorted(FLOATS))
)
def test_markers_come_back_from_their_bytes_and_the_header(name, shape, dtype):
    conf = format.marker(shape, dtype)
    assert parse_object("marker", format.marker_bytes(conf)) == conf
    other = {"title": name}
    written = format.with_markers(other, {name: conf})
    assert written["title"] == name
    assert format.header_markers("file", written) == {name: conf}


# ---- modules -----------------------------------------------------------------------------------


@QUICK
@given(sizes, sizes, st.booleans(), dtypes, st.integers(0, 99))
def test_a_module_comes_back_from_its_state_dict(folder, rows, cols, bias, dtype, seed):
    linear = nn.Linear(cols, rows, bias, dtype=FLOATS[dtype])
    linear.weight.data = weight_of(dtype, (rows, cols), seed)
    ours = MXFP8Linear.from_linear(linear)
    path = folder / "module.safetensors"
    save_file(nn.Sequential(ours).state_dict(), path)
    (layer,) = format.read_header(path).layers.values()
    assert (layer.name, layer.shape) == ("0", (rows, cols))
    state = load_file(path)
    for actual, expected in zip(
        (state["0.weight"], state["0.weight_scale"]), reference.quantize(linear.weight), strict=True
    ):
        assert same(actual, expected)

    other = nn.Sequential(MXFP8Linear(cols, rows, bias, dtype=FLOATS[dtype]))
    other.load_state_dict(state)
    again = other.state_dict()
    assert again.keys() == state.keys()
    assert all(same(again[key], state[key]) for key in state)
    x = weight_of(dtype, (3, cols), seed + 1)
    assert torch.equal(other(x), ours(x))
