"""The names that text encoders get in their own files, against those in the files that ComfyUI
knows, on the meta device.

    python tests/support/encoder_names.py COMFYUI

Prints a JSON object: encoder -> names of its file that ours lacks.
"""

from __future__ import annotations

import json
import logging
import sys
from types import SimpleNamespace

import comfyui_modules  # noqa: F401
from comfyui import ROOT

# isort: split
sys.path.insert(0, str(ROOT / "bench"))
import comfy.sd
import text_encoders as bench
from comfy.sd import TEModel

from mxfp8.nodes.models.text_encoder import names_in_file


def main() -> None:
    logging.disable(logging.CRITICAL)
    comfy.sd.CLIP = bench._Chosen
    missing = {}
    for encoder in TEModel:
        builder = bench.Builder()
        wanted = bench.file_of(builder, encoder)
        *_, model = builder._built.values()
        part = bench.PAIRS[encoder][-1] if encoder in bench.PAIRS else None
        name = part or next(iter(bench.encoders_in(model)))
        names = names_in_file(SimpleNamespace(cond_stage_model=model), name)
        lacking = wanted.keys() - set(names.values())
        if encoder is TEModel.GPT_OSS_20B:  # whose quantizing layers get weights when loaded
            lacking = {key for key in lacking if ".experts." not in key and "_proj." not in key}
        missing[encoder.name] = sorted(lacking)
    print(json.dumps(missing))


if __name__ == "__main__":
    main()
