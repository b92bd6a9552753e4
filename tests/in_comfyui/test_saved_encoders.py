"""Text encoders quantized and saved as loaded ones, alone and in a checkpoint; small ones, in
ComfyUI's modules."""

from __future__ import annotations

import pytest
from comfyui import ask

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ask("saved_encoders.py", tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def alone(found):
    return found["alone"]


def test_a_text_encoder_is_quantized_as_its_file_is(alone):
    assert len(alone["layers"]) == 7
    assert alone["layers"] == alone["layers of the file"]  # by these names `exclude` finds them
    assert alone["bytes as converted"]
    assert 0.01 < alone["rounding"] < 0.2  # to E4M3, in random weights
    assert alone["input unchanged"] == 0


def test_it_puts_out_the_same_saved_loaded_accelerated_and_cloned(alone):
    for how in ("loaded by ours", "loaded by stock", "deep clone"):
        assert alone[how] == 0, how
    assert alone["accelerated"] < 1e-4  # another order of summation


def test_what_is_not_quantized_is_saved_as_it_was(alone):
    assert alone["bytes unchanged"]


def test_the_original_is_not_held_by_what_is_made_of_it(alone):
    assert alone["original freed"]


def test_a_lora_is_baked_in_before_rounding(alone):
    assert alone["LoRA baked"]


def test_a_text_encoder_is_not_quantized_twice_nor_without_a_layer(alone):
    assert "already quantized as MXFP8" in alone["again"]
    assert "no layer to quantize" in alone["nothing"]


def test_of_several_text_encoders_all_are_saved_or_none(found):
    several = found["several"]
    assert several["tensors"].keys() == {"clip_l", "clip_g"}
    assert min(several["tensors"].values()) > 20
    assert several["failed"] == "in the second"
    assert several["left"] == 0


@pytest.fixture(scope="module")
def ltx2(tmp_path_factory):
    return ask("ltx2_encoder.py", tmp_path_factory.mktemp("ltx2"))


def test_the_text_encoder_of_ltx2_becomes_two_files(ltx2):
    found = ltx2["small"]
    assert found["files"] == ["gemma3_12b", "text_embedding_projection"]
    assert found["layers of the files"] == [found["layers"], 0] == [48 * 7, 0]
    assert found["tokenizer"] and found["projection unchanged"]
    assert found["rounding"] > 0.01
    assert found["loaded by stock"] == 0
    assert found["loaded by ours"] < 1e-4  # another order of summation


def test_comfyui_finds_all_of_ltx2_s_in_them(ltx2):
    """With one projection, with that and the connectors of the first LTX-2, and with two."""
    assert ltx2["names"] == [{"not in a file": [], "not loaded": [], "same": True}] * 3


@pytest.mark.parametrize("name", ["quantized", "accelerated"])
def test_a_checkpoint_is_read_back_equal_by_both_loaders(found, name):
    seen = found["checkpoint"][name]
    assert seen["title"] == name
    assert seen["layers"] == seen["quantized"] == 10 + 7
    assert seen["stock"] == seen["ours"] == [0, 0, 0]  # model, text encoder, VAE


def test_a_text_encoder_that_does_not_belong_to_the_model_is_refused(found):
    assert "has none with these layers" in found["checkpoint"]["another type of CLIP"]


def test_tensors_that_a_checkpoint_joins_are_those_of_stock(found):
    assert found["joined"] == {"SDXL": True, "SD20": True}


@pytest.mark.slow
def test_every_text_encoder_gets_the_names_of_the_files_that_comfyui_knows():
    lacking = ask("encoder_names.py")
    assert len(lacking) > 30
    assert not any(lacking.values()), lacking
