"""The version of this pack, where it lies in ComfyUI's folder and where it is installed."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path


def version() -> str:
    """The version in pyproject.toml beside the pack; without one, of the installed package."""
    path = Path(__file__).resolve().parent.parent / "pyproject.toml"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(r'^name = "mxfp8"\nversion = "([^"]+)"$', text, re.MULTILINE)
    if found:
        return found[1]
    try:
        return metadata.version("mxfp8")
    except metadata.PackageNotFoundError:
        return "unknown"
