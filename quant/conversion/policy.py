"""Which layers become MXFP8, and why the others do not.

A plan gives every tensor of a model a decision with a reason. First come rules that no option
overrides, because stock ComfyUI would run raw codes: those of the architecture that the keys show
(`architectures`), and names that mean the same in every model. Then come the user's exclude and
include, then the preset. Presets have the names of convert_to_quant's and select the same layers
(`presets.json`). "auto" takes the preset of the architecture, or the default selection, and keeps
what is outside of the architecture's blocks as well.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..container.header import nbytes, quoted
from ..format import FLOATS, WEIGHT, bare
from ..reports.verdict import Part, say
from . import architectures, text_encoders
from .architectures import Architecture

try:
    import regex
except ModuleNotFoundError:  # outside ComfyUI, where an expression is the user's own
    regex = None

logger = logging.getLogger(__name__)

AUTO = "auto"
NONE = "none"
# How reasons begin that code tells apart:
OUTSIDE = "outside of the blocks"  # that only "auto" gives
INCLUDED = "included by"  # of a layer that `include` quantizes

_TIMEOUT = 2.0  # seconds for an expression on all keys; a plain one takes milliseconds
_BRACES = re.compile(r"\{([^{}]*)\}")  # around the count of a repetition
_MOST_REPEATS = 10_000  # `regex` expands nested repetitions of a letter until memory is full

# Lookup tables, by the last part of the layer's name. Stock ComfyUI loads a quantized one without
# an error and then looks up raw codes. These are tables in every model:
TABLES = frozenset({
    "word_embeddings", "wte", "wpe", "tok_embeddings", "token_embedding", "position_embedding",
    "position_embeddings", "token_type_embeddings", "relative_attention_bias", "shared",
    "embed_tokens_per_layer", "pos_embed",
})  # fmt: skip
# These are linear layers in some models, where they are small:
VOCABULARIES = frozenset({"embed_tokens", "embed"})
# Names that may mean one; by name alone, these are not quantized.
EMBEDDINGS = TABLES | VOCABULARIES | {
    "emb", "label_emb", "label_embed", "query_embed", "cls_embed", "no_mask_embed",
    "not_a_point_embed", "lyric_embs", "embedding_table", "codebook", "style_embedder",
    "cond_type_embedding", "addition_t_embedding", "embed_image_indicator", "trainable_cond_mask",
    "controlnet_mode_embedder", "mask_tokens", "iou_token", "obj_score_token", "presence_token",
    "reference_points",
}  # fmt: skip

# What stock never builds as quantized layers: it would run raw codes, or take the padded shape for
# the true one. Patterns are searched for in the layer's name.
_NEVER = {
    r"(^|\.)(first_stage_model|vae|audio_vae|vocoder)\.": say("part of the VAE"),
    r"(^|\.)(text_model|vision_model)\.encoder\.": say("part of a CLIP encoder"),
    r"(^|\.)transformer\.resblocks\.": say("part of a CLIP encoder"),
    r"(^|\.)(text|visual)_projection$": say("a projection that is not a quantized layer"),
    r"(^|\.)((ff_i|moe)\.gate|mlp\.router|timestep_features)$": say("a bare parameter"),
    r"(^|\.)point_embeddings\.\d+$": say("a bare parameter"),
    r"(^|\.)motion_encoder\.(enc\.fc|dec)\.": say("a bare parameter"),
    r"(^|\.)x_embedder\.proj\.1$": say("the layer whose width identifies the model"),
}

_LANGUAGE_LAYER = re.compile(
    r"(?:^|\.)(?P<prefix>(?:model\.)?language_model\.layers|model\.layers)\.(?P<index>\d+)\."
)


@dataclass(frozen=True)
class Selection:
    """Which layers a user asks for.

    Attributes:
        preset: a name from `presets()`.
        include: regular expression, or several; keys that match one are quantized even where the
            preset keeps them.
        exclude: regular expression, or several; keys that match one are kept, whatever else is
            asked for.

    An empty expression is None. Several are matched one by one: joined to one, their flags and the
    numbers of their groups would change.

    Raises:
        TypeError: include or exclude is neither a string nor a tuple of strings.
        ValueError: unknown preset.
    """

    preset: str = AUTO
    include: str | tuple[str, ...] | None = None
    exclude: str | tuple[str, ...] | None = None

    def __post_init__(self):
        if self.preset not in presets():
            raise ValueError(
                f"unknown preset {self.preset!r}; choose one of: {', '.join(presets())}"
            )
        for option in ("include", "exclude"):
            given = getattr(self, option)
            several = given if isinstance(given, tuple) else (given,)
            if not all(isinstance(expression, str | None) for expression in several):
                raise TypeError(
                    f"{option} is {given!r}; it must be one regular expression, a string, or a "
                    "tuple of several"
                )
            object.__setattr__(self, option, given or None)


@dataclass(frozen=True)
class Decision:
    """Whether one tensor is quantized, and why, in words for the user."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    quantize: bool
    reason: str

    @property
    def layer(self) -> str:
        return self.key.removesuffix(WEIGHT)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the source."""
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Plan:
    """Decisions for every tensor, in the order given.

    Attributes:
        preset: the one used, with "auto" resolved; "default" if the architecture has none or was
            not recognized.
        architecture: what the keys showed, or None.
        selection: what was asked for.
        warnings: what the user should know; they are logged too.
    """

    decisions: tuple[Decision, ...]
    preset: str
    architecture: str | None
    selection: Selection
    warnings: tuple[str, ...] = ()

    @property
    def quantized(self) -> list[Decision]:
        return [d for d in self.decisions if d.quantize]


@cache
def _table() -> dict:
    return json.loads(Path(__file__).with_name("presets.json").read_text(encoding="utf-8"))


def presets() -> list[str]:
    """The presets that can be chosen; "none" quantizes every linear that stock can run."""
    return [AUTO, NONE, *sorted(_table()["presets"])]


def preset_titles() -> dict[str, str]:
    """What each preset is for and what it keeps, in a few words."""
    return {
        AUTO: "recognized by tensor names",
        NONE: "every linear layer is quantized",
        **{name: preset["about"] for name, preset in sorted(_table()["presets"].items())},
    }


DEFAULT = Selection()


def detect_architecture(keys: Iterable[str]) -> tuple[str, str | None] | None:
    """(architecture, preset) that a model's keys show, or None."""
    found = architectures.detect(keys)
    return found and (found[0].name, found[0].preset)


def plan(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    selection: Selection = DEFAULT,
    is_linear: Callable[[str], bool] | None = None,
    log: bool = True,
    for_comfyui: bool = True,
) -> Plan:
    """Decide for every tensor whether it becomes MXFP8.

    Args:
        tensors: key -> (header dtype such as "BF16", shape).
        is_linear: whether the layer of a name is linear, where the modules are at hand; without
            it, every 2-D float "*.weight" that is not a known embedding counts as linear.
        log: whether to log the plan's warnings.
        for_comfyui: whether stock ComfyUI is to run it, which runs only some layers quantized.

    Raises:
        TypeError: the selection is no Selection.
        ValueError: an expression that does not compile or takes too long.
    """
    if not isinstance(selection, Selection):
        raise TypeError(f"{selection!r} is no selection; give Selection(preset=...)")
    architecture, prefix = architectures.detect(tensors) or (None, "")
    warnings = []
    if architecture is None:
        warning = say(
            "the architecture is not recognized. Layers are chosen by their names and shapes "
            "alone; compare the result with the original"
        )
        warnings.append(str(warning))
    preset = selection.preset
    if preset == AUTO:
        preset = (architecture and architecture.preset) or "default"
    classes = architecture.classes if architecture else ()
    plain_encoder = text_encoders.plain_encoder(tensors) if for_comfyui else None
    kept = _kept_by(preset, tensors)
    included = _matching("include", selection.include, tensors, warnings)
    excluded = _matching("exclude", selection.exclude, tensors, warnings)

    def decide(key: str, dtype: str, shape: tuple[int, ...]) -> tuple[bool, Part]:
        reason = _impossible(key, dtype, shape, is_linear, for_comfyui) or plain_encoder
        if reason is None and for_comfyui:
            reason = text_encoders.unsupported_reason(key.removesuffix(WEIGHT), shape, classes)
        if reason is None and for_comfyui and architecture is not None:
            reason = _unsupported(architecture, prefix, key, shape)
        if reason is None and key in excluded:
            reason = say("excluded by [expression]", expression=repr(excluded[key]))
        if reason is None and key in included:
            return True, say("included by [expression]", expression=repr(included[key]))
        reason = reason or kept(key)
        if reason is None and selection.preset == AUTO and architecture is not None:
            reason = _outside(architecture, prefix, key)
        return (False, reason) if reason else (True, say("linear layer"))

    def decision(key: str, dtype: str, shape: tuple[int, ...]) -> Decision:
        quantize, reason = decide(key, dtype, shape)
        return Decision(key, dtype, shape, quantize, str(reason))

    decisions = tuple(decision(key, dtype, tuple(shape)) for key, (dtype, shape) in tensors.items())
    for warning in warnings if log else ():
        logger.warning("MXFP8: %s.", warning)
    name = architecture and architecture.name
    return Plan(decisions, preset, name, selection, tuple(warnings))


def _unsupported(architecture: Architecture, prefix: str, key: str, shape) -> Part | None:
    """Why stock does not run a layer of a file of this architecture quantized, or None."""
    if key.startswith(prefix):
        layer = key.removeprefix(prefix).removesuffix(WEIGHT)
        return architecture.unsupported_reason(layer, shape)
    if architecture.blocks and not key.startswith(text_encoders.PREFIXES):
        return say(
            "not a part of [model]'s diffusion model that ComfyUI runs quantized",
            model=architecture.name,
        )
    return None


def _outside(architecture: Architecture, prefix: str, key: str) -> Part | None:
    """Why "auto" keeps a layer that is outside of the architecture's blocks; else None."""
    if not key.startswith(prefix) or key.startswith(text_encoders.PREFIXES):
        return None
    if architecture.in_blocks(key.removeprefix(prefix)):
        return None
    return say(
        "outside of the blocks of [model]: embedders and final layers stay", model=architecture.name
    )


def _impossible(key, dtype, shape, is_linear, for_comfyui: bool) -> Part | None:
    """Why this tensor cannot be MXFP8, or None if it can."""
    if not key.endswith(WEIGHT):
        return say("not a layer's weight")
    if len(shape) != 2:
        return say("[count]-D; MXFP8 is for matrices", count=len(shape))
    if dtype not in FLOATS:
        return say("[dtype]; only BF16, FP16 and FP32 weights are quantized", dtype=dtype)
    if 0 in shape:
        return say("empty")
    layer = key.removesuffix(WEIGHT)
    for pattern, what in _NEVER.items():
        if for_comfyui and re.search(pattern, layer):
            return say("[what]: stock ComfyUI cannot run it quantized", what=what)
    if is_linear is not None and not is_linear(layer):
        return say("not a linear layer")
    if is_linear is None and layer.rsplit(".", 1)[-1] in EMBEDDINGS:
        return say("embedding: stock ComfyUI would look up raw codes")
    return None


def _matching(
    option: str, given: str | tuple[str, ...] | None, keys: Iterable[str], warnings: list[str]
) -> dict[str, str]:
    """The keys in which a user's expressions match anywhere, each with the first that does."""
    matching = {}
    for expression in filter(None, given if isinstance(given, tuple) else (given,)):
        for key in _search(option, expression, keys, warnings):
            matching.setdefault(key, expression)
    return matching


def _search(option: str, expression: str, keys: Iterable[str], warnings: list[str]) -> set[str]:
    """The keys in which one expression matches.

    Workflows from anywhere bring expressions, and some never end, while Python's own matcher holds
    the interpreter's lock. So matching is done by the `regex` package, which comes with ComfyUI's
    transformers: it lets other threads run, and has a timeout.
    """
    if _repeats(expression) > _MOST_REPEATS:
        raise ValueError(
            f"{option} {quoted(expression)} repeats more than {_MOST_REPEATS} times in all; "
            "tensor names are shorter"
        )
    try:
        pattern = re.compile(expression)
        if regex is not None:
            pattern = regex.compile(expression)
    except (re.error, getattr(regex, "error", re.error), OverflowError, RecursionError) as error:
        raise ValueError(
            f"{option} {quoted(expression)} is not a regular expression: {error}"
        ) from error
    deadline = time.monotonic() + _TIMEOUT
    matched, options = set(), {}
    for key in keys:
        if regex is not None:
            options = {"timeout": max(0.01, deadline - time.monotonic()), "concurrent": True}
        try:
            if pattern.search(key, **options):
                matched.add(key)
        except TimeoutError:
            raise ValueError(
                f"{option} {quoted(expression)} takes too long on {quoted(key)}; write it without "
                "a repetition inside a repetition"
            ) from None
    if not matched:
        warning = say(
            "[option] [expression] matches no key", option=option, expression=quoted(expression)
        )
        warnings.append(str(warning))
    return matched


def _repeats(expression: str) -> float:
    """An upper bound of how often nested repetitions repeat; blanks in counts are ignored."""
    counts = [n for inner in _BRACES.findall(expression)
              for n in re.findall("[0-9]+", re.sub(r"\s", "", inner))]  # fmt: skip
    counts = [n.lstrip("0") or "1" for n in counts]
    return math.prod(int(n) if len(n) < 6 else math.inf for n in counts)


def _kept_by(preset: str, keys: Iterable[str]) -> Callable[[str], Part | None]:
    """A function: why a preset, and what it builds on, keep a key; None if they do not."""
    rules = list(_keep_rules(preset, keys))

    def kept(key: str) -> Part | None:
        # Under whatever prefix there is, and under what presets have in mind (Anima's is "net.").
        names = (key, f".{bare(key)}", f"net.{bare(key)}")
        for who, parts, patterns in rules:
            part = next((p for p in parts if any(p in name for name in names)), None)
            if part is not None:
                return say("[who] keeps [layers]", who=who, layers=repr(part))
            if any(re.search(pattern, key) for pattern in patterns):
                return say("[who] keeps [layers]", who=who, layers=repr(key.removesuffix(WEIGHT)))
        return None

    return kept


def _keep_rules(name: str, keys: Iterable[str]) -> Iterator[tuple[Part, list[str], list[str]]]:
    """(who keeps, parts of keys, patterns), for a preset and what it builds on."""
    if name == NONE:
        return
    table = _table()
    yield say("the default selection"), table["default_keep"], []
    while name not in ("default", None):
        preset = table["presets"][name]
        last = _final_language_layers(keys) if preset.get("keep_final_language_layer") else []
        who = say("preset [preset]", preset=name)
        yield who, preset["keep"] + last, preset.get("keep_matching", [])
        name = preset.get("extends")


def _final_language_layers(keys: Iterable[str]) -> list[str]:
    """ "model.layers.27." and the like: the last layer of each language model among the keys."""
    last: dict[str, int] = {}
    for key in keys:
        match = _LANGUAGE_LAYER.search(key)
        if match:
            prefix, index = match["prefix"], int(match["index"])
            last[prefix] = max(index, last.get(prefix, index))
    return [f"{prefix}.{index}." for prefix, index in last.items()]
