"""Quantize and save loaded models of ComfyUI's classes whose files have more, or other names, than
the model in memory, and load what was written with stock.

Run as a process of its own (ComfyUI parses the command line):

    python tests/support/models_in_memory.py COMFYUI FOLDER

Prints a JSON object: name -> what became of the model; see `check`.
"""

from __future__ import annotations

import json

from small_classes import FOLDER, SMALL, make, run  # starts ComfyUI

# isort: split
import comfy.sd
import comfy.supported_models
import folder_paths
import torch
from model_configs import METADATA
from safetensors.torch import load_file, save_file

from mxfp8.nodes.models.gathering import gather
from mxfp8.nodes.models.quantize import plan_model, quantize_model
from mxfp8.nodes.models.save import save_model
from mxfp8.quant.conversion import calibration
from mxfp8.quant.conversion.calibration import Calibration
from mxfp8.quant.conversion.policy import DEFAULT

WAN = {"dim": 128, "ffn_dim": 256, "num_heads": 1, "num_layers": 1, "in_dim": 16, "out_dim": 16}
SMALL |= {
    "causal wan": ("WAN21_CausalAR_T2V", WAN, "", {}, None),
    "flow wan": ("WAN21_FlowRVS", WAN, "", {}, None),
}  # fmt: skip
NAMES = ("pixeldit", "stable audio", "stable audio 3", "causal wan", "flow wan")


def main() -> None:
    # ComfyUI knows PixelDiT in one size alone, 1.3 billion parameters.
    comfy.supported_models.PixelDiTT2I.unet_extra_config = SMALL["pixeldit"][1]
    folder_paths.set_temp_directory(str(FOLDER))
    torch.manual_seed(0)
    results = {name: check(name) for name in NAMES}
    print(json.dumps({**results, "unknown": unknown()}))


def unknown() -> dict:
    """What is said of a model whose class stock does not know, and the files that appeared."""
    patcher = original("flow wan")
    config = patcher.model.model_config
    config.__class__ = type("Unknown", (type(config),), {})
    before = set(FOLDER.iterdir())
    errors = []
    for work in (
        lambda: plan_model(patcher, DEFAULT),
        lambda: save_model(patcher, FOLDER / "unknown.safetensors", {}, lambda *_: None),
    ):
        try:
            work()
        except ValueError as error:
            errors.append(str(error))
    return {"errors": errors, "files": len(set(FOLDER.iterdir()) - before)}


def check(name: str) -> dict:
    """Relative differences of a model's output from the original's, "classes" that stock took what
    was written for, whether tensors beside the model are "beside" it again, and how many of the
    "planned" layers were "calibrated"."""
    patcher = original(name)
    inputs = SMALL[name][-1]
    quantized, _ = quantize_model(patcher, DEFAULT)
    models = {"quantized": quantized}
    for made, source in (("saved", quantized), ("unchanged", patcher)):
        path = FOLDER / f"{name}-{made}.safetensors"
        save_model(source, path, {}, lambda *_: None)
        models[made] = comfy.sd.load_diffusion_model(str(path))
    result = {
        "classes": [type(p.model.model_config).__name__ for p in (patcher, *models.values())],
        "beside": all(torch.equal(*pair) for made in models.values()
                      for pair in zip(beside(patcher), beside(made), strict=True)),
    }  # fmt: skip
    if inputs is not None:
        expected = run(patcher.model, inputs).float()
        for made, other in models.items():
            got = run(other.model, inputs).float()
            result[made] = float((got - expected).norm() / expected.norm())
    if name == "pixeldit":
        result |= calibrated(patcher, inputs)
    return result


def original(name: str):
    kind, _, _, beside, _ = SMALL[name]
    path = make(name)
    if kind in METADATA:
        save_file(load_file(path), path, METADATA[kind])
    if beside:
        options = {"output_vae": False, "output_clip": False}
        return comfy.sd.load_checkpoint_guess_config(str(path), **options)[0]
    return comfy.sd.load_diffusion_model(str(path))


def beside(patcher) -> list[torch.Tensor]:
    state = patcher.model.state_dict()
    return [v for k, v in sorted(state.items()) if not k.startswith("diffusion_model.")]


def calibrated(patcher, inputs: dict) -> dict:
    def sample(watched) -> None:
        watched.patch_model()
        run(watched.model, inputs)
        watched.unpatch_model()

    source, plan = plan_model(patcher, DEFAULT)
    group = {d.layer.removeprefix(source.prefix): d.shape[1] for d in plan.quantized}
    layers, _ = gather(patcher, [group], sample, lambda: None, lambda *_: None)
    keys = [f"{source.prefix}{name}.weight" for name in layers]
    mark = calibration.fingerprint(
        (key.removesuffix(".weight"), source.tensors[key][1], source.rows(key, 0, 1)[0])
        for key in keys
    )
    _, report = quantize_model(patcher, DEFAULT, Calibration(layers, mark, {}))
    return {"planned": len(group), "calibrated": report.calibration["rounded_layers"]}


if __name__ == "__main__":
    main()
