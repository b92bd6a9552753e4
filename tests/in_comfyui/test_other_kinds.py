"""Files of ComfyUI's other kinds of models: none is taken for a model to quantize."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from comfyui import TESTS, comfyui_path

from mxfp8.quant.format import FormatError
from mxfp8.quant.sources.unsupported import check_kind

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


def test_every_other_kind_of_file_is_refused_by_its_name():
    script = TESTS / "support" / "other_kinds.py"
    done = subprocess.run([sys.executable, script, comfyui_path()], capture_output=True, check=True)
    for kind, files in json.loads(done.stdout).items():
        for name, tensors in files.items():
            source = SimpleNamespace(name=name, tensors=tensors)
            with pytest.raises(FormatError, match=f"^{name}: {kind}, not a diffusion model"):
                check_kind(source)
