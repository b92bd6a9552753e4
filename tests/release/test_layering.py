"""The rooms: `nodes -> quant -> kernels`, never back, and no torch until something needs it."""

import ast
import json
import re
import struct
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kernels", "quant", "integrations", "nodes")
# What a floor may import of this package beside itself.
FLOORS = {
    "mxfp8.kernels": (),
    "mxfp8.kernels.layout": (),
    "mxfp8.quant": ("mxfp8.kernels",),
    "mxfp8.quant.container": (),
    # The command is made of everything that is no part of ComfyUI.
    "mxfp8.quant.commands": ("mxfp8.quant", "mxfp8.integrations", "mxfp8.kernels"),
    "mxfp8.integrations": ("mxfp8.quant", "mxfp8.kernels"),
    "mxfp8.nodes": ("mxfp8.quant", "mxfp8.kernels"),
    "mxfp8.nodes.host": ("mxfp8.quant", "mxfp8.kernels"),
    "mxfp8.nodes.runtime": ("mxfp8.nodes.host", "mxfp8.quant", "mxfp8.kernels"),
    "mxfp8.nodes.models": (
        "mxfp8.nodes.runtime",
        "mxfp8.nodes.host",
        "mxfp8.quant",
        "mxfp8.kernels",
    ),
}
# What a room must not import although its floor may.
WALLS = {
    "mxfp8.kernels.backends": ("mxfp8.kernels.dispatch", "mxfp8.kernels.ops"),
    "mxfp8.integrations": ("mxfp8.quant.commands", "mxfp8.quant.cli"),
}
KERNELS_MAY_IMPORT = {"torch", "triton", "comfy_kitchen", "cutlass", *sys.stdlib_module_names}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def sources(*folders):
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert paths, f"no Python files in {folders}"
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths}


def module_of(path):
    """(module, package that its relative imports start from) of a file's path."""
    parts = ["mxfp8", *path.removesuffix(".py").split("/")]
    if parts[-1] == "__init__":
        return ".".join(parts[:-1]), ".".join(parts[:-1])
    return ".".join(parts), ".".join(parts[:-1])


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


def is_inside(name, *folders):
    return any(name == folder or name.startswith(f"{folder}.") for folder in folders)


def is_allowed(module, name):
    """Whether `module` may import `name`: both absolute."""
    ours = is_inside(name, "mxfp8")
    floor = max((floor for floor in FLOORS if is_inside(module, floor)), key=len, default=None)
    if ours and floor and not is_inside(name, floor, *FLOORS[floor]):
        return False
    for room, walled in WALLS.items():
        if is_inside(module, room) and is_inside(name, *walled):
            return False
    if ours or is_inside(module, "mxfp8.nodes"):
        return True
    top = name.split(".")[0]
    if is_inside(module, "mxfp8.kernels"):
        return top in KERNELS_MAY_IMPORT
    return not top.startswith("comfy") and top not in ("nodes", "folder_paths")


def violations(path, source):
    module, package = module_of(path)
    return sorted(n for n in imported(source, package) if not is_allowed(module, n))


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


def test_rooms_and_floors_import_only_what_is_below_them():
    found = {path: violations(path, source) for path, source in sources(*ROOMS).items()}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("path", "source", "names"),
    [
        ("kernels/ops.py", "from .. import quant", ["mxfp8.quant"]),
        ("kernels/ops.py", "from ..quant import format", ["mxfp8.quant.format"]),
        ("kernels/ops.py", "import mxfp8.quant.format", ["mxfp8.quant.format"]),
        ("kernels/ops.py", "def f():\n    from mxfp8 import nodes", ["mxfp8.nodes"]),
        ("kernels/ops.py", "try:\n    import numpy\nexcept ImportError:\n    pass", ["numpy"]),
        ("kernels/ops.py", "import comfy.ops", ["comfy.ops"]),
        ("kernels/ops.py", "import mxfp8", ["mxfp8"]),
        ("kernels/layout.py", "from .ops import linear", ["mxfp8.kernels.ops.linear"]),
        ("kernels/backends/eager.py", "from .. import dispatch", ["mxfp8.kernels.dispatch"]),
        (
            "kernels/backends/triton/cast.py",
            "from ...dispatch import named",
            ["mxfp8.kernels.dispatch.named"],
        ),
        ("quant/format.py", "from ..nodes import loading", ["mxfp8.nodes.loading"]),
        ("quant/format.py", "class A:\n    from .. import nodes", ["mxfp8.nodes"]),
        ("quant/format.py", "import nodes, folder_paths", ["folder_paths", "nodes"]),
        ("quant/checks/scan.py", "from comfy_api.latest import io", ["comfy_api.latest.io"]),
        ("quant/checks/scan.py", "from ...nodes import loading", ["mxfp8.nodes.loading"]),
        ("quant/container/header.py", "from .. import format", ["mxfp8.quant.format"]),
        ("quant/container/writer.py", "from ...kernels import layout", ["mxfp8.kernels.layout"]),
        ("quant/format.py", "from ..integrations import mlx", ["mxfp8.integrations.mlx"]),
        ("integrations/mlx.py", "from ..quant import cli", ["mxfp8.quant.cli"]),
        (
            "integrations/mlx.py",
            "from .. import nodes\nimport comfy.ops",
            ["comfy.ops", "mxfp8.nodes"],
        ),
        ("nodes/host/paths.py", "from ..runtime import patch", ["mxfp8.nodes.runtime.patch"]),
        ("nodes/host/paths.py", "from .. import widgets", ["mxfp8.nodes.widgets"]),
        ("nodes/runtime/patch.py", "from ..models import load", ["mxfp8.nodes.models.load"]),
        ("nodes/models/load.py", "from .. import widgets", ["mxfp8.nodes.widgets"]),
    ],
)
def test_the_check_catches_an_import_upwards(path, source, names):
    assert violations(path, source) == names


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/ops.py", "import math, torch.nn, triton\nfrom . import layout"),
        ("kernels/ops.py", "from mxfp8.kernels import layout\nfrom .layout import BLOCK"),
        ("kernels/backends/eager.py", "import comfy_kitchen\nfrom ..layout import BLOCK"),
        ("quant/format.py", "import torch\nfrom .. import kernels\nfrom ..kernels import layout"),
        ("quant/container/writer.py", "from . import header\nfrom .header import quoted"),
        ("quant/commands/converting.py", "from ...integrations import mlx\nfrom .. import format"),
        ("integrations/mlx.py", "import mlx.core\nfrom ..quant import format"),
        ("nodes/saving.py", "import comfy.ops, folder_paths\nfrom .. import kernels, quant"),
        ("nodes/host/progress.py", "import comfy.utils\nfrom ...quant.progress import Pace"),
        ("nodes/runtime/patch.py", "from ..host import settings\nfrom . import cache"),
    ],
)
def test_the_check_passes_an_import_downwards(path, source):
    assert violations(path, source) == []


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


def drawn(text):
    """Paths in the tree that CONTRIBUTING.md draws: names indented below their folder's."""
    (picture,) = re.findall(r"^```\w*\n(__init__\.py .*?)^```$", text, re.MULTILINE | re.DOTALL)
    paths, above = [], []
    for indent, name in re.findall(r"^( *)([\w./]+)", picture, re.MULTILINE):
        while above and above[-1][0] >= len(indent):
            above.pop()
        path = (above[-1][1] if above else "") + name
        paths.append(path)
        if name.endswith("/"):
            above.append((len(indent), path))
    return paths


def test_the_tree_in_contributing_is_that_of_the_rooms():
    paths = drawn((ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    assert [path for path in paths if not (ROOT / path).exists()] == []
    inside = [path for path in paths if path.startswith(tuple(f"{room}/" for room in ROOMS))]
    assert sorted(p for p in inside if p.endswith(".py")) == sorted(sources(*ROOMS))


def test_the_check_sees_where_in_a_tree_a_file_is():
    text = "```\n__init__.py  a\n\nk/   b\n  x.py  c.py, d\n  in/  e\n    y.py\n  z.py\nw/\n```\n"
    assert drawn(text) == ["__init__.py", "k/", "k/x.py", "k/in/", "k/in/y.py", "k/z.py", "w/"]


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
