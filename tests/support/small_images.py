"""bench/images.py on six pictures: weights that are the same, that ComfyUI runs, that are wrong.

    python tests/support/small_images.py COMFYUI

Prints JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import comfyui_modules

# isort: split
import comfy.sd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import images

from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.reports import metrics


def sampled_by_stock(pairs: images.Pairs) -> torch.Tensor:
    """What ComfyUI alone makes of a file that is rounded to nearest, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mxfp8.safetensors"
        convert_file(images.MODEL, file)
        options = {"dtype": torch.float32}
        return pairs.sample(comfy.sd.load_diffusion_model(str(file), model_options=options))


@torch.inference_mode()
def main() -> None:
    subject = images.Subject(images.MODEL)
    pairs = images.Pairs.of(images.spread(images.TEST, 6), first_seed=1000)
    reference = pairs.sample(subject.model)

    nearest = subject.convert()
    name = "single_blocks.1.linear1"
    wrong = nearest | {name: replace(nearest[name], qdata=nearest[name].qdata.roll(1, 0))}
    same = images.Rival(weight=lambda weight: weight)

    def sample(forwards) -> torch.Tensor:
        return pairs.sample(subject.with_forwards(forwards))

    ours = sample(images.formed(subject, nearest, "exact"))
    latents = {
        "same": sample({name: same.forward(subject.layer(name)) for name in nearest}),
        "nearest": ours,
        "wrong": sample(images.formed(subject, wrong, "exact")),
        "another order": ours.roll(1, 0),
    }
    found = {
        "shape": list(reference.shape),
        "layers": sorted(nearest),
        "to reference": {name: metrics.snr_db(reference, x) for name, x in latents.items()},
        "stock to ours": metrics.snr_db(ours, sampled_by_stock(pairs)),
        "left on the model": metrics.snr_db(reference, pairs.sample(subject.model)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    assert comfyui_modules
    main()
