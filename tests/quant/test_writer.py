"""Writing a file: whole and as any reader reads it, or not at all."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checkpoints import flip, load, matrix, raw, same
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mxfp8.quant.container.writer import Writer, _pwrite, _seek_and_write
from mxfp8.quant.format import DTYPES, FormatError
from mxfp8.quant.sources.file import HEADER_DTYPES

# Sizes that are and are not multiples of 64 bytes, so that a careless layout would misalign some.
TENSORS = {
    "norm.weight": matrix(1, 7, torch.bfloat16)[0],
    "flags": torch.tensor([True, False, True]),
    "a.weight": matrix(32, 64).to(torch.float8_e4m3fn),
    "a.weight_scale": torch.arange(512).to(torch.uint8).reshape(128, 4),
    "a.comfy_quant": torch.arange(93, dtype=torch.uint8),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "ids": torch.tensor([-1, 2**40]),
    "table": matrix(3, 5, torch.float32),
    "half": matrix(3, 3, torch.float16),
}


def planned(tensors=TENSORS):
    return [(name, HEADER_DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]


def write(target, metadata=None, overwrite=False, step=None, order=1):
    """Write TENSORS, each in pieces of `step` bytes, forwards or backwards through the tensors."""
    with Writer(target, planned(), metadata or {}, overwrite) as opened:
        for name, tensor in list(TENSORS.items())[::order]:
            data = raw(tensor)
            for at in range(0, len(data), step or len(data) or 1):
                opened.write(name, data[at : at + (step or len(data))])
    return opened


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_safetensors_library_reads_what_was_written(tmp_path):
    write(tmp_path / "out")
    found = load_file(tmp_path / "out")
    assert found.keys() == TENSORS.keys()
    assert [name for name, t in TENSORS.items() if not same(found[name], t)] == []


@pytest.mark.parametrize("metadata", [{}, {"format": "pt", "note": 'd\xe9j\xe0 "vu"\n'}])
def test_metadata_is_kept(tmp_path, metadata):
    write(tmp_path / "out", metadata)
    assert load(tmp_path / "out")[1] == metadata


def test_the_target_appears_at_the_end_with_the_size_that_was_announced(tmp_path):
    with Writer(tmp_path / "out", [("a", "U8", (3,))], {}) as writer:
        writer.write("a", b"abc")
        assert files(tmp_path) == [writer.part_file.name]
    assert files(tmp_path) == ["out"]
    assert (tmp_path / "out").stat().st_size == writer.nbytes


def test_the_same_tensors_give_the_same_bytes_however_they_are_cut(tmp_path):
    write(tmp_path / "whole", {"k": "v"})
    write(tmp_path / "cut", {"k": "v"}, step=5, order=-1)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "cut").read_bytes()


def test_pieces_may_come_in_any_order_from_any_thread(tmp_path):
    write(tmp_path / "whole")
    pieces = [(name, raw(t)[at : at + 7], at) for name, t in TENSORS.items()
              for at in range(0, len(raw(t)), 7)]  # fmt: skip
    with Writer(tmp_path / "cut", planned(), {}) as writer, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda piece: writer.write(*piece), pieces[::-1]))
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("pieces", [[(b"ab", 0), (b"bc", 1)], [(b"a", 0), (b"cd", 2)]])
def test_pieces_that_overlap_or_leave_a_gap_are_refused(tmp_path, pieces):
    with (
        pytest.raises(FormatError, match="'a' was not fully written"),
        Writer(tmp_path / "out", [("a", "U8", (4,))], {}) as writer,
    ):
        for piece in pieces:
            writer.write("a", *piece)
    assert files(tmp_path) == []


shapes = st.lists(st.integers(0, 65), max_size=3).map(tuple)
tensor_plans = st.lists(
    st.tuples(st.sampled_from(sorted(DTYPES)), shapes).filter(
        lambda t: math.prod(t[1]) * DTYPES[t[0]] % 8 == 0
    ),
    max_size=8,
)


@given(tensor_plans)
def test_tensors_are_aligned_and_leave_no_gap(plans):
    tensors = [(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(plans)]
    writer = Writer("unopened", tensors, {})
    position = min((t.begin for t in writer.tensors.values()), default=0)
    assert position % 64 == 0
    for info in writer.tensors.values():
        assert info.begin == position
        assert info.begin % max(1, DTYPES[info.dtype] // 8) == 0
        assert info.begin % 64 == 0 or info.nbytes % 64
        position = info.end


def test_mxfp8_data_and_scales_are_aligned_to_64_bytes(tmp_path):
    content = (tmp_path / "out", write(tmp_path / "out"))[0].read_bytes()
    for name in ("a.weight", "a.weight_scale"):
        assert content.index(raw(TENSORS[name])) % 64 == 0


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_leaves_everything_as_it_was(tmp_path, error, overwrite):
    if overwrite:
        (tmp_path / "out").write_bytes(b"old")
    before = files(tmp_path)
    with (
        pytest.raises(error),
        Writer(tmp_path / "out", [("a", "U8", (4,))], {}, overwrite) as writer,
    ):
        writer.write("a", b"ab")
        raise error
    assert files(tmp_path) == before
    assert not overwrite or (tmp_path / "out").read_bytes() == b"old"


def test_an_existing_target_is_refused_before_work_begins_and_stays(tmp_path):
    target = tmp_path / "out"
    target.write_bytes(b"old")
    with pytest.raises(FileExistsError, match="overwrite"), Writer(target, planned(), {}):
        pytest.fail("the work began")
    assert (files(tmp_path), target.read_bytes()) == (["out"], b"old")


def test_overwrite_replaces(tmp_path):
    (tmp_path / "out").write_bytes(b"old")
    write(tmp_path / "out", overwrite=True)
    assert load(tmp_path / "out")[0].keys() == TENSORS.keys()
    assert files(tmp_path) == ["out"]


def no_hard_links(source, target):
    raise OSError(errno.EPERM, "this file system has no hard links")


@pytest.mark.parametrize("links", [True, False])
def test_a_target_made_by_someone_else_meanwhile_is_kept(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", no_hard_links)
    with (
        pytest.raises(FileExistsError, match="overwrite"),
        Writer(tmp_path / "out", [("a", "U8", (1,))], {}) as writer,
    ):
        writer.write("a", b"a")
        (tmp_path / "out").write_bytes(b"theirs")
    assert files(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"theirs"


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_hard_links)
    write(tmp_path / "out")
    assert files(tmp_path) == ["out"]
    assert load(tmp_path / "out")[0].keys() == TENSORS.keys()


@pytest.mark.parametrize("written", [b"", b"abc"])
def test_a_tensor_that_was_not_fully_written_is_refused(tmp_path, written):
    with (
        pytest.raises(FormatError, match="out: tensor 'b' was not fully written"),
        Writer(tmp_path / "out", [("a", "U8", (1,)), ("b", "U8", (4,))], {}) as writer,
    ):
        writer.write("a", b"a")
        writer.write("b", written)
    assert files(tmp_path) == []


def damage_first(writer):
    flip(writer.part_file, writer.tensors["a"].begin)


def damage_last(writer):
    flip(writer.part_file, writer.nbytes - 1, 0x01)


def damage_header(writer):
    flip(writer.part_file, writer.part_file.read_bytes().index(b'"a"') + 1, 0x02)


def cut_short(writer):
    os.truncate(writer.part_file, writer.nbytes - 1)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_first, "tensor 'a' reads back differently"),
        (damage_last, "tensor 'b' reads back differently"),
        (damage_header, "header read back differs"),
        (cut_short, "truncated"),
    ],
)
def test_what_reads_back_differently_is_refused(tmp_path, damage, words):
    with (
        pytest.raises(FormatError, match=words),
        Writer(tmp_path / "out", [("a", "U8", (64,)), ("b", "U8", (100,))], {}) as writer,
    ):
        writer.write("a", bytes(64))
        writer.write("b", bytes(100))
        damage(writer)
    assert files(tmp_path) == []


def test_two_tensors_of_one_name_are_refused(tmp_path):
    with pytest.raises(FormatError, match="two tensors are called 'a'"):
        Writer(tmp_path / "out", [("a", "U8", (1,)), ("a", "F32", (1,))], {})


def test_a_full_disk_is_noticed_before_work_begins(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 100, 100))
    with pytest.raises(OSError, match="free and the file needs") as caught:
        write(tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert files(tmp_path) == []


def test_a_disk_that_fills_up_at_the_start_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor, data, offset):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("mxfp8.quant.container.writer._pwrite", full)
    with pytest.raises(OSError, match="the disk is full; make room for"):
        write(tmp_path / "out")
    assert files(tmp_path) == []


@pytest.mark.parametrize("write_at", [_pwrite, _seek_and_write])
def test_short_writes_are_completed(tmp_path, monkeypatch, write_at):
    monkeypatch.setattr(
        "mxfp8.quant.container.writer._pwrite",
        lambda descriptor, data, at: write_at(descriptor, data[:100], at),
    )
    write(tmp_path / "out")
    assert same(load_file(tmp_path / "out")["a.weight"], TENSORS["a.weight"])
