"""Reading a file: what is accepted, and an example of every rule by which a file is refused."""

from __future__ import annotations

import json
import math
import os
import struct

import pytest
import torch
from checkpoints import write_raw
from safetensors.torch import save_file

from mxfp8.quant.container.header import MAX_HEADER
from mxfp8.quant.format import FormatError, read_header


def entry(begin, end, dtype="U8", shape=None):
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def error_of(path, part="tensors") -> str:
    """The message with which reading `part` of a header fails; it must name the file."""
    with pytest.raises(FormatError) as caught:
        getattr(read_header(path), part)
    message = str(caught.value)
    assert path.name in message
    return message


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "too few"),
        (b"1234567", "too few"),
        (struct.pack("<Q", MAX_HEADER + 1), "the limit is"),
        (struct.pack("<Q", 2**63) + b"{}", "the limit is"),
        (struct.pack("<Q", 100) + b"{}", "truncated: the header needs 108 bytes"),
        (b"<html>not a model</html>", "not a safetensors file"),
    ],
)
def test_a_file_without_a_whole_header_is_refused(tmp_path, content, rule):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    message = error_of(path)
    assert rule in message
    assert message.endswith("the file is damaged or incomplete: get it again")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (b"{", "not JSON"),
        (b'{"\xff": 1}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "nested deeper than 32 levels"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": 1e400}', "1e400 is not a JSON number"),
        (b'{"a": -0}', "-0 is not a JSON number"),
        (b'{"a": ' + b"9" * 301 + b"}", "a number of 301 digits is not a JSON number"),
        (b'{"a": {}, "a": {}}', "'a' twice"),
    ],
)
def test_a_header_that_is_no_plain_json_object_is_refused(tmp_path, text, rule):
    assert rule in error_of(write_raw(tmp_path / "bad.safetensors", text))


@pytest.mark.parametrize("metadata", [{"a": 1}, {"a": None}, ["a"], "a", {"a": "\ud800"}])
def test_metadata_must_map_strings_to_strings(tmp_path, metadata):
    path = write_raw(tmp_path / "bad.safetensors", {"__metadata__": metadata})
    assert "__metadata__ must map strings to strings" in error_of(path)


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (7, "needs dtype, shape and data_offsets"),
        ({"dtype": "U8", "shape": [4]}, "needs dtype, shape and data_offsets"),
        (entry(0, 4, "F3"), "unknown dtype 'F3'"),
        (entry(0, 4, ["U8"]), "unknown dtype"),
        (entry(0, 4, shape=4), "list of sizes"),
        (entry(0, 4, shape=[-4]), "list of sizes"),
        (entry(0, 4, shape=[True, 4]), "list of sizes"),
        (entry(0, 4, shape=[4.0]), "list of sizes"),
        (entry(0, 4, shape=[4] + [1] * 64), "at most 64"),
        (entry(0, 0, shape=[0, 2**62, 2]), "fewer than 2**63 elements"),
        ({**entry(0, 4), "x": []}, "a further field that is not a plain value"),
        ({**entry(0, 4), "x": "\ud800"}, "a further field that is not a plain value"),
        ({**entry(0, 4), "\ud800": 1}, "a further field that is not a plain value"),
        ({**entry(0, 4), "data_offsets": 4}, "two sizes"),
        ({**entry(0, 4), "data_offsets": [0, 2, 4]}, "two sizes"),
        ({**entry(0, 4), "data_offsets": ["0", "4"]}, "two sizes"),
        ({**entry(0, 4), "data_offsets": [4, 0]}, "span -4"),
        (entry(0, 4, shape=[5]), "5 bytes, but its data_offsets span 4"),
        (entry(0, 1, "F4", [3]), "its data_offsets span 1"),
    ],
)
def test_a_bad_entry_is_refused_by_tensor_and_rule(tmp_path, value, rule):
    path = write_raw(tmp_path / "bad.safetensors", {"some.weight": value}, bytes(4))
    message = error_of(path)
    assert rule in message
    assert "'some.weight'" in message


@pytest.mark.parametrize(
    ("spans", "size", "rule"),
    [
        ([(0, 4), (8, 12)], 12, "tensor 'b' leaves a gap"),
        ([(4, 8)], 8, "tensor 'a' leaves a gap"),
        ([(0, 8), (4, 12)], 12, "tensor 'b' overlaps"),
        ([(0, 8), (0, 8)], 8, "tensor 'b' overlaps"),
        ([(0, 4)], 5, "bytes after its last tensor"),
        ([], 1, "bytes after its last tensor"),
        ([(0, 4), (4, 8)], 7, "truncated"),
    ],
)
def test_tensors_must_fill_the_file_exactly(tmp_path, spans, size, rule):
    header = {name: entry(*span) for name, span in zip("ab", spans, strict=False)}
    assert rule in error_of(write_raw(tmp_path / "bad.safetensors", header, bytes(size)))


def test_offsets_count_from_the_start_of_the_file_and_order_is_theirs(tmp_path):
    header = {
        "late": entry(4, 8),
        "early": entry(0, 4),
        "empty": entry(4, 4, "F32", [0, 3]),
        "scalar": entry(8, 12, "F32", []),
        "packed": entry(12, 15, "F6_E2M3", [4]),
    }
    data = bytes(range(15))
    path = write_raw(tmp_path / "good.safetensors", json.dumps(header).encode() + b"   ", data)
    found = read_header(path)
    content = path.read_bytes()
    assert list(found.tensors) == ["early", "empty", "late", "scalar", "packed"]
    assert content[found.tensors["late"].begin : found.tensors["late"].end] == data[4:8]
    assert [math.prod(t.shape) for t in found.tensors.values()] == [4, 0, 4, 1, 4]
    assert found.file_size == len(content)


MARKER = {"format": "mxfp8", "group_size": 32, "orig_shape": [30, 40]}


def as_tensor(conf) -> torch.Tensor:
    text = conf if isinstance(conf, bytes) else json.dumps(conf).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


def layer_file(folder, header=None, tensor=None, prefix="", **replaced):
    """A [30, 40] MXFP8 layer "a" with these markers; `replaced` swaps tensors, None drops one.

    Args:
        prefix: of the keys of its tensors, which the header's marker leaves out.
    """
    parts = {
        "weight": torch.zeros(32, 64, dtype=torch.float8_e4m3fn),
        "weight_scale": torch.zeros(128, 4, dtype=torch.uint8),
        "comfy_quant": None if tensor is None else as_tensor(tensor),
        **replaced,
    }
    metadata = None
    if header is not None:
        text = header if isinstance(header, str) else json.dumps({"layers": {"a": header}})
        metadata = {"_quantization_metadata": text}
    path = folder / "layer.safetensors"
    tensors = {f"{prefix}a.{name}": t for name, t in parts.items() if t is not None}
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({"weight": torch.zeros(30, 64, dtype=torch.float8_e4m3fn)}, (30, 40)),  # rows unpadded
        ({"weight_scale": torch.zeros(128, 4, dtype=torch.uint8).view(torch.float8_e8m0fnu)},
         (30, 40)),
        ({"header": {"format": "mxfp8"}}, (32, 64)),  # nothing is known to be padding
        ({"header": {**MARKER, "orig_shape": None}}, (32, 64)),
    ],
)  # fmt: skip
def test_other_forms_of_a_layer(tmp_path, changes, shape):
    layer = read_header(layer_file(tmp_path, **{"header": MARKER, **changes})).layers["a"]
    assert layer.shape == shape


@pytest.mark.parametrize("markers", [(MARKER, None), (None, MARKER), (MARKER, MARKER)])
def test_a_layer_is_found_by_its_header_marker_its_tensor_or_both(tmp_path, markers):
    layer = read_header(layer_file(tmp_path, *markers)).layers["a"]
    assert layer.shape == (30, 40)
    assert (layer.weight.shape, layer.scale.shape) == ((32, 64), (128, 4))
    assert layer.conf == MARKER
    assert not layer.full_precision


def test_a_header_marker_may_leave_out_the_prefix_of_its_tensors(tmp_path):
    path = layer_file(tmp_path, MARKER, prefix="model.diffusion_model.")
    assert list(read_header(path).layers) == ["model.diffusion_model.a"]


def test_a_header_may_mark_a_layer_with_and_without_its_prefix(tmp_path):
    markers = json.dumps({"layers": {"a": MARKER, "model.a": MARKER}})
    header = read_header(layer_file(tmp_path, markers, prefix="model."))
    assert list(header.layers) == ["model.a"]


def test_a_file_without_tensors_is_accepted(tmp_path):
    header = read_header(write_raw(tmp_path / "empty.safetensors", {}))
    assert (header.tensors, header.markers, header.layers) == ({}, {}, {})


def test_unknown_fields_of_markers_are_kept(tmp_path):
    marker = {**MARKER, "calibration": {"by": "someone", "rows": [1, None]}, "": 0.5}
    header = read_header(layer_file(tmp_path, header=marker, tensor=marker))
    assert header.layers["a"].conf == marker


BANK = {
    "weight": torch.zeros(4, 32, 64, dtype=torch.float8_e4m3fn),
    "weight_scale": torch.zeros(4, 128, 4, dtype=torch.uint8),
}


def test_banks_of_experts_are_checked_and_left_to_stock(tmp_path):
    header = read_header(layer_file(tmp_path, {"format": "mxfp8", "num_experts": 4}, **BANK))
    header.check_layers()
    assert header.layers == {}
    assert header.experts["a"].shape == (4, 32, 64)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"header": {"format": "mxfp8", "num_experts": 3}}, "of 3: weight [4, 32, 64]"),
        ({"header": {"format": "mxfp8", "num_experts": "4"}}, "of '4': weight [4, 32, 64]"),
        ({"header": {"format": "mxfp8", "num_experts": 4, "group_size": 16}}, "MXFP8 has 32"),
        ({"weight_scale": torch.zeros(128, 4, dtype=torch.uint8)}, "scales [4, 128, 4]"),
        ({"weight": torch.zeros(32, 64, dtype=torch.float8_e4m3fn)}, "must be 3-D F8_E4M3"),
    ],
)
def test_a_bank_of_experts_that_does_not_fit_is_refused(tmp_path, changes, rule):
    bank = {"header": {"format": "mxfp8", "num_experts": 4}, **BANK, **changes}
    assert rule in error_of(layer_file(tmp_path, **bank), "experts")


def test_an_unknown_format_is_refused_with_those_that_are_known(tmp_path):
    header = read_header(layer_file(tmp_path, header={"format": "MXFP8"}))
    with pytest.raises(FormatError, match=r"layer 'a' is marked as 'MXFP8'; .*mxfp8, float8"):
        header.check_layers()
    header.check_layers(formats=["MXFP8"])


def test_a_name_that_is_no_text_is_refused(tmp_path):
    path = write_raw(tmp_path / "bad.safetensors", b'{"\\ud800": {}}')
    assert "its name is not valid text" in error_of(path)


def test_messages_stay_short_whatever_the_names(tmp_path):
    header = {"a" * 10**6: {**entry(0, 4), "shape": [[1] * 10**5]}}
    message = error_of(write_raw(tmp_path / "bad.safetensors", header, bytes(4)))
    assert len(message) < 1000


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "thing")
    assert "a folder, pipe or device" in error_of(tmp_path / "thing")


def test_layers_come_in_the_order_of_their_weights(tmp_path):
    names = ["b", "c", "a"]
    tensors = {}
    for name in names:
        tensors[f"{name}.weight"] = torch.zeros(32, 32, dtype=torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale"] = torch.zeros(128, 4, dtype=torch.uint8)
    markers = json.dumps({"layers": {name: {"format": "mxfp8"} for name in names}})
    save_file(tensors, tmp_path / "f", {"_quantization_metadata": markers})
    header = read_header(tmp_path / "f")
    assert list(header.markers) == names
    assert list(header.layers) == sorted(names, key=lambda n: header.tensors[f"{n}.weight"].begin)
    assert list(header.layers) != names


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("place", ["header", "tensor"])
def test_full_precision_may_be_asked_for_in_either_marker(tmp_path, place, value):
    markers = {"header": MARKER, "tensor": MARKER}
    markers[place] = {**MARKER, "full_precision_matrix_mult": value}
    assert read_header(layer_file(tmp_path, **markers)).layers["a"].full_precision is value


@pytest.mark.parametrize("marker", [None, {"format": "float8_e4m3fn"}])
def test_without_a_marker_that_says_mxfp8_there_is_no_layer(tmp_path, marker):
    header = read_header(layer_file(tmp_path, marker))
    assert header.markers == ({} if marker is None else {"a": marker})
    assert header.layers == {}


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"header": "{"}, "is not JSON"),
        ({"header": "[]"}, "is not a JSON object"),
        ({"header": '{"layers": []}'}, "has no object 'layers'"),
        ({"header": '{"layers": {"a": null}}'}, "'a' names no format"),
        ({"header": {"group_size": 32}}, "'a' names no format"),
        ({"tensor": b"mxfp8"}, "'a.comfy_quant' is not JSON"),
        ({"tensor": b'{"format": "mxfp8", "format": "mxfp8"}'}, "'format' twice"),
        ({"header": '{"layers": {"a": {"format": "mxfp8"}, "a": {}}}'}, "'a' twice"),
        (
            {"header": {**MARKER, "note": "x"}, "tensor": {**MARKER, "note": "y"}},
            "says note 'y', another marker of it says 'x'",
        ),
        (
            {"header": MARKER, "tensor": {**MARKER, "orig_shape": [31, 40]}},
            "says orig_shape [31, 40]",
        ),
        (
            {"header": MARKER, "tensor": {**MARKER, "format": "nvfp4"}},
            "says format 'nvfp4', another marker of it says 'mxfp8'",
        ),
        (
            {
                "header": json.dumps({"layers": {"a": MARKER, "model.a": {"format": "nvfp4"}}}),
                "prefix": "model.",
            },
            "'model.a' says format 'nvfp4'",
        ),
        ({"comfy_quant": torch.zeros(8, dtype=torch.int8)}, "a marker is 1-D U8"),
        ({"comfy_quant": torch.zeros(2, 8, dtype=torch.uint8)}, "a marker is 1-D U8"),
        ({"comfy_quant": torch.zeros(70_000, dtype=torch.uint8)}, "at most 65536 bytes"),
        (
            {"tensor": {**MARKER, "full_precision_matrix_mult": "no"}},
            "full_precision_matrix_mult 'no'; it must be true or false",
        ),
    ],
)
def test_a_bad_marker_is_refused(tmp_path, changes, rule):
    assert rule in error_of(layer_file(tmp_path, **changes), "markers")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"weight": None}, "no tensor 'a.weight'"),
        ({"weight": torch.zeros(32, 64, dtype=torch.float8_e5m2)}, "must be 2-D F8_E4M3"),
        ({"weight": torch.zeros(64, dtype=torch.float8_e4m3fn)}, "must be 2-D F8_E4M3"),
        ({"weight": torch.zeros(32, 40, dtype=torch.float8_e4m3fn)}, "columns a multiple of 32"),
        ({"weight_scale": None}, "no tensor 'a.weight_scale'"),
        ({"weight_scale": torch.zeros(128, 4)}, "must be U8 or F8_E8M0"),
        (
            {"weight_scale": torch.zeros(512, dtype=torch.uint8)},
            "in the tiled order; get",
        ),
        ({"weight_scale": torch.zeros(32, 2, dtype=torch.uint8)}, "they look row-major"),
        ({"header": {**MARKER, "group_size": 16}}, "group_size 16; MXFP8 has 32"),
        ({"header": {**MARKER, "group_size": "32"}}, "group_size '32'; MXFP8 has 32"),
        ({"weight": torch.zeros(31, 64, dtype=torch.float8_e4m3fn)}, "the data has shape [31, 64]"),
        ({"header": {**MARKER, "orig_shape": [30, 65]}}, "pads to [32, 96]"),
        ({"header": {**MARKER, "orig_shape": [30]}}, "must be two sizes"),
        ({"header": {**MARKER, "orig_shape": ["30", "40"]}}, "must be two sizes"),
    ],
)
def test_a_layer_whose_tensors_do_not_fit_its_marker_is_refused(tmp_path, changes, rule):
    message = error_of(layer_file(tmp_path, **{"header": MARKER, **changes}), "layers")
    assert rule in message
    assert "layer 'a'" in message
