"""Models with diffusers' tensor names: renamed before quantizing, or rejected."""

from __future__ import annotations

import pytest
import torch
from checkpoints import matrix
from diffusers_names import MODELS, flux_state, rename, zimage_state
from model_folders import converted, equal, parsed, write_shards
from safetensors.torch import save_file

from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.conversion.policy import Selection
from mxfp8.quant.format import FormatError
from mxfp8.quant.sources.diffusers import check_names, comfy_names
from mxfp8.quant.sources.file import HEADER_DTYPES


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
    for exclude in (None, "qkv"):  # quantized, and kept
        options = {"selection": Selection(exclude=exclude), "overwrite": True}
        found = converted(tmp_path / "renamed", **options)
        wanted = converted(tmp_path / "original", **options)
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
    with pytest.raises(FormatError, match=f"^source: {model} with diffusers' tensor names: Comfy"):
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
    with pytest.raises(FormatError, match=r"query_norm\.scale' is present under two names"):
        convert_file(tmp_path / "source", tmp_path / "target")


def test_halves_that_are_none_are_refused(tmp_path):
    state = {**rename("flux", flux_state()), "norm_out.linear.bias": torch.ones(3)}
    save_file(state, tmp_path / "source")
    with pytest.raises(FormatError, match=r"'norm_out\.linear\.bias' \[3\] has no two halves"):
        convert_file(tmp_path / "source", tmp_path / "target")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_what_stock_would_rename_is_known_before_it_is_loaded(prefix):
    """Other tools quantize such files as they are; stock ran raw codes, 1e9 times too large."""
    for name, make_model in MODELS.items():
        state = make_model()
        check_names("x", [prefix + key for key in state])
        keys = [prefix + key for key in rename(name, state)]
        with pytest.raises(FormatError, match=r"^x: MXFP8 .* with diffusers' tensor names"):
            check_names("x", keys)
    for model, keys in REFUSED.items():
        if model in ("Hunyuan Video", "Wan", "Krea 2"):  # which stock does not know
            check_names("x", [prefix + key for key in keys])
            continue
        with pytest.raises(FormatError, match=f"^x: MXFP8 layers of {model} with"):
            check_names("x", [prefix + key for key in keys])


def test_names_that_both_share_stay():
    keys = ["transformer_blocks.0.img_mod.1.weight", "txt_norm.weight", "img_in.weight",
            "transformer_blocks.0.attn.add_q_proj.weight", "norm_out.linear.weight"]  # fmt: skip
    assert comfy_names("qwen", dict.fromkeys(keys, ("BF16", (64, 64)))) is None
    for make_model in MODELS.values():
        tensors = {k: (HEADER_DTYPES[v.dtype], tuple(v.shape)) for k, v in make_model().items()}
        assert comfy_names("original", tensors) is None


def test_a_quantized_model_with_diffusers_names_is_refused_as_quantized(tmp_path):
    state = {k: v.to(torch.float8_e4m3fn) for k, v in rename("flux", flux_state()).items()}
    state["transformer_blocks.0.attn.to_q.weight_scale"] = torch.ones(())
    write_shards(tmp_path / "flux", state)
    with pytest.raises(FormatError, match=r"^flux: already quantized as scaled FP8 \(E4M3\)"):
        convert_file(tmp_path / "flux", tmp_path / "target")
