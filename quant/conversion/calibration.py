"""What the layers of a model are given, as far as calibrated rounding needs it (`gptq`).

For inputs X [n, K] of a linear layer that is X.T X / n, the second moments, [K, K]; each channel's
mean and largest magnitude are noted beside them. They are gathered while the model runs on whatever
its user thinks typical, and kept in a safetensors file that belongs to one model: its first rows
are hashed with the layers' names and shapes, and another model's calibration is refused.

A model's moments are larger than its weights (Z-Image: 22 GB), so a file's are read layer by layer,
each time they are asked for. Files of version 1, without means and magnitudes, are read too: what
took hours to gather stays good, and rounding needs the second moments alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..container.header import quoted
from ..container.writer import Writer
from ..format import WEIGHT, FormatError, TensorInfo, bare, read_header
from ..progress import VERIFY, Meter, Progress
from ..sources.file import FileSource, as_bytes

SECOND, MEAN, AMAX = ".second", ".mean", ".amax"
_METADATA = "mxfp8_calibration"
_VERSION = 2
_SECOND_ONLY = 1  # the version before
_ROWS = 1 << 12  # of inputs, made float32 at once


@dataclass(frozen=True)
class Moments:
    """Of one layer's inputs.

    Attributes:
        second: X.T X / n, float32 [K, K]; rows: n.
        mean, amax: of each channel, float32 [K]; None in a calibration of version 1.
    """

    second: torch.Tensor
    rows: int
    mean: torch.Tensor | None = None
    amax: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """K."""
        return self.second.shape[0]


@dataclass(frozen=True)
class StoredMoments:
    """`Moments` in a calibration file, which is open only while they are read."""

    source: FileSource
    name: str
    rows: int

    @property
    def width(self) -> int:
        return self.source.tensors[self.name + SECOND][1][0]

    @property
    def second(self) -> torch.Tensor:
        return self._read(SECOND)

    @property
    def mean(self) -> torch.Tensor | None:
        return self._read(MEAN)

    @property
    def amax(self) -> torch.Tensor | None:
        return self._read(AMAX)

    def _read(self, part: str) -> torch.Tensor | None:
        key = self.name + part
        if key not in self.source.tensors:
            return None
        with self.source as source:
            return source.rows(key, 0, self.width)


@dataclass(frozen=True)
class Calibration:
    """Moments by layer, under names without the prefix of a diffusion model.

    Attributes:
        model: fingerprint of the model that was run.
        about: how it was run, in what JSON has; empty where nobody said, as in older files.
    """

    layers: Mapping[str, Moments | StoredMoments]
    model: str
    about: Mapping[str, object] = field(default_factory=dict)

    def of(self, layer: str) -> Moments | StoredMoments | None:
        """The moments of a layer, whatever prefix its name has here."""
        return self.layers.get(bare(layer))

    def save(
        self,
        path: str | os.PathLike,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Write a safetensors file, whole or not at all, layer by layer.

        Args:
            progress: called after every layer, and while what was written is read back; an
                exception it raises leaves no file.

        Raises:
            OSError: as `writer.Writer`.
        """
        old = any(m.mean is None for m in self.layers.values())  # read from a file of version 1
        parts = (SECOND,) if old else (SECOND, MEAN, AMAX)
        tensors = [
            (name + part, "F32", (moments.width,) * (2 if part == SECOND else 1))
            for name, moments in self.layers.items()
            for part in parts
        ]
        metadata = {
            "version": _SECOND_ONLY if old else _VERSION,
            "model": self.model,
            "rows": {name: moments.rows for name, moments in self.layers.items()},
            "about": dict(self.about),
        }
        with Writer(
            path, tensors, {_METADATA: json.dumps(metadata)}, overwrite, lambda: advance(0, VERIFY)
        ) as writer:
            advance = Meter(_size(writer.tensors.values()), progress)
            for name, moments in self.layers.items():
                for part in parts:
                    values = getattr(moments, part.removeprefix("."))
                    writer.write(name + part, as_bytes(values.contiguous().cpu()))
                advance(_size(writer.tensors[name + part] for part in parts), name)


def _size(tensors: Iterable[TensorInfo]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def load(path: str | os.PathLike, progress: Progress | None = None) -> Calibration:
    """Check what `Calibration.save` wrote, every byte; it is read again layer by layer.

    Args:
        progress: called after every layer; what it raises passes through.

    Raises:
        FormatError: the file is damaged, or no calibration of a version known here.
        OSError: it cannot be read.
    """
    header = read_header(path)
    try:
        metadata = json.loads(header.metadata[_METADATA])
        rows, about = dict(metadata["rows"]), dict(metadata.get("about", {}))
        model, version = str(metadata["model"]), metadata["version"]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{header.path.name} is no calibration file") from error
    if version not in (_SECOND_ONLY, _VERSION):
        raise FormatError(
            f"{header.path.name} is a calibration of version {quoted(version)}; this pack reads "
            f"{_SECOND_ONLY} and {_VERSION}, so update it, or calibrate again"
        )
    parts = (SECOND,) if version == _SECOND_ONLY else (SECOND, MEAN, AMAX)
    advance = Meter(_size(header.tensors.values()), progress)
    with FileSource(path) as source:
        for name, count in rows.items():
            _check_layer(source, name, count, parts)
            advance(_size(header.tensors[name + part] for part in parts), name)
    layers = {name: StoredMoments(source, name, count) for name, count in rows.items()}
    return Calibration(layers, model, about)


def _check_layer(source: FileSource, name: str, count, parts: Iterable[str]) -> None:
    """Raise FormatError where a layer's moments are not what `save` writes."""
    dtype, shape = source.tensors.get(name + SECOND, (None, ()))
    if dtype != "F32" or len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise FormatError(
            f"{source.name}: second moments of {quoted(name)} are {dtype} {list(shape)}; "
            "they must be a square F32 matrix"
        )
    finite = positive = True
    for part in parts:
        found = source.tensors.get(name + part, (None, ()))
        if part != SECOND and found != ("F32", shape[:1]):
            raise FormatError(
                f"{source.name}: {quoted(name + part)} is {found[0]} {list(found[1])}; it must be "
                f"F32 {[shape[0]]}, one value for each column of the second moments"
            )
        values = source.rows(name + part, 0, shape[0])
        finite = finite and bool(values.isfinite().all())
        if part == SECOND:
            positive = not (values.diagonal() < 0).any()
    if not isinstance(count, int) or count < 1 or not finite:
        raise FormatError(
            f"{source.name}: second moments of {quoted(name)} {list(shape)} hold NaN or "
            f"Inf, or are of {quoted(count)} rows; calibrate again"
        )
    if not positive:
        raise FormatError(
            f"{source.name}: second moments of {quoted(name)} {list(shape)} have negative values "
            "on their diagonal, where squares are; calibrate again"
        )


def fingerprint(weights: Iterable[tuple[str, tuple[int, ...], torch.Tensor]]) -> str:
    """A hash of a model's layers: names, shapes, and their first rows in bfloat16.

    Args:
        weights: (name, shape, first row) of each.
    """
    digest = hashlib.sha256()
    for name, shape, row in sorted(weights, key=lambda weight: bare(weight[0])):
        digest.update(json.dumps([bare(name), list(shape)]).encode())
        digest.update(bytes(as_bytes(row.detach().cpu().bfloat16().contiguous())))
    return digest.hexdigest()


def check_model(calibration: Calibration, source) -> None:
    """Check that a calibration belongs to the model that is to be converted.

    Raises:
        ValueError: it is another model's.
    """
    names = {bare(key.removesuffix(WEIGHT)): key for key in source.tensors if key.endswith(WEIGHT)}
    missing = next((name for name in calibration.layers if name not in names), None)
    if missing is not None:
        raise ValueError(
            f"{source.name}: the calibration has a layer {quoted(missing)}, which this model "
            "lacks; it belongs to another model"
        )
    for name, moments in calibration.layers.items():
        shape = list(source.tensors[names[name]][1])
        if [moments.width] != shape[-1:]:
            raise ValueError(
                f"{source.name}: the calibration has second moments "
                f"{[moments.width] * 2} for {quoted(names[name])} {shape}; they must be "
                f"{shape[-1:] * 2}, so it belongs to another model"
            )
    keys = [names[name] for name in calibration.layers]
    found = fingerprint((k.removesuffix(WEIGHT), source.tensors[k][1], source.rows(k, 0, 1)[0])
                        for k in keys)  # fmt: skip
    if found != calibration.model:
        raise ValueError(
            f"{source.name}: the calibration was made with other weights; calibrate this model"
        )


def nbytes(width: int) -> int:
    """Memory in which the moments of a layer with `width` inputs are added up."""
    return 4 * width * (width + 3)


class HessianAccumulator:
    """Adds up the moments of one layer's inputs, until they are taken.

    Attributes:
        rows: so far; dropped: those that held NaN or Inf, and are not among them.
        closed: whether they were taken, and nothing is added any more.
    """

    def __init__(self) -> None:
        self.rows = self.dropped = 0
        self.closed = False
        self._second: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None  # float64: of millions of rows
        self._amax: torch.Tensor | None = None

    @property
    def given(self) -> str:
        """What the layer was given, where `take` has nothing to return."""
        if self.rows:
            return "values whose squares float32 cannot hold"
        return "nothing finite" if self.dropped else "nothing"

    def reserve(self, width: int, device: torch.device) -> None:
        """Take the memory now, not with the first input, when others may have taken it."""
        self._second = torch.zeros(width, width, device=device)
        precise = torch.float64 if has_float64(device) else torch.float32
        self._sum = torch.zeros(width, device=device, dtype=precise)
        self._amax = torch.zeros(width, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Account for inputs [..., K]."""
        if self.closed:
            return
        K = x.shape[-1]
        if self._second is None:
            self.reserve(K, x.device)
        for part in x.detach().reshape(-1, K).split(_ROWS):
            flat = part.to(self._second.device, torch.float32)
            finite = flat.isfinite().all(-1)
            if not finite.all():
                flat = flat[finite]
            self.rows += len(flat)
            self.dropped += len(part) - len(flat)
            if len(flat):
                self._second.addmm_(flat.t(), flat)
                self._sum += flat.sum(0)
                torch.maximum(self._amax, flat.abs().amax(0), out=self._amax)

    def take(self) -> Moments | None:
        """The moments, on the CPU, and close; None without rows, or where squares overflowed."""
        found = None
        if self.rows and not self.closed and self._second.isfinite().all():
            mean = (self._sum / self.rows).float()
            found = Moments(
                self._second.div_(self.rows).cpu(), self.rows, mean.cpu(), self._amax.cpu()
            )
        self.drop()
        return found

    def drop(self) -> None:
        """Free the memory and close."""
        self._second = self._sum = self._amax = None
        self.closed = True


def has_float64(device: torch.device) -> bool:
    """Apple's GPUs have none, nor have some of Intel's."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


@contextlib.contextmanager
def watch(
    module: nn.Module, select: Callable[[str, nn.Module], bool]
) -> Iterator[dict[str, HessianAccumulator]]:
    """Within the context, gather what the linear layers of a module are given.

    Args:
        select: (name, layer) -> whether to gather for it.
    """
    sums: dict[str, HessianAccumulator] = {}
    hooks = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and select(name, layer):
            found = sums[name] = HessianAccumulator()
            hooks.append(layer.register_forward_pre_hook(_noting(found), with_kwargs=True))
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def _noting(found: HessianAccumulator) -> Callable:
    def note(layer: nn.Module, args: tuple, options: dict) -> None:
        found.add(args[0] if args else options["input"])

    return note


@torch.no_grad()
def calibrate(
    module: nn.Module,
    batches: Iterable,
    run: Callable = lambda module, batch: module(**batch),
    select: Callable[[str, nn.Module], bool] = lambda name, layer: True,
) -> Calibration:
    """Run a torch module on batches and gather what its linear layers are given.

    All layers' sums are in memory at once, on the module's device: 4 K (K + 3) bytes for a layer of
    K inputs. Where that is too much, `select` fewer: a conversion rounds the others to nearest.

    Args:
        module: in eval mode, as it will be used.
        run: (module, batch), what a batch is run by; default: as keyword arguments.
        select: (name, layer) -> whether to gather for it.

    Raises:
        ValueError: the module is in training mode, or no layer was given anything, or only what is
            not finite, or has no finite squares.
    """
    if module.training:
        raise ValueError(
            f"this {type(module).__name__} is in training mode, in which layers may be given what "
            "they never are in use (dropout); call its eval() first"
        )
    with watch(module, select) as sums:
        for batch in batches:
            run(module, batch)
    found = {name: sum.take() for name, sum in sums.items()}
    layers = {name: moments for name, moments in found.items() if moments}
    if not layers:
        raise ValueError(
            "calibration is empty: no linear layer was given a finite input with finite squares"
        )
    weights = dict(module.named_modules())
    return Calibration(
        layers, fingerprint((n, weights[n].weight.shape, weights[n].weight[0]) for n in layers)
    )
