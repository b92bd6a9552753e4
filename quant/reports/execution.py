"""How a model runs on this machine, layer by layer, as data.

It says which backend runs each linear, at what precision and why, where the bytes are, and, if
measured, how long a layer of each size takes against a dense one and against stock's way. All of
it is asked of the code that runs the layers (`kernels.execution_path`), never worked out again. It
is plain JSON with a version, as a conversion's report is.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field

from ...kernels import ExecutionPath
from ...kernels.backends import fp8_rowwise
from .conversion import KEPT, MXFP8, gigabytes

VERSION = 1
_SLOWEST = "eager"  # the backend that runs where no other does
_LACKING = ("triton", "fp8")  # the backends to say why not of, the first that was refused
STOCK = "stock"  # the backend of what ComfyUI itself runs


@dataclass(frozen=True)
class LayerExecution:
    """One linear.

    Attributes:
        decision: "mxfp8", the name of another format, or "kept".
        reason: why it runs as it does, in words.
        dtype: of the weight ("BF16"; of a quantized one, what it computes in).
        bytes: of the weight with its scales; device: where they are now.
        backend: a name from `kernels.backends`, or "stock"; precision: "exact" or "fast", None
            where that is for stock to say.
        microseconds: where measured; for how many rows, the timing of its size says.
    """

    name: str
    shape: tuple[int, int]
    decision: str
    reason: str
    dtype: str
    bytes: int
    device: str
    backend: str
    precision: str | None
    microseconds: float | None = None


@dataclass(frozen=True)
class Timing:
    """Layers of one size that run alike: a median for each way to compute one.

    Attributes:
        layers: how many there are; rows: of the input that one was timed on.
        dense_microseconds: of a weight that is not quantized, in the model's dtype.
        stock_microseconds: of stock ComfyUI's forward on the same MXFP8 weight.
    """

    shape: tuple[int, int]
    backend: str
    precision: str | None
    layers: int
    rows: int
    microseconds: float
    dense_microseconds: float
    stock_microseconds: float

    @property
    def faster_than_dense(self) -> float:
        return self.dense_microseconds / self.microseconds

    @property
    def faster_than_stock(self) -> float:
        return self.stock_microseconds / self.microseconds


@dataclass(frozen=True)
class Memory:
    """Bytes of one kind: on the device that computes, and elsewhere until they are needed."""

    device: int = 0
    offloaded: int = 0


@dataclass(frozen=True)
class BackendReport:
    """A whole model on this machine.

    Attributes:
        device, dtype: that it computes on and in; rows: of the inputs that layers are described
            for.
        few: what layers run with few rows, in words.
        unsupported: "backend: why not" of what would have come before the backends that run.
        limited_by: why nothing faster runs, in a few words; None where nothing would be, or where
            ComfyUI runs everything.
        memory: kind ("codes", "scales", "other weights", "prepared weights", "LoRA patches") ->
            bytes.
    """

    model: str
    machine: str
    device: str
    dtype: str
    rows: int
    small_m: str
    unsupported: tuple[str, ...]
    limited_by: str | None
    memory: dict[str, Memory]
    layers: tuple[LayerExecution, ...] = field(repr=False)
    timings: tuple[Timing, ...] = ()

    @property
    def mxfp8(self) -> list[LayerExecution]:
        return [layer for layer in self.layers if layer.decision == MXFP8]

    def paths(self) -> list[tuple[str, int]]:
        """("backend, precision", number of MXFP8 layers), most layers first."""
        paths = (", ".join(filter(None, (x.backend, x.precision))) for x in self.mxfp8)
        return Counter(paths).most_common()

    def line(self) -> str:
        """What there is to say on a loader."""
        if not self.mxfp8:
            return "no MXFP8 layers; it runs as ComfyUI loaded it"
        paths = self.paths()
        said = paths[0][0] if len(paths) == 1 else "; ".join(f"{n} {path}" for path, n in paths)
        limit = f" ({self.limited_by})" if self.limited_by else ""
        size = gigabytes(sum(layer.bytes for layer in self.mxfp8))
        noun = "layer" if len(self.mxfp8) == 1 else "layers"
        return f"{len(self.mxfp8)} MXFP8 {noun}, {size}: {said}{limit}"

    def summary(self) -> str:
        """Some lines for a node."""
        lines = [f"{self.model} on {self.device}: {self.line()}"]
        reasons = Counter(layer.reason for layer in self.layers)
        lines += [f"{count} layers: {reason}" for reason, count in reasons.most_common()]
        lines.append(f"inputs of few rows: {self.small_m}")
        lines += [f"not used: {reason}" for reason in self.unsupported]
        sizes = [f"{kind} {gigabytes(m.device)}" for kind, m in self.memory.items() if m.device]
        away = sum(m.offloaded for m in self.memory.values())
        lines.append(f"on {self.device}: {', '.join(sizes) or 'nothing yet'}")
        if away:
            lines.append(f"offloaded: {gigabytes(away)}")
        lines += [
            f"{t.layers} of {list(t.shape)} ({t.backend}), {t.rows} rows: "
            f"{t.microseconds:.0f} us, {t.faster_than_dense:.2f} times as fast as dense "
            f"{self.dtype}, {t.faster_than_stock:.2f} times as fast as stock"
            for t in self.timings
        ]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Versioned JSON, every layer included."""
        data = {"mxfp8_backend_report": VERSION, **asdict(self)}
        for entry, timing in zip(data["timings"], self.timings, strict=True):
            entry["faster_than_dense"] = timing.faster_than_dense
            entry["faster_than_stock"] = timing.faster_than_stock
        return json.dumps(data, indent=1, allow_nan=False)


def kept(dtype: str) -> tuple[str, str]:
    """(decision, reason) of a linear that is not quantized."""
    return KEPT, f"not MXFP8: {dtype}"


def limiting_reason(
    device: str, choice: ExecutionPath, asked: str, encoder: bool = False
) -> str | None:
    """Why nothing faster runs, in a few words; `device` is its type, the rest as of `reason`."""
    if device == "cpu":
        return "no GPU"
    if asked == "exact" and choice.backend != _SLOWEST:
        return "text encoders run exact, as in ComfyUI" if encoder else "exact was chosen"
    return _lacking(choice) if choice.precision == "exact" else None


def layer_reason(
    choice: ExecutionPath,
    many: ExecutionPath,
    asked: str,
    change: float | None,
    encoder: bool = False,
) -> str:
    """Why an MXFP8 linear that nothing holds back runs as it does.

    Args:
        choice: what runs it; many: what would with many rows; asked: the precision it was given.
        change: how much folding changes its weights at most, where that is known.
        encoder: whether it is a text encoder's, whose precision nobody chooses.
    """
    if choice.precision == "fast":
        if choice.input_form == "rowwise":
            said = "" if change is None else f", changes weights by at most {change:.1g}"
            return f"row fold{said}"
        return "activations quantized in blocks, weights as they are"
    if many.precision == "fast":
        return f"exact: {fp8_rowwise.SMALL_M} rows or fewer"
    if asked == "exact" and choice.backend != _SLOWEST:
        return "exact, as text encoders run in ComfyUI" if encoder else "exact, as was chosen"
    # Of many: with few rows, FP8 backends refuse for that.
    return f"{choice.backend}: {_lacking(many) or 'nothing faster is here'}"


def _lacking(choice: ExecutionPath) -> str | None:
    """Why what would be faster was refused."""
    why = dict(choice.refused)
    return next((why[name] for name in _LACKING if name in why), None)
