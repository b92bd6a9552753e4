"""One writer per target, and no litter: temporary files that are locked while they are written.

A file under construction is `<target>.<process id>-<token>.part` beside its target. Its writer
holds a lock on it, which the system drops when the process ends in whatever way, kill -9 and power
cuts included. So whoever claims the same target next can tell a file that is being written (locked:
the newcomer is refused) from one that a dead writer left (not locked: it is deleted).

A process id in the name alone, or the age of the file, cannot tell: ids are used again, folders are
shared between machines, and a conversion may take hours.

On Windows the open file itself is the lock: the system refuses to delete it. That path has not been
run. A file system without locks (some network folders) cannot tell either, so what looks like a
leftover stays there, with a warning.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

_TIMEOUT = 2.0  # seconds for another claim in the same folder to end; it takes milliseconds

_ADVICE = {
    errno.ENOENT: "there is no such folder; make it first",
    errno.ENOTDIR: "this is no folder; choose another",
    errno.EACCES: "no permission to write in this folder; change it, or choose another",
    errno.EPERM: "no permission to write in this folder; change it, or choose another",
    errno.EROFS: "this folder is on a file system that is read-only; choose another",
    errno.ENOSPC: "the disk is full; free some space, or choose another folder",
}


def claim(target: Path) -> tuple[Path, BinaryIO]:
    """Create the temporary file of a new writer, locked, and delete what dead writers left.

    Returns:
        (its path, the open file); the lock lives as long as the file is open.

    Raises:
        OSError: another writer is at work on this target (EBUSY), or no file can be made here.
    """
    with _turn(target.parent):
        path = target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
        file = _create(target, path)
        try:
            _lock(file.fileno())
            busy = [_busy(other) for other in _siblings(target, path)]
            # Without turns (`_turn`), someone may have taken this file for a leftover just before
            # it was locked; he is at work on the target now.
            if any(busy) or not path.exists():
                raise OSError(
                    errno.EBUSY,
                    "another conversion is writing this file; wait until it ends, or stop it",
                    str(target),
                )
        except BaseException:
            file.close()
            path.unlink(missing_ok=True)
            raise
    return path, file


def _create(target: Path, path: Path) -> BinaryIO:
    try:
        return path.open("x+b", buffering=0)  # network file systems lock only what is writable
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise OSError(error.errno, "this name is too long; shorten it", str(target)) from None
        advice = _ADVICE.get(error.errno, error.strerror)
        raise OSError(error.errno, advice, str(target.parent)) from error


def _siblings(target: Path, own: Path) -> list[Path]:
    """Files beside `target` that bear the name of a temporary file of it, except `own`."""
    name = re.compile(re.escape(target.name) + r"\.[0-9]+-[0-9a-f]{8}\.part")
    with os.scandir(target.parent) as entries:
        names = [e.name for e in entries if name.fullmatch(e.name) and e.name != own.name]
    return [target.with_name(n) for n in names]


def _busy(path: Path) -> bool:
    """Whether a live writer holds this file; deletes it where its writer is dead."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        if fcntl is None:
            return _busy_on_windows(path)
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(descriptor)
    except BlockingIOError:
        return True
    except FileNotFoundError:  # its writer ended meanwhile
        return False
    except OSError as error:
        logger.warning(
            "%s looks like what a dead conversion left, but whether it still runs cannot be told "
            "(%s); delete it if not",
            path,
            error.strerror,
        )
    return False


def _busy_on_windows(path: Path) -> bool:
    """As `_busy`: an open file cannot be deleted there. Not run so far."""
    try:
        path.unlink()
    except PermissionError:
        return True
    return False


def _lock(descriptor: int) -> None:
    """Lock a file of our own; where the file system has no locks, others leave it alone."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Let one claim after another look around in a folder, so that of two exactly one is refused.

    Where folders cannot be locked, two claims at the same moment may both be refused.
    """
    if fcntl is None:
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OSError(error.errno, _ADVICE.get(error.errno, error.strerror), str(folder)) from error
    try:
        deadline = time.monotonic() + _TIMEOUT
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
            else:
                break
        yield
    finally:
        os.close(descriptor)
