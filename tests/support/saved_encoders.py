"""Small text encoders quantized and saved as loaded ones, alone and in a checkpoint.

    python tests/support/saved_encoders.py COMFYUI FOLDER

Prints a JSON object; see `tests/in_comfyui/test_saved_encoders.py` for what each entry must be.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import weakref
from pathlib import Path
from types import SimpleNamespace

from comfyui_modules import FOLDER

# isort: split
import comfy.sd
import comfy.sdxl_clip as sdxl_clip
import comfy.supported_models
import comfy.text_encoders.sd2_clip as sd2_clip
import torch
from comfy.quant_ops import QuantizedTensor
from comfy.sd import CLIPType
from graphs import difference
from loaded_modules import CLIP, QWEN, options, paths, qwen, refusal
from safetensors.torch import load_file, save_file
from tiny_models import flux2, randomize, vae

from mxfp8 import kernels
from mxfp8.nodes.models.checkpoint import checkpoint_sources, text_encoder_source
from mxfp8.nodes.models.load import load_checkpoint, load_text_encoder
from mxfp8.nodes.models.quantize import quantize_clip, quantize_model
from mxfp8.nodes.models.save import save_checkpoint, save_text_encoders
from mxfp8.nodes.models.text_encoder import encoders
from mxfp8.nodes.runtime.patch import accelerate, accelerate_clip
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.conversion.policy import DEFAULT, Selection
from mxfp8.quant.format import read_header

PART = "qwen3_4b"
LAYER = "model.layers.0.mlp.down_proj"


def quiet(*_) -> None:
    """Progress that nobody watches."""


def sizes() -> dict:
    return {f"{name}_model_config": {**QWEN} for name in ("", PART, "qwen3_06b")} | options({})


def load(name: str, kind: CLIPType = CLIPType.FLUX2):
    return load_text_encoder(paths([name]), [], kind, sizes())


def save(clip, name: str) -> None:
    save_text_encoders(clip, {PART: Path(name)}, {}, quiet)


def states(clip, part: str = PART) -> torch.Tensor:
    """What a language model makes of eight tokens."""
    clip.load_model()
    transformer = getattr(clip.cond_stage_model, part).transformer
    return transformer(torch.arange(8)[None])[0].float()


def same_files(one, other) -> bool:
    """Whether the tensors of two files are the same bytes."""
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(
        torch.equal(a[key].view(torch.uint8), b[key].view(torch.uint8)) for key in a
    )


def with_lora(clip, strength: float):
    """A CLIP with a LoRA on one layer, and what that adds to its weight."""
    generator = torch.Generator().manual_seed(3)
    weight = load_file("qwen.safetensors")[f"{LAYER}.weight"]
    up, down = (torch.randn(shape, generator=generator) * 0.05
                for shape in ((weight.shape[0], 4), (4, weight.shape[1])))  # fmt: skip
    name = f"text_encoders.{PART}.transformer.{LAYER}"
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    _, clip = comfy.sd.load_lora_for_models(None, clip, tensors, 0, strength)
    return clip, weight.float() + strength * (up @ down)


def freed() -> bool:
    """Whether a text encoder is freed while its quantized version is there."""
    plain = load("qwen")
    model = weakref.ref(plain.cond_stage_model)
    quantized, _ = quantize_clip(plain, DEFAULT, quiet)
    del plain
    gc.collect()
    return model() is None and quantized is not None


def alone() -> dict:
    """A text encoder quantized, saved, loaded again, cloned, and with a LoRA."""
    plain = load("qwen")
    before = states(plain)
    quantized, report = quantize_clip(plain, DEFAULT, quiet)
    convert_file("qwen.safetensors", "converted.safetensors")
    save(quantized, "saved.safetensors")
    save(plain, "unchanged.safetensors")
    clone = quantized.clone()
    factory, arguments, *_ = quantized.patcher.cached_patcher_init
    fresh = factory(*arguments, disable_dynamic=True)
    clone.patcher, clone.cond_stage_model = fresh, fresh.model
    loras, wanted = with_lora(plain, 0.8)
    baked, _ = quantize_clip(loras, DEFAULT, quiet)
    save(baked, "baked.safetensors")
    state, (qdata, scale) = load_file("baked.safetensors"), kernels.quantize(wanted)
    expected = states(quantized)
    return {
        "layers": sorted(layer.name for layer in report.quantized),
        "layers of the file": sorted(read_header("saved.safetensors").layers),
        "bytes as converted": same_files("saved.safetensors", "converted.safetensors"),
        "bytes unchanged": same_files("unchanged.safetensors", "qwen.safetensors"),
        "input unchanged": difference(states(plain), before),
        "rounding": difference(expected, before),
        "accelerated": difference(states(accelerate_clip(quantized)), expected),
        "loaded by ours": difference(states(load("saved")), expected),
        "loaded by stock": difference(
            states(comfy.sd.load_clip(paths(["saved"]), None, CLIPType.FLUX2, sizes())), expected),
        "deep clone": difference(states(clone), expected),
        "LoRA baked": bool(
            torch.equal(state[f"{LAYER}.weight"].view(torch.uint8), qdata.view(torch.uint8))
            and torch.equal(state[f"{LAYER}.weight_scale"], scale.view(torch.uint8))
        ),
        "again": refusal(lambda: quantize_clip(quantized, DEFAULT)),
        "nothing": refusal(lambda: quantize_clip(plain, Selection(exclude="."))),
        "original freed": freed(),
    }  # fmt: skip


def diffusion_model():
    """A model that has this text encoder in its checkpoints."""
    state = randomize({key: value.shape for key, value in flux2().state_dict().items()})
    save_file(state, "flux2.safetensors")
    return comfy.sd.load_diffusion_model(*paths(["flux2"]))


def autoencoder():
    """A VAE as a checkpoint of the model has it."""
    return comfy.sd.VAE(sd={key: value.bfloat16() for key, value in vae().items()})


def output(patcher) -> torch.Tensor:
    torch.manual_seed(1)
    model = patcher.model
    dtype = model.get_dtype_inference()
    x, context = torch.randn(1, 128, 4, 4), torch.randn(1, 8, 1024)
    return model.diffusion_model(
        x.to(dtype), torch.tensor([0.5], dtype=dtype), context=context.to(dtype)
    ).float()


def image(decoder) -> torch.Tensor:
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    return decoder.decode(latent).float()


def checkpoint() -> dict:
    """A checkpoint saved, and its parts as stock and ours load them."""
    model, decoder = diffusion_model(), autoencoder()
    quantized, *_ = quantize_model(model, DEFAULT)
    encoder, _ = quantize_clip(load("qwen"), DEFAULT)
    expected = output(quantized), states(encoder), image(decoder)
    result = {}
    for name, (m, c) in {
        "quantized": (quantized, encoder),
        "accelerated": (accelerate(quantized, "exact"), accelerate_clip(encoder)),
    }.items():
        save_checkpoint(m, c, decoder, f"{name}.safetensors", {"title": name}, quiet)
        (path,) = paths([name])
        header = read_header(f"{name}.safetensors")
        stock = comfy.sd.load_checkpoint_guess_config(path, te_model_options=sizes())
        ours = load_checkpoint(path, [], te_model_options=sizes())
        result[name] = {
            "layers": len(header.layers), "title": header.metadata["title"],
            "quantized": sum(
                isinstance(getattr(module, "weight", None), QuantizedTensor)
                for part in (stock[0].model, stock[1].cond_stage_model) for module in part.modules()
            ),
            "stock": [difference(f(x), y) for f, x, y in
                      zip((output, states, image), stock, expected, strict=False)],
            "ours": [difference(f(x), y) for f, x, y in
                     zip((output, states, image), ours, expected, strict=True)],
        }  # fmt: skip
    result["another type of CLIP"] = refusal(
        lambda: checkpoint_sources(model, load("other", CLIPType.STABLE_DIFFUSION), decoder)
    )
    return result


def small_clip(build, tokenizer) -> comfy.sd.CLIP:
    sizes = {f"clip_{which}_model_config": {**CLIP, "num_hidden_layers": 3} for which in "lgh"}
    target = SimpleNamespace(params={}, clip=build, tokenizer=tokenizer)
    clip = comfy.sd.CLIP(target, model_options={**sizes, "dtype": torch.float32})
    for parameter in clip.cond_stage_model.parameters():
        torch.nn.init.normal_(parameter)
    return clip


def several() -> dict:
    """The files of a CLIP with two encoders, written, and left when the second one fails."""
    clip = small_clip(sdxl_clip.SDXLClipModel, sdxl_clip.SDXLTokenizer)
    first, second = files = {name: Path(f"several-{name}.safetensors") for name in encoders(clip)}
    save_text_encoders(clip, files, {}, quiet)
    sizes = {name: len(load_file(path)) for name, path in files.items()}
    for path in files.values():
        path.unlink()

    def fail(*_) -> None:
        if files[first].exists():
            assert not files[second].exists()
            raise ValueError("in the second")

    failed = refusal(lambda: save_text_encoders(clip, files, {}, fail))
    return {"tensors": sizes, "failed": failed, "left": len([*Path().glob("several*")])}


def joined() -> dict[str, bool]:
    """Whether a CLIP whose tensors checkpoints join gets into one as stock's own node puts it, by
    the class of models."""
    found = {}
    for name, clip in (
        ("SDXL", small_clip(sdxl_clip.SDXLClipModel, sdxl_clip.SDXLTokenizer)),
        ("SD20", small_clip(sd2_clip.SD2ClipModel, sd2_clip.SD2Tokenizer)),
    ):
        config = object.__new__(getattr(comfy.supported_models, name))
        wanted = config.process_clip_state_dict_for_saving(clip.state_dict_for_saving())
        source = text_encoder_source(clip, config)
        found[name] = source.tensors.keys() == wanted.keys() and all(
            torch.equal(source.tensor(key), value) for key, value in wanted.items()
        )
    return found


@torch.inference_mode()
def main() -> None:
    logging.disable(logging.WARNING)
    os.chdir(FOLDER)
    qwen("qwen", 2560)
    qwen("other", 1024)
    found = {part.__name__: part() for part in (alone, several, checkpoint, joined)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
