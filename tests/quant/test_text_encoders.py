"""Which layers of text encoders are quantized, alone and inside checkpoints."""

from __future__ import annotations

import pytest
from checkpoints import matrix
from safetensors.torch import save_file

from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.conversion.policy import NONE, Selection, plan

BLOCK = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"


def quantized(shapes: dict, preset: str = NONE) -> set[str]:
    tensors = {key: ("BF16", shape) for key, shape in shapes.items()}
    return {d.key for d in plan(tensors, Selection(preset)).quantized}


T5 = "encoder.block.5.layer.0.SelfAttention.{}.weight"
T5_GEMMA = "model.encoder.layers.3.self_attn.q_proj.weight"
QWEN3 = "model.layers.3.self_attn.q_proj.weight"
PLAIN = {
    "T5Gemma": (T5_GEMMA, (768, 768)),
    "Jina CLIP v2": ("model.encoder.layers.7.mixer.Wqkv.weight", (3072, 1024)),
    "BERT": ("bert.encoder.layer.2.intermediate.dense.weight", (4096, 1024)),
    "T5-base": (T5.format("q"), (768, 768)),
    "T5-XL": (T5.format("q"), (2048, 2048)),
    "lm_head": ("lm_head.weight", (151936, 4096)),
    "projection of LTX-2": ("text_embedding_projection.aggregate_embed.weight", (3840, 188160)),
    "BERT in a checkpoint": (
        "text_encoders.hydit_clip.transformer.bert.encoder.layer.0.output.dense.weight",
        (1024, 4096),
    ),
    "ACE-Step 1.5's small encoder": (f"text_encoders.qwen3_06b.transformer.{QWEN3}", (2048, 1024)),
    "early SD1": ("cond_stage_model.transformer.encoder.layers.0.mlp.fc1.weight", (3072, 768)),
    "T5-base in a checkpoint": (f"text_encoders.t5base.transformer.{T5.format('k')}", (768, 768)),
    "T5Gemma in a checkpoint": (f"text_encoders.t5gemma.transformer.{T5_GEMMA}", (768, 768)),
    "table of T5-XXL": (
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention"
        ".relative_attention_bias.weight",
        (32, 64),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("key", "shape"), PLAIN.values(), ids=PLAIN)
def test_what_comfyui_runs_unquantized_stays(key, shape):
    assert quantized({key: shape, "a.weight": (32, 32)}) == {"a.weight"}
    assert quantized({key: shape, BLOCK: (32, 32)}) == {BLOCK}


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        (T5.format("q"), (4096, 4096)),
        (T5.format("o"), (1024, 16384)),  # T5-11B, of Cosmos
        (QWEN3, (2048, 1024)),
        (f"text_encoders.t5xxl.transformer.{T5.format('k')}", (4096, 4096)),
        (f"cond_stage_model.t5xxl.transformer.{T5.format('k')}", (4096, 4096)),
        (f"text_encoders.qwen3_2b.transformer.{QWEN3}", (2048, 2048)),
        (f"text_encoders.of_tomorrow.transformer.{QWEN3}", (64, 64)),
    ],
)
def test_what_it_runs_quantized_or_is_unknown_is_quantized(key, shape):
    assert quantized({key: shape}) == {key}
    assert quantized({key: shape, BLOCK: (32, 32)}) == {key, BLOCK}


def test_an_encoder_with_the_layers_of_another_is_known_by_its_vocabulary():
    """ACE-Step 1.5's small Qwen3, which ComfyUI never runs quantized; Anima's it does."""
    for vocabulary, expected in ((151936, {QWEN3}), (151669, set())):
        shapes = {"model.embed_tokens.weight": (vocabulary, 1024), QWEN3: (2048, 1024)}
        assert quantized(shapes) == expected


def test_a_file_of_only_such_layers_is_refused_with_the_reason(tmp_path):
    save_file({T5_GEMMA: matrix(768, 768)}, tmp_path / "t5gemma")
    with pytest.raises(ValueError, match=r"no layer to quantize.*T5_GEMMA.*as it is"):
        convert_file(tmp_path / "t5gemma", tmp_path / "target")


LAYER = "layers.0.{}.weight"
KNOWN = {
    "T5Gemma": ["model.encoder.layers.0.pre_self_attn_layernorm.weight"],
    "Jina CLIP v2": ["model.encoder.layers.0.mixer.Wqkv.weight"],
    "BERT": ["bert.encoder.layer.0.attention.self.query.weight"],
    "CLIP": ["text_model.encoder.layers.0.mlp.fc1.weight"],
    "Gemma": [
        f"model.{LAYER.format(x)}" for x in ("self_attn.q_proj", "post_feedforward_layernorm")
    ],
    "Qwen3.5": ["model.language_model.layers.0.linear_attn.A_log",
                f"model.language_model.{LAYER.format('input_layernorm')}"],
    "gpt-oss": ["layers.0.self_attn.sinks", LAYER.format("self_attn.q_proj")],
    "Language model": [
        f"model.{LAYER.format(x)}" for x in ("self_attn.q_proj", "post_attention_layernorm")
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "keys"), KNOWN.items(), ids=KNOWN)
def test_text_encoders_without_a_preset_are_known_by_name(name, keys):
    found = plan(dict.fromkeys(keys, ("BF16", (64, 64))))
    assert (found.architecture, found.preset) == (name, "default")


@pytest.mark.parametrize(("model", "runs"), [
    ("joint_blocks.0.context_block.attn.qkv.weight", True),  # Stable Diffusion 3
    ("t_block.1.weight y_embedder.y_proj.fc1.weight", False),  # PixArt
])  # fmt: skip
def test_in_a_checkpoint_the_diffusion_model_decides(model, runs):
    encoder = f"text_encoders.t5xxl.transformer.{T5.format('q')}"
    diffusion = [f"model.diffusion_model.{key}" for key in model.split()]
    shapes = dict.fromkeys(diffusion, (64, 64)) | {encoder: (4096, 4096)}
    assert (encoder in quantized(shapes)) == runs
