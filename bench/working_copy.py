"""This repository as the package `mxfp8`, installed or not, and the facts of a benchmark's machine.

Benchmarks measure the working copy they are in, whatever else is installed as `mxfp8`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def load() -> None:
    """Make `import mxfp8` import this repository, whose root is the package."""
    spec = importlib.util.spec_from_file_location(
        "mxfp8", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["mxfp8"] = module
    spec.loader.exec_module(module)


def kernels_sha256() -> str:
    """A hash of every file in kernels/, in the order of their paths."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def impersonal(text: str) -> str:
    """Text without the folders of this machine, which error messages may contain."""
    folders = {str(ROOT), sys.prefix, str(Path.home())}
    for folder in sorted(folders, key=len, reverse=True):  # one may lie in another
        if len(folder) > 1:
            text = text.replace(folder, "...")
    return text


def write(path: Path, text: str) -> None:
    """Write a file of results, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(impersonal(text), encoding="utf-8")
    part.replace(path)


def machine(device) -> dict[str, object]:
    """The device, and the versions that its speed depends on."""
    import torch

    facts: dict[str, object] = {"gpu": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": l2_bytes(device),
            "driver": _driver(),
        }
    packages = ("torch", "triton", "comfy-kitchen", "comfy-aimdo")
    return facts | {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in packages},
    }


def l2_bytes(device) -> int:
    """Bytes of the device's last-level cache; on a CPU a guess that keeps tests small."""
    import torch

    if device.type != "cuda":
        return 1 << 16
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)


def slug(device) -> str:
    """The device's name as part of a file name."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _version(package: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        output = subprocess.check_output(command, text=True, timeout=20)
        return output.splitlines()[0].strip()
    return None
