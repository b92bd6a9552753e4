"""Ask ComfyUI which weights of its text encoders it runs quantized, and write them as a table.

    python bench/text_encoders.py [FILE]        FILE: quant/conversion/text_encoders.json

ComfyUI builds a text encoder with quantizing operations only if its factory is told that the file
is quantized, and some factories are never told. So every encoder is built by ComfyUI itself, on
the meta device, from a file in which each matrix is marked, as every type of CLIP and inside every
checkpoint; recorded is which marks arrive at a quantizing linear layer. A layer's name alone does
not tell: the same T5 is quantized in one size and plain in another.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "quant" / "conversion" / "text_encoders.json"
TARGET = Path(sys.argv[1]) if len(sys.argv) > 1 else TABLE
sys.path.insert(0, str(ROOT / "tests" / "support"))

from comfyui import comfyui_path  # noqa: E402

sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, str(comfyui_path()))

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402
from comfy.sd import CLIPType, TEModel  # noqa: E402

Shapes = dict[str, tuple[int, ...]]

_NORM = "model.layers.0.post_attention_layernorm.weight"
_Q_NORM = "model.layers.{}.self_attn.q_norm.weight"
_K = "model.layers.0.self_attn.k_proj.weight"
_GEMMA = {"model.layers.0.post_feedforward_layernorm.weight": (1,), _K: (1, 1)}
_QWEN3 = {_Q_NORM.format(0): (1,), _K: (1, 1)}
_T5_WIDE = "encoder.block.23.layer.1.DenseReluDense.wi{}.weight"
_T5_SMALL = "encoder.block.0.layer.0.SelfAttention.k.weight"
_QWEN35 = {"model.language_model.layers.0.linear_attn.A_log": (1,)}
_QWEN35_NORM = "model.language_model.layers.0.input_layernorm.weight"
_QWEN3VL = {"model.visual.deepstack_merger_list.0.norm.weight": (1,)}
_QWEN3VL_MERGER = "model.visual.merger.linear_fc2.weight"

# What ComfyUI's `detect_te_model` looks at.
SEEDS: dict[TEModel, Shapes] = {
    TEModel.CLIP_L: {"text_model.encoder.layers.0.mlp.fc1.weight": (1,)},
    TEModel.CLIP_H: {"text_model.encoder.layers.22.mlp.fc1.weight": (1,)},
    TEModel.CLIP_G: {"text_model.encoder.layers.30.mlp.fc1.weight": (1,)},
    TEModel.T5_XXL: {_T5_WIDE.format("_1"): (10240, 1)},
    TEModel.T5_XL: {_T5_WIDE.format("_1"): (5120, 1)},
    TEModel.T5_XXL_OLD: {_T5_WIDE.format(""): (1, 1)},
    TEModel.T5_BASE: {_T5_SMALL: (768, 1)},
    TEModel.BYT5_SMALL_GLYPH: {_T5_SMALL: (384, 1)},
    TEModel.JINA_CLIP_2: {"model.encoder.layers.0.mixer.Wqkv.weight": (1, 1)},
    TEModel.T5_GEMMA: {"model.encoder.layers.0.pre_self_attn_layernorm.weight": (1,)},
    TEModel.GEMMA_2_2B: _GEMMA,
    TEModel.GEMMA_3_4B: {**_GEMMA, _Q_NORM.format(0): (1,)},
    TEModel.GEMMA_3_4B_VISION: {
        **_GEMMA, _Q_NORM.format(0): (1,), "vision_model.embeddings.patch_embedding.weight": (1,),
    },
    TEModel.GEMMA_3_12B: {
        **_GEMMA, _Q_NORM.format(47): (1,), "model.layers.5.self_attn.v_proj.weight": (1, 1),
    },
    TEModel.GEMMA_4_12B: {**_GEMMA, _Q_NORM.format(47): (1,)},
    TEModel.GEMMA_4_E4B: {**_GEMMA, _Q_NORM.format(41): (1,)},
    TEModel.GEMMA_4_E2B: {**_GEMMA, _Q_NORM.format(34): (1,)},
    TEModel.GEMMA_4_31B: {**_GEMMA, _Q_NORM.format(59): (1,)},
    TEModel.GPT_OSS_20B: {
        "layers.0.self_attn.sinks": (1,), "layers.0.mlp.experts.gate_up_proj.weight": (1, 1, 1),
    },
    TEModel.QWEN25_3B: {"model.layers.0.self_attn.k_proj.bias": (256,), _K: (1, 1)},
    TEModel.QWEN25_7B: {"model.layers.0.self_attn.k_proj.bias": (512,), _K: (1, 1)},
    TEModel.QWEN3_06B: {**_QWEN3, _NORM: (1024,)},
    TEModel.QWEN3_2B: {**_QWEN3, _NORM: (2048,)},
    TEModel.QWEN3_4B: {**_QWEN3, _NORM: (2560,)},
    TEModel.QWEN3_8B: {**_QWEN3, _NORM: (4096,)},
    TEModel.QWEN35_08B: {**_QWEN35, _QWEN35_NORM: (1024,)},
    TEModel.QWEN35_2B: {**_QWEN35, _QWEN35_NORM: (2048,)},
    TEModel.QWEN35_4B: {**_QWEN35, _QWEN35_NORM: (2560,)},
    TEModel.QWEN35_9B: {**_QWEN35, _QWEN35_NORM: (4096,)},
    TEModel.QWEN35_27B: {**_QWEN35, _QWEN35_NORM: (5120,)},
    TEModel.QWEN3VL_4B: {**_QWEN3VL, _QWEN3VL_MERGER: (2560, 1)},
    TEModel.QWEN3VL_8B: {**_QWEN3VL, _QWEN3VL_MERGER: (4096, 1)},
    TEModel.QWEN3VL_32B: {
        "visual.deepstack_merger_list.0.norm.weight": (1,),
        "model.layers.49.self_attn.q_proj.weight": (1, 1), _K: (1, 1),
    },
    TEModel.MISTRAL3_24B: {
        _NORM: (5120,), "model.layers.39.post_attention_layernorm.weight": (1,), _K: (1, 1),
    },
    TEModel.MISTRAL3_24B_PRUNED_FLUX2: {_NORM: (5120,), _K: (1, 1)},
    TEModel.MINISTRAL_3_3B: {_NORM: (3072,), _K: (1, 1)},
    TEModel.LLAMA3_8: {_NORM: (4096,), _K: (1, 1)},
}  # fmt: skip
# Encoders that ComfyUI builds only beside another one.
PAIRS = {
    TEModel.BYT5_SMALL_GLYPH: (CLIPType.HUNYUAN_IMAGE, TEModel.QWEN25_7B, "byt5_small"),
    TEModel.JINA_CLIP_2: (CLIPType.NEWBIE, TEModel.GEMMA_3_4B, "jina"),
}
# Files that `detect_te_model` does not know, beside an encoder that is not marked.
_BERT = "bert.encoder.layer.{}.{}.weight"
_PROJECTION = "text_embedding_projection.{}.weight"
_SIBLINGS: tuple[tuple[str, CLIPType, TEModel, Shapes], ...] = (
    ("BERT of HunyuanDiT", CLIPType.HUNYUAN_DIT, TEModel.T5_XL, {
        _BERT.format(0, part): shape for part, shape in {
            "attention.self.query": (1024, 1024), "attention.self.key": (1024, 1024),
            "attention.self.value": (1024, 1024), "attention.output.dense": (1024, 1024),
            "intermediate.dense": (4096, 1024), "output.dense": (1024, 4096),
        }.items()
    }),
    ("projection of LTX-2", CLIPType.LTXV, TEModel.GEMMA_3_12B, {
        _PROJECTION.format("aggregate_embed"): (3840, 3840 * 49),
    }),
    ("projections of LTX-2", CLIPType.LTXV, TEModel.GEMMA_3_12B, {
        _PROJECTION.format("audio_aggregate_embed"): (2048, 3840 * 49),
        _PROJECTION.format("video_aggregate_embed"): (4096, 3840 * 49),
        "text_embedding_projection.audio_aggregate_embed.bias": (2048,),
    }),
)  # fmt: skip
# Encoders with the layers of another one, from which ComfyUI tells them by the files beside them:
# (name, its encoder in a type of CLIP, the other encoder in that type, whose layers it has).
_TWINS: tuple[tuple[str, str, CLIPType, TEModel, TEModel], ...] = (
    ("Qwen3-0.6B of ACE-Step 1.5", "qwen3_06b", CLIPType.ACE, TEModel.QWEN3_2B, TEModel.QWEN3_06B),
)
_VOCABULARY = "model.embed_tokens.weight"
# Names in published files that differ from the names of ComfyUI's layers.
_PUBLISHED = (
    ("model.lm_head.", "lm_head."), ("model.", "model.language_model."),
    ("visual.", "model.visual."),
)  # fmt: skip
_NESTED = ("QWEN35", "QWEN3VL_4B", "QWEN3VL_8B")  # encoders of which all these differ
_MARK = torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class _Chosen:
    """In place of ComfyUI's CLIP, which would build on the CPU the class that it is given."""

    def __init__(self, target, **_):
        self.cls = target.clip


class Builder:
    """Text encoders as ComfyUI builds them for one kind of file, on the meta device."""

    def __init__(self):
        self._built: dict[tuple, torch.nn.Module] = {}

    def model(self, cls) -> torch.nn.Module:
        cells = [cell.cell_contents for cell in cls.__init__.__closure__ or ()]
        options = [repr(value) for value in cells if not isinstance(value, type)]
        key = (cls.__module__, cls.__qualname__, *options)
        if key not in self._built:
            self._built[key] = cls(
                device=torch.device("meta"), dtype=torch.bfloat16, model_options={}
            )
        return self._built[key]

    def for_files(self, files: list[dict], clip_type: CLIPType) -> torch.nn.Module:
        """What ComfyUI builds for these files, some of whose tensors it renames in the list."""
        return self.model(comfy.sd.load_text_encoder_state_dicts(files, clip_type=clip_type).cls)


def tensors(shapes: Shapes) -> dict[str, torch.Tensor]:
    return {k: torch.empty(s, device="meta", dtype=torch.bfloat16) for k, s in shapes.items()}


def shapes_of(model: torch.nn.Module) -> Shapes:
    """Of every parameter; quantizing layers get theirs only when they are loaded."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if hasattr(module, "in_features"):
            experts = (module.num_experts,) if hasattr(module, "num_experts") else ()
            shapes[f"{name}.weight"] = (*experts, module.out_features, module.in_features)
    return shapes


def encoders_in(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Name -> transformer of every encoder in a model; "" for one that is the model itself."""
    parts = {"": model, **dict(model.named_children())}
    return {name: part.transformer for name, part in parts.items() if hasattr(part, "transformer")}


def file_of(builder: Builder, encoder: TEModel) -> Shapes:
    """The names and shapes in an encoder's file."""
    files, clip_type, name = [tensors(SEEDS[encoder])], CLIPType.STABLE_DIFFUSION, None
    if encoder in PAIRS:
        clip_type, sibling, name = PAIRS[encoder]
        files.insert(0, tensors(SEEDS[sibling]))
    found = encoders_in(builder.for_files(files, clip_type))
    shapes = shapes_of(found[name] if name else next(iter(found.values())))
    names = _PUBLISHED if encoder.name.startswith(_NESTED) else _PUBLISHED[:1]
    shapes = {_published(key, names): shape for key, shape in shapes.items()}
    assert comfy.sd.detect_te_model(tensors(shapes)) == encoder, encoder
    return shapes


def _published(key: str, names) -> str:
    for ours, published in names:
        if key.startswith(ours):
            return published + key.removeprefix(ours)
    return key


def marked(shapes: Shapes) -> dict[str, torch.Tensor]:
    """A file's tensors, each matrix with scales and a marker."""
    state = tensors(shapes)
    for key, shape in shapes.items():
        if len(shape) == 2 and key.endswith(".weight"):
            layer = key.removesuffix(".weight")
            state |= {f"{layer}.comfy_quant": _MARK, f"{layer}.weight_scale": _MARK}
    return state


def is_quantizing(model: torch.nn.Module) -> bool:
    """Whether ComfyUI built some part of a model with quantizing operations."""
    return any("mixed_precision_ops" in type(module).__qualname__ for module in model.modules())


def arriving(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> set[int]:
    """Which of the tensors ComfyUI puts, marked, into quantizing linear layers: their ids."""
    found: set[int] = set()

    def note(module, _, state, prefix, *__, **___):
        weight = state.pop(f"{prefix}weight", None)
        marks = [state.pop(prefix + part, None) for part in ("comfy_quant", "weight_scale")]
        if weight is not None and None not in marks and not hasattr(module, "num_experts"):
            assert tuple(weight.shape) == (module.out_features, module.in_features), prefix
            found.add(id(weight))

    load, comfy.ops._load_quantized_module = comfy.ops._load_quantized_module, note
    try:
        model.load_sd(dict(state))
    except (AttributeError, RuntimeError) as error:
        if "size mismatch" in str(error) or "load_sd" in str(error):
            return set()  # this type of CLIP is for other encoders
        if "out of meta tensor" not in str(error):  # a module that is always on the CPU
            raise
    finally:
        comfy.ops._load_quantized_module = load
    return found


def layers() -> dict[str, dict]:
    """Layers, numbers as "#", that some encoder never runs quantized.

    Each has the encoders that do not, and the shapes in which others do.
    """
    plain: dict[str, set[str]] = {}
    shapes: dict[bool, dict[str, set[tuple[int, ...]]]] = {True: {}, False: {}}
    for name, file, found in _files():
        for key, shape in file.items():
            if len(shape) == 2 and key.endswith(".weight"):
                layer = _NUMBER.sub("#", key).removesuffix(".weight")
                shapes[key in found].setdefault(layer, set()).add(shape)
                if key not in found:
                    plain.setdefault(layer, set()).add(name)
    return {
        layer: {
            "encoders": sorted(plain[layer]),
            "quantized": sorted(shapes[True].get(layer, set()) - shapes[False][layer]),
        }
        for layer in sorted(plain)
    }


def _files() -> Iterator[tuple[str, Shapes, set[str]]]:
    """(encoder, tensors of its file, those that run quantized)."""
    for encoder in TEModel:
        builder = Builder()
        file = file_of(builder, encoder)
        yield encoder.name, file, quantized(builder, file)
    for name, clip_type, sibling, file in _SIBLINGS:
        state = marked(file)
        names = {id(tensor): key for key, tensor in state.items()}
        files = [tensors(SEEDS[sibling]), state]
        model = Builder().for_files(files, clip_type)
        yield name, file, {names[tensor] for tensor in arriving(model, files[1])}


def quantized(builder: Builder, file: Shapes) -> set[str]:
    """The weights of an encoder's file that ComfyUI runs quantized as any type of CLIP."""
    state = marked(file)
    names = {id(tensor): key for key, tensor in state.items()}
    found: set[str] = set()
    loaded: set[int] = set()
    for clip_type in CLIPType:
        files = [dict(state)]
        model = builder.for_files(files, clip_type)
        if id(model) not in loaded:
            loaded.add(id(model))
            found |= {names[tensor] for tensor in arriving(model, files[0])}
    return found


def vocabularies() -> dict[str, list[int]]:
    """Encoder -> the shape of its vocabulary, which alone shows that it never runs quantized."""
    found = {}
    for name, part, clip_type, sibling, twin in _TWINS:
        files = [file_of(Builder(), kind) for kind in (sibling, twin)]
        model = Builder().for_files([marked(file) for file in files], clip_type)
        encoder = encoders_in(model)[part]
        assert is_quantizing(model) and not is_quantizing(encoder), name
        found[name] = list(shapes_of(encoder)[_VOCABULARY])
        assert found[name] != list(files[1][_VOCABULARY]), name
    return found


def checkpoints() -> dict[str, dict]:
    """Where encoders are in a checkpoint -> model classes that run them quantized, or plain."""
    builder = Builder()
    names = {encoder.name.lower() for encoder in TEModel}
    while True:  # until no class builds an encoder of a name that its checkpoint did not have
        found: dict[str, dict[str, list[str]]] = {}
        before = len(names)
        for config in comfy.supported_models.models:
            for name, runs in _encoders_of(config, builder, names).items():
                place = f"{config.text_encoder_key_prefix[0]}{name}."
                entry = found.setdefault(place, {"quantized": [], "plain": []})
                entry["quantized" if runs else "plain"].append(config.__name__)
                names.add(name)
        if len(names) == before:
            return {place: found[place] for place in sorted(found)}


def _encoders_of(config, builder: Builder, names: set[str]) -> dict[str, bool]:
    """Encoder -> whether a model class runs it quantized in a checkpoint with encoders `names`.

    Of several language models a class builds the first that it finds, so they are taken away one
    after the other.
    """
    found: dict[str, bool] = {}
    while True:
        target = _target(config, config.text_encoder_key_prefix[0], names - set(found))
        built = {} if target is None else encoders_in(builder.model(target.clip))
        fresh = {name: t for name, t in built.items() if name and name not in found}
        if not fresh:
            return found
        for name, transformer in fresh.items():
            found[name] = is_quantizing(transformer)


def _target(config, prefix: str, names: set[str]):
    """What a model class builds from a checkpoint with these encoders, all marked."""
    state = {}
    for name in names:
        root = f"{prefix}{name}.transformer."
        hints = ("model.norm.weight", "encoder.final_layer_norm.weight",
                 "text_model.final_layer_norm.weight", "layers.0.self_attn.sinks")  # fmt: skip
        state |= tensors({root + hint: (1,) for hint in hints})
        state[f"{root}x.comfy_quant"] = _MARK
    try:
        return object.__new__(config).clip_target(state_dict=state)
    except UnboundLocalError:  # ACE-Step 1.5 without its language model
        return None


def table() -> dict:
    """What quant/conversion/text_encoders.json holds."""
    comfy.sd.CLIP = _Chosen
    return {"layers": layers(), "vocabularies": vocabularies(), "checkpoints": checkpoints()}


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    text = json.dumps(table(), indent=1)
    TARGET.write_text(text + "\n", encoding="utf-8")
