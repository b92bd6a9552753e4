"""The promises of SECURITY.md that no other test holds: nothing but files is touched."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import matrix
from pack import SOURCES
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
# Modules that reach the network, run programs or code, or read pickles.
FORBIDDEN = {
    "aiohttp", "asyncio", "dill", "ftplib", "http", "httpx", "huggingface_hub", "importlib.util",
    "joblib", "marshal", "multiprocessing", "pickle", "requests", "runpy", "shelve", "smtplib",
    "socket", "socketserver", "ssl", "subprocess", "urllib", "webbrowser", "xmlrpc", "zipfile",
}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "unsafe_load"}
SAFE_COMPILE = {"re.compile", "regex.compile", "cute.compile"}


def dotted(node: ast.expr) -> str:
    return ast.unparse(node)


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_the_source_reaches_no_network_program_or_pickle(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    roots = {name for name in imported(tree) if {name, name.split(".")[0]} & FORBIDDEN}
    assert roots == set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name not in SAFE_COMPILE:
                assert name.rpartition(".")[2] not in CALLS, f"line {node.lineno}: {name}"
            assert name != "torch.load", f"line {node.lineno}"
        if isinstance(node, ast.Attribute):  # of ComfyUI's web server
            assert node.attr not in ("routes", "add_routes", "add_static"), f"line {node.lineno}"


def test_nothing_imports_the_command_that_starts_programs():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert "import aot" not in text and ".aot" not in text, path


def test_installing_runs_nothing_and_fetches_nothing():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.strip() and not line.startswith("#")] == []
    for name in ("install.py", "uninstall.py", "prestartup_script.py", "setup.py"):
        assert not (ROOT / name).exists()


WATCHED = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork",
           "pickle.find_class", "urllib.", "ftplib.", "smtplib.", "shutil.")  # fmt: skip

WATCH = f"""
import json, os, sys
from pathlib import Path
from mxfp8.quant.cli import main
import torch, tqdm
from mxfp8.quant.checks import inspect, repair, scan, verify
from mxfp8.quant.conversion import convert
from mxfp8 import kernels
kernels.quantize(torch.zeros(32, 32))  # what torch does on first use is no doing of ours

folder = Path(sys.argv[1])
seen, opened = [], []

def hook(event, arguments):
    if event.startswith({WATCHED!r}):
        seen.append(event)
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        opened.append(str(arguments[0]))

sys.addaudithook(hook)
status = [main([word.replace("@", str(folder)) for word in line.split()]) for line in (
    "convert @/source @/new.sft --report @/report.json",
    "inspect @/new.sft", "verify @/new.sft --source @/source", "repair @/lost @/repaired.sft",
    "convert @/pickle @/none.sft",
)]
sys.stdout.flush()
print(json.dumps([status, seen, [o for o in opened if not o.startswith(str(folder))]]))
"""


def test_a_conversion_opens_no_socket_runs_no_program_and_writes_only_its_files(tmp_path):
    """As Python's audit events tell it."""
    save_file({"a.weight": matrix(64, 64), "b": matrix(3, 3)}, tmp_path / "source")
    lost = {"a.weight": torch.full((64, 64), 448.0).to(torch.float8_e4m3fn),
            "a.weight_scale": torch.full((128, 4), 127, dtype=torch.uint8)}  # fmt: skip
    save_file(lost, tmp_path / "lost")
    torch.save({"a.weight": matrix(64, 64)}, tmp_path / "pickle")
    out = subprocess.check_output(
        [sys.executable, "-c", WATCH, tmp_path], text=True, stderr=subprocess.DEVNULL
    )
    status, seen, elsewhere = json.loads(out.splitlines()[-1])
    assert status == [0, 0, 0, 0, 1]
    assert [event for event in seen if event != "shutil.disk_usage"] == []
    assert elsewhere == []
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"source", "lost", "pickle", "new.sft", "report.json", "repaired.sft"}
