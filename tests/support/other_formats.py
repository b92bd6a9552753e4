"""Files in other quantized formats, as their own libraries write them, with zeros for weights.

`FILES` is what `bench/quantized_files.py` collected: name, with the library's version -> a header,
or a whole file.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

TABLE = Path(__file__).parent.parent / "quant" / "fixtures" / "quantized_files.json"
FILES = json.loads(TABLE.read_text(encoding="utf-8"))


def write(path: Path, name: str) -> Path:
    """Write one of `FILES`."""
    entry = FILES[name]
    if "file" in entry:
        path.write_bytes(base64.b64decode(entry["file"]))
        return path
    return write_header(path, entry["header"], entry.get("marker"))


def write_header(path: Path, header: dict, marker: dict | None = None) -> Path:
    """Write a safetensors file of zeros from its header; markers hold `marker`."""
    text = json.dumps(header).encode()
    infos = {k: info["data_offsets"] for k, info in header.items() if k != "__metadata__"}
    data = bytearray(max(end for _, end in infos.values()))
    for key, (begin, end) in infos.items():
        if key.endswith(".comfy_quant"):
            data[begin:end] = json.dumps(marker).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path
