"""File names that a user types: names that every system can store, and that stay in their folder.

A workflow comes from anywhere, and runs on Windows, Linux and macOS. A name that one of them reads
differently (`C:x` and `a\\b` on Windows, a trailing dot, `NUL`) is refused on all of them, so that
tests on one hold for the others. `check_target` checks where the resulting path leads, links
followed. Rejected: replacing what is not allowed, which would write a file that nobody asked for.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

_LONGEST_PART = 180  # bytes; file systems take 255, and names grow by a counter and suffixes
_LONGEST = 200  # characters with folders; Windows takes 260 for a whole path
_FORBIDDEN = '<>:"|?*'  # on Windows
_RESERVED = re.compile(
    r"(con|prn|aux|nul|com[0-9\xb9\xb2\xb3]|lpt[0-9\xb9\xb2\xb3])\s*(\.|$)", re.I
)


def check_name(widget: str, name: str) -> str:
    """A name with folders as it was typed, its backslashes as slashes.

    Raises:
        ValueError: some system could not store it, or would take it for another.
    """
    if len(name) > _LONGEST:
        raise ValueError(
            f"{widget} has {len(name)} characters; a name with its folders may have {_LONGEST}"
        )
    if not name.isprintable():
        raise ValueError(f"{widget} {name!r} holds a character that is not printable; remove it")
    name = name.replace("\\", "/")
    *_, last = parts = name.split("/")
    if last.strip() in ("", ".", ".."):
        raise ValueError(f"{widget} {name!r} is not a file name; add a name")
    for part in parts:
        problem = None if part in ("", ".", "..") else _problem(part)
        if problem is not None:
            raise ValueError(f"{widget} {name!r}: {part!r} {problem}; give another name")
    return name


def _problem(part: str) -> str | None:
    """Why a file or folder cannot have this name everywhere."""
    if len(part.encode()) > _LONGEST_PART:
        return f"is longer than {_LONGEST_PART} bytes"
    forbidden = next((c for c in part if c in _FORBIDDEN), None)
    if forbidden is not None:
        return f"contains {forbidden!r}, which Windows does not allow in names"
    if part != part.strip(" ") or part.endswith("."):
        return "begins or ends with a space or ends with a dot, which Windows drops"
    if _RESERVED.match(part):
        return "is a device name on Windows"
    return None


def check_target(folder: str, target) -> None:
    """Check where a file would be written, links followed.

    Raises:
        ValueError: that is outside every directory of this model folder.
    """
    roots = folder_paths.get_folder_paths(folder)
    if not any(is_inside(root, target) for root in roots):
        raise ValueError(
            f"{target.name!r} would be written outside the model folder {folder!r}, through a "
            "link; give a target name, which is created in the folder itself"
        )


def is_inside(root, target) -> bool:
    """Whether a path, links followed, lies in a folder.

    Supported ComfyUI versions do not all have such a function.
    """
    return Path(os.path.realpath(target)).is_relative_to(os.path.realpath(root))
