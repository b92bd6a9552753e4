"""The Python files of the pack, as its archive holds them."""

from __future__ import annotations

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
