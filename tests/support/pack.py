"""The Python files of the pack, as its archive holds them, and an environment to install it in."""

from __future__ import annotations

import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kernels", "quant", "integrations", "nodes")
# A developer's command, which compiles our own kernels and runs Triton's disassembler.
COMMAND = ROOT / "kernels" / "aot.py"
SOURCES = sorted(
    path
    for path in [ROOT / "__init__.py", *(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))]
    if path != COMMAND
)


def environment(folder: Path) -> tuple[Path, Path]:
    """A virtual environment that sees the tests' packages; pip can change none of them.

    Returns:
        Its Python and its folder of packages.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    packages = Path(
        sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    )
    # A path in a .pth file is no site folder: this pack's own editable install is not seen.
    (packages / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python", packages
