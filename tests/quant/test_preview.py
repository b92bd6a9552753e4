"""What a conversion would do, against what it does."""

from __future__ import annotations

import torch
from checkpoints import GOLDEN, matrix
from safetensors.torch import save_file

from mxfp8.quant.conversion import preview
from mxfp8.quant.conversion.convert import convert_file, plan_source
from mxfp8.quant.conversion.policy import Selection
from mxfp8.quant.reports.conversion import format_size
from mxfp8.quant.sources.open import open_source

SOURCE = GOLDEN / "zimage_src.safetensors"


def test_sizes_and_layers_are_those_of_the_conversion(tmp_path):
    with open_source(SOURCE) as source:
        lines = preview.summary(plan_source(source)).splitlines()
    report = convert_file(SOURCE, tmp_path / "converted.safetensors")
    before, after = format_size(report.bytes_before), format_size(report.bytes_after)
    assert lines[0] == f"{before} -> {after}"
    kept = len(report.layers) - len(report.quantized)
    assert lines[1] == f"{len(report.quantized)} layers MXFP8, {kept} not quantized"
    assert lines[2] == f"{report.architecture}, preset {report.preset}"
    counts = [int(line.split(":")[0]) for line in lines[2:] if line.startswith("  ")]
    assert sum(counts) == kept
    assert counts == sorted(counts, reverse=True)
    assert {x.reason for x in report.layers if x.decision == "kept"} == {
        line.partition(": ")[2].rpartition(" (")[0] for line in lines[2:] if line.startswith("  ")
    }


def test_many_reasons_are_counted(tmp_path):
    path = tmp_path / "model.safetensors"
    layers = [f"blocks.0.layer{index}" for index in range(9)]
    save_file({f"{layer}.weight": matrix(32, 32) for layer in layers}, path)
    selection = Selection(exclude=tuple(f"layer{index}" for index in range(1, 9)))
    with open_source(path) as source:
        text = preview.summary(plan_source(source, selection))
    assert "1 layer MXFP8, 8 not quantized" in text
    assert "  2 for 2 other reasons" in text


def test_the_time_is_that_of_the_speed_given(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"blocks.0.a.weight": torch.ones(1024, 1024)}, path)  # 4 MiB
    with open_source(path) as source:
        plan = plan_source(source)
    assert "at least 8 s" in preview.summary(plan, speed=2**19)
    assert "at least" not in preview.summary(plan)
    assert preview.speed("cpu") == preview.speed("cpu") > 0
