"""Weight-only formats that ComfyUI's users choose between, on the same trained weights.

    python bench/formats.py [--check]      (needs the PyPI packages gguf and comfy-kitchen)

On the 36 linear layers of all-MiniLM-L6-v2's encoder, by each format's own library:

    bits                  per weight, scales included
    sqnr_db               signal to noise of the weights, mean over the layers
    output_error          norm of the change of a layer's output over that of the output, on real
                          inputs that are not quantized; mean over the layers

What runs fast on which card, and what quantizing the activations adds, is another matter: this is
the error that a file has. --check exits with 1 when the results file says otherwise by over 2%.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from comfy_kitchen.tensor import QuantizedTensor
from cpu import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "formats.json"
sys.path.insert(0, str(ROOT / "tests" / "support"))

import minilm  # noqa: E402

from mxfp8 import kernels  # noqa: E402
from mxfp8.quant.conversion.calibration import calibrate  # noqa: E402
from mxfp8.quant.conversion.gptq import round_weight  # noqa: E402

TEXTS = 160  # paragraphs to calibrate on, and as many others to test on


def kitchen(layout: str, **options) -> Callable:
    """A format of ComfyUI's own."""

    def convert(weight: torch.Tensor, _) -> torch.Tensor:
        quantized = QuantizedTensor.from_float(weight, layout, **options)
        return quantized.dequantize()

    return convert


def gguf(kind: str) -> Callable:
    def convert(weight: torch.Tensor, _) -> torch.Tensor:
        from gguf import GGMLQuantizationType, quants

        chosen = GGMLQuantizationType[kind]
        return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), chosen), chosen))

    return convert


def mxfp8(weight: torch.Tensor, _) -> torch.Tensor:
    return kernels.dequantize(*kernels.quantize(weight), torch.float32, shape=weight.shape)


def mxfp8_calibrated(weight: torch.Tensor, moments) -> torch.Tensor:
    rounded = round_weight(weight, moments.second, moments.rows)
    return kernels.dequantize(rounded.qdata, rounded.scale, torch.float32, shape=weight.shape)


# name: bits per weight (without scales per row or tensor, which are next to nothing), conversion
FORMATS: dict[str, tuple[float, Callable]] = {
    "MXFP8, calibrated": (8.25, mxfp8_calibrated),
    "MXFP8": (8.25, mxfp8),
    "FP8 E4M3, one scale": (8.0, kitchen("TensorCoreFP8Layout", scale="recalculate")),
    "FP8 E4M3, plain cast": (8.0, lambda w, _: w.to(torch.float8_e4m3fn).float()),
    "INT8, one scale a row": (8.0, kitchen("TensorWiseINT8Layout", per_channel=True)),
    "INT8 ConvRot": (
        8.0, kitchen("TensorWiseINT8Layout", per_channel=True, convrot=True, convrot_groupsize=64)
    ),
    "GGUF Q8_0": (8.5, gguf("Q8_0")),
    "GGUF Q5_1": (6.0, gguf("Q5_1")),
    "NVFP4": (4.5, kitchen("TensorCoreNVFP4Layout", scale="recalculate")),
}  # fmt: skip


@torch.inference_mode()
def measure(convert: Callable, layers, known, tested) -> dict[str, float]:
    decibels, errors = [], []
    for name, layer in layers.items():
        weight = layer.weight.detach()
        change = convert(weight, known[name]).reshape(weight.shape).float() - weight
        decibels.append(float(10 * torch.log10(weight.square().sum() / change.square().sum())))
        second = tested[name].second.double()

        def energy(w: torch.Tensor, second=second) -> float:
            return float(((w.double() @ second) * w.double()).sum())  # of w x over the inputs x

        errors.append((energy(change) / energy(weight)) ** 0.5)
    return {"sqnr_db": statistics.fmean(decibels), "output_error": statistics.fmean(errors)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    model = minilm.trained().eval()
    texts = minilm.paragraphs()

    def moments(part: list[str]):
        batches = minilm.batches(part, size=1)
        return calibrate(model, batches, select=lambda n, _: n.startswith("encoder")).layers

    known, tested = moments(texts[:TEXTS]), moments(texts[TEXTS : 2 * TEXTS])
    layers = {name: model.get_submodule(name) for name in known}
    found = {}
    print(f"{'format':24}{'bits':>6}{'SQNR, dB':>10}{'output error':>14}")
    for name, (bits, convert) in FORMATS.items():
        found[name] = {"bits": bits, **measure(convert, layers, known, tested)}
        line = found[name]
        print(f"{name:24}{bits:6.2f}{line['sqnr_db']:10.2f}{line['output_error']:14.2e}")
    if check:
        earlier = json.loads(RESULTS.read_text(encoding="utf-8"))["formats"]
        pairs = [(found[n]["output_error"], earlier[n]["output_error"]) for n in FORMATS]
        return int(any(abs(a / b - 1) > 0.02 for a, b in pairs))
    about = machine(torch.get_num_threads()) | {"gguf": importlib.metadata.version("gguf")}
    result = {"machine": about, "layers": len(layers), "formats": found}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
