"""What a file holds, and what is wrong with it: the header's facts, and a scan of every byte.

The header alone needs no torch and takes milliseconds; the bytes of MXFP8 layers are read in slabs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .. import format
from ..container.header import quoted
from ..conversion import policy
from ..format import MARKER, SCALE, WEIGHT, FormatError, Header
from ..progress import Meter, Progress
from ..reports import comparison, metadata
from ..reports.comparison import Comparison
from ..reports.conversion import KEPT, MXFP8, Report, gigabytes
from ..sources import unsupported

VERSION = 1


@dataclass
class LayerInspection:
    """One 2-D weight.

    Attributes:
        shape: unpadded (N, K); bytes: of codes and scales; scale_dtype: "U8" or "F8_E8M0".
        decision: "mxfp8", the name of another format, or "kept"; reason: why, in words.
        dtype: of the weight in the file. What follows is of MXFP8 layers alone.
        nan_codes, nan_scales: counts within the shape; padding: bytes of padding that are not
            zero; scale_order: "tiled" or "row-major" by the evidence, None where nothing tells.
            All None if only the header was read.
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
        formats: format of a marker -> number of layers.
        report, comparison: what the header says of its conversion and of a comparison, as those
            modules have it; None where it says nothing that can be read.
        every_byte: whether the layers were read, or only the header.
        problems, warnings: sentences; a file with problems should not be used.
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

    @property
    def mxfp8(self) -> list[LayerInspection]:
        return [layer for layer in self.layers if layer.decision == MXFP8]

    def to_json(self) -> str:
        """Versioned JSON, every layer included."""
        return json.dumps({"mxfp8_inspection": VERSION, **asdict(self)}, indent=1)

    def summary(self) -> str:
        """A few lines for a terminal or a node."""
        return "\n".join([
            f"{self.file}: {gigabytes(self.bytes)}, {self.tensors} tensors",
            f"architecture: {self.architecture or 'not recognized'}",
            *(self.counted() or ["no layer is quantized, as far as its markers say"]),
            f"MXFP8 {gigabytes(self.mxfp8_bytes)}, everything else {gigabytes(self.other_bytes)}",
            f"metadata: {', '.join(self.metadata) or 'none'}",
            self._verdict(),
            *metadata.lines(self.report, self.comparison),
        ])  # fmt: skip

    def counted(self) -> list[str]:
        """How many layers are in which format."""
        return [f"{name}: {count} layers" for name, count in sorted(self.formats.items())]

    def _verdict(self) -> str:
        """What was read, and whether that is sound."""
        whole = self.every_byte and self.mxfp8_bytes
        read = f"read: {'every byte of its MXFP8 layers' if whole else 'the header'}"
        return read if self.problems else f"{read}; no problems found"


def inspect_file(path, *, every_byte: bool = True, progress: Progress | None = None) -> Inspection:
    """Look into a safetensors file.

    Args:
        every_byte: whether to read the MXFP8 layers; without, torch is not needed.
        progress: called after every slab.

    Raises:
        FormatError: its header or markers are damaged, so that nothing in it can be relied on.
        OSError: it cannot be read.
    """
    unsupported.check_file(Path(path))
    header = format.read_header(path)
    header.check_layers()
    result = _from_header(header, every_byte)
    if every_byte:
        _scan(path, result, progress)
    return result


def _from_header(header: Header, every_byte: bool) -> Inspection:
    formats: dict[str, int] = {}
    for conf in header.markers.values():
        formats[conf["format"]] = formats.get(conf["format"], 0) + 1
    found = policy.detect_architecture(header.tensors)
    said = metadata.read(header.metadata)
    ours = (*header.layers, *header.experts)
    parts = {name + part for name in ours for part in (WEIGHT, SCALE, MARKER)}
    sizes = {True: 0, False: 0}
    for tensor in header.tensors.values():
        sizes[tensor.name in parts] += tensor.nbytes
    return Inspection(
        file=header.path.name,
        bytes=header.file_size,
        tensors=len(header.tensors),
        architecture=found[0] if found else None,
        formats=formats,
        mxfp8_bytes=sizes[True],
        other_bytes=sizes[False],
        metadata=sorted(header.metadata),
        every_byte=every_byte,
        layers=[*_layers(header)],
        warnings=list(said.warnings),
        report=said.report,
        comparison=said.comparison,
    )


def _layers(header: Header) -> Iterator[LayerInspection]:
    """Every 2-D weight, in the order of the file."""
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
            other = header.markers.get(name, {}).get("format")
            decision, reason = KEPT, f"{tensor.dtype} in the file"
            if other is not None:
                decision, reason = other, f"marked as {other}"
            yield LayerInspection(
                name, tensor.shape, tensor.nbytes, decision=decision, reason=reason,
                dtype=tensor.dtype,
            )  # fmt: skip


def _scan(path, result: Inspection, progress: Progress | None) -> None:
    from ..sources.file import FileSource
    from . import scan

    total = sum(layer.bytes for layer in result.mxfp8)
    advance = Meter(total, progress)

    with FileSource(path) as source:
        checks = (
            lambda source: scan.refuse_tables(source.name, source.header.layers.values()),
            scan.refuse_unmarked,
            scan.refuse_nan_experts,
        )
        for check in checks:
            try:
                check(source)
            except FormatError as error:
                result.problems.append(str(error))
        for layer in result.mxfp8:
            tick = functools.partial(advance, key=layer.name)
            found = scan.scan_layer(source, source.header.layers[layer.name], tick)
            layer.nan_codes, layer.nan_scales = found.nan_codes, found.nan_scales
            layer.padding, layer.scale_order = found.padding, found.order.order
            result.problems += [f"{quoted(layer.name)}: {p}" for p in found.problems]
            result.warnings += [f"{quoted(layer.name)}: {w}" for w in found.warnings]
        if result.comparison is not None:
            _check_comparison(source, result)


def _check_comparison(source, result: Inspection) -> None:
    """Warn of a comparison that was measured on other weights."""
    from ..sources.file import as_bytes

    rows = ((layer.name, source.rows(layer.name + WEIGHT, 0, 1)) for layer in result.mxfp8)
    found = comparison.fingerprint((name, bytes(as_bytes(row))) for name, row in rows)
    if result.comparison.model.fingerprint != found:
        result.warnings.append(
            "the comparison in the header was measured on other weights than the file's"
        )
