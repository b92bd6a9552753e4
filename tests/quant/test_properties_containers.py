"""What holds for every safetensors file: our reader and writer against the library's."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from checkpoints import load, raw, same, write_raw
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from strategies import DTYPES as ALL_DTYPES
from strategies import metadata, tensor_of, text

from mxfp8.quant.container.header import DTYPES, FormatError, read_container
from mxfp8.quant.container.writer import Writer

QUICK = settings(max_examples=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


entries = st.dictionaries(
    text.filter(lambda name: name != "__metadata__"),
    st.tuples(
        st.sampled_from(ALL_DTYPES),
        st.lists(st.integers(0, 5), max_size=5).map(tuple),
        st.integers(0, 99),
    ),
    max_size=6,
)


def library_reads(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with safe_open(path, "pt") as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {n: (v.get_dtype(), tuple(v.get_shape())) for n, v in views.items()}


@QUICK
@given(entries, metadata)
def test_what_the_library_writes_is_read_alike(folder, entries, metadata):
    path = folder / "library.safetensors"
    tensors = {name: tensor_of(*entry) for name, entry in entries.items()}
    save_file(tensors, path, metadata or None)  # it writes no JSON for no tensors and {}
    container = read_container(path)
    assert {t.name: (t.dtype, t.shape) for t in container.tensors.values()} == {
        name: entry[:2] for name, entry in entries.items()
    }
    assert container.metadata == metadata
    data = path.read_bytes()
    assert container.file_size == len(data)
    for name, tensor in tensors.items():
        info = container.tensors[name]
        assert data[info.begin : info.end] == raw(tensor)


@QUICK
@given(entries, metadata, st.randoms())
def test_what_we_write_is_read_alike(folder, entries, metadata, places):
    """Whatever the order of tensors and however their bytes are cut."""
    path = folder / "ours.safetensors"
    tensors = {name: tensor_of(*entry) for name, entry in entries.items()}
    with Writer(path, [(n, *e[:2]) for n, e in entries.items()], metadata, True) as writer:
        for name, tensor in tensors.items():
            data = raw(tensor)
            cut = places.randrange(len(data) + 1)
            spans = [(0, cut), (cut, len(data))]
            for first, last in sorted(spans, reverse=places.random() < 0.5):
                writer.write(name, data[first:last], first)
    stored, found = load(path)
    assert found == metadata
    assert stored.keys() == tensors.keys()
    assert all(same(stored[name], tensor) for name, tensor in tensors.items())


# Where ours refuses what the library reads, and why.
STRICTER = (
    "holds the key .* twice",  # readers differ on which of two counts
    "at most 64, for fewer than",  # dimensions: torch has no more
    "nested deeper than 32 levels",
    "further field that is not a plain value",  # the library takes it to a depth of 127
)
numbers = st.one_of(
    st.integers(0, 9), st.sampled_from([-1, 2**31, 2**63 - 1, 2**63, 2**64, 1.0, 0.5, 1e400, True])
)
junk = st.one_of(
    st.none(), numbers, text, st.builds(dict), st.builds(list), st.sampled_from(["[", float("nan")])
)


@st.composite
def headers(draw):
    """A header with the bytes it needs, mostly sound, and its JSON as it may be written."""
    header, position = {}, 0
    for name, (dtype, shape, _) in draw(entries).items():
        size = math.prod(shape) * DTYPES[dtype] // 8
        span = [position, position + size]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
        position += size
    if draw(st.booleans()):
        header["__metadata__"] = draw(metadata)
    for _ in range(draw(st.integers(0, 2))):
        place = draw(
            st.sampled_from([header, *(v for v in header.values() if isinstance(v, dict))])
        )
        key = draw(st.one_of(st.sampled_from([*place, "__metadata__", "x"]), text))
        if isinstance(place.get(key), list) and place[key] and draw(st.booleans()):
            place[key][draw(st.integers(0, len(place[key]) - 1))] = draw(junk)
        else:
            place[key] = draw(st.one_of(junk, st.sampled_from(sorted(DTYPES))))
    body = json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    space = st.sampled_from([b"", b"", b"", b" ", b"\n", b"\0", b"  \t", b"\xef\xbb\xbf"])
    if draw(st.integers(0, 5)) == 0:  # a key twice
        body = body[:-1] + b', "x": 1, "x": 2}'
    extra = draw(st.sampled_from([0, 0, 0, 1, -1]))
    return draw(space) + body + draw(space), bytes(max(0, position + extra))


def one_tensor(fields: bytes):
    """A header with a scalar that has these fields too."""
    return b'{"x": {"dtype": "U8", "shape": [], "data_offsets": [0, 1], %b}}' % fields, b"0"


@settings(QUICK, max_examples=400)
@given(headers())
@example((b'{"__metadata__": null}', b""))
@example((b'{"__metadata__": {"a": "\\ud800"}}', b""))
@example((b'{"\\ud800": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}', b"0"))
@example((b" {}\n", b""))
@example((b'{"x": {"dtype": "U8", "shape": [], "data_offsets": [-0, 1]}}', b"0"))
@example(one_tensor(b'"y": NaN'))
@example(one_tensor(b'"y": 1e3'))
@example(one_tensor(b'"y": 1e400'))
@example(one_tensor(b'"y": "\\ud800"'))
@example(one_tensor(b'"\\ud800": 1'))
@example(one_tensor(b'"y": "\\ud83d\\ude00"'))
@example(one_tensor(b'"y": ' + b"9" * 40))
@example(one_tensor(b'"y": ' + b"9" * 400))
@example(one_tensor(b'"y": ' + b"[" * 130 + b"]" * 130))
def test_what_we_read_the_library_reads_alike(folder, file):
    """The library reads the tensors that we read, or we refuse it, by a rule of ours."""
    path = write_raw(folder / "any.safetensors", *file)
    try:
        theirs = library_reads(path)
    except (SafetensorError, OSError) as error:
        theirs = error
    try:
        ours = {t.name: (t.dtype, t.shape) for t in read_container(path).tensors.values()}
    except FormatError as error:
        assert str(error).startswith(path.name)
        stricter = any(re.search(rule, str(error)) for rule in STRICTER)
        assert isinstance(theirs, Exception) or stricter, error
        return
    assert ours == theirs
