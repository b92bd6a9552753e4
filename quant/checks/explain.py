"""What a file's formats are, who runs them, and what it would be as MXFP8: for Inspect.

The facts are those of `sources.formats`; here they are counted for one file. Nothing here needs
torch, and no weight is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...kernels import layout
from ..container.header import TensorInfo, quoted
from ..conversion import policy
from ..conversion.stored import stored_bytes
from ..format import MARKER, MXFP8, WEIGHT
from ..reports.units import format_count, format_size
from ..sources import formats, gguf
from ..sources.formats import Format
from ..sources.unsupported import Quantized

NEWEST = "0.38.1"  # ComfyUI's version that the table of formats was held to
_IN_DIFFUSERS = (
    "with `import mxfp8.integrations.diffusers` and quantization_config=MXFP8Config(); without "
    "these, diffusers runs the codes as weights, and only warns of unused tensors"
)
_MARKER = 120  # bytes of a layer's marker, about
_DEPTH = 4  # of a part's name below its layer; bitsandbytes' and Quanto's go down to three
# Dtypes that ComfyUI's loader for dynamic VRAM does not know (comfy/utils.py: load_safetensors).
_UNKNOWN_DTYPES = ("F8_E8M0", "F4", "F6_E2M3", "F6_E3M2")


@dataclass
class FormatFacts:
    """One format in a file.

    Attributes:
        layers: how many are in it; 0 if a config.json or a pickle names it.
        bits: per weight, scales included, and made_by: the tools that usually write it.
        comfyui: the first version of ComfyUI known to run it, or None; nodes: the node pack that
            does; gpus: what multiplies it directly.
        kinds: of a GGUF file's tensors, with their numbers.
    """

    name: str
    layers: int
    bits: float | None
    made_by: str
    comfyui: str | None
    nodes: str | None
    gpus: str
    kinds: str | None = None

    def lines(self) -> list[str]:
        count = format_count(self.layers, "layer") if self.layers else "named in the file"
        bits = f", {self.bits:.3g} bits per weight" if self.bits else ""
        kinds = f": {self.kinds}" if self.kinds else ""
        return [
            f"{self.name}: {count}{bits}{kinds}",
            f"  written by: {self.made_by}",
            f"  runs in: {self.runs}",
            f"  GPUs: {self.gpus}",
            *([f"  in diffusers: {_IN_DIFFUSERS}"] if self.name == MXFP8.upper() else []),
        ]

    @property
    def runs(self) -> str:
        """The ComfyUI or node pack that runs it."""
        if self.comfyui:
            return f"ComfyUI {self.comfyui} or later"
        return f"ComfyUI with {self.nodes}" if self.nodes else "no ComfyUI that we know of"


@dataclass
class AsMXFP8:
    """What a file would be as MXFP8: its size, about; None if that is not known or makes no sense.

    `text` says so, and what to do.
    """

    bytes: int | None
    text: str


AS_SAFETENSORS = AsMXFP8(None, "take the original as .safetensors")


def facts(row: Format, layers: int, bits: float | None = None, kinds=None) -> FormatFacts:
    """What a row of the table says of a file with this number of layers in that format."""
    return FormatFacts(
        row.name, layers, bits or row.bits, row.made_by, row.comfyui, row.nodes, row.gpus, kinds
    )


def of_names(names: Mapping[str, int]) -> list[FormatFacts]:
    """The facts of formats, given by their names or those in markers, with their layers."""
    return [facts(row, count) for name, count in names.items() if (row := formats.named(name))]


def of_layers(
    tensors: Mapping[str, TensorInfo],
    markers: Mapping[str, Mapping],
    unmarked: Iterable[Quantized],
) -> tuple[list[FormatFacts], list[str]]:
    """(facts of the formats of marked and of other quantized layers, warnings)."""
    unmarked = list(unmarked)
    rows, lost, unknown, warnings = Counter(), Counter(), Counter(), []
    for conf in markers.values():
        row = formats.marked(conf)
        if row is None:
            unknown[conf["format"]] += 1
        else:
            rows[row.name] += 1
    found = [(layer.layer, formats.named(layer.format)) for layer in unmarked]
    older = any(row.whole for _, row in found)
    named = {*markers}
    for layer, row in found:
        if row.whole or layer in named:
            continue
        named.add(layer)
        rows[row.name] += 1
        needs_marker = row.marker and not (older and row.name.startswith("scaled"))
        if needs_marker and f"{layer}{MARKER}" not in tensors:
            lost[row.name] += 1
    for name, count in unknown.items():
        warnings.append(
            f"{format_count(count, 'layer')} marked as {quoted(name)}, which no ComfyUI up to "
            f"{NEWEST} knows"
        )
    for name, count in lost.items():
        remedy = (
            "; `mxfp8 repair` rebuilds the markers" if formats.named(name).marker == MXFP8 else ""
        )
        warnings.append(
            f"{format_count(count, 'layer')} in {name}, but no marker says so: ComfyUI runs "
            'the codes as weights (noise, or "mat1 and mat2 shapes cannot be multiplied")' + remedy
        )
    found = of_names(rows)
    for fact in found:
        if fact.bits is None:
            fact.bits = _bits(tensors, fact.name, unmarked)
    return found, warnings


def _bits(tensors: Mapping[str, TensorInfo], name: str, unmarked: Iterable[Quantized]):
    """Bits per weight of layers in a format, as they are stored; None if it cannot be told."""
    codes = {layer.layer: layer.codes for layer in unmarked if layer.format == name}
    counts = [_weights(tensors.get(key), formats.named(name)) for key in codes.values()]
    if None in counts or not sum(counts):
        return None
    stored = sum(tensor.nbytes for key, tensor in tensors.items() if _is_part(key, codes))
    return 8 * stored / sum(counts)


def of_gguf(header: gguf.GgufHeader) -> FormatFacts:
    """The facts of a GGUF file."""
    coded = [tensor for tensor in header.tensors if tensor.kind not in gguf.PLAIN]
    weights = sum(math.prod(tensor.shape) for tensor in coded)
    bits = 8 * sum(tensor.nbytes for tensor in coded) / weights if weights else None
    kinds = Counter(tensor.kind for tensor in coded)
    text = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return facts(formats.GGUF, len(coded), bits, text or None)


def lost_scales(markers: Mapping[str, Mapping], tensors: Iterable[str]) -> list[str]:
    """A sentence for each marked layer that lacks a tensor that its format needs."""
    tensors, problems = set(tensors), []
    for name, conf in markers.items():
        row = formats.marked(conf)
        if row is None or row.marker == MXFP8 or f"{name}{WEIGHT}" not in tensors:
            continue  # `format` checks MXFP8 layers, and more of them
        for needed in row.scales:
            if not any(f"{name}.{key}" in tensors for key in needed.split("|")):
                key = f"{name}.{needed.split('|')[0]}"
                problems.append(
                    f"{quoted(name)} is {row.name}, and its scales {quoted(key)} are missing; get "
                    "the file again"
                )
    return problems


def unreadable(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """A warning for dtypes on which ComfyUI's loader for dynamic VRAM fails."""
    keys = {info.dtype: key for key, info in tensors.items() if info.dtype in _UNKNOWN_DTYPES}
    return [
        f"{quoted(key)} is {dtype}: ComfyUI with dynamic VRAM stops with KeyError: '{dtype}'"
        + ("; `mxfp8 repair` stores MXFP8 scales as U8" if dtype == "F8_E8M0" else "")
        for dtype, key in keys.items()
    ]


def as_mxfp8(
    tensors: Mapping[str, TensorInfo],
    markers: Mapping[str, Mapping],
    quantized: Iterable[Quantized],
    kind: str | None,
    recognized: bool,
) -> AsMXFP8 | None:
    """What a safetensors file would be as MXFP8; None if it is that already.

    Args:
        quantized: layers without a marker.
        kind: what it is, if no model; recognized: whether its architecture is known.
    """
    if kind is not None:
        return AsMXFP8(None, "no conversion: only models and text encoders are converted")
    codes = {name: _elements(tensors, name + WEIGHT, conf) for name, conf in markers.items()}
    named = {conf["format"] for conf in markers.values()}
    for layer in quantized:
        row = formats.named(layer.format)
        if not row.whole and layer.layer not in codes:
            codes[layer.layer] = _weights(tensors.get(layer.codes), row)
            named.add(row.marker)
    if codes:
        if named == {MXFP8}:
            return None
        known = all(formats.marked(conf) for conf in markers.values())
        return _from_original(None if None in codes.values() else _size(tensors, codes), known)
    return _converted(tensors) if recognized else None


def _elements(tensors, key: str, conf: Mapping) -> int | None:
    row = formats.marked(conf)
    return _weights(tensors.get(key), row) if row else None


def _weights(tensor: TensorInfo | None, row: Format) -> int | None:
    """How many weights a tensor of codes holds."""
    if tensor is None:
        return 0
    bits = row.code_bits
    return tensor.nbytes * 8 // bits if bits else None


def _size(tensors: Mapping[str, TensorInfo], codes: Mapping[str, int]) -> int:
    """Bytes with these layers as MXFP8, and everything else as it is."""
    rest = sum(tensor.nbytes for key, tensor in tensors.items() if not _is_part(key, codes))
    return rest + sum(_mxfp8_bytes(count) for count in codes.values())


def _is_part(key: str, layers: Mapping[str, object]) -> bool:
    """Whether a tensor is a quantized layer's codes or scales; its bias stays."""
    if key.endswith(".bias"):
        return False
    name = key
    for _ in range(_DEPTH):
        name, dot, _ = name.rpartition(".")
        if dot and name in layers:
            return True
    return False


def _mxfp8_bytes(weights: int) -> int:
    return weights + weights // layout.BLOCK + _MARKER


def _converted(tensors: Mapping[str, TensorInfo]) -> AsMXFP8 | None:
    plan = policy.plan({key: (info.dtype, info.shape) for key, info in tensors.items()})
    if not plan.quantized:
        return AsMXFP8(None, "no conversion: no layer would be MXFP8")
    size = stored_bytes(plan)
    layers = format_count(len(plan.quantized), "layer")
    return AsMXFP8(
        size,
        f"{format_size(size)} with {layers} in MXFP8: `mxfp8 convert` or Convert File (MXFP8)",
    )


def of_gguf_as_mxfp8(header: gguf.GgufHeader) -> AsMXFP8:
    if all(tensor.kind in gguf.PLAIN for tensor in header.tensors):
        return AS_SAFETENSORS
    size = sum(
        tensor.nbytes if tensor.kind in gguf.PLAIN else _mxfp8_bytes(math.prod(tensor.shape))
        for tensor in header.tensors
    )
    return _from_original(size)


def _from_original(size: int | None, known: bool = True) -> AsMXFP8:
    """What a quantized file would be.

    Args:
        known: whether all its formats are known to round weights.
    """
    would = f"about {format_size(size)}, " if size else ""
    rounds = "; this file's weights are rounded already, and would be a second time"
    return AsMXFP8(size, f"{would}from its BF16, FP16 or FP32 original{rounds if known else ''}")
