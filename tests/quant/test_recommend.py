"""Which format suits a machine: its reasons on cards that are not there, and what fits."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import mocked_card
import pytest
import torch
from checkpoints import GOLDEN
from comfyui import comfyui_path
from safetensors.torch import save_file

from mxfp8.kernels import dispatch
from mxfp8.kernels.device_facts import InstallReason
from mxfp8.quant.advice import memory
from mxfp8.quant.advice.recommend import (
    BF16,
    CALIBRATED,
    ERRORS,
    INT8,
    MXFP8,
    NVFP4,
    Q8_0,
    TRITON_ON_WINDOWS,
    recommend,
)  # fmt: skip
from mxfp8.quant.cli import main
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.format import read_header

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.device("cuda", 0)
# Worded as nothing is: what is to be installed is not read out of a sentence.
NO_TRITON = InstallReason("nothing there", "Triton", "Triton", "triton")
BROKEN_TRITON = InstallReason("it is broken", "Triton", "Triton")


@pytest.fixture
def on(monkeypatch):
    """Recommends for a card that is not there."""

    def on(version, path=None, triton=None, kitchen=True, fails=(), **card):
        card = mocked_card.Card("a card", version, **card)
        mocked_card.install(card, monkeypatch, kitchen)
        mocked_card.describe(version, monkeypatch, triton, fails, name=card.name)
        return recommend(path, CUDA)

    yield on
    dispatch.forget()
    mocked_card.forget()


def backends(found) -> tuple[str, str]:
    runs = {run.asked: run.backend for run in found.runs}
    return runs["exact"], runs["fast"]


@pytest.mark.parametrize(
    ("version", "options", "runs", "install"),
    [
        ((8, 6), {}, ("triton", "kitchen_int8"), None),
        ((8, 6), {"triton": NO_TRITON}, ("eager", "kitchen_int8"), "Triton: pip install triton"),
        ((8, 6), {"triton": BROKEN_TRITON}, ("eager", "kitchen_int8"), "Triton (it is broken)"),
        ((8, 6), {"kitchen": False}, ("triton", "triton_int8"), "comfy-kitchen's"),
        ((8, 6), {"torch_for": "12.8"}, ("triton", "triton_int8"), "torch for CUDA 13"),
        ((9, 0), {}, ("triton", "torch_fp8"), None),
        ((9, 0), {"kitchen": False}, ("triton", "torch_fp8"), None),
        ((9, 0), {"fails": ("torch_fp8",)}, ("triton", "kitchen_int8"), "Triton 3.4 on Hopper"),
        ((12, 0), {}, ("triton", "torch_mx"), None),
        ((12, 0), {"torch_for": "12.6"}, ("triton", "triton_fp8"), "a torch for CUDA 12.8"),
        ((12, 0), {"triton": NO_TRITON, "kitchen": False}, ("eager", "eager"), "Triton: pip"),
        ("gfx942", {"torch_for": "7.0"}, ("triton", "triton_int8"), None),
        ("gfx1100", {"torch_for": "7.0", "triton": NO_TRITON}, ("eager", "kitchen_int8"), "Triton"),
        ("gfx90a", {"torch_for": "7.0"}, ("triton", "triton"), None),
    ],
)
def test_what_runs_and_the_one_thing_to_install(on, monkeypatch, version, options, runs, install):
    monkeypatch.setattr("triton.__version__", "3.3.1" if "fails" in options else "3.6.0")
    found = on(version, **options)
    assert backends(found) == runs
    assert (found.install is None) == (install is None)
    assert install is None or install in found.install


def test_what_keeps_a_faster_backend_away_is_what_can_be_changed(on):
    fast = on((8, 6), kitchen=False).runs[1]
    assert fast.faster.keys() == {"kitchen_int8"}
    assert "cannot open shared object file" in fast.faster["kitchen_int8"]
    assert on((8, 6)).runs[1].faster == {}
    exact = on((8, 6), triton=NO_TRITON).runs[0]
    assert exact.faster == {"triton": NO_TRITON}  # and not what runs on CPUs only


def test_a_disabled_backend_that_no_package_brings_is_nothing_to_install(on, monkeypatch):
    registry = importlib.import_module("comfy_kitchen.registry").registry
    look = registry.list_backends

    def disabled() -> dict:
        return {name: {**about, "disabled": name == "cuda"} for name, about in look().items()}

    monkeypatch.setattr(registry, "list_backends", disabled)
    found = on((8, 6))
    assert found.runs[1].faster == {"kitchen_int8": "comfy-kitchen's CUDA kernels are disabled"}
    assert found.install is None


def test_a_reason_survives_a_copy():
    """Reports copy theirs."""
    copied = copy.deepcopy(NO_TRITON)
    assert (type(copied), copied, vars(copied)) == (InstallReason, NO_TRITON, vars(NO_TRITON))


def test_triton_for_windows_is_that_of_the_torch_here(on, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu130")
    found = on((8, 6), triton=InstallReason("", "Triton", "Triton", "triton-windows"))
    assert 'pip install "triton-windows<3.6"' in found.install
    page = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    rows = re.findall(r'(?m)^\| ([\d., ]+) \| .*"triton-windows(<[\d.]+)"', page)
    listed = {
        tuple(map(int, torch_version.split("."))): limit
        for versions, limit in rows
        for torch_version in versions.split(", ")
    }
    assert listed == TRITON_ON_WINDOWS


@pytest.mark.parametrize(
    ("version", "native", "advice"),
    [
        ((8, 6), {BF16, MXFP8, INT8}, "INT8 with ConvRot has the least error"),
        ((12, 0), {BF16, MXFP8, INT8, NVFP4}, "MXFP8 is what this card multiplies"),
        ("gfx942", {BF16, MXFP8}, "MXFP8 is the 8-bit format that this device multiplies"),
        ("gfx90a", {BF16}, "GGUF Q8_0 has the least error"),
    ],
)
def test_formats_are_compared_by_what_the_card_multiplies(on, version, native, advice):
    found = on(version, torch_for="7.0" if isinstance(version, str) else "13.0")
    assert {choice.name for choice in found.choices if choice.native} == native
    assert advice in found.advice


def test_where_torch_has_no_float8_mxfp8_does_not_run():
    found = recommend(None, torch.device("mps"))
    assert found.runs == ()
    assert "MXFP8 does not run here" in found.summary()
    assert {choice.name: choice.how for choice in found.choices}[MXFP8] == "does not run"


def test_errors_are_those_that_were_measured():
    results = json.loads((ROOT / "bench/results/formats.json").read_text(encoding="utf-8"))
    names = {MXFP8: "MXFP8", INT8: "INT8 ConvRot", Q8_0: "GGUF Q8_0", NVFP4: "NVFP4"}
    measured = {ours: results["formats"][theirs] for ours, theirs in names.items()}
    for name, row in measured.items():
        assert ERRORS[name] == pytest.approx(row["output_error"], rel=0.02)
    assert results["formats"]["MXFP8, calibrated"]["output_error"] == pytest.approx(
        CALIBRATED, 0.01
    )
    bits = {choice.name: choice.bits for choice in recommend(None, "cpu").choices}
    assert {name: bits[name] for name in names} == {k: row["bits"] for k, row in measured.items()}


def test_sizes_are_those_of_files(tmp_path):
    source, new = GOLDEN / "zimage_src.safetensors", tmp_path / "new.safetensors"
    convert_file(source, new)
    header = read_header(new)
    markers = sum(t.nbytes for t in header.tensors.values() if t.name.endswith(".comfy_quant"))
    padding = sum(
        layer.weight.nbytes + layer.scale.nbytes - layer.shape[0] * layer.shape[1] * 33 // 32
        for layer in header.layers.values()
    )
    stored = sum(tensor.nbytes for tensor in header.tensors.values())
    for path, extra in ((source, 0), (new, markers)):
        found = recommend(path, "cpu")
        sizes = {choice.name: choice.bytes for choice in found.choices}
        assert sizes[MXFP8] == stored - markers - padding + extra
        assert found.architecture == "Z-Image"
    before = sum(t.nbytes for t in read_header(source).tensors.values())
    assert {c.name: c.bytes for c in recommend(source, "cpu").choices}[BF16] == before


def test_a_file_without_a_layer_to_quantize_is_told_so(tmp_path):
    """As to `convert`, instead of a table of equal sizes."""
    save_file({"0.hessian": torch.ones(64, 64)}, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=r"file\.safetensors: no layer to quantize: "):
        recommend(tmp_path / "file.safetensors", "cpu")


@pytest.fixture
def large(tmp_path) -> Path:
    """A Z-Image of 6.3 billion values, 12.6 GB in BF16, whose data takes no space on disk."""
    shapes = {"cap_pad_token": [1, 3840], "noise_refiner.0.attention.qkv.weight": [11520, 3840]}
    shapes |= {f"layers.{i}.feed_forward.w1.weight": [10240, 3840] for i in range(159)}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.mark.skipif(os.name == "nt", reason="Windows makes no sparse files by itself")
def test_what_fits_and_which_picture_fits_beside_it(on, large):
    found = on((8, 6), large, memory=12 << 30)
    by_name = {choice.name: choice for choice in found.choices}
    assert by_name[BF16].room < 0 and by_name[BF16].largest is None
    mxfp8 = by_name[MXFP8]
    values = 159 * 10240 * 3840 + 11520 * 3840
    assert mxfp8.bytes == values * 33 // 32 + 2 * 3840
    assert mxfp8.room == (12 << 30) - mxfp8.bytes - memory.LEAST - memory.RESERVED
    width, height = map(int, mxfp8.largest.split(" x "))
    needed = width * height // 64 * 2 * 0.01 * 2.8 * (1 << 20)
    assert needed <= mxfp8.room + memory.LEAST
    assert (width + 64) * (height + 64) // 64 * 2 * 0.01 * 2.8 * (
        1 << 20
    ) > mxfp8.room + memory.LEAST
    assert "Only NVFP4 fits" in on((8, 6), large, memory=6 << 30).advice
    assert (
        "Only INT8 with ConvRot and NVFP4 fit as a whole;"
        in on((8, 6), large, memory=7_663_000_000).advice
    )
    assert "No format fits" in on((8, 6), large, memory=4 << 30).advice
    assert on((8, 6), large, memory=24 << 30).advice.startswith(
        "BF16 fits as a whole; quantize for speed or for larger pictures. "
    )
    assert "quantize for larger pictures" in on("gfx90a", large, torch_for="7.0").advice


def test_what_sampling_takes_is_what_comfyui_guesses():
    script = ROOT / "tests" / "support" / "activation_facts.py"
    out = subprocess.check_output([sys.executable, script, comfyui_path()], text=True)
    found = json.loads(out.splitlines()[-1])
    shapes = {"img_in.weight": (3072, 128), "head.modulation": (1, 2, 5120)}
    assert found["rows"].keys() == memory.ACTIVATIONS.keys()
    for name, (factor, pixels, frames, needed) in found["rows"].items():
        row = memory.ACTIVATIONS[name]
        assert row.pixels == pixels, name
        assert row.frames in (frames, None), name  # Qwen-Image's pictures are videos to ComfyUI
        assert row.factor_of(shapes) == pytest.approx(factor), name
        assert 12 * memory.per_latent_pixel(factor) == pytest.approx(needed), name
    if os.name != "nt":
        assert found["least"] == pytest.approx(memory.LEAST + memory.RESERVED, abs=4)


def test_frames_of_a_video_are_counted():
    row = memory.ACTIVATIONS["Wan"]
    factor = row.factor_of({"head.modulation": (1, 2, 5120)})
    frame = 104 * 60 * memory.per_latent_pixel(factor)
    assert memory.largest(row, factor, int(21 * frame) + 1) == "81 frames of 832 x 480"
    assert memory.largest(row, factor, int(frame) - 1) is None
    assert row.factor_of({}) is None
    assert row.factor_of({"head.modulation": (5120,)}) is None  # of a file with other shapes


def test_the_command_prints_all_of_it(capsys):
    path = str(GOLDEN / "zimage_src.safetensors")
    assert main(["recommend", path, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "zimage_src.safetensors (Z-Image):" in out
    assert re.search(r"(?m)^INT8 with ConvRot +8 +0.62% ", out)
    assert "No speed is given" in out
    assert main(["recommend", "--device", "tpu"]) == 1
    assert "device 'tpu' cannot be used here" in capsys.readouterr().err
    assert main(["recommend", str(GOLDEN / "files.json")]) == 1
