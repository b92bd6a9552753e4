"""How far a LoRA's effect on an MXFP8 model is off, beside the weight and in stock's two ways.

    python bench/lora.py [--image] [--json FILE] [--check] [--quick]

The effect is how far the LoRA moves the output: y(LoRA) - y(no LoRA). Exact is the effect on the
dequantized model in float32, where stock adds the LoRA to the weight and rounds nothing. The error
of a way is the norm of the difference of its effect from that one, over the norm of that one; the
median over the texts or pictures:

    ours             accelerated, LoRA by LoraLoader
    stock_merged     stock, LoRA by LoraLoader: dequantize, add, requantize with stochastic rounding
    stock_bypass     stock, LoRA by LoraLoaderBypass
    bf16_model       in BF16 only: stock, the dequantized model, LoRA by LoraLoader

LoRAs have rank 16 on every quantized layer, scaled so that the norm of what they add to a weight is
0.5, 1 or 5% of the weight's. `trained` ones come from 40 steps of AdamW, which teach the model to
give for each of some other texts what it gave for the next one; `random` ones have random factors.
A trained LoRA moves the output further than a random one of its norm, and what a merge rounds stays
the same: so its error is smaller.

The model is all-MiniLM-L6-v2 in ComfyUI's text encoder classes, its output sentence embeddings.
With --image it is the small text-to-image model of bench/emoji, its output the latents of 16
prompts after 8 Euler steps. Both run in the real ComfyUI, on a CPU with static memory, and compute
in float32 or BF16.

The median, because a picture on its way from one emoji to another can go either way at the smallest
difference: with a trained LoRA of 5% in BF16, one of 8 was 15% off beside the weights, 5% in the
BF16 model, 2% by stock's bypass, and each of the others 2%; from 11 noises that differed from its
own by 0.2%, it was 2 to 7%, 2 to 6% and 2 to 10% off.

Results go to bench/results/lora.json, where those of the other model stay, and to the picture
docs/gallery/lora.svg. --json writes {norm: {way: error}} of the trained LoRA in float32. --check
exits with 1 if a bound fails. --quick measures a random LoRA on one block of MiniLM in float32, and
writes nothing but --json.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from functools import partial
from pathlib import Path

import torch
from cpu import machine
from log_chart import Line, Panel, draw
from lora_models import (
    RANK,
    Factors,
    ImageModel,
    Model,
    TextEncoder,
    lora_file,
    random_factors,
    trained_factors,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "lora.json"
PICTURE = ROOT / "docs" / "gallery" / "lora.svg"

NORMS = (0.005, 0.01, 0.05)
OURS, MERGED, BYPASS, BF16 = "ours", "stock_merged", "stock_bypass", "bf16_model"
LORAS = TRAINED, RANDOM = "trained", "random"
FLOAT32 = "float32"

# Most that ours may be off in float32, and least that it must be ahead of stock's merge.
MOST, AHEAD = 1e-3, 100


@torch.inference_mode()  # as ComfyUI executes nodes
def measure(model: Model, factors: Factors, dtypes) -> dict[str, dict]:
    """Dtype -> norm -> way -> error."""
    import comfy.sd

    def effects(loaded, load) -> dict[str, torch.Tensor]:
        before = model.output(loaded).clone()
        files = {str(norm): lora_file(model, factors, norm) for norm in NORMS}
        return {n: model.output(model.add_lora(loaded, f, load)) - before for n, f in files.items()}

    merge, bypass = comfy.sd.load_lora_for_models, comfy.sd.load_bypass_lora_for_models
    exact = effects(model.load(model.dequantized, torch.float32), merge)
    results = {}
    for dtype in dtypes:
        load = partial(model.load, model.quantized, dtype)
        ways = {
            OURS: effects(model.accelerate(load()), merge),
            MERGED: effects(load(), merge),
            BYPASS: effects(load(), bypass),
        }
        if dtype == torch.bfloat16:
            state = {key: value.to(dtype) for key, value in model.dequantized.items()}
            ways[BF16] = effects(model.load(state, dtype), merge)
        results[str(dtype).removeprefix("torch.")] = {
            norm: {way: distance(effect[norm], exact[norm]) for way, effect in ways.items()}
            for norm in exact
        }
    return results


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, the median over the outputs."""
    errors, sizes = (found - wanted).flatten(1).norm(dim=1), wanted.flatten(1).norm(dim=1)
    return float((errors / sizes).quantile(0.5))


def holds(rows: dict[str, dict[str, float]]) -> bool:
    """Whether errors in float32, norm -> way -> error, keep the bounds of --check."""
    return all(row[OURS] <= MOST and AHEAD * row[OURS] <= row[MERGED] for row in rows.values())


def table(lora: str, dtype: str, rows: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    ways = list(next(iter(rows.values())))
    lines = [f"| {lora} LoRA, {dtype} | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    lines += [
        f"| {100 * float(norm):g}% | " + " | ".join(f"{error:.2g}" for error in row.values()) + " |"
        for norm, row in rows.items()
    ]
    return "\n".join(lines)


def picture(models: dict) -> str:
    """The results in FP32 as SVG; the stock merge is ComfyUI's own way."""
    panels = []
    for title, found in models.items():
        errors = {
            (lora, way): tuple(row[way] for row in found[lora][FLOAT32].values())
            for lora in LORAS
            for way in (OURS, MERGED)
        }
        lines = (
            Line("ComfyUI's merge, random", "#c0681a", errors[RANDOM, MERGED], dashed=True),
            Line("ComfyUI's merge, trained", "#c0681a", errors[TRAINED, MERGED]),
            Line("beside, random", "#0b62d6", errors[RANDOM, OURS], dashed=True),
            Line("beside, trained", "#0b62d6", errors[TRAINED, OURS]),
        )
        panels.append(Panel(f"Error of a LoRA's effect, FP32: {title}", lines))
    across = "norm of the LoRA, in % of the weight's"
    return draw(panels, [f"{100 * norm:g}%" for norm in NORMS], across)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--image", action="store_true", help="measure the image model, not MiniLM")
    parser.add_argument("--json", type=Path, help="also write {norm: {way: error}} there")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound fails")
    parser.add_argument("--quick", action="store_true", help="a random LoRA on one block of MiniLM")
    arguments = parser.parse_args()
    if arguments.image and arguments.quick:
        parser.error("--quick is for MiniLM")

    from comfyui import import_modules

    import_modules()
    logging.disable(logging.WARNING)
    if arguments.quick:
        model = TextEncoder(4, keep=r"^pooler|layer\.[1-5]")
        results = {RANDOM: measure(model, random_factors(model), (torch.float32,))}
    else:
        model = ImageModel() if arguments.image else TextEncoder()
        factors = {TRAINED: trained_factors(model), RANDOM: random_factors(model)}
        dtypes = torch.float32, torch.bfloat16
        results = {lora: measure(model, factors[lora], dtypes) for lora in LORAS}
        save(model, results)
    for lora, found in results.items():
        for dtype, rows in found.items():
            print(f"\n{table(lora, dtype, rows)}")
    if arguments.json:
        text = json.dumps(next(iter(results.values()))[FLOAT32], indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    kept = all(holds(found[FLOAT32]) for found in results.values())
    print(f"\nours at most {MOST:g} in float32, stock's merge {AHEAD} times that:",
          "holds" if kept else "FAILS")  # fmt: skip
    return int(arguments.check and not kept)


def save(model: Model, found: dict) -> None:
    """Write the results and the picture."""
    import comfyui_version

    about = machine(torch.get_num_threads()) | {"comfyui": comfyui_version.__version__}
    models = json.loads(RESULTS.read_text(encoding="utf-8"))["models"] if RESULTS.exists() else {}
    models[model.title] = {"sha256": model.sha256, "machine": about, **found}
    document = {"rank": RANK, "models": models}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    PICTURE.write_text(picture(models), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
