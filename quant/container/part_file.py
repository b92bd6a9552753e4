"""Part files: one writer per target; leftovers of killed writers are removed.

While it is written, a file is called `<target>.mxfp8.part`. Its writer holds a lock on it, which
the system drops when the process ends in any way, kill -9 and power cuts included. So the next
writer of the same target can tell a file that is being written (it is locked: the newcomer is
refused) from one that a dead writer left (it is not: it is deleted). Process ids and ages cannot
tell: ids are used again, folders are shared between machines, and a conversion may take hours.

On Windows the open file itself is the lock, since the system refuses to delete it. That path has
not been run there.

Rejected: filelock, which comes with torch. It leaves its lock file beside the model. Tried with
3.13.1 and 4.2.11, since torch takes any version: deleting the lock file while it is held lets a
second writer in under 3.13.1, which does not check that the file it locked is still there; with the
part file as lock file, 3.13.1 empties it when a second writer comes; and where the file system has
no locks, 3.13.1 calls every target busy.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

SUFFIX = ".mxfp8.part"

_ADVICE = {
    errno.ENOENT: "there is no such folder; make it first",
    errno.ENOTDIR: "not a folder; choose another",
    errno.EACCES: "no permission to write in this folder; change it, or choose another",
    errno.EPERM: "no permission to write in this folder; change it, or choose another",
    errno.EROFS: "this folder is on a file system that is read-only; choose another",
    errno.ENOSPC: "the disk is full; free some space, or choose another folder",
}


def part_path(target: Path) -> Path:
    """Where a target's part file is."""
    return target.with_name(target.name + SUFFIX)


def would_replace(target: str | os.PathLike, source: str | os.PathLike) -> bool:
    """Whether a writer of `target` would replace, or delete as a leftover, the file `source`."""
    paths = Path(target), part_path(Path(target))
    return any(os.path.exists(path) and os.path.samefile(path, source) for path in paths)


def create_part_file(target: Path) -> tuple[Path, BinaryIO]:
    """Create the part file of a target, locked, after deleting what a dead writer left.

    Returns:
        (its path, the open file); the lock is held while the file is open.

    Raises:
        ValueError: the target is named as part files are, which the next writer may delete.
        OSError: another writer is at work on this target (EBUSY), or no file can be made here.
    """
    if target.name.endswith(SUFFIX):
        raise ValueError(f"{target.name}: {SUFFIX!r} is for unfinished files; give another name")
    path = part_path(target)
    while (file := _create(target, path)) is None:
        _delete_leftover(target, path)
    try:
        mine = _lock(file.fileno()) is not False and is_at(path, file.fileno())
    except BaseException:  # an interrupt
        delete_if_open(path, file)
        file.close()
        raise
    if not mine:  # before it was locked, another writer took it for a leftover
        file.close()
        raise _busy(target)
    return path, file


def _create(target: Path, path: Path) -> BinaryIO | None:
    """Make a new file; None if there is one already."""
    try:
        return path.open("x+b", buffering=0)  # network file systems lock only what is writable
    except FileExistsError:
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise OSError(error.errno, "this name is too long; shorten it", str(target)) from None
        advice = _ADVICE.get(error.errno, error.strerror)
        raise OSError(error.errno, advice, str(target.parent)) from error


def _lock(descriptor: int) -> bool | None:
    """Try to lock. True: locked now; False: held by another; None: no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter from some network file systems
        return False
    except OSError:
        return None
    return True


def delete_if_open(path: Path, file: BinaryIO) -> None:
    """Delete what is at a path if it is this file, still open; errors are ignored."""
    with contextlib.suppress(OSError):
        if not file.closed and is_at(path, file.fileno()):
            path.unlink()


def discard(path: Path, file: BinaryIO) -> None:
    """Delete a part file, which ends its lock. What cannot be deleted, the next writer deletes."""
    if os.name == "nt":  # an open file cannot be deleted there
        file.close()
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        delete_if_open(path, file)
        file.close()


def is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file still has this path; another may have been made in its place."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _delete_leftover(target: Path, path: Path) -> None:
    """Delete the part file of a dead writer, or raise OSError; only regular files are deleted."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if fcntl is None:
            path.unlink()
            return
        descriptor = _open(path)
    except FileNotFoundError:  # its writer ended meanwhile
        return
    except OSError as error:
        if fcntl is None and error.errno != errno.EINVAL:
            raise _busy(target) from error
        raise _in_the_way(target, path, error) from error
    try:
        locked = _lock(descriptor)
        if locked is None:
            raise OSError(
                errno.EBUSY,
                f"{path.name!r} is there, and this file system cannot tell whether a conversion is "
                "writing it; delete it if none is",
                str(target),
            )
        if not locked:
            raise _busy(target)
        if is_at(path, descriptor):
            try:
                path.unlink()
            except OSError as error:  # another user's, in a folder such as /tmp
                raise _in_the_way(target, path, error) from error
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """Open a leftover to lock it: for writing, as network file systems want it, else to read."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, os.O_RDWR | flags)
    except PermissionError:
        return os.open(path, os.O_RDONLY | flags)


def _in_the_way(target: Path, path: Path, error: OSError) -> OSError:
    advice = f"{path.name!r} is in the way ({error.strerror}); delete it"
    return OSError(error.errno, advice, str(target))


def _busy(target: Path) -> OSError:
    return OSError(
        errno.EBUSY,
        "another conversion is writing this file; wait until it ends, or stop it",
        str(target),
    )
