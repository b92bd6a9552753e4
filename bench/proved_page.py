"""The page of `proved.py` and its table for the README, made of results files and refusals alone.

A cell is the strongest of what there is: *run* (a results file of `bench/gpu` from such a card,
or of `bench/cpu.py`), *compiled* (the backend's kernels in every configuration of `kernels/aot.py`,
by one version of a compiler), *one configuration of each kernel compiled*, or *refused*, with the
reason that users get. *library* means that torch's or a vendor's code does it, and that it was not
run on such a card. What was only *interpreted* has a table of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import working_copy

if "mxfp8" not in sys.modules:
    working_copy.load()

import torch
from gpu.report import impersonal

from mxfp8.kernels import aot, device_facts, dispatch
from mxfp8.kernels.backends import fp8_rowwise
from mxfp8.kernels.backends.cute import mx

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE, README = ROOT / "docs" / "proved.md", ROOT / "README.md"
START, END = "<!-- what runs where: bench/proved.py -->", "<!-- end of what runs where -->"
# Architecture -> what it is.
CARDS = {
    "sm_75": "Turing (RTX 20)", "sm_80": "Ampere (A100)", "sm_86": "Ampere (RTX 30)",
    "sm_89": "Ada (RTX 40, L40)", "sm_90": "Hopper (H100, H200)", "sm_100": "Blackwell (B200)",
    "sm_103": "Blackwell (B300)", "sm_110": "Blackwell (Thor)", "sm_120": "Blackwell (RTX 50)",
    "sm_121": "Blackwell (GB10)", "gfx90a": "AMD MI200", "gfx942": "AMD MI300",
    "gfx950": "AMD MI350", "gfx1201": "AMD RX 9070", "cpu": "CPU", "mps": "Apple (MPS)",
    "xpu": "Intel (XPU)",
}  # fmt: skip
# Backend -> its Triton kernels, of which an architecture has those that it needs.
KERNELS = {
    "triton": ("dequantize_kernel", "quantize_kernel", "one_row_kernel", "small_m_kernel"),
    "fp8": ("rowwise_weight_kernel", "rowwise_input_kernel", "copy_kernel", "tma_kernel"),
    "triton_mx": ("mx_kernel",),
}
MISSING, PART = "not compiled", "one configuration of each kernel compiled"
INTRODUCTION = """\
# What is proved, what is run

Made by `python bench/proved.py` from bench/results and the reasons of kernels/dispatch.py; do not
edit. **run**: a results file from such a device, with no failed check. *compiled*: all kernels that
are launched there, in every configuration for bfloat16 and float16 (with a bias), to machine code
with no card at hand, none of which spills; by CuTe DSL, for bfloat16 alone. *library*: torch
multiplies; what it is given is checked by its own rules (`tests/test_blocks.py`), and it was not
run on such a device."""
TRITON = "3.9.0"  # that the devices which are not here are taken to have


def named(arch: str) -> str:
    """A device in words, and its architecture where it has one."""
    return f"{CARDS[arch]}, {arch}" if arch.startswith(("sm_", "gfx")) else CARDS[arch]


def results() -> dict[str, dict]:
    """Every results file by its name."""
    return {p.name: json.loads(p.read_text(encoding="utf-8")) for p in RESULTS.glob("*.json")}


def refusals(arch: str) -> dict[str, str | None]:
    """Why each backend refuses linears of a device that is not here, or None."""
    capability, architecture, device = None, None, torch.device("cuda", 0)
    if arch.startswith("sm_"):
        capability = divmod(int(arch[3:]), 10)
    elif arch.startswith("gfx"):
        architecture = arch
    else:
        device = torch.device(arch)
    facts = {
        "capability": lambda device: capability, "amd_architecture": lambda device: architecture,
        "triton_unsupported_reason": lambda: None,
    }  # fmt: skip
    found = {}
    with (
        mock.patch.multiple(device_facts, **facts),
        mock.patch("triton.__version__", TRITON),
        mock.patch.object(fp8_rowwise, "_torch_runs", lambda device: True),
        mock.patch.object(mx, "dsl_unsupported_reason", lambda: None),
    ):
        for backend in dispatch.BACKENDS:
            if backend.name != "reference":
                precision = "fast" if backend.steps else "exact"
                problem = dispatch.Problem("linear", device, torch.bfloat16, precision)
                found[backend.name] = backend.refuse(problem)
    return found


def wanted(backend: str, arch: str, one: bool = False) -> set[tuple[str, str]]:
    """(kernel, configuration) of all that a backend launches on an architecture, or one of each."""
    number = arch.removeprefix("sm_")
    builds = aot.builds(int(number) if number.isdigit() else number)
    ours = [build for build in builds if build.name in KERNELS.get(backend, ())]
    return {(build.name, build.config) for build in (aot.last_of_each(ours) if one else ours)}


def compiled(found: dict[str, dict], backend: str, arch: str, one: bool = False) -> list[str]:
    """The Tritons that compiled all of a backend for an architecture, and nothing spilled.

    Args:
        one: whether one configuration of each kernel is enough.
    """
    needed, tritons = wanted(backend, arch, one), []
    for run in found["compiled.json"]["runs"]:
        if run["arch"] != arch or not needed:
            continue
        ours = [k for k in run["kernels"] if k["kernel"] in KERNELS[backend]]
        whole = backend != "triton_mx" or all(k["block_scaled"] for k in ours)
        made = {(k["kernel"], k["config"]) for k in ours}
        if whole and needed <= made and not any(k["spills"] for k in ours):
            tritons.append(run["triton"])
    return tritons


def compiled_by_cute(found: dict[str, dict], arch: str) -> list[str]:
    """The versions of CuTe DSL that compiled its kernel, with block scales and without a spill."""
    ours = [k for k in found["compiled.json"]["cute"] if k["arch"] == arch]
    whole = ours and all(k["block_scaled"] and not k["spills"] for k in ours)
    return sorted({k["version"] for k in ours}) if whole else []


def runs(found: dict[str, dict], backend: str, arch: str) -> list[str]:
    """Results files in which a backend ran on such a device, and no check failed."""
    if arch == "cpu":
        return ["cpu.json"] if backend == "eager" and "cpu.json" in found else []
    names = []
    for name, result in found.items():
        capability = result.get("machine", {}).get("capability")
        if capability is None or f"sm_{capability.replace('.', '')}" != arch:
            continue
        ran = {str(row.get("backend")).partition(",")[0] for row in result.get("rows", ())}
        failed = any(check["wrong"] for check in result.get("checks", ()))
        if backend in ran and not failed:
            names.append(name)
    return sorted(names)


def cell(found: dict[str, dict], backend: str, arch: str, refused: str | None) -> str:
    ran = runs(found, backend, arch)
    if ran:
        return "**run** (" + ", ".join(f"[{n}](../bench/results/{n})" for n in ran) + ")"
    if refused is not None:
        return "refused"
    for one, what in ((False, "compiled"), (True, PART)):
        tritons = compiled(found, backend, arch, one)
        if tritons:
            return f"{what}, Triton {' and '.join(tritons)}"
    if backend == "cute_mx":
        versions = " and ".join(compiled_by_cute(found, arch))
        return f"compiled for bfloat16 with a bias, CuTe DSL {versions}" if versions else MISSING
    if backend == "eager":
        return "plain torch, not run"
    return MISSING if backend in KERNELS else "library, not run"


def proof(found: dict[str, dict], backend: str, arch: str) -> str:
    """Of the backend that runs, in a word, for the README."""
    if runs(found, backend, arch):
        return "run"
    if compiled(found, backend, arch):
        return "compiled"
    if compiled(found, backend, arch, one=True):
        return PART
    return MISSING if backend in KERNELS else "not run"


def chosen(refused: dict[str, str | None], arch: str) -> tuple[str, str]:
    """(exact, fast and auto), by name; in the order of dispatch."""
    order = [b for b in dispatch.BACKENDS if b.automatic and refused[b.name] is None]
    exact = next(b.name for b in order if not b.steps)
    return exact, next((b.name for b in order if b.steps), exact)


def table(found: dict[str, dict]) -> list[str]:
    """The README's: what is chosen by itself on each card, and what is proved of it."""
    lines = ["| card | `exact` | `fast`, and `auto` |", "|---|---|---|"]
    for arch in CARDS:
        exact, fast = chosen(refusals(arch), arch)
        said = [f"{n}, {proof(found, n, arch)}" for n in (exact, fast)]
        if exact == fast:
            said[1] = "as exact"
        lines.append(f"| {named(arch)} | {said[0]} | {said[1]} |")
    return lines


def with_table(readme: str) -> str:
    """A README with the table between its markers made anew; without them, as it was."""
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        return readme
    return before + "\n".join([start, "", *table(results()), "", end]) + after


def page() -> str:
    """docs/proved.md."""
    found = results()
    refused = {arch: refusals(arch) for arch in CARDS}
    names = list(next(iter(refused.values())))
    lines = [*INTRODUCTION.splitlines(), "", f"| device | {' | '.join(names)} |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for arch in CARDS:
        cells = (cell(found, name, arch, refused[arch][name]) for name in names)
        lines.append(f"| {named(arch)} | {' | '.join(cells)} |")
    lines += ["", *_interpreted(found), *_block_scaled(found), *_not_compiled(found)]
    lines += ["## Refused, and why", ""]
    for name in names:
        by_reason: dict[str, list[str]] = {}
        for arch in CARDS:
            if refused[arch][name] is not None and not runs(found, name, arch):
                why = impersonal(refused[arch][name]).partition("; this")[0]
                by_reason.setdefault(why, []).append(arch)
        lines += [f"- {name} {why}: {', '.join(archs)}" for why, archs in by_reason.items()]
    return "\n".join([*lines, ""])


def _interpreted(found: dict[str, dict]) -> list[str]:
    had = found["compiled.json"]["interpreter"]
    lines = [
        "## Interpreted",
        "",
        f"The kernels' tests in the interpreter of Triton {had['triton']},",
    ]
    lines += ["against the oracle:", "", "| file | tests | passed |", "|---|---|---|"]
    for name, count in had["files"].items():
        path = f"tests/kernels/triton/{name}.py"
        lines.append(f"| [{name}.py](../{path}) | {count['tests']} | {count['passed']} |")
    return [*lines, ""]


def _block_scaled(found: dict[str, dict]) -> list[str]:
    heads = ("device", "by", "for", "registers", "spills", "shared memory", "multiplies with",
             "scales by `tcgen05.cp`")  # fmt: skip
    lines = ["## Block-scaled matmuls, compiled", "", f"| {' | '.join(heads)} |"]
    lines.append("|---" * len(heads) + "|")
    made = [
        (run["arch"], f"Triton {run['triton']}", kernel)
        for run in found["compiled.json"]["runs"]
        for kernel in run["kernels"]
        if kernel["kernel"] == "mx_kernel"
    ]
    made += [(k["arch"], f"CuTe DSL {k['version']}", k) for k in found["compiled.json"]["cute"]]
    for arch, by, k in made:
        matrix = ", ".join(f"{name} x {count}" for name, count in k["matrix"].items())
        numbers = (k[name] for name in ("config", "registers", "spills", "shared"))
        cells = (arch, by, *numbers, matrix, k["scale_copies"] or "")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def _not_compiled(found: dict[str, dict]) -> list[str]:
    told = [run for run in found["compiled.json"]["runs"] if run["refused"]]
    lines = ["## Not compiled, or with spills", ""]
    for run in found["compiled.json"]["runs"]:
        for k in run["kernels"]:
            if k["spills"]:
                what = f"{k['kernel']} ({k['config']})" if k["config"] else k["kernel"]
                times = f"{k['spills']} loads from and stores to local memory"
                lines.append(f"- {run['arch']} by Triton {run['triton']}: {what} has {times}")
    return lines + [f"- {r['arch']} by Triton {r['triton']}: {r['refused']}" for r in told] + [""]
