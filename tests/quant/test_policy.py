"""Which tensors a plan quantizes, which it keeps, and the reasons it gives."""

from __future__ import annotations

import pytest

from mxfp8.quant.conversion import policy
from mxfp8.quant.conversion.architectures import architectures
from mxfp8.quant.conversion.policy import Selection, detect_architecture, plan, presets

MATRIX = ("BF16", (64, 32))


def decide(key, dtype="BF16", shape=(64, 32), is_linear=None, preset=policy.NONE, **selection):
    """The decision on one tensor, with nothing else in the model."""
    (decision,) = plan(
        {key: (dtype, shape)}, Selection(preset, **selection), is_linear=is_linear
    ).decisions
    return decision


def chosen(keys, is_linear=None, **selection) -> set[str]:
    found = plan(dict.fromkeys(keys, MATRIX), Selection(**selection), is_linear=is_linear)
    return {d.key for d in found.quantized}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shape", [(64, 32), (1, 1), (33, 100)])
def test_a_float_matrix_is_a_linear_layer(dtype, shape):
    decision = decide("blocks.0.attn.proj.weight", dtype, shape)
    assert (decision.quantize, decision.reason) == (True, "linear layer")
    assert (decision.layer, decision.dtype, decision.shape) == ("blocks.0.attn.proj", dtype, shape)


def test_a_plan_keeps_what_was_asked_for():
    selection = Selection(include="a", exclude="b")
    assert plan({"a.weight": MATRIX, "b.weight": MATRIX}, selection).selection == selection
    assert Selection(include="", exclude="") == Selection()


IMPOSSIBLE = [
    ("a.bias", "BF16", (64, 32), "not a layer's weight"),
    ("a.in_proj_weight", "BF16", (64, 32), "not a layer's weight"),
    ("weight", "BF16", (64, 32), "not a layer's weight"),
    ("a.weight", "BF16", (), "0-D"),
    ("a.weight", "BF16", (64,), "1-D"),
    ("a.weight", "BF16", (8, 4, 3), "3-D"),
    ("a.weight", "BF16", (8, 4, 3, 3), "4-D"),
    ("a.weight", "F64", (64, 32), "F64"),
    ("a.weight", "I8", (64, 32), "I8"),
    ("a.weight", "U8", (64, 32), "U8"),
    ("a.weight", "BF16", (0, 32), "empty"),
    ("a.weight", "BF16", (64, 0), "empty"),
    ("first_stage_model.mid.q.weight", *MATRIX, "VAE"),
    ("vae.mid.q.weight", *MATRIX, "VAE"),
    ("text_model.encoder.layers.0.mlp.fc1.weight", *MATRIX, "CLIP"),
    ("clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight", *MATRIX, "CLIP"),
    ("vision_model.encoder.layers.0.mlp.fc1.weight", *MATRIX, "CLIP"),
    ("cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight", *MATRIX, "CLIP"),
    ("transformer.resblocks.0.mlp.c_fc.weight", *MATRIX, "CLIP"),
    ("model.embed_tokens.weight", *MATRIX, "embedding"),
    ("tok_embeddings.weight", *MATRIX, "embedding"),
    ("text_model.embeddings.token_embedding.weight", *MATRIX, "embedding"),
    ("text_model.embeddings.position_embedding.weight", *MATRIX, "embedding"),
    ("bert.embeddings.word_embeddings.weight", *MATRIX, "embedding"),
    ("shared.weight", *MATRIX, "embedding"),
    ("block.0.SelfAttention.relative_attention_bias.weight", *MATRIX, "embedding"),
    ("label_emb.weight", *MATRIX, "embedding"),
    ("audio_vae.encoder.q.weight", *MATRIX, "VAE"),
    ("text_projection.weight", *MATRIX, "projection"),
    ("visual_projection.weight", *MATRIX, "projection"),
    ("double_stream_blocks.0.block.ff_i.gate.weight", *MATRIX, "bare parameter"),
    ("blocks.0.moe.gate.weight", *MATRIX, "bare parameter"),
    ("model.layers.0.mlp.router.weight", *MATRIX, "bare parameter"),
    ("timestep_features.weight", *MATRIX, "bare parameter"),
    ("point_embeddings.2.weight", *MATRIX, "bare parameter"),
    ("motion_encoder.enc.fc.0.weight", *MATRIX, "bare parameter"),
    ("x_embedder.proj.1.weight", *MATRIX, "identifies the model"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "BF16", (768, 768), "T5_BASE"),
]


@pytest.mark.parametrize(("key", "dtype", "shape", "words"), IMPOSSIBLE)
@pytest.mark.parametrize("include", [None, "."])
def test_what_stock_cannot_run_is_never_quantized(key, dtype, shape, words, include):
    decision = decide(key, dtype, shape, include=include)
    assert not decision.quantize
    assert words in decision.reason


@pytest.mark.parametrize(
    "key", ["vae_proj.weight", "time_embed.0.weight", "embed.proj.weight", "text_model.proj.weight"]
)
def test_names_that_only_resemble_those_are_quantized(key):
    assert decide(key).quantize


def test_modules_at_hand_decide_instead_of_names():
    linear = {"emb", "proj"}
    keys = ["emb.weight", "proj.weight", "table.weight"]
    assert chosen(keys, is_linear=linear.__contains__) == {"emb.weight", "proj.weight"}
    decision = decide("table.weight", is_linear=linear.__contains__, include="table")
    assert (decision.quantize, decision.reason) == (False, "not a linear layer")


def test_include_beats_the_preset():
    key = "layers.0.adaLN_modulation.0.weight"
    assert not decide(key, preset="zimage").quantize
    decision = decide(key, preset="zimage", include=r"layers\.0\.")
    assert (decision.quantize, decision.reason) == (True, r"included by 'layers\\.0\\.'")


def test_include_does_not_drop_the_rest():
    keys = ["a.weight", "b.weight"]
    assert chosen(keys, include="a") == set(keys)


def test_exclude_beats_include():
    decision = decide("a.weight", include="a", exclude=r"^a\.w")
    assert (decision.quantize, decision.reason) == (False, r"excluded by '^a\\.w'")


def test_exclude_searches_the_whole_key():
    keys = ["x.layers.1.a.weight", "x.layers.12.a.weight"]
    assert chosen(keys, exclude=r"layers\.1\.") == {keys[1]}


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_bad_expression_is_refused_by_option(option):
    with pytest.raises(ValueError, match=rf"{option} '\(' is not a regular expression"):
        decide("a.weight", **{option: "("})


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_an_empty_expression_is_none(option):
    assert decide("a.weight", preset="zimage", **{option: ""}).reason == "linear layer"


def test_an_unknown_preset_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="unknown preset 'nope'") as caught:
        Selection("nope")
    assert [name for name in presets() if name not in str(caught.value)] == []


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_an_expression_that_is_no_string_is_refused(option):
    with pytest.raises(TypeError, match=rf"{option} is \['a', 'b'\]; it must be one"):
        Selection(**{option: ["a", "b"]})


def test_a_name_is_no_selection():
    with pytest.raises(TypeError, match="'zimage' is no selection"):
        plan({"a.weight": MATRIX}, "zimage")


@pytest.mark.parametrize("name", presets())
def test_every_preset_offered_can_be_asked_for(name):
    assert plan({"a.weight": MATRIX}, Selection(name)).quantized


def test_no_preset_keeps_nothing_and_the_default_keeps_norms():
    keys = ["norm.lin.weight", "a.weight"]
    assert chosen(keys, preset="none") == set(keys)
    assert chosen(keys, preset="auto") == {"a.weight"}
    decision = decide("norm.lin.weight", preset="auto")
    assert decision.reason == "the default selection keeps 'norm'"


def test_a_preset_names_itself_in_the_reason():
    assert decide("final_layer.linear.weight", preset="zimage").reason == (
        "preset zimage keeps 'final_layer'"
    )


def test_a_preset_that_extends_another_keeps_what_both_keep():
    keys = [
        "layers.0.attention.qkv.weight",
        "layers.29.attention.qkv.weight",
        "layers.0.adaLN_modulation.0.weight",
    ]
    assert chosen(keys, preset="zimage-turbo") == {keys[0]}


def test_every_tensor_gets_a_decision_in_the_order_given():
    tensors = {"z.weight": MATRIX, "a.bias": ("F32", (4,)), "m.weight": ("I64", ())}
    result = plan(tensors)
    assert [(d.key, (d.dtype, d.shape)) for d in result.decisions] == list(tensors.items())
    assert [d.key for d in result.quantized] == ["z.weight"]
    assert all(d.reason for d in result.decisions)


def test_an_expression_that_finds_nothing_is_told(caplog):
    tensors = {"head.modulation": ("F32", (1, 2, 8)), "a.weight": ("BF16", (32, 32))}
    assert plan(tensors, Selection(exclude="^a")).warnings == ()
    assert caplog.records == []
    result = plan(tensors, Selection(exclude="nosuchlayer", include="neither"))
    assert result.warnings == (
        "include 'neither' matches no key", "exclude 'nosuchlayer' matches no key",
    )  # fmt: skip
    assert [r.getMessage() for r in caplog.records] == [
        "MXFP8: include 'neither' matches no key.",
        "MXFP8: exclude 'nosuchlayer' matches no key.",
    ]


LANGUAGE = [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1, 2, 10)]
NESTED = [f"model.language_model.layers.{i}.mlp.up_proj.weight" for i in (0, 3, 4)]


@pytest.mark.parametrize(
    ("keys", "middle"), [(LANGUAGE, (1, 2)), (LANGUAGE[::-1], (1, 2)), (NESTED, (1,))]
)
@pytest.mark.parametrize("preset", ["qwen_vlm", "qwen35"])
def test_qwen_presets_keep_the_first_and_the_last_language_layer(keys, middle, preset):
    assert chosen(keys, preset=preset) == {keys[i] for i in middle}


# Architecture, preset, the keys it is known by.
KNOWN = [
    ("Z-Image", "zimage", "cap_pad_token noise_refiner.0.attention.qkv.weight"),
    ("Flux.2", "flux2", "double_stream_modulation_img.lin.weight"),
    (
        "Chroma Radiance",
        "nerf_large",
        "distilled_guidance_layer.in_proj.weight img_in_patch.weight",
    ),
    ("Chroma", "distillation_large", "distilled_guidance_layer.in_proj.weight"),
    ("Wan", "wan", "head.modulation"),
    (
        "Lens",
        "lens",
        "transformer_blocks.0.img_mlp.w1.weight transformer_blocks.0.img_mod.1.weight",
    ),
    ("Qwen-Image", "qwen", "transformer_blocks.0.img_mod.1.weight txt_norm.weight"),
    ("Hunyuan Video", "hunyuan", "txt_in.individual_token_refiner.blocks.0.norm1.weight"),
    ("MiniMax H3", "minimaxh3", "video_patch_proj.weight audio_patch_proj.weight"),
    ("LTX-2", "ltxv2", "audio_adaln_single.linear.weight"),
    ("Krea 2", "krea2", "txtfusion.projector.weight"),
    ("Ideogram 4", "ideogram4", "embed_image_indicator.weight"),
    ("Boogu", "boogu", "double_stream_layers.0.img_instruct_attn.processor.img_to_q.weight"),
    ("Anima", "anima", "llm_adapter.blocks.0.cross_attn.q_proj.weight"),
    ("T5", "t5xxl", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    (
        "Gemma 4",
        "gemma4",
        "layers.0.per_layer_input_gate.weight layers.0.self_attn.q_proj.weight",
    ),
    ("Mistral", "mistral", "tekken_model"),
]
PREFIXES = [
    "",
    "model.",
    "net.",
    "diffusion_model.",
    "model.diffusion_model.",
    "model.model.",
    "model.language_model.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("name", "preset", "keys"), KNOWN, ids=[k[0] for k in KNOWN])
def test_architectures_are_known_by_their_keys_under_any_prefix(name, preset, keys, prefix):
    keys = [prefix + key for key in keys.split()]
    assert detect_architecture(keys) == (name, preset)
    result = plan(dict.fromkeys(keys, MATRIX))
    assert (result.architecture, result.preset) == (name, preset)
    for missing in keys:
        found = detect_architecture(k for k in keys if k != missing)
        assert found is None or found[0] != name


@pytest.mark.parametrize(
    ("language", "visual"),
    [("model.", ""), ("model.language_model.", "model.")],
    ids=["Qwen2.5-VL", "Qwen3-VL"],
)
def test_qwen_vl_is_known_by_its_keys_as_published(language, visual):
    keys = ["layers.0.self_attn.q_proj.weight", "visual.blocks.0.attn.qkv.weight"]
    keys = [language + keys[0], visual + keys[1]]
    assert detect_architecture(keys) == ("Qwen-VL", "qwen_vlm")


def test_the_architectures_with_presets_are_these():
    presets = {a.name for a in architectures() if a.preset}
    assert presets == {"Qwen-VL", *(k[0] for k in KNOWN)}


def test_a_named_preset_is_used_whatever_the_keys_show():
    result = plan({"head.modulation": ("F32", (1, 2, 8)), "a.weight": MATRIX}, Selection("flux2"))
    assert (result.preset, result.architecture) == ("flux2", "Wan")


def test_an_unknown_model_gets_the_default_selection():
    result = plan({"a.weight": MATRIX})
    assert (result.preset, result.architecture) == ("default", None)


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("expression", [r"(.|.)+[^t]$", r"^(.|.)+(?<!t)$"])
def test_an_expression_that_never_ends_is_stopped(option, expression):
    key = "double_blocks.0.img_attn.proj.weight"
    with pytest.raises(ValueError, match=f"{option} .* takes too long on '{key}'"):
        plan({key: ("BF16", (64, 64))}, Selection(**{option: expression}))


@pytest.mark.parametrize("expression", [
    "((a{9999}){9999}){9999}", "(a{1,200}){60}", "(?:(?:a{01000}){01000}){01000}",
    "(?x)(?:(?:a{ 1000 }){10 00}){1000}", "a{" + "9" * 5000 + "}",
])  # fmt: skip
def test_an_expression_that_would_fill_the_memory_is_refused(expression):
    with pytest.raises(ValueError, match="repeats more than 10000 times"):
        plan({}, Selection(include=expression))


def test_counted_repetitions_work():
    tensors = {f"blocks.{i}.lin.weight": ("BF16", (64, 64)) for i in (3, 33, 333)}
    found = plan(tensors, Selection(exclude=r"blocks\.\d{2,3}\."))
    assert [d.quantize for d in found.decisions] == [True, False, False]
