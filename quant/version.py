"""The version of this pack, in ComfyUI's custom_nodes folder or installed by pip."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path


def version() -> str:
    """The version in the pack's pyproject.toml; without one, of the installed package."""
    path = Path(__file__).resolve().parent.parent / "pyproject.toml"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    match = re.search(r'^name = "mxfp8"\nversion = "([^"]+)"$', text, re.MULTILINE)
    if match:
        return match[1]
    try:
        return metadata.version("mxfp8")
    except metadata.PackageNotFoundError:
        return "unknown"
