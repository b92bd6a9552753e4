"""What a file is, what it holds and what is wrong with it: its header, and a scan of every byte.

The header alone needs no torch and takes milliseconds; the MXFP8 layers are read in slabs. A file
that no loader takes is explained all the same, as far as its first bytes or its header go: cut
short, with damaged markers, of another kind. Pickles are never read.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..container.header import first_of, plain, quoted, read_container, read_json, reading
from ..conversion import architectures, text_encoders
from ..format import MARKER, SCALE, WEIGHT, FormatError, Header, Layer, header_markers
from ..progress import Meter, Progress
from ..reports import document, metadata
from ..reports.comparison import Comparison, fingerprint
from ..reports.conversion import KEPT, MXFP8, Report, last_line, listed
from ..reports.units import format_count, format_size
from ..reports.verdict import BAD, GOOD, NOTICE, Part, Verdict, say
from ..sources import formats, gguf, unsupported
from . import explain
from .explain import AsMXFP8, FormatFacts

KEY = "mxfp8_inspection"
OTHER_WEIGHTS = "the comparison in the header was measured on weights other than this file's"
_FIRST = 1 << 20  # bytes of a torch file that are searched for names of libraries
_MOST_CONFIG = 1 << 20  # bytes of a config.json
_NAMED = 5  # parts in a sentence
_FOR_DIFFUSERS = (
    "its tensors have diffusers' names: it is for diffusers with mxfp8.integrations.diffusers. "
    "ComfyUI needs the file that `mxfp8 convert` makes of the original without --format"
)


@dataclass
class LayerInspection:
    """One 2-D weight.

    Attributes:
        shape: unpadded (N, K); bytes: of codes and scales; scale_dtype: "U8" or "F8_E8M0".
        decision: "mxfp8", another format, as its marker or its tensors name it, or "kept", with the
            reason.
        dtype: of the weight in the file.
        nan_codes, nan_scales: counts within the shape; padding: non-zero bytes of padding;
            scale_order: "tiled" or "row-major", None without evidence. Of MXFP8 layers, and only if
            every byte was read.
    """

    name: str
    shape: tuple[int, ...]
    bytes: int
    scale_dtype: str | None = None
    full_precision_matrix_mult: bool = False
    decision: str = MXFP8
    reason: str = str(say("marked as MXFP8"))
    dtype: str = "F8_E4M3"
    nan_codes: int | None = None
    nan_scales: int | None = None
    padding: int | None = None
    scale_order: str | None = None


@dataclass
class Inspection:
    """A whole file.

    Attributes:
        formats: format in the markers, or that dtypes and names show -> number of layers.
        metadata: names of the entries in the header.
        every_byte: whether the layers were read, or only the header.
        problems, warnings: sentences; a file with problems should not be used.
        report, comparison: as kept in the header; None if missing or damaged.
        kind: what it is and the tensor that shows it, if no diffusion model or text encoder.
        container: "safetensors", or what else the file is.
        explained: what is known of its formats.
        as_mxfp8: what it would be as MXFP8; None if it is that, or nothing is known.
    """

    file: str
    bytes: int
    tensors: int
    architecture: str | None
    formats: dict[str, int]
    mxfp8_bytes: int
    other_bytes: int
    metadata: list[str]
    every_byte: bool
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layers: list[LayerInspection] = field(default_factory=list, repr=False)
    report: Report | None = None
    comparison: Comparison | None = None
    kind: str | None = None
    container: str = "safetensors"
    explained: list[FormatFacts] = field(default_factory=list)
    as_mxfp8: AsMXFP8 | None = None

    @property
    def mxfp8(self) -> list[LayerInspection]:
        return [layer for layer in self.layers if layer.decision == MXFP8]

    def to_json(self) -> str:
        """Versioned JSON, every layer included."""
        return document.write(KEY, asdict(self), self.verdict)

    @property
    def verdict(self) -> Verdict:
        """What the file is and who runs it, or what is wrong with it."""
        if self.problems:
            first, more = self.problems[0], len(self.problems) - 1
            if more:
                part = say("NOT OK: [problem], and [count] more", problem=first, count=more)
            else:
                part = say("NOT OK: [problem]", problem=first)
            return Verdict.of(BAD, part)
        most = max(self.explained, key=lambda fact: fact.layers, default=None)
        if most is not None:
            what = most.name
            if most.layers:
                what = say("[name], [layers]", name=most.name, layers=_count(most.layers))
            what = say("[format]: runs in [programs]", format=what, programs=most.runs)
        elif self.formats:  # none of them known
            name = max(self.formats, key=self.formats.get)
            what = say("[name], [layers]", name=plain(name), layers=_count(self.formats[name]))
        elif self.kind or self.container != "safetensors":
            what = self.kind or self.container
        else:
            what = say("not quantized")
        parts = [say("[size], [what]", size=format_size(self.bytes), what=what)]
        if self.as_mxfp8 and self.as_mxfp8.bytes:
            parts.append(say("[size] as MXFP8", size=format_size(self.as_mxfp8.bytes)))
        if len(self.warnings) == 1:
            parts.append(say("1 warning"))
        elif self.warnings:
            parts.append(say("[count] warnings", count=len(self.warnings)))
        known = most is None or most.comfyui is not None
        return Verdict.of(GOOD if known and not self.warnings else NOTICE, *parts)

    def summary(self) -> str:
        """A few lines for a terminal or a node."""
        count = f", {format_count(self.tensors, 'tensor')}" if self.tensors else ""
        return "\n".join([
            f"{plain(self.file)}: {format_size(self.bytes)}{count}",
            *([f"file: {self.container}"] if self.container != "safetensors" else []),
            *([f"kind: {self.kind}"] if self.kind else []),
            *([f"architecture: {self.architecture or 'not recognized'}"] if self.tensors else []),
            *self.contents(),
            *([f"as MXFP8: {self.as_mxfp8.text}"] if self.as_mxfp8 else []),
            f"metadata: {', '.join(map(plain, self.metadata)) or 'none'}",
            f"read: {self._read()}",
            *metadata.lines(self.report, self.comparison),
            *listed("WARNING", self.warnings),
            *listed("PROBLEM", self.problems),
            last_line(
                "no problem found" + ("" if self.every_byte else f" in {self._read()}"),
                self.problems,
                self.warnings,
            ),
        ])  # fmt: skip

    def _read(self) -> str:
        """Which of the file's bytes were read."""
        if not self.every_byte:
            return "the header" if self.tensors else "its first bytes"
        layers = len(self.mxfp8)
        banks = self.formats.get(MXFP8, 0) - layers
        read = [f"every byte of {format_count(layers, 'MXFP8 layer')}"] if layers else []
        if banks:
            read.append(f"the scales of {format_count(banks, 'bank')} of MXFP8 experts")
        return ", ".join(["the header", *read]) if read else "the header; no layer is MXFP8"

    def contents(self) -> list[str]:
        """What is known of each format, the bytes in MXFP8, and what is kept, a line each.

        Kept are matrices that are not quantized, here by reason.
        """
        if not self.tensors:
            return [line for fact in self.explained for line in fact.lines()]
        explained = any(fact.name == formats.GGUF.name for fact in self.explained)
        others = [
            f"{plain(name)}: {format_count(count, 'layer')}"
            for name, count in sorted(self.formats.items())
            if not explained and formats.named(name) is None
        ]
        mxfp8, other = format_size(self.mxfp8_bytes), format_size(self.other_bytes)
        reasons = Counter(layer.reason for layer in self.layers if layer.decision == KEPT)
        kept = [
            f"not quantized: {format_count(count, 'matrix', 'matrices')}, {reason}"
            for reason, count in reasons.most_common()
        ]
        return [
            *(line for fact in self.explained for line in fact.lines()),
            *others,
            *([] if self.formats else ["no quantized layers"]),
            *([f"MXFP8 {mxfp8}, everything else {other}"] if self.mxfp8_bytes else []),
            *kept,
        ]


def _count(layers: int) -> Part:
    return say("1 layer") if layers == 1 else say("[count] layers", count=layers)


def inspect_file(path, *, every_byte: bool = True, progress: Progress | None = None) -> Inspection:
    """Inspect a model's file: safetensors, or any other, as far as it can be without risk.

    Args:
        path: of a file, the index of several, or a folder with one of these.
        every_byte: whether to read the MXFP8 layers of a single file, for which torch is needed.
        progress: called after every slab, and every megabyte of a GGUF file's header.

    Raises:
        FormatError: the header is damaged, so that nothing in the file is reliable; or a folder has
            no model, or several.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.is_dir() or _is_index(path):
        from ..sources.open import find_model

        place = find_model(path)
        if place.suffix.lower() == ".json":
            return _inspect_parts(place)
        result = inspect_file(place, every_byte=every_byte, progress=progress)
        result.explained += _configured(place.parent, result.explained)
        return result
    kind = unsupported.kind_of(path)
    if kind is not None:
        return _inspect_gguf(path, progress) if kind.name == "GGUF" else _inspect_other(path, kind)
    header, markers, problems = _read_file(path)
    result = _from_header(header, markers, problems)
    if "-of-" in path.name:
        from ..sources.shards import is_shard

        if is_shard(path.name):
            result.warnings.append(
                "one part of a model in several files; inspect its folder or its index"
            )
    if every_byte and not result.problems:
        result.every_byte = True
        _scan(header, result, progress)
    return result


def _is_index(path: Path) -> bool:
    if path.suffix.lower() != ".json":
        return False
    from ..sources.shards import INDEX

    return INDEX.search(path.name) is not None


def _read_file(path: Path) -> tuple[Header, dict[str, dict], list[str]]:
    """(header, markers, what is wrong with either) of a safetensors file."""
    header = read_container(path, Header, whole=False)
    needed = max((tensor.end for tensor in header.tensors.values()), default=0)
    if needed <= header.file_size:
        try:
            return header, header.markers, []
        except FormatError as error:
            return header, {}, [str(error)]
    percent = 100 * header.file_size // needed
    problem = (
        f"{path.name}: truncated: it has {header.file_size} of {needed} bytes ({percent}%); "
        "download it again"
    )
    try:
        return header, header_markers(path.name, header.metadata), [problem]
    except FormatError as error:
        return header, {}, [problem, str(error)]


def _from_header(
    header: Header, markers: Mapping[str, dict], problems: Iterable[str]
) -> Inspection:
    """What a header says, whose markers are known."""
    layers: dict[str, Layer] = {}
    experts: dict[str, Layer] = {}
    problems = [*problems, *explain.lost_scales(markers, header.tensors)]
    if markers and not problems:
        try:
            layers, experts = header.layers, header.experts
        except FormatError as error:
            problems.append(str(error))
    detected = architectures.detect(header.tensors)
    recognized = detected is not None and bool(detected[0].classes)
    unmarked = [
        *unsupported.unmarked({t.name: (t.dtype, t.shape) for t in header.tensors.values()})
    ]
    names = _unmarked(header, markers, unmarked)
    kind = _kind(header, recognized)
    report, comparison, warnings = metadata.read(header.metadata)
    explained, lost = explain.of_layers(header.tensors, markers, unmarked)
    parts = {n + p for n in (*layers, *experts) for p in (WEIGHT, SCALE, MARKER)}
    sizes = Counter()
    for tensor in header.tensors.values():
        sizes[tensor.name in parts] += tensor.nbytes
    return Inspection(
        file=header.path.name,
        bytes=header.file_size,
        tensors=len(header.tensors),
        architecture=detected and detected[0].name,
        formats=dict(Counter([*(conf["format"] for conf in markers.values()), *names.values()])),
        mxfp8_bytes=sizes[True],
        other_bytes=sizes[False],
        metadata=sorted(header.metadata),
        every_byte=False,
        problems=problems,
        layers=[*_layers(header, markers, layers, names)],
        warnings=[*warnings, *lost, *explain.unreadable(header.tensors)],
        report=report,
        comparison=comparison,
        kind=kind,
        explained=explained,
        as_mxfp8=explain.as_mxfp8(header.tensors, markers, unmarked, kind, detected is not None),
    )


@dataclass(frozen=True)
class _Merged(Header):
    """The headers of several files as one; `read` are the markers, of which some are in the data.

    Offsets are those in a tensor's own file.
    """

    read: Mapping[str, dict]

    @property
    def markers(self) -> Mapping[str, dict]:
        return self.read


def _inspect_parts(index: Path) -> Inspection:
    """A model in several files: their headers as one."""
    from ..sources.shards import read_index

    weight_map, _ = read_index(index)
    parts = dict.fromkeys(sorted(weight_map.values()))
    missing = [name for name in parts if not (index.parent / name).is_file()]
    tensors, about, markers, problems, size = {}, {}, {}, [], 0
    if missing:
        problems.append(
            f"{index.name}: {len(missing)} of its {format_count(len(parts), 'part')} "
            f"{'is' if len(missing) == 1 else 'are'} missing: "
            f"{first_of(missing, _NAMED)}; download them"
        )
    for name in parts:
        if name in missing:
            continue
        try:
            unsupported.check_file(index.parent / name)
            header, marked, wrong = _read_file(index.parent / name)
        except FormatError as error:
            problems.append(str(error))
            continue
        tensors |= header.tensors
        about, markers = header.metadata | about, markers | marked
        problems, size = problems + wrong, size + header.file_size
    gone = [key for key, name in weight_map.items() if key not in tensors and name not in missing]
    if gone and not problems:
        problems.append(
            f"{index.name}: the index names {format_count(len(gone), 'tensor')} that "
            f"{'is' if len(gone) == 1 else 'are'} not in its parts: {quoted(gone[0])}"
            f"{', ...' if len(gone) > 1 else ''}; download it and all its parts again"
        )
    result = _from_header(_Merged(index, tensors, about, size, markers), markers, problems)
    result.container = f"safetensors in {format_count(len(parts), 'part')}"
    result.explained += _configured(index.parent, result.explained)
    return result


def _configured(folder: Path, known: Iterable[FormatFacts]) -> list[FormatFacts]:
    """The format that a folder's config.json names, if it is not known already."""
    path = folder / "config.json"
    if not path.is_file():
        return []
    try:
        conf = read_json(path, _MOST_CONFIG).get("quantization_config")
    except FormatError:
        return []
    method = conf.get("quant_method") if isinstance(conf, dict) else None
    rows = (row for row in (*formats.FORMATS, formats.GGUF) if method and row.method == method)
    return [explain.facts(row, 0) for row in rows if not any(known)][:1]


def _inspect_gguf(path: Path, progress: Progress | None) -> Inspection:
    header = gguf.read_header(path, progress)
    detected = architectures.detect(tensor.name for tensor in header.tensors)
    architecture = detected[0].name if detected else None
    if detected is None and isinstance(name := header.about.get("architecture"), str):
        architecture = plain(name)
    problems = []
    if header.needed > header.file_size:
        percent = 100 * header.file_size // header.needed
        problems.append(
            f"{path.name}: truncated: it has {header.file_size} of {header.needed} bytes "
            f"({percent}%); download it again"
        )
    quantized = Counter(t.kind for t in header.tensors if t.kind not in gguf.PLAIN)
    facts = explain.of_gguf(header)
    if isinstance(maker := header.about.get("quantized_by"), str):
        facts.made_by = plain(maker)
    return Inspection(
        file=path.name,
        bytes=header.file_size,
        tensors=len(header.tensors),
        architecture=architecture,
        formats={f"GGUF {kind}": count for kind, count in quantized.items()},
        mxfp8_bytes=0,
        other_bytes=header.file_size,
        metadata=sorted(f"general.{key}" for key in header.about),
        every_byte=False,
        problems=problems,
        layers=[
            LayerInspection(
                name=tensor.name.removesuffix(WEIGHT),
                shape=tensor.shape,
                bytes=tensor.nbytes,
                decision=KEPT if tensor.kind in gguf.PLAIN else f"GGUF {tensor.kind}",
                reason=f"{tensor.kind} in the file",
                dtype=tensor.kind,
            )
            for tensor in header.tensors
            if len(tensor.shape) == 2
        ],
        container=f"GGUF {header.version}",
        explained=[facts] if facts.layers else [],
        as_mxfp8=explain.of_gguf_as_mxfp8(header),
    )


def _inspect_other(path: Path, kind: formats.FileKind) -> Inspection:
    """A file that is not read, since it is no model, or could run code."""
    size = path.stat().st_size
    with reading(path) as file:
        start = file.read(_FIRST)
        file.seek(max(0, size - 65_557))  # an archive's end, with the longest comment
        end = file.read()
    problems = [f"{path.name}: not a safetensors file but {kind.text}"] if kind.broken else []
    if kind.name == "torch" and b"PK\x05\x06" not in end:
        problems.append(f"{path.name}: truncated: the archive has no end; download it again")
    rows = (row for row in formats.FORMATS if row.pickle and row.pickle in start)
    torch = kind.name in ("torch", "pickle")
    return Inspection(
        file=path.name,
        bytes=size,
        tensors=0,
        architecture=None,
        formats={},
        mxfp8_bytes=0,
        other_bytes=size,
        metadata=[],
        every_byte=False,
        problems=problems,
        container=kind.name if kind.broken else kind.text,
        explained=[explain.facts(row, 0) for row in rows] if torch else [],
        as_mxfp8=None if kind.broken else explain.AS_SAFETENSORS,
    )


def _kind(header: Header, recognized: bool) -> str | None:
    lora = unsupported.find_lora(header.tensors)
    found = ("a LoRA", lora) if lora else unsupported.find_kind(header.tensors, recognized)
    return found and f"{found[0]} ({quoted(found[1])})"


def _unmarked(
    header: Header, markers: Mapping[str, dict], found: Iterable[unsupported.Quantized]
) -> dict[str, str]:
    """Layer -> format, of those that are quantized without a marker."""
    named, names = header.tensors.keys() | markers.keys(), {}
    for layer in found:
        _, shape = _info(header, layer.layer + WEIGHT)
        whole = layer.format == unsupported.SCALED_FP8
        if len(shape) == 2 and not whole and layer.layer not in named:
            marked = layer.layer + MARKER in header.tensors
            lost = " without markers" if layer.format == "MXFP8" and not marked else ""
            names.setdefault(layer.layer, layer.format + lost)
    return names


def _info(header: Header, key: str) -> tuple[str, tuple[int, ...]]:
    """A tensor's dtype and shape; of GPTQ and others it is not called `weight`."""
    tensor = header.tensors.get(key)
    return (tensor.dtype, tensor.shape) if tensor else ("", (0, 0))


def _layers(
    header: Header,
    markers: Mapping[str, dict],
    layers: Mapping[str, Layer],
    names: Mapping[str, str],
) -> Iterator[LayerInspection]:
    """Every 2-D weight, in the order of the file; `names` of formats without a marker."""
    for tensor in header.tensors.values():
        name = tensor.name.removesuffix(WEIGHT)
        if name == tensor.name:
            continue
        layer = layers.get(name)
        if layer is not None:
            yield LayerInspection(
                name=name,
                shape=layer.shape,
                bytes=layer.weight.nbytes + layer.scale.nbytes,
                scale_dtype=layer.scale.dtype,
                full_precision_matrix_mult=layer.full_precision,
                dtype=tensor.dtype,
            )
        elif len(tensor.shape) == 2:
            marked = markers.get(name, {}).get("format")
            yield LayerInspection(
                name=name,
                shape=tensor.shape,
                bytes=tensor.nbytes,
                decision=marked or names.get(name, KEPT),
                reason=f"marked as {marked}" if marked else f"{tensor.dtype} in the file",
                dtype=tensor.dtype,
            )


def _scan(header: Header, result: Inspection, progress: Progress | None) -> None:
    from ..sources.diffusers import has_diffusers_names
    from ..sources.file import FileSource
    from . import scan

    if result.mxfp8 and has_diffusers_names(header.tensors):
        result.warnings.append(_FOR_DIFFUSERS)
    advance = Meter(sum(layer.bytes for layer in result.mxfp8), progress)
    with FileSource(header.path, header) as source:
        for check in (scan.check_embeddings, scan.check_unmarked, scan.check_experts):
            try:
                check(source)
            except FormatError as error:
                result.problems.append(str(error))
        for layer in result.mxfp8:
            stored = source.header.layers[layer.name]
            scanned = scan.scan_layer(source, stored, functools.partial(advance, key=layer.name))
            layer.nan_codes, layer.nan_scales = scanned.nan_codes, scanned.nan_scales
            layer.padding, layer.scale_order = scanned.padding, scanned.order
            result.problems += [f"{quoted(layer.name)}: {p}" for p in scanned.problems]
            result.warnings += [f"{quoted(layer.name)}: {w}" for w in scanned.warnings]
        if result.comparison is not None:
            _check_comparison(source, result)


def _check_comparison(source, result: Inspection) -> None:
    """Warn if the comparison in the header was measured on other weights."""
    from ..sources.file import as_bytes

    compared = [x for x in result.mxfp8 if not x.name.startswith(text_encoders.PREFIXES)]
    rows = ((layer.name, source.rows(layer.name + WEIGHT, 0, 1)) for layer in compared)
    actual = fingerprint((name, bytes(as_bytes(row))) for name, row in rows)
    if result.comparison.model.fingerprint != actual:
        result.warnings.append(OTHER_WEIGHTS)
