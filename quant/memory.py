"""Recognize out-of-memory errors, for which torch on the CPU has no type."""

from __future__ import annotations

import errno

# In messages of torch on the CPU (POSIX, Windows), C++ and Python.
_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "can't start new thread",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or the system means that memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # a GPU's
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
