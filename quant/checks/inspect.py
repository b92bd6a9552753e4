"""What a file holds and what is wrong with it: its header, and a scan of every byte.

The header alone needs no torch and takes milliseconds; the MXFP8 layers are read in slabs.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .. import format
from ..container.header import quoted
from ..conversion import architectures
from ..format import MARKER, SCALE, WEIGHT, FormatError, Header
from ..progress import Meter, Progress
from ..reports import document, metadata
from ..reports.comparison import Comparison, fingerprint
from ..reports.conversion import KEPT, MXFP8, Report, format_count, format_size, listed, verdict
from ..sources import unsupported

KEY = "mxfp8_inspection"


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
    reason: str = "marked as MXFP8"
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

    @property
    def mxfp8(self) -> list[LayerInspection]:
        return [layer for layer in self.layers if layer.decision == MXFP8]

    def to_json(self) -> str:
        """Versioned JSON, every layer included."""
        return document.write(KEY, asdict(self))

    def summary(self) -> str:
        """A few lines for a terminal or a node."""
        return "\n".join([
            f"{self.file}: {format_size(self.bytes)}, {self.tensors} tensors",
            *([f"kind: {self.kind}"] if self.kind else []),
            f"architecture: {self.architecture or 'not recognized'}",
            *self.contents(),
            f"metadata: {', '.join(self.metadata) or 'none'}",
            f"read: {self._read()}",
            *metadata.lines(self.report, self.comparison),
            *listed("WARNING", self.warnings),
            *listed("PROBLEM", self.problems),
            verdict(
                "no problem found" if self.every_byte else "no problem found in the header",
                self.problems,
                self.warnings,
            ),
        ])  # fmt: skip

    def _read(self) -> str:
        """Which of the file's bytes were read."""
        if not self.every_byte:
            return "the header"
        layers = len(self.mxfp8)
        banks = self.formats.get(MXFP8, 0) - layers
        read = [f"every byte of {format_count(layers, 'MXFP8 layer')}"] if layers else []
        if banks:
            read.append(f"the scales of {format_count(banks, 'bank')} of MXFP8 experts")
        return ", ".join(["the header", *read]) if read else "the header; no layer is MXFP8"

    def contents(self) -> list[str]:
        """The number of layers in each format, the bytes in MXFP8, and what is kept, a line each.

        Kept are matrices that are not quantized, here by reason.
        """
        formats = [
            f"{k}: {format_count(count, 'layer')}" for k, count in sorted(self.formats.items())
        ]
        mxfp8, other = format_size(self.mxfp8_bytes), format_size(self.other_bytes)
        reasons = Counter(layer.reason for layer in self.layers if layer.decision == KEPT)
        kept = [
            f"kept: {format_count(count, 'matrix', 'matrices')}, {reason}"
            for reason, count in reasons.most_common()
        ]
        return [
            *(formats or ["no quantized layers"]),
            f"MXFP8 {mxfp8}, everything else {other}",
            *kept,
        ]


def inspect_file(path, *, every_byte: bool = True, progress: Progress | None = None) -> Inspection:
    """Inspect a safetensors file.

    Args:
        every_byte: whether to read the MXFP8 layers, for which torch is needed.
        progress: called after every slab.

    Raises:
        FormatError: the header or the markers are damaged, so that nothing in the file is reliable.
        OSError: it cannot be read.
    """
    unsupported.check_file(Path(path))
    header = format.read_header(path)
    header.check_layers()
    result = _from_header(header, every_byte)
    if every_byte:
        _scan(header, result, progress)
    return result


def _from_header(header: Header, every_byte: bool) -> Inspection:
    detected = architectures.detect(header.tensors)
    marked, formats = (conf["format"] for conf in header.markers.values()), _unmarked(header)
    report, comparison, warnings = metadata.read(header.metadata)
    parts = {n + p for n in (*header.layers, *header.experts) for p in (WEIGHT, SCALE, MARKER)}
    sizes = Counter()
    for tensor in header.tensors.values():
        sizes[tensor.name in parts] += tensor.nbytes
    return Inspection(
        file=header.path.name,
        bytes=header.file_size,
        tensors=len(header.tensors),
        architecture=detected and detected[0].name,
        formats=dict(Counter([*marked, *formats.values()])),
        mxfp8_bytes=sizes[True],
        other_bytes=sizes[False],
        metadata=sorted(header.metadata),
        every_byte=every_byte,
        layers=[*_layers(header, formats)],
        warnings=warnings,
        report=report,
        comparison=comparison,
        kind=_kind(header, recognized=detected is not None and bool(detected[0].classes)),
    )


def _kind(header: Header, recognized: bool) -> str | None:
    lora = unsupported.find_lora(header.tensors)
    found = ("a LoRA", lora) if lora else unsupported.find_kind(header.tensors, recognized)
    return found and f"{found[0]} ({quoted(found[1])})"


def _unmarked(header: Header) -> dict[str, str]:
    """Layer -> format, of those that are quantized without a marker."""
    tensors = {t.name: (t.dtype, t.shape) for t in header.tensors.values()}
    named, formats = tensors.keys() | header.markers.keys(), {}
    for found in unsupported.unmarked(tensors):
        _, shape = tensors.get(found.layer + WEIGHT, (None, (0, 0)))  # of GPTQ it is a `qweight`
        whole = found.format == unsupported.SCALED_FP8
        if len(shape) == 2 and not whole and found.layer not in named:
            lost = " without markers" if found.format == "MXFP8" else ""
            formats.setdefault(found.layer, found.format + lost)
    return formats


def _layers(header: Header, formats: Mapping[str, str]) -> Iterator[LayerInspection]:
    """Every 2-D weight, in the order of the file; `formats` of those without a marker."""
    for tensor in header.tensors.values():
        name = tensor.name.removesuffix(WEIGHT)
        if name == tensor.name:
            continue
        layer = header.layers.get(name)
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
            marked = header.markers.get(name, {}).get("format")
            yield LayerInspection(
                name=name,
                shape=tensor.shape,
                bytes=tensor.nbytes,
                decision=marked or formats.get(name, KEPT),
                reason=f"marked as {marked}" if marked else f"{tensor.dtype} in the file",
                dtype=tensor.dtype,
            )


def _scan(header: Header, result: Inspection, progress: Progress | None) -> None:
    from ..sources.file import FileSource
    from . import scan

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

    rows = ((layer.name, source.rows(layer.name + WEIGHT, 0, 1)) for layer in result.mxfp8)
    actual = fingerprint((name, bytes(as_bytes(row))) for name, row in rows)
    if result.comparison.model.fingerprint != actual:
        result.warnings.append(
            "the comparison in the header was measured on weights other than this file's"
        )
