"""Damage files in every way and see what the package makes of them; run as a process of its own.

    python tests/support/mutations.py COUNT SEED

Each of COUNT mutants is a small safetensors file with one to four defects: bytes, truncation,
splices, the header's length, JSON, dtypes, shapes, offsets, names, markers, scales. It must load
right or be refused by a FormatError (or ValueError from a conversion) that names the file. Loading
right means that the safetensors library reads the same tensors, that no scale in use is NaN by the
published formula of the tiled order, and that every layer decodes to the oracle's values.

No mutant may need more address space than `READING` or `WRITING` has, or `SLOWEST` seconds. Prints:
{"loaded": n, "refused": n, "rules": {message without names: count}}.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open

from mxfp8 import kernels
from mxfp8.kernels.backends import reference
from mxfp8.quant.checks.inspect import inspect_file
from mxfp8.quant.checks.repair import repair_file
from mxfp8.quant.checks.scan import check_file
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.format import DTYPES, FormatError, read_header

READING = 32 << 20  # bytes; files have 20 kB
WRITING = 1 << 30  # stacks and heaps of threads: reserved, not used
SLOWEST = 5.0  # seconds of CPU time; of 10,000 on a busy machine, the slowest took 0.11
NUMBERS = (0, 1, -1, 2, 31, 33, 64, 127, 128, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63,
           2**64, 10**30, 0.5, 1e400, None, True, "32", [], {})  # fmt: skip
NAMES = ("", "a.weight", "a.weight_scale", "a.comfy_quant", "__metadata__", "b", "\0", "../x",
         "\ud800", "x" * 5000, "model.diffusion_model.a.weight")  # fmt: skip
CONFS = ({"format": "mxfp8"}, {"format": "nvfp4"}, {"format": 1}, {}, [], "mxfp8", None,
         {"format": "mxfp8", "orig_shape": [1, 1]}, {"format": "mxfp8", "group_size": 16},
         {"format": "mxfp8", "num_experts": 2}, {"format": "float8_e4m3fn"})  # fmt: skip


# ---- the files that are damaged ----------------------------------------------------------------


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape):
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    return {"a.weight": matrix(40, 72), "blocks.0.lin.weight": matrix(64, 64), "a.bias": matrix(40),
            "norm.weight": matrix(72), "conv.weight": matrix(4, 3, 3, 3)}  # fmt: skip


def originals(folder: Path) -> dict[str, bytes]:
    """Sound files: a source, its conversion with both markers, and with either alone."""
    safetensors.torch.save_file(weights(), folder / "source", {"title": "small"})
    convert_file(folder / "source", folder / "both")
    tensors = safetensors.torch.load_file(folder / "both")
    with safe_open(folder / "both", "pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file(tensors, folder / "tensors", {"title": "small"})
    bare = {k: v for k, v in tensors.items() if not k.endswith(".comfy_quant")}
    safetensors.torch.save_file(bare, folder / "header", metadata)
    return {name: (folder / name).read_bytes() for name in ("source", "both", "tensors", "header")}


# ---- defects -----------------------------------------------------------------------------------


def split(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def flip_bytes(r: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 8, 64))):
        if out:
            out[r.randrange(len(out))] = r.randrange(256)
    return bytes(out)


def flip_header(r, data):
    (length,) = struct.unpack("<Q", data[:8])
    end = min(len(data), 8 + length)
    return flip_bytes(r, data[:end]) + data[end:]


def cut(r, data):
    return data[: r.randrange(len(data) + 1)]


def extend(r, data):
    return data + r.randbytes(r.choice((1, 7, 64, 4096)))


def splice(r, data):
    first, last = sorted(r.randrange(len(data) + 1) for _ in range(2))
    return r.choice((data[:first] + data[last:], data[:last] + data[first:]))


def set_length(r, data):
    length = r.choice((0, 1, len(data), len(data) - 8, 2**31, 2**63, 2**64 - 1, r.randrange(9999)))
    return struct.pack("<Q", length) + data[8:]


def set_entry(r, data):
    """Change a field of a tensor's entry, or the entry."""
    header, rest = split(data)
    key = r.choice(list(header))
    if key == "__metadata__" or not isinstance(header[key], dict) or r.random() < 0.1:
        header[key] = r.choice(NUMBERS)
        return join(header, rest)
    entry = header[key]
    part = r.choice(("dtype", "shape", "data_offsets", "extra"))
    if part == "dtype":
        entry["dtype"] = r.choice([*DTYPES, "F3", "", 8])
    elif part == "extra":
        entry[r.choice(("strides", "dtype ", "shape"))] = r.choice(NUMBERS)
    elif r.random() < 0.2 or not isinstance(entry.get(part), list) or not entry[part]:
        entry[part] = r.choice(([], [0], [1] * 70, [2**40] * 3, [0, 2**62, 4], "x", None))
    else:
        index = r.randrange(len(entry[part]))
        old = entry[part][index]
        near = (old + r.choice((-1, 1, 32, -32)),) if isinstance(old, int) else ()
        entry[part][index] = r.choice((*near, *NUMBERS))
    return join(header, rest)


def reshape(r, data):
    """Another shape of as many elements: only the rules of the format can tell."""
    header, rest = split(data)
    keys = [k for k, e in header.items() if k != "__metadata__" and len(e["shape"]) == 2]
    if keys:
        shape = header[r.choice(keys)]["shape"]
        rows, cols = shape
        shape[:] = r.choice(([cols, rows], [rows * cols], [1, rows, cols], [rows, cols, 1],
                             [rows * 2, cols // 2], [rows // 2, cols * 2]))  # fmt: skip
    return join(header, rest)


def rename(r, data):
    header, rest = split(data)
    keys = list(header)
    old = r.choice(keys)
    new = r.choice((*NAMES, *keys, old + "x", old[:-1], "model." + old))
    return join({(new if k == old else k): v for k, v in header.items()}, rest)


def drop(r, data):
    header, rest = split(data)
    header.pop(r.choice(list(header)))
    return join(header, rest)


def drop_whole(r, data):
    """A tensor less, and a file that is otherwise sound: only the rules of the format can tell."""
    header, rest = split(data)
    entries = {k: v for k, v in header.items() if k != "__metadata__"}
    gone = r.choice(list(entries))
    out, kept = b"", {}
    for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if key == gone:
            continue
        begin, end = entry["data_offsets"]
        kept[key] = {**entry, "data_offsets": [len(out), len(out) + end - begin]}
        out += rest[begin:end]
    metadata = {"__metadata__": header["__metadata__"]} if "__metadata__" in header else {}
    return join({**metadata, **kept}, out)


def swap(r, data):
    """Two entries trade places or fields."""
    header, rest = split(data)
    one, other = r.choice(list(header)), r.choice(list(header))
    if r.random() < 0.5 or "__metadata__" in (one, other):
        header[one], header[other] = header[other], header[one]
    else:
        part = r.choice(("dtype", "shape", "data_offsets"))
        header[one][part], header[other][part] = header[other][part], header[one][part]
    return join(header, rest)


def repeat(r, data):
    """A key twice in the header's text."""
    header, rest = split(data)
    key = r.choice(list(header))
    text = json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(header[key])}}}"
    return join(text.encode(), rest)


def nest(r, data):
    header, rest = split(data)
    deep = r.choice((b"[", b'{"a":')) * r.choice((10, 1000, 100_000))
    return join(r.choice((deep, json.dumps(header).encode()[:-1] + b', "x": ' + deep)), rest)


def set_header_marker(r, data):
    header, rest = split(data)
    metadata = header.setdefault("__metadata__", {})
    layers = {"a": {"format": "mxfp8", "orig_shape": [40, 72]}}
    with contextlib.suppress(KeyError, ValueError):
        layers = json.loads(metadata["_quantization_metadata"])["layers"]
    name = r.choice([*layers, "b", "a.bias", "norm", "conv", "model.a", ""])
    layers[name] = r.choice(CONFS)
    text = r.choice((json.dumps({"layers": layers}),) * 6 + ("", "{", "[]", '{"layers": 1}'))
    metadata["_quantization_metadata"] = text
    return join(header, rest)


def at(r, data, suffix, change) -> bytes:
    """Change the bytes of one tensor whose name ends so."""
    header, rest = split(data)
    keys = [k for k in header if k.endswith(suffix)]
    if not keys:
        return data
    begin, end = header[r.choice(keys)]["data_offsets"]
    out = bytearray(rest)
    out[begin:end] = change(out[begin:end])[: end - begin].ljust(end - begin)
    return join(header, bytes(out))


def set_tensor_marker(r, data):
    return at(r, data, ".comfy_quant", lambda old: json.dumps(r.choice(CONFS)).encode())


def flip_scales(r, data):
    def change(old):
        for _ in range(r.choice((1, 2, 9))):
            old[r.randrange(len(old))] = r.choice((255, 254, 0, 1, r.randrange(256)))
        return old

    return at(r, data, ".weight_scale", change)


def flip_codes(r, data):
    return at(r, data, ".weight", lambda old: bytearray(flip_bytes(r, bytes(old))))


# Those that only the rules of the format can tell come twice.
DEFECTS = (flip_bytes, flip_header, cut, extend, splice, set_length, set_entry, set_entry, reshape,
           reshape, rename, drop, drop_whole, drop_whole, swap, repeat, nest, set_header_marker,
           set_header_marker, set_tensor_marker, set_tensor_marker, flip_scales, flip_scales,
           flip_codes)  # fmt: skip


def mutate(r: random.Random, data: bytes) -> bytes:
    for _ in range(r.choice((1, 1, 1, 2, 2, 4))):
        # A defect of structure cannot be put into what has lost its structure already.
        with contextlib.suppress(ArithmeticError, AttributeError, LookupError, MemoryError,
                                 RecursionError, TypeError, ValueError, struct.error):  # fmt: skip
            data = r.choice(DEFECTS)(r, data)
    return data


# ---- what may come of them ---------------------------------------------------------------------


def loads_right(path: Path) -> None:
    """Hold a file that was accepted to readers of its parts that share nothing with ours."""
    header = read_header(path)
    tensors = {}
    with safe_open(path, "pt") as file:  # the library accepts all that we accept
        assert set(file.keys()) == set(header.tensors)
        for name, info in header.tensors.items():
            view = file.get_slice(name)
            assert (view.get_dtype(), tuple(view.get_shape())) == (info.dtype, info.shape)
        for layer in header.layers.values():
            for info in (layer.weight, layer.scale):
                tensors[info.name] = file.get_tensor(info.name)
    for layer in header.layers.values():
        qdata, scale = tensors[layer.weight.name], tensors[layer.scale.name].view(torch.uint8)
        flat, blocks = scale.flatten(), qdata.shape[1] // 32
        tiles = -(-blocks // 4)
        for row in range(layer.shape[0]):
            for col in range(blocks):
                offset = ((row // 128) * tiles + col // 4) * 512
                offset += (row % 32) * 16 + (row % 128) // 32 * 4 + col % 4
                assert flat[offset] != 255, (layer.name, row, col)
        with kernels.use_backend("eager"):
            value = kernels.dequantize(qdata, scale, torch.float32, layer.shape)
        expected = reference.dequantize(qdata, scale, torch.float32, *layer.shape)
        assert torch.equal(value.nan_to_num(7.0), expected.nan_to_num(7.0)), layer.name


def checked(path: Path, new: Path) -> None:
    check_file(path)
    loads_right(path)


def inspected(path: Path, new: Path) -> None:
    inspect_file(path)


def repaired(path: Path, new: Path) -> None:
    repair_file(path, new)
    check_file(new)
    loads_right(new)


def converted(path: Path, new: Path) -> None:
    convert_file(path, new)
    check_file(new)
    loads_right(new)


def attempt(action, path: Path, new: Path) -> str | None:
    """The message with which an action refuses a file, or None where it does its work."""
    try:
        action(path, new)
    except FormatError as error:
        message = str(error)
    except ValueError as error:  # from a conversion: NaN, nothing to quantize
        if action is not converted:
            raise
        message = str(error)
    else:
        return None
    assert path.name in message, message
    assert len(message) < 2000, message[:200]
    assert not new.exists(), message
    return message


def rule(message: str) -> str:
    """A message without names and numbers, to count the rules that refuse files."""
    return re.sub(r"['\"].*['\"]|\[[^]]*\]|[0-9]+", "..", message)[:80]


def run(count: int, seed: int, folder: Path) -> dict:
    torch.set_num_threads(1)
    r = random.Random(seed)
    whole = originals(folder)
    path, new = folder / "mutant", folder / "new"
    for data in whole.values():  # warm up: what is imported late counts for no mutant
        path.write_bytes(data)
        for action in (checked, inspected, repaired, converted):
            with contextlib.suppress(ValueError):
                attempt(action, path, new)
            new.unlink(missing_ok=True)

    def limit(slack: int) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + slack, -1))

    outcomes: Counter = Counter()
    rules: Counter = Counter()
    for index in range(count):
        name = r.choice(list(whole))
        data = mutate(r, whole[name])
        action = converted if name == "source" else r.choice((checked,) * 4 + (inspected, repaired))
        path.write_bytes(data)
        limit(READING if action in (checked, inspected) else WRITING)
        start = time.process_time()
        try:
            message = attempt(action, path, new)
        except BaseException:
            kept = folder.parent / f"mutant-{seed}-{index}"
            kept.write_bytes(data)
            print(f"{action.__name__} of {kept}, number {index} of seed {seed}:", file=sys.stderr)
            raise
        seconds = time.process_time() - start
        assert seconds < SLOWEST, f"number {index} of seed {seed} took {seconds:.1f} s"
        new.unlink(missing_ok=True)
        left = set(os.listdir(folder)) - {*whole, "mutant"}
        assert not left, f"number {index} of seed {seed} left {left}"
        outcomes["refused" if message else "loaded"] += 1
        if message:
            rules[rule(message)] += 1
    return {**outcomes, "rules": dict(rules.most_common())}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        inner = Path(temporary) / "files"
        inner.mkdir()
        print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]), inner)))
