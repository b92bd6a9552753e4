"""A size instead of a preset: is what sensitivities choose better than what rules choose?

    python bench/budget.py [--model NAME ...] [--check]

On MiniLM and ViT-S of bench/quality.py and on the image model of bench/images.py. Each is
calibrated on some of its data (paragraphs; photos; PROMPTS prompts, each with a seed), and its
sensitivities are measured on a few of these, at a cost of at most three times the calibration's own
runs. All else is measured on other data (of the image model on PICTURES): SNR of the output in dB
(of a sentence's embedding; of a crop's features; of a latent), the mean over it.

    rules       every preset whose layers differ from those of all others, and quant_probe's advice,
                each as a file of its own
    targets     that size as a target, and shares of the way from all MXFP8 to the original, SHARES:
                the SNR that was predicted (to nearest), and the SNR that was measured
    lead        of a target over the rule of its size, in dB: the mean of the differences on each
                sentence, crop or picture, with a 95% interval by bootstrap over these. Six crops
                of ViT-S are of one photo; the interval takes them for independent

each with layers rounded to nearest and with calibrated rounding. `rank_correlation` is Spearman's,
of the damages with those that were measured one layer at a time, on the data of the probe runs;
`wrong` the part of all damage that is on the wrong layer; `kurtosis` the same correlation for
quant_probe's score.

Weights that are kept are those of the file: float32 for MiniLM and ViT-S, BF16 for the image model.
Everything is computed in float32, and layers with the weights that a file would have.

Results go to bench/results/budget.json; those of models that are not measured again stay. --check
exits with 1 where a rule is better at the same size, by more than TOLERANCE or by all of the
interval, or where no target is better by all of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean

import images
import quality
import torch
from cpu import machine

from mxfp8 import kernels
from mxfp8.quant.budget.choice import Problem, choose
from mxfp8.quant.budget.probing import needed_runs, probe
from mxfp8.quant.budget.target import parse
from mxfp8.quant.checks.probe import KEEP, probe_file, rank_correlation
from mxfp8.quant.conversion import gptq, policy
from mxfp8.quant.conversion.calibration import Calibration, calibrate
from mxfp8.quant.conversion.policy import Plan, Selection
from mxfp8.quant.conversion.stored import stored_bytes
from mxfp8.quant.format import bare
from mxfp8.quant.reports import metrics
from mxfp8.quant.reports.comparison import mean_of
from mxfp8.quant.sources.open import open_source

RESULTS = Path(__file__).resolve().parent / "results" / "budget.json"
SHARES = 0.02, 0.05, 0.1, 0.2, 0.35, 0.5  # of the bytes between all MXFP8 and the original
SAMPLES = 2  # batches of the probe runs
PROMPTS, PICTURES = 28, 18  # of the image model, to calibrate on and to test on
TOLERANCE = 0.1  # dB
NEAREST, CALIBRATED = "nearest", "calibrated"

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Model:
    """A trained model, as this needs it.

    Attributes:
        file: its weights.
        layers: name -> weight, float32, of the layers that may be MXFP8.
        run: (weights of some layers, batch) -> output of each item, flat.
        seen, unseen: batches to calibrate on and to test on.
        probed: batches of the first for probe runs.
        calibrate: of these layers, on `seen`.
    """

    file: Path
    layers: Weights
    run: Callable[[Weights, object], list[torch.Tensor]]
    seen: list
    unseen: list
    probed: list
    calibrate: Callable[[], Calibration]


def torch_model(name: str, folder: Path) -> Model:
    """A model of bench/quality.py."""
    about = quality.MODELS[name]
    file = folder / f"{name}.safetensors"
    about.weights(file)
    module = about.trained().eval()
    layers = {n: m.weight.detach().clone() for n, m in quality.encoder(module).items()}

    def run(weights: Weights, batch) -> list[torch.Tensor]:
        for layer, weight in weights.items():
            module.get_submodule(layer).weight.data = weight
        output = about.embed(module, batch)
        for layer in weights:
            module.get_submodule(layer).weight.data = layers[layer]
        if output.ndim > 2:
            return [one.flatten() for one in output]
        return list(output)

    items = {"minilm": 8, "vit": 4}[name]  # in a batch of the probe runs
    seen = about.seen()
    if name == "minilm":
        texts = quality.minilm.paragraphs()
        probed = quality.minilm.batches(texts[: SAMPLES * items], items)
    else:
        pictures = torch.cat([batch["pixel_values"] for batch in seen])
        chosen = pictures[:: len(pictures) // (SAMPLES * items)][: SAMPLES * items]
        probed = [{"pixel_values": part} for part in chosen.split(items)]
    return Model(
        file, layers, run, seen, about.unseen(), probed,
        lambda: calibrate(module, seen, select=lambda n, _: n in layers),
    )  # fmt: skip


def image_model(folder: Path) -> Model:
    from comfyui import import_modules

    import_modules()
    logging.disable(logging.WARNING)
    subject = images.Subject(images.MODEL)
    with open_source(images.MODEL) as source:
        plan = policy.plan(source.tensors, Selection("none"), log=False)
    names = [decision.layer for decision in plan.quantized]
    layers = {name: subject.layer(name).weight.detach().float() for name in names}
    linear = torch.nn.functional.linear

    def run(weights: Weights, pairs: images.Pairs) -> list[torch.Tensor]:
        forwards = {
            name: partial(linear, weight=weight, bias=subject.layer(name).bias)
            for name, weight in weights.items()
        }
        return list(pairs.sample(subject.with_forwards(forwards)).flatten(1))

    prompts = images.spread(images.CALIBRATION, PROMPTS)
    seen = images.Pairs.of(prompts, images.FIRST_SEED["calibration"])
    unseen = images.Pairs.of(images.spread(images.TEST, PICTURES), images.FIRST_SEED["test"])
    prompts = images.spread(prompts, 4 * SAMPLES)
    probed = [images.Pairs.of(prompts[i::SAMPLES], first_seed=100 * i) for i in range(SAMPLES)]
    return Model(images.MODEL, layers, run, [seen], [unseen], probed,
                 lambda: subject.calibrate(layers, seen))  # fmt: skip


MODELS: dict[str, Callable[[Path], Model]] = {
    "minilm": partial(torch_model, "minilm"),
    "vit": partial(torch_model, "vit"),
    "emoji": image_model,
}


def rounded(model: Model, calibration: Calibration) -> dict[str, Weights]:
    """Rounding -> the layers' weights as a file would have them."""

    def values(weight: torch.Tensor, qdata, scale) -> torch.Tensor:
        return kernels.dequantize(qdata, scale, torch.float32, tuple(weight.shape))

    found: dict[str, Weights] = {NEAREST: {}, CALIBRATED: {}}
    for name, weight in model.layers.items():
        moments = calibration.layers[name]
        best = gptq.round_weight(weight, moments.hessian, moments.rows)
        found[CALIBRATED][name] = values(weight, best.qdata, best.scale)
        found[NEAREST][name] = values(weight, *kernels.quantize(weight))
    return found


class Measured:
    """SNR of each output of a model with some of its layers rounded, on the data to test on."""

    def __init__(self, model: Model):
        self._model = model
        self._reference = [model.run({}, batch) for batch in model.unseen]

    def __call__(self, weights: Weights) -> list[float]:
        return [
            metrics.snr_db(one, other)
            for batch, reference in zip(self._model.unseen, self._reference, strict=True)
            for one, other in zip(reference, self._model.run(weights, batch), strict=True)
        ]


def noise_of(reference: list[torch.Tensor], outputs: list[torch.Tensor]) -> float:
    """Energy of the change over that of the output, of a batch."""
    one, other = torch.cat(reference).double(), torch.cat(outputs).double()
    return float((other - one).square().sum() / one.square().sum())


def one_at_a_time(model: Model, weights: Weights) -> dict[str, float]:
    """Damages as `Sensitivity` defines them, from a run for every layer on the probes' data."""
    plain = [model.run({}, batch) for batch in model.probed]
    return {
        name: math.exp(
            math.fsum(
                math.log(noise_of(one, model.run({name: weight}, batch)))
                for one, batch in zip(plain, model.probed, strict=True)
            )
            / len(plain)
        )
        for name, weight in weights.items()
    }


def rules(tensors, advice: set[str]) -> dict[str, Plan]:
    """Name -> plan of each preset that differs from all MXFP8 and from the others."""
    seen = set()
    plans = {}
    for preset in policy.presets():
        plan = policy.plan(tensors, Selection(preset), log=False)
        layers = frozenset(d.key for d in plan.quantized)
        if layers and layers not in seen:
            seen.add(layers)
            plans[f"preset {preset}"] = plan
    most = next(iter(plans.values()))
    decisions = tuple(
        replace(d, quantize=d.quantize and d.key not in advice) for d in most.decisions
    )
    return {**plans, "quant_probe's advice": replace(most, decisions=decisions)}


@torch.inference_mode()
def measured(name: str, folder: Path) -> dict:
    """Figures of a model."""
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"{name}, {time.perf_counter() - start:.0f} s: {text}", flush=True)

    model = MODELS[name](folder)
    calibration = model.calibrate()
    say("calibrated")
    weights = rounded(model, calibration)
    say("rounded")

    def run(sample: int, signs) -> torch.Tensor:
        perturbed = {
            layer: weights[NEAREST][layer] if sign > 0
            else 2 * model.layers[layer] - weights[NEAREST][layer]
            for layer, sign in signs.items()
        }  # fmt: skip
        return torch.cat(model.run(perturbed, model.probed[sample]))

    runs = math.ceil(needed_runs(len(model.layers)) / SAMPLES)
    sizes = {layer: weight.numel() for layer, weight in model.layers.items()}
    sensitivity = probe(sizes, run, SAMPLES, runs)
    say(f"{sensitivity.runs} probe runs")
    true = one_at_a_time(model, weights[NEAREST])
    found = sensitivity.damages
    scores = probe_file(model.file)
    kurtosis = {bare(la.key.removesuffix(".weight")): la.score for la in scores.layers}
    figures = {
        "layers": len(model.layers),
        "probe_runs": sensitivity.runs,
        "rank_correlation": rank_correlation([found.values[n] for n in true], list(true.values())),
        "wrong": sum(abs(found.values[n] - true[n]) for n in true) / (2 * sum(true.values())),
        "kurtosis": rank_correlation(
            [kurtosis[n] for n in true if n in kurtosis], [true[n] for n in true if n in kurtosis]
        ),
        "together": sensitivity.together,
    }
    say(str(figures))
    with open_source(model.file) as source:
        tensors = dict(source.tensors)
    advice = {la.key for la in scores.layers if la.recommendation == KEEP}
    plans = rules(tensors, advice)
    base = policy.plan(tensors, Selection("none"), log=False)
    snr = Measured(model)

    def of(plan: Plan, rounding: str) -> list[float]:
        names = [bare(d.layer) for d in plan.quantized]
        return snr({n: weights[rounding][n] for n in names if n in model.layers})

    problem = Problem(base, found)
    for rounding in (NEAREST, CALIBRATED):
        rows = []

        @cache
        def target(size: int, rounding=rounding) -> tuple[dict, list[float]]:
            if size < problem.smallest + 1:
                plan, predicted = base, problem.point("", []).snr_db
            else:
                plan, chosen = choose(base, sensitivity, parse(f"{size} B"))
                predicted = chosen.point.snr_db
            values = of(plan, rounding)
            row = {"bytes": stored_bytes(plan), "predicted_db": predicted, "snr_db": fmean(values)}
            return row, values

        for rule, plan in plans.items():
            size, values = stored_bytes(plan), of(plan, rounding)
            row = {"rule": rule, "bytes": size, "snr_db": fmean(values)}
            if size >= problem.smallest:
                row["target"], ours = target(size)
                row["lead"] = lead(ours, values)
            rows.append(row)
            say(f"{rounding}: {row}")
        between = problem.bytes_before - problem.smallest
        targets = [target(problem.smallest + int(share * between))[0] for share in SHARES]
        say(f"{rounding}: {targets}")
        figures[rounding] = {
            "bytes_before": problem.bytes_before, "all_mxfp8": target(problem.smallest)[0],
            "rules": rows, "targets": dict(zip(map(str, SHARES), targets, strict=True)),
        }  # fmt: skip
    return figures | {"machine": machine(torch.get_num_threads())}


def lead(ours: list[float], others: list[float]) -> dict:
    """The mean difference of pairs, and its interval."""
    mean = mean_of([a - b for a, b in zip(ours, others, strict=True)])
    return {"mean_db": mean.mean, "interval": [mean.low, mean.high]}


def table(results: dict[str, dict]) -> str:
    """Markdown."""
    lines = [
        "| model, rounding | rule, or share | size | SNR | target: predicted | measured | lead |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, figures in results.items():
        for rounding in (NEAREST, CALIBRATED):
            found = figures[rounding]
            rows = [(row["rule"], row, row.get("target")) for row in found["rules"]]
            rows += [(f"{float(x):.0%}", None, row) for x, row in found["targets"].items()]
            for what, rule, ours in rows:
                share = (rule or ours)["bytes"] / found["bytes_before"]
                cells = [f"{name}, {rounding}", what, f"{share:.1%}"]
                cells.append(f"{rule['snr_db']:.1f}" if rule else "")
                cells += [f"{ours[key]:.1f}" if ours else "" for key in ("predicted_db", "snr_db")]
                cells.append(with_interval(rule["lead"]) if rule and "lead" in rule else "")
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_interval(lead: dict) -> str:
    low, high = lead["interval"]
    return f"{lead['mean_db']:+.2f} [{low:+.2f}, {high:+.2f}]"


def misses(results: dict[str, dict]) -> list[str]:
    """Where a rule is better at its size, or that none is worse anywhere, in words."""
    lines = []
    better = set()
    for name, figures in results.items():
        for rounding in (NEAREST, CALIBRATED):
            for row in figures[rounding]["rules"]:
                if "lead" not in row:
                    continue
                low, high = row["lead"]["interval"]
                if row["lead"]["mean_db"] < -TOLERANCE or high < 0:
                    over = with_interval(row["lead"])
                    lines.append(f"{name}, {rounding}: lead over {row['rule']} is {over} dB")
                if low > TOLERANCE:
                    better.add(name)
    return lines if better else [*lines, "no rule is worse than the target of its size"]


def read() -> dict[str, dict]:
    """Results so far."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", nargs="*", action="extend", choices=MODELS,
        help="measure these (default: all); results of the others stay",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="exit with 1 where a rule is better")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS if arguments.model is None else arguments.model:
            figures = measured(name, Path(folder))
            results = read() | {name: figures}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results = read()
    print(table(results))
    missed = misses(results)
    print("\n".join(["", *(f"missed: {line}" for line in missed)]))
    return int(arguments.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
