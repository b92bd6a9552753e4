"""MXFP8 files in diffusers: single files, folders, pipelines, LoRAs, offloading and errors.

`test_diffusers_versions.py` runs this file with older versions, too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from bad_files import draft
from checkpoints import load as load_tensors
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers.models import model_loading_utils
from diffusers_models import DTYPE, KINDS, Files, Kind, distance, output, random, write
from diffusers_pipeline import lora, pipeline, sample
from quantized_files import plain
from safetensors.torch import save_file
from torch import nn

from mxfp8.integrations.diffusers import MXFP8Config, read, set_precision
from mxfp8.integrations.layers import LoadedLinear, replace_linears
from mxfp8.integrations.model_folder import convert_folder
from mxfp8.quant.cli import main
from mxfp8.quant.conversion.calibration import Calibration, Moments, fingerprint
from mxfp8.quant.conversion.policy import Selection
from mxfp8.quant.format import FormatError, read_header

VERSION = tuple(map(int, diffusers.__version__.split(".")[:2]))
READS_PATHS = VERSION >= (0, 42)  # older versions show a quantizer nothing of a single file
EXACT = MXFP8Config(precision="exact")
SMALL = [name for name in KINDS if name != "Flux.1"]
ALL = [*SMALL, pytest.param("Flux.1", marks=pytest.mark.long)]  # that one only at its real width


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """files(name, prefix): a model's files, written once."""
    written = {}

    def get(name: str, prefix: str = "") -> Files:
        if (name, prefix) not in written:
            folder = tmp_path_factory.mktemp("model")
            written[name, prefix] = write(KINDS[name], folder, prefix)
        return written[name, prefix]

    return get


def load(kind: Kind, found: Files, source=None, **options):
    """From the MXFP8 file, or another source, with its config."""
    source = found.mxfp8 if source is None else source
    if isinstance(source, Path):
        source = str(source) if READS_PATHS else read(source)
    options = {"quantization_config": EXACT, "torch_dtype": DTYPE, **options}
    return kind.cls.from_single_file(source, config=str(found.folder), **options)


def reference(kind: Kind, found: Files, folder: Path):
    """The model of the dequantized weights, in plain diffusers."""
    prefix = "model.diffusion_model."
    state = {k.removeprefix(prefix): v.to(DTYPE) for k, v in plain(found.mxfp8).items()}  # exact
    model = load(kind, found, state, quantization_config=None)
    if not kind.cls._keep_in_fp32_modules:
        return model
    model.save_pretrained(folder)  # only when it reads a folder, diffusers keeps some in float32
    return kind.cls.from_pretrained(folder, torch_dtype=DTYPE)


def quantized(model) -> set[str]:
    return {name for name, layer in model.named_modules() if isinstance(layer, LoadedLinear)}


# ---- single files ------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", ALL)
def test_a_single_file_gives_the_model_of_its_dequantized_weights(name, prefix, files, tmp_path):
    kind, found = KINDS[name], files(name, prefix)
    source = None if name in ("Z-Image", "Wan") else read(found.mxfp8, prefix)  # others keep it
    model = load(kind, found, source)
    assert len(quantized(model)) >= len(read_header(found.mxfp8).layers) >= 6
    assert torch.equal(output(model, kind), output(reference(kind, found, tmp_path), kind))


def test_markers_of_the_header_alone_and_scales_as_e8m0_are_read(files, tmp_path):
    kind, found = KINDS["Flux.2"], files("Flux.2")
    wanted = output(load(kind, found), kind)
    state, metadata = load_tensors(found.mxfp8)
    unmarked = {k: v for k, v in state.items() if not k.endswith(".comfy_quant")}
    save_file(unmarked, tmp_path / "header.safetensors", metadata)
    model = load(kind, found, read(tmp_path / "header.safetensors"))
    assert torch.equal(output(model, kind), wanted)
    scales = {k: v.view(torch.float8_e8m0fnu) for k, v in state.items() if k.endswith("_scale")}
    save_file({**state, **scales}, tmp_path / "e8m0.safetensors")
    assert torch.equal(output(load(kind, found, tmp_path / "e8m0.safetensors"), kind), wanted)


def test_float16_and_float32_are_dtypes_of_the_other_layers(files):
    kind, found = KINDS["Flux.2"], files("Flux.2")
    for dtype in (torch.float16, torch.float32):
        model = load(kind, found, torch_dtype=dtype)
        assert model.dtype == model.x_embedder.weight.dtype == dtype
        layer = model.transformer_blocks[0].attn.to_q
        assert layer.weight.dtype == dtype and layer.qdata.dtype == torch.uint8
    inputs = {k: v.float() if torch.is_tensor(v) and v.dtype == DTYPE else v
              for k, v in kind.inputs().items()}  # fmt: skip
    with torch.no_grad():
        found32 = model(**inputs, return_dict=False)[0]
    assert distance(output(load(kind, found), kind), found32) < 0.02  # BF16's rounding


# ---- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_saved_folder_loads_as_the_same_model(name, files, tmp_path):
    kind, found = KINDS[name], files(name)
    model = load(kind, found)
    wanted = output(model, kind)
    for shard in ("10GB", "100KB"):  # weight and scales of a layer get into different files
        model.save_pretrained(tmp_path / shard, max_shard_size=shard)
        config = json.loads((tmp_path / shard / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "mxfp8"
        assert EXACT.modules_to_not_convert is None  # it is this model's, and not the option's
        again = kind.cls.from_pretrained(tmp_path / shard, torch_dtype=DTYPE)
        assert quantized(again) == quantized(model)
        assert again.config.quantization_config.precision == "auto"  # the run's, not the model's
        set_precision(again, "exact")
        assert torch.equal(output(again, kind), wanted)
    assert len(list((tmp_path / "100KB").glob("*.safetensors"))) > 5


@pytest.fixture(scope="module")
def originals(files, tmp_path_factory):
    """originals(name): a BF16 folder in diffusers' format, in several files."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("original") / "transformer"
        kind, found = KINDS[name], files(name)
        model = load(kind, found, str(found.original), quantization_config=None)
        model.save_pretrained(folder, max_shard_size="300KB")
        return folder

    return make


@pytest.mark.parametrize("name", ALL)
def test_a_converted_folder_is_what_the_converted_file_is(name, files, originals, tmp_path):
    kind, found = KINDS[name], files(name)
    # ComfyUI tells a Wan by this layer's shape, which the padding of this one would change.
    selection = Selection(exclude=r"ffn\.net\.0" if name == "Wan" else None)
    original = originals(name)
    report = convert_folder(original, tmp_path / "new", selection, max_file=400_000)
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 2
    model = kind.cls.from_pretrained(tmp_path / "new", torch_dtype=DTYPE)
    assert quantized(model) == {layer.name for layer in report.quantized}
    single = load(kind, found)
    assert quantized(model) == quantized(single)
    assert torch.equal(output(model, kind), output(single, kind))


def calibration_of(state: dict[str, torch.Tensor]) -> Calibration:
    """Of a model's matrices, for random inputs whose columns differ in size."""
    layers, rows = {}, []
    for key, weight in state.items():
        if key.endswith(".weight") and weight.ndim == 2:
            name = key.removesuffix(".weight")
            x = random(300, weight.shape[1], seed=len(rows)).float()
            x = x * torch.exp2(x[0]) + x.roll(1, 1)
            layers[name] = Moments(x.T @ x / len(x), len(x))
            rows.append((name, tuple(weight.shape), weight[0]))
    return Calibration(layers, fingerprint(rows))


def codes(model) -> torch.Tensor:
    """Of all layers, in one row."""
    return torch.cat([model.get_submodule(n).qdata.flatten() for n in sorted(quantized(model))])


def share_of_equal(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found == wanted).float().mean())


@pytest.mark.parametrize("name", ["Z-Image", "Flux.2", "Qwen-Image"])
def test_a_calibration_from_comfyui_rounds_a_folder_as_it_rounds_the_file(
    name, files, originals, tmp_path, run
):
    kind, found, original = KINDS[name], files(name), originals(name)
    calibration_of(load_tensors(found.original)[0]).save(tmp_path / "calibration.safetensors")
    words = ("--calibration", tmp_path / "calibration.safetensors")
    assert run("convert", found.original, tmp_path / "file.safetensors", *words)[0] == 0
    folder = ("convert", original, tmp_path / "new", "--format", "diffusers", *words)
    assert run(*folder, "--dry-run")[0] == 0 and not (tmp_path / "new").exists()
    status, shown, _ = run(*folder)
    assert status == 0 and "in-sample" in shown
    wanted = codes(load(kind, found, tmp_path / "file.safetensors"))
    given = codes(kind.cls.from_pretrained(tmp_path / "new", torch_dtype=DTYPE))
    # A matmul of fewer rows may sum in another order: a code in the middle between two, and those
    # of its row that make up for its error, could differ on some CPUs.
    assert share_of_equal(given, wanted) > 0.99
    assert share_of_equal(codes(load(kind, found)), wanted) < 0.9
    file = tmp_path / "new" / "diffusion_pytorch_model.safetensors"
    assert run("verify", file, "--source", original)[0] == 0


def test_a_calibration_of_the_library_s_model_rounds_its_folder(files, originals, tmp_path):
    kind, original = KINDS["Wan"], originals("Wan")
    model = kind.cls.from_pretrained(original, torch_dtype=DTYPE)
    given = calibration_of(model.state_dict())
    report = convert_folder(original, tmp_path / "new", calibration=given)
    assert report.calibration["rounded_layers"] == len(report.quantized) > 6
    assert all(layer.output_error < layer.nearest_error for layer in report.quantized)
    other = calibration_of(load_tensors(files("Wan").original)[0])
    with pytest.raises(ValueError, match=r"'blocks\.0\..*which this model lacks.*name in ComfyUI"):
        convert_folder(original, tmp_path / "other", calibration=other)
    with pytest.raises(ValueError, match="it belongs to another model"):
        convert_folder(originals("Flux.2"), tmp_path / "other", calibration=other)


@pytest.mark.parametrize("name", SMALL)
def test_a_converted_folder_is_verified_against_its_original(name, originals, tmp_path, capsys):
    original = originals(name)
    convert_folder(original, tmp_path / "new")
    file = tmp_path / "new" / "diffusion_pytorch_model.safetensors"
    assert main(["verify", str(file), "--source", str(original)]) == 0
    assert "the file is its source in MXFP8" in capsys.readouterr().out
    assert main(["inspect", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "without these, diffusers runs the codes as weights" in shown
    assert ("WARNING: its tensors have diffusers' names" in shown) == (name != "Qwen-Image")


def test_a_converted_pipeline_has_all_its_parts(files, originals, tmp_path):
    kind = KINDS["Z-Image"]
    source = tmp_path / "Z-Image"
    transformer = kind.cls.from_pretrained(originals("Z-Image"), torch_dtype=DTYPE)
    pipeline(transformer).save_pretrained(source)
    (source / "README.md").write_text("License: ...")
    (source / "z_image.safetensors").write_bytes(b"the same model again")
    (source / ".cache").mkdir()
    (source / "scheduler").rename(tmp_path / "elsewhere")
    (source / "scheduler").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(source)  # which nothing can follow to its end
    assert main(["convert", str(source), str(tmp_path / "new"), "--format", "diffusers"]) == 0
    names = {str(p.relative_to(source)) for p in source.rglob("*")} - {".cache"}
    new = {str(p.relative_to(tmp_path / "new")) for p in (tmp_path / "new").rglob("*")}
    scheduler = {"scheduler/scheduler_config.json"}  # which rglob does not find behind a link
    assert new == names - {"z_image.safetensors"} | scheduler
    convert_folder(source / "text_encoder", tmp_path / "encoder")
    shutil.rmtree(tmp_path / "new" / "text_encoder")
    (tmp_path / "encoder").rename(tmp_path / "new" / "text_encoder")
    loaded = diffusers.ZImagePipeline.from_pretrained(
        tmp_path / "new", tokenizer=None, torch_dtype=DTYPE
    )
    encoder = loaded.text_encoder
    assert len(quantized(encoder)) == 7 * len(encoder.layers)
    loaded.set_progress_bar_config(disable=True)
    assert quantized(loaded.transformer) == quantized(load(kind, files("Z-Image")))
    wanted = sample(pipeline(load(kind, files("Z-Image"))))
    assert torch.equal(sample(loaded), wanted)


def test_a_folder_appears_whole_or_not_at_all(originals, tmp_path):
    source = originals("Wan")

    def stop(done, total, key):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_folder(source, tmp_path / "new", progress=stop, max_file=400_000)
    assert list(tmp_path.iterdir()) == []
    left = tmp_path / "new.mxfp8.parts"  # by a writer that was killed
    (left / "folder").mkdir(parents=True)
    (left / "folder" / "file").touch()
    (tmp_path / "new").mkdir()
    convert_folder(source, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
    with pytest.raises(OSError, match="not empty"):
        convert_folder(source, tmp_path / "new")


def test_folders_that_cannot_be_converted_are_rejected(files, originals, tmp_path, capsys):
    def refused(source, *options) -> str:
        arguments = ["convert", str(source), str(tmp_path / "new"), "--format", "diffusers"]
        assert main([*arguments, *options]) == 1
        assert not (tmp_path / "new").exists()
        return capsys.readouterr().err

    assert "a single file has no configuration" in refused(files("Wan").original)
    (tmp_path / "empty").mkdir()
    assert "there is no config.json in this folder" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(" " * (1 << 20) + "{}")
    assert "config.json: such a file has at most 1048576 bytes" in refused(tmp_path / "empty")
    convert_folder(originals("Wan"), tmp_path / "done")
    assert "quantized already" in refused(tmp_path / "done")
    several = tmp_path / "several"
    for name in ("transformer", "transformer_2"):
        (several / name).mkdir(parents=True)
    (several / "model_index.json").write_text("{}")
    assert "'transformer', 'transformer_2'. Give the folder of one" in refused(several)
    message = refused(originals("Wan"), "--exclude", ".")
    assert "transformer: no layer to quantize" in message
    with pytest.raises(SystemExit):
        refused(originals("Wan"), "--overwrite")


def test_a_dequantized_model_is_saved_as_a_plain_one(files, tmp_path):
    kind, found = KINDS["Flux.2"], files("Flux.2")
    model = load(kind, found)
    wanted = output(model, kind)
    model.dequantize()
    model.save_pretrained(tmp_path / "plain")
    again = kind.cls.from_pretrained(tmp_path / "plain", torch_dtype=DTYPE)
    assert not quantized(again)
    assert torch.equal(output(again, kind), wanted)


def test_set_precision_takes_only_known_words(files):
    model = load(KINDS["Flux.2"], files("Flux.2"))
    set_precision(model, "fast")
    assert {model.get_submodule(name).precision for name in quantized(model)} == {"fast"}
    with pytest.raises(ValueError, match="precision 'best'; it must be one of auto"):
        set_precision(model, "best")


# ---- pipelines, LoRAs, offloading --------------------------------------------------------------


def test_a_lora_on_mxfp8_layers_adds_what_it_adds_to_their_values(files):
    kind, found = KINDS["Z-Image"], files("Z-Image")
    pipe = pipeline(load(kind, found))
    before = sample(pipe)
    factors = lora(pipe.transformer)
    first = "transformer.noise_refiner.0.adaLN_modulation.0.lora_"  # no MXFP8, so it can be fused
    last = "transformer.layers.0.adaLN_modulation.0.lora_"
    factors |= {first + part: factors[last + part] for part in ("A.weight", "B.weight")}
    pipe.load_lora_weights(factors)
    after = sample(pipe)
    assert distance(after, before) > 0.05
    values = load(kind, found)
    values.dequantize()
    assert not quantized(values)
    other = pipeline(values)
    assert torch.equal(sample(other), before)
    other.load_lora_weights(factors)
    assert torch.equal(sample(other), after)
    with pytest.raises(RuntimeError, match=r"need not be fused: call unfuse_lora\(\)"):
        pipe.fuse_lora()
    pipe.unfuse_lora()
    rounding = 0.02  # of weights to BF16, which LoRAs were added to and taken from
    assert distance(sample(pipe), after) < rounding
    pipe.unload_lora_weights()
    assert distance(sample(pipe), before) < rounding
    pipe.load_lora_weights(factors)
    pipe.transformer.dequantize()
    pipe.fuse_lora()
    assert 0 < distance(sample(pipe), after) < rounding


def test_offloading_and_device_maps_change_nothing(files, tmp_path):
    kind, found = KINDS["Z-Image"], files("Z-Image")
    model = load(kind, found)
    wanted = output(model, kind)
    model.save_pretrained(tmp_path / "saved")
    for place in ("cpu", "auto", {"": "cpu"}):
        mapped = kind.cls.from_pretrained(tmp_path / "saved", torch_dtype=DTYPE, device_map=place)
        assert torch.equal(output(mapped, kind), wanted)
    cpu = torch.device("cpu")
    for options in (
        {"offload_type": "leaf_level"},
        {"offload_type": "block_level", "num_blocks_per_group": 1},
        {"offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path / "disk")},
    ):
        model = load(kind, found)
        model.enable_group_offload(onload_device=cpu, offload_device=cpu, **options)
        assert torch.equal(output(model, kind), wanted)
        assert torch.equal(output(model, kind), wanted)
    pipe = pipeline(load(kind, found))
    images = sample(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(sample(pipe), images)
    split = {"layers": 0, "": "cpu"}
    with pytest.raises(ValueError, match=r"places layers on 0, cpu, .* one by one"):
        kind.cls.from_pretrained(tmp_path / "saved", torch_dtype=DTYPE, device_map=split)


def test_group_offloading_by_a_stream_puts_all_values_back(files):
    """A CPU has no streams to run it whole; this is the step that frees the GPU's memory."""
    model = load(KINDS["Flux.2"], files("Flux.2"))
    cpu = torch.device("cpu")
    group = ModuleGroup(
        [model], cpu, cpu, model, stream=object(), record_stream=True, low_cpu_mem_usage=True
    )
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.numel()]
    places = [tensor.data_ptr() for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.clone()  # as if on another device
    group.offload_()
    assert [tensor.data_ptr() for tensor in tensors] == places


class Pipeline(diffusers.DiffusionPipeline):
    def __init__(self, transformer):
        super().__init__()
        self.register_modules(transformer=transformer)


@pytest.mark.parametrize("name", SMALL)
def test_offloading_layers_one_by_one_is_refused(name, files):
    model = load(KINDS[name], files(name))
    pipe = Pipeline(model)
    with pytest.raises(ValueError, match="cannot offload MXFP8 layers one by one"):
        pipe.enable_sequential_cpu_offload(device="cpu")


def test_layers_are_counted_on_a_gpu_before_they_have_values():
    """What diffusers does for a device_map with a GPU, and never for the CPU."""
    kind = KINDS["Flux.2"]
    with torch.device("meta"):
        model = kind.cls.from_config(kind.config)
    names = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
    assert replace_linears(model, names, "auto", DTYPE) == set(names)
    places = dict.fromkeys(model.state_dict(), "meta")
    model_loading_utils._caching_allocator_warmup(model, places, DTYPE, None)


def test_it_compiles_without_a_break(files):
    kind, found = KINDS["Z-Image"], files("Z-Image")
    model = load(kind, found)
    wanted = output(model, kind)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert torch.equal(output(model, kind), wanted)


# ---- errors ------------------------------------------------------------------------------------


def test_files_that_are_no_mxfp8_are_rejected(files, tmp_path):
    found = files("Flux.2")
    with pytest.raises(FormatError, match=r"original.safetensors: none of its layers is MXFP8"):
        read(found.original)
    lost = draft(found.mxfp8)
    lost.unmark()
    (tmp_path / "lost.safetensors").write_bytes(lost.encode())
    with pytest.raises(FormatError, match=r"no marker says so.*mxfp8 repair"):
        read(tmp_path / "lost.safetensors")
    damaged = draft(found.mxfp8)
    scales = next(t for key, t in damaged.tensors.items() if key.endswith("weight_scale"))
    scales[2] = b"\xff" + scales[2][1:]
    (tmp_path / "nan.safetensors").write_bytes(damaged.encode())
    with pytest.raises(FormatError, match=r"MXFP8 layer '.*byte 255"):
        read(tmp_path / "nan.safetensors")


def test_a_path_gets_the_same_checks_or_is_rejected(files, tmp_path):
    kind, found = KINDS["Flux.2"], files("Flux.2")
    if not READS_PATHS:
        with pytest.raises(ValueError, match=r"from_single_file\(read\(path\)"):
            load(kind, found, str(found.mxfp8))
        return
    with pytest.raises(FormatError, match="none of its layers is MXFP8; load it as a plain file"):
        load(kind, found, found.original)
    state, _ = load_tensors(found.mxfp8)
    unmarked = {k: v for k, v in state.items() if not k.endswith(".comfy_quant")}
    save_file(unmarked, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match=r"\.weight' \[.*has MXFP8 scales, but no marker"):
        load(kind, found, tmp_path / "x.safetensors")


def test_what_does_not_fit_is_rejected_by_name(files, originals, tmp_path):
    kind, found = KINDS["Flux.2"], files("Flux.2")
    with pytest.raises(ValueError, match=r"dtype=torch.float8_e4m3fn.*give torch.bfloat16"):
        load(kind, found, torch_dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="precision 'fp8'; it must be one of auto, exact, fast"):
        MXFP8Config(precision="fp8")
    config = json.loads((found.folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "joint_attention_dim": 64}))
    other = Files(tmp_path, found.original, found.mxfp8)
    with pytest.raises(ValueError, match=r"context_embedder.*expected shape"):
        load(kind, other)
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_head_dim": 96}))
    with pytest.raises(
        ValueError, match=r"'.*weight' is MXFP8 \[160, 160\] in the file and \[192, 192"
    ):
        load(kind, other)
    with pytest.raises(ValueError, match="no MXFP8 layer in this folder"):
        kind.cls.from_pretrained(originals("Flux.2"), quantization_config=EXACT, torch_dtype=DTYPE)
    if VERSION < (0, 37):
        return  # it tells a quantizer no keys
    convert_folder(originals("Flux.2"), tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    (tmp_path / "new" / "config.json").write_text(json.dumps({**config, "num_layers": 0}))
    with pytest.raises(ValueError, match=r"has no linear layer 'transformer_blocks\.0\."):
        kind.cls.from_pretrained(tmp_path / "new", torch_dtype=DTYPE)


@pytest.mark.parametrize("suffix", [".comfy_quant", "norm_q.weight"])
def test_a_file_without_all_weights_is_rejected_by_name(suffix, files, tmp_path):
    """An MXFP8 layer, or a plain tensor, of Wan, whose names diffusers maps one by one."""
    kind, found = KINDS["Wan"], files("Wan")
    state, _ = load_tensors(found.mxfp8)
    layer = next(key for key in state if key.endswith(suffix)).removesuffix(suffix)
    state = {key: tensor for key, tensor in state.items() if not key.startswith(layer)}
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"the files lack \d+ of its tensors.*first is 'blocks\.0"):
        load(kind, found, tmp_path / "short.safetensors")


@pytest.mark.parametrize("name", ["Qwen-Image"])
def test_a_prefix_that_diffusers_does_not_know_is_rejected(name, files):
    with pytest.raises(ValueError, match=r"place for 'model\.diff.*read\(path, prefix\)"):
        load(KINDS[name], files(name, "model.diffusion_model."))


def test_a_folder_without_a_part_of_a_layer_is_rejected(files, originals, tmp_path):
    kind = KINDS["Wan"]
    convert_folder(originals("Wan"), tmp_path / "new")
    path = tmp_path / "new" / "diffusion_pytorch_model.safetensors"
    state, metadata = load_tensors(path)
    del state["blocks.0.attn1.to_q.weight"]
    save_file(state, path, metadata)
    with pytest.raises(ValueError, match=r"MXFP8 layer 'blocks\.0\.attn1\.to_q': .*one is missing"):
        kind.cls.from_pretrained(tmp_path / "new", torch_dtype=DTYPE)
