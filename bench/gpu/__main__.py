"""The kernels on a GPU: correctness at real shapes, and speed, in one run.

    python bench/gpu [--minutes 6] [--out DIR] [--section NAME ...] [--check]
    python bench/gpu --device cpu --quick            to try the script without a GPU

Needs torch; Triton for this pack's own kernels, and comfy-kitchen (its wheel on PYTHONPATH will do)
for stock ComfyUI's. It measures the limits of the device, then times every linear by every method:
dense BF16, stock MXFP8, stock INT8, and each backend of this pack that runs here; then the casts,
the host's part, LoRAs and two blocks end to end. Every kernel is checked against the oracle. The
most telling shapes come first, and what there is no time for is listed as left out.

Results go to bench/results/<gpu>-<date>.json, and tables beside it, after every shape, so that a
run that is killed leaves what it has. Goals are printed last, each with holds or FAILS. Exits with
1 if a kernel is wrong, and with --check also if a goal fails.
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

START = time.monotonic()
working_copy.load()

import torch  # noqa: E402
from gpu import ceilings, report  # noqa: E402
from gpu.clock import Clock, OutOfTimeError, reason  # noqa: E402
from gpu.shapes import plan  # noqa: E402

from mxfp8.kernels.memory import is_out_of_memory  # noqa: E402

SECTIONS = ("linears", "host", "blocks", "casts", "loras", "check")
_LAST = 5  # seconds for the ceilings after everything else


class Run:
    """One run of the script, and its results so far."""

    def __init__(self, arguments, device: torch.device):
        from gpu.methods import NO_STOCK

        from mxfp8 import kernels

        self.device = device
        self.plan = plan(arguments.quick)
        self.quick = arguments.quick
        end = START + 60 * arguments.minutes - _LAST
        self.clock = Clock(device, rounds=2 if arguments.quick else 11, end=end)
        today = datetime.date.today().isoformat()
        parts = [] if arguments.section == list(SECTIONS) else arguments.section
        name = "-".join([working_copy.slug(device), today, *parts])
        self.path = arguments.out / f"{name}.json"
        machine = working_copy.machine(device)
        machine["backends"] = [str(status) for status in kernels.list_backends(device)]
        self.result = {
            "machine": machine,
            "date": today,
            "kernels_sha256": working_copy.kernels_sha256(),
            "ceilings": {},
            "goals": [],
            "checks": [],
            "peak_memory": [],
            "left_out": [] if NO_STOCK is None else [f"stock: {NO_STOCK}"],
            "rows": [],
        }

    def save(self) -> None:
        # The goals are for GPUs: on a CPU none of them was measured.
        rows = self.result["rows"] if self.device.type == "cuda" else []
        self.result["goals"] = report.goals(rows)
        report.write(self.result, self.path)

    def rows(self, what: str, rows: Iterable[dict]) -> None:
        """Collect rows as they come, and print them."""
        try:
            self.clock.check()
            for row in rows:
                self.result["rows"].append(row)
                print(*(f"{v}" for v in row.values() if v is not None), flush=True)
        except OutOfTimeError:
            self.result["left_out"].append(f"{what}: no time left")
        except Exception as error:  # a kernel that raises is wrong; the rest is still measured
            if is_out_of_memory(error):
                self.result["left_out"].append(f"{what}: {reason(error)}")
            else:
                self._wrong({"check": what, "shape": [], "wrong": reason(error)})
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _wrong(self, check: dict) -> None:
        self.result["checks"].append(check)
        if check["wrong"]:
            print(f"WRONG {check['check']} {check['shape']}: {check['wrong']}", flush=True)

    def checks(self) -> Iterable[dict]:
        """Makes the checks; yields no rows."""
        from gpu.checks import checks

        for done, check in enumerate(checks(self.device, self.quick, self.plan.shapes)):
            self.clock.check()
            try:
                self._wrong(check.result())
            except Exception as error:
                line = f"check of {check.name} {check.shape}: {reason(error)}"
                self.result["left_out"].append(line)
            if done % 20 == 0:
                self.save()
        yield from ()

    def item(self, section: str, argument, bench) -> None:
        from gpu import blocks, loras, rows

        if section == "check":
            self.rows("some checks", self.checks())
        elif section == "linears":
            self.rows(f"linear {argument}", rows.linears(bench, *argument))
        elif section == "casts":
            self.rows(f"casts of {argument}", rows.casts(bench, *argument))
        elif section == "loras":
            self.rows(f"LoRA beside {argument}", loras.loras(bench, *argument))
        elif section == "host":
            self.rows("host", rows.host(bench))
        else:
            block = blocks.BLOCKS[argument](self.plan.shrink)
            measured = blocks.measure(bench, block, self.plan.tokens)
            self.rows(block.name, self._peaks(measured))

    def _peaks(self, measured):
        for row, peak in measured:
            self.result["peak_memory"].append(peak)
            yield row

    def sections(self, names: list[str]) -> None:
        from gpu.rows import Bench

        left_out = self.result["left_out"]
        self.save()
        limits = ceilings.measure(self.clock, self.quick, left_out)
        self.result["ceilings"] = limits.as_dict()
        bench = Bench(self.device, self.clock, limits, left_out)
        for section, argument in self.plan.items:
            if section in names:
                self.item(section, argument, bench)
                self.save()
        self.clock.end += _LAST
        after = ceilings.measure(self.clock, self.quick, left_out)
        self.result["ceilings"]["after"] = after.as_dict()
        self.save()


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--minutes", type=float, default=6, help="stop after this time")
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
    print(f"{len(run.result['checks'])} checks, {len(wrong)} failed")
    print(f"results: {run.path}")
    return int(bool(wrong) or (arguments.check and failed > 0))


if __name__ == "__main__":
    sys.exit(main())
