"""Converting a file: `mxfp8 convert` against convert_to_quant, and against copying the file.

    python bench/convert.py [--rounds 3] [--check]

Commands run as a user runs them, start and imports included, in turn, round after round; a figure
is the median over the rounds of the ratio within each round. Ours syncs its file to the disk and
reads it back; convert_to_quant does neither. Models have some of the layers of Z-Image, with random
weights. Results go to bench/results/convert.json.

--check exits with 1 when ours takes more than 0.30 of the time of convert_to_quant. Measured on two
cores of an AMD EPYC: 0.27 at 1.1 GB, 0.21 at 4.0 GB, 0.22 at 8.0 GB. Beyond the start, about 1.4 s
and 3.5 s, the two take about 1.7 and 8 s per GB, so the ratio ends near 0.21, and the smallest
model, where the start counts most, sets the bound; a tenth is for noise between runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cpu import machine, ratio

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "convert.json"
sys.path.insert(0, str(ROOT / "tests" / "support"))

from comfyui import cache, comfyui_path  # noqa: E402

OURS, RIVAL, COPY = "mxfp8", "convert_to_quant", "cp + sync"
VERSION = "1.3.4"
OPTIONS = (
    "--mxfp8",
    "--zimage",
    "--comfy_quant",
    "--save-quant-metadata",
    "--simple",
    "--low-memory",
)
RESIZE = """
import sys
from safetensors.torch import load_file, save_file
tensors = load_file(sys.argv[1])
blocks = range(int(sys.argv[3]))
resized = {k: v for k, v in tensors.items() if "refiner" not in k and "layers." not in k}
for key, value in tensors.items():
    if key.startswith("layers.0."):
        resized |= {key.replace(".0.", f".{b}.", 1): value.clone() for b in blocks}
save_file(resized, sys.argv[2])
"""
BLOCKS = 3, 11, 22
BOUND = 0.30  # of the time of convert_to_quant


def rival(version: str = VERSION) -> Path:
    """The command of convert_to_quant, in an environment of its own that borrows our torch."""
    folder = cache() / f"convert_to_quant-{version}"
    packages = f"convert-to-quant=={version}", "prodigy-plus-schedule-free==2.0.1"
    command = folder / "bin" / "convert_to_quant"
    if not command.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        python = folder / "bin" / "python"
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = subprocess.check_output([python, "-c", where], text=True).strip()
        Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "-q", "install", "--no-deps", *packages], check=True)
    return command


def make_sources(folder: Path) -> list[Path]:
    """Models of 1 to 8 GB, smallest first: some blocks of Z-Image.

    Made by processes of their own: a process that is started counts its parent's memory as its
    own peak.
    """
    script = ROOT / "tests" / "support" / "tiny_models.py"
    subprocess.run([sys.executable, script, comfyui_path(), folder, "zimage"], check=True)
    model = folder / "models" / "diffusion_models" / "zimage.safetensors"
    sources = [model.with_name(f"zimage-{blocks}.safetensors") for blocks in BLOCKS]
    for blocks, source in zip(BLOCKS, sources, strict=True):
        subprocess.run([sys.executable, "-c", RESIZE, model, source, str(blocks)], check=True)
    return sources


def contestants(source: Path, target: Path) -> dict[str, Callable[[], int]]:
    """Name -> what makes the target; returns the peak memory in bytes."""
    mxfp8 = Path(sysconfig.get_path("scripts"), "mxfp8")

    def copy() -> int:
        peak = run("cp", source, target)
        os.sync()
        return peak

    return {
        OURS: lambda: run(mxfp8, "convert", source, target),
        RIVAL: lambda: run(rival(), "-i", source, *OPTIONS, "-o", target),
        COPY: copy,
    }


def run(*command) -> int:
    """Run a command; returns its peak memory in bytes."""
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{errors.decode(errors='replace')[-2000:]}")
    return usage.ru_maxrss * 1024


def measure(source: Path, rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds per contestant and round, after one uncounted round; peak memory in bytes."""
    target = source.with_name("target.safetensors")
    runs = contestants(source, target)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, int] = dict.fromkeys(runs, 0)
    for counted in [False] + [True] * rounds:
        for name, make in runs.items():
            target.unlink(missing_ok=True)
            os.sync()
            start = time.perf_counter()
            peak = make()
            if counted:
                seconds[name].append(time.perf_counter() - start)
                peaks[name] = max(peaks[name], peak)
    target.unlink()
    return seconds, peaks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the bound fails")
    arguments = parser.parse_args()

    figures, failed = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        for source in make_sources(Path(folder)):
            seconds, peaks = measure(source, arguments.rounds)
            name = f"{source.stat().st_size / 1e9:.1f} GB"
            ratios = {f"vs {n}": round(ratio(seconds, OURS, n), 3) for n in (RIVAL, COPY)}
            figures[name] = {
                "seconds": {n: round(statistics.median(s), 2) for n, s in seconds.items()},
                "time ratio": ratios,
                "peak memory in GB": {n: round(peaks[n] / 1e9, 2) for n in (OURS, RIVAL)},
            }
            holds = ratio(seconds, OURS, RIVAL) <= BOUND
            failed += not holds
            state = f"bound {BOUND:.2f} {'holds' if holds else 'FAILS'}"
            print(f"{name}: {figures[name]['seconds']}, {ratios}, {state}", flush=True)

    result = {
        "machine": machine(os.cpu_count() or 0) | {RIVAL: VERSION},
        "rounds": arguments.rounds,
        "figures": figures,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"results: {RESULTS}")
    return int(arguments.check and failed > 0)


if __name__ == "__main__":
    sys.exit(main())
