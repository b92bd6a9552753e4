"""The goals, and the results as a file and as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import working_copy
from gpu.shapes import LARGE, ONE_ROW, SHAPES

# Form -> what its matmul alone, preparing a weight and quantizing an input are called.
MATMULS = {
    "mxfp8": "block_matmul", "rowwise_fp8": "scaled_matmul", "rowwise_fnuz": "scaled_matmul",
    "rotated_int8": "int8_matmul",
}  # fmt: skip
PREPARING = {"rowwise_fp8": "to_rowwise", "rotated_int8": "to_int8"}
QUANTIZING = {
    "mxfp8": "quantize", "rowwise_fp8": "quantize_rowwise", "rotated_int8": "quantize_int8",
}  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """A bound on the geometric mean, over some rows, of a column's ratio to our time.

    Attributes:
        bound: the mean must be at least this; if `column` is "us", the largest time at most this.
        column: of the time that is divided by ours.
        count: rows that it takes; with fewer the goal was not measured.
        selects: whether a row belongs to the goal.
    """

    name: str
    bound: float
    column: str
    count: int
    selects: Callable[[dict], bool]

    def result(self, rows: Iterable[dict]) -> dict:
        selected = [r for r in rows if self.selects(r) and r["us"] and (r[self.column] or 0) > 0]
        state, value = "not measured", None
        if len(selected) >= self.count:
            if self.column == "us":
                value = max(r["us"] for r in selected)
                holds = value <= self.bound
            else:
                logs = [math.log(r[self.column] / r["us"]) for r in selected]
                value = math.exp(sum(logs) / len(logs))
                holds = value >= self.bound
            value, state = round(value, 3), "holds" if holds else "FAILS"
        return {"goal": self.name, "bound": self.bound, "value": value, "state": state}


def _cast(op: str, backend: str) -> Callable[[dict], bool]:
    return lambda r: r["op"] == op and (r["N"], r["K"]) in LARGE and r["backend"] == backend


def _linear(precision: str, *counts: int, shapes=SHAPES) -> Callable[[dict], bool]:
    """Rows of the method that is chosen for that precision."""

    def selects(r: dict) -> bool:
        ours = r["op"] == "linear" and r["precision"] == precision and r["chosen"]
        return bool(ours) and r["M"] in counts and (r["N"], r["K"]) in shapes

    return selects


_COUNT = len(SHAPES)
GOALS = (
    Goal("dequantize, of copy bandwidth", 0.85, "roofline_us", 2, _cast("dequantize", "triton")),
    Goal("quantize, of copy bandwidth", 0.80, "roofline_us", 2, _cast("quantize", "triton")),
    Goal("exact, M = 1, 5120 x 5120, over dense BF16", 1.6, "bf16_us", 1,
         _linear("exact", 1, shapes=(ONE_ROW,))),
    Goal("exact, M = 4096, of its roofline", 0.95, "roofline_us", _COUNT, _linear("exact", 4096)),
    Goal("fast, M = 4096, of its roofline", 0.90, "roofline_us", _COUNT, _linear("fast", 4096)),
    Goal("fast, M = 4096, over dense BF16", 1.5, "bf16_us", _COUNT, _linear("fast", 4096)),
    Goal("fast, M = 1024, 2048, 4096, over stock", 3.0, "stock_us", 3 * _COUNT,
         _linear("fast", 1024, 2048, 4096)),
)  # fmt: skip


def _host_goals(rows: list[dict]) -> list[Goal]:
    """One for each of our methods, of its own rows."""
    names = {r["backend"]: None for r in rows if r["op"] == "host_us" and r["chosen"] is not None}
    return [
        Goal(f"host microseconds per linear, {name}", 25, "us", 1,
             lambda r, name=name: r["op"] == "host_us" and r["backend"] == name)
        for name in names
    ]  # fmt: skip


def goals(rows: list[dict]) -> list[dict]:
    return [goal.result(rows) for goal in (*GOALS, *_host_goals(rows))]


def prefers(result: dict, backend: str, capability: tuple[int, int]) -> str | None:
    """Why results do not show a backend to be correct and faster than torch_mx on a card, or None.

    They have to be from such a card, with no failed check and at least one check of this backend,
    and with less time than torch_mx (geometric mean) over the block-scaled matmuls that both were
    timed on, at least two.
    """
    card = "{}.{}".format(*capability)
    if result["machine"].get("capability") != card:
        return f"is of compute capability {result['machine'].get('capability')}, not {card}"
    failed = sum(bool(c["wrong"]) for c in result["checks"])
    if failed:
        return f"{failed} checks failed"
    if not any(c["check"] == f"block matmul, {backend}" for c in result["checks"]):
        return f"no check of {backend}'s matmul"
    spent: dict[str, dict[tuple, float]] = {}
    for r in result["rows"]:
        if r["op"] == "block_matmul" and r["us"]:
            spent.setdefault(r["backend"], {})[r["M"], r["N"], r["K"]] = r["us"]
    ours, rival = spent.get(backend, {}), spent.get("torch_mx", {})
    both = ours.keys() & rival.keys()
    if len(both) < 2:
        return f"was timed beside torch_mx in {len(both)} problems"
    ratio = math.exp(sum(math.log(ours[p] / rival[p]) for p in both) / len(both))
    return None if ratio < 1 else f"takes {ratio:.2f} of torch_mx's time over {len(both)} problems"


def write(result: dict, path: Path) -> None:
    """Write the results as JSON and as tables."""
    lines = [json.dumps(row) for row in result["rows"]]
    rest = {key: value for key, value in result.items() if key != "rows"}
    text = json.dumps(rest, indent=1).removesuffix("\n}")
    text += ',\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
    working_copy.write(path, text)
    working_copy.write(path.with_suffix(".md"), markdown(result))


def markdown(result: dict) -> str:
    """Goals, ceilings and rows as tables."""
    machine = result["machine"]
    lines = [f"# {machine['gpu'] or 'CPU'}, {result['date']}", ""]
    facts = (f"{k} {v}" for k, v in machine.items() if v and k not in ("gpu", "backends"))
    lines += [", ".join(facts), "", *(f"- {status}" for status in machine["backends"]), ""]
    failed = [c for c in result["checks"] if c["wrong"]]
    lines += [f"{len(result['checks'])} checks of kernels, {len(failed)} failed."]
    lines += [f"- {c['check']} {c['shape']}: {c['wrong']}" for c in failed]
    lines += ["", *_goals(result["goals"]), *_ceilings(result["ceilings"])]
    lines += ["## Casts", "", *_table(result["rows"], _is_cast, _CAST)]
    lines += ["## Linears", "", *_table(result["rows"], lambda r: r["op"] in _OPS, _LINEAR)]
    lines += ["## Linears with a LoRA", "", *_table(result["rows"], _is_lora, _LORA)]
    lines += ["## Blocks and the host", "", *_table(result["rows"], _is_other, _LINEAR)]
    lines += _peaks(result["peak_memory"])
    if result["left_out"]:
        lines += ["## Not measured", "", *(f"- {what}" for what in result["left_out"]), ""]
    return "\n".join(lines)


def _goals(results: list[dict]) -> list[str]:
    lines = ["| goal | bound | measured | |", "|---|---|---|---|"]
    for g in results:
        lines.append(f"| {g['goal']} | {g['bound']} | {g['value'] or ''} | {g['state']} |")
    return [*lines, ""]


def _ceilings(ceilings: dict) -> list[str]:
    lines = ["| ceiling | before | after |", "|---|---|---|"]
    after = ceilings.get("after") or {}
    for name, value in ceilings.items():
        if name != "after" and value:
            unit, scale = ("GB/s", 1e9) if name == "copy_bytes" else ("TFLOP/s", 1e12)
            then = f"{after[name] / scale:.0f} {unit}" if after.get(name) else ""
            lines.append(f"| {name} | {value / scale:.0f} {unit} | {then} |")
    return [*lines, ""]


_CAST = ("op", "backend", "M", "N", "K", "us", "stock_us", "roofline_us")
_LINEAR = ("op", "backend", "precision", "chosen", "M", "N", "K", "us", "bf16_us", "stock_us",
           "roofline_us", "error", "total_error")  # fmt: skip
_LORA = (*_LINEAR[:-3], "without_us", "added_launches", "roofline_us", "error")
_RATIOS = {
    "without_us": "/ without",
    "stock_us": "/ stock",
    "roofline_us": "of roofline",
    "bf16_us": "/ bf16",
}
_OPS = ("linear", *MATMULS.values())


def _is_cast(r: dict) -> bool:
    return r["op"] in ("dequantize", *PREPARING.values(), *QUANTIZING.values())


def _is_lora(r: dict) -> bool:
    return r["op"] == "linear, LoRA"


def _is_other(r: dict) -> bool:
    return r["op"] not in _OPS and not _is_cast(r) and not _is_lora(r)


def _table(rows: list[dict], keep: Callable[[dict], bool], columns: tuple[str, ...]) -> list[str]:
    """Rows, with the ratio of each rival's time, or of the roofline, to ours."""
    heads = [h for c in columns for h in ([c, _RATIOS[c]] if c in _RATIOS else [c])]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for r in filter(keep, rows):
        cells = []
        for column in columns:
            value = r[column]
            cells.append("" if value is None else str(value))
            if column in _RATIOS:
                cells.append("" if not value else f"{value / r['us']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _peaks(peaks: list[dict]) -> list[str]:
    if not peaks:
        return []
    lines = ["| block | method | M | peak memory |", "|---|---|---|---|"]
    for peak in peaks:
        size = f"{peak['peak_bytes'] / 1e6:.0f} MB" if peak["peak_bytes"] else ""
        lines.append(f"| {peak['op']} | {peak['method']} | {peak['M']} | {size} |")
    return [*lines, ""]
