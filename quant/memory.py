"""Running out of memory, told apart from other errors: torch on the CPU has no type for it."""

from __future__ import annotations

import errno

# Of torch on the CPU (POSIX, Windows), C++ and Python.
_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "can't start new thread",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error of Python, torch or the system says that memory is short."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # of a GPU
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
