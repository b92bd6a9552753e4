"""Which files this process wrote, so that a node whose file was deleted writes it again.

ComfyUI hands out a node's last result while its inputs and its fingerprint are the same. The file
is no input; a fingerprint that told only whether it exists would differ after the first run, and
the second one would find the file in its way. So it counts.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from . import paths

_written: Counter[Path] = Counter()  # how often, but for replacing it


@contextlib.contextmanager
def counted(target: Path) -> Iterator[None]:
    """Remember a file that is written within, if that succeeds."""
    replaced = target.exists()
    yield
    _written[target] = max(_written[target] + (not replaced), 1)


def fingerprint(source: str | None, target: str, suffix: str):
    """What changes with the source, and with each time that the written target is found deleted.

    Args:
        source: a choice of `paths.list_sources`, None if another node will give it.
        target, suffix: as for `paths.target_beside`.
    """
    if source is None:
        return None
    try:
        path = paths.source_path(source)
        new = paths.target_beside(path, source, target, suffix)
        about = path.stat()
        deleted = _written[new] - new.exists() if _written[new] else 0
    except (OSError, ValueError):
        return float("nan")  # equal to none: the node runs, and tells what is wrong
    return deleted, about.st_mtime_ns, about.st_size
