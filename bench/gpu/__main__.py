"""The kernels on a GPU: correctness at real shapes, and speed, in one run.

    python bench/gpu [--minutes 8] [--out DIR] [--section NAME ...] [--check]
    python bench/gpu --device cpu --quick            to try the script without a GPU

Needs torch and Triton, and comfy-kitchen (its wheel on PYTHONPATH will do) for stock ComfyUI's
kernels. It measures the limits of the device, checks every kernel against the oracle, then times
every operation against dense BF16, stock and its roofline, and two blocks end to end. Goals are
printed last, each with holds or FAILS. Results go to bench/results/<gpu>-<date>.json, and tables
beside it, after every section, so that a run that is cut short leaves what it has. Exits with 1 if
a kernel is wrong, and with --check also if a goal fails.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import working_copy

working_copy.load()

import torch  # noqa: E402
from gpu import ceilings, report  # noqa: E402
from gpu.clock import Clock, reason  # noqa: E402
from gpu.shapes import plan  # noqa: E402

SECTIONS = ("check", "casts", "linears", "loras", "host", "blocks")


class Run:
    """One run of the script: its results so far, and the time that is left."""

    def __init__(self, arguments, device: torch.device):
        from gpu.paths import STOCK, fast_unsupported_reason

        from mxfp8 import kernels

        self.device = device
        self.plan = plan(arguments.quick)
        self.quick = arguments.quick
        self.end = time.monotonic() + 60 * arguments.minutes
        self.clock = Clock(device, rounds=2 if arguments.quick else 11)
        today = datetime.date.today().isoformat()
        parts = [] if arguments.section == list(SECTIONS) else arguments.section
        name = "-".join([working_copy.slug(device), today, *parts])
        self.path = arguments.out / f"{name}.json"
        machine = working_copy.machine(device) | {"stock": STOCK}
        machine["backends"] = [str(status) for status in kernels.list_backends(device)]
        self.result = {
            "machine": machine,
            "date": today,
            "kernels_sha256": working_copy.kernels_sha256(),
            "ceilings": {},
            "goals": [],
            "checks": [],
            "peak_memory": [],
            "left_out": [],
            "rows": [],
        }
        unsupported_reason = fast_unsupported_reason(device)
        if unsupported_reason is not None:
            self.result["left_out"].append(f"precision fast: {unsupported_reason}")

    def has_time(self, what: str) -> bool:
        """Whether there is time left; if not, list what is left out."""
        if time.monotonic() < self.end:
            return True
        self.result["left_out"].append(f"{what}: no time left")
        return False

    def save(self) -> None:
        # The goals are for GPUs: on a CPU none of them was measured.
        rows = self.result["rows"] if self.device.type == "cuda" else []
        self.result["goals"] = report.goals(rows)
        report.write(self.result, self.path)

    def rows(self, what: str, rows: Iterable[dict]) -> None:
        """Collect rows as they come, and print them."""
        if not self.has_time(what):
            return
        try:
            for row in rows:
                self.result["rows"].append(row)
                print(*(f"{v}" for v in row.values() if v is not None), flush=True)
        except torch.cuda.OutOfMemoryError as error:
            self.result["left_out"].append(f"{what}: {reason(error)}")
        except Exception as error:  # a kernel that raises is wrong; the rest is still measured
            wrong = {"check": what, "shape": [], "wrong": reason(error)}
            self.result["checks"].append(wrong)
            print(f"WRONG {what}: {wrong['wrong']}", flush=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def check(self) -> None:
        from gpu.checks import checks

        for check in checks(self.device, self.quick, self.plan.shapes):
            if self.has_time(f"check of {check.name} {check.shape}"):
                result = check.result()
                self.result["checks"].append(result)
                if result["wrong"]:
                    print(f"WRONG {check.name} {check.shape}: {result['wrong']}", flush=True)
        wrong = sum(bool(c["wrong"]) for c in self.result["checks"])
        print(f"{len(self.result['checks'])} checks, {wrong} failed", flush=True)

    def measure(self, section: str, bench) -> None:
        from gpu import blocks, loras, rows

        if section == "casts":
            for shape in self.plan.shapes:
                self.rows(f"casts of {shape}", rows.casts(bench, *shape))
        elif section == "linears":
            for problem in self.plan.problems:
                self.rows(f"linear {problem}", rows.linears(bench, *problem))
        elif section == "loras":
            for shape in self.plan.lora_shapes:
                problem = (self.plan.tokens, *shape)
                self.rows(f"LoRA beside {problem}", loras.loras(bench, *problem))
        elif section == "host":
            self.rows("host", rows.host(bench))
        elif section == "blocks":
            for make in (blocks.ZImage.make, blocks.Flux.make):
                block = make(self.plan.shrink)
                measured = blocks.measure(bench, block, self.plan.tokens)
                self.rows(block.name, self._peaks(measured))

    def _peaks(self, measured):
        for row, peak in measured:
            self.result["peak_memory"].append(peak)
            yield row

    def sections(self, names: list[str]) -> None:
        from gpu.rows import Bench

        limits = ceilings.measure(self.clock, self.quick)
        self.result["ceilings"] = limits.as_dict()
        bench = Bench.start(self.clock, limits, self.result["left_out"])
        for name in names:
            start = time.monotonic()
            try:
                if name == "check":
                    self.check()
                else:
                    self.measure(name, bench)
            finally:
                self.save()
            print(f"-- {name}: {time.monotonic() - start:.0f} s", flush=True)
        after = ceilings.measure(self.clock, self.quick)
        self.result["ceilings"]["after"] = after.as_dict()
        self.save()


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--minutes", type=float, default=8, help="stop after this time")
    parser.add_argument("--out", type=Path, default=working_copy.RESULTS, metavar="DIR")
    parser.add_argument("--section", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal fails")
    return parser.parse_args(words)


def main() -> int:
    arguments = parse()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            sys.exit("no CUDA device; --device cpu --quick tries the script without one")
        device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    with torch.inference_mode():
        run = Run(arguments, device)
        print(*run.result["machine"]["backends"], sep="\n", flush=True)
        run.sections(arguments.section)
    failed = 0
    for goal in run.result["goals"]:
        failed += goal["state"] == "FAILS"
        print(f"{goal['goal']}: {goal['value']}, bound {goal['bound']}: {goal['state']}")
    wrong = [c for c in run.result["checks"] if c["wrong"]]
    for check in wrong:
        print(f"WRONG {check['check']} {check['shape']}: {check['wrong']}")
    for what in run.result["left_out"]:
        print(f"left out: {what}")
    print(f"results: {run.path}")
    return int(bool(wrong) or (arguments.check and failed > 0))


if __name__ == "__main__":
    sys.exit(main())
