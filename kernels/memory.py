"""Recognize errors that mean that memory ran out: few of them have a type of their own."""

from __future__ import annotations

import errno

# In lower case, in messages of torch on the CPU (POSIX, Windows), C++, Python, Triton and cuBLAS,
# which cannot be initialized when a GPU's memory is full.
_WORDS = (
    "allocate memory",
    "not enough memory",
    "bad_alloc",
    "can't start new thread",
    "out of memory",
    "out_of_memory",
    "alloc_failed",
    "cublas_status_not_initialized",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch, Triton or the system means that memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # a GPU's
        return True
    message = str(error).lower()
    return isinstance(error, Exception) and any(words in message for words in _WORDS)
