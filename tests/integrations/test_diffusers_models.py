"""MXFP8 files in diffusers, the newest version: single files, folders, pipelines and errors."""

from __future__ import annotations

import pytest
import torch
from diffusers_models import DTYPE, KINDS, output, write
from quantized_files import plain

from mxfp8.integrations.diffusers import MXFP8Config
from mxfp8.integrations.layers import LoadedLinear
from mxfp8.quant.format import read_header

EXACT = MXFP8Config(precision="exact")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """files(name): a model's files, written once."""
    written = {}

    def get(name: str, prefix: str = ""):
        if (name, prefix) not in written:
            folder = tmp_path_factory.mktemp("model")
            written[name, prefix] = write(KINDS[name], folder, prefix)
        return written[name, prefix]

    return get


def load(kind, found, source, **options):
    options = {"quantization_config": EXACT, "torch_dtype": DTYPE, **options}
    return kind.cls.from_single_file(source, config=str(found.folder), **options)


def slow(name: str):
    return pytest.param(name, marks=pytest.mark.slow) if name == "Flux.1" else name


def reference(kind, found, tmp_path):
    """The model of the dequantized weights, in plain diffusers."""
    state = {k: v.to(DTYPE) for k, v in plain(found.mxfp8).items()}  # exact
    model = load(kind, found, state, quantization_config=None)
    if not kind.cls._keep_in_fp32_modules:
        return model
    model.save_pretrained(tmp_path)  # only when it reads a folder, diffusers keeps some in float32
    return kind.cls.from_pretrained(tmp_path, torch_dtype=DTYPE)


@pytest.mark.parametrize("name", [*map(slow, KINDS)])
def test_a_single_file_gives_the_model_of_its_dequantized_weights(name, files, tmp_path):
    kind, found = KINDS[name], files(name)
    model = load(kind, found, str(found.mxfp8))
    layers = [m for m in model.modules() if isinstance(m, LoadedLinear)]
    assert len(layers) >= len(read_header(found.mxfp8).layers) >= 6
    assert torch.equal(output(model, kind), output(reference(kind, found, tmp_path), kind))
