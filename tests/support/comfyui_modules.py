"""ComfyUI's modules in this process, for scripts that are run with COMFYUI [FOLDER [NAME ...]].

Import it before them: they parse the command line when they are imported.
"""

from __future__ import annotations

import sys
from pathlib import Path

COMFYUI, FOLDER, NAMES = sys.argv[1], Path(*sys.argv[2:3]), sys.argv[3:]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, COMFYUI)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
