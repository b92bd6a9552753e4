"""What the layers of a model are given, as far as calibrated rounding needs it (`gptq`).

For inputs X [n, K] of a linear layer that is X.T X / n, the second moments, [K, K]. They are
gathered while the model runs on whatever its user thinks typical, and kept in a safetensors file
that belongs to one model: its first rows are hashed with the layers' names and shapes, and another
model's calibration is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .container import quoted
from .format import WEIGHT, FormatError, bare, read_header
from .source import FileSource, as_bytes
from .writer import Writer

SECOND = ".second"
_METADATA = "mxfp8_calibration"
_VERSION = 1


@dataclass(frozen=True)
class Moments:
    """Of one layer's inputs.

    Attributes:
        second: X.T X / n, float32 [K, K]; rows: n.
    """

    second: torch.Tensor
    rows: int


@dataclass(frozen=True)
class Calibration:
    """Moments by layer, under names without the prefix of a diffusion model.

    Attributes:
        model: fingerprint of the model that was run.
    """

    layers: Mapping[str, Moments]
    model: str

    def of(self, layer: str) -> Moments | None:
        """The moments of a layer, whatever prefix its name has here."""
        return self.layers.get(bare(layer))

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Write a safetensors file, whole or not at all.

        Raises:
            OSError: as `writer.Writer`.
        """
        tensors = [(n + SECOND, "F32", tuple(m.second.shape)) for n, m in self.layers.items()]
        about = {
            "version": _VERSION,
            "model": self.model,
            "rows": {name: moments.rows for name, moments in self.layers.items()},
        }
        with Writer(path, tensors, {_METADATA: json.dumps(about)}, overwrite) as writer:
            for name, moments in self.layers.items():
                writer.write(name + SECOND, as_bytes(moments.second.contiguous().cpu()))


def load(path: str | os.PathLike) -> Calibration:
    """Read what `Calibration.save` wrote.

    Raises:
        FormatError: the file is damaged, or no calibration of this version.
        OSError: it cannot be read.
    """
    header = read_header(path)
    try:
        about = json.loads(header.metadata[_METADATA])
        rows, model, version = dict(about["rows"]), str(about["model"]), about["version"]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{header.path.name} is no calibration file") from error
    if version != _VERSION:
        raise FormatError(f"{header.path.name} is a calibration of version {version!r}, not 1")
    layers = {}
    with FileSource(path) as source:
        for name, count in rows.items():
            dtype, shape = source.tensors.get(name + SECOND, (None, ()))
            if dtype != "F32" or len(shape) != 2 or shape[0] != shape[1]:
                raise FormatError(
                    f"{source.name}: second moments of {quoted(name)} are {dtype} {list(shape)}; "
                    "they must be a square F32 matrix"
                )
            second = source.rows(name + SECOND, 0, shape[0])
            if not isinstance(count, int) or count < 1 or not second.isfinite().all():
                raise FormatError(
                    f"{source.name}: second moments of {quoted(name)} {list(shape)} hold NaN or "
                    f"Inf, or are of {quoted(count)} rows; calibrate again"
                )
            layers[name] = Moments(second, count)
    return Calibration(layers, model)


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
        if list(moments.second.shape) != shape[-1:] * 2:
            raise ValueError(
                f"{source.name}: the calibration has second moments "
                f"{list(moments.second.shape)} for {quoted(names[name])} {shape}; they must be "
                f"{shape[-1:] * 2}, so it belongs to another model"
            )
    keys = [names[name] for name in calibration.layers]
    found = fingerprint((k.removesuffix(WEIGHT), source.tensors[k][1], source.rows(k, 0, 1)[0])
                        for k in keys)  # fmt: skip
    if found != calibration.model:
        raise ValueError(
            f"{source.name}: the calibration was made with other weights; calibrate this model"
        )


class Sum:
    """Adds up second moments of one layer's inputs."""

    def __init__(self) -> None:
        self.second: torch.Tensor | None = None
        self.rows = 0

    def add(self, x: torch.Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        flat = flat[flat.isfinite().all(-1)]
        if self.second is None:
            self.second = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
        self.second.addmm_(flat.t(), flat)
        self.rows += len(flat)


@contextlib.contextmanager
def watch(module: nn.Module, select: Callable[[str, nn.Module], bool]) -> Iterator[dict[str, Sum]]:
    """Within the context, gather what the linear layers of a module are given.

    Args:
        select: (name, layer) -> whether to gather for it.
    """
    sums: dict[str, Sum] = {}
    hooks = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and select(name, layer):
            found = sums[name] = Sum()
            hooks.append(
                layer.register_forward_pre_hook(lambda _, args, found=found: found.add(args[0]))
            )
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def calibrate(
    module: nn.Module,
    batches: Iterable,
    run: Callable = lambda module, batch: module(**batch),
    select: Callable[[str, nn.Module], bool] = lambda name, layer: True,
) -> Calibration:
    """Run a torch module on batches and gather what its linear layers are given.

    Args:
        run: (module, batch), what a batch is run by; default: as keyword arguments.
        select: (name, layer) -> whether to gather for it.

    Raises:
        ValueError: no layer was given anything, or only what is not finite.
    """
    with watch(module, select) as sums:
        for batch in batches:
            run(module, batch)
    layers = {
        name: Moments(found.second / found.rows, found.rows)
        for name, found in sums.items()
        if found.rows
    }
    if not layers:
        raise ValueError("calibration is empty: no linear layer was given a finite input")
    weights = dict(module.named_modules())
    return Calibration(
        layers, fingerprint((n, weights[n].weight.shape, weights[n].weight[0]) for n in layers)
    )
