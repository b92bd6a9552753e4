"""Convert a model to MXFP8: plan it, stream it through the quantiser, write it, report on it.

Tensors pass through one by one, matrices in slabs of rows, so memory does not grow with the model.
Slabs are whole tiles of 128 rows, because the scales of such a slab are contiguous in the file.
Every weight is quantised from the precision it is stored in, and everything that is not quantised
keeps its dtype and its bytes. Biases stay as they are: the "bias correction" of other tools has
the wrong sign and doubles the mean output error on its own calibration data.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from .. import kernels
from ..kernels import layout
from . import foreign, format, policy
from .format import MARKER, SCALE, WEIGHT
from .opening import open_source
from .policy import Decision, Plan
from .report import KEPT, MXFP8, Energy, LayerReport, Report, total_sqnr
from .source import Source, as_bytes
from .writer import Writer

Progress = Callable[[int, int, str], None]  # (bytes read, bytes in all, key)

_SLAB = 1 << 23  # values quantised at a time


def convert_file(
    source,
    target,
    *,
    preset: str = policy.AUTO,
    include: str | None = None,
    exclude: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert a model on disk to an MXFP8 file.

    Args:
        source: path of a file, an index of several, or a folder; see `opening.open_source`.
        target: path; it appears whole or not at all.
        preset, include, exclude: see `policy.plan`.
        overwrite: whether an existing target may be replaced.
        progress: called after every slab; an exception it raises stops the conversion cleanly.

    Raises:
        FormatError: the source is damaged or already quantised.
        ValueError: a weight holds NaN or Inf, or no layer would be quantised.
        OSError: reading or writing failed. In every case the target is as it was before.
    """
    with open_source(source) as opened:
        if os.path.exists(target) and any(os.path.samefile(f, target) for f in opened.files):
            raise ValueError(
                f"{os.path.basename(target)}: the target is the source; give another name "
                "(the original cannot be rebuilt from MXFP8)"
            )
        plan = plan_source(opened, preset=preset, include=include, exclude=exclude)
        return convert(opened, target, plan, overwrite=overwrite, progress=progress)


def plan_source(source: Source, **options) -> Plan:
    """`policy.plan` for a source, refusing one that is quantised already."""
    foreign.check_unquantized(source)
    return policy.plan(source.tensors, **options)


def convert(
    source: Source,
    target,
    plan: Plan,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Carry out a plan. Arguments and errors as for `convert_file`."""
    if not plan.quantized:
        raise ValueError(
            f"{source.name}: no layer to quantise: preset {plan.preset!r} and exclude keep all "
            "of them (on the command line, --dry-run lists the reasons)"
        )
    start = time.perf_counter()
    total = sum(_nbytes(d) for d in plan.decisions)
    done = 0

    def advance(count: int, key: str) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total, key)

    energies: dict[str, Energy] = {}
    markers = {d.layer: format.marker(d.shape, d.dtype) for d in plan.quantized}
    tensors = [t for d in plan.decisions for t in _stored(d, markers)]
    metadata = format.with_markers(source.metadata, markers)
    with Writer(target, tensors, metadata, overwrite, lambda: advance(0, "verify")) as writer:
        for decision in plan.decisions:
            if decision.quantize:
                energies[decision.key] = _quantize(source, decision, writer, advance)
                marker = format.marker_bytes(markers[decision.layer])
                writer.write(decision.layer + MARKER, marker)
            else:
                for piece in source.pieces(decision.key):
                    writer.write(decision.key, piece)
                    advance(len(piece), decision.key)

    return Report(
        source=source.name,
        target=writer.target.name,
        preset=plan.preset,
        architecture=plan.architecture,
        bytes_before=total,
        bytes_after=sum(t.nbytes for t in writer.tensors.values()),
        seconds=time.perf_counter() - start,
        sqnr_db=total_sqnr(energies.values()),
        layers=_layer_reports(plan, writer, energies),
    )


def _nbytes(decision: Decision) -> int:
    return format.numel(decision.shape) * format.DTYPES[decision.dtype] // 8


def _stored(decision: Decision, markers) -> list[tuple[str, str, tuple[int, ...]]]:
    """(key, dtype, shape) of what one source tensor becomes in the file."""
    if not decision.quantize:
        return [(decision.key, decision.dtype, decision.shape)]
    marker = format.marker_bytes(markers[decision.layer])
    return [
        (decision.layer + WEIGHT, "F8_E4M3", layout.padded_shape(*decision.shape)),
        (decision.layer + SCALE, "U8", layout.scale_shape(*decision.shape)),
        (decision.layer + MARKER, "U8", (len(marker),)),
    ]


def _quantize(source: Source, decision: Decision, writer: Writer, advance) -> Energy:
    """Quantise one matrix in slabs of whole tiles, straight into the file."""
    rows, cols = decision.shape
    energy = Energy()
    for first, last in layout.slabs(rows, cols, _SLAB):
        slab = source.rows(decision.key, first, last)
        qdata, scale, signal, noise = kernels.quantize_measured(slab)
        if not signal.isfinite().all():
            row = first + int((~signal.isfinite().all(-1)).nonzero()[0, 0])
            raise ValueError(
                f"{source.name}: {decision.key!r} holds NaN or Inf in row {row}; "
                "MXFP8 has no way to store it"
            )
        energy.add(first, signal, noise)
        writer.write(decision.layer + WEIGHT, as_bytes(qdata))
        writer.write(decision.layer + SCALE, as_bytes(scale))
        advance(_nbytes(decision) * (last - first) // rows, decision.key)
    return energy


def _layer_reports(plan: Plan, writer: Writer, energies) -> tuple[LayerReport, ...]:
    reports = []
    for decision in plan.decisions:
        if not decision.key.endswith(WEIGHT) or len(decision.shape) != 2:
            continue
        parts = (WEIGHT, SCALE, MARKER) if decision.quantize else (WEIGHT,)
        energy = energies.get(decision.key)
        reports.append(
            LayerReport(
                name=decision.layer,
                decision=MXFP8 if decision.quantize else KEPT,
                reason=decision.reason,
                dtype=decision.dtype,
                shape=decision.shape,
                bytes_before=_nbytes(decision),
                bytes_after=sum(writer.tensors[decision.layer + p].nbytes for p in parts),
                sqnr_db=energy.sqnr_db if energy else None,
                worst_block=energy.worst if energy else None,
            )
        )
    return tuple(reports)
