"""Convert a model to MXFP8: plan -> jobs -> pipeline -> writer -> report.

A plan has a decision for every tensor (`policy`). Each tensor is cut into jobs: slabs of rows to
quantize, or pieces of bytes to copy, so memory grows neither with the model nor with its largest
tensor. A slab is whole tiles of 128 rows, because the scales of such a slab are contiguous in the
file. Several threads run jobs, each from reading to writing (`container.pipeline`), on the CPU or
on the device that torch has. Layers with a calibration are rounded whole, one after the other.

Every weight is quantized from the precision in which it is stored, and everything that is not
quantized keeps its dtype and its bytes. Biases stay as they are: the "bias correction" of other
tools has the wrong sign and doubles the mean output error on its own calibration data.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch

from ... import kernels
from ...kernels import layout
from ...kernels.memory import is_out_of_memory
from .. import format
from ..container.folder import FolderWriter
from ..container.header import FormatError, quoted
from ..container.part_file import would_replace
from ..container.pipeline import Pipeline, cores
from ..container.writer import Writer
from ..format import MARKER, SCALE, WEIGHT
from ..progress import VERIFY, Meter, Progress
from ..reports.budget import Chosen
from ..reports.conversion import (
    KEPT,
    MIN_SQNR,
    MXFP8,
    LayerReport,
    Report,
    SqnrAccumulator,
    total_sqnr,
)
from ..reports.verdict import say
from ..sources.file import Source, as_bytes
from ..sources.open import open_source
from ..sources.unsupported import SCALED_FP8, Quantized, check_kind, quantized
from . import architectures, gptq, policy, text_encoders
from .calibration import Calibration, Moments, StoredMoments, check_model, has_float64
from .policy import Decision, Plan, Selection
from .stored import layer_markers, stored_tensors

_SLAB = 1 << 21  # values quantized at a time
_BUDGET = 1 << 27  # bytes of the source in memory, except that one slab always may be
_WORKERS = 16  # at most; each takes about 10 MB for scratch and results
_NEEDED = 1 << 28  # bytes of address space, mostly stacks and heaps of threads
_LARGE_SCALE = 247  # the byte of 2**120, with which codes reach 2**128
_ASSUMED = ("BF16", (32, 32))  # dtype and shape of a weight that is quantized
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
    held_out: Calibration | None = None,
) -> Report:
    """Convert a model on disk to an MXFP8 file.

    Args:
        source: path of a file, an index of several, or a folder; see `sources.open.open_source`.
        target: path; it appears whole or not at all.
        selection: which layers to quantize.
        overwrite: whether an existing target may be replaced.
        progress: called after every job, and many times within a layer that is calibrated, which
            is counted only when it is done; an exception it raises stops the conversion cleanly.
        device: where to quantize ("cpu", "cuda:1", ...); default: the accelerator that torch has,
            else the CPU. Without a calibration the bytes are the same on every device; with one
            they may differ, because sums round differently. Not run on an accelerator so far.
        calibration: statistics of the layers' inputs; layers that have them are rounded for these
            inputs (`gptq`). A layer [N, K] needs memory for about seven float32 matrices [K, K] and
            nine [N, K].
        held_out: a second calibration of the same model, on other data; the report then has the
            output errors on that data instead of on the calibration's own.

    Raises:
        FormatError: the source is damaged or already quantized.
        ValueError: a weight holds NaN or Inf, no layer would be quantized, a calibration is
            another model's, `held_out` comes without a calibration, or the device is not there.
        OSError: reading or writing failed, or another conversion is writing the target.
        MemoryError: there is too little memory. In every case the target is as it was before.
    """
    with open_source(source) as opened:
        plan = plan_source(opened, selection)
        return convert(
            opened, target, plan, overwrite=overwrite, progress=progress, device=device,
            calibration=calibration, held_out=held_out,
        )  # fmt: skip


def plan_source(
    source: Source,
    selection: Selection = policy.DEFAULT,
    is_linear: Callable[[str], bool] | None = None,
    log: bool = True,
    for_comfyui: bool = True,
) -> Plan:
    """`policy.plan` for a source: what it says of weights, and no weight that is quantized.

    Quantized layers that would be kept anyway, and quantized text encoders in a checkpoint, are
    copied.

    Raises:
        FormatError: the source is no model to quantize (`sources.unsupported`), a layer to quantize
            is quantized already, or there is a tensor where scales or markers would go; else as
            `plan`.
    """
    detected = architectures.detect(source.tensors)
    check_kind(source, recognized=detected is not None and bool(detected[0].classes))
    evidence = [*quantized(source)]
    found = {layer.layer: layer for layer in reversed(evidence)}
    assumed = {f"{layer}{WEIGHT}": _ASSUMED for layer in found}  # to ask what would become of it
    for key in assumed.keys() & source.tensors.keys():
        assumed[key] = _ASSUMED[0], source.tensors[key][1]
    plan = policy.plan({**source.tensors, **assumed}, selection, is_linear, log, for_comfyui)
    wanted = {d.layer for d in plan.quantized}
    others = wanted - found.keys()
    for layer in evidence:
        if others and layer.layer.startswith(text_encoders.PREFIXES):
            continue
        # ComfyUI reads no "scaled_fp8" of a model beside the markers that a conversion adds.
        if layer.format == SCALED_FP8:
            raise layer.error(source)
        if layer.layer in wanted:
            raise layer.error(source, ", or exclude what is quantized" if others else "")
    header = getattr(source, "header", None)  # of one file
    if evidence and header is not None:
        header.check_layers()  # what is copied must be sound
    plan = replace(
        plan,
        decisions=tuple(
            _copied(d, found[d.layer], source) if d.key in assumed else d
            for d in plan.decisions
            if d.key in source.tensors
        ),
    )
    for decision in plan.quantized:
        for key in (decision.layer + SCALE, decision.layer + MARKER):
            if key in source.tensors:
                raise FormatError(
                    f"{source.name}: {quoted(key)} has the name that the scales or the marker of "
                    f"{quoted(decision.key)} would get; exclude that layer"
                )
    return plan


def _copied(decision: Decision, layer: Quantized, source: Source) -> Decision:
    dtype, shape = source.tensors[decision.key]
    reason = decision.reason
    if decision.quantize:
        reason = str(say("quantized already as [format]", format=layer.format))
    return replace(decision, dtype=dtype, shape=tuple(shape), quantize=False, reason=reason)


def convert(
    source: Source,
    target,
    plan: Plan,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    device: str | None = None,
    calibration: Calibration | None = None,
    held_out: Calibration | None = None,
    writer: Callable[[Callable[[], None]], Writer | FolderWriter] | None = None,
    chosen: Chosen | None = None,
) -> Report:
    """Carry out a plan. Arguments and errors as for `convert_file`.

    Args:
        writer: makes what writes the target, given a function to be called now and then while it
            reads back; default: a `Writer` of one file.
        chosen: what the plan was chosen for, from `budget.choice.choose`; the report has it.
    """
    _check_plan(source, target, plan)
    check_calibrations(source, calibration, held_out)
    quantizing_on = find_device(device)
    start = time.perf_counter()
    total = sum(d.nbytes for d in plan.decisions)
    advance = Meter(total, progress)

    if writer is None:
        writer = functools.partial(_writer, source, target, plan, overwrite)
    verifying = functools.partial(advance, 0, VERIFY)
    with _memory_explained(source.name), writer(verifying) as writer:
        mmap.mmap(-1, _NEEDED).close()  # or an error now: threads without memory never start
        conversion = _Conversion(source, writer, quantizing_on, advance, calibration, held_out)
        results = conversion.run(plan)
        _check_sqnr(source, results)
        for layer, marker in layer_markers(plan).items():
            writer.write(layer + MARKER, format.marker_bytes(marker))

    return Report(
        source=source.name,
        target=writer.target.name,
        preset=plan.preset,
        architecture=plan.architecture,
        bytes_before=total,
        bytes_after=sum(t.nbytes for t in writer.tensors.values()),
        seconds=time.perf_counter() - start,
        sqnr_db=total_sqnr(result.sqnr for result in results.values()),
        layers=_layer_reports(plan, writer, results),
        include=_lines(plan.selection.include),
        exclude=_lines(plan.selection.exclude),
        calibration=_calibrated(plan, calibration, held_out),
        warnings=plan.warnings,
        chosen=chosen,
    )


def check_conversion(
    source: Source, target, plan: Plan, overwrite: bool, device: str | None, writer=None
) -> None:
    """Raise what `convert` would before it writes a byte; calibrations apart. Leaves nothing."""
    _check_plan(source, target, plan)
    find_device(device)
    writer = writer or functools.partial(_writer, source, target, plan, overwrite)
    writer(lambda: None).check()


def check_any_layer(source: Source, plan: Plan) -> None:
    """Raise ValueError for a source of which nothing would be MXFP8."""
    if not plan.quantized:
        matrices = [d for d in plan.decisions if d.key.endswith(WEIGHT) and len(d.shape) == 2]
        reasons = Counter(d.reason for d in matrices).most_common(1)
        mostly = "".join(f", {count} of {len(matrices)} because: {r}" for r, count in reasons)
        raise ValueError(
            f"{source.name}: no layer to quantize: preset {plan.preset!r}, exclude, and what "
            f"can run in MXFP8 keep all of them{mostly}. Use the original as it is (on the command "
            "line, --dry-run lists all reasons)"
        )


def check_calibrations(
    source: Source, calibration: Calibration | None, held_out: Calibration | None
) -> None:
    """Raise ValueError for calibrations that are not of the model that is to be converted."""
    if held_out is not None and calibration is None:
        raise ValueError(
            f"{source.name}: held_out measures calibrated layers; give a calibration as well"
        )
    for given in filter(None, (calibration, held_out)):
        check_model(given, source)
    if held_out is not None and _same_data(calibration, held_out):
        raise ValueError(
            f"{source.name}: held_out is the calibration itself; errors on the data that the "
            "rounding was chosen for are too low. Give a calibration on other data"
        )


def _same_data(one: Calibration, other: Calibration) -> bool:
    """Whether two calibrations have the same moments, judged by a layer of both."""
    for name, first in one.layers.items():
        second = other.of(name)
        if second is not None:
            return first.rows == second.rows and torch.equal(first.hessian, second.hessian)
    return False


def _lines(expressions: str | tuple[str, ...] | None) -> str | None:
    return "\n".join(expressions) if isinstance(expressions, tuple) else expressions


def _writer(source: Source, target, plan: Plan, overwrite: bool, tick=lambda: None) -> Writer:
    """The writer of a plan's file."""
    copied = format.header_markers(source.name, source.metadata)
    metadata = format.with_markers(source.metadata, {**copied, **layer_markers(plan)})
    return Writer(target, stored_tensors(plan), metadata, overwrite, tick)


def _check_plan(source: Source, target, plan: Plan) -> None:
    """Raise ValueError for a plan that cannot be carried out, or would replace its source."""
    if any(would_replace(target, file) for file in getattr(source, "files", ())):
        raise ValueError(
            f"{os.path.basename(target)}: writing it would replace the source; give another "
            "name (the original cannot be rebuilt from MXFP8)"
        )
    check_any_layer(source, plan)
    for decision in plan.quantized:
        if decision.shape[1] > _WIDEST:
            raise ValueError(
                f"{source.name}: {quoted(decision.key)} has rows of {decision.shape[1]} values; "
                f"rows of up to {_WIDEST} are converted, since 128 of them must fit in memory; "
                "exclude this layer"
            )


def _about(calibration: Calibration, held_out: Calibration | None = None) -> dict:
    """What a report says about a calibration, and about the one that errors are measured on."""
    rows = [moments.rows for moments in calibration.layers.values()]
    return {
        **calibration.about,
        "model": calibration.model,
        "layers": len(rows),
        "least_rows": min(rows, default=0),
        **({} if held_out is None else {"held_out": _about(held_out)}),
    }


def _calibrated(
    plan: Plan, calibration: Calibration | None, held_out: Calibration | None
) -> dict | None:
    """What a report says about the calibrations of a conversion."""
    if calibration is None:
        return None
    count = sum(calibration.of(decision.layer) is not None for decision in plan.quantized)
    return {**_about(calibration, held_out), "rounded_layers": count}


def _check_sqnr(source: Source, results: dict[str, _Result]) -> None:
    """Raise ValueError for a layer that would lose more than rounding explains."""
    for key, result in results.items():
        if _is_low(result.sqnr):
            raise ValueError(
                f"{source.name}: {quoted(key)} would have an SQNR of {result.sqnr.sqnr_db:.1f} dB, "
                f"where rounding leaves at least {MIN_SQNR:.1f} dB: its values are around 2**-126 "
                "or below, too small for MXFP8; exclude this layer"
            )


@dataclass(frozen=True)
class Job:
    """A piece of one tensor to be quantized, or copied, into the file.

    Attributes:
        decision: the tensor, and which of the two.
        begin, end: the piece's rows to quantize, or its bytes to copy.
        size: of the piece in the source, in bytes.
        data: the piece, where it was read in advance.
    """

    decision: Decision
    begin: int
    end: int
    size: int
    data: torch.Tensor | memoryview | None = None


@dataclass
class _Result:
    """SQNR of one layer and, if measured, its output error as stored and with nearest rounding."""

    sqnr: SqnrAccumulator = field(default_factory=SqnrAccumulator)
    output_error: float | None = None
    nearest_error: float | None = None


@dataclass(frozen=True)
class _Conversion:
    """Quantizes or copies every tensor of a source into a file.

    Source files are read by the threads that run the jobs: each uses the same memory over and over,
    which saves as many page faults as the source has pages (2 us each, 0.5 s per GB, on a virtual
    machine). A model in memory is not thread-safe, so its rows are read in the caller's thread, and
    so are bytes to copy, which come in order.
    """

    source: Source
    writer: Writer | FolderWriter
    device: torch.device
    advance: Meter
    calibration: Calibration | None
    held_out: Calibration | None

    def run(self, plan: Plan) -> dict[str, _Result]:
        """Quantize or copy every tensor; returns what rounding cost, by the weight's key."""
        calibration = self.calibration
        moments = {d.key: calibration and calibration.of(d.layer) for d in plan.quantized}
        results = {key: _Result() for key in moments}
        workers = min(_WORKERS, cores())
        initializer = functools.partial(_compute_alone, torch.get_num_threads())
        with Pipeline(self._work, workers, _BUDGET, initializer) as pipeline:
            for job, sqnr in pipeline.run(
                self._jobs(d for d in plan.decisions if not moments.get(d.key))
            ):
                if sqnr is not None:
                    results[job.decision.key].sqnr.merge(sqnr)
                self.advance(job.size, job.decision.key)
        for decision in plan.quantized:
            if moments[decision.key]:
                results[decision.key] = self._round(decision, moments[decision.key])
                self.advance(decision.nbytes, decision.key)
        return results

    def _jobs(self, decisions: Iterable[Decision]) -> Iterator[Job]:
        stored = hasattr(self.source, "files")
        for decision in decisions:
            if decision.quantize:
                for begin, end in layout.slabs(*decision.shape, _SLAB):
                    size = decision.nbytes * (end - begin) // decision.shape[0]
                    data = None if stored else self._rows(decision.key, begin, end)
                    yield Job(decision, begin, end, size, data)
            else:
                begin = 0
                for piece in self._pieces(decision.key):
                    end = begin + len(piece)
                    yield Job(decision, begin, end, len(piece), piece)
                    begin = end

    def _work(self, job: Job) -> SqnrAccumulator | None:
        """Run a job, in any thread."""
        if job.decision.quantize:
            return self._quantize(job)
        self.writer.write(job.decision.key, job.data, job.begin)
        return None

    @torch.inference_mode()
    def _quantize(self, job: Job) -> SqnrAccumulator:
        rows = job.data
        if rows is None:
            rows = self._rows(job.decision.key, job.begin, job.end)
        qdata, scale, signal, noise = kernels.quantize_and_measure(rows.to(self.device))
        _check_storable(self._where(job.decision), signal, qdata, scale, job.begin)
        self._write(job.decision, job.begin, qdata, scale)
        sqnr = SqnrAccumulator()
        sqnr.add(job.begin, signal, noise)
        return sqnr

    @torch.inference_mode()
    def _round(self, decision: Decision, moments: Moments | StoredMoments) -> _Result:
        """Round a whole layer for its inputs.

        On the CPU where the device has no float64, which `gptq` factorizes and sums in.
        """
        tick = functools.partial(self.advance, 0, decision.key)
        tick()
        device = self.device if has_float64(self.device) else torch.device("cpu")
        weight = self._rows(decision.key, 0, decision.shape[0]).to(device)
        _check_storable(self._where(decision), weight, *kernels.quantize(weight), 0)
        rounded = gptq.round_weight(
            weight, moments.hessian, moments.rows, name=quoted(decision.key), tick=tick
        )
        stored, error = (rounded.qdata, rounded.scale), rounded.error
        sqnr = _sqnr_of(weight, *stored)
        if _is_low(sqnr):  # `verify` would take it for damage
            stored, error = kernels.quantize(weight), rounded.nearest
            sqnr = _sqnr_of(weight, *stored)
        self._write(decision, 0, *stored)
        if self.held_out is None:
            return _Result(sqnr, error, rounded.nearest)
        other = self.held_out.of(decision.layer)
        if other is None:
            return _Result(sqnr)
        hessian = other.hessian
        return _Result(
            sqnr,
            gptq.output_error(weight, *stored, hessian, tick),
            gptq.output_error(weight, *kernels.quantize(weight), hessian, tick),
        )

    def _write(self, decision: Decision, first_row: int, qdata, scale) -> None:
        for part, data in ((WEIGHT, qdata), (SCALE, scale)):
            self.writer.write(
                decision.layer + part, as_bytes(data.cpu()), first_row * data.shape[1]
            )

    def _rows(self, key: str, first: int, last: int) -> torch.Tensor:
        with _one_at_a_time:
            return self.source.rows(key, first, last)

    def _pieces(self, key: str) -> Iterator[memoryview]:
        pieces = self.source.pieces(key)
        while True:
            with _one_at_a_time:
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def _where(self, decision: Decision) -> str:
        return f"{self.source.name}: {quoted(decision.key)}"


# Sources are not thread-safe. This is taken directly, not in a context manager of ours: an
# interrupt within that could leave it locked.
_one_at_a_time = threading.Lock()


def _is_low(sqnr: SqnrAccumulator) -> bool:
    return sqnr.sqnr_db is not None and sqnr.sqnr_db < MIN_SQNR


def _sqnr_of(weight: torch.Tensor, qdata, scale) -> SqnrAccumulator:
    sqnr = SqnrAccumulator()
    sqnr.add(0, *(part.cpu() for part in kernels.signal_and_noise(weight, qdata, scale)))
    return sqnr


def _check_storable(where: str, values: torch.Tensor, qdata, scale, first: int) -> None:
    """Raise ValueError for the first row, counted from `first`, that MXFP8 cannot hold.

    Args:
        values: [N, any], not finite where the weight is not.
    """
    if not (scale >= _LARGE_SCALE).any():  # that of NaN and Inf is the largest
        return
    stored = kernels.dequantize(qdata, scale, torch.float32)
    for matrix, problem in (
        (values, "NaN or Inf in row {}; MXFP8 cannot store it: get the file again, or"),
        (stored, "a value in row {} that MXFP8 rounds to 2**128, beyond what float32 holds;"),
    ):
        bad = ~matrix.isfinite().all(-1)
        if bad.any():
            row = first + int(bad.nonzero()[0, 0])
            raise ValueError(f"{where} holds {problem.format(row)} exclude this layer")


def find_device(name: str | None) -> torch.device:
    """The device of this name, else the accelerator that has float8, else the CPU.

    Raises:
        ValueError: torch has no such device here, or it has no float8.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and not kernels.has_float8(accelerator):
        accelerator = None
    if name is None:
        return accelerator or torch.device("cpu")
    counts = {} if accelerator is None else {accelerator.type: torch.accelerator.device_count()}
    with contextlib.suppress(RuntimeError):  # from torch, for what is no device's name
        device = torch.device(name)
        if (device.index or 0) < {"cpu": 1, **counts}.get(device.type, 0):
            return device
    found = ["cpu", *(f"{kind}:{i}" for kind, count in counts.items() for i in range(count))]
    raise ValueError(
        f"device {name!r} cannot be used here: torch {torch.__version__} finds only "
        f"{', '.join(found)}"
    )


def _compute_alone(threads: int) -> None:
    """Have the calling thread run torch's operations without further threads.

    torch.set_num_threads also sets the count with which later threads begin; another thread sets
    that back to `threads`.
    """
    with _one_at_a_time:
        torch.get_num_threads()  # the first call in a thread overwrites what was set before
        torch.set_num_threads(1)
        other = threading.Thread(target=torch.set_num_threads, args=(threads,))
        other.start()
        other.join()


@contextlib.contextmanager
def _memory_explained(name: str):
    """Turn all out-of-memory errors of torch and Python into one that says what to do."""
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


def _layer_reports(
    plan: Plan, writer: Writer, results: dict[str, _Result]
) -> tuple[LayerReport, ...]:
    reports = []
    for decision in plan.decisions:
        if not decision.key.endswith(WEIGHT) or len(decision.shape) != 2:
            continue
        parts = (WEIGHT, SCALE, MARKER) if decision.quantize else (WEIGHT,)
        result = results.get(decision.key, _Result())
        reports.append(
            LayerReport(
                name=decision.layer,
                decision=MXFP8 if decision.quantize else KEPT,
                reason=decision.reason,
                dtype=decision.dtype,
                shape=decision.shape,
                bytes_before=decision.nbytes,
                bytes_after=sum(writer.tensors[decision.layer + p].nbytes for p in parts),
                sqnr_db=result.sqnr.sqnr_db,
                worst_block=result.sqnr.worst,
                output_error=result.output_error,
                nearest_error=result.nearest_error,
            )
        )
    return tuple(reports)
