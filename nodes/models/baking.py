"""LoRAs and other patches merged into one weight by stock ComfyUI, with its errors raised.

`comfy.lora.calculate_weight` and its adapters log what fails, running out of memory included, and
return the weight without the patch. A handler on the root logger turns what the calling thread logs
there into an exception, inside the adapter's own `except`, so that the adapter's error is its
context. Rejected: comparing the weight before and after, because many LoRAs hold layers of zeros.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator

import comfy.lora
import torch

from ...kernels.memory import is_out_of_memory

_COMFY = os.path.dirname(comfy.lora.__file__)


class BakingError(ValueError):
    """A patch that cannot be merged into its weight, and why."""


class _LoggedError(Exception):
    """What stock logged as a warning or an error."""


def bake(patches: list, weight: torch.Tensor, key: str) -> torch.Tensor:
    """A weight with its patches, computed in float32; the weight itself may be overwritten.

    Raises:
        BakingError: a patch does not fit or fails, or the result holds NaN or Inf.
        Exception: memory ran out.
    """
    baked = _calculate(patches, weight, key)
    if not baked.isfinite().all():
        raise BakingError("it gets NaN or Inf")
    return baked


def fits(patches: list, shape: torch.Size, key: str) -> bool:
    """Whether patches may fit a weight, judged by shapes alone: nothing is computed.

    An adapter that looks at values cannot be judged so; the answer is then False.
    """
    meta = torch.empty(shape, dtype=torch.float32, device="meta")
    try:
        # Without their functions: those of other packs may do more than compute.
        _calculate([(*patch[:4], None) for patch in patches], meta, key)
    except BakingError:
        return False
    return True


def misfit(patches: list, shape: torch.Size, key: str) -> str | None:
    """What to say of the first patch whose tensors do not fit a weight's shape, if it shows any."""
    for _, value, _, offset, _ in patches:
        parts = value[-1] if isinstance(value, tuple) and len(value) > 1 else value
        parts = getattr(parts, "weights", parts)
        if not isinstance(parts, (list, tuple)):
            continue
        shapes = [list(part.shape) for part in parts if isinstance(part, torch.Tensor)]
        if shapes and not fits([(1.0, value, 1.0, offset, None)], shape, key):
            wanted = list(shape)
            if offset is not None:
                wanted[offset[0]] = offset[2]
            return f"tensors {', '.join(map(str, shapes))} do not fit the shape {wanted}"
    return None


def _calculate(patches: list, weight: torch.Tensor, key: str) -> torch.Tensor:
    try:
        with _logged_errors_raised():
            return comfy.lora.calculate_weight(
                patches, weight, key, intermediate_dtype=torch.float32
            )
    except Exception as error:
        cause = (isinstance(error, _LoggedError) and error.__context__) or error
        try:
            if is_out_of_memory(cause):
                raise cause from None
            raise BakingError((str(cause) or type(cause).__name__).splitlines()[0]) from cause
        finally:
            del cause  # else it holds itself, by its traceback and this frame, and the weight


@contextlib.contextmanager
def _logged_errors_raised() -> Iterator[None]:
    """Raise `_LoggedError` where this thread logs a warning or worse, however little is shown."""
    root = logging.getLogger()
    level, disabled = root.level, root.manager.disable
    handler = _Raise(threading.get_ident())
    root.setLevel(min(level, logging.WARNING))
    root.manager.disable = min(disabled, logging.INFO)
    root.handlers.insert(0, handler)  # before those that show what it raises
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.manager.disable = disabled
        root.setLevel(level)


class _Raise(logging.Handler):
    """Raises what a thread logs in ComfyUI's own modules; a patch may call those of other packs."""

    def __init__(self, thread: int):
        super().__init__(logging.WARNING)
        self._thread = thread

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread and record.pathname.startswith(_COMFY):
            raise _LoggedError(record.getMessage())
