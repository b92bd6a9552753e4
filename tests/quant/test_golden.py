"""Our conversions against files of the tool whose format and presets we share."""

from __future__ import annotations

import json
import shlex
from types import SimpleNamespace

import pytest
import torch
from checkpoints import GOLDEN, load, matrix, raw, same
from safetensors.torch import save_file

from mxfp8.kernels import layout
from mxfp8.kernels.backends import reference
from mxfp8.quant.conversion import policy
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.conversion.policy import Selection

FILES = json.loads((GOLDEN / "files.json").read_text())
THEIRS = json.loads((GOLDEN / "presets.json").read_text())


def card_exclude() -> str:
    """The expression in the command on the Z-Image Turbo model card."""
    words = shlex.split(FILES["a_zimage_simple.safetensors"]["command"])
    return words[words.index("--exclude-layers") + 1]


CARD = {"preset": "zimage", "exclude": card_exclude()}
CASES = [
    ("a_zimage_simple", CARD),
    ("a_zimage_simple", {"preset": "zimage-turbo"}),
    ("a_zimage_simple", {"exclude": card_exclude()}),
    ("c_flux2_simple", {"preset": "flux2"}),
    ("c_flux2_simple", {}),
    ("d_odd_simple", {}),
    ("e_values_bf16_simple", {}),
    ("e_values_fp16_simple", {}),
    ("e_values_fp32_simple", {}),
]
# Lookup tables that the tool quantizes and stock ComfyUI would then read raw codes from.
KEPT_ON_PURPOSE = {"d_odd_simple": {"tok_embeddings"}}


def markers(tensors, metadata) -> dict[str, tuple[dict, dict]]:
    """Layer -> its marker in the header and the one in its tensor."""
    header = json.loads(metadata["_quantization_metadata"])["layers"]
    return {name: (conf, json.loads(raw(tensors[f"{name}.comfy_quant"])))
            for name, conf in header.items()}  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-{c[1].get('preset', 'auto')}")
def pair(request, tmp_path_factory):
    """A conversion of ours and the tool's, with their source."""
    name, options = request.param
    folder = tmp_path_factory.mktemp(name)
    source, metadata = load(GOLDEN / FILES[f"{name}.safetensors"]["source"])
    theirs, their_metadata = load(GOLDEN / f"{name}.safetensors")
    given = {key: tensor.clone() for key, tensor in source.items()}
    for layer in markers(theirs, their_metadata):  # the tool rounds what it quantizes to BF16 first
        given[f"{layer}.weight"] = source[f"{layer}.weight"].bfloat16()
    save_file(given, folder / "source", metadata)
    convert_file(folder / "source", folder / "ours", Selection(**options))
    ours, our_metadata = load(folder / "ours")
    return SimpleNamespace(
        source=given,
        source_metadata=metadata,
        ours=ours,
        metadata=our_metadata,
        theirs=theirs,
        our_markers=markers(ours, our_metadata),
        their_markers=markers(theirs, their_metadata),
        kept_on_purpose=KEPT_ON_PURPOSE.get(name, set()),
    )


def test_the_same_layers_are_quantized_but_for_embeddings(pair):
    assert pair.our_markers.keys() == pair.their_markers.keys() - pair.kept_on_purpose
    assert pair.kept_on_purpose <= pair.their_markers.keys()


def tiny_blocks(weight) -> torch.Tensor:
    """Blocks of the padded matrix whose largest value is below 2**-118, but not 0."""
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight.double().abs(), (0, -cols % 32, 0, -rows % 32))
    amax = padded.unflatten(1, (-1, 32)).amax(-1)
    return (amax > 0) & (amax < 2.0**-118)


def test_codes_and_scales_are_the_tools_bit_for_bit_but_in_tiny_blocks(pair):
    differing = []
    for layer in pair.our_markers:
        tiny = tiny_blocks(pair.source[f"{layer}.weight"])
        spared = {
            f"{layer}.weight": tiny.repeat_interleave(32, 1),
            f"{layer}.weight_scale": layout.tile(tiny.to(torch.uint8)).bool(),
        }
        for key, mask in spared.items():
            ours, theirs = pair.ours[key], pair.theirs[key]
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            if (ours.view(torch.uint8) != theirs.view(torch.uint8))[~mask].any():
                differing.append(key)
    assert differing == []


def test_markers_say_what_the_tools_say_in_the_header_and_in_the_tensor(pair):
    for layer, (header, tensor) in pair.our_markers.items():
        assert header == tensor == pair.their_markers[layer][0]


def test_everything_else_is_the_sources_byte_for_byte(pair):
    expected = dict(pair.source)
    for layer in pair.our_markers:
        for part in ("weight", "weight_scale", "comfy_quant"):
            expected[f"{layer}.{part}"] = pair.ours[f"{layer}.{part}"]
    assert pair.ours.keys() == expected.keys()
    assert [key for key in expected if not same(pair.ours[key], expected[key])] == []


def test_metadata_of_the_source_is_kept(pair):
    added = {key: pair.metadata[key] for key in pair.metadata.keys() - pair.source_metadata.keys()}
    assert added.keys() == {"_quantization_metadata"}
    assert pair.metadata == {**pair.source_metadata, **added}


def codes(tensors) -> torch.Tensor:
    return tensors["tiny_block.weight"].view(torch.uint8)


def test_a_block_of_tiny_values_gets_no_nan_code_where_the_tool_writes_some(tmp_path):
    convert_file(GOLDEN / "tiny_nan_src.safetensors", tmp_path / "ours")
    ours, theirs = load(tmp_path / "ours")[0], load(GOLDEN / "f_tiny_nan_simple.safetensors")[0]
    assert (codes(theirs) & 0x7F == 0x7F).any()
    assert not (codes(ours) & 0x7F == 0x7F).any()


def test_a_block_of_tiny_values_decodes_within_half_a_step(tmp_path):
    convert_file(GOLDEN / "tiny_nan_src.safetensors", tmp_path / "ours")
    ours = load(tmp_path / "ours")[0]
    value = load(GOLDEN / "tiny_nan_src.safetensors")[0]["tiny_block.weight"].double()
    scale = ours["tiny_block.weight_scale"]
    decoded = reference.dequantize_exact(codes(ours), scale, *value.shape)
    # E4M3 has 3 bits of mantissa: half a step is 2**-4 of a normal value, 2**-10 below the normals.
    # No scale is below 2**-126.
    unit = (value.abs().amax(-1, keepdim=True) / 224).clamp_min(2.0**-126)
    assert ((decoded - value).abs() <= torch.maximum(value.abs() * 2**-4, unit * 2**-10)).all()
    tiny = (value.abs().amax(-1) > 0) & (value.abs().amax(-1) < 2.0**-118)
    assert (decoded[tiny].abs().amax(-1) > 0).all() and tiny.any()


def their_substrings(preset: str) -> set[str]:
    entry = THEIRS["presets"][preset]
    entry = THEIRS["presets"][entry.get("alias_for", preset)]
    return {*THEIRS["always_excluded"], *entry.get("exclude", []), *entry.get("highprec", [])}


# A key for every substring of every preset, and two that miss it by a letter.
PARTS = {part for name in THEIRS["presets"] for part in their_substrings(name)}
KEYS = {f"q{text}q.weight" for part in PARTS for text in (part, part[1:], part[:-1])}


@pytest.mark.parametrize("preset", THEIRS["presets"])
def test_every_preset_of_the_tool_keeps_the_same_keys(preset):
    tensors = dict.fromkeys(sorted(KEYS), ("BF16", (32, 32)))
    everything = policy.plan(tensors, Selection(policy.NONE))
    assert {d.key for d in everything.quantized} == KEYS
    plan = policy.plan(tensors, Selection(preset))
    kept = {key for key in KEYS if any(part in key for part in their_substrings(preset))}
    assert KEYS - {d.key for d in plan.quantized} == kept
    assert preset in policy.presets()


def test_zimage_turbo_selects_what_the_cards_command_selects():
    blocks = [f"layers.{i}" for i in range(30)]
    blocks += [f"{kind}_refiner.{i}" for kind in ("context", "noise") for i in range(2)]
    parts = ["attention.qkv", "attention.out", "adaLN_modulation.0"]
    parts += [f"feed_forward.w{i}" for i in (1, 2, 3)]
    tensors = {f"{b}.{p}.weight": ("BF16", (32, 32)) for b in blocks for p in parts}
    card, turbo, plain = (
        {d.key for d in policy.plan(tensors, Selection(**options)).quantized}
        for options in (CARD, {"preset": "zimage-turbo"}, {"preset": "zimage"})
    )
    assert turbo == card < plain


def test_a_source_of_more_precision_is_not_rounded_to_bf16_first(tmp_path):
    weight = matrix(32, 64, torch.float32)
    save_file({"a.weight": weight}, tmp_path / "fp32")
    save_file({"a.weight": weight.bfloat16()}, tmp_path / "bf16")
    for name in ("fp32", "bf16"):
        convert_file(tmp_path / name, tmp_path / f"{name}-out")
    fine, coarse = (load(tmp_path / f"{n}-out")[0]["a.weight"] for n in ("fp32", "bf16"))
    assert not same(fine, coarse)
