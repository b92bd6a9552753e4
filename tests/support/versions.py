"""Run the tests of the main job against another ComfyUI and another comfy-kitchen.

A run is pytest as a process of its own on the same test files, with COMFYUI_PATH and a PYTHONPATH
on which the other packages come first. So the environment of 6 GB is there once, and no test is
written twice. Torch, transformers and the rest are those of constraints.txt for every version.

    python tests/support/versions.py fetch   download what `make test` runs, not the others
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from comfyui import ROOT, TESTS, Release, fetch, fetch_package, releases

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
    "deepcopy": "force_deepcopy or deep_clone or temporary_file_lives",
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


if __name__ == "__main__":
    if sys.argv[1:] != ["fetch"]:
        sys.exit(__doc__)
    for combination in ends():
        prepare(combination)
