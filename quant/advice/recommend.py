"""Which format suits this machine and a model: what runs here, what fits, and what to install.

What runs comes from `kernels.dispatch`, so from the same capabilities, reasons and self-tests as a
model's layers; what fits, from a file's header and ComfyUI's own guess of what sampling takes
(`memory`). Errors are those of bench/formats.py, which a test compares with its results. There is
no speed in it, because none was measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

from ...kernels import device_facts
from ...kernels.backends import kitchen
from ...kernels.device_facts import DeviceReason, InstallReason, NamedReason
from ...kernels.dispatch import ExecutionPath, execution_path
from ...kernels.records import Problem
from ..conversion import architectures
from ..conversion.convert import check_any_layer, find_device, plan_source
from ..format import Header
from ..reports import document
from ..reports.units import format_size
from ..sources import formats
from ..sources.file import FileSource
from ..sources.open import find_model, open_source
from . import memory

KEY = "mxfp8_recommendation"
SHAPE = 3840, 3840  # of a typical linear, [N, K]
BF16, MXFP8, INT8, Q8_0, NVFP4 = "BF16", "MXFP8", "INT8 with ConvRot", "GGUF Q8_0", "NVFP4"
_BITS = {BF16: 16.0, Q8_0: 8.5}  # per weight; of the others `sources.formats` has them
# Relative error of the outputs of MiniLM's 36 linears, from rounding the weights alone
# (bench/results/formats.json).
ERRORS = {BF16: 0.0, MXFP8: 2.14e-2, INT8: 6.2e-3, Q8_0: 4.6e-3, NVFP4: 7.5e-2}
CALIBRATED = 1.17e-2  # of MXFP8 with calibrated rounding
# torch -> what to install of triton-windows (docs/hardware.md).
TRITON_ON_WINDOWS = {
    (2, 7): "<3.4", (2, 8): "<3.5", (2, 9): "<3.6", (2, 10): "<3.7", (2, 11): "<3.7",
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """What a model would run on.

    Attributes:
        memory: bytes, all of it; None for a CPU. free: bytes at the moment.
        driver: the newest CUDA that it can run, None for other devices.
        versions: of torch, comfy-kitchen and Triton; None where it is not there.
    """

    name: str
    architecture: str | None
    memory: int | None
    free: int | None
    driver: str | None
    versions: dict[str, str | None]


@dataclass(frozen=True)
class Run:
    """How an MXFP8 linear of a typical size runs.

    Attributes:
        asked: the precision asked for; precision: that it gets.
        faster: backend -> why it does not run, of those that would come first and that something
            other than another device would bring.
    """

    asked: str
    backend: str
    precision: str
    faster: dict[str, str]


@dataclass(frozen=True)
class Choice:
    """A format beside the others.

    Attributes:
        error: of layer outputs, from rounding the weights alone, in a fixed test.
        native: whether this device multiplies it without unpacking; how: in words.
        comfyui: the oldest version known to run it, None if it takes a node pack.
        bytes: of the model in it; room: bytes beside it for sampling, negative if it does not fit;
            largest: the picture or video that fits in there. None where that is not known.
    """

    name: str
    bits: float
    error: float
    native: bool
    how: str
    comfyui: str | None
    nodes: str | None
    bytes: int | None = None
    room: int | None = None
    largest: str | None = None


@dataclass(frozen=True)
class Recommendation:
    """What `recommend` found; `install` is one thing to do, or None."""

    device: Device
    runs: tuple[Run, ...]
    choices: tuple[Choice, ...]
    advice: str
    install: str | None
    model: str | None = None
    architecture: str | None = None

    def to_json(self) -> str:
        return document.write(KEY, asdict(self))

    def here(self) -> list[str]:
        """The device, and how MXFP8 runs on it, a line each."""
        device = self.device
        parts = [device.name, device.architecture]
        if device.memory is not None:
            parts.append(f"{format_size(device.memory)}, {format_size(device.free)} free")
        if device.driver:
            parts.append(f"driver for CUDA {device.driver}")
        versions = ", ".join(f"{k} {v or 'missing'}" for k, v in device.versions.items())
        lines = [", ".join(filter(None, parts)), versions, ""]
        if not self.runs:
            return [*lines, "MXFP8 does not run here: PyTorch has no float8 on this device."]
        lines.append("MXFP8 linear layers here:")
        for run in self.runs:
            as_exact = run.asked != "exact" and run.precision == "exact"
            lines.append(f"  {run.asked}: {run.backend}{' (exact)' if as_exact else ''}")
            lines += [f"    not {name}: {reason}" for name, reason in run.faster.items()]
        return lines

    def rows(self) -> list[tuple[str, ...]]:
        """The formats as a table under `columns`."""
        rows = []
        for choice in self.choices:
            cells = [choice.name, f"{choice.bits:g}", f"{100 * choice.error:.2g}%"]
            if self.model is not None:
                cells.append(format_size(choice.bytes))
            if choice.room is not None:
                fits = f"up to {choice.largest}" if choice.largest else "yes"
                cells.append(fits if choice.room >= 0 else f"no, {format_size(-choice.room)} over")
            since = f"ComfyUI {choice.comfyui}" if choice.comfyui else choice.nodes or "ComfyUI"
            rows.append((*cells, since, choice.how))
        return rows

    def columns(self) -> tuple[str, ...]:
        size = ("size",) if self.model is not None else ()
        fits = ("fits",) if self._fits else ()
        return ("format", "bits", "error", *size, *fits, "needs", "here")

    @property
    def _fits(self) -> bool:
        """Whether it is known what fits: of a model, on a card."""
        return any(choice.room is not None for choice in self.choices)

    def notes(self) -> list[str]:
        """The advice and what the figures are, a line each."""
        return [
            self.advice,
            *([f"To install: {self.install}"] if self.install else []),
            "",
            "error: of layer outputs from rounding the weights alone, on a small trained text "
            f"encoder; calibrated, MXFP8 has {100 * CALIBRATED:.2g}%.",
            *(
                ["fits: ComfyUI's own guess of what sampling one picture takes, with nothing else "
                 "on the device; not a measurement."]
                if self._fits else []
            ),
            "No speed is given: none was measured on a GPU.",
        ]  # fmt: skip

    def summary(self) -> str:
        """All of it as text, a line for every format."""
        lines = []
        for row in self.rows():
            cells = [f"{c} {x}" for c, x in zip(self.columns()[1:], row[1:], strict=True) if x]
            lines.append(f"  {row[0]}: {'; '.join(cells)}")
        model = [f"{self.model} ({self.architecture or 'architecture not recognized'})"]
        head = [*self.here(), "", *(model if self.model else []), "Formats:"]
        return "\n".join([*head, *lines, "", *self.notes()])


def recommend(path=None, device: torch.device | str | None = None) -> Recommendation:
    """What suits a device, and a model on it.

    Args:
        path: a model that is not quantized, as for `convert_file`, or an MXFP8 file; or None.
        device: as for `convert_file`.

    Raises:
        FormatError: the file is damaged, or neither of the two.
        ValueError: there is no such device, or no layer of the model would be MXFP8.
        OSError: it cannot be read.
    """
    if not isinstance(device, torch.device):
        device = find_device(device)
    here = _device(device)
    runs, paths = _runs(device)
    model = None if path is None else _model(Path(path))
    choices = tuple(_choice(name, device, paths, here, model) for name in ERRORS)
    return Recommendation(
        here, runs, choices, _advice(choices, paths["fast"]), _install(device, paths["fast"]),
        model and model.name, model and model.architecture,
    )  # fmt: skip


# ---- the device ------------------------------------------------------------------------------


def _device(device: torch.device) -> Device:
    name, total, free, driver = "CPU", None, None, None
    if device.type == "cuda":
        name = device_facts.card_name(device)
        free, total = torch.cuda.mem_get_info(device)
        driver = _driver()
    elif device.type != "cpu":
        name = device.type.upper()
    versions = {"torch": torch.__version__}
    for package in ("comfy-kitchen", "Triton"):
        versions[package] = _version(package)
    architecture = device_facts.architecture(device)
    if isinstance(architecture, int):
        architecture = f"sm_{architecture}" if architecture else None
    return Device(name, architecture, total, free, driver, versions)


def _driver() -> str | None:
    """The CUDA that the driver is for, where torch tells."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    if ask is None or torch.version.hip is not None:
        return None
    number = ask()
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _version(package: str) -> str | None:
    for name in (package, f"{package}-windows"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _runs(device: torch.device) -> tuple[tuple[Run, ...], Mapping[str, ExecutionPath]]:
    holds = device_facts.has_float8(device)
    on = device if holds else torch.device("cpu")
    paths = {
        precision: execution_path(on, torch.bfloat16, precision, None, SHAPE, prepare="once")
        for precision in ("exact", "fast", "auto")
    }
    if not holds:
        return (), paths
    runs = [
        Run(asked, path.backend, path.precision, _missing(path) if asked != "auto" else {})
        for asked, path in paths.items()
    ]
    return tuple(runs), paths


def _missing(path: ExecutionPath) -> dict[str, str]:
    return {
        name: reason
        for name, reason in path.unsupported
        if not isinstance(reason, (DeviceReason, NamedReason))
    }


def _install(device: torch.device, path: ExecutionPath) -> str | None:
    """The one thing to install that would help most, or None."""
    if device.type != "cuda":
        return None
    gain = "for an 8-bit matmul" if path.precision == "exact" else "for fewer passes over weights"
    missing = {k: v for k, v in _missing(path).items() if isinstance(v, InstallReason)}
    if "torch_mx" in missing:  # then nothing else brings Blackwell's own matmul
        return f"{missing['torch_mx'].install}, {gain}"
    reason = device_facts.triton_on_unsupported_reason(device)
    if reason is not None:
        return f"{_triton(reason)}, {gain}"
    older = next((reason for reason in missing.values() if reason.package == "Triton"), None)
    if older is not None:
        return f"{older.install}, {gain}"
    if torch.version.hip is None and "kitchen_int8" in missing:
        return f"{missing['kitchen_int8'].install}, {gain}"
    return None


def _triton(reason: InstallReason) -> str:
    """What to install for Triton, from why it does not run."""
    package = reason.pip
    if package is None:
        return f"{reason.install} ({reason})"
    if package == "triton-windows":
        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
        package = f'"{package}{TRITON_ON_WINDOWS.get(version, "")}"'
    return f"Triton: pip install {package}"


# ---- the formats -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """A model by its header.

    Attributes:
        weights: values that MXFP8 is for; other: bytes of everything else.
        shapes: of its tensors.
    """

    name: str
    architecture: str | None
    weights: int
    other: int
    shapes: Mapping[str, tuple[int, ...]]


def _model(path: Path) -> _Model:
    place = find_model(path)
    if place.suffix.lower() != ".json":
        with FileSource(place) as source:
            if source.header.layers:
                return _quantized(source.header)
    with open_source(path) as source:
        plan = plan_source(source)
        check_any_layer(source, plan)
        weights = sum(d.shape[0] * d.shape[1] for d in plan.quantized)
        other = sum(d.nbytes for d in plan.decisions if not d.quantize)
        shapes = {key: shape for key, (_, shape) in source.tensors.items()}
        return _Model(source.name, plan.architecture, weights, other, shapes)


def _quantized(header: Header) -> _Model:
    detected = architectures.detect(header.tensors)
    layers = header.layers.values()
    stored = sum(layer.weight.nbytes + layer.scale.nbytes for layer in layers)
    total = sum(tensor.nbytes for tensor in header.tensors.values())
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    return _Model(header.path.name, detected and detected[0].name, weights, total - stored, shapes)


def _choice(
    name: str,
    device: torch.device,
    paths: Mapping[str, ExecutionPath],
    here: Device,
    model: _Model | None,
) -> Choice:
    known = formats.named(name)
    native, how = _native(name, device, paths)
    choice = Choice(
        name, _BITS.get(name) or known.bits, ERRORS[name], native, how,
        known and known.comfyui, "ComfyUI-GGUF" if name == Q8_0 else None,
    )  # fmt: skip
    if model is None:
        return choice
    size = model.other + int(model.weights * choice.bits / 8)
    room = largest = None
    if here.memory is not None:
        room = here.memory - memory.RESERVED - size
        estimate = memory.ACTIVATIONS.get(model.architecture)
        factor = estimate and estimate.factor_of(model.shapes)
        if factor and room >= memory.LEAST:
            largest = memory.largest(estimate, factor, room)
        room -= memory.LEAST
    return replace(choice, bytes=size, room=room, largest=largest)


def _native(
    name: str, device: torch.device, paths: Mapping[str, ExecutionPath]
) -> tuple[bool, str]:
    """Whether a device multiplies a format without unpacking it, and what it does, in words."""
    unpacked = "unpacked on every step, multiplied in 16 bits"
    if name == BF16:
        return True, "multiplied in 16 bits"
    if name == MXFP8:
        fast, auto = paths["fast"], paths["auto"]
        if not device_facts.has_float8(device):
            return False, "does not run"
        if fast.precision == "exact":
            return False, unpacked
        if fast.backend == "torch_mx":
            return True, "8-bit matmul, in stock ComfyUI too"
        asked = " and precision fast" if auto.precision == "exact" else ""
        return True, f"8-bit matmul by {fast.backend}, with this pack{asked}"
    if name == INT8:
        reason = kitchen.unsupported_reason(Problem(device, torch.bfloat16, shape=SHAPE))
        if reason is None:
            return True, "8-bit matmul by comfy-kitchen"
        return False, "in plain torch" if device.type == "cpu" else f"slow: {reason}"
    if name == NVFP4 and (device_facts.capability(device) or (0, 0)) >= (10, 0):
        return True, "4-bit matmul in stock ComfyUI"
    return False, unpacked


def _advice(choices: tuple[Choice, ...], path: ExecutionPath) -> str:
    """Which format to take, in a sentence or two."""
    by_name = {choice.name: choice for choice in choices}
    fitting = [c for c in choices if c.room is None or c.room >= 0]
    mxfp8 = by_name[MXFP8]
    if not fitting:
        return (
            "No format fits as a whole: ComfyUI will keep a part in system memory and copy it on "
            "every step. The smaller the format, the smaller that part."
        )
    if mxfp8 not in fitting:
        names = " and ".join(c.name for c in fitting)
        fit = "fits" if len(fitting) == 1 else "fit"
        return f"Only {names} {fit} as a whole; anything larger is copied in part on every step."
    start = ""
    if by_name[BF16].room is not None and by_name[BF16] in fitting:
        speed = "speed or for " if mxfp8.native or by_name[INT8].native else ""
        start = f"BF16 fits as a whole; quantize for {speed}larger pictures. "
    if path.backend == "torch_mx":
        return (
            f"{start}MXFP8 is what this card multiplies as it is stored. NVFP4 is smaller, with "
            f"{ERRORS[NVFP4] / ERRORS[MXFP8]:.1f} times the error."
        )
    if mxfp8.native and by_name[INT8].native:
        return (
            f"{start}INT8 with ConvRot has the least error of what this device multiplies in 8 "
            "bits. MXFP8 runs there too with this pack, calibration brings its error to "
            f"{100 * CALIBRATED:.2g}%, and Blackwell multiplies the same file as it is stored."
        )
    if mxfp8.native:
        return f"{start}MXFP8 is the 8-bit format that this device multiplies without unpacking."
    return (
        f"{start}Nothing here multiplies 8-bit weights, so a format saves memory only: of those, "
        "GGUF Q8_0 has the least error, and MXFP8 is what newer cards multiply directly."
    )
