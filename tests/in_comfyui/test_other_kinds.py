"""Files of ComfyUI's other kinds of models: none is taken for a model to quantize."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from comfyui import ask

from mxfp8.quant.conversion.convert import plan_source
from mxfp8.quant.format import FormatError

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


def test_every_other_kind_of_file_is_refused_by_its_name():
    for kind, files in ask("other_kinds.py").items():
        for name, tensors in files.items():
            source = SimpleNamespace(name=name, tensors=tensors)
            with pytest.raises(FormatError, match=f"^{name}: {kind}, not a diffusion model"):
                plan_source(source)
