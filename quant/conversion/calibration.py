"""Statistics of the inputs of a model's layers, for calibrated rounding (`gptq`).

For the inputs X [n, K] of a linear layer rounding needs the Hessian X.T X / n, [K, K]; each
channel's mean and largest magnitude are kept beside it. They are gathered while the model runs on
data that its user finds typical, and kept in a safetensors file that belongs to one model: its
layers' names, shapes and first rows are hashed, and another model's calibration is refused.

Hessians are larger than the weights (Z-Image: 22 GB), so those in a file are read layer by layer,
each time they are asked for. Files of versions 1 and 2, which call the Hessian `X.second`, are read
too; version 1 has no means and magnitudes, and rounding needs the Hessian alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from ..budget.sensitivity import KEY as _SENSITIVITY
from ..budget.sensitivity import Sensitivity, check_layers
from ..container.header import quoted
from ..container.writer import Writer
from ..format import WEIGHT, FormatError, TensorInfo, bare
from ..progress import VERIFY, Meter, Progress
from ..sources.file import FileSource, Source, as_bytes

HESSIAN, MEAN, AMAX = ".hessian", ".mean", ".amax"
_PARTS = {HESSIAN: "hessian", MEAN: "mean", AMAX: "amax"}  # of a layer in a file -> in `Moments`
_OLD_HESSIAN = ".second"  # in files of versions 1 and 2
_METADATA = "mxfp8_calibration"
_VERSION = 3
_ROWS = 1 << 12  # of inputs that become float32 at once


@dataclass(frozen=True)
class Moments:
    """Statistics of one layer's inputs X.

    Attributes:
        hessian: X.T X / n, float32 [K, K]; rows: n.
        mean, amax: each channel's mean and largest magnitude, float32 [K]; None if unknown.
    """

    hessian: torch.Tensor
    rows: int
    mean: torch.Tensor | None = None
    amax: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """K."""
        return self.hessian.shape[0]


@dataclass(frozen=True)
class StoredMoments:
    """`Moments` in a calibration file, which is open only while they are read."""

    source: FileSource
    name: str
    rows: int

    @property
    def width(self) -> int:
        return self.source.tensors[_hessian_key(self.source, self.name)][1][0]

    @property
    def hessian(self) -> torch.Tensor:
        return self._read(_hessian_key(self.source, self.name))

    @property
    def mean(self) -> torch.Tensor | None:
        return self._read(self.name + MEAN)

    @property
    def amax(self) -> torch.Tensor | None:
        return self._read(self.name + AMAX)

    def _read(self, key: str) -> torch.Tensor | None:
        if key not in self.source.tensors:
            return None
        with self.source as source:
            return source.rows(key, 0, self.width)


def _hessian_key(source: FileSource, name: str) -> str:
    return name + (_OLD_HESSIAN if name + _OLD_HESSIAN in source.tensors else HESSIAN)


@dataclass(frozen=True)
class Calibration:
    """Statistics of the inputs of a model's layers.

    Attributes:
        layers: by name; from ComfyUI without the prefix of a diffusion model.
        model: fingerprint of the model that was run.
        about: how it was run, as JSON types; empty if unknown, as in older files.
        sensitivity: what rounding each layer does to the model's output; None if not measured.
    """

    layers: Mapping[str, Moments | StoredMoments]
    model: str
    about: Mapping[str, object] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None

    def of(self, layer: str) -> Moments | StoredMoments | None:
        """The statistics of a layer, whose name may have a prefix, here and in the file."""
        return self.layers.get(layer) or self._by_bare_name.get(bare(layer))

    @cached_property
    def _by_bare_name(self) -> dict[str, Moments | StoredMoments]:
        return {bare(name): moments for name, moments in self.layers.items()}

    def save(
        self,
        path: str | os.PathLike,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Write a safetensors file, whole or not at all, layer by layer.

        Args:
            progress: called after every layer, and while the file is read back; if it raises, no
                file is left.

        Raises:
            OSError: as `writer.Writer`.
        """
        # Calibrations from version 1 files have only Hessians.
        old = any(moments.mean is None for moments in self.layers.values())
        parts = {_OLD_HESSIAN: "hessian"} if old else _PARTS
        tensors = [
            (name + part, "F32", (moments.width,) * (2 if kind == "hessian" else 1))
            for name, moments in self.layers.items()
            for part, kind in parts.items()
        ]
        metadata = {
            "version": 1 if old else _VERSION,
            "model": self.model,
            "rows": {name: moments.rows for name, moments in self.layers.items()},
            "about": dict(self.about),
        }
        texts = {_METADATA: json.dumps(metadata)}
        if self.sensitivity is not None:  # beside it: earlier versions of the pack read the rest
            texts[_SENSITIVITY] = self.sensitivity.to_json()
        with Writer(path, tensors, texts, overwrite, lambda: advance(0, VERIFY)) as writer:
            advance = Meter(_size(writer.tensors.values()), progress)
            for name, moments in self.layers.items():
                for part, kind in parts.items():
                    values = getattr(moments, kind)
                    writer.write(name + part, as_bytes(values.contiguous().cpu()))
                advance(_size(writer.tensors[name + part] for part in parts), name)


def _size(tensors: Iterable[TensorInfo]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def load(path: str | os.PathLike, progress: Progress | None = None) -> Calibration:
    """Open a calibration file, after checking every byte of it; layers are read when asked for.

    Args:
        progress: called after every layer; what it raises passes through.

    Raises:
        FormatError: the file is damaged, or not a calibration of a version that is known here.
        OSError: it cannot be read.
    """
    source = FileSource(path)
    try:
        metadata = json.loads(source.metadata[_METADATA])
        rows, about = dict(metadata["rows"]), dict(metadata.get("about", {}))
        model, version = str(metadata["model"]), metadata["version"]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{source.name} is not a calibration file") from error
    if version not in range(1, _VERSION + 1):
        raise FormatError(
            f"{source.name} is a calibration of version {quoted(version)}; this pack reads "
            f"versions 1 to {_VERSION}, so update it, or calibrate again"
        )
    advance = Meter(_size(source.header.tensors.values()), progress)
    channels = () if version == 1 else (MEAN, AMAX)
    with source:
        for name, count in rows.items():
            advance(_check_layer(source, name, count, channels), name)
    layers = {name: StoredMoments(source, name, count) for name, count in rows.items()}
    sensitivity = read_sensitivity(source)
    if sensitivity is not None:
        check_layers(sensitivity, map(bare, layers), source.name)
    return Calibration(layers, model, about, sensitivity)


def read_sensitivity(source: FileSource) -> Sensitivity | None:
    """The sensitivities in a calibration file, from its header alone; None if it has none.

    Raises:
        FormatError: they are damaged.
    """
    text = source.metadata.get(_SENSITIVITY)
    try:
        return None if text is None else Sensitivity.from_json(text)
    except FormatError as error:
        raise FormatError(
            f"{source.name}: its sensitivities are damaged ({error}); calibrate again"
        ) from error


def _check_layer(source: FileSource, name: str, count, channels: Iterable[str]) -> int:
    """Raise FormatError where a layer's statistics are not what `save` writes; returns their size.

    Args:
        count: of the input rows, as the metadata says.
        channels: the statistics that must be there beside the Hessian.
    """
    key = _hessian_key(source, name)
    where = f"{source.name}: the Hessian of {quoted(name)}"
    dtype, shape = source.tensors.get(key, (None, ()))
    if dtype != "F32" or len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise FormatError(f"{where} is {dtype} {list(shape)}; it must be a square F32 matrix")
    keys = [key, *(name + part for part in channels)]
    for channel in keys[1:]:
        dtype, size = source.tensors.get(channel, (None, ()))
        if (dtype, size) != ("F32", shape[:1]):
            raise FormatError(
                f"{source.name}: {quoted(channel)} is {dtype} {list(size)}; it must be "
                f"F32 {[shape[0]]}, one value for each column of the Hessian"
            )
    statistics = [source.rows(part, 0, shape[0]) for part in keys]
    finite = all(values.isfinite().all() for values in statistics)
    if not finite or not isinstance(count, int) or count < 1:
        raise FormatError(
            f"{where} {list(shape)} holds NaN or Inf, or is of {quoted(count)} rows; calibrate "
            "again"
        )
    if (statistics[0].diagonal() < 0).any():
        raise FormatError(
            f"{where} {list(shape)} has negative values on its diagonal, where squares are; "
            "calibrate again"
        )
    return _size(source.header.tensors[part] for part in keys)


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


def check_model(calibration: Calibration, source: Source) -> None:
    """Raise ValueError for a calibration of another model than the one that is to be converted."""
    keys = {bare(key.removesuffix(WEIGHT)): key for key in source.tensors if key.endswith(WEIGHT)}
    weights = []
    for name, moments in calibration.layers.items():
        key = keys.get(bare(name))
        if key is None:
            raise ValueError(
                f"{source.name}: the calibration has a layer {quoted(name)}, which this model "
                "lacks; it belongs to another model"
            )
        shape = list(source.tensors[key][1])
        if [moments.width] != shape[-1:]:
            raise ValueError(
                f"{source.name}: the calibration has a Hessian {[moments.width] * 2} for "
                f"{quoted(key)} {shape}; it must be {shape[-1:] * 2}, so it belongs to "
                "another model"
            )
        weights.append((name, source.tensors[key][1], source.rows(key, 0, 1)[0]))
    if fingerprint(weights) != calibration.model:
        raise ValueError(
            f"{source.name}: the calibration was made with other weights; calibrate this model"
        )


def nbytes(width: int) -> int:
    """Memory that the `HessianAccumulator` of a layer with `width` inputs takes."""
    return 4 * width * (width + 3)


class HessianAccumulator:
    """Adds up the statistics of one layer's inputs, until they are taken.

    Attributes:
        rows: of inputs so far; dropped: further ones, left out since they held NaN or Inf.
        closed: whether the statistics were taken, after which nothing is added.
    """

    def __init__(self) -> None:
        self.rows = self.dropped = 0
        self.closed = False
        self._hessian: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None  # float64: of millions of rows
        self._amax: torch.Tensor | None = None

    @property
    def received(self) -> str:
        """Describes the inputs, for the message when `take` returns None."""
        if self.rows:
            return "values whose squares float32 cannot hold"
        return "no finite input" if self.dropped else "no input"

    def reserve(self, width: int, device: torch.device) -> None:
        """Allocate now, not with the first input, when the memory may be in use."""
        self._hessian = torch.zeros(width, width, device=device)
        precise = torch.float64 if has_float64(device) else torch.float32
        self._sum = torch.zeros(width, device=device, dtype=precise)
        self._amax = torch.zeros(width, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Add inputs [..., K]."""
        if self.closed:
            return
        K = x.shape[-1]
        if self._hessian is None:
            self.reserve(K, x.device)
        for part in x.detach().reshape(-1, K).split(_ROWS):
            flat = part.to(self._hessian.device, torch.float32)
            finite = flat.isfinite().all(-1)
            if not finite.all():
                flat = flat[finite]
            self.rows += len(flat)
            self.dropped += len(part) - len(flat)
            if len(flat):
                self._hessian.addmm_(flat.t(), flat)
                self._sum += flat.sum(0)
                torch.maximum(self._amax, flat.abs().amax(0), out=self._amax)

    def take(self) -> Moments | None:
        """Close, and return the statistics on the CPU; None without rows, or after overflow."""
        moments = None
        if self.rows and not self.closed and self._hessian.isfinite().all():
            mean = (self._sum / self.rows).float()
            moments = Moments(
                self._hessian.div_(self.rows).cpu(), self.rows, mean.cpu(), self._amax.cpu()
            )
        self.drop()
        return moments

    def drop(self) -> None:
        """Free the memory and close."""
        self._hessian = self._sum = self._amax = None
        self.closed = True


def has_float64(device: torch.device) -> bool:
    """Apple's GPUs have none, nor have some of Intel's."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


@torch.no_grad()
def calibrate(
    module: nn.Module,
    batches: Iterable,
    run: Callable = lambda module, batch: module(**batch),
    select: Callable[[str, nn.Module], bool] = lambda name, layer: True,
) -> Calibration:
    """Run a torch module on batches and gather statistics of its linear layers' inputs.

    Those of all layers are in memory at once, on the module's device: 4 K (K + 3) bytes for a layer
    of K inputs. If that is too much, `select` fewer: a conversion rounds the others to nearest.

    Args:
        module: in eval mode, as it will be used.
        run: (module, batch) -> anything; default: the batch as keyword arguments.
        select: (name, layer) -> whether to gather for it.

    Raises:
        ValueError: the module is in training mode, or no layer had a finite input with finite
            squares.
    """
    if module.training:
        raise ValueError(
            f"this {type(module).__name__} is in training mode, where layers get other inputs than "
            "in use (dropout); call its eval() first"
        )
    accumulators: dict[str, HessianAccumulator] = {}
    hooks = []
    try:
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear) and select(name, layer):
                accumulators[name] = HessianAccumulator()
                hook = _adding_inputs(accumulators[name])
                hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        for batch in batches:
            run(module, batch)
    finally:
        for hook in hooks:
            hook.remove()
    layers = {name: one.take() for name, one in accumulators.items()}
    layers = {name: moments for name, moments in layers.items() if moments}
    if not layers:
        raise ValueError(
            "calibration is empty: no linear layer had a finite input with finite squares"
        )
    weights = ((name, module.get_submodule(name).weight) for name in layers)
    return Calibration(layers, fingerprint((name, w.shape, w[0]) for name, w in weights))


def _adding_inputs(accumulator: HessianAccumulator) -> Callable:
    def hook(layer: nn.Module, args: tuple, options: dict) -> None:
        accumulator.add(args[0] if args else options["input"])

    return hook
