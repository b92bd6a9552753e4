"""Convert a model to MXFP8: plan it, stream it through the quantizer, write it, report on it.

Tensors pass through in slabs of rows, so memory does not grow with the model nor with its largest
tensor. Slabs are whole tiles of 128 rows, because the scales of such a slab are contiguous in the
file. Several threads work on slabs, each from reading to writing (`pipeline`), on the CPU or on the
device that torch has.
Every weight is quantized from the precision it is stored in, and everything that is not quantized
keeps its dtype and its bytes. Biases stay as they are: the "bias correction" of other tools has
the wrong sign and doubles the mean output error on its own calibration data.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import torch

from ... import kernels
from ...kernels import layout
from .. import format
from ..container.header import FormatError, quoted
from ..container.pipeline import Pipeline, cores
from ..container.writer import Writer
from ..format import MARKER, SCALE, WEIGHT
from ..memory import is_out_of_memory
from ..progress import Meter, Progress
from ..reports.conversion import (
    KEPT,
    MIN_SQNR,
    MXFP8,
    LayerReport,
    Report,
    SqnrAccumulator,
    total_sqnr,
)
from ..sources import unsupported
from ..sources.file import Source, as_bytes
from ..sources.open import open_source
from . import gptq, policy
from .calibration import Calibration, Moments, check_model, has_float64
from .policy import Decision, Plan, Selection

_SLAB = 1 << 21  # values quantized at a time
_BUDGET = 1 << 27  # bytes of the source in memory, except that one slab always may be
_WORKERS = 16  # at most; each takes about 10 MB for scratch and results
_NEEDED = 1 << 28  # bytes of address space, mostly stacks and heaps of threads
_LARGE_SCALE = 247  # the byte of 2**120, with which codes reach 2**128
_WIDEST = 1 << 18  # columns; 128 rows of float32 fill the budget


def convert_file(
    source,
    target,
    selection: Selection = policy.DEFAULT,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    device: str | None = None,
    calibration: Calibration | None = None,
) -> Report:
    """Convert a model on disk to an MXFP8 file.

    Args:
        source: path of a file, an index of several, or a folder; see `opening.open_source`.
        target: path; it appears whole or not at all.
        selection: which layers to quantize.
        overwrite: whether an existing target may be replaced.
        progress: called after every slab, and many times within a layer that is calibrated, which
            is not counted before it is done; an exception it raises stops the conversion cleanly.
        device: where to quantize ("cpu", "cuda:1", ...); default: the accelerator that torch has,
            else the CPU. Without a calibration the bytes are the same; with one they may differ,
            because sums round differently there. Not run on an accelerator so far.
        calibration: what layers are given; those in it are rounded for that (`gptq`). For a layer
            [N, K] that needs memory for about seven float32 matrices [K, K] and nine [N, K].

    Raises:
        FormatError: the source is damaged or already quantized.
        ValueError: a weight holds NaN or Inf, no layer would be quantized, or the calibration is
            another model's.
        OSError: reading or writing failed, or another conversion is writing the target.
        MemoryError: there is too little memory. In every case the target is as it was before.
    """
    with open_source(source) as opened:
        if os.path.exists(target) and any(os.path.samefile(f, target) for f in opened.files):
            raise ValueError(
                f"{os.path.basename(target)}: the target is the source; give another name "
                "(the original cannot be rebuilt from MXFP8)"
            )
        plan = plan_source(opened, selection)
        return convert(
            opened, target, plan, overwrite=overwrite, progress=progress, device=device,
            calibration=calibration,
        )  # fmt: skip


def plan_source(
    source: Source,
    selection: Selection = policy.DEFAULT,
    is_linear: Callable[[str], bool] | None = None,
) -> Plan:
    """`policy.plan` for a source, refusing one that is quantized already."""
    unsupported.check_unquantized(source)
    plan = policy.plan(source.tensors, selection, is_linear)
    for decision in plan.quantized:
        for key in (decision.layer + SCALE, decision.layer + MARKER):
            if key in source.tensors:
                raise FormatError(
                    f"{source.name}: {quoted(key)} stands where the scales or the marker of "
                    f"{quoted(decision.key)} would be; exclude that layer"
                )
    return plan


def convert(
    source: Source,
    target,
    plan: Plan,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    device: str | None = None,
    calibration: Calibration | None = None,
) -> Report:
    """Carry out a plan. Arguments and errors as for `convert_file`."""
    if not plan.quantized:
        raise ValueError(
            f"{source.name}: no layer to quantize: preset {plan.preset!r} and exclude keep all "
            "of them (on the command line, --dry-run lists the reasons)"
        )
    for decision in plan.quantized:
        if decision.shape[1] > _WIDEST:
            raise ValueError(
                f"{source.name}: {quoted(decision.key)} has rows of {decision.shape[1]} values; "
                f"128 rows must fit in memory, up to {_WIDEST} values are converted, so exclude it"
            )
    if calibration is not None:
        check_model(calibration, source)
    start = time.perf_counter()
    total = sum(_nbytes(d) for d in plan.decisions)
    advance = Meter(total, progress)

    markers = {d.layer: format.marker(d.shape, d.dtype) for d in plan.quantized}
    tensors = [t for d in plan.decisions for t in _stored(d, markers)]
    metadata = format.with_markers(source.metadata, markers)
    with (
        _memory_explained(source.name),
        Writer(target, tensors, metadata, overwrite, lambda: advance(0, "verify")) as writer,
    ):
        mmap.mmap(-1, _NEEDED).close()  # or an error now: threads without memory never start
        known = {d.key: calibration and calibration.of(d.layer) for d in plan.quantized}
        known = {key: moments for key, moments in known.items() if moments}
        energies = _stream(source, plan, known.keys(), writer, _device(device), advance)
        errors = {}
        for decision in plan.quantized:
            if decision.key in known:
                errors[decision.key] = _round(
                    source, decision, known[decision.key], writer, _device(device), energies,
                    functools.partial(advance, 0, decision.key),
                )  # fmt: skip
                advance(_nbytes(decision), decision.key)
        _check_energies(source, energies)
        for layer, marker in markers.items():
            writer.write(layer + MARKER, format.marker_bytes(marker))

    return Report(
        source=source.name,
        target=writer.target.name,
        preset=plan.preset,
        architecture=plan.architecture,
        bytes_before=total,
        bytes_after=sum(t.nbytes for t in writer.tensors.values()),
        seconds=time.perf_counter() - start,
        sqnr_db=total_sqnr(energies.values()),
        layers=_layer_reports(plan, writer, energies, errors),
        include=plan.selection.include,
        exclude=plan.selection.exclude,
        calibration=None if calibration is None else _about(calibration),
    )


def _about(calibration: Calibration) -> dict:
    """What a report says of a calibration."""
    rows = [moments.rows for moments in calibration.layers.values()]
    found = {"model": calibration.model, "layers": len(rows), "least_rows": min(rows, default=0)}
    return {**calibration.about, **found}


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


def _stream(
    source: Source, plan: Plan, others: Iterable[str], writer: Writer, device, advance
) -> dict[str, SqnrAccumulator]:
    """Read every tensor but `others` once and have it quantized or copied into the file."""
    energies = {decision.key: SqnrAccumulator() for decision in plan.quantized}
    workers = min(_WORKERS, cores())
    alone = functools.partial(_compute_alone, torch.get_num_threads())
    with Pipeline(workers, _BUDGET, alone) as pipeline:
        for decision in plan.decisions:
            if decision.key in others:
                continue
            for work, read, size, place in _work(_Reader(source, decision.key), decision):

                def finish(energy: SqnrAccumulator | None, key=decision.key, size=size) -> None:
                    if energy is not None:
                        energies[key].merge(energy)
                    advance(size, key)

                task = functools.partial(work, source.name, decision, writer, device)
                pipeline.submit(task, read, place, size=size, done=finish)
    return energies


def _check_energies(source: Source, energies: dict[str, SqnrAccumulator]) -> None:
    """Raise ValueError for a layer that would lose more than rounding explains."""
    for key, energy in energies.items():
        if energy.sqnr_db is not None and energy.sqnr_db < MIN_SQNR:
            raise ValueError(
                f"{source.name}: {quoted(key)} would be {energy.sqnr_db:.1f} dB from its source, "
                f"and rounding leaves at least {MIN_SQNR:.1f} dB: its values are around 2**-126 or "
                "below, too small for MXFP8; exclude this layer"
            )


def _work(reader: _Reader, decision: Decision):
    """What there is to do for a tensor.

    Yields:
        (function, what reads its data, bytes of data, first row or byte)
    """
    if not decision.quantize:
        offset = 0
        for piece in reader.pieces():
            yield _copy, lambda piece=piece: piece, len(piece), offset
            offset += len(piece)
        return
    rows, cols = decision.shape
    for first, last in layout.slabs(rows, cols, _SLAB):
        size = _nbytes(decision) * (last - first) // rows
        yield _quantize, reader.rows(first, last), size, first


def _copy(name: str, decision: Decision, writer: Writer, device, read, offset: int) -> None:
    """Write a piece of a tensor as it is."""
    writer.write(decision.key, read(), offset)


@torch.inference_mode()
def _quantize(
    name: str, decision: Decision, writer: Writer, device, read: Callable, first: int
) -> SqnrAccumulator:
    """Quantize a slab of whole tiles, straight into the file."""
    qdata, scale, signal, noise = kernels.quantize_and_measure(read().to(device))
    where = f"{name}: {quoted(decision.key)}"
    if (scale == layout.E8M0_NAN).any():
        _refuse_not_finite(where, signal, first)
    _refuse_overflow(where, qdata, scale, first)
    for part, data in ((WEIGHT, qdata), (SCALE, scale)):
        writer.write(decision.layer + part, as_bytes(data.cpu()), first * data.shape[1])
    energy = SqnrAccumulator()
    energy.add(first, signal, noise)
    return energy


def _refuse_not_finite(where: str, values: torch.Tensor, first: int) -> None:
    """Raise ValueError for the first row, counted from `first`, that is not finite."""
    bad = ~values.isfinite().all(-1)
    if bad.any():
        row = first + int(bad.nonzero()[0, 0])
        raise ValueError(
            f"{where} holds NaN or Inf in row {row}; MXFP8 has no way to store it: get the file "
            "again, or exclude this layer"
        )


def _refuse_overflow(where: str, qdata, scale, first: int) -> None:
    """Raise ValueError for the first row that would read back as infinite."""
    if not (scale >= _LARGE_SCALE).any():
        return
    bad = ~kernels.dequantize(qdata, scale, torch.float32).isfinite().all(-1)
    if bad.any():
        row = first + int(bad.nonzero()[0, 0])
        raise ValueError(
            f"{where} holds a value in row {row} that MXFP8 rounds to 2**128, beyond what float32 "
            "holds; exclude this layer"
        )


@torch.inference_mode()
def _round(source: Source, decision: Decision, moments: Moments, writer, device, energies, tick):
    """Round a whole layer for what it is given; returns (output error, that of plain rounding).

    On the CPU where the device has no float64, in which `gptq` factorizes and energies are summed.
    """
    tick()
    device = device if has_float64(device) else torch.device("cpu")
    weight = _Reader(source, decision.key).rows(0, decision.shape[0])().to(device)
    where = f"{source.name}: {quoted(decision.key)}"
    _refuse_not_finite(where, weight, 0)
    _refuse_overflow(where, *kernels.quantize(weight), 0)
    found = gptq.round_weight(
        weight, moments.second, moments.rows, name=quoted(decision.key), tick=tick
    )
    stored, error, energy = (found.qdata, found.scale), found.error, SqnrAccumulator()
    energy.add(0, *(part.cpu() for part in kernels.signal_and_noise(weight, *stored)))
    if energy.sqnr_db is not None and energy.sqnr_db < MIN_SQNR:  # `verify` would not believe it
        stored, error, energy = kernels.quantize(weight), found.nearest, SqnrAccumulator()
        energy.add(0, *(part.cpu() for part in kernels.signal_and_noise(weight, *stored)))
    for part, data in zip((WEIGHT, SCALE), stored, strict=True):
        writer.write(decision.layer + part, as_bytes(data.cpu()), 0)
    energies[decision.key] = energy
    return error, found.nearest


class _Reader:
    """Reads one tensor, in one thread at a time, and says what to do when that fails.

    A file is read by the threads that do the work: each then uses the same memory over and over,
    which spares as many page faults as the source has pages (2 us each, 0.5 s per GB, on a virtual
    machine). A model in memory is not made for threads, so the caller's thread reads that.
    """

    def __init__(self, source: Source, key: str):
        self._source = source
        self._key = key

    def rows(self, first: int, last: int) -> Callable[[], torch.Tensor]:
        """What returns these rows."""
        if hasattr(self._source, "files"):
            return functools.partial(self._rows, first, last)
        rows = self._rows(first, last)
        return lambda: rows

    def _rows(self, first: int, last: int) -> torch.Tensor:
        return self._read(self._source.rows, self._key, first, last)

    def pieces(self) -> Iterator[memoryview]:
        """The tensor's bytes, in order."""
        pieces = self._source.pieces(self._key)
        while (piece := self._read(next, pieces, None)) is not None:
            yield piece

    def _read(self, function: Callable, *arguments):
        try:
            # The lock itself, no context manager around it: an interrupt between the two would
            # leave it locked.
            with _one_at_a_time:
                return function(*arguments)
        except OSError as error:
            if error.errno is None:  # the source has said it all
                raise
            raise OSError(
                error.errno,
                f"reading {quoted(self._key)} failed ({error.strerror}); check the file "
                "and its disk",
                self._source.name,
            ) from error


_one_at_a_time = threading.Lock()


def _device(name: str | None) -> torch.device:
    """The device to quantize on."""
    if name is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found and found.type != "mps" else torch.device("cpu")  # MPS has no float8
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter: torch was built without it
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from error


def _compute_alone(threads: int) -> None:
    """Let the calling thread run torch's operations by itself.

    torch.set_num_threads also sets what threads started later begin with; another thread sets that
    back to `threads`.
    """
    with _one_at_a_time:
        torch.get_num_threads()  # a thread's first question sets it up, over what was set before
        torch.set_num_threads(1)
        other = threading.Thread(target=torch.set_num_threads, args=(threads,))
        other.start()
        other.join()


@contextlib.contextmanager
def _memory_explained(name: str):
    """Turn what torch and Python raise for want of memory into one error that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"{name}: out of memory (a conversion needs about 0.5 GB besides torch; a calibrated "
            "layer [N, K] up to 28 K K + 36 N K bytes more); close other programs and convert "
            "again, or, if it was a GPU's memory, convert on the CPU"
        ) from error


def _layer_reports(plan: Plan, writer: Writer, energies, errors) -> tuple[LayerReport, ...]:
    reports = []
    for decision in plan.decisions:
        if not decision.key.endswith(WEIGHT) or len(decision.shape) != 2:
            continue
        parts = (WEIGHT, SCALE, MARKER) if decision.quantize else (WEIGHT,)
        energy = energies.get(decision.key)
        output_error, nearest_error = errors.get(decision.key, (None, None))
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
                output_error=output_error,
                nearest_error=nearest_error,
            )
        )
    return tuple(reports)
