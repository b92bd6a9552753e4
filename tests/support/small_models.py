"""Small models of some of ComfyUI's classes: converted as files, and quantized and saved as loaded
models whose files have more, or other names, than the model in memory. Stock runs them all.

    python tests/support/small_models.py COMFYUI FOLDER

Prints a JSON object: name -> {"converted": `converted`, "loaded": `loaded`}; and "unknown".
"""

from __future__ import annotations

import json
from pathlib import Path

from comfyui_modules import FOLDER

# isort: split
import comfy.sd
import comfy.supported_models
import folder_paths
import torch
from comfy.quant_ops import QuantizedTensor
from model_configs import BESIDE, CONFIGS, METADATA, as_stored
from safetensors.torch import load_file, save_file

from mxfp8.nodes.models.gathering import gather
from mxfp8.nodes.models.quantize import plan_model, quantize_model
from mxfp8.nodes.models.save import save_model
from mxfp8.quant.conversion import calibration
from mxfp8.quant.conversion.calibration import Calibration
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.conversion.policy import DEFAULT, Selection
from mxfp8.quant.format import read_header

WAN = {"dim": 128, "ffn_dim": 256, "num_heads": 1, "num_layers": 1, "in_dim": 16, "out_dim": 16}
# Name -> ComfyUI's class, its configuration, prefix in a file, tensors beside the model, inputs.
SMALL = {
    "pixeldit": (
        "PixelDiTT2I",
        {"num_groups": 2, "hidden_size": 128, "pixel_attn_hidden_size": 128, "pixel_num_groups": 2,
         "patch_depth": 1, "pixel_depth": 1, "txt_embed_dim": 64, "txt_max_length": 8},
        "", {}, {"x": (1, 3, 32, 32), "context": (1, 8, 64)},
    ),
    "stable audio": (
        "StableAudio", {"embed_dim": 768, "depth": 1, "num_memory_tokens": 0},
        "model.model.", BESIDE["StableAudio"],
        {"x": (1, 64, 32), "context": (1, 8, 768), "global_embed": (1, 1536)},
    ),
    "stable audio 3": (
        "StableAudio3", {**CONFIGS["StableAudio3"], "embed_dim": 256, "num_heads": 4, "depth": 1},
        "model.model.", BESIDE["StableAudio3"],
        {"x": (1, 256, 32), "context": (1, 8, 768), "global_embed": (1, 768),
         "local_add_cond": (1, 257, 32)},
    ),
    "kandinsky 5 video": (
        "Kandinsky5",
        {"model_dim": 128, "ff_dim": 256, "time_dim": 64, "num_text_blocks": 1,
         "num_visual_blocks": 1, "visual_embed_dim": 132},
        "", {}, {"x": (1, 33, 2, 8, 8), "context": (1, 8, 3584), "y": (1, 768)},
    ),
    "wan of width 260": (
        "WAN21_T2V",
        {"dim": 260, "ffn_dim": 260, "num_heads": 2, "num_layers": 2, "in_dim": 16, "out_dim": 16},
        "", {}, {"x": (1, 16, 2, 8, 8), "context": (1, 8, 4096)},
    ),
    "hunyuan 3d": (
        "Hunyuan3Dv2", {"hidden_size": 256, "depth": 1, "depth_single_blocks": 1},
        "model.",
        {"conditioner.main_image_encoder.model.encoder.layer.0.mlp.fc1.weight": (128, 64)},
        {"x": (1, 64, 16), "context": (1, 8, 1536)},
    ),
    "causal wan": ("WAN21_CausalAR_T2V", WAN, "", {}, None),
    "flow wan": ("WAN21_FlowRVS", WAN, "", {}, None),
}  # fmt: skip
LOADED = ("pixeldit", "stable audio", "stable audio 3", "causal wan", "flow wan")


def random(shapes: dict) -> dict[str, torch.Tensor]:
    """Weights whose outputs are about as large as their inputs; norms near 1, biases near 0."""
    state = {}
    for key, shape in shapes.items():
        value = torch.randn(tuple(shape))
        if len(shape) > 1:
            value *= value[0].numel() ** -0.5
        else:
            value = 0.1 * value + ("norm" in key and key.endswith(("weight", "scale", "gamma")))
        state[key] = value.bfloat16()
    return state


def make(name: str) -> Path:
    kind, config, prefix, beside, _ = SMALL[name]
    chosen = getattr(comfy.supported_models, kind)
    built = chosen({**config, **chosen.unet_config})
    built.set_inference_dtype(torch.float32, None)
    built = built.get_model({k: torch.empty(shape) for k, shape in beside.items()}, "")
    stored = as_stored(kind, built.diffusion_model.state_dict())
    shapes = {prefix + key: value.shape for key, value in stored.items()}
    path = FOLDER / f"{name}.safetensors"
    save_file(random({**shapes, **beside}), path, METADATA.get(kind))
    return path


def load(name: str, path: Path):
    _, _, _, beside, _ = SMALL[name]
    if beside:
        options = {"output_vae": False, "output_clip": False}
        return comfy.sd.load_checkpoint_guess_config(str(path), **options)[0]
    return comfy.sd.load_diffusion_model(str(path))


def run(patcher, inputs: dict) -> torch.Tensor:
    torch.manual_seed(1)
    model = patcher.model
    dtype = model.get_dtype_inference()
    given = {name: torch.randn(shape).to(dtype) for name, shape in inputs.items()}
    with torch.inference_mode():
        output = model.diffusion_model(given.pop("x"), torch.tensor([0.5], dtype=dtype), **given)
    return output.float()


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def converted(name: str, source: Path, expected: torch.Tensor) -> dict:
    """Relative "difference" of the output of the converted file from the source's; the layers that
    are "marked" in it and those that became "quantized" modules; and the tensors beside the model
    that "changed"."""
    target = source.with_suffix(".mxfp8.safetensors")
    convert_file(source, target)
    patcher = load(name, target)
    _, _, _, beside, inputs = SMALL[name]
    stored = load_file(source), load_file(target)
    modules = patcher.model.diffusion_model.modules()
    return {
        "difference": difference(run(patcher, inputs), expected),
        "marked": len(read_header(target).layers),
        "quantized": sum(isinstance(getattr(m, "weight", None), QuantizedTensor) for m in modules),
        "changed": [k for k in beside if not torch.equal(*(state[k] for state in stored))],
    }


def loaded(name: str, patcher, expected: torch.Tensor | None) -> dict:
    """Relative differences of a loaded model's output, "quantized", "saved" and saved "unchanged",
    from the original's, the "classes" that stock took what was written for, whether tensors beside
    the model are "beside" it again, and how many of the "planned" layers were "calibrated"."""
    inputs = SMALL[name][-1]
    quantized, *_ = quantize_model(patcher, DEFAULT)
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
    if expected is not None:
        result |= {made: difference(run(m, inputs), expected) for made, m in models.items()}
    if name == "pixeldit":
        result |= calibrated(patcher, inputs)
    return result


def beside(patcher) -> list[torch.Tensor]:
    state = patcher.model.state_dict()
    return [v for k, v in sorted(state.items()) if not k.startswith("diffusion_model.")]


def calibrated(patcher, inputs: dict) -> dict:
    def sample(watched) -> None:
        watched.patch_model()
        run(watched, inputs)
        watched.unpatch_model()

    selection = Selection(exclude="compress_to_attn")  # whose 4096 inputs take most of the time
    source, plan = plan_model(patcher, selection)
    group = {d.layer.removeprefix(source.prefix): d.shape[1] for d in plan.quantized}
    layers, _ = gather(patcher, [group], sample, lambda: None, lambda *_: None)
    keys = [f"{source.prefix}{name}.weight" for name in layers]
    mark = calibration.fingerprint(
        (key.removesuffix(".weight"), source.tensors[key][1], source.rows(key, 0, 1)[0])
        for key in keys
    )
    _, report, _ = quantize_model(patcher, selection, Calibration(layers, mark, {}))
    return {"planned": len(group), "calibrated": report.calibration["rounded_layers"]}


def unknown(patcher) -> dict:
    """What is said of a model whose class stock does not know, and the files that appeared."""
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


def main() -> None:
    # ComfyUI knows PixelDiT in one size alone, 1.3 billion parameters.
    comfy.supported_models.PixelDiTT2I.unet_extra_config = SMALL["pixeldit"][1]
    folder_paths.set_temp_directory(str(FOLDER))
    torch.manual_seed(0)
    results = {}
    for name, (_, _, _, _, inputs) in SMALL.items():
        source = make(name)
        patcher = load(name, source)
        expected = inputs and run(patcher, inputs)
        results[name] = {
            "converted": converted(name, source, expected) if inputs else None,
            "loaded": loaded(name, patcher, expected) if name in LOADED else None,
        }
    flow = FOLDER / "flow wan.safetensors"
    print(json.dumps({**results, "unknown": unknown(load("flow wan", flow))}))


if __name__ == "__main__":
    main()
