"""Recognize errors that mean that memory ran out: few of them have a type of their own."""

from __future__ import annotations

import errno

_PAGING_FILE = 1455  # of Windows: no memory to load a library into
# In lower case, in messages of torch on the CPU (POSIX, Windows), C++, Python, Triton, Windows'
# loader and cuBLAS, which cannot be initialized when a GPU's memory is full.
_WORDS = (
    "allocate memory",
    "not enough memory",
    "bad_alloc",
    "can't start new thread",
    "out of memory",
    "out_of_memory",
    "alloc_failed",
    "cublas_status_not_initialized",
    "paging file is too small",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch, Triton or the system means that memory ran out."""
    if isinstance(error, OSError):
        # A file's name is in the message.
        return error.errno == errno.ENOMEM or getattr(error, "winerror", None) == _PAGING_FILE
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # a GPU's
        return True
    message = str(error).lower()
    return isinstance(error, Exception) and any(words in message for words in _WORDS)
