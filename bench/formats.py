"""Error of the weight formats that ComfyUI's users choose between, on the same trained weights.

    python bench/formats.py [--check]      (needs the PyPI packages gguf and comfy-kitchen)

Each of the 36 linear layers in all-MiniLM-L6-v2's encoder is quantized by each format's own
library. For every format:

    bits                  per weight, block scales included
    sqnr_db               signal to quantization noise of the weights, mean over the layers
    output_error          norm of the error of a layer's output over the norm of the output, on
                          real inputs that are not quantized; mean over the layers

Calibrated MXFP8 is tested on other paragraphs than it was calibrated on. Speed, and what quantizing
activations adds, are not measured here. Results go to bench/results/formats.json; --check writes
nothing and exits with 1 if an output error differs from that file's by over 2%.
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
    """A format of comfy-kitchen."""

    def convert(weight: torch.Tensor, _) -> torch.Tensor:
        quantized = QuantizedTensor.from_float(weight, layout, **options)
        return quantized.dequantize()

    return convert


def gguf(kind: str) -> Callable:
    """A format of GGUF."""

    def convert(weight: torch.Tensor, _) -> torch.Tensor:
        from gguf import GGMLQuantizationType, quants

        chosen = GGMLQuantizationType[kind]
        return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), chosen), chosen))

    return convert


def mxfp8(weight: torch.Tensor, _) -> torch.Tensor:
    return kernels.dequantize(*kernels.quantize(weight), torch.float32, shape=weight.shape)


def mxfp8_calibrated(weight: torch.Tensor, moments) -> torch.Tensor:
    rounded = round_weight(weight, moments.hessian, moments.rows)
    return kernels.dequantize(rounded.qdata, rounded.scale, torch.float32, shape=weight.shape)


# Name -> bits per weight (scales per row or tensor are too few to count), conversion.
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
def measure(convert: Callable, layers, calibration, test) -> dict[str, float]:
    """The errors of one format.

    Args:
        calibration, test: moments of each layer's inputs, to convert with and to measure on.
    """
    decibels, errors = [], []
    for name, layer in layers.items():
        weight = layer.weight.detach()
        error = convert(weight, calibration[name]).reshape(weight.shape).float() - weight
        decibels.append(float(10 * torch.log10(weight.square().sum() / error.square().sum())))
        hessian = test[name].hessian.double()

        def output_energy(w: torch.Tensor, hessian=hessian) -> float:
            """Mean square norm of w x over the inputs x."""
            return float(((w.double() @ hessian) * w.double()).sum())

        errors.append((output_energy(error) / output_energy(weight)) ** 0.5)
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

    calibration, test = moments(texts[:TEXTS]), moments(texts[TEXTS : 2 * TEXTS])
    layers = {name: model.get_submodule(name) for name in calibration}
    results = {}
    print(f"{'format':24}{'bits':>6}{'SQNR, dB':>10}{'output error':>14}")
    for name, (bits, convert) in FORMATS.items():
        line = results[name] = {"bits": bits, **measure(convert, layers, calibration, test)}
        print(f"{name:24}{bits:6.2f}{line['sqnr_db']:10.2f}{line['output_error']:14.2e}")
    if check:
        earlier = json.loads(RESULTS.read_text(encoding="utf-8"))["formats"]
        pairs = [(results[n]["output_error"], earlier[n]["output_error"]) for n in FORMATS]
        return int(any(abs(a / b - 1) > 0.02 for a, b in pairs))
    versions = machine(torch.get_num_threads()) | {"gguf": importlib.metadata.version("gguf")}
    document = {"machine": versions, "layers": len(layers), "formats": results}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
