"""Several models converted one after another: files, folders and patterns, to be run again.

A batch that was interrupted goes on where it stopped, because a target that is a finished
conversion of its source is skipped. A target appears whole or not at all, so what is asked is only
whose it is: it must have the tensors of the plan, and the bits of every kept tensor's beginning and
of every layer's first rows. A file with the right name and layout may be of another fine-tune; its
codes differ. Rejected: a journal beside the files, which is wrong as soon as one of them is
replaced, and comparing times, which copying changes.

Calibrations have no place here: each belongs to one model.
"""

from __future__ import annotations

import errno
import glob
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ... import kernels
from ...kernels import layout
from ...kernels.memory import is_out_of_memory
from ..container.header import SUFFIXES, FormatError, one_line, plain
from ..container.writer import new_folders
from ..format import SCALE, WEIGHT
from ..progress import Meter, Progress
from ..reports import document
from ..reports.units import format_size
from ..sources import shards
from ..sources.file import FileSource, StoredSource, as_bytes
from ..sources.open import files_of, open_source
from ..sources.unsupported import NothingToConvertError
from . import policy
from .convert import check_conversion, convert, plan_source
from .policy import Plan, Selection
from .stored import stored_bytes, stored_tensors

KEY = "mxfp8_batch"
CONVERTED, SKIPPED, FAILED, PLANNED = "converted", "skipped", "failed", "planned"
FINISHED = "is there already, converted from this source"


@dataclass(frozen=True)
class Job:
    """A model to convert: a path that `sources.open` opens, and the file to write."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        source, target: paths as in the job.
        state: "converted", "skipped", "failed", or, of a dry run, "planned"; reason: why, if it
            was skipped or failed.
        bytes_before, bytes_after, seconds, sqnr_db: as in `reports.conversion.Report`, of a model
            that was converted; the first two also of a planned one; None otherwise.
        warnings: what the user should know of how its layers were chosen.
    """

    source: str
    target: str
    state: str
    reason: str = ""
    bytes_before: int | None = None
    bytes_after: int | None = None
    seconds: float | None = None
    sqnr_db: float | None = None
    warnings: tuple[str, ...] = ()

    def line(self) -> str:
        """For a terminal or a node; warnings are apart."""
        name = plain(Path(self.source).name)
        if self.state in (SKIPPED, FAILED):
            return f"{name}: {self.state}: {self.reason}"
        parts = [f"{format_size(self.bytes_before)} -> {format_size(self.bytes_after)}"]
        if self.seconds is not None:
            parts[0] += f" in {self.seconds:.1f} s"
        if self.sqnr_db is not None:
            parts.append(f"SQNR {self.sqnr_db:.2f} dB")
        return f"{name} -> {plain(Path(self.target).name)}: {', '.join(parts)}"


@dataclass(frozen=True)
class Batch:
    """The outcomes of a batch, in the order of its jobs."""

    outcomes: tuple[Outcome, ...]

    def of(self, state: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.state == state]

    def total(self) -> str:
        """How many models became what, and what was saved, in a line."""
        done = self.of(CONVERTED) or self.of(PLANNED)
        states = (CONVERTED, PLANNED, SKIPPED, FAILED)
        counts = [f"{len(self.of(state))} {state}" for state in states if self.of(state)]
        sizes = [
            format_size(sum(getattr(outcome, name) for outcome in done))
            for name in ("bytes_before", "bytes_after")
        ]
        return ", ".join(counts or ["no model"]) + (f"; {' -> '.join(sizes)}" if done else "")

    def summary(self) -> str:
        """A line for every model and one for all of them."""
        lines = []
        for outcome in self.outcomes:
            lines += [outcome.line(), *(f"  WARNING: {warning}" for warning in outcome.warnings)]
        return "\n".join([*lines, self.total()])

    def to_json(self) -> str:
        return document.write(KEY, {"models": [asdict(outcome) for outcome in self.outcomes]})


def find_jobs(
    sources: Iterable[str | os.PathLike],
    folder: str | os.PathLike | None = None,
    suffix: str = "mxfp8",
) -> list[Job]:
    """The models that paths stand for, and where each one's conversion goes.

    A path is a file; a folder that is one model, as `sources.open` reads it; a folder of models,
    which is searched with its subfolders; or, if nothing has that name, a pattern (`*`, `?`,
    `[...]`, and `**` for any folders). Files are left out that are the targets of others.

    Args:
        folder: where targets go, in the same subfolders; default: beside their sources.
        suffix: a target's name is its source's with "-suffix".

    Raises:
        FileNotFoundError: a path leads to nothing.
        ValueError: a path leads to no model, or two models have the same target.
    """
    targets: dict[Path, Path] = {}  # by source
    for given in sources:
        models = [*_models(Path(given))]
        if not models:
            raise ValueError(f"{given}: no safetensors model is there")
        for path, root in models:
            place = path.parent if folder is None else folder / path.parent.relative_to(root)
            name = f"{shards.model_name(path.name)}-{suffix}.safetensors"
            targets.setdefault(path, Path(place, name))
    written = {os.path.abspath(target) for target in targets.values()}
    jobs = [
        Job(path, target)
        for path, target in targets.items()
        if os.path.abspath(path) not in written
    ]
    source_of: dict[Path, Path] = {}
    for job in jobs:
        other = source_of.setdefault(job.target, job.source)
        if other is not job.source:
            raise ValueError(
                f"{other} and {job.source} would both become {job.target}; rename one of them, or "
                "convert it on its own"
            )
    return jobs


def _models(given: Path) -> Iterator[tuple[Path, Path]]:
    """(model, the folder that its subfolders are counted from) of each that a path stands for."""
    if given.name in ("", ".."):  # a model is called as its folder
        given = given.resolve()
    if given.is_dir() and not _is_model(given):
        yield from ((path, given) for path in _search(given, set()))
    elif given.exists():
        yield given, given.parent
    elif glob.has_magic(str(given)):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), given.parts))
        for path in sorted(map(Path, glob.glob(str(given), recursive=True))):
            if _is_model(path) if path.is_dir() else _is_model_file(path.name):
                yield path, root
    else:
        raise FileNotFoundError(errno.ENOENT, "there is no such file or folder", str(given))


def _search(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """The models in a folder that is none itself, and in its subfolders, links included."""
    if folder.resolve() in seen:  # a link to a folder around it
        return
    seen.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not _is_model(path):
            yield from _search(path, seen)
        elif path.is_dir() or _is_model_file(path.name):
            yield path


def _is_model(folder: Path) -> bool:
    """Whether a folder is one model, in parts or a pipeline, and not a folder of models.

    One that may not be read counts as a model, so that it is told of and the others are converted.
    """
    try:
        if (folder / "model_index.json").is_file():
            return True
        names = [path.name for path in folder.iterdir()]
    except PermissionError:
        return True
    whole = [name for name in names if _is_model_file(name)]
    return len(whole) == 1 and shards.INDEX.search(whole[0]) is not None


def _is_model_file(name: str) -> bool:
    """Whether a file's name is that of a model or of an index, and not of one part of a model."""
    if name.startswith("._"):  # what macOS keeps beside a file on foreign disks
        return False
    whole = name.lower().endswith(SUFFIXES) and not shards.is_shard(name)
    return whole or shards.INDEX.search(name) is not None


def convert_all(
    jobs: Iterable[Job],
    selection: Selection = policy.DEFAULT,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    device: str | None = None,
    dry_run: bool = False,
    tell: Callable[[Outcome], None] = lambda outcome: None,
) -> Batch:
    """Convert models one after another.

    Skipped are models whose target is a finished conversion of them, and files that are sound but
    no model to convert: a LoRA, or a model that is quantized. Another error of a file, or a lack of
    memory for it, is the outcome of its model, and the next one follows.

    Args:
        overwrite: whether a target that is another file may be replaced.
        progress: called with the bytes of the whole batch that are done; what it raises ends the
            batch.
        device: as for `convert.convert_file`.
        dry_run: whether to make all checks and write nothing.
        tell: called with every outcome as soon as it is there.
    """
    jobs = [*jobs]
    sizes = [_size(job.source) for job in jobs]
    outcomes, begin = [], 0
    for number, (job, size) in enumerate(zip(jobs, sizes, strict=True), 1):
        label = f"{number} of {len(jobs)}, {job.source.name}"
        part = _part(progress, begin, size, sum(sizes), label)
        outcomes.append(_outcome(job, selection, overwrite, part, device, dry_run))
        begin += size
        if progress is not None:
            progress(begin, sum(sizes), label)
        tell(outcomes[-1])
    return Batch(tuple(outcomes))


def _size(path: Path) -> int:
    """Bytes of a model's files; 0 if they cannot be found, which converting it will say."""
    try:
        return sum(file.stat().st_size for file in files_of(path))
    except (OSError, ValueError):
        return 0


def _part(progress: Progress | None, begin: int, size: int, total: int, label: str):
    """The progress of one model as that of the batch."""
    if progress is None:
        return None

    def part(done: int, whole: int, key: str) -> None:
        progress(begin + size * min(done, whole) // max(whole, 1), total, f"{label}: {key}")

    return part


def _outcome(
    job: Job,
    selection: Selection,
    overwrite: bool,
    progress: Progress | None,
    device: str | None,
    dry_run: bool,
) -> Outcome:
    paths = str(job.source), str(job.target)
    try:
        with open_source(job.source) as source:
            plan = plan_source(source, selection)
            if is_finished(source, job.target, plan, progress):
                return Outcome(*paths, SKIPPED, FINISHED)
            if not plan.quantized:
                return Outcome(*paths, SKIPPED, "no layer of it would be MXFP8")
            if dry_run:
                place = next(folder for folder in job.target.parents if folder.exists())
                replace = overwrite or place != job.target.parent  # what has that name there stays
                check_conversion(source, place / job.target.name, plan, replace, device)
                before, after = sum(d.nbytes for d in plan.decisions), stored_bytes(plan)
                return Outcome(*paths, PLANNED, "", before, after, warnings=plan.warnings)
            with new_folders(job.target.parent):
                report = convert(
                    source, job.target, plan, overwrite=overwrite, progress=progress, device=device
                )
    except FileExistsError:
        reason = f"{job.target.name} exists and is not this conversion"
        return Outcome(*paths, FAILED, f"{reason}; overwrite replaces it")
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):  # torch's, of a GPU
            raise
        state = SKIPPED if isinstance(error, NothingToConvertError) else FAILED
        return Outcome(*paths, state, _said(error, job.source.name))
    return Outcome(
        *paths, CONVERTED, "", report.bytes_before, report.bytes_after, report.seconds,
        report.sqnr_db, report.warnings,
    )  # fmt: skip


def _said(error: Exception, name: str) -> str:
    """An error in a line, without the name of the model that it stands beside."""
    if isinstance(error, OSError) and error.strerror:
        return one_line(f"{error.filename}: {error.strerror}") if error.filename else error.strerror
    return one_line(str(error).removeprefix(f"{name}: "))


def is_finished(
    source: StoredSource, target: Path, plan: Plan, progress: Progress | None = None
) -> bool:
    """Whether a file is what `convert` makes of a source by a plan, without a calibration.

    Compared are all tensors' dtypes and shapes, the first rows of every quantized layer and the
    beginning of every other tensor, bit for bit.
    """
    if not target.is_file():
        return False
    try:
        with FileSource(target) as stored:
            wanted = {key: (dtype, shape) for key, dtype, shape in stored_tensors(plan)}
            planned = {decision.layer for decision in plan.quantized}
            if stored.tensors != wanted or not planned <= stored.header.layers.keys():
                return False
            tick = Meter(len(plan.decisions), progress and (lambda *_: progress(0, 1, "compare")))
            return all(_same(source, stored, decision, tick) for decision in plan.decisions)
    except (FormatError, OSError):
        return False


def _same(source: StoredSource, stored: FileSource, decision, tick: Meter) -> bool:
    """Whether a tensor's beginning is stored as a conversion stores it."""
    tick(1, decision.key)
    if not decision.quantize:
        mine, theirs = (next(x.pieces(decision.key), b"") for x in (source, stored))
        return bytes(mine) == bytes(theirs)
    rows = min(decision.shape[0], layout.TILE_ROWS)
    qdata, scale = kernels.quantize(source.rows(decision.key, 0, rows))
    for key, part in ((decision.layer + WEIGHT, qdata[:rows]), (decision.layer + SCALE, scale)):
        if bytes(as_bytes(part)) != bytes(as_bytes(stored.rows(key, 0, part.shape[0]))):
            return False
    return True
