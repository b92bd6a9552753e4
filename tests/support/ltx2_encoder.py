"""The text encoder of LTX-2, which ComfyUI loads from two files: quantized, saved and loaded again.

    python tests/support/ltx2_encoder.py COMFYUI FOLDER

Prints a JSON object; see `tests/in_comfyui/test_saved_encoders.py` for what each entry must be.
Gemma is small, and so is the projection, whose size ComfyUI fixes. The names in files are those of
the real sizes, on the meta device.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

from comfyui import comfyui_path
from comfyui_modules import FOLDER

# isort: split
import comfy.sd
import comfy.text_encoders.llama as llama
import comfy.text_encoders.lt as lt
import torch
from comfy.sd import CLIPType
from graphs import difference
from loaded_modules import paths
from safetensors.torch import load_file, save_file
from tiny_models import randomize

from mxfp8.nodes.models.load import load_text_encoder
from mxfp8.nodes.models.quantize import builder, quantize_clip
from mxfp8.nodes.models.save import save_text_encoders
from mxfp8.nodes.models.text_encoder import PROJECTION, encoders, names_in_file
from mxfp8.quant.conversion.policy import DEFAULT
from mxfp8.quant.format import read_header

WIDTH, LAYERS = 64, 48  # by the last of which ComfyUI knows it
SIZES = {
    "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": LAYERS, "vocab_size": 64,
    "num_attention_heads": 1, "num_key_value_heads": 1,
}  # fmt: skip
VISION = {
    **llama.GEMMA3_VISION_CONFIG, "hidden_size": 32, "intermediate_size": 64,
    "num_attention_heads": 2, "num_hidden_layers": 1,
}  # fmt: skip
OPTIONS = {"_model_config": SIZES, "dtype": torch.float32}
REAL = lt.LTXAVTEModel


class Small(REAL):
    def __init__(self, *args, device="cpu", dtype=None, **options):
        super().__init__(*args, device="meta", dtype=dtype, **options)
        self.gemma3_12b = lt.Gemma3_12BModel(
            device=device, dtype=options["dtype_llama"], model_options=options["model_options"]
        )
        self.text_embedding_projection = self.gemma3_12b.operations.Linear(
            WIDTH * (LAYERS + 1), WIDTH, bias=False, dtype=dtype, device=device
        )


def quiet(*_) -> None:
    """Progress that nobody watches."""


def load(*names: str):
    return comfy.sd.load_clip(paths(names), None, CLIPType.LTXV, OPTIONS)


def states(clip) -> torch.Tensor:
    """What it makes of eight tokens, and its projection of that."""
    tokens = [[(token, 1.0) for token in range(1, 9)]]
    return clip.encode_from_tokens({"gemma3_12b": tokens}).float()


def make_files() -> None:
    model = Small(device="meta", dtype_llama=torch.bfloat16, model_options={"_model_config": SIZES})
    gemma = {
        key: value.shape
        for key, value in model.gemma3_12b.transformer.state_dict().items()
        if not key.startswith(("vision_model", "multi_modal"))
    }
    state = randomize(gemma)
    tokenizer = comfyui_path() / "comfy/text_encoders/t5_pile_tokenizer/tokenizer.model"
    state["spiece_model"] = torch.frombuffer(bytearray(tokenizer.read_bytes()), dtype=torch.uint8)
    save_file(state, "gemma.safetensors")
    shape = tuple(model.text_embedding_projection.weight.shape)
    save_file(randomize({f"{PROJECTION}.aggregate_embed.weight": shape}), "projection.safetensors")


def small() -> dict:
    make_files()
    plain = load("gemma", "projection")
    quantized, report = quantize_clip(plain, DEFAULT, quiet)
    files = {name: Path(f"saved-{name}.safetensors") for name in encoders(quantized)}
    save_text_encoders(quantized, files, {}, quiet)
    gemma, projection = (path.stem for path in files.values())
    expected = states(quantized)
    before, after = (load_file(f"{name}.safetensors") for name in ("projection", projection))
    return {
        "files": list(files),
        "layers": len(report.quantized),
        "layers of the files": [len(read_header(path).layers) for path in files.values()],
        "projection unchanged": list(before) == list(after)
        and all(torch.equal(before[key], after[key]) for key in before),
        "tokenizer": "spiece_model" in load_file(f"{gemma}.safetensors"),
        "rounding": difference(expected, states(plain)),
        "loaded by stock": difference(states(load(gemma, projection)), expected),
        "loaded by ours": difference(
            states(load_text_encoder(paths([gemma, projection]), [], CLIPType.LTXV, OPTIONS)),
            expected,
        ),
    }


def names(kind: str, connectors: bool) -> dict:
    """Whether ComfyUI finds every weight of the real model in the files of another one."""
    options = {"device": "meta", "dtype": torch.bfloat16, "dtype_llama": torch.bfloat16}
    model = REAL(text_projection_type=kind, **options)
    if connectors:
        model.enable_compat_mode()
    state, clip = model.state_dict(), SimpleNamespace(cond_stage_model=model)
    found = REAL(text_projection_type=kind, **options)
    left = []
    for encoder in encoders(clip):
        named = names_in_file(clip, encoder)
        found.can_assign_sd = True
        missing, unexpected = found.load_sd({new: state.pop(old) for old, new in named.items()})
        left += [*missing, *unexpected]
    built = builder(model)(text_projection_type=kind, **options)
    return {
        "not in a file": sorted(key for key in state if not key.endswith("logit_scale")),
        "not loaded": [key for key in left if "logit_scale" not in key],
        "same": found.state_dict().keys() == built.state_dict().keys() == model.state_dict().keys(),
    }


@torch.inference_mode()
def main() -> None:
    logging.disable(logging.WARNING)
    os.chdir(FOLDER)
    kinds = (("single_linear", False), ("single_linear", True), ("dual_linear", False))
    found = {"names": [names(*kind) for kind in kinds]}
    llama.Gemma3_12B_Config.vision_config = VISION
    lt.LTXAVTEModel = Small
    print(json.dumps({**found, "small": small()}))


if __name__ == "__main__":
    main()
