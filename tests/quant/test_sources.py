"""What can be a source: any shape and size, shared tensors; what cannot, by its name."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import tarfile
import zipfile

import numpy
import pytest
import torch
from checkpoints import load, matrix, raw, same, write_raw
from diffusers_names import split_halves
from model_folders import converted
from safetensors.torch import save_file, save_model

from mxfp8.quant.checks.inspect import inspect_file
from mxfp8.quant.checks.verify import verify_file
from mxfp8.quant.conversion.architectures import architectures
from mxfp8.quant.conversion.convert import convert, convert_file, plan_source
from mxfp8.quant.conversion.policy import Selection
from mxfp8.quant.format import FormatError
from mxfp8.quant.sources.file import HEADER_DTYPES, FileSource, Part, PartSource, as_bytes
from mxfp8.quant.sources.open import open_source

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
    "gguf": (b"GGUF\x03\0\0\0" + bytes(64), "a GGUF file, quantized already; convert the BF16"),
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
    "html": (b"<!DOCTYPE html><html><head></head></html>", "a web page; download the model"),
    "json": (b'{"weight_map": {"a.weight": "model.safetensors"}}', "a JSON file"),
    "zeros": (bytes(4096), "download is not complete"),
}


@pytest.mark.parametrize(("content", "words"), FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ""])
def test_a_file_of_another_kind_is_told_by_its_content(tmp_path, content, words, suffix):
    source = tmp_path / f"model{suffix}"
    source.write_bytes(content)
    with pytest.raises(FormatError, match=rf"model{suffix}: not a safetensors file but .*{words}"):
        convert_file(source, tmp_path / "target")
    if not content.startswith(b"GGUF"):  # tests/quant/test_inspect.py has such
        assert words.rpartition(";")[0] in inspect_file(source).summary()
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    "start", [b"\x80\x02", b"\x1f\x8b", b"\x08\x08\x12", b"\x80\x04\x95", b"{\n"]
)
def test_a_header_whose_length_looks_like_another_kind_is_read(tmp_path, start):
    text = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    text = text.ljust(int.from_bytes(start, "little"))
    with FileSource(write_raw(tmp_path / "source", text, b"a")) as source:
        assert source.tensors == {"a": ("U8", (1,))}


# Models that are quantized already

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu


def codes(dtype=torch.uint8, *shape):
    return torch.ones(shape or (32, 32), dtype=torch.uint8).view(dtype)


def marker(**conf):
    return torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)


ONE = torch.ones(())
QUANTIZED = {
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


@pytest.mark.parametrize(("tensors", "words"), QUANTIZED.values(), ids=QUANTIZED)
def test_a_quantized_model_is_refused_by_the_name_of_its_format(tmp_path, tensors, words):
    save_file({"a.weight": matrix(32, 32), **tensors}, tmp_path / "source")
    with pytest.raises(FormatError, match=f"^source: already quantized as {words}"):
        convert_file(tmp_path / "source", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("name", "found"),
    {
        "FP8 E4M3": "FP8 (E4M3)", "scaled_fp8": "FP8 (E4M3)", "scale_weight": "scaled FP8 (E4M3)",
        "MXFP8 without markers": "MXFP8 without markers", "NVFP4 without markers": "NVFP4",
        "MXFP8 without markers, E8M0": "MXFP8 without markers", "int8": "int8_tensorwise",
        "bitsandbytes nf4": "NF4 (bitsandbytes)", "GPTQ": "GPTQ or AWQ", "HQQ": "HQQ",
    }.items(),
)  # fmt: skip
def test_inspect_counts_no_quantized_layer_among_those_that_are_kept(tmp_path, name, found):
    save_file({"a.weight": matrix(32, 32), **QUANTIZED[name][0]}, tmp_path / "source")
    inspection = inspect_file(tmp_path / "source", every_byte=False)
    assert inspection.formats == {found: 1}
    decisions = {layer.name: layer.decision for layer in inspection.layers}
    assert decisions in ({"a": "kept"}, {"a": "kept", "w": found})


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_fewer_bits_are_refused_by_name_too(tmp_path, dtype):
    bits = 4 if dtype == "F4" else 6
    end = 32 * 32 * bits // 8
    header = {"w.weight": {"dtype": dtype, "shape": [32, 32], "data_offsets": [0, end]}}
    write_raw(tmp_path / "source", header, bytes(end))
    with pytest.raises(FormatError, match=f"already quantized as FP{bits}"):
        convert_file(tmp_path / "source", tmp_path / "target")


# Parts that are quantized already

MODEL = "model.diffusion_model.double_blocks.0."
ENCODER = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"
KEPT = {
    "FP8 text encoder": ({f"{ENCODER}.weight": codes(E4M3, 64, 4096)}, None),
    "scaled FP8 text encoder": (
        {f"{ENCODER}.weight": codes(E4M3, 64, 4096), f"{ENCODER}.scale_weight": ONE,
         "text_encoders.t5xxl.transformer.scaled_fp8": codes(E4M3, 2)}, None,
    ),
    "MXFP8 text encoder": (
        {f"{ENCODER}.weight": codes(E4M3, 64, 4096), f"{ENCODER}.weight_scale": codes(
            torch.uint8, 128, 128), f"{ENCODER}.comfy_quant": marker(format="mxfp8")}, None,
    ),
    "FP8 layer that is excluded": ({f"{MODEL}x.weight": codes(E4M3)}, r"\.x\."),
    "FP8 layer that the default keeps": ({f"{MODEL}norm.lin.weight": codes(E4M3)}, None),
    "marked FP8 layer that is excluded": (
        {f"{MODEL}x.weight": codes(E4M3), f"{MODEL}x.weight_scale": ONE,
         f"{MODEL}x.comfy_quant": marker(format="float8_e4m3fn")}, r"\.x\.",
    ),
    "FP8 VAE": ({"vae.decoder.mid.attn_1.q.weight": codes(E4M3, 32, 32, 1, 1)}, None),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "exclude"), KEPT.values(), ids=KEPT)
def test_a_quantized_layer_that_stays_is_copied(tmp_path, tensors, exclude):
    source, target = tmp_path / "source", tmp_path / "target"
    layers = {"double_blocks.0.x": {"format": "float8_e4m3fn"}}
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})} if exclude else None
    save_file({f"{MODEL}img_attn.qkv.weight": matrix(64, 32), **tensors}, source, metadata)
    selection = Selection(exclude=exclude)
    report = convert_file(source, target, selection)
    assert [layer.name for layer in report.quantized] == [f"{MODEL}img_attn.qkv"]
    found, metadata = load(target)
    assert all(same(found[key], value) for key, value in tensors.items())
    marked = json.loads(metadata["_quantization_metadata"])["layers"]
    assert marked.keys() == {f"{MODEL}img_attn.qkv", *(layers if exclude else ())}
    assert verify_file(target, source).problems == []


@pytest.mark.parametrize("rest", [{}, {f"{MODEL}img_attn.qkv.weight": matrix(64, 32)}])
def test_a_quantized_layer_that_was_asked_for_is_refused(tmp_path, rest):
    """Also a text encoder, if there is nothing else to quantize."""
    tensors = {f"{MODEL}x.weight": codes(E4M3)} if rest else {f"{ENCODER}.weight": codes(E4M3)}
    tensors = {key.replace("SelfAttention.q", "other"): v for key, v in tensors.items()}
    save_file({**rest, **tensors}, tmp_path / "source")
    with pytest.raises(FormatError, match=r"already quantized as FP8 \(E4M3\)"):
        convert_file(tmp_path / "source", tmp_path / "target")


def test_a_scaled_fp8_model_is_refused_whatever_is_excluded(tmp_path):
    """ComfyUI would no longer scale it: our markers in the header take the place of its own."""
    tensors = {
        f"{MODEL}x.weight": codes(E4M3), f"{MODEL}x.scale_weight": ONE,
        "model.diffusion_model.scaled_fp8": codes(E4M3, 2), f"{ENCODER}.weight": matrix(4096, 4096),
    }  # fmt: skip
    save_file(tensors, tmp_path / "source")
    with pytest.raises(FormatError, match="already quantized as scaled FP8"):
        convert_file(tmp_path / "source", tmp_path / "target", Selection(exclude="diffusion_model"))


def test_an_unsound_quantized_part_is_refused_by_the_name_of_the_source(tmp_path):
    tensors = {
        f"{MODEL}img_attn.qkv.weight": matrix(64, 32),
        f"{MODEL}x.weight": torch.ones(2, 32, 32, dtype=torch.bfloat16),
        f"{MODEL}x.comfy_quant": marker(format="mxfp8", num_experts=2),
    }
    save_file(tensors, tmp_path / "source")
    with pytest.raises(FormatError, match=r"source: bank of MXFP8 experts .*its weight is BF16"):
        convert_file(tmp_path / "source", tmp_path / "target")


# Reading


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


def test_rows_and_pieces_of_joined_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr("mxfp8.quant.sources.file._PIECE", 16)
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
    with pytest.raises(FormatError, match="10001 further names for tensors; at most 10000"):
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


# What is no model

LORAS = [
    "diffusion_model.blocks.0.attn.q.lora_up.weight",
    "lora_unet_blocks_0_attn_q.lora_down.weight",
    "transformer.blocks.0.attn.to_q.lora_A.weight",
    "transformer.blocks.0.attn.to_q.lora_B.default.weight",
    "unet.mid_block.attentions.0.attn1.processor.to_q_lora.down.weight",
    "unet.blocks.0.to_q.lora_linear_layer.up.weight",
    "lora_unet_blocks_0_attn_q.hada_w1_a",
    "lora_unet_blocks_0_attn_q.lokr_w1",
    "lora_unet_blocks_0_attn_q.lokr_w2_b",
    "lora_unet_blocks_0_attn_q.oft_blocks",
    "lora_unet_blocks_0_attn_q.a1.weight",
    "lora_unet_blocks_0_attn_q.dora_scale",
    "diffusion_model.blocks.0.attn.q.diff",
    "diffusion_model.blocks.0.attn.q.diff_b",
    "diffusion_model.blocks.0.attn.q.set_weight",
    "double_blocks.0.processor.qkv_lora1.down.weight",
    "blocks.0.attn.q_loras.up.weight",
    "blocks.0.attn.q.oft_R",
    "lora_unet_blocks_0_attn_q.on_input",
]


@pytest.mark.parametrize("key", LORAS)
def test_a_lora_is_no_model(tmp_path, key):
    tensors = {key: torch.zeros(64, 32), "a.weight": torch.ones(32, 32)}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(FormatError, match=r"lora.safetensors: a LoRA, not a model \("):
        convert_file(tmp_path / "lora.safetensors", tmp_path / "out")
    assert f"kind: a LoRA ({key!r})" in inspect_file(tmp_path / "lora.safetensors").summary()


# Those whose classes are not ComfyUI's, or that it renames; tests/in_comfyui/test_other_kinds.py
# has those that it builds.
OTHERS = {
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet",
    "control_model.zero_convs.0.0.weight": "a ControlNet",
    "model.control_model.input_hint_block.0.weight": "a ControlNet",
    "controlnet_patch_embedding.weight": "a ControlNet",
    "control_blocks.0.after_proj.weight": "a ControlNet",
    "lora_controlnet": "a ControlNet",
    "lllite_unet_input_blocks_4_1_attn1_to_q.down.0.weight": "a ControlNet",
    "adapter.body.0.resnets.0.block1.weight": "a T2I-Adapter",
    "ip_adapter.1.to_k_ip.weight": "an IP-Adapter",
    "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": "an IP-Adapter",
    "pulid_ca.0.to_q.weight": "an IP-Adapter",
    "input_blocks.1.1.transformer_blocks.0.fuser.linear.weight": "a GLIGEN model",
    "down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight": "a motion module",
    "feature_embedder.mid_layer_norm.bias": "a model patch",
    "emb_params": "an embedding",
    "visual.transformer.resblocks.0.attn.in_proj_weight": "a CLIP vision model",
    "layer.0.mlp.gate_proj.weight": "a CLIP vision model",
    "model.encoder.embed_positions.weight": "an audio encoder",
    "encoder.output_projections.0.weight": "a depth model",
    "params_ema.conv_first.weight": "an upscaler",
    "up.0.block.0.conv1.conv.weight": "a latent upscaler",
    "bb.layers.1.blocks.0.attn.relative_position_index": "a background removal model",
    "decoder.up_blocks.0.resnets.0.norm1.weight": "a VAE",
    "vocoder.resblocks.0.convs1.0.weight": "a VAE",
}


@pytest.mark.parametrize(("key", "kind"), OTHERS.items(), ids=OTHERS)
def test_other_kinds_of_files_are_refused_unless_they_are_parts(tmp_path, key, kind):
    tensors = {key: torch.zeros(8), "blocks.0.attn.q.weight": torch.ones(32, 32)}
    save_file(tensors, tmp_path / "source")
    with pytest.raises(
        FormatError, match=rf"source: {kind}.* not a diffusion .*'{re.escape(key)}'"
    ):
        convert_file(tmp_path / "source", tmp_path / "out")
    assert inspect_file(tmp_path / "source").kind.startswith(kind)
    checkpoint = {**tensors, "model.diffusion_model.blocks.0.attn.q.weight": torch.ones(32, 32)}
    for state in (checkpoint, {f"part.{k}": value for k, value in tensors.items()}):
        save_file(state, tmp_path / "source")
        assert convert_file(tmp_path / "source", tmp_path / "out", overwrite=True).quantized
        assert inspect_file(tmp_path / "source").kind is None


@pytest.mark.parametrize("kind", sorted(set(OTHERS.values())))
def test_a_diffusion_model_with_a_part_at_its_root_is_converted(tmp_path, kind):
    """Unless it is a ControlNet, which may have a diffusion model's tensors."""
    flux = next(row for row in architectures() if row.name == "Flux.1").signature
    part = next(key for key, value in OTHERS.items() if value == kind)
    tensors = {key: torch.ones(32, 32) for key in (*flux, "double_blocks.1.img_attn.proj.weight")}
    save_file({**tensors, part: torch.zeros(8)}, tmp_path / "source")
    if kind == "a ControlNet":
        with pytest.raises(FormatError, match="a ControlNet, not a diffusion model"):
            convert_file(tmp_path / "source", tmp_path / "out")
    else:
        assert convert_file(tmp_path / "source", tmp_path / "out").quantized


@pytest.mark.parametrize(("part", "whole"), [
    ("vision_model.encoder.layers.0.layer_norm1.weight", "model.layers.0.self_attn.q_proj.weight"),
    ("audio_proj.proj1.weight", "head.modulation"),
])  # fmt: skip
def test_a_model_with_such_a_part_is_converted(tmp_path, part, whole):
    tensors = {part: torch.zeros(8), whole: torch.ones(32, 32)}
    tensors["blocks.0.self_attn.q.weight"] = torch.ones(32, 32)
    save_file(tensors, tmp_path / "source")
    assert convert_file(tmp_path / "source", tmp_path / "out").quantized
