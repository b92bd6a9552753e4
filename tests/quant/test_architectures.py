"""The table of architectures against ComfyUI's model classes, and what plans make of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from comfyui import ROOT
from model_configs import configs

from mxfp8.quant.conversion.architectures import architectures, detect
from mxfp8.quant.conversion.policy import NONE, Selection, plan
from mxfp8.quant.sources.unsupported import check_kind

MATRIX = ("BF16", (64, 64))
CLASSES = {kind: row for row in architectures() for kind in row.classes}

# First parts of the names of what reads inputs, time, guidance, text and pooled vectors, and of
# what makes the output. Written from the classes' modules, independently of the table's `blocks`.
EMBEDDERS = re.compile(
    r"\w*_in|\w*_?embedd?er\d?|\w*embeddings?(_r|_linear_\d)?|\w*_embed|label_emb|input_layer"
    r"|\w*patch\w*_proj|\w*patchify_proj|input_proj|adaln_proj|condition_proj|caption_projection"
    r"|to_(timestep|cond|global)_embed|time_projection|t_block|t5_y\w+|mlp_t5|text_proj|lyric_proj"
    r"|clip_\w*mapper|cond_seq_linear|init_x_linear|cap_embedder|llm_cond_proj|tmlp|txtmlp|first"
    r"|(double|single)_stream_modulation\w*|distilled_guidance_layer|adaLN_modulation|modF|tproj"
    r"|\w*final_\w+\d?|\w*proj_out|norm_out|out_layer|vid_out|head\w*|last|cam_out_layer|pooler"
)


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory):
    """What ComfyUI's classes showed; the check of the table and its exit code."""
    file = tmp_path_factory.mktemp("architectures") / "asked.json"
    script = ROOT / "bench" / "architectures.py"
    done = subprocess.run(
        [sys.executable, script, "--check", "--json", file], capture_output=True, text=True
    )
    assert file.exists(), done.stderr
    return done, json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.comfy
def test_the_table_is_what_comfyui_shows(comfyui):
    done, asked = comfyui
    assert done.returncode == 0, done.stdout
    assert len(CLASSES) == len({found["kind"] for found in asked}) == 98


@pytest.mark.slow
@pytest.mark.comfy
@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_of_comfyui_is_planned(comfyui, kind):
    """Something becomes MXFP8, stock runs all of it quantized, and what is around blocks stays."""
    found = [entry for entry in comfyui[1] if entry["kind"] == kind]
    assert len(found) == len(configs(kind))
    for entry in found:
        tensors = {key: ("BF16", tuple(shape)) for key, shape in entry["tensors"].items()}
        check_kind(SimpleNamespace(name=kind, tensors=tensors), recognized=True)
        planned = plan(tensors)
        layers = {decision.layer for decision in planned.quantized}
        assert planned.architecture == CLASSES[kind].name
        assert layers and layers <= set(entry["linear"])
        prefix = detect(tensors)[1]
        first = Counter(layer.removeprefix(prefix).split(".")[0] for layer in layers)
        assert [name for name in first if EMBEDDERS.fullmatch(name)] == []

        asked_for = {d.layer for d in plan(tensors, Selection(NONE, include=".")).quantized}
        assert layers <= asked_for <= set(entry["linear"])
        for layer in asked_for & set(entry["identifying"]):
            assert all(size % 32 == 0 for size in entry["tensors"][f"{layer}.weight"])


def kept(
    layer: str, shape=(64, 64), signature: str = "", prefix: str = "", **selection
) -> str | None:
    """Why a layer stays in a file with an architecture's signature; None if it is quantized."""
    (row,) = [row for row in architectures() if row.name == signature]
    tensors = dict.fromkeys((prefix + key for key in row.signature), ("BF16", (64,)))
    tensors[f"{layer}.weight"] = ("BF16", shape)
    decision = plan(tensors, Selection(**selection)).decisions[-1]
    return None if decision.quantize else decision.reason


ALL = {"preset": NONE, "include": "."}


@pytest.mark.parametrize(("name", "prefix", "layer"), [
    ("PixelDiT", "", "pixel_blocks.3.adaLN_modulation.0"),
    ("PixelDiT", "core.", "core.pixel_blocks.3.adaLN_modulation.0"),
    ("PiD", "net.", "net.pixel_blocks.12.adaLN_modulation.0"),
    ("Stable Audio", "model.model.",
     "conditioner.conditioners.seconds_total.embedder.embedding.1"),
    ("Stable Audio", "", "conditioner.conditioners.seconds_total.embedder.embedding.1"),
    ("Stable Diffusion", "", "cc_projection"),
    ("Hunyuan3D 2", "model.", "conditioner.main_image_encoder.model.encoder.layer.0.mlp.fc1"),
])  # fmt: skip
def test_what_stock_builds_plain_is_never_quantized(name, prefix, layer):
    assert "ComfyUI" in kept(layer, signature=name, prefix=prefix, **ALL)


def test_the_projection_of_zero123_is_not_a_part_of_its_model():
    (row,) = [row for row in architectures() if row.name == "Stable Diffusion"]
    tensors = {f"model.diffusion_model.{key}": ("F16", (8, 8, 3, 3)) for key in row.signature}
    block = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    tensors |= {block: MATRIX, "cc_projection.weight": ("F16", (768, 772))}
    assert {d.key for d in plan(tensors, Selection(**ALL)).quantized} == {block}


@pytest.mark.parametrize(("name", "layer", "shape"), [
    ("Kandinsky 5", "visual_embeddings.in_layer", (1792, 132)),
    ("Stable Audio", "transformer.layers.0.to_local_embed.0", (64, 257)),
    ("Wan", "blocks.0.ffn.0", (260, 64)),
    ("Stable Diffusion", "input_blocks.4.1.transformer_blocks.0.attn2.to_k", (64, 100)),
])  # fmt: skip
def test_a_shape_that_detection_reads_is_not_padded(name, layer, shape):
    assert "padded" in kept(layer, shape, name, **ALL)
    padded = tuple(-(-size // 32) * 32 for size in shape)
    assert kept(layer, padded, name, **ALL) is None


def test_auto_keeps_what_is_outside_of_blocks_and_a_named_preset_does_not():
    reason = "outside of the blocks of Flux.1: embedders and final layers stay"
    for layer in ("txt_in", "time_in.in_layer", "guidance_in.out_layer", "vector_in.in_layer",
                  "final_layer.linear"):  # fmt: skip
        assert kept(layer, signature="Flux.1") == reason
        assert kept(layer, signature="Flux.1", include="_(in|layer)") is None
        assert kept(layer, signature="Flux.1", preset=NONE) is None
    assert kept("single_blocks.7.linear1", signature="Flux.1") is None


def test_text_encoders_in_a_checkpoint_are_no_part_of_the_diffusion_model():
    layer = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"
    assert kept(layer, (4096, 4096), "Flux.1") is None


def test_an_unknown_architecture_keeps_the_default_selection_and_says_so(caplog):
    result = plan({"blocks.0.q.weight": MATRIX, "img_in.weight": MATRIX})
    assert [d.layer for d in result.quantized] == ["blocks.0.q", "img_in"]
    assert result.architecture is None
    assert "architecture is not recognized" in caplog.text
