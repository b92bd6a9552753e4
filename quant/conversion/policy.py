"""Which layers become MXFP8, and why not the others.

A plan goes through every tensor of a model and gives it a decision with a reason. First come the
rules that no option overrides, because stock ComfyUI would run raw codes; then the user's exclude
and include; then the preset. Presets are named after convert_to_quant's, and mean the same
selection (`presets.json`). "auto" takes the preset of the architecture that the keys show.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..container.header import quoted
from ..format import FLOATS, PREFIXES, WEIGHT, bare, numel

try:
    import regex
except ModuleNotFoundError:  # outside ComfyUI; there the user waits for his own expression
    regex = None

logger = logging.getLogger(__name__)

AUTO = "auto"
NONE = "none"

_TIMEOUT = 2.0  # seconds for an expression on all keys; a plain one takes milliseconds
_BRACES = re.compile(r"\{([^{}]*)\}")  # around the count of a repetition
_MOST_REPEATS = 10_000  # `regex` writes out nested repetitions of a letter, to fill any memory

# Lookup tables, by the last part of the layer's name. Stock ComfyUI loads a quantized one without
# an error and then looks up raw codes. These are tables in every model:
TABLES = frozenset({
    "word_embeddings", "wte", "wpe", "tok_embeddings", "token_embedding", "position_embedding",
    "position_embeddings", "token_type_embeddings", "relative_attention_bias", "shared",
    "embed_tokens_per_layer", "pos_embed",
})  # fmt: skip
# These are linear layers in some models, where they are small:
VOCABULARIES = frozenset({"embed_tokens", "embed"})
# Whatever may be one is not quantized by name alone.
EMBEDDINGS = TABLES | VOCABULARIES | {
    "emb", "label_emb", "label_embed", "query_embed", "cls_embed", "no_mask_embed",
    "not_a_point_embed", "lyric_embs", "embedding_table", "codebook", "style_embedder",
    "cond_type_embedding", "addition_t_embedding", "embed_image_indicator", "trainable_cond_mask",
    "controlnet_mode_embedder", "mask_tokens", "iou_token", "obj_score_token", "presence_token",
    "reference_points",
}  # fmt: skip

# What stock never builds as quantized layers: it would run raw codes, or take the padded shape for
# the true one. The pattern is searched in the layer's name.
_NEVER = (
    (re.compile(r"(^|\.)(first_stage_model|vae|audio_vae|vocoder)\."), "part of the VAE"),
    (
        re.compile(r"(^|\.)((text_model|vision_model)\.encoder|transformer\.resblocks)\."),
        "part of a CLIP encoder",
    ),
    (re.compile(r"(^|\.)text_projection$"), "a projection that is no linear layer"),
    (
        re.compile(
            r"(^|\.)((ff_i|moe)\.gate|mlp\.router|timestep_features|point_embeddings\.\d+)$"
        ),
        "a bare parameter",
    ),
    (re.compile(r"(^|\.)motion_encoder\.(enc\.fc|dec)\."), "a bare parameter"),
    (re.compile(r"(^|\.)x_embedder\.proj\.1$"), "the layer whose width tells what model it is"),
)
_T5 = re.compile(r"(^|\.)encoder\.block\.\d+\.layer\.")
_T5_WIDTH = 4096  # of T5-XXL and UMT5-XXL, the ones that stock runs quantized

# Architecture -> (preset, keys that must all be there). The first match counts.
ARCHITECTURES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Z-Image", "zimage", ("cap_pad_token", "noise_refiner.0.attention.qkv.weight")),
    ("Flux.2", "flux2", ("double_stream_modulation_img.lin.weight",)),
    (
        "Chroma Radiance",
        "nerf_large",
        ("distilled_guidance_layer.in_proj.weight", "img_in_patch.weight"),
    ),
    ("Chroma", "distillation_large", ("distilled_guidance_layer.in_proj.weight",)),
    ("Wan", "wan", ("head.modulation",)),
    (
        "Lens",
        "lens",
        ("transformer_blocks.0.img_mlp.w1.weight", "transformer_blocks.0.img_mod.1.weight"),
    ),
    ("Qwen-Image", "qwen", ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight")),
    ("Hunyuan Video", "hunyuan", ("txt_in.individual_token_refiner.blocks.0.norm1.weight",)),
    ("MiniMax H3", "minimaxh3", ("video_patch_proj.weight", "audio_patch_proj.weight")),
    ("LTX-2", "ltxv2", ("audio_adaln_single.linear.weight",)),
    ("Krea 2", "krea2", ("txtfusion.projector.weight",)),
    ("Ideogram 4", "ideogram4", ("embed_image_indicator.weight",)),
    ("Boogu", "boogu", ("double_stream_layers.0.img_instruct_attn.processor.img_to_q.weight",)),
    ("Anima", "anima", ("llm_adapter.blocks.0.cross_attn.q_proj.weight",)),
    ("T5", "t5xxl", ("encoder.block.0.layer.0.SelfAttention.q.weight",)),
    (
        "Gemma 4",
        "gemma4",
        ("layers.0.per_layer_input_gate.weight", "layers.0.self_attn.q_proj.weight"),
    ),
    ("Mistral", "mistral", ("tekken_model",)),
    (
        "Qwen-VL",
        "qwen_vlm",
        ("layers.0.self_attn.q_proj.weight", "visual.blocks.0.attn.qkv.weight"),
    ),
)

_LANGUAGE_LAYER = re.compile(
    r"(?:^|\.)(?P<prefix>(?:model\.)?language_model\.layers|model\.layers)\.(?P<index>\d+)\."
)


@dataclass(frozen=True)
class Selection:
    """Which layers a user asks for.

    Attributes:
        preset: a name from `presets()`.
        include: regular expression; matching keys are quantized even where the preset keeps them.
        exclude: regular expression; matching keys are kept, whatever else is asked for.

    An empty expression is None.
    """

    preset: str = AUTO
    include: str | None = None
    exclude: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "include", self.include or None)
        object.__setattr__(self, "exclude", self.exclude or None)


DEFAULT = Selection()


@dataclass(frozen=True)
class Decision:
    """What becomes of one tensor, and the reason in words for the user."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    quantize: bool
    reason: str

    @property
    def layer(self) -> str:
        return self.key.removesuffix(WEIGHT)


@dataclass(frozen=True)
class Plan:
    """Decisions for every tensor, in the order given.

    Attributes:
        preset: the preset used, after "auto" was resolved; "default" where nothing was recognized.
        architecture: what the keys showed, or None.
        selection: what was asked for.
    """

    decisions: tuple[Decision, ...]
    preset: str
    architecture: str | None
    selection: Selection

    @property
    def quantized(self) -> list[Decision]:
        return [d for d in self.decisions if d.quantize]


@cache
def _table() -> dict:
    return json.loads(Path(__file__).with_name("presets.json").read_text(encoding="utf-8"))


def presets() -> dict[str, str]:
    """Name -> one line about it, for every preset that can be asked for by name."""
    table = _table()["presets"]
    names = {name: table[entry.get("alias_for", name)]["about"] for name, entry in table.items()}
    return {
        AUTO: "the preset of the architecture that the keys show",
        NONE: "every linear that stock can run",
        **dict(sorted(names.items())),
    }


def detect_architecture(keys: Iterable[str]) -> tuple[str, str] | None:
    """(architecture, preset) that a model's keys show, or None."""
    keys = set(keys)
    prefixes = (*PREFIXES, "model.language_model.")
    for name, preset, signature in ARCHITECTURES:
        # Each key under any prefix: a vision model's parts have different ones.
        if all(any(prefix + key in keys for prefix in prefixes) for key in signature):
            return name, preset
    return None


def plan(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    selection: Selection = DEFAULT,
    is_linear: Callable[[str], bool] | None = None,
) -> Plan:
    """Decide for every tensor whether it becomes MXFP8.

    Args:
        tensors: key -> (header dtype such as "BF16", shape).
        is_linear: tells linear layers apart by name where the modules are at hand; without it,
            every 2-D float "*.weight" that is no known embedding counts as one.

    Raises:
        ValueError: unknown preset, or an expression that does not compile or takes too long.
    """
    architecture, detected = detect_architecture(tensors) or (None, "default")
    preset = detected if selection.preset == AUTO else selection.preset
    keeps = _keep_rules(preset, tensors)
    include, exclude = selection.include, selection.exclude
    included, excluded = _searcher("include", include), _searcher("exclude", exclude)

    def decide(key: str, dtype: str, shape: tuple[int, ...]) -> tuple[bool, str]:
        reason = _impossible(key, dtype, shape, is_linear)
        if reason is None and excluded(key):
            reason = f"excluded by {exclude!r}"
        if reason is not None:
            return False, reason
        if included(key):
            return True, f"included by {include!r}"
        for keep in keeps:
            reason = keep(key)
            if reason:
                return False, reason
        return True, "linear layer"

    for option, expression, finds in (
        ("include", include, included),
        ("exclude", exclude, excluded),
    ):
        if expression and not any(map(finds, tensors)):
            logger.warning("MXFP8: %s %s finds no key.", option, quoted(expression))
    decisions = tuple(
        Decision(key, dtype, tuple(shape), *decide(key, dtype, tuple(shape)))
        for key, (dtype, shape) in tensors.items()
    )
    return Plan(decisions, preset, architecture, selection)


def _impossible(key, dtype, shape, is_linear) -> str | None:
    """Why stock ComfyUI could not run this tensor as MXFP8, or None if it can."""
    if not key.endswith(WEIGHT):
        return "not a layer's weight"
    if len(shape) != 2:
        return f"{len(shape)}-D; MXFP8 is for matrices"
    if dtype not in FLOATS:
        return f"{dtype}; only F32, F16 and BF16 weights are quantized"
    if numel(shape) == 0:
        return "empty"
    layer = key.removesuffix(WEIGHT)
    for pattern, what in _NEVER:
        if pattern.search(layer):
            return f"{what}: stock ComfyUI cannot run it quantized"
    if _T5.search(layer) and _T5_WIDTH not in shape:
        return "part of a small T5: stock ComfyUI runs only T5-XXL quantized"
    if is_linear is not None and not is_linear(layer):
        return "not a linear layer"
    if is_linear is None and layer.rsplit(".", 1)[-1] in EMBEDDINGS:
        return "embedding: stock ComfyUI would look up raw codes"
    return None


def _searcher(option: str, expression: str | None) -> Callable[[str], bool]:
    """A function that tells whether a user's expression finds something in a key.

    Expressions come with workflows of strangers, and some take longer than the universe has, while
    Python's own matcher holds the interpreter's lock. So the matching is done by the `regex`
    package, which comes with ComfyUI's transformers: it lets other threads run, and stops in time.
    """
    if not expression:
        return lambda key: False
    if _repeats(expression) > _MOST_REPEATS:
        raise ValueError(
            f"{option} {quoted(expression)} repeats more than {_MOST_REPEATS} times in all; names "
            "of tensors are shorter"
        )
    try:
        find = re.compile(expression).search
        pattern = regex.compile(expression) if regex is not None else None
    except (re.error, getattr(regex, "error", re.error), OverflowError, RecursionError) as error:
        raise ValueError(
            f"{option} {quoted(expression)} is no regular expression: {error}"
        ) from error
    if pattern is not None:
        deadline = time.monotonic() + _TIMEOUT

        def find(key: str):
            left = max(0.01, deadline - time.monotonic())
            return pattern.search(key, timeout=left, concurrent=True)

    def found(key: str) -> bool:
        try:
            return find(key) is not None
        except TimeoutError:
            raise ValueError(
                f"{option} {quoted(expression)} takes too long on {quoted(key)}; write it without "
                "a repetition inside a repetition"
            ) from None

    return found


def _repeats(expression: str) -> float:
    """How often nested repetitions may repeat in all, whatever the matcher makes of blanks."""
    counts = [n for inner in _BRACES.findall(expression)
              for n in re.findall("[0-9]+", re.sub(r"\s", "", inner))]  # fmt: skip
    counts = [n.lstrip("0") or "1" for n in counts]
    return math.prod(int(n) if len(n) < 6 else math.inf for n in counts)


def _keep_rules(name: str, keys: Iterable[str]) -> list[Callable[[str], str | None]]:
    """Functions key -> reason to keep it, or None, for a preset and what it builds on."""
    if name == NONE:
        return []
    table = _table()
    rules = [_keep_substrings("the default selection", table["default_keep"])]
    while name not in ("default", None):
        entry = table["presets"].get(name)
        if entry is None:
            known = ", ".join(presets())
            raise ValueError(f"no preset is called {name!r}; there are: {known}")
        if "alias_for" in entry:
            name = entry["alias_for"]
            continue
        label = f"preset {name}"
        rules.append(_keep_substrings(label, entry["keep"]))
        rules.append(_keep_matching(label, entry.get("keep_matching", [])))
        if entry.get("keep_final_language_layer"):
            rules.append(_keep_substrings(label, _final_language_layers(keys)))
        name = entry.get("extends")
    return rules


def _keep_substrings(label: str, parts: Iterable[str]):
    parts = tuple(parts)

    def rule(key: str) -> str | None:
        # Whatever prefix there is, and under the one that presets have in mind (Anima's is "net.").
        names = (key, f".{bare(key)}", f"net.{bare(key)}")
        part = next((p for p in parts if any(p in name for name in names)), None)
        return None if part is None else f"{label} keeps {part!r}"

    return rule


def _keep_matching(label: str, expressions: Iterable[str]):
    patterns = [re.compile(e) for e in expressions]

    def rule(key: str) -> str | None:
        found = any(p.search(key) for p in patterns)
        return f"{label} keeps {key.removesuffix(WEIGHT)!r}" if found else None

    return rule


def _final_language_layers(keys: Iterable[str]) -> list[str]:
    """ "model.layers.27." and the like: the last layer of each language model among the keys."""
    last: dict[str, int] = {}
    for key in keys:
        match = _LANGUAGE_LAYER.search(key)
        if match:
            prefix, index = match["prefix"], int(match["index"])
            last[prefix] = max(index, last.get(prefix, index))
    return [f"{prefix}.{index}." for prefix, index in last.items()]
