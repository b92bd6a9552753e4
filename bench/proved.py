"""What is proved of each backend on each card, and how: docs/proved.md, from results files alone.

    python bench/proved.py             write docs/proved.md
    python bench/proved.py --readme    rewrite the table between the markers in README.md
    python bench/proved.py --check     exit with 1 if either differs from what results files say, or
                                       kernels from those that were compiled
    python bench/proved.py --compile [triton] [cute] [interpreter]
                                       measure these first, or all: bench/results/compiled.json

`--compile` has every kernel compiled for every architecture in every configuration
(`kernels/aot.py`), each in a process of its own, because a compiler that does not know an
architecture may end it, and runs the kernels' tests in Triton's interpreter: a quarter of an hour
or more on two cores. compiled.json also has a hash of the kernels' code, so that no test has to
compile all of it. The page also has what `bench/gpu` and `bench/cpu.py` left in bench/results,
and the reasons of `kernels/dispatch.py`, asked of devices that are not there.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
COMPILED = RESULTS / "compiled.json"
TRITONS = ("3.6.0", "3.9.0")  # that of the pinned torch, and the newest, whose interpreter is whole
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "103", "110", "120", "121", "gfx950")
# What compiles -> the modules of `kernels` that it compiles, which share code.
SOURCES = {
    "triton": ("cast", "w8a16", "rowwise", "fp8_gemm", "mx"),
    "cute": ("mx", "sm100", "sm120", "store"),
}
KEPT = ("kernel", "config", "registers", "spills", "shared", "block_scaled", "scale_copies")
PARTS = (*SOURCES, "interpreter")
sys.path += [str(ROOT / "tests" / "support"), str(ROOT / "bench")]


def label(arch: str) -> str:
    return arch if arch.startswith("gfx") else f"sm_{arch}"


def environment(triton: str) -> dict[str, str]:
    """One in which that Triton comes first."""
    if version("triton") == triton:
        return dict(os.environ)
    from comfyui import fetch_package

    paths = [str(fetch_package("triton", triton)), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def compiled(triton: str, arch: str) -> dict:
    """What a Triton makes of every kernel for an architecture, or the sentence it refuses with."""
    command = [sys.executable, "-m", "mxfp8.kernels.aot", "--arch", arch, "--json"]
    ended = subprocess.run(
        command, env=environment(triton), cwd=ROOT, capture_output=True, text=True
    )
    found = {"triton": triton, "arch": label(arch), "error": None, "kernels": []}
    if ended.returncode:
        return found | {"error": refusal(ended.stderr)}
    for binary in json.loads(ended.stdout):
        found["kernels"].append(summary(binary))
    return found


def summary(binary: dict) -> dict:
    """What is kept of one kernel of `aot --json`: its instructions only as far as they multiply."""
    from mxfp8.kernels.aot import Binary

    return {name: binary[name] for name in KEPT} | {"matrix": Binary(**binary).matrix}


def refusal(said: str) -> str:
    """The line of a compiler's complaint that says what it lacks."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [n for n in lines if "fatal" in n or "LLVM ERROR" in n]
    return (telling or lines[-1:] or ["no word"])[0][:200]


def interpreted() -> dict[str, dict[str, int]]:
    """Tests of each file that Triton's interpreter ran: how many, and how many passed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        subprocess.run(
            [*command, f"--junitxml={report}", "tests/kernels/triton"],
            env=environment(TRITONS[-1]) | {"TRITON_INTERPRET": "1"},
            cwd=ROOT, capture_output=True,
        )  # fmt: skip
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    ran, passed = Counter(), Counter()
    for case in cases:
        name = case.get("classname").rpartition(".")[2]
        ran[name] += 1
        passed[name] += not len(case)  # failures, errors and skips are children
    return {name: {"tests": ran[name], "passed": passed[name]} for name in sorted(ran)}


def by_cute() -> list[dict]:
    """What CuTe DSL makes of its kernels (`kernels/cute_mx.py`), for every card it has one for."""
    from mxfp8.kernels import aot
    from mxfp8.kernels.backends.cute import mx

    found = []
    for name in dict(mx.ARCHITECTURES.values()):
        made = mx.compile_for(name)
        binary = aot.disassemble(made.cubin, made.ptx, made.kernel, made.config, made.shared)
        kept = {"version": version("nvidia-cutlass-dsl"), "arch": name.rstrip("a")}
        found.append(kept | summary(vars(binary)))
    return found


def cute() -> list[dict]:
    """The same beside the newest Triton, whose disassembler knows all of these cards."""
    code = "import json, proved; print(json.dumps(proved.by_cute()))"
    paths = os.pathsep.join([environment(TRITONS[-1])["PYTHONPATH"], str(ROOT / "bench")])
    command = [sys.executable, "-c", code]
    said = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, cwd=ROOT, capture_output=True, text=True,
        check=True,
    ).stdout  # fmt: skip
    return json.loads(said.splitlines()[-1])


def by_triton() -> list[dict]:
    """What every Triton makes of its kernels, for every architecture."""
    pairs, runs = itertools.product(TRITONS, ARCHITECTURES), []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for run in pool.map(lambda pair: compiled(*pair), pairs):
            said = run["error"] or f"{len(run['kernels'])} kernels"
            print(f"Triton {run['triton']}, {run['arch']}: {said}", flush=True)
            runs.append(run)
    return runs


def code_of(node):
    """A syntax tree without docstrings and without what this version of Python adds, as tuples."""
    if isinstance(node, ast.AST):
        fields = [(n, code_of(v)) for n, v in ast.iter_fields(node) if v not in (None, [])]
        return type(node).__name__, fields
    if isinstance(node, list):
        words = [n for n in node if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
        return [code_of(n) for n in node if n not in words]
    return node


def sources(folder: Path = ROOT / "kernels") -> dict[str, str]:
    """What compiles -> a hash of its kernels' code, which words do not change."""
    found = {}
    for name, modules in SOURCES.items():
        room = folder / "backends" / name
        texts = [(room / f"{m}.py").read_text(encoding="utf-8") for m in modules]
        code = repr([code_of(ast.parse(text)) for text in texts])
        found[name] = hashlib.sha256(code.encode()).hexdigest()[:16]
    return found


def changed() -> list[str]:
    """What compiles kernels that are not those of compiled.json any more."""
    then = recorded()["sources"]
    return [name for name, code in sources().items() if then.get(name) != code]


def recorded() -> dict:
    return json.loads(COMPILED.read_text(encoding="utf-8"))


def measure(parts: list[str]) -> None:
    """bench/results/compiled.json; what is not measured anew stays."""
    found, code = recorded(), sources()
    if "triton" in parts:
        found["runs"] = by_triton()
    if "cute" in parts:
        found["cute"] = cute()
    if "interpreter" in parts:
        found["interpreter"] = {"triton": TRITONS[-1], "files": interpreted()}
    found.setdefault("sources", {}).update({p: code[p] for p in parts if p in code})
    COMPILED.write_text(text_of(found), encoding="utf-8")


def text_of(found: dict) -> str:
    """As JSON, a kernel a line."""
    rows = [json.dumps(run | {"kernels": []})[:-3] for run in found["runs"]]
    blocks = []
    for head, run in zip(rows, found["runs"], strict=True):
        kernels = ",\n   ".join(json.dumps(kernel) for kernel in run["kernels"])
        blocks.append(f"  {head}[{kernels and f'{chr(10)}   {kernels}'}]}}")
    rows = ",\n  ".join(json.dumps(kernel) for kernel in found["cute"])
    first = {name: found[name] for name in ("sources", "interpreter")}
    head = json.dumps(first, indent=1).removesuffix("\n}")
    head += f',\n "cute": [\n  {rows}\n ]'
    return head + ',\n "runs": [\n' + ",\n".join(blocks) + "\n ]\n}\n"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("readme", "check"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--compile", nargs="*", choices=PARTS)
    arguments = parser.parse_args(words)
    if arguments.compile is not None:
        measure(arguments.compile or list(PARTS))
    from proved_page import PAGE, README, page, with_table

    texts = {PAGE: page()}
    if README.is_file():
        texts[README] = with_table(README.read_text(encoding="utf-8"))
    if arguments.check:
        stale = [p for p, text in texts.items() if p.read_text(encoding="utf-8") != text]
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what results files say: bench/proved.py")
        for name in changed():
            stale.append(name)
            print(f"kernels are not those of compiled.json: bench/proved.py --compile {name}")
        return int(bool(stale))
    target = README if arguments.readme else PAGE
    target.write_text(texts[target], encoding="utf-8")
    print(f"written: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
