"""A model hub's page about a file: its figures are the file's, and its commands do what it says."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from bad_files import draft
from checkpoints import GOLDEN, load, matrix
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from mxfp8.integrations.card import _DIFFUSERS, PACK, hub_name, make_card
from mxfp8.quant.budget.probing import probe_module
from mxfp8.quant.conversion.calibration import calibrate
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.conversion.policy import Selection
from mxfp8.quant.format import read_header
from mxfp8.quant.reports.comparison import Comparison
from mxfp8.quant.reports.conversion import Report

CERTIFIED = Path(__file__).parents[1] / "quant" / "fixtures" / "certificate.safetensors"
ZIMAGE = GOLDEN / "zimage_src.safetensors"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a small Z-Image model and an unknown one."""
    outside = {"siglip_embedder.1.weight": matrix(64, 64)}  # which "auto" keeps and no preset
    save_file(load(ZIMAGE)[0] | outside, tmp_path / "zimage.safetensors")
    state = {
        f"{name}.weight": matrix(64, 64, seed=i) for i, name in enumerate(["a|b", "c'd", "e.3.f"])
    }
    save_file(state, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def front_matter(text: str) -> dict:
    start, matter, rest = text.split("---\n", 2)
    assert start == "" and rest.startswith("\n# ")
    return yaml.safe_load(matter)


def section(text: str, title: str) -> str:
    return re.search(rf"(?ms)^## {title}\n\n(.*?)(?=^## |\Z)", text)[1]


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", text)


SELECTIONS = {
    "auto": ("zimage", ()),
    "a preset": ("zimage", ("--preset", "zimage-turbo")),
    "the preset of auto": ("zimage", ("--preset", "zimage")),
    "all": ("zimage", ("--preset", "none")),
    "expressions": (
        "zimage",
        ("--exclude", r"layers\.0\.|it's", "--exclude", "w[12]", "--include", "cap_embedder"),
    ),
    "a long one": ("zimage", ("--exclude", "|".join(f"layers[.]{i}[.]attn" for i in range(90)))),
    "unknown": ("model", ("--exclude", "c'd")),
}


@pytest.mark.parametrize(("name", "options"), SELECTIONS.values(), ids=SELECTIONS)
def test_the_command_in_a_card_makes_the_file_again(folder, run, name, options):
    source, target = f"{name}.safetensors", f"{name}-mxfp8.safetensors"
    assert run("convert", source, target, *options, "--report", "report.json")[0] == 0
    status, card, _ = run("card", target, "--report", "report.json")
    assert status == 0
    convert, verify = fenced(section(card, "How it was made"), "console")[0].splitlines()
    made = Path(target).read_bytes()
    Path(target).unlink()
    for command in (convert, verify):
        program, *words = shlex.split(command)
        assert (program, run(*words)[0]) == ("mxfp8", 0)
    assert Path(target).read_bytes() == made


@pytest.mark.parametrize("calibrated", [True, False])
def test_the_command_of_a_target_makes_the_file_again(folder, run, calibrated):
    """With its calibration, or where there was none, by expressions for the layers it kept."""
    module = nn.Sequential(*(nn.Linear(64 * (1 + i), 64 * (2 + i)) for i in range(4))).eval()
    batches = list(torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)))
    found = calibrate(module, batches, lambda model, x: model(x))
    sensitivity = probe_module(module, batches, lambda model, x: model(x), found.layers)
    replace(found, sensitivity=sensitivity).save(folder / "CALIBRATION.safetensors")
    save_file(module.state_dict(), "source.safetensors")
    words = ("convert", "source.safetensors", "a.safetensors", "--target", "70%")
    status, *_ = run(*words, "--calibration", "CALIBRATION.safetensors", "--report", "report.json")
    assert status == 0
    report = Report.from_json(Path("report.json").read_bytes())
    assert report.chosen.layers
    if not calibrated:  # as from Python, with the decisions alone
        report = replace(report, calibration=None)
    card = make_card("a.safetensors", report=report)
    kept = section(card.text, "What is not MXFP8")
    assert "| BF16 |" not in kept and "| kept for the target 70% |" in kept
    assert report.chosen.summary() in card.text
    command = fenced(section(card.text, "How it was made"), "console")[0].splitlines()[0]
    assert ("--target 70%" in command, "--exclude" in command) == (calibrated, not calibrated)
    made = Path("a.safetensors").read_bytes()
    layers = read_header("a.safetensors").layers.keys()
    Path("a.safetensors").unlink()
    assert run(*shlex.split(command)[1:])[0] == 0
    assert read_header("a.safetensors").layers.keys() == layers
    assert not calibrated or Path("a.safetensors").read_bytes() == made


def names_in(cell: str) -> set[str]:
    """The layers that a cell of the table names: "layers.(0-1, 5).a" are three."""
    found = re.fullmatch(r"`(.*?)\((\d[\d, -]*)\)(.*)`", cell)
    if found is None:
        return {cell.strip("`")}
    start, numbers, end = found.groups()
    spans = [part.split("-") for part in numbers.split(", ")]
    return {f"{start}{i}{end}" for a in spans for i in range(int(a[0]), int(a[-1]) + 1)}


def test_the_table_has_every_kept_layer_once_with_its_reason(folder, run):
    report = convert_file("zimage.safetensors", "a.safetensors", Selection(exclude="noise_refiner"))
    card = make_card("a.safetensors", report=report)
    rows = re.findall(
        r"(?m)^\| (`.*`) \| (\w+) \| (.*) \|$", section(card.text, "What is not MXFP8")
    )
    named = [(name, dtype, reason) for cell, dtype, reason in rows for name in names_in(cell)]
    kept = {layer.name: layer for layer in report.layers if layer.decision == "kept"}
    assert sorted(name for name, *_ in named) == sorted(kept)
    assert len(rows) < len(kept)
    for name, dtype, reason in named:
        said = kept[name].reason.replace(repr(name), "it")
        assert (dtype, reason.replace("\\", "")) == (kept[name].dtype, said)


def test_figures_are_the_reports(folder):
    report = convert_file("zimage.safetensors", "a.safetensors")
    card = make_card("a.safetensors", report=report).text
    error = section(card, "Measured error")
    assert f"SQNR {report.sqnr_db:.2f} dB over {len(report.quantized)} MXFP8 layers" in error
    assert f"`{report.worst.name}`, {report.worst.sqnr_db:.2f} dB" in card
    share = 100 * report.bytes_after / report.bytes_before
    assert f"{share:.1f}% of the original's" in card
    assert f"| weights | {len(report.quantized)} MXFP8 layers, " in card


def test_what_a_file_does_not_say_is_not_in_its_card(folder):
    convert_file("zimage.safetensors", "a.safetensors")
    card = make_card("a.safetensors")
    assert section(card.text, "Measured error").startswith("None is stored in the file.")
    assert "The file does not say why these were kept." in card.text
    assert not re.search(r"\bdB\b|% of|mxfp8 convert", card.text)
    assert card.missing == ("the license", "the original (base_model)")
    matter = front_matter(card.text)
    assert (matter["license"], matter["base_model"]) == (None, None)
    assert card.text.count("TO FILL IN") == 3


def test_a_stored_report_and_comparison_are_in_the_card():
    card = make_card(CERTIFIED)
    metadata = read_header(CERTIFIED).metadata
    comparison = Comparison.from_json(metadata["mxfp8_certificate"])
    report = Report.from_json(metadata["mxfp8_report"])
    error = section(card.text, "Measured error")
    assert f"SQNR {report.sqnr_db:.2f} dB" in error
    assert "0.74x of nearest rounding on average, in-sample" in error
    assert f"Samples of the same seeds: {comparison.verdict.text}." in error
    for mean in (comparison.latent_snr_db, comparison.psnr_db):
        assert f"{mean.mean:.2f} dB (95% bootstrap CI {mean.low:.2f} to {mean.high:.2f}" in error
    assert "euler/simple" in error and "Noise floor: none" in error
    made = section(card.text, "How it was made")
    assert "--calibration CALIBRATION.safetensors" in made
    assert "calibrated on seeds 100 to 101, 8 steps each" in made
    assert "mxfp8 verify certificate.safetensors --source model.safetensors" in made


def test_a_comparison_or_report_of_other_weights_is_not_in_the_card(tmp_path):
    changed = draft(CERTIFIED)
    dtype, shape, data = changed.tensors["0.weight"]
    changed.tensors["0.weight"] = [dtype, shape, bytes([data[0] ^ 1]) + data[1:]]
    report = json.loads(changed.metadata["mxfp8_report"])
    report["layers"][0]["name"] = "7"
    changed.metadata["mxfp8_report"] = json.dumps(report)
    (tmp_path / "a.safetensors").write_bytes(changed.encode())
    card = make_card(tmp_path / "a.safetensors")
    assert "seeds" not in card.text and "None is stored" in card.text
    assert len(card.warnings) == 2
    assert card.text.count("<!-- TO CHECK: ") == 2


def test_a_report_on_a_part_of_the_file_gives_no_share_of_its_size(folder):
    report = convert_file("zimage.safetensors", "a.safetensors")
    assert "% of the original's" in make_card("a.safetensors", report=report).text
    parts, metadata = load("a.safetensors")
    encoder = "text_encoders.qwen.a.weight"
    save_file(parts | {encoder: matrix(8, 8)}, "b.safetensors", metadata)
    card = make_card("b.safetensors", report=report).text
    assert "% of the original's" not in card
    assert "| `text_encoders.qwen.a` | BF16 | not in the report |" in card


def test_the_report_of_another_file_is_refused(folder, run):
    assert run("convert", "model.safetensors", "a.safetensors", "--report", "report.json")[0] == 0
    assert run("convert", "zimage.safetensors", "b.safetensors")[0] == 0
    status, out, text = run("card", "b.safetensors", "--report", "report.json")
    assert (status, out) == (1, "")
    assert "the report is another file's: MXFP8 layer 'context_refiner" in text


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("Tongyi-MAI/Z-Image-Turbo", "Tongyi-MAI/Z-Image-Turbo"),
        ("https://huggingface.co/Tongyi-MAI/Z-Image-Turbo/", "Tongyi-MAI/Z-Image-Turbo"),
        ("https://modelscope.cn/models/a/b", None),
        ("model", ValueError),
        ("a/b/c", ValueError),
        ("https://a b", ValueError),
        ("javascript:x/y", ValueError),
    ],
)
def test_the_original_is_a_name_on_the_hub_or_an_address(given, found):
    if found is ValueError:
        with pytest.raises(ValueError, match="neither owner/name nor a URL"):
            hub_name(given)
    else:
        assert hub_name(given) == found


def test_the_metadata_is_what_the_hub_reads(folder):
    convert_file("zimage.safetensors", "a.safetensors")
    card = make_card("a.safetensors", base="https://huggingface.co/a/b-1.0", license="apache-2.0")
    assert card.missing == ()
    assert front_matter(card.text) == {
        "license": "apache-2.0",
        "base_model": "a/b-1.0",
        "base_model_relation": "quantized",
        "library_name": "diffusion-single-file",
        "tags": ["mxfp8", "comfyui", "diffusion-single-file"],
    }
    assert "[a/b-1.0](https://huggingface.co/a/b-1.0) in MXFP8" in card.text
    elsewhere = make_card("a.safetensors", base="https://modelscope.cn/models/a/b")
    assert not front_matter(elsewhere.text).keys() & {"base_model", "base_model_relation"}
    assert elsewhere.missing[0] == "the license"


def test_texts_of_a_file_stay_texts(folder):
    """Names and licenses with what Markdown, YAML, HTML or a shell would take for their own."""
    name = "`x`|<b>\n# *_[y](z)"
    state = {f"{name}{i}.weight": matrix(64, 64, seed=i) for i in range(2)}
    save_file(state, "model.safetensors", {"license": 'a: "b"\nbase_model: c/d'})
    report = convert_file("model.safetensors", "a.safetensors", Selection(exclude="1[.]weight|<i>"))
    card = make_card("a.safetensors", report=report)
    assert front_matter(card.text)["license"] == 'a: "b"\\nbase_model: c/d'
    (row,) = re.findall(r"(?m)^\| `.*$", section(card.text, "What is not MXFP8"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 4  # of three cells
    assert not re.search(r"(?<!\\)<[bi]>", re.sub(r"`[^`]*`|(?s:```.*?```)", "", card.text))
    assert not re.search(r"(?m)^# \*", card.text)


@given(license=st.text(min_size=1))
@example(license="no")
@example(license="\x7f\N{GRINNING FACE}: #'")
def test_any_license_is_a_string_for_the_hub(license):
    matter = front_matter(make_card(CERTIFIED, license=license).text)
    assert isinstance(matter["license"], str)
    assert (matter["library_name"], len(matter)) == ("diffusion-single-file", 5)
    if license.isprintable():
        assert matter["license"] == license


def test_python_in_a_card_is_python_and_knows_the_model(folder):
    convert_file("zimage.safetensors", "a.safetensors")
    card = make_card("a.safetensors", base="Tongyi-MAI/Z-Image-Turbo")
    (code,) = fenced(card.text, "python")
    compile(code, "card", "exec")
    assert 'ZImageTransformer2DModel.from_single_file(\n    read("a.safetensors"),' in code
    assert '"Tongyi-MAI/Z-Image-Turbo"' in code
    assert "DiffusionPipeline" not in make_card("a.safetensors").text
    convert_file("model.safetensors", "b.safetensors")
    assert "## Diffusers" not in make_card("b.safetensors").text


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", ["Z-Image", "Flux.2", "Qwen-Image", "Wan"])
def test_python_in_a_card_loads_the_file(name, prefix, tmp_path, monkeypatch):
    """The folder a/b stands in for the hub's, so nothing can be loaded but what the card names."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers_models import KINDS, write

    kind = KINDS[name]
    monkeypatch.chdir(tmp_path)
    folder = Path("a/b/transformer")
    folder.mkdir(parents=True)
    path = write(kind, folder, prefix).mxfp8.rename("a.safetensors")
    (code,) = fenced(make_card(path, base="a/b").text, "python")
    Path("load.py").write_text(code.split("pipeline = ")[0])
    transformer = runpy.run_path("load.py")["transformer"]
    assert type(transformer) is kind.cls
    layers = [x for x in transformer.modules() if type(x).__name__ == "LoadedLinear"]
    assert len(layers) >= len(read_header(path).layers)
    assert not any(tensor.is_meta for tensor in transformer.state_dict().values())


def wan(*more: str) -> dict[str, torch.Tensor]:
    """A file's tensors: of Wan, and these layers."""
    layers = [f"blocks.0.{name}" for name in ("self_attn.q", "cross_attn.k", "ffn.0")]
    layers += ["patch_embedding", "text_embedding.0", "time_projection.1", "head.head", *more]
    state = {f"{name}.weight": matrix(64, 64) for name in layers}
    return state | {"head.modulation": torch.ones(1, 2, 64)}


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ((), "WanTransformer3DModel"),
        (("img_emb.proj.1", "blocks.0.cross_attn.k_img"), "WanTransformer3DModel"),
        (("vace_patch_embedding", "vace_blocks.0.before_proj"), "WanVACETransformer3DModel"),
        (("pose_patch_embedding", "face_adapter.fuser_blocks.0.linear2"),
         "WanAnimateTransformer3DModel"),
        (("casual_audio_encoder.encoder.final_linear",), None),  # S2V
        (("audio_proj.audio_proj_glob_1.layer", "blocks.0.audio_cross_attn_wrapper.q"), None),
        (("control_adapter.conv",), None),
        (("patch_embedding_pose",), None),  # SCAIL
        (("vace_patch_embedding", "audio_proj.a"), None),
    ],
)  # fmt: skip
def test_only_a_class_that_takes_all_layers_is_named(more, kind, tmp_path):
    save_file(wan(*more), tmp_path / "wan.safetensors")
    convert_file(tmp_path / "wan.safetensors", tmp_path / "a.safetensors")
    text = make_card(tmp_path / "a.safetensors").text
    named = re.findall(r"(?m)^transformer = (\w+)\.from_single_file", text)
    assert named == ([kind] if kind else [])
    assert ("## Diffusers" in text) == bool(kind)


def test_without_a_repository_the_configuration_is_to_fill_in(folder):
    """Diffusers would guess another model's."""
    convert_file("zimage.safetensors", "a.safetensors")
    elsewhere = make_card("a.safetensors", base="https://modelscope.cn/models/a/b", license="mit")
    assert elsewhere.missing == ("the original in Diffusers' form (config)",)
    for card in (elsewhere, make_card("a.safetensors")):
        (code,) = fenced(card.text, "python")
        compile(code, "card", "exec")
        assert 'config="OWNER/NAME",  # TO FILL IN' in code and 'subfolder="transformer"' in code


def test_a_file_for_diffusers_is_refused(folder, run):
    """By its tensors' names, or where these say nothing, by its name and the config.json beside."""
    layers = ("to_q", "to_k", "to_v")
    state = {f"noise_refiner.0.attention.{name}.weight": matrix(64, 64) for name in layers}
    state["noise_refiner.0.attention.norm_k.weight"] = torch.ones(64)
    states = {"theirs": state, "same": {"blocks.0.a.weight": matrix(64, 64)}}
    name = "diffusion_pytorch_model.safetensors"
    for original, tensors in states.items():
        Path(original).mkdir()
        save_file(tensors, f"{original}/{name}")
        Path(original, "config.json").write_text('{"_class_name": "A"}')
        words = ("convert", original, f"{original}-new", "--format", "diffusers")
        assert run(*words, "--preset", "none")[0] == 0
    Path("theirs-new", name).rename("b.safetensors")
    for path in (Path("same-new", name), Path("b.safetensors")):
        status, out, text = run("card", path)
        assert (status, out) == (1, "")
        assert f"{path.name}: it is in the form that diffusers and transformers load" in text
    Path("same-new", name).rename("c.safetensors")
    assert run("card", "c.safetensors")[0] == 0  # ComfyUI has the same names


def test_diffusers_has_the_classes_that_cards_name():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    assert [name for _, name, _ in _DIFFUSERS if not hasattr(diffusers, name)] == []
    assert importlib.import_module("mxfp8.integrations.diffusers").MXFP8Config


def test_a_card_says_where_in_comfyui_a_file_belongs(folder):
    layers = {f"model.layers.{i}.self_attn.q_proj.weight": matrix(64, 64) for i in range(2)}
    layers |= {"model.embed_tokens.weight": matrix(64, 64), "model.norm.weight": torch.ones(64)}
    layers["model.layers.0.post_attention_layernorm.weight"] = torch.ones(64)
    save_file(layers, "encoder.safetensors")
    unet = {f"model.diffusion_model.{i}.weight": matrix(64, 64) for i in range(2)}
    save_file(unet | {"first_stage_model.a.weight": matrix(4, 4)}, "checkpoint.safetensors")
    places = {"encoder": "text_encoders", "checkpoint": "checkpoints", "zimage": "diffusion_models"}
    for name, place in places.items():
        convert_file(f"{name}.safetensors", "a.safetensors", Selection("none"), overwrite=True)
        assert f"`ComfyUI/models/{place}`" in section(make_card("a.safetensors").text, "ComfyUI")


def test_the_command_writes_a_file_and_says_what_is_to_fill_in(folder, run):
    assert run("convert", "zimage.safetensors", "a.safetensors")[0] == 0
    words = ("card", "a.safetensors", "--license", "mit", "-o", "README.md")
    assert run(*words) == (0, "card: README.md\nto fill in: the original (base_model)\n", "")
    text = Path("README.md").read_text("utf-8")
    assert run("card", "a.safetensors", "--license", "mit") == (0, text, "")
    assert run(*words) == (1, "", "mxfp8 card: error: README.md exists; --overwrite replaces it\n")
    assert run(*words, "--overwrite")[0] == 0
    status, out, _ = run("card", "a.safetensors", "--json")
    result = json.loads(out)
    assert (status, result["mxfp8_card"], result["file"]) == (0, 1, "a.safetensors")
    assert result["text"].startswith("---\n") and PACK in result["text"]


ERRORS = {
    "no MXFP8": (("zimage.safetensors",), "no layer is MXFP8; a card is for MXFP8 files"),
    "another kind": (("a.gguf",), "no layer is MXFP8"),
    "missing": (("nowhere",), "nowhere: No such file"),
    "a model's name": (("a.safetensors", "-o", "b.safetensors"), "has a model's name"),
    "its report": (
        ("a.safetensors", "--report", "report.json", "-o", "report.json", "--overwrite"),
        "--output report.json would replace report.json",
    ),
    "a folder": (("a.safetensors", "-o", "."), "is a folder; give a file name"),
    "no folder": (("a.safetensors", "-o", "no/README.md"), "there is no folder 'no'"),
    "no report": (
        ("a.safetensors", "--report", "zimage.safetensors"),
        "zimage.safetensors: mxfp8_report is not JSON",
    ),
    "NaN": (("nan.safetensors",), "codes are NaN"),
}


@pytest.mark.parametrize(("words", "error"), ERRORS.values(), ids=ERRORS)
def test_bad_input_is_one_line_and_writes_nothing(folder, run, words, error):
    assert run("convert", "zimage.safetensors", "a.safetensors")[0] == 0
    Path("report.json").write_text("{}")
    Path("a.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(100))
    bad = draft("a.safetensors")
    key = next(key for key, (dtype, *_) in bad.tensors.items() if dtype == "F8_E4M3")
    bad.tensors[key][2] = b"\x7f" + bad.tensors[key][2][1:]
    Path("nan.safetensors").write_bytes(bad.encode())
    before = sorted(os.listdir())
    status, out, text = run("card", *words)
    assert (status, out) == (1, "")
    assert text.startswith("mxfp8 card: error: ") and len(text.splitlines()) == 1
    assert error in text
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("words", [("--base", "model"), ("--license", " "), ("-o", "")])
def test_wrong_usage_is_2(folder, run, words):
    assert run("card", "a.safetensors", *words)[0] == 2
