"""Models in the real ComfyUI on a GPU: ours against stock, in every mode of loading and patching.

    python bench/in_comfyui [--wheels DIR] [--mode NAME ...] [--minutes 9] [--out DIR]
    python bench/in_comfyui --device cpu --quick      to try the script without a GPU

ComfyUI is that of the tests, or the one at COMFYUI_PATH. Packages that it needs and this Python
lacks can be wheels in the folder DIR: beside torch, transformers and their dependencies, these are
comfy-kitchen, comfy-aimdo, torchsde and trampoline.

A tiny Flux and a Z-Image of several full-width layers are sampled in BF16, in MXFP8 by stock, and
in MXFP8 by ours, exact and fast. Each mode has its own process, so that a crash does not affect the
others. `difference` is the relative difference of the latents: exact against stock, at most a
quarter of the change by quantizing the weights; fast against BF16, at most twice that change.
Results go to bench/results/<gpu>-comfy-<date>.json and a table beside it. The exit status is 1 if
something is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import working_copy

ROOT = working_copy.ROOT
sys.path.insert(0, str(ROOT / "tests" / "support"))

from comfyui import comfyui_path  # noqa: E402

_STATIC = ("--disable-dynamic-vram",)
_OFFLOAD = ("--novram",)


@dataclass(frozen=True)
class Mode:
    """How ComfyUI is started and what is done to the model.

    Attributes:
        lora: "merged" or "bypass", as LoraLoader and LoraLoaderBypass do it.
        part: the share of the model that fits the memory; 0 for no limit.
        layers: whether each linear is also compared with stock's.
        cpu: whether it is meaningful on a CPU, where nothing is offloaded.
    """

    name: str
    options: tuple[str, ...] = _STATIC
    dynamic: bool = False
    lora: str = ""
    compile: bool = False
    part: float = 0.0
    reload: bool = False
    layers: bool = False
    cpu: bool = False


MODES = (
    Mode("full load", layers=True, cpu=True),
    Mode("offload all", _OFFLOAD),
    Mode("offload part", part=0.7),
    Mode("dynamic VRAM", (), dynamic=True),
    Mode("LoRA merged", lora="merged", cpu=True),
    Mode("LoRA bypass", lora="bypass", cpu=True),
    Mode("unload and reload", reload=True, cpu=True),
    Mode("LoRA merged, dynamic VRAM", (), dynamic=True, lora="merged"),
    Mode("LoRA bypass, dynamic VRAM", (), dynamic=True, lora="bypass"),
    Mode("unload and reload, dynamic VRAM", (), dynamic=True, reload=True),
    Mode("LoRA merged, offload all", _OFFLOAD, lora="merged"),
    Mode("LoRA bypass, offload all", _OFFLOAD, lora="bypass"),
    # Last, because compiling takes the longest.
    Mode("TorchCompile", compile=True),
    Mode("TorchCompile, dynamic VRAM", (), dynamic=True, compile=True),
)


class Run:
    def __init__(self, arguments, work: Path):
        self.arguments, self.work = arguments, work
        self.end = time.monotonic() + 60 * arguments.minutes
        self.comfyui = str(comfyui_path())
        self.on_cpu = arguments.device == "cpu"
        self.models = arguments.models or work / "models"
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if arguments.wheels:
            self._unpack(arguments.wheels)
        self.result = {
            "machine": self._machine(),
            "date": datetime.date.today().isoformat(),
            "kernels_sha256": working_copy.kernels_sha256(),
            "rows": [],
            "not_run": [],
        }
        name = f"{self.result['machine'].pop('slug')}-comfy-{self.result['date']}"
        self.path = arguments.out / f"{name}.json"

    def _unpack(self, wheels: Path) -> None:
        site = self.work / "site"
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        files = sorted(map(str, wheels.glob("*.whl")))
        subprocess.run([*command, "--no-compile", "--target", str(site), *files], check=True)
        old = self.environment.get("PYTHONPATH")
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), old]))

    def _machine(self) -> dict:
        """Facts of the machine, from another process: this one must not use the device's memory."""
        script = (
            "import json, sys; sys.path.insert(0, sys.argv[1]); import working_copy, torch; "
            "d = torch.device(sys.argv[2]); "
            "print(json.dumps(working_copy.machine(d) | {'slug': working_copy.slug(d)}))"
        )
        bench = str(Path(__file__).resolve().parents[1])
        output = subprocess.run(
            [sys.executable, "-c", script, bench, self.arguments.device],
            env=self.environment, check=True, stdout=subprocess.PIPE, text=True,
        ).stdout  # fmt: skip
        version = Path(self.comfyui, "comfyui_version.py").read_text(encoding="utf-8")
        return json.loads(output.splitlines()[-1]) | {"comfyui": version.split('"')[1]}

    def make_models(self) -> None:
        if not list(self.models.glob("*-mxfp8.safetensors")):
            layers = 0 if self.arguments.quick else self.arguments.layers
            command = ["models.py", self.comfyui, str(self.models), str(layers)]
            ended, log = self._child(command, "models", 600)
            if ended:
                sys.exit(f"the models could not be made:\n{log}")

    def _child(self, command: list[str], name: str, seconds: float) -> tuple[int, str]:
        """(exit status, end of the output) of a script in this folder."""
        log = self.work / f"{name}.log"
        script = str(Path(__file__).resolve().parent / command[0])
        with log.open("wb") as file:
            try:
                status = subprocess.run(
                    [sys.executable, script, *command[1:]],
                    env=self.environment, stdout=file, stderr=subprocess.STDOUT, timeout=seconds,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                status = -1
                file.write(f"\nstopped after {seconds:.0f} s".encode())
        return status, log.read_text(errors="replace")[-1500:].strip()

    def mode(self, mode: Mode) -> None:
        left = self.end - time.monotonic()
        reason = "needs a GPU" if self.on_cpu and not mode.cpu else ""
        if reason or left < 10:
            reason = reason or "no time left"
            self.result["not_run"].append({"mode": mode.name, "reason": reason})
            print(f"{mode.name}: not run: {reason}", flush=True)
            return
        start = time.monotonic()
        name = mode.name.replace(",", "").replace(" ", "-")
        job, report = self.work / f"{name}.job.json", self.work / f"{name}.rows.json"
        job.write_text(json.dumps(self._job(mode, report)), encoding="utf-8")
        seconds = min(left, 60 * self.arguments.minutes_each)
        status, log = self._child(["mode.py", str(job)], name, seconds)
        rows = json.loads(report.read_text(encoding="utf-8")) if report.exists() else []
        if status and not any(row["wrong"] for row in rows):
            rows.append({"mode": mode.name, "wrong": f"ended with {status}: {log}"})
        self.result["rows"] += rows
        self.save()
        for row in rows:
            print(_line(row), flush=True)
        print(f"-- {mode.name}: {time.monotonic() - start:.0f} s", flush=True)

    def _job(self, mode: Mode, report: Path) -> dict:
        of = sorted(p.stem.removesuffix("-mxfp8") for p in self.models.glob("*-mxfp8.safetensors"))
        if mode.part:  # a tiny model is too small to load in part
            of = [model for model in of if model != "flux"]
        job = {k: v for k, v in asdict(mode).items() if k != "name"} | {"mode": mode.name}
        return job | {
            "options": ["--cpu"] if self.on_cpu else list(mode.options),
            "device": self.arguments.device,
            "comfyui": self.comfyui,
            "models": str(self.models),
            "of": of,
            "report": str(report),
            "side": self.arguments.side or (16 if self.arguments.quick else 128),
            "steps": 2 if self.arguments.quick else 4,
        }

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.result, indent=1)
        self.path.write_text(text + "\n", encoding="utf-8")
        self.path.with_suffix(".md").write_text(markdown(self.result), encoding="utf-8")


def _size(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.0f} MB"


def _line(row: dict) -> str:
    if "model" not in row:
        return f"{row['mode']}: WRONG: {row['wrong']}"
    parts = [row["mode"], row["model"], row["variant"], f"{1000 * row['seconds_per_step']:.1f} ms"]
    if row["difference"] is not None:
        parts.append(f"difference {row['difference']:.2e}, bound {row['bound']:.2e}")
    parts.append(f"peak {_size(row['peak_torch_bytes'])}" if row["peak_torch_bytes"] else "")
    return " ".join(filter(None, parts)) + (f" WRONG: {row['wrong']}" if row["wrong"] else "")


def markdown(result: dict) -> str:
    """The rows as a table, and the modes that were not run."""
    machine = result["machine"]
    heads = ("mode", "model", "variant", "ms a step", "peak in torch", "peak of the device",
             "model in VRAM", "difference", "bound", "")  # fmt: skip
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
        cells = (row["mode"], row["model"], row["variant"], f"{1000 * row['seconds_per_step']:.1f}",
                 _size(row["peak_torch_bytes"]), _size(row["peak_device_bytes"]), loaded, *near,
                 wrong)  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {m['mode']}: not run: {m['reason']}" for m in result["not_run"]), ""]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [mode.name for mode in MODES]
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="only the tiny Flux, small latents")
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="packages that this Python lacks"
    )
    parser.add_argument("--models", type=Path, metavar="DIR", help="keep the models here")
    parser.add_argument(
        "--layers", type=int, default=4, help="layers of the Z-Image; 0 to leave it out"
    )
    parser.add_argument("--side", type=int, help="side of the latent: an eighth of the image's")
    parser.add_argument("--mode", nargs="+", choices=names, default=names)
    parser.add_argument("--minutes", type=float, default=9, help="start no mode after this many")
    parser.add_argument("--minutes-each", type=float, default=4, help="stop a mode after this many")
    parser.add_argument("--out", type=Path, default=working_copy.RESULTS, metavar="DIR")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(arguments, Path(folder))
        run.make_models()
        for mode in MODES:
            if mode.name in arguments.mode:
                run.mode(mode)
        run.save()
    print(f"results: {run.path}")
    return int(any(row["wrong"] for row in run.result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
