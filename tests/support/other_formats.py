"""Files in other quantized formats, as their own libraries write them, with zeros for weights.

`FILES` is what `bench/quantized_files.py` collected: name, with the library's version -> a header,
or a whole file.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

TABLE = Path(__file__).parent.parent / "quant" / "fixtures" / "quantized_files.json"
LAYER = "blocks.0.lin"
FILES = json.loads(TABLE.read_text(encoding="utf-8"))


def write(path: Path, name: str, without: str | None = None) -> Path:
    """Write one of `FILES`, without the layer's tensor of this name."""
    entry = FILES[name]
    if "file" in entry:
        path.write_bytes(base64.b64decode(entry["file"]))
        return path
    header = {k: v for k, v in entry["header"].items() if k != f"{LAYER}.{without}"}
    return write_header(path, header, entry.get("marker"))


def write_header(path: Path, header: dict, marker: dict | None = None) -> Path:
    """Write a safetensors file of zeros from its header; markers hold `marker`."""
    header, data = dict(header), b""
    for key, info in header.items():
        if key != "__metadata__":
            begin, end = info["data_offsets"]
            part = (
                json.dumps(marker).encode() if key.endswith(".comfy_quant") else bytes(end - begin)
            )
            header[key] = {**info, "data_offsets": [len(data), len(data) + len(part)]}
            data += part
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path
