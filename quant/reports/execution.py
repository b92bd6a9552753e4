"""The backend report: how each linear of a model runs on this machine, as data.

It gives the backend and precision of every layer with the reason, where the bytes are, and, if
measured, the time of a layer of each size next to a dense one and to stock's forward. All of it is
asked of the code that runs the layers (`kernels.execution_path`), never worked out again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field

from ...kernels import FEW_ROWS, DeviceReason, ExecutionPath
from . import document
from .adapters import AdapterUse
from .conversion import MXFP8
from .units import format_count, format_seconds, format_size

KEY = "mxfp8_backend_report"
STOCK = "stock"  # the backend of what ComfyUI itself runs
_SLOWEST = "eager"  # the backend that takes every problem
# Arithmetic -> the relative error of a layer's output, with that of its calibrated MXFP8 weight:
# the mean over MiniLM's 36 layers (bench/results/quality.json).
EXPECTED_ERROR = {"exact": 0.0117, "mxfp8": 0.0249, "rowwise_fp8": 0.0233, "rotated_int8": 0.0147}
_FORMS = {
    "stored": "inputs quantized to MXFP8, weights as stored",
    "rowwise_fnuz": "weight and inputs in FP8 (E4M3fnuz) with one scale per row",
    "rowwise_fp8": "weight and inputs in FP8 with one scale per row",
    "rotated_int8": "weight and inputs rotated, in INT8 with one scale per row",
}


@dataclass(frozen=True)
class LayerExecution:
    """One linear.

    Attributes:
        decision: "mxfp8", the name of another format, or "kept".
        reason: why it runs on this backend at this precision.
        dtype: of the weight ("BF16"); of a quantized one, the dtype that it computes in.
        bytes: of the weight with its scales; device: where they are now.
        backend: a name from `kernels.list_backends`, or "stock"; precision: "exact" or "fast", None
            if stock decides.
        weight_form: that is multiplied, "stored" or one that was prepared; None if stock decides.
        microseconds: if measured, for the rows of the `Timing` of its size.
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
    weight_form: str | None = None
    microseconds: float | None = None

    @property
    def arithmetic(self) -> str | None:
        """What `EXPECTED_ERROR` calls the way in which it is multiplied."""
        if self.precision != "fast":
            return self.precision
        same = {"stored": "mxfp8", "rowwise_fnuz": "rowwise_fp8"}
        return same.get(self.weight_form, self.weight_form)


@dataclass(frozen=True)
class Timing:
    """Median times for the layers of one size that run on one path.

    Attributes:
        layers: how many there are; rows: of the input that one of them was timed on.
        microseconds: with the LoRAs that run beside its weight.
        dense_microseconds: of an unquantized weight in the model's dtype, without LoRAs.
        stock_microseconds: of stock ComfyUI's forward on the same MXFP8 weight, without LoRAs.
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
    """Bytes of one kind: on the device that computes, and offloaded."""

    device: int = 0
    offloaded: int = 0


@dataclass(frozen=True)
class BackendReport:
    """A whole model on this machine.

    Attributes:
        device, dtype: that it computes on and in; rows: of the inputs that `layers` is about.
        small_m: "backend, precision (up to n)" of inputs with few rows.
        unsupported: "backend: reason" of each backend that is preferred but not available.
        limited_by: why nothing faster runs, in a few words; None if this is the fastest path, or
            if ComfyUI runs everything.
        memory: kind ("codes", "scales", "other weights", "prepared weights", "LoRAs beside the
            weights", "LoRAs to merge") -> bytes. What ComfyUI merges are a LoRA's own tensors.
        adapters: the LoRAs on the model.
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
    adapters: tuple[AdapterUse, ...] = ()

    @property
    def mxfp8(self) -> list[LayerExecution]:
        return [layer for layer in self.layers if layer.decision == MXFP8]

    def paths(self) -> list[tuple[str, int]]:
        """("backend, precision", number of MXFP8 layers), most layers first."""
        paths = (", ".join(filter(None, (x.backend, x.precision))) for x in self.mxfp8)
        return Counter(paths).most_common()

    def line(self) -> str:
        """The report in one line, for a loader."""
        if not self.mxfp8:
            return "no MXFP8 layers; it runs as ComfyUI loaded it"
        paths = self.paths()
        text = paths[0][0] if len(paths) == 1 else "; ".join(f"{n} {path}" for path, n in paths)
        limit = f" ({self.limited_by})" if self.limited_by else ""
        size = format_size(sum(layer.bytes for layer in self.mxfp8))
        return f"{format_count(len(self.mxfp8), 'MXFP8 layer')}, {size}: {text}{limit}"

    def summary(self) -> str:
        """A few lines for a node."""
        lines = [f"{self.model} on {self.device}: {self.line()}"]
        lines += [adapter.line() for adapter in self.adapters]
        reasons = Counter(layer.reason for layer in self.layers)
        lines += [
            f"{format_count(count, 'layer')}: {reason}" for reason, count in reasons.most_common()
        ]
        small_m = self.small_m.partition(" (")[0]
        lines.append(f"inputs of up to {FEW_ROWS} rows: {small_m}")
        lines += self._expected_errors()
        lines += [f"not used: {reason}" for reason in self.unsupported]
        sizes = [f"{kind} {format_size(m.device)}" for kind, m in self.memory.items() if m.device]
        away = sum(m.offloaded for m in self.memory.values())
        lines.append(f"memory on {self.device}: {', '.join(sizes) or 'nothing yet'}")
        if away:
            lines.append(f"offloaded: {format_size(away)}")
        loras = " with its LoRAs (the others without)" if self.adapters else ""
        lines += [
            f"{format_count(t.layers, 'layer')} {list(t.shape)} on {t.backend}, {t.rows} rows: "
            f"{format_seconds(t.microseconds / 1e6)}{loras}, {_speed(t.faster_than_dense)} dense "
            f"{self.dtype}, {_speed(t.faster_than_stock)} stock"
            for t in self.timings
        ]
        return "\n".join(lines)

    def _expected_errors(self) -> list[str]:
        ran = Counter(layer.arithmetic for layer in self.mxfp8 if layer.precision == "fast")
        exact = EXPECTED_ERROR["exact"]
        return [
            f"expected error of {name}: {EXPECTED_ERROR[name] / exact:.2f} times that of exact"
            for name, _ in ran.most_common()
        ]

    def to_json(self) -> str:
        """Versioned JSON, every layer included."""
        data = asdict(self)
        for entry, layer in zip(data["layers"], self.layers, strict=True):
            entry["expected_error"] = EXPECTED_ERROR.get(layer.arithmetic)
        for entry, timing in zip(data["timings"], self.timings, strict=True):
            entry["faster_than_dense"] = timing.faster_than_dense
            entry["faster_than_stock"] = timing.faster_than_stock
        return document.write(KEY, data)


def _speed(ratio: float) -> str:
    return f"{ratio:.2f}x as fast as" if ratio >= 1 else f"{1 / ratio:.2f} times slower than"


def limiting_reason(
    device: str, path: ExecutionPath, precision: str, encoder: bool = False
) -> str | None:
    """Why nothing faster runs, in a few words, or None.

    Args:
        device: its type; path: that of inputs with many rows; the others as for `layer_reason`.
    """
    if path.precision == "fast":
        return None
    return "no GPU" if device == "cpu" else _exact_reason(path, precision, encoder)


def layer_reason(
    path: ExecutionPath,
    many: ExecutionPath,
    precision: str,
    change: float | None,
    encoder: bool = False,
) -> str:
    """Why an MXFP8 linear runs on this path, if neither the file nor ComfyUI holds it at exact.

    Args:
        path: that of the layer; many: the same for inputs with many rows.
        precision: as requested.
        change: how much preparing its weight changed it, if known.
        encoder: whether it is in a text encoder, whose precision is not for the user to choose.
    """
    if path.precision == "fast":
        known = "" if change is None else f"; this changes the weight by {change:.1g}"
        return _FORMS[path.weight_form] + known
    if many.precision == "fast":
        return f"exact: {FEW_ROWS} rows or fewer"
    # Asked of many rows: with few, fast backends are not tried.
    reason = _exact_reason(many, precision, encoder)
    return f"{path.backend}: {reason or 'no faster backend is available'}"


def _exact_reason(path: ExecutionPath, precision: str, encoder: bool) -> str | None:
    """Why an exact path was taken: it was asked for, or a faster backend is not available."""
    if precision == "exact" and path.backend != _SLOWEST:
        return "text encoders run exact, as in ComfyUI" if encoder else "exact was chosen"
    reasons = dict(path.unsupported)
    if path.backend == _SLOWEST and "triton" in reasons:
        return reasons["triton"]
    # What the device lacks can be changed less easily than what is missing on it.
    missing = [reason for reason in reasons.values() if not isinstance(reason, DeviceReason)]
    return next(iter([*missing, *reasons.values()]), None)
