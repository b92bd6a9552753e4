"""The user's choices in ComfyUI's settings that concern the server.

ComfyUI keeps the browser's settings in `user/default/comfy.settings.json`, and has a function to
read them only for a web request. A run is not a web request, so the file is read before each run
(0.1 ms). Where ComfyUI serves several users (`--multi-user`), a run does not show whose it is, so
the settings are ignored, which is logged. Environment variables override them, for servers without
a browser.
"""

from __future__ import annotations

import json
import logging
import os
from functools import cache
from pathlib import Path

import folder_paths
from comfy.cli_args import args

logger = logging.getLogger(__name__)


_LORAS_BESIDE = "MXFP8.LoRAsBesideWeights", "MXFP8_LORAS_BESIDE_WEIGHTS"


def loras_beside() -> bool:
    """Whether LoRAs run beside the weights (`runtime.lora`), or ComfyUI merges them."""
    return _chosen(*_LORAS_BESIDE)


def why_loras_are_merged() -> str:
    """What the user turned off, if `loras_beside` is False."""
    variable = _LORAS_BESIDE[1]
    if os.environ.get(variable, "").strip():
        return f"the environment variable {variable} is {os.environ[variable].strip()}"
    return "the setting LoRAs beside weights is off"


def _chosen(setting: str, variable: str) -> bool:
    """A choice that is on by default."""
    value = os.environ.get(variable, "").strip().lower()
    if value:
        return value not in ("0", "false", "no", "off")
    if args.multi_user:
        _notice_ignored(setting, variable)
        return True
    return _stored().get(setting) is not False


@cache
def _notice_ignored(setting: str, variable: str) -> None:
    """Log once that the users' choice is ignored."""
    logger.warning(
        "MXFP8: ComfyUI serves several users, so the setting %s is ignored; set %s=0 or 1 for all.",
        setting,
        variable,
    )


def _stored() -> dict:
    """The settings of ComfyUI's only user; none where the file is missing or damaged."""
    path = Path(folder_paths.get_user_directory(), "default", "comfy.settings.json")
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}
