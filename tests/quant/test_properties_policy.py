"""What holds for every plan and every report, whatever the keys, shapes, dtypes and options."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mxfp8.quant.container.header import DTYPES
from mxfp8.quant.conversion import policy
from mxfp8.quant.conversion.architectures import architectures
from mxfp8.quant.conversion.policy import Selection, plan, presets
from mxfp8.quant.format import PREFIXES
from mxfp8.quant.reports.conversion import KEPT, MXFP8, Block, LayerReport, Report, SqnrAccumulator

QUICK = settings(max_examples=150)

# ---- any model ---------------------------------------------------------------------------------

# Stock ComfyUI runs none of these quantized: no option may have them quantized.
NEVER = ("first_stage_model.q", "vae.mid.q", "text_model.encoder.layers.0.fc1", "text_projection",
         "transformer.resblocks.0.c_fc", "a.moe.gate", "mlp.router", "motion_encoder.dec.0",
         "x_embedder.proj.1", "model.embed_tokens", "shared", "wte", "label_emb")  # fmt: skip
SIGNS = sorted({key for architecture in architectures() for key in architecture.signature})
KEPT_BY_SOME = ("img_in", "final_layer.linear", "blocks.0.adaln_modulation", "txt_in", "q_norm",
                "layers.0.adaLN_modulation.0", "time_embedding.0", "head.head", "blocks.0.attn.q",
                "visual.blocks.0.mlp.down_proj", "model.layers.3.mlp.up", "proj_out")  # fmt: skip
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
layers = st.one_of(
    st.sampled_from([*NEVER, *KEPT_BY_SOME]),
    st.builds("blocks.{}.{}".format, st.integers(0, 12), st.sampled_from(["q", "fc1", "proj"])),
    st.lists(words, min_size=1, max_size=3).map(".".join),
)
suffixes = st.sampled_from([".weight"] * 6 + [".bias", ".scale", "", ".weight_scale", "_weight"])
keys = st.one_of(st.builds("{}{}".format, layers, suffixes), st.sampled_from(SIGNS))
sizes = st.one_of(st.sampled_from([32, 64, 4096]), st.integers(0, 70))
infos = st.tuples(
    st.one_of(st.sampled_from(["F32", "F16", "BF16"]), st.sampled_from(sorted(DTYPES))),
    st.one_of(st.tuples(sizes, sizes), st.lists(sizes, max_size=4).map(tuple)),
)
models = st.dictionaries(keys, infos, max_size=12)
names = st.sampled_from(list(presets()))
expressions = st.one_of(
    st.none(),
    st.sampled_from([".", "", r"blocks\.\d+\.", "weight$", "^model", "q|fc1", "(?i)EMB", "norm"]),
    words.map(re.escape),
)
selections = st.builds(Selection, names, expressions, expressions)
NONE = Selection(policy.NONE)


def flags(found: policy.Plan) -> dict[str, bool]:
    return {d.key: d.quantize for d in found.decisions}


def could_be(key: str, dtype: str, shape: tuple[int, ...]) -> bool:
    """What a tensor must be for any option to quantize it; not all of what it must be."""
    return (
        key.endswith(".weight")
        and dtype in ("F32", "F16", "BF16")
        and len(shape) == 2
        and 0 not in shape
        and not any(key == f"{name}.weight" for name in NEVER)
    )


# ---- plans -------------------------------------------------------------------------------------


@QUICK
@given(models, selections)
def test_every_tensor_has_one_decision_with_a_reason(model, selection):
    found = plan(model, selection)
    assert [d.key for d in found.decisions] == list(model)
    assert [(d.dtype, d.shape) for d in found.decisions] == [*model.values()]
    assert all(d.reason.strip() for d in found.decisions)
    assert found.quantized == [d for d in found.decisions if d.quantize]
    assert found.preset in presets() or found.preset == "default"
    assert plan(model, selection) == found


@QUICK
@given(models, selections)
def test_nothing_overrides_what_stock_cannot_run(model, selection):
    for asked in (selection, Selection(policy.NONE, include=".")):
        for decision in plan(model, asked).quantized:
            assert could_be(decision.key, decision.dtype, decision.shape)


@QUICK
@given(models, selections)
def test_exclude_beats_include_and_include_beats_the_preset(model, selection):
    possible = flags(plan(model, NONE))
    plain = flags(plan(model, Selection(selection.preset)))
    include, exclude = selection.include, selection.exclude
    for key, quantize in flags(plan(model, selection)).items():
        excluded = bool(exclude) and re.search(exclude, key) is not None
        included = bool(include) and re.search(include, key) is not None
        assert quantize == (possible[key] and not excluded and (included or plain[key]))


@QUICK
@given(models, selections, st.randoms())
def test_the_order_of_keys_does_not_matter(model, selection, places):
    shuffled = list(model.items())
    places.shuffle(shuffled)
    found = plan(model, selection)
    other = plan(dict(shuffled), selection)
    assert (other.preset, other.architecture) == (found.preset, found.architecture)
    assert {d.key: d for d in other.decisions} == {d.key: d for d in found.decisions}


@QUICK
@given(models, names)
def test_the_prefix_of_a_diffusion_model_does_not_matter(model, preset):
    prefix = "model.diffusion_model."
    assume(not any(key.startswith(PREFIXES[:-1]) for key in model))
    found = plan(model, Selection(preset))
    other = plan({prefix + key: info for key, info in model.items()}, Selection(preset))
    assert (other.preset, other.architecture) == (found.preset, found.architecture)
    assert flags(other) == {prefix + key: quantize for key, quantize in flags(found).items()}


@QUICK
@given(models, st.sampled_from(architectures()))
def test_auto_is_the_preset_of_the_architecture_inside_its_blocks(model, architecture):
    model = {**model, **dict.fromkeys(architecture.signature, ("BF16", (64, 64)))}
    found = plan(model)
    rows = architectures()
    earlier = [row.name for row in rows[: rows.index(architecture)]]
    assert found.architecture in (architecture.name, *earlier)
    if found.architecture != architecture.name:
        return
    auto = flags(found)
    for key, quantize in flags(plan(model, Selection(architecture.preset or policy.AUTO))).items():
        assert auto[key] == (quantize and architecture.in_blocks(key))


@QUICK
@given(models)
def test_modules_at_hand_replace_the_list_of_embeddings_alone(model):
    """With every module a linear layer, more is quantized than by names; with none, nothing."""
    by_name = flags(plan(model, NONE))
    by_module = flags(plan(model, NONE, is_linear=lambda layer: True))
    assert all(by_module[key] for key, quantize in by_name.items() if quantize)
    embeddings = {key for key in model if by_module[key] and not by_name[key]}
    leaves = {key.removesuffix(".weight").rpartition(".")[2] for key in embeddings}
    assert leaves <= policy.EMBEDDINGS
    assert not plan(
        model, Selection(policy.NONE, include="."), is_linear=lambda layer: False
    ).quantized


# ---- reports -----------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
decibels = st.one_of(st.none(), st.floats(-1e300, 1e300))
count = st.integers(0, 2**63)
blocks = st.builds(Block, count, count, st.floats(-1e300, 1e300))
layer_reports = st.builds(
    LayerReport, name=text, decision=st.sampled_from([MXFP8, KEPT]), reason=text, dtype=text,
    shape=st.tuples(count, count), bytes_before=count, bytes_after=count, sqnr_db=decibels,
    worst_block=st.one_of(st.none(), blocks),
)  # fmt: skip
reports = st.builds(
    Report, source=text, target=text, preset=text, architecture=st.one_of(st.none(), text),
    bytes_before=count, bytes_after=count, seconds=st.floats(0, 1e9), sqnr_db=decibels,
    layers=st.lists(layer_reports, max_size=4).map(tuple),
)  # fmt: skip


@QUICK
@given(reports)
def test_a_report_comes_back_from_its_json(report):
    assert Report.from_json(report.to_json()) == report
    assert report.to_json().isascii()  # any console, any file system, any script tag


@QUICK
@given(reports, st.sampled_from(["source", "seconds", "layers", "sqnr_db"]), st.integers(2, 99))
def test_a_report_with_a_field_less_or_of_another_version_is_refused(report, name, version):
    data = json.loads(report.to_json())
    less = {key: value for key, value in data.items() if key != name}
    assert less != data
    for broken in (less, data | {"mxfp8_report": version}):
        with pytest.raises(ValueError):
            Report.from_json(json.dumps(broken))


@QUICK
@given(reports)
def test_the_worst_layer_has_the_lowest_sqnr_of_those_that_were_quantized(report):
    lossy = [x.sqnr_db for x in report.layers if x.decision == MXFP8 and x.sqnr_db is not None]
    assert (report.worst.sqnr_db if report.worst else None) == min(lossy, default=None)
    kept = replace(report, layers=tuple(replace(x, decision=KEPT) for x in report.layers))
    assert kept.worst is None
    assert kept.quantized == []


energies = st.tuples(st.floats(1e-60, 1e60), st.floats(0, 1e60))


@QUICK
@given(st.lists(st.tuples(energies, energies), min_size=1, max_size=20), st.data())
def test_energy_added_in_parts_is_that_of_the_whole(values, data):
    table = torch.tensor(values, dtype=torch.float64)  # [rows, 2 blocks, signal and noise]
    whole, parts = SqnrAccumulator(), SqnrAccumulator()
    whole.add(0, table[..., 0], table[..., 1])
    cut = data.draw(st.integers(0, len(table)))
    for first, last in ((0, cut), (cut, len(table))):
        part = SqnrAccumulator()
        part.add(first, table[first:last, :, 0], table[first:last, :, 1])
        parts.merge(part)
    assert parts.worst == whole.worst
    assert parts.signal == pytest.approx(whole.signal, rel=1e-12)
    assert parts.noise == pytest.approx(whole.noise, rel=1e-12)
    assert parts.sqnr_db == (None if whole.noise == 0 else pytest.approx(whole.sqnr_db, abs=1e-9))
