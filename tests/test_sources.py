"""What can be converted: several files, folders, other names; what cannot, by its name."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile

import numpy
import pytest
import torch
from checkpoints import load, matrix, raw, same, write_raw
from diffusers_names import MODELS, flux_state, rename, split_halves, zimage_state
from safetensors.torch import save_file, save_model
from test_convert import MODEL

from mxfp8.quant import shards
from mxfp8.quant.cli import main
from mxfp8.quant.convert import convert, convert_file, plan_source
from mxfp8.quant.diffusers import comfy_names
from mxfp8.quant.format import FormatError
from mxfp8.quant.opening import open_source
from mxfp8.quant.source import HEADER_DTYPES, FileSource, Part, PartSource, as_bytes

INDEX = "model.safetensors.index.json"


def write_shards(folder, tensors, count=3, metadata=None, index=INDEX):
    """A model in several files with its index, as model hubs have them; returns the index."""
    folder.mkdir(parents=True, exist_ok=True)
    keys, weight_map = list(tensors), {}
    for number in range(count):
        name = f"{index.split('.')[0]}-{number + 1:05}-of-{count:05}.safetensors"
        part = {key: tensors[key] for key in keys[number::count]}
        save_file(part, folder / name, metadata or {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    total = sum(len(raw(tensor)) for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / index).write_text(json.dumps(content))
    return folder / index


def edit(index, change):
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


def converted(source, **options):
    """Tensors and metadata of the conversion of a path."""
    target = source.parent / f"{source.name}-out"
    convert_file(source, target, **options)
    return load(target)


def parsed(metadata):
    """Metadata with its markers as an object: layers may come in any order."""
    return {**metadata, "_quantization_metadata": json.loads(metadata["_quantization_metadata"])}


def equal(found, wanted) -> bool:
    return found.keys() == wanted.keys() and all(same(found[k], wanted[k]) for k in wanted)


# Files of other kinds


def torch_file(zipped):
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def archive(kind):
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("model.safetensors", b"abc")
    else:
        with tarfile.open(fileobj=buffer, mode=kind) as file:
            file.addfile(tarfile.TarInfo("model.safetensors"))
    return buffer.getvalue()


def array():
    buffer = io.BytesIO()
    numpy.save(buffer, numpy.ones(3))
    return buffer.getvalue()


FOREIGN = {
    "gguf": (b"GGUF\x03\0\0\0" + bytes(64), "a GGUF file, quantised already; convert the BF16"),
    "ggml": (b"lmgg" + bytes(64), "a GGML file"),
    "torch": (torch_file(True), "a zip archive, such as a .ckpt.*take the model as .safetensors"),
    "torch, old": (torch_file(False), "a pickle, such as an old .ckpt"),
    "pickle": (pickle.dumps({"state_dict": {}}), "a pickle"),
    "zip": (archive("zip"), "a zip archive"),
    "tar": (archive("w"), "an archive; unpack it"),
    "tar.gz": (archive("w:gz"), "an archive; unpack it"),
    "onnx": (b"\x08\x08\x12\x07pytorch" + bytes(64), "an ONNX file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "an HDF5 file"),
    "numpy": (array(), "a NumPy array"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "html": (b"<!DOCTYPE html><html><head></head></html>", "a web page, not a model"),
    "json": (b'{"weight_map": {"a.weight": "model.safetensors"}}', "a JSON file"),
    "zeros": (bytes(4096), "download is not complete"),
}


@pytest.mark.parametrize(("content", "words"), FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ""])
def test_a_file_of_another_kind_is_told_by_its_content(tmp_path, content, words, suffix):
    source = tmp_path / f"model{suffix}"
    source.write_bytes(content)
    with pytest.raises(FormatError, match=rf"model{suffix}: no safetensors file but .*{words}"):
        convert_file(source, tmp_path / "target")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    "start", [b"\x80\x02", b"\x1f\x8b", b"\x08\x08\x12", b"\x80\x04\x95", b"{\n"]
)
def test_a_header_whose_length_looks_like_another_kind_is_read(tmp_path, start):
    text = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    text = text.ljust(int.from_bytes(start, "little"))
    with FileSource(write_raw(tmp_path / "source", text, b"a")) as source:
        assert source.tensors == {"a": ("U8", (1,))}


# Models that are quantised already

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu


def codes(dtype=torch.uint8, *shape):
    return torch.ones(shape or (32, 32), dtype=torch.uint8).view(dtype)


def marker(**conf):
    return torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)


ONE = torch.ones(())
QUANTISED = {
    "FP8 E4M3": ({"w.weight": codes(E4M3)}, r"FP8 \(E4M3\) \('w\.weight' is F8_E4M3 \[32, 32\]"),
    "FP8 E5M2": ({"w.weight": codes(E5M2)}, r"FP8 \(E5M2\)"),
    "FP8, not a weight": ({"experts.up": codes(E4M3)}, r"FP8 \(E4M3\)"),
    "scaled_fp8": ({"w.weight": codes(E4M3), "scaled_fp8": codes(E4M3, 2)}, "scaled FP8"),
    "scale_weight": (
        {"w.weight": codes(E4M3), "w.scale_weight": ONE}, r"scaled FP8 \(E4M3\)"
    ),
    "weight_scale": (
        {"w.weight": codes(E5M2), "w.weight_scale": ONE}, r"scaled FP8 \(E5M2\)"
    ),
    "block-scaled": ({"w.weight_scale_inv": ONE, "w.weight": codes(E4M3)}, "block-scaled FP8"),
    "MXFP8": (
        {"w.weight": codes(E4M3), "w.comfy_quant": marker(format="mxfp8")},
        r"MXFP8 \(the marker 'w\.comfy_quant' says so\); convert the BF16",
    ),
    "MXFP8 without markers": (
        {"w.weight": codes(E4M3), "w.weight_scale": codes(torch.uint8, 128, 4)},
        "MXFP8 .*markers are missing, and `mxfp8 repair`",
    ),
    "MXFP8 without markers, E8M0": (
        {"w.weight": codes(E4M3), "w.weight_scale": codes(E8M0, 128, 4)}, "MXFP8 .*repair"
    ),
    "NVFP4": ({"w.comfy_quant": marker(format="nvfp4"), "w.weight": codes()}, "NVFP4"),
    "NVFP4 without markers": (
        {"w.weight": codes(), "w.weight_scale": codes(E4M3, 128, 4), "w.weight_scale_2": ONE},
        "NVFP4",
    ),
    "NVFP4 without second scales": (
        {"w.weight": codes(), "w.weight_scale": codes(E4M3, 128, 4)}, "NVFP4"
    ),
    "int8": (
        {"w.weight": codes(torch.int8), "w.comfy_quant": marker(format="int8_tensorwise")}, "INT8 "
    ),
    "convrot": (
        {"w.comfy_quant": marker(format="int8_tensorwise", convrot=True)}, "INT8 with ConvRot"
    ),
    "convrot, 4 bits": ({"w.comfy_quant": marker(format="convrot_w4a4")}, "INT4 with ConvRot"),
    "int8 without markers": ({"w.weight": codes(torch.int8)}, "INT8"),
    "bitsandbytes int8": ({"w.weight": codes(torch.int8), "w.SCB": torch.ones(32)}, r"INT8 \(bits"),
    "bitsandbytes nf4": (
        {"w.weight": codes(torch.uint8, 512, 1), "w.weight.absmax": codes(),
         "w.weight.quant_state.bitsandbytes__nf4": codes()}, r"NF4 \(bitsandbytes\)",
    ),
    "GPTQ": ({"w.qweight": torch.ones(4, 32, dtype=torch.int32)}, "GPTQ or AWQ"),
    "SVDQuant": ({"w.qweight": codes(torch.int8), "w.wscales": ONE}, "SVDQuant"),
    "HQQ": ({"w.W_q": codes()}, "HQQ"),
    "Quanto": ({"w.weight._data": codes(torch.int8)}, "Quanto"),
    "another marker": ({"w.comfy_quant": marker(format="fp3")}, "'fp3'"),
    "no format": ({"w.comfy_quant": marker(x=1)}, "an unnamed format"),
    "no marker": ({"w.comfy_quant": codes(torch.uint8, 100_000)}, "an unnamed format"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "words"), QUANTISED.values(), ids=QUANTISED)
def test_a_quantised_model_is_refused_by_the_name_of_its_format(tmp_path, tensors, words):
    save_file({"a.weight": matrix(32, 32), **tensors}, tmp_path / "source")
    with pytest.raises(FormatError, match=f"^source: already quantised as {words}"):
        convert_file(tmp_path / "source", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_fewer_bits_are_refused_by_name_too(tmp_path, dtype):
    bits = 4 if dtype == "F4" else 6
    end = 32 * 32 * bits // 8
    header = {"w.weight": {"dtype": dtype, "shape": [32, 32], "data_offsets": [0, end]}}
    write_raw(tmp_path / "source", header, bytes(end))
    with pytest.raises(FormatError, match=f"already quantised as FP{bits}"):
        convert_file(tmp_path / "source", tmp_path / "target")


def test_a_quantised_model_with_diffusers_names_is_refused_as_quantised(tmp_path):
    state = {k: v.to(E4M3) for k, v in rename("flux", flux_state()).items()}
    state["transformer_blocks.0.attn.to_q.weight_scale"] = ONE
    write_shards(tmp_path / "flux", state)
    with pytest.raises(FormatError, match=r"^flux: already quantised as FP8 \(E4M3\)"):
        convert_file(tmp_path / "flux", tmp_path / "target")


# Several files


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
    "no name": ('{"weight_map": {"a": 1}}', "no file name but 1"),
    "a folder up": (named("../out.safetensors"), "in the index's own folder"),
    "absolute": (named("/etc/passwd"), "in the index's own folder"),
    "deeper": (named("a/b.safetensors"), "in the index's own folder"),
    "Windows": (named("..\\out.safetensors"), "in the index's own folder"),
    "drive": (named("C:out.safetensors"), "in the index's own folder"),
    "stream": (named("a.safetensors:b"), "in the index's own folder"),
    "dots": (named(".."), "in the index's own folder"),
    "no letters": (named(""), "in the index's own folder"),
    "NUL": (named("a\0.safetensors"), "in the index's own folder"),
    "pickles": (named("pytorch_model.bin"), "no .safetensors; take"),
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
        with pytest.raises(ValueError, match="the target is the source"):
            convert_file(index, path, overwrite=True)
        assert path.read_bytes() == before


def test_a_file_that_is_replaced_meanwhile_is_an_error(tmp_path):
    path = tmp_path / "source"
    save_file({"a.weight": matrix(32, 32)}, path)
    with FileSource(path) as source:
        source.close()
        assert same(source.rows("a.weight", 3, 5), matrix(32, 32)[3:5])
        source.close()
        save_file({"a.weight": matrix(64, 32)}, path)
        with pytest.raises(OSError, match="source: the file was changed or replaced"):
            source.rows("a.weight", 3, 5)


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
        (("a-00001-of-00002.safetensors",), "no safetensors model in this folder, with its index"),
    ],
)
def test_a_folder_that_is_no_one_model_is_refused(tmp_path, names, words):
    make(tmp_path / "model", *names)
    with pytest.raises(FormatError, match=f"^model: .*{words}"):
        convert_file(tmp_path / "model", tmp_path / "target")


def test_the_command_plans_a_folder(tmp_path, capsys):
    write_shards(tmp_path / "model", MODEL)
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "x"), "--dry-run"]) == 0
    assert "5 of 15 tensors would be MXFP8" in capsys.readouterr().out


# Other names


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_diffusers_names_becomes_what_the_original_becomes(tmp_path, name, prefix):
    state = {prefix + key: value for key, value in MODELS[name]().items()}
    renamed = {prefix + k: v for k, v in rename(name, MODELS[name]()).items()}
    assert renamed.keys() != state.keys()
    other = {"vae.decoder.weight": matrix(32, 32)} if prefix else {}
    save_file({**state, **other}, tmp_path / "original")
    index = write_shards(tmp_path / "model", {**renamed, **other}, 4)
    found, wanted = converted(index), converted(tmp_path / "original")
    assert equal(found[0], wanted[0])
    assert parsed(found[1]) == {"format": "pt", **parsed(wanted[1])}


def test_a_single_file_with_diffusers_names_too(tmp_path):
    save_file(rename("zimage", zimage_state()), tmp_path / "renamed")
    save_file(zimage_state(), tmp_path / "original")
    assert equal(converted(tmp_path / "renamed")[0], converted(tmp_path / "original")[0])


def test_parts_of_several_precisions_are_joined_exactly(tmp_path):
    state = rename("zimage", zimage_state())
    q = "layers.0.attention.to_q.weight"
    state[q] = torch.nextafter(state[q].float(), torch.tensor(torch.inf))  # more than bfloat16
    save_file(state, tmp_path / "renamed")
    joined = zimage_state()
    qkv = joined["layers.0.attention.qkv.weight"].float()
    qkv[: len(state[q])] = state[q]
    save_file({**joined, "layers.0.attention.qkv.weight": qkv}, tmp_path / "original")
    for exclude in (None, "qkv"):  # quantised, and kept
        found = converted(tmp_path / "renamed", exclude=exclude, overwrite=True)
        wanted = converted(tmp_path / "original", exclude=exclude, overwrite=True)
        assert equal(found[0], wanted[0])


REFUSED = {
    "AuraFlow": ["joint_transformer_blocks.0.attn.add_k_proj.weight"],
    "PixArt": ["adaln_single.emb.timestep_embedder.linear_1.bias", "pos_embed.proj.bias"],
    "Stable Diffusion 3": ["transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"],
    "a UNet": ["conv_in.weight", "down_blocks.0.attentions.0.proj_in.weight"],
    "a transformer": ["x_embedder.weight", "transformer_blocks.0.attn.to_q.weight"],
    "Hunyuan Video": ["context_embedder.time_text_embed.timestep_embedder.linear_1.weight"],
    "Wan": ["condition_embedder.time_embedder.linear_1.weight", "blocks.0.attn1.to_q.weight"],
    "Krea 2": ["text_fusion.projector.weight"],
}


@pytest.mark.parametrize(("model", "keys"), REFUSED.items(), ids=REFUSED)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_other_models_with_diffusers_names_are_refused_by_name(tmp_path, model, keys, prefix):
    save_file({prefix + key: matrix(32, 32) for key in keys}, tmp_path / "source")
    with pytest.raises(FormatError, match=f"^source: {model} under the names of diffusers: Comfy"):
        convert_file(tmp_path / "source", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


CHANGES = {
    "a part is missing": (
        {"layers.0.attention.to_k.weight": None},
        r"qkv\.weight' of Z-Image .* 1",
    ),
    "unknown": ({"controlnet.weight": matrix(1, 1)}, r"Z-Image .* has no 'controlnet\.weight'"),
    "both names": (
        {"all_final_layer.2-1.linear.weight": matrix(1, 1), "final_layer.linear.weight": None},
        None,
    ),
    "widths": ({"layers.0.attention.to_k.weight": matrix(32, 64)}, "cannot be joined"),
    "dtypes": (
        {"layers.0.attention.to_k.weight": torch.ones(32, 32, dtype=torch.float64)},
        "BF16 and F64; they must be",
    ),
    "scalars": ({"layers.0.attention.to_k.weight": torch.ones(())}, "cannot be joined"),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_what_does_not_fit_together_is_refused(tmp_path, change, words):
    state = {**rename("zimage", zimage_state()), **change}
    save_file({k: v for k, v in state.items() if v is not None}, tmp_path / "source")
    if words is None:
        assert "final_layer.linear.weight" in converted(tmp_path / "source")[0]
        return
    with pytest.raises(FormatError, match=f"^source: .*{words}"):
        convert_file(tmp_path / "source", tmp_path / "target")


def test_one_tensor_under_two_names_is_refused(tmp_path):
    state = rename("flux", flux_state())
    state["transformer_blocks.0.attn.norm_q.scale"] = torch.ones(16)
    save_file(state, tmp_path / "source")
    with pytest.raises(FormatError, match=r"query_norm\.scale' is there under two names"):
        convert_file(tmp_path / "source", tmp_path / "target")


def test_halves_that_are_none_are_refused(tmp_path):
    state = {**rename("flux", flux_state()), "norm_out.linear.bias": torch.ones(3)}
    save_file(state, tmp_path / "source")
    with pytest.raises(FormatError, match=r"'norm_out\.linear\.bias' \[3\] has no two halves"):
        convert_file(tmp_path / "source", tmp_path / "target")


def test_names_that_both_share_stay():
    keys = ["transformer_blocks.0.img_mod.1.weight", "txt_norm.weight", "img_in.weight",
            "transformer_blocks.0.attn.add_q_proj.weight", "norm_out.linear.weight"]  # fmt: skip
    assert comfy_names("qwen", dict.fromkeys(keys, ("BF16", (64, 64)))) is None
    for make_model in MODELS.values():
        tensors = {k: (HEADER_DTYPES[v.dtype], tuple(v.shape)) for k, v in make_model().items()}
        assert comfy_names("original", tensors) is None


def test_rows_and_pieces_of_joined_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr("mxfp8.quant.source._PIECE", 16)
    tensors = {"a": matrix(5, 7), "b": matrix(3, 7, seed=1), "v": torch.arange(6.0)}
    tensors["f"] = matrix(4, 7, torch.float32)
    save_file({**tensors, "none": torch.zeros(0, 7, dtype=torch.bfloat16)}, tmp_path / "source")
    parts = {
        "ab": (Part("a"), Part("none"), Part("b", 1, 3)),
        "v": (Part("v", 3, 6), Part("v", 0, 3)),
        "c": (Part("a"),),
        "mixed": (Part("a", 0, 4), Part("f")),
    }
    wanted = {
        "ab": torch.cat((tensors["a"], tensors["b"][1:])),
        "v": split_halves(tensors["v"]),
        "c": tensors["a"],
        "mixed": torch.cat((tensors["a"][:4].float(), tensors["f"])),
    }
    with PartSource(FileSource(tmp_path / "source"), parts) as source:
        for key, value in wanted.items():
            assert source.tensors[key] == (HEADER_DTYPES[value.dtype], tuple(value.shape))
            pieces = [len(piece) for piece in source.pieces(key)]
            assert set(pieces[:-1]) <= {16}  # as a file's are
            assert b"".join(source.pieces(key)) == raw(value)
            for first in range(len(value)):
                for last in range(first + 1, len(value) + 1):
                    assert same(source.rows(key, first, last), value[first:last])


# Shapes, sizes, shared tensors


def test_a_tensor_of_more_than_2_to_the_31_elements_is_planned_and_read(tmp_path):
    rows = cols = 1 << 16
    size = rows * cols * 2
    info = {"dtype": "BF16", "shape": [rows, cols], "data_offsets": [0, size]}
    path = write_raw(tmp_path / "source", {"blocks.0.lin.weight": info})
    begin = path.stat().st_size
    os.truncate(path, begin + size)  # sparse: it takes no space
    last = matrix(1, cols)
    with path.open("r+b") as file:
        file.seek(begin + size - cols * 2)
        file.write(raw(last))
    with open_source(path) as source:
        (decision,) = plan_source(source).decisions
        assert decision.quantize
        assert same(source.rows("blocks.0.lin.weight", rows - 1, rows), last)


class TiedLinears(torch.nn.Module):
    """Two layers with one weight, as language models have their embedding and head."""

    def __init__(self, weight):
        super().__init__()
        self.a = torch.nn.Linear(64, 64, bias=False)
        self.b = torch.nn.Linear(64, 64, bias=False)
        self.a.weight = self.b.weight = torch.nn.Parameter(weight)


@pytest.mark.parametrize("kind", ["left out", "written twice", "one storage"])
def test_both_names_of_a_shared_tensor_are_usable(tmp_path, kind):
    """Stock ComfyUI looks for each name and reads no notes on shared tensors."""
    weight = matrix(64, 64)
    model = TiedLinears(weight)
    if kind == "one storage":
        report = convert(InMemory(model.state_dict()), tmp_path / "out", InMemory.plan(model))
        found, metadata = load(tmp_path / "out")
        assert [layer.name for layer in report.layers] == ["a", "b"]
    else:
        if kind == "left out":
            save_model(model, str(tmp_path / "source"), {"title": "tied"})
            assert len(load(tmp_path / "source")[0]) == 1
        else:
            state = {"a.weight": weight, "b.weight": weight.clone()}
            save_file(state, tmp_path / "source", {"title": "tied"})
        found, metadata = converted(tmp_path / "source")
        assert metadata.keys() == {"title", "_quantization_metadata"}
    for part in ("weight", "weight_scale", "comfy_quant"):
        assert same(found[f"a.{part}"], found[f"b.{part}"])
    alone = tmp_path / "alone"
    save_file({"a.weight": weight}, alone)
    assert same(found["b.weight"], converted(alone)[0]["a.weight"])


@pytest.mark.parametrize("name", ["__metadata__", "a.weight", "new\0line", "b" * 9])
def test_what_metadata_says_cannot_harm(tmp_path, name):
    state = {"a.weight": matrix(32, 32)}
    save_file(state, tmp_path / "source", {name: "a.weight", "c": "a.bias"})
    found, metadata = converted(tmp_path / "source")
    assert (name in found) == (name in ("a.weight", "b" * 9))
    assert metadata["c"] == "a.bias"


def test_endless_names_for_one_tensor_are_refused(tmp_path):
    notes = {f"name{i}": "a.weight" for i in range(10_001)}
    save_file({"a.weight": matrix(32, 32)}, tmp_path / "source", notes)
    with pytest.raises(FormatError, match="10001 further names; up to 10000"):
        convert_file(tmp_path / "source", tmp_path / "target")


class InMemory:
    """A state dict as a source."""

    name = "state"
    metadata: dict = {}  # noqa: RUF012

    def __init__(self, state):
        self.state = {key: value.detach() for key, value in state.items()}
        self.tensors = {k: (HEADER_DTYPES[v.dtype], tuple(v.shape)) for k, v in self.state.items()}

    @classmethod
    def plan(cls, model):
        return plan_source(cls(model.state_dict()))

    def rows(self, key, first, last):
        return self.state[key][first:last]

    def pieces(self, key):
        yield as_bytes(self.state[key])
