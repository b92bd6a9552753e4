"""From calibration to a comparison in the file, in the real ComfyUI."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from comfyui import PromptError
from graphs import (
    LATENTS,
    SAME,
    Graph,
    calibrated,
    difference,
    int8_cpu,
    latents,
    load_ours,
    quantized,
    saved_tensor,
    with_lora,
)
from PIL import Image
from safetensors.torch import save_file

from mxfp8.quant.checks.inspect import inspect_file
from mxfp8.quant.format import read_header
from mxfp8.quant.reports.comparison import Comparison
from mxfp8.quant.reports.conversion import Report

pytestmark = pytest.mark.comfy

SEEDS = range(1000, 1004)
KSAMPLER = {
    "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
}  # fmt: skip


def inputs(graph: Graph, kind: str) -> dict:
    """What a sampler is given besides a model and a seed."""
    empty, size = LATENTS[kind]
    conditioning = graph.add("LotusConditioning")
    if kind == "wan":
        conditioning = graph.add("TestWideConditioning", conditioning=conditioning)
    latent = graph.add(empty, **size, batch_size=1)
    return {"positive": conditioning, "negative": conditioning, "latent_image": latent}


def compare(graph: Graph, reference: list, model: list, kind: str = "flux", **options) -> list:
    return graph.add(
        "MXFP8CompareModels", reference=reference, model=model,
        first_seed=SEEDS[0], seeds=len(SEEDS),
        **{**inputs(graph, kind), **KSAMPLER, **options},
    )  # fmt: skip


def comparison(outputs: dict, node: list) -> Comparison:
    return Comparison.from_json(outputs[node[0]]["mxfp8_report"][0])


def sampled(graph: Graph, model: list, kind: str) -> list[list]:
    """Latents of all seeds from the stock sampler."""
    given = inputs(graph, kind)
    return [graph.add("KSampler", model=model, seed=s, **given, **KSAMPLER) for s in SEEDS]


def snr(reference, other) -> float:
    return 10 * math.log10(float(reference.square().sum() / (other - reference).square().sum()))


@pytest.mark.parametrize("kind", ["flux", "flux2", "wan"])
def test_a_comparison_says_what_stock_samplers_put_out_and_goes_into_the_file(comfy, kind):
    graph = Graph()
    original = graph.loader(f"{kind}.safetensors")
    first = SEEDS[-1] if kind == "wan" else 100
    notes = calibrated(graph, original, kind, seeds=1, first_seed=first)
    made = quantized(graph, original, calibration=notes)
    vae = {"vae": graph.add("VAELoader", vae_name="vae.safetensors")} if kind == "flux" else {}
    node = compare(graph, original, made, kind, **vae)
    save = graph.add(
        "MXFP8SaveModel", model=made, filename_prefix=f"diffusion_models/compared-{kind}",
        comparison=[node[0], 3], report=[made[0], 1],
    )  # fmt: skip
    runs = {name: sampled(graph, m, kind) for name, m in (("r", original), ("m", made))}
    saved = {k: [graph.save_latent(latent) for latent in v] for k, v in runs.items()}
    for name, samples in runs.items() if vae else ():
        image = graph.add("VAEDecode", samples=samples[0], **vae)
        graph.add("TestSaveTensor", tensor=image, name=f"compare-{name}")
    shown = graph.add("PreviewImage", images=node)
    outputs = comfy.run(graph)

    result = comparison(outputs, node)
    latent = {k: [latents(outputs, n, comfy.base).double() for n in v] for k, v in saved.items()}
    expected = [snr(r, m) for r, m in zip(latent["r"], latent["m"], strict=True)]
    assert [seed.seed for seed in result.seeds] == list(SEEDS)
    # Both runs of a pair round alike, and differ by 30 dB: roundings of SAME move that by little.
    assert [s.latent_snr_db for s in result.seeds] == pytest.approx(expected, abs=0.02)
    assert result.latent_snr_db.mean == pytest.approx(sum(expected) / 4, abs=0.02)
    assert result.latent_snr_db.low is None  # four seeds are too few for an interval
    assert result.problems == [] and result.floor.repeats and not result.floor.draws
    check_steps(result, latent)
    check_words(result, outputs[node[0]]["text"][0], kind)
    check_picture(result, outputs, node, shown, comfy.base)
    check_file(comfy, result, outputs[made[0]], kind)
    warned = "the comparison was measured on seeds that the calibration sampled (1 of 4"
    assert (warned in outputs[save[0]]["text"][0]) == (kind == "wan")


def check_steps(result: Comparison, latent: dict) -> None:
    """Euler's last prediction is its latent, but for the scale and shift of the latent's format."""
    assert [step.step for step in result.steps] == [1, 2]
    sigmas = [step.sigma for step in result.steps]
    assert sigmas == sorted(sigmas, reverse=True) and sigmas[-1] > 0
    assert all(0 < step.divergence <= step.worst for step in result.steps)
    errors = [difference(m, r) for r, m in zip(latent["r"], latent["m"], strict=True)]
    assert result.steps[-1].divergence == pytest.approx(sum(errors) / 4, rel=0.3)


def check_words(result: Comparison, text: str, kind: str) -> None:
    assert text == result.summary() and "lossless" not in text.lower()
    assert f"latent SNR {result.latent_snr_db.mean:.2f} dB (mean, n = 4)" in text
    assert "4 seeds, 2 steps of euler/simple, cfg 1" in text
    assert sum(result.model.paths.values()) >= 10
    assert result.reference.paths == {} and result.reference.fingerprint != result.model.fingerprint
    assert f"reference: fingerprint {result.reference.fingerprint[:12]}, " in text
    assert result.setting.versions.keys() == {"torch", "ComfyUI", "MXFP8"}
    assert "unknown" not in result.setting.versions.values()
    assert result.model.seconds > 0 and result.model.peak_bytes is None
    assert "peak memory was not measured: cpu does not count it" in text
    assert (result.psnr_db is None) == (kind != "flux")


def check_picture(result: Comparison, outputs: dict, node: list, shown: list, base) -> None:
    (entry,) = outputs[shown[0]]["images"]
    picture = Image.open(base / entry["type"] / entry["subfolder"] / entry["filename"])
    assert picture.width == 1536
    if result.psnr_db is None:
        assert picture.height < 600 and "mxfp8_images" not in outputs[node[0]]
        return
    assert picture.height > 900
    reference, model = (saved_tensor(base, f"compare-{name}").double() for name in "rm")
    (images,) = outputs[node[0]]["mxfp8_images"]
    assert images["labels"] == list(result.labels) and len(images["pairs"]) == len(SEEDS)
    for entry, tensor in zip(("first", "second"), (reference, model), strict=True):
        file = images["pairs"][0][entry]
        decoded = numpy.asarray(
            Image.open(base / file["type"] / file["subfolder"] / file["filename"])
        )
        assert numpy.abs(decoded / 255 - tensor[0].numpy()).max() <= 0.6 / 255  # rounded or cut off
    error = (reference - model).square().mean()
    assert result.seeds[0].psnr_db == pytest.approx(-10 * math.log10(float(error)), abs=0.02)
    assert 0.5 < result.seeds[0].ssim < 1


def check_file(comfy, result: Comparison, conversion: dict, kind: str) -> None:
    path = comfy.base / "output" / "diffusion_models" / f"compared-{kind}_00001_.safetensors"
    inspected = inspect_file(path)
    assert inspected.comparison == result and inspected.warnings == inspected.problems == []
    assert inspected.report == Report.from_json(conversion["mxfp8_report"][0])
    assert f"  latent SNR {result.latent_snr_db.mean:.2f} dB" in inspected.summary()
    assert "layers calibrated" in inspected.summary()
    assert "calibrated on seed " in inspected.summary()
    assert ("NOTE: measured on seeds" in inspected.summary()) == (kind == "wan")
    assert all(isinstance(v, str) for v in read_header(path).metadata.values())

    graph = Graph()  # stock ComfyUI loads it
    model = graph.loader(path.name)
    ours = graph.add("MXFP8Accelerate", model=model, precision="exact")
    node = compare(graph, model, ours, kind, steps=1)
    again = comparison(comfy.run(graph), node)
    assert again.model.fingerprint == again.reference.fingerprint == result.model.fingerprint
    assert again.identical or again.lowest.latent_snr_db > -20 * math.log10(SAME)
    path.unlink()


def test_a_model_is_identical_to_itself_and_offloaded(comfy):
    graph = Graph()
    model = load_ours(graph, "flux")
    offloaded = graph.add("TestLowVRAM", model=model)
    nodes = [compare(graph, model, m, steps=1) for m in (model, offloaded)]
    outputs = comfy.run(graph)
    for node in nodes:
        result = comparison(outputs, node)
        assert result.identical and result.latent_snr_db is None
        assert all(seed.latent_snr_db is None and seed.identical for seed in result.seeds)
        assert all(step.divergence == 0 for step in result.steps)
        assert "latents: identical on every seed, bit for bit" in outputs[node[0]]["text"][0]
        assert '"latent_snr_db": null' in outputs[node[0]]["mxfp8_report"][0]


@pytest.mark.parametrize(
    "sampler", ["euler_ancestral", pytest.param("dpmpp_sde", marks=pytest.mark.long)]
)
def test_a_sampler_that_draws_noise_has_a_floor_beside_its_number(comfy, sampler):
    graph = Graph()
    original, model = graph.loader("flux.safetensors"), load_ours(graph, "flux")
    node = compare(graph, original, model, sampler_name=sampler)
    outputs = comfy.run(graph)
    result = comparison(outputs, node)
    assert result.floor.draws and result.floor.repeats
    assert all(seed.other_noise_snr_db is not None for seed in result.seeds)
    assert result.floor.other_noise_snr_db.count == len(SEEDS)
    # Other noise makes another image; eight bits do not.
    assert result.floor.other_noise_snr_db.mean < result.latent_snr_db.mean
    assert "this sampler draws noise of its own" in outputs[node[0]]["text"][0]


@pytest.mark.long
def test_a_sampler_that_chooses_its_steps_is_compared_without_them(comfy):
    graph = Graph()
    original, model = graph.loader("flux.safetensors"), load_ours(graph, "flux")
    node = compare(graph, original, model, sampler_name="dpm_adaptive")
    result = comparison(comfy.run(graph), node)
    assert result.steps == () and result.latent_snr_db.count == len(SEEDS)
    assert any("chooses its own steps" in note for note in result.notes)


def test_outputs_that_are_no_numbers_are_named_by_seed(comfy):
    graph = Graph()
    model = graph.loader("flux.safetensors")
    vae = graph.add("VAELoader", vae_name="vae.safetensors")
    broken = graph.add("TestFail", model=model, how="nan")
    nodes = {"model": compare(graph, model, broken, vae=vae, steps=1),
             "reference": compare(graph, broken, model, steps=1)}  # fmt: skip
    outputs = comfy.run(graph)
    for side, node in nodes.items():
        text = outputs[node[0]]["text"][0]
        for seed in SEEDS:
            assert f"PROBLEM: seed {seed}: the {side}: its latent holds NaN (1024 of 1024" in text
        result = comparison(outputs, node)
        assert result.latent_snr_db is None and not result.identical and result.steps == ()
    assert "identical" not in text
    assert "no noise floor was measured" in text


def test_a_comparison_says_for_which_rows_its_layers_are_fast(comfy):
    graph = Graph()
    loaded = int8_cpu(graph, graph.loader("flux-mxfp8.safetensors"))
    model = graph.add("MXFP8Accelerate", model=loaded, precision="fast")
    exact = graph.add("MXFP8Accelerate", model=model, precision="exact")
    nodes = [compare(graph, exact, m, steps=1) for m in (model, exact)]
    try:
        outputs = comfy.run(graph)
    finally:
        graph = Graph()
        int8_cpu(graph, graph.loader("flux.safetensors"), on=False)
        comfy.run(graph)
    fast, plain = (comparison(outputs, node) for node in nodes)
    note = "`fast` applies to inputs of more than 64 rows; smaller ones run torch_bf16, exact"
    assert fast.model.paths == {"int8, fast": 10, "torch_bf16, exact": 3} and note in fast.notes
    assert plain.model.paths == {"torch_bf16, exact": 13} and note not in plain.notes


def write_lora(comfy, name: str, key: str, shape: tuple[int, ...]) -> str:
    """A LoRA file that adds a constant to one parameter; its name."""
    folder = comfy.base / "models" / "loras"
    save_file({f"diffusion_model.{key}": torch.full(shape, 0.05)}, folder / name)
    return name


def test_a_reference_is_known_again_by_its_weights(comfy):
    graph = Graph()
    original = graph.loader("flux.safetensors")
    references = (original, with_lora(graph, original))
    nodes = [compare(graph, m, original, steps=1) for m in references]
    outputs = comfy.run(graph)
    plain, patched = (comparison(outputs, node) for node in nodes)
    assert plain.reference.fingerprint == plain.model.fingerprint == patched.model.fingerprint
    assert len(plain.reference.fingerprint) == 64 and patched.reference.fingerprint is None


def test_the_loras_of_both_models_are_listed(comfy):
    graph = Graph()
    original, model = graph.loader("flux.safetensors"), load_ours(graph, "flux")
    node = compare(graph, with_lora(graph, original), with_lora(graph, model), steps=1)
    outputs = comfy.run(graph)
    result = comparison(outputs, node)
    (merged,), (beside,) = result.reference.adapters, result.model.adapters
    assert merged.applied == {"merged by ComfyUI": merged.hit}
    assert beside.applied == {"beside the weight: low rank": beside.hit}
    assert (merged.kinds, merged.ranks, merged.hit, merged.missed) == (
        beside.kinds, beside.ranks, beside.hit, beside.missed
    )  # fmt: skip
    text = outputs[node[0]]["text"][0]
    assert f"reference: {merged.line()}" in text and f"model: {beside.line()}" in text
    assert result.model.title().endswith("; 1 LoRA)")


def refused(comfy, graph: Graph, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        comfy.run(graph)


def test_models_that_are_no_pair_are_refused(comfy):
    graph = Graph()
    compare(graph, graph.loader("flux.safetensors"), graph.loader("wan.safetensors"))
    refused(comfy, graph, "the model is a WAN21, the reference a Flux; compare like with like")
    graph = Graph()
    original = graph.loader("flux.safetensors")
    shifted = graph.add(
        "ModelSamplingFlux", model=load_ours(graph, "flux"), max_shift=3.0, base_shift=2.0,
        width=64, height=64,
    )  # fmt: skip
    compare(graph, original, shifted)
    refused(comfy, graph, "sampled at the noise levels .* put the same ModelSampling node on both")
    graph = Graph()
    original = graph.loader("flux.safetensors")
    compare(graph, original, graph.add("TestFail", model=original, how="interrupt"))
    refused(comfy, graph, "interrupted")


def test_a_comparison_of_other_weights_is_refused_with_the_file(comfy):
    graph = Graph()
    original, model = graph.loader("flux.safetensors"), load_ours(graph, "flux")
    node = compare(graph, model, model, steps=1)
    kept = write_lora(comfy, "kept.safetensors", "img_in.diff", (128, 64))
    bias = write_lora(comfy, "bias.safetensors", "double_blocks.0.img_attn.proj.diff_b", (128,))
    baked = "LoRAs or patches on it that saving bakes in"
    words = [
        ("measured on other weights; connect the model", load_ours(graph, "flux2")),
        *((baked, with_lora(graph, model, lora)) for lora in ("lora.safetensors", kept, bias)),
        ("this model has none", original),
    ]
    for sentence, other in words:
        save = graph.add(
            "MXFP8SaveModel", model=other, filename_prefix="diffusion_models/never",
            comparison=[node[0], 3],
        )  # fmt: skip
        refused(comfy, graph, sentence)
        del graph[save[0]]
    graph.add(
        "MXFP8SaveModel", model=model, filename_prefix="diffusion_models/never",
        report=[node[0], 2],
    )  # fmt: skip
    refused(comfy, graph, "mxfp8_report of version 1")
    assert not list((comfy.base / "output").rglob("never*"))


def test_a_report_of_other_weights_is_refused_with_the_file(comfy):
    graph = Graph()
    made = quantized(graph, graph.loader("flux.safetensors"))
    other = quantized(graph, graph.loader("flux2.safetensors"))
    for model, sentence in (
        (with_lora(graph, made), "put on this model after the report was made; disconnect the"),
        (other, "the report is another model's: MXFP8 layer"),
    ):
        save = graph.add(
            "MXFP8SaveModel", model=model, filename_prefix="diffusion_models/never",
            report=[made[0], 1],
        )  # fmt: skip
        refused(comfy, graph, sentence)
        del graph[save[0]]
    assert not list((comfy.base / "output").rglob("never*"))
