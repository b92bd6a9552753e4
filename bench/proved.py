"""What is proved of each backend on each card, and how: docs/proved.md, from results files alone.

    python bench/proved.py             write docs/proved.md
    python bench/proved.py --readme    rewrite the table between the markers in README.md
    python bench/proved.py --check     exit with 1 if either differs from what results files say
    python bench/proved.py --compile   measure first: bench/results/compiled.json, about 6 minutes

`--compile` has every kernel compiled for every architecture (`kernels/aot.py`), each in a process
of its own, because a compiler that does not know an architecture may end it, and runs the kernels'
tests in Triton's interpreter. The page also has what `bench/gpu.py` and `bench/cpu.py` left in
bench/results, and the reasons of `kernels/dispatch.py`, asked of devices that are not there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
COMPILED = RESULTS / "compiled.json"
TRITONS = ("3.6.0", "3.9.0")  # that of the pinned torch, and the newest, whose interpreter is whole
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "103", "110", "120", "121", "gfx950")
KEPT = ("kernel", "config", "registers", "spills", "shared", "block_scaled", "scale_copies")
sys.path += [str(ROOT / "tests"), str(ROOT / "bench")]  # which have a versions.py each


def label(arch: str) -> str:
    return arch if arch.startswith("gfx") else f"sm_{arch}"


def environment(triton: str) -> dict[str, str]:
    """One in which that Triton comes first."""
    if version("triton") == triton:
        return dict(os.environ)
    from comfyui import fetch_package

    return {**os.environ, "PYTHONPATH": str(fetch_package("triton", triton))}


def compiled(triton: str, arch: str) -> dict:
    """What a Triton makes of every kernel for an architecture, or the sentence it refuses with.

    The pinned Triton compiles every configuration, the newest one of each kernel.
    """
    command = [sys.executable, "-m", "mxfp8.kernels.aot", "--arch", arch, "--json"]
    if triton != TRITONS[0]:
        command.append("--one")
    ended = subprocess.run(
        command, env=environment(triton), cwd=ROOT, capture_output=True, text=True
    )
    found = {"triton": triton, "arch": label(arch), "refused": None, "kernels": []}
    if ended.returncode:
        return found | {"refused": refusal(ended.stderr)}
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
            [*command, f"--junitxml={report}", "tests/triton_kernels"],
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
    from mxfp8.kernels import aot, cute_mx

    found = []
    for name in dict(cute_mx.ARCHITECTURES.values()):
        made = cute_mx.compile_for(name)
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


def measure() -> None:
    """bench/results/compiled.json."""
    runs = []
    for triton in TRITONS:
        for arch in ARCHITECTURES:
            runs.append(compiled(triton, arch))
            said = runs[-1]["refused"] or f"{len(runs[-1]['kernels'])} kernels"
            print(f"Triton {triton}, {label(arch)}: {said}", flush=True)
    found = {"interpreter": {"triton": TRITONS[-1], "files": interpreted()}, "cute": cute()}
    found["runs"] = runs
    COMPILED.write_text(text_of(found), encoding="utf-8")


def text_of(found: dict) -> str:
    """As JSON, a kernel a line."""
    rows = [json.dumps(run | {"kernels": []})[:-3] for run in found["runs"]]
    blocks = []
    for head, run in zip(rows, found["runs"], strict=True):
        kernels = ",\n   ".join(json.dumps(kernel) for kernel in run["kernels"])
        blocks.append(f"  {head}[{kernels and f'{chr(10)}   {kernels}'}]}}")
    rows = ",\n  ".join(json.dumps(kernel) for kernel in found["cute"])
    head = json.dumps({"interpreter": found["interpreter"]}, indent=1).removesuffix("\n}")
    head += f',\n "cute": [\n  {rows}\n ]'
    return head + ',\n "runs": [\n' + ",\n".join(blocks) + "\n ]\n}\n"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("compile", "readme", "check"):
        parser.add_argument(f"--{name}", action="store_true")
    arguments = parser.parse_args(words)
    if arguments.compile:
        measure()
    from proved_page import PAGE, README, page, with_table

    texts = {PAGE: page()}
    if README.is_file():
        texts[README] = with_table(README.read_text(encoding="utf-8"))
    if arguments.check:
        stale = [p for p, text in texts.items() if p.read_text(encoding="utf-8") != text]
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what results files say: bench/proved.py")
        return int(bool(stale))
    target = README if arguments.readme else PAGE
    target.write_text(texts[target], encoding="utf-8")
    print(f"written: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
