"""Models in several files with an index, and folders as model hubs have them."""

from __future__ import annotations

import json
import os

import pytest
from checkpoints import matrix
from model_folders import INDEX, converted, equal, parsed, write_shards
from quantized_files import MODEL
from safetensors.torch import save_file

from mxfp8.quant.cli import main
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.format import FormatError
from mxfp8.quant.sources import shards
from mxfp8.quant.sources.open import open_source


def edit(index, change):
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a conversion of one file gives."""
    path = tmp_path_factory.mktemp("whole") / "source"
    save_file(MODEL, path, {"format": "pt"})
    return converted(path)


@pytest.mark.parametrize("place", ["index", "folder", "pipeline", "unet", "transformer alone"])
def test_a_model_in_several_files_is_converted_as_if_it_were_one(tmp_path, whole, place):
    inside = {"pipeline": "transformer", "unet": "unet", "transformer alone": "transformer"}
    index = write_shards(tmp_path / "model" / inside.get(place, ""), MODEL)
    if place in ("pipeline", "unet"):
        (tmp_path / "model" / "model_index.json").write_text("{}")
        write_shards(tmp_path / "model" / "text_encoder", {"other.weight": matrix(32, 32)})
    found, metadata = converted(index if place == "index" else tmp_path / "model")
    assert equal(found, whole[0])
    assert parsed(metadata) == parsed(whole[1])


def test_links_into_a_store_of_files_are_followed(tmp_path, whole):
    """As huggingface_hub keeps models: names in one folder, contents in another."""
    index = write_shards(tmp_path / "blobs", MODEL)
    model = tmp_path / "model"
    model.mkdir()
    for number, path in enumerate(sorted(index.parent.iterdir())):
        blob = path.rename(path.with_name(f"blob{number}"))
        (model / path.name).symlink_to(blob)
    assert equal(converted(model)[0], whole[0])


def test_a_model_of_many_files_needs_few_open_at_a_time(tmp_path):
    tensors = {f"blocks.{i}.lin.weight": matrix(32, 32, seed=i) for i in range(60)}
    index = write_shards(tmp_path / "model", tensors, count=60)
    resource = pytest.importorskip("resource", reason="Windows has no limit on open files")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, hard))
    try:
        report = convert_file(index, tmp_path / "target")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(report.layers) == 60
    assert len(os.listdir("/dev/fd")) <= used


def test_metadata_is_merged_and_the_first_file_counts(tmp_path):
    index = write_shards(tmp_path / "model", {"a.weight": matrix(32, 32), "b": matrix(1, 1)}, 2)
    first, second = sorted(index.parent.glob("*.safetensors"))
    save_file({"a.weight": matrix(32, 32)}, first, {"format": "pt", "title": "one"})
    save_file({"b": matrix(1, 1)}, second, {"title": "two", "author": "me"})
    with open_source(index) as source:
        assert source.metadata == {"format": "pt", "title": "one", "author": "me"}


@pytest.mark.parametrize("size", [1, "many", None, -1.5])
def test_a_wrong_total_size_is_only_a_warning(tmp_path, caplog, size):
    index = write_shards(tmp_path / "model", {"a.weight": matrix(32, 32), "b": matrix(1, 1)})
    edit(index, lambda content: content["metadata"].update(total_size=size))
    found, _ = converted(index)
    assert "a.weight_scale" in found
    assert ("total_size" in caplog.text) == (size is not None)


def named(name):
    return json.dumps({"weight_map": {"a.weight": name}})


BAD_INDEXES = {
    "not JSON": ("{", "the index is not JSON"),
    "a list": ("[]", "the index is not a JSON object"),
    "deep": ("[" * 100_000, "the index is not JSON"),
    "binary": (b"\xff\xfe", "the index is not JSON"),
    "nothing": ("{}", "no object 'weight_map'; give the model's folder"),
    "empty": ('{"weight_map": {}}', "no object 'weight_map'"),
    "no map": ('{"weight_map": ["a"]}', "no object 'weight_map'"),
    "twice": ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' twice"),
    "no name": ('{"weight_map": {"a": 1}}', "'a' maps to 1 instead"),
    "a folder up": (named("../out.safetensors"), "in the index's own folder"),
    "absolute": (named("/etc/passwd"), "in the index's own folder"),
    "deeper": (named("a/b.safetensors"), "in the index's own folder"),
    "Windows": (named("..\\out.safetensors"), "in the index's own folder"),
    "drive": (named("C:out.safetensors"), "in the index's own folder"),
    "stream": (named("a.safetensors:b"), "in the index's own folder"),
    "dots": (named(".."), "in the index's own folder"),
    "no letters": (named(""), "in the index's own folder"),
    "NUL": (named("a\0.safetensors"), "in the index's own folder"),
    "pickles": (named("pytorch_model.bin"), "not a .safetensors file; get"),
    "missing": (named("a-00001-of-00002.safetensors"), "'a-00001-of-00002.safetensors' is missing"),
    "folder": (named("folder.safetensors"), "'folder.safetensors' is missing"),
}


@pytest.mark.parametrize(("content", "words"), BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_a_bad_index_is_refused_by_name(tmp_path, content, words):
    for place in (tmp_path, tmp_path / "model"):  # there to be found, if it were looked for
        place.mkdir(exist_ok=True)
        save_file({"a.weight": matrix(32, 32)}, place / "out.safetensors")
    (tmp_path / "model" / "folder.safetensors").mkdir()
    index = tmp_path / "model" / INDEX
    index.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FormatError, match=f"^{INDEX}: .*({words})"):
        convert_file(index, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_an_oversized_index_is_refused(tmp_path, monkeypatch):
    index = write_shards(tmp_path, MODEL)
    monkeypatch.setattr(shards, "MAX_INDEX", 100)
    with pytest.raises(FormatError, match="at most 100 bytes"):
        convert_file(index, tmp_path / "target")


def forget(content):
    content["weight_map"].pop("a.weight")


def misplace(content):
    names = content["weight_map"]
    names["a.weight"], names["b.weight"] = names["b.weight"], names["a.weight"]


def invent(content):
    content["weight_map"] |= {f"new{i}": content["weight_map"]["a.weight"] for i in range(7)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (forget, "hold tensors that it does not name: 'a.weight'"),
        (misplace, "not in the parts that it names: 'a.weight', 'b.weight'"),
        (invent, "'new0', 'new1', 'new2', 'new3', 'new4' and 2 more"),
    ],
)
def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path, change, words):
    tensors = {name: matrix(32, 32) for name in ("a.weight", "b.weight", "c", "d")}
    index = write_shards(tmp_path, tensors, 2)
    edit(index, change)
    with pytest.raises(FormatError, match=f"^{INDEX}: .*{words}"):
        convert_file(index, tmp_path / "target")


def test_a_tensor_in_two_files_is_refused(tmp_path):
    index = write_shards(tmp_path, {"a.weight": matrix(32, 32), "b": matrix(1, 1)}, 2)
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    save_file({"a.weight": matrix(32, 32, seed=1), "b": matrix(1, 1)}, second)
    with pytest.raises(FormatError, match=r"'a\.weight' is both in 'model-00001.* in 'model-00002"):
        convert_file(index, tmp_path / "target")


def test_a_damaged_part_is_refused_by_its_own_name(tmp_path):
    index = write_shards(tmp_path, MODEL)
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    os.truncate(second, second.stat().st_size - 1)
    with pytest.raises(FormatError, match=r"^model-00002-of-00003\.safetensors: truncated"):
        convert_file(index, tmp_path / "target")


def test_one_of_several_files_alone_is_refused_with_the_name_of_the_index(tmp_path):
    index = write_shards(tmp_path, MODEL)
    part = min(tmp_path.glob("*.safetensors"))
    with pytest.raises(FormatError, match=f"one part of a model; give its index '{INDEX}'"):
        convert_file(part, tmp_path / "target")
    index.unlink()
    with pytest.raises(FormatError, match=r"no index beside it names it; download"):
        convert_file(part, tmp_path / "target")


def test_one_of_one_is_a_model(tmp_path):
    path = tmp_path / "model-00001-of-00001.safetensors"
    save_file({"a.weight": matrix(32, 32)}, path)
    assert "a.weight_scale" in converted(path)[0]


def test_no_part_of_the_source_is_ever_the_target(tmp_path):
    index = write_shards(tmp_path, MODEL)
    for path in (index, *tmp_path.glob("*.safetensors")):
        before = path.read_bytes()
        with pytest.raises(ValueError, match="would replace the source"):
            convert_file(index, path, overwrite=True)
        assert path.read_bytes() == before


def make(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        save_file({"a.weight": matrix(32, 32)}, folder / name)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a.safetensors", "b.safetensors"), "several models .*'a.safetensors', 'b.safetensors'"),
        (("transformer/a.safetensors", "transformer_2/a.safetensors"), "'transformer', 'transf"),
        (("vae/a.safetensors",), "no safetensors model in this folder"),
        (("model.bin",), "but torch files"),
        (("a-00001-of-00002.safetensors",), "no safetensors model .* needs its index"),
    ],
)
def test_a_folder_that_is_no_one_model_is_refused(tmp_path, names, words):
    make(tmp_path / "model", *names)
    with pytest.raises(FormatError, match=f"^model: .*{words}"):
        convert_file(tmp_path / "model", tmp_path / "target")


def test_the_command_plans_a_folder(tmp_path, capsys):
    write_shards(tmp_path / "model", MODEL)
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "x.sft"), "--dry-run"]) == 0
    assert "5 of 15 tensors would be MXFP8" in capsys.readouterr().out


def test_no_report_replaces_a_part_of_the_source(tmp_path, capsys):
    index = write_shards(tmp_path / "model", MODEL)
    for path in list(index.parent.iterdir()):
        before = path.read_bytes()
        words = ("convert", index.parent, tmp_path / "x.sft", "--report", path)
        assert main(list(map(str, words))) == 1
        assert "would replace" in capsys.readouterr().err
        assert path.read_bytes() == before
