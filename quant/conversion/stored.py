"""What a plan becomes in the file: every tensor, and their bytes. Needs no torch."""

from __future__ import annotations

from ...kernels import layout
from .. import format
from ..container.header import nbytes
from ..format import MARKER, SCALE, WEIGHT
from .policy import Decision, Plan


def layer_markers(plan: Plan) -> dict[str, dict]:
    """Layer -> marker, of the layers that become MXFP8."""
    return {d.layer: format.marker(d.shape, d.dtype) for d in plan.quantized}


def stored_tensors(plan: Plan) -> list[tuple[str, str, tuple[int, ...]]]:
    """(key, dtype, shape) of every tensor in the file that a plan makes."""
    markers = layer_markers(plan)
    return [tensor for decision in plan.decisions for tensor in _stored(decision, markers)]


def stored_bytes(plan: Plan) -> int:
    """The bytes of these tensors."""
    return sum(nbytes(dtype, shape) for _, dtype, shape in stored_tensors(plan))


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
