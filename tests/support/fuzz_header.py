"""Coverage-guided fuzzing of what reads a file: header, markers, shapes, scale bytes.

    python tests/support/fuzz_header.py CORPUS [-max_total_time=120 and other options of libFuzzer]

Each input is a whole file. Either a FormatError that names the file refuses it, or the safetensors
library reads the same tensors and the oracle the same values (`mutations`). Anything else, more
than `SLACK` bytes of address space, or more than ten seconds for one input ends the run, with the
input in a file named crash-... or timeout-... . Atheris (LLVM's libFuzzer) watches which branches
of `mxfp8.quant` an input takes, and builds on those that take new ones.

Blind bytes would die at the header's length. So mutation knows the format: it changes the header's
text, a marker's JSON or the data under a right length, or puts in a defect of `mutations`; and
every other time it lays the tensors out anew, so that a changed shape or dtype gets past the
offsets.

An empty CORPUS is filled with sound files. Beside it, CORPUS.json counts the rules that refused.
"""

from __future__ import annotations

import json
import operator
import os
import random
import resource
import signal
import struct
import sys
from collections import Counter
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mxfp8.quant", "mxfp8.kernels.layout"]):
    import mutations
    import torch

    from mxfp8.quant.format import DTYPES

SLACK = 512 << 20  # the corpus and libFuzzer's own tables live in it too; files have 64 kB at most
LARGEST = 1 << 16
GOLDEN = sorted((Path(__file__).resolve().parents[1] / "golden").glob("*.safetensors"))
OPTIONS = (f"-max_len={LARGEST}", "-timeout=10", "-rss_limit_mb=2048", "-mutate_depth=2")
WORDS = ("mxfp8", "nvfp4", ".weight", ".weight_scale", ".comfy_quant", "_quantization_metadata",
         "__metadata__", "layers", "format", "orig_shape", "group_size", "num_experts", "dtype",
         "full_precision_matrix_mult", "shape", "data_offsets", "model.diffusion_model.", "true",
         "null", "9223372036854775808", "1e400", "NaN", "\\ud800", "\\u0000", *DTYPES)  # fmt: skip

ODD = (b"1e400", b"-0", b"NaN", b"1e3", b'"\\ud800"', b"9" * 400, b"[" * 130 + b"]" * 130)

outcomes: Counter = Counter()


# ---- files to begin with -----------------------------------------------------------------------


def lay_out(entries: dict, metadata: dict | None = None) -> bytes:
    """A file of tensors (dtype, shape, bytes), one after the other."""
    header, data = {} if metadata is None else {"__metadata__": metadata}, b""
    for name, (dtype, shape, content) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape,
                        "data_offsets": [len(data), len(data) + len(content)]}  # fmt: skip
        data += content
    return mutations.join(header, data)


def seeds() -> dict[str, bytes]:
    """Small files of every kind that is read: markers, formats, experts, plain FP8, golden ones."""
    codes, scales = bytes(range(0x70, 0x7E)) * 80, bytes([120]) * 512
    weight, scale = ("F8_E4M3", [32, 32], codes[:1024]), ("U8", [128, 4], scales)
    conf = {"format": "mxfp8", "group_size": 32, "orig_shape": [30, 31]}
    other = {"format": "nvfp4", "full_precision_matrix_mult": True}
    bank = {"format": "mxfp8", "num_experts": 1}

    def tensor(content: dict):
        text = json.dumps(content).encode()
        return "U8", [len(text)], text

    def marked(layers: dict) -> dict:
        text = json.dumps({"format_version": "1.0", "layers": layers})
        return {"_quantization_metadata": text}

    layer = {"a.weight": weight, "a.weight_scale": scale}
    prefixed = {f"model.diffusion_model.{name}": entry for name, entry in layer.items()}
    experts = {"a.weight": ("F8_E4M3", [1, 32, 32], codes[:1024]),
               "a.weight_scale": ("U8", [1, 128, 4], scales)}  # fmt: skip
    return {
        "empty": lay_out({}),
        "plain": lay_out({"a.weight": ("BF16", [2, 2], bytes(8)), "s": ("F32", [], bytes(4))}),
        "both": lay_out({**layer, "a.comfy_quant": tensor(conf)}, marked({"a": conf})),
        "header": lay_out(prefixed, marked({"a": conf, "b": other})),
        "tensor": lay_out({**layer, "a.comfy_quant": tensor(conf), "b": ("F4", [2], b"0")}),
        "experts": lay_out({**experts, "a.comfy_quant": tensor(bank)}),
        "fp8": lay_out({"a.weight": ("F8_E4M3", [40, 32], bytes(range(64)) * 20)}),
        **{path.name: path.read_bytes() for path in GOLDEN if path.stat().st_size < LARGEST // 2},
        "e8m0": lay_out({**layer, "a.weight_scale": ("F8_E8M0", *scale[1:])}, marked({"a": conf})),
    }


# ---- one input ---------------------------------------------------------------------------------


def try_one(data: bytes, path: Path) -> None:
    """Have a file read; raises where neither of the two things happens that may."""
    path.write_bytes(data)
    message = mutations.attempt(mutations.checked, path, path.with_suffix(".none"))
    outcomes["accepted" if message is None else mutations.rule(message)] += 1


def count(data: bytes, path: Path, report: Path) -> None:
    """As `try_one`; every thousandth time, write down what came of the inputs so far."""
    try:
        try_one(data, path)
    except BaseException:
        # Atheris's timer goes on while the process ends, and its signal would then kill it.
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise
    outcomes["inputs"] += 1
    if outcomes["inputs"] % 1000 == 0:  # libFuzzer ends the process without Python's say
        report.write_text(json.dumps(dict(outcomes.most_common()), indent=1), encoding="ascii")


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Another file made of one; `atheris.Mutate` uses what coverage has taught libFuzzer."""
    r = random.Random(seed)
    try:
        data = r.choice(CHANGES)(r, data)
        if r.random() < 0.5:
            data = settle(data)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error,
            RecursionError, OverflowError):  # fmt: skip
        data = atheris.Mutate(data, max_size)  # no structure is left to change
    return data[:max_size]


def change_text(r: random.Random, data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    text, rest = data[8 : 8 + length], data[8 + length :]
    return mutations.join(atheris.Mutate(text, len(text) + 64), rest)


def add_field(r: random.Random, data: bytes) -> bytes:
    """Put in a field, or the first of a list, of JSON on which readers differ."""
    (length,) = struct.unpack("<Q", data[:8])
    text, rest = data[8 : 8 + length], data[8 + length :]
    places = [i + 1 for i, byte in enumerate(text) if byte in b"{["]
    place = r.choice(places)
    name = b'"x": ' if text[place - 1 : place] == b"{" else b""
    comma = b"" if text[place : place + 1] in (b"}", b"]") else b","
    return mutations.join(text[:place] + name + r.choice(ODD) + comma + text[place:], rest)


def change_value(r: random.Random, data: bytes) -> bytes:
    """Put another value somewhere into the header's JSON."""
    header, rest = mutations.split(data)
    return mutations.join(replaced(r, header), rest)


def change_marker(r: random.Random, data: bytes) -> bytes:
    """Change the JSON of a marker, in its tensor or in the header."""
    header, rest = mutations.split(data)
    metadata = header.get("__metadata__", {})
    if "_quantization_metadata" in metadata and r.random() < 0.5:
        text = metadata["_quantization_metadata"].encode()
        metadata["_quantization_metadata"] = other_json(r, text).decode("utf-8", "replace")
        return mutations.join(header, rest)
    entry = header[r.choice([name for name in header if name.endswith(".comfy_quant")])]
    begin, end = entry["data_offsets"]
    text = other_json(r, rest[begin:end])
    entry["shape"] = [len(text)]
    return settle(mutations.join(header, rest), {begin: text})


def other_json(r: random.Random, text: bytes) -> bytes:
    if r.random() < 0.3:
        return atheris.Mutate(text, len(text) + 64)
    return json.dumps(replaced(r, json.loads(text))).encode()


def replaced(r: random.Random, value):
    """JSON with one value in it replaced, removed or added."""
    if not isinstance(value, (dict, list)) or not value or r.random() < 0.15:
        return r.choice((*mutations.NUMBERS, *WORDS))
    key = r.choice(list(value)) if isinstance(value, dict) else r.randrange(len(value))
    if r.random() < 0.1:
        del value[key]
    elif isinstance(value, dict) and r.random() < 0.1:
        value[r.choice(WORDS)] = value[key]
    else:
        value[key] = replaced(r, value[key])
    return value


def change_any(r: random.Random, data: bytes) -> bytes:
    return atheris.Mutate(data, LARGEST)


CHANGES = (mutations.mutate, change_text, change_value, change_value, change_marker, change_marker,
           add_field, change_any)  # fmt: skip


def settle(data: bytes, instead: dict[int, bytes] = {}) -> bytes:  # noqa: B006
    """Give every tensor the bytes that its dtype and shape need, one after the other.

    Args:
        instead: new bytes of tensors, by where they began.
    """
    header, rest = mutations.split(data)
    out = b""
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        size = DTYPES[entry["dtype"]]
        for count in map(operator.index, entry["shape"]):
            size *= count
        if not 0 <= size <= 8 * LARGEST:
            raise ValueError("too large a file")
        old = instead.get(begin, rest[begin:end])
        entry["data_offsets"] = [len(out), len(out) + size // 8]
        out += old[: size // 8].ljust(size // 8, b"\x40")
    return mutations.join(header, out)


# ---- the process -------------------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    corpus = Path(next(a for a in arguments if not a.startswith("-")))
    corpus.mkdir(parents=True, exist_ok=True)
    if not any(corpus.iterdir()):
        for name, data in seeds().items():
            (corpus / name).write_bytes(data)
    torch.set_num_threads(1)
    path, words = corpus.with_suffix(".fuzzed"), corpus.with_suffix(".words")
    path.unlink(missing_ok=True)
    # In memory, which is two to five times as fast, and gone with the process.
    path.symlink_to(f"/proc/{os.getpid()}/fd/{os.memfd_create('fuzzed')}")
    words.write_text("".join(f"{json.dumps(w)}\n" for w in WORDS), encoding="ascii")
    for data in seeds().values():  # what is imported late counts for no input
        try_one(data, path)
    outcomes.clear()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SLACK, -1))
    atheris.Setup(
        [sys.argv[0], *OPTIONS, f"-dict={words}", *arguments],
        lambda data: count(data, path, corpus.with_suffix(".json")),
        custom_mutator=mutate,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
