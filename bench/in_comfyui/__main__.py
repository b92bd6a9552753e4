"""Models in the real ComfyUI on a GPU: ours against stock and BF16.

    python bench/in_comfyui [--image-model FILE --prompts FILE] [--minutes 5] [--out DIR]
    python bench/in_comfyui --device cpu --quick      to try the script without a GPU

ComfyUI is the one at COMFYUI_PATH, or that of the tests; this Python must have what it needs.

A Z-Image with few layers of full width and a trained image model, that of bench/emoji unless told
otherwise, are sampled in BF16, in MXFP8 by stock, and in MXFP8 by ours, exact and fast. Each mode
has its own process, so that a crash does not affect the others; dynamic VRAM is on, as it is by
default, except where a mode turns it off. `difference` is the relative difference of the latents
from those in BF16, and `quantized_by` stock's, of which `bound` is 1.25 (exact) or 2 (fast) times.
Results go to bench/results/<gpu>-comfy-<date>.json and a table beside it, as rows come. The exit
status is 1 if something is wrong, 3 if there is no ComfyUI that starts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import working_copy

START = time.monotonic()
sys.path.insert(0, str(working_copy.ROOT / "tests" / "support"))

from comfyui import comfyui_path  # noqa: E402


@dataclass(frozen=True)
class Mode:
    """How ComfyUI is started and what is done to the model.

    Attributes:
        reload: whether it is also unloaded and sampled again.
        cpu: whether it is tried without a GPU.
    """

    name: str
    options: tuple[str, ...] = ()
    lora: bool = False
    compile: bool = False
    reload: bool = False
    cpu: bool = False


MODES = (
    Mode("TorchCompile", compile=True),
    Mode("default", reload=True, cpu=True),
    Mode("LoRA", lora=True, cpu=True),
    Mode("static VRAM", ("--disable-dynamic-vram",), reload=True),
    Mode("offload all", ("--novram",)),
)
_LEAST = 15  # seconds in which a mode may have a row
_SHARE = 0.5  # of the time that is left, which one mode may take


# A Flux of 5.9 million parameters (bench/emoji), and eight of its prompts.
_TRAINED = working_copy.ROOT / "tests" / "models"
_IMAGE_MODEL, _PROMPTS = _TRAINED / "emoji.safetensors", _TRAINED / "emoji-prompts.safetensors"


class Run:
    def __init__(self, arguments, work: Path):
        self.arguments, self.work = arguments, work
        self.end = START + 60 * arguments.minutes
        try:
            self.comfyui = str(comfyui_path())
        except FileNotFoundError as error:
            _leave(f"{error}, or set COMFYUI_PATH")
        self.models = arguments.models or work / "models"
        machine = self._make_models()
        date = datetime.date.today().isoformat()
        self.path = arguments.out / f"{machine.pop('slug')}-comfy-{date}.json"
        version = Path(self.comfyui, "comfyui_version.py").read_text(encoding="utf-8")
        self.result = {
            "machine": machine | {"comfyui": version.split('"')[1]},
            "date": date,
            "kernels_sha256": working_copy.kernels_sha256(),
            "rows": [],
            "not_run": [],
        }

    def _make_models(self) -> dict:
        """Facts of the machine, from a process that has ended when the memory is needed."""
        quick, given = self.arguments.quick, self.arguments
        layers = str(0 if quick else given.layers)
        command = ["models.py", self.comfyui, str(self.models), given.device, layers]
        command += [str(given.image_model or _IMAGE_MODEL), str(given.prompts or _PROMPTS)]
        process = self._child(command, "models")
        try:
            process.wait(max(1, self.end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            sys.exit("no time left to make the models")
        output = self._log("models")
        lines = output.splitlines()
        if process.returncode and lines and lines[-1].startswith("ModuleNotFoundError"):
            _leave(f"{lines[-1]}, for it pip install -r {self.comfyui}/requirements.txt")
        if process.returncode:
            sys.exit(f"the models could not be made:\n{output}")
        return json.loads(next(line for line in reversed(lines) if line.startswith("{")))

    def _child(self, command: list[str], name: str) -> subprocess.Popen:
        """A script of this folder, its output in a file."""
        script = str(Path(__file__).resolve().parent / command[0])
        with (self.work / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, script, *command[1:]], stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip

    def _log(self, name: str) -> str:
        """The end of its output."""
        return (self.work / f"{name}.log").read_text(errors="replace")[-1500:].strip()

    def _reason(self, mode: Mode) -> str | None:
        """Why a mode is not run, or None."""
        if self.arguments.device == "cpu" and not mode.cpu:
            return "needs a GPU"
        compilers = filter(None, (os.environ.get("CC"), "cc", "gcc", "clang", "cl"))
        if mode.compile and not any(map(shutil.which, compilers)):
            return "torch.compile needs a C compiler, such as gcc"
        return "no time left" if self.end - time.monotonic() < _LEAST else None

    def mode(self, mode: Mode) -> None:
        reason = self._reason(mode)
        if reason is not None:
            self._not_run(mode, reason)
            return
        job, report = self.work / "job.json", self.work / "rows.json"
        report.unlink(missing_ok=True)
        job.write_text(json.dumps(self._job(mode, report)), encoding="utf-8")
        left = self.end - time.monotonic()
        last = mode is MODES[-1] or len(self.arguments.mode) == 1
        end = time.monotonic() + (left if last else max(_LEAST, _SHARE * left))
        process = self._child(["mode.py", str(job)], "mode")
        before = self.result["rows"]
        rows: list[dict] = []
        try:
            while True:
                ended = process.poll() is not None
                found = json.loads(report.read_text(encoding="utf-8")) if report.exists() else []
                for row in found[len(rows) :]:
                    print(_line(row), flush=True)
                if len(found) > len(rows):
                    rows = found
                    self.result["rows"] = before + rows
                    self.save()
                if ended or time.monotonic() >= end:
                    break
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
        if not ended:
            self._not_run(mode, f"stopped after {len(rows)} rows: no time left")
        elif process.returncode and not any(row["wrong"] for row in rows):
            log = self._log("mode")
            row = {"mode": mode.name, "wrong": f"ended with {process.returncode}: {log}"}
            self.result["rows"] = [*before, *rows, row]
            print(_line(row), flush=True)
        self.save()

    def _not_run(self, mode: Mode, reason: str) -> None:
        self.result["not_run"].append({"mode": mode.name, "reason": reason})
        print(f"{mode.name}: not run: {reason}", flush=True)

    def _job(self, mode: Mode, report: Path) -> dict:
        of = sorted(p.stem.removesuffix("-mxfp8") for p in self.models.glob("*-mxfp8.safetensors"))
        return {
            "mode": mode.name,
            "lora": mode.lora,
            "compile": mode.compile,
            "reload": mode.reload,
            "options": ["--cpu"] if self.arguments.device == "cpu" else list(mode.options),
            "device": self.arguments.device,
            "comfyui": self.comfyui,
            "models": str(self.models),
            "of": of[::-1],  # zimage first
            "report": str(report),
            "steps": 2 if self.arguments.quick else 4,
        }

    def save(self) -> None:
        working_copy.write(self.path, json.dumps(self.result, indent=1) + "\n")
        working_copy.write(self.path.with_suffix(".md"), markdown(self.result))


def _leave(reason: str) -> NoReturn:
    print(f"left out: {reason}")
    sys.exit(3)


def _size(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.0f} MB"


def _line(row: dict) -> str:
    if "model" not in row:
        return f"{row['mode']}: WRONG: {row['wrong']}"
    parts = [row["mode"], row["model"], row["variant"], f"{1000 * row['seconds_per_step']:.1f} ms"]
    parts.append(f"difference {row['difference']:.2e}")
    parts.append(f"bound {row['bound']:.2e}" if row["bound"] else "")
    parts.append(f"peak {_size(row['peak_torch_bytes'])}" if row["peak_torch_bytes"] else "")
    return " ".join(filter(None, parts)) + (f" WRONG: {row['wrong']}" if row["wrong"] else "")


def markdown(result: dict) -> str:
    """The rows as a table, and the modes that were not run."""
    machine = result["machine"]
    heads = ("mode", "model", "variant", "dynamic VRAM", "ms a step", "peak in torch",
             "peak of the device", "model in VRAM", "difference", "bound", "")  # fmt: skip
    lines = [
        f"# ComfyUI {machine['comfyui']} on {machine['gpu'] or 'CPU'}, {result['date']}", "",
        "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|",
    ]  # fmt: skip
    for row in result["rows"]:
        wrong = "WRONG: " + " ".join(row["wrong"].split()) if row["wrong"] else "right"
        if "model" not in row:
            lines.append(f"| {row['mode']} |" + " |" * (len(heads) - 2) + f" {wrong} |")
            continue
        near = [f"{row[k]:.1e}" if row[k] is not None else "" for k in ("difference", "bound")]
        loaded = f"{100 * row['loaded_bytes'] / max(1, row['model_bytes']):.0f}%"
        cells = (row["mode"], row["model"], row["variant"], "yes" if row["dynamic_vram"] else "no",
                 f"{1000 * row['seconds_per_step']:.1f}", _size(row["peak_torch_bytes"]),
                 _size(row["peak_device_bytes"]), loaded, *near, wrong)  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {m['mode']}: not run: {m['reason']}" for m in result["not_run"]), ""]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [mode.name for mode in MODES]
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="a tiny Flux for the Z-Image")
    parser.add_argument("--image-model", type=Path, help="instead of tests/models/emoji")
    parser.add_argument("--prompts", type=Path, help="its prompts, encoded")
    parser.add_argument("--models", type=Path, metavar="DIR", help="keep the models here")
    parser.add_argument("--layers", type=int, default=2, help="layers of the Z-Image")
    parser.add_argument("--mode", nargs="+", choices=names, default=names)
    parser.add_argument("--minutes", type=float, default=5, help="stop after this time")
    parser.add_argument("--out", type=Path, default=working_copy.RESULTS, metavar="DIR")
    arguments = parser.parse_args()
    if (arguments.image_model is None) != (arguments.prompts is None):
        parser.error("--image-model and --prompts go together")
    return arguments


def main() -> int:
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(arguments, Path(folder))
        for mode in MODES:
            if mode.name in arguments.mode:
                run.mode(mode)
        run.save()
    print(f"results: {run.path}")
    return int(any(row["wrong"] for row in run.result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
