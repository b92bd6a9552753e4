"""The rooms: `nodes -> quant -> kernels`, never back, and no torch until something needs it."""

import ast
import json
import struct
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kernels", "quant", "nodes")  # each may import itself and those before it
KERNELS_MAY_IMPORT = {"torch", "triton", "comfy_kitchen", "cutlass", *sys.stdlib_module_names}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def sources(*folders):
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert paths, f"no Python files in {folders}"
    return {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in paths}


def imported(source, package):
    """Absolute names of what `source`, a module of `package`, imports anywhere in its code."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def allowed(room, name):
    top, *rest = name.split(".")
    if room == "nodes":
        return True
    if top == "mxfp8":
        return rest[:1] in [[below] for below in ROOMS[: ROOMS.index(room) + 1]]
    if room == "kernels":
        return top in KERNELS_MAY_IMPORT
    return not top.startswith("comfy") and top not in ("nodes", "folder_paths")


def violations(source, room):
    return sorted(n for n in imported(source, f"mxfp8.{room}") if not allowed(room, n))


def absolute_imports_of_the_package(source):
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Import, ast.ImportFrom))]
    return [
        ast.unparse(n)
        for n in nodes
        if (isinstance(n, ast.ImportFrom) and not n.level and n.module.split(".")[0] == "mxfp8")
        or (isinstance(n, ast.Import) and any(a.name.split(".")[0] == "mxfp8" for a in n.names))
    ]


def imports_outside_functions(source):
    found, pending = [], [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(ast.unparse(node))
        if not isinstance(node, FUNCTIONS):
            pending.extend(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("room", ["kernels", "quant"])
def test_a_room_imports_only_itself_and_the_rooms_below(room):
    found = {path: violations(source, room) for path, source in sources(room).items()}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("room", "source", "names"),
    [
        ("kernels", "from .. import quant", ["mxfp8.quant"]),
        ("kernels", "from ..quant import format", ["mxfp8.quant.format"]),
        ("kernels", "import mxfp8.quant.format", ["mxfp8.quant.format"]),
        ("kernels", "def f():\n    from mxfp8 import nodes", ["mxfp8.nodes"]),
        ("kernels", "try:\n    import numpy as np\nexcept ImportError:\n    pass", ["numpy"]),
        ("kernels", "import comfy.ops", ["comfy.ops"]),
        ("kernels", "import mxfp8", ["mxfp8"]),
        ("quant", "from ..nodes import files", ["mxfp8.nodes.host.paths"]),
        ("quant", "class A:\n    from .. import nodes", ["mxfp8.nodes"]),
        ("quant", "import nodes, folder_paths", ["folder_paths", "nodes"]),
        ("quant", "from comfy_api.latest import io", ["comfy_api.latest.io"]),
        ("quant", "from comfy import ops", ["comfy.ops"]),
    ],
)
def test_the_check_catches_an_import_upwards(room, source, names):
    assert violations(source, room) == names


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("kernels", "import math, torch.nn, triton\nfrom . import layout\nimport comfy_kitchen"),
        ("kernels", "from mxfp8.kernels import layout\nfrom .layout import BLOCK"),
        ("quant", "import torch\nfrom .. import kernels\nfrom ..kernels import layout\n"),
        ("nodes", "import comfy.ops, folder_paths\nfrom .. import kernels, quant"),
    ],
)
def test_the_check_passes_an_import_downwards(room, source):
    assert violations(source, room) == []


def test_rooms_name_each_other_relatively_because_comfyui_renames_the_package():
    found = {p: absolute_imports_of_the_package(s) for p, s in sources(*ROOMS).items()}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import torch, mxfp8.quant", ["import torch, mxfp8.quant"]),
        ("def f():\n    from mxfp8 import kernels", ["from mxfp8 import kernels"]),
        ("from .. import kernels\nimport mxfp8_other", []),
    ],
)
def test_the_check_catches_the_package_by_name(source, lines):
    assert absolute_imports_of_the_package(source) == lines


def test_the_root_imports_nothing_until_comfyui_asks():
    assert imports_outside_functions((ROOT / "__init__.py").read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import torch", ["import torch"]),
        ("try:\n    from .nodes import x\nfinally:\n    pass", ["from .nodes import x"]),
        ("class A:\n    import torch", ["import torch"]),
        ("async def f():\n    import torch", []),
    ],
)
def test_the_check_catches_an_import_outside_a_function(source, lines):
    assert imports_outside_functions(source) == lines


def not_cp1252(text):
    return [
        line
        for line in text.splitlines()
        if line != line.encode("cp1252", "ignore").decode("cp1252")
    ]


def test_source_is_readable_in_the_default_encoding_of_windows():
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} | {"tests"}
    texts = {p.name: p.read_text("utf-8") for p in ROOT.glob("*.py")} | sources(*folders)
    found = {path: not_cp1252(text) for path, text in texts.items()}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("text", "lines"), [("x = 1\n# a \u2192 b", ["# a \u2192 b"]), ("# \u00e9", [])]
)
def test_the_check_catches_what_cp1252_lacks(text, lines):
    assert not_cp1252(text) == lines


def modules_after(code, folder):
    """Which modules a fresh interpreter holds after running `code`."""
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.split()


@pytest.mark.parametrize(
    "module", ["mxfp8", "mxfp8.kernels", "mxfp8.kernels.layout", "mxfp8.quant.conversion.policy"]
)
def test_importing_costs_no_torch(module, tmp_path):
    modules = modules_after(f"import {module}", tmp_path)
    assert module in modules
    assert "torch" not in modules


def test_reading_a_header_costs_no_torch(tmp_path):
    header = json.dumps({"w": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"ab")
    code = (
        "from mxfp8.quant.format import read_header\n"
        "assert read_header('a.safetensors').tensors['w'].shape == (2,)"
    )
    assert "torch" not in modules_after(code, tmp_path)


def test_using_a_kernel_imports_torch(tmp_path):
    assert "torch" in modules_after("from mxfp8.kernels import quantize", tmp_path)
