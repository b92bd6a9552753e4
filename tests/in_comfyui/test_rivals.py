"""Files that convert_to_quant itself makes from a whole model: in stock, in ours, and repaired.

It comes from PyPI, in the versions that made the files one finds, so this runs in `make test-long`.
"""

from __future__ import annotations

import subprocess

import pytest
from convert import rival
from graphs import SAME, Graph, difference, load_ours, run

from mxfp8.quant.checks.inspect import inspect_file
from mxfp8.quant.checks.verify import verify_file

pytestmark = [pytest.mark.comfy, pytest.mark.long]


@pytest.mark.parametrize("version", ["1.2.6", "1.3.4"])
@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_a_file_of_convert_to_quant_samples_what_stock_samples(comfy, kind, version):
    folder = comfy.base / "models" / "diffusion_models"
    source, name = folder / f"{kind}.safetensors", f"{kind}-by-{version}-mxfp8"
    target = folder / f"{name}.safetensors"
    options = ["--mxfp8", "--comfy_quant", "--save-quant-metadata", "--simple", "--low-memory"]
    command = [rival(version), "-i", source, *options, "-o", target]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)

    inspection = inspect_file(target)
    assert inspection.formats == {"mxfp8": inspection.formats["mxfp8"]}
    assert inspection.formats["mxfp8"] >= 15
    assert not inspection.problems and not inspection.warnings
    # It changes biases by what it takes for the mean error of the weights.
    for problem in verify_file(target, source).problems:
        assert ".bias' differs from the source" in problem

    graph = Graph()
    models = {
        "bf16": graph.loader(f"{kind}.safetensors"),
        "stock": graph.loader(target.name),
        "ours": load_ours(graph, name.removesuffix("-mxfp8")),
    }
    saved = {n: graph.save_latent(graph.sample(m, kind)) for n, m in models.items()}
    latent = run(comfy, graph, saved)
    assert difference(latent["ours"], latent["stock"]) < SAME
    assert 1e-4 < difference(latent["ours"], latent["bf16"]) < 0.2
