"""The main job, shown: what quantizing does to pictures, then the whole way at full width.

    make demo

Everything runs in the real ComfyUI, on the CPU, and stays in demo-output/.

1. A small trained model draws eight prompts in BF16 and in MXFP8, side by side in pictures.png
   (see demo_pictures.py).
2. A model with Z-Image's layers at their full size, five instead of 34 and random (908 million
   parameters), because a fresh machine has no models: the example workflow `MXFP8 2 - Quantize and
   compare` quantizes and saves it, `MXFP8 1 - Run a model` loads the saved file, and the three
   images are compared. Prompts are replaced by a fixed conditioning.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from pathlib import Path

import demo_pictures
import numpy
from comfyui import ROOT, Server, make_models
from graphs import output_files
from PIL import Image
from workflows import drop_text_encoder, find, load_example, set_inputs

from mxfp8.quant.reports.conversion import Report, format_size

BASE = ROOT / "demo-output"
DIFFUSION_MODELS = BASE / "models" / "diffusion_models"
PICTURES = BASE / "pictures.png"
SIZE, STEPS = 256, 2


def main() -> None:
    shutil.rmtree(BASE, ignore_errors=True)
    DIFFUSION_MODELS.mkdir(parents=True)
    shutil.copy(demo_pictures.MODEL, DIFFUSION_MODELS)
    with contextlib.ExitStack() as stack:
        with step("start ComfyUI"):
            server = stack.enter_context(Server(BASE, (demo_pictures.NODES,)))
        draw_pictures(server)
        quantize_at_full_width(server)


def draw_pictures(server: Server) -> None:
    """Write PICTURES; print how close each form of the small model is to the original."""
    with step("draw eight prompts in BF16 and in MXFP8"):
        original, *others = demo_pictures.draw_variants(server)
    demo_pictures.draw_sheet([original, *others]).save(PICTURES)
    print(f"\nagainst the BF16 model, mean of eight pictures, side by side in {PICTURES}")
    for variant in others:
        mean = demo_pictures.mean_of(variant.similarities(original))
        print(f"{variant.title:20} {', '.join(mean.caption())}")
    print(flush=True)


def quantize_at_full_width(server: Server) -> None:
    """Quantize, save, reload and compare a model of Z-Image's width."""
    with step("make a model of Z-Image's shape, and a VAE"):
        make_models(BASE, "zimage", "vae")
    source = DIFFUSION_MODELS / "zimage.safetensors"
    graph = load_example("MXFP8 2 - Quantize and compare", server.get("/object_info"))
    fit_machine(graph)
    set_inputs(graph, "UNETLoader", unet_name=source.name)
    saving, quantizing = find(graph, "MXFP8SaveModel"), find(graph, "MXFP8Quantize")
    images = {graph[key]["inputs"]["filename_prefix"]: key for key in find(graph, "SaveImage")}

    with step("load the BF16 model, sample and decode"):
        original = picture(server, graph, images["z_image_bf16"])
    with step("quantize it in the graph and save it"):
        outputs = server.run(graph, only=saving)
    saved = BASE / "output" / "diffusion_models" / outputs[saving[0]]["text"][0].split(":")[0]
    report = BASE / "report.json"
    report.write_text(outputs[quantizing[0]]["mxfp8_report"][0], encoding="utf-8")
    with step("sample and decode with the quantized model"):
        quantized = picture(server, graph, images["z_image_mxfp8"])

    graph = load_example("MXFP8 1 - Run a model", server.get("/object_info"))
    fit_machine(graph)
    set_inputs(graph, "MXFP8Load", model_name=saved.name)
    with step("load the saved file, sample and decode"):
        reloaded = picture(server, graph, *find(graph, "SaveImage"))

    print(f"\n{Report.from_json(report.read_text(encoding='utf-8')).summary()}\n")
    for label, path in (("original", source), ("MXFP8", saved)):
        print(f"{label + ' model':15} {format_size(path.stat().st_size):>9}  {path}")
    print(f"{'original image':15} {'':9}  {original}")
    print(f"{'MXFP8 image':15} {psnr(quantized, original):>6.1f} dB  {quantized}")
    same = "identical" if math.isinf(psnr(reloaded, quantized)) else "differs!"
    print(f"{'reloaded image':15} {same:>9}  {reloaded}")
    print(f"{'report':15} {'':9}  {report}")
    plain = psnr(original, original, flat=True)
    print(f"\ndB: PSNR against the original image; one flat color would have {plain:.1f} dB.")


@contextlib.contextmanager
def step(what: str):
    """Print what is being done, then how long it took."""
    print(f"{what} ... ", end="", flush=True)
    start = time.perf_counter()
    yield
    print(f"{time.perf_counter() - start:.1f} s", flush=True)


def fit_machine(graph: dict) -> None:
    """Fit an example to a machine that has neither models nor a GPU."""
    drop_text_encoder(graph)
    set_inputs(graph, "VAELoader", vae_name="vae.safetensors")
    set_inputs(graph, "EmptySD3LatentImage", width=SIZE, height=SIZE)
    set_inputs(graph, "KSampler", steps=STEPS)


def picture(server: Server, graph: dict, node: str) -> Path:
    """Run a workflow up to one SaveImage node; returns the image's path."""
    outputs = server.run(graph, only=[node])
    (path,) = output_files(outputs, [node], BASE, "images")
    return path


def psnr(path: Path, original: Path, flat: bool = False) -> float:
    """Peak signal-to-noise ratio of two 8-bit images, in dB; `flat` takes the first one's mean."""
    a, b = (numpy.asarray(Image.open(p), dtype=float) for p in (path, original))
    if flat:
        a = a.mean((0, 1))
    error = ((a - b) ** 2).mean()
    return 10 * math.log10(255**2 / error) if error else math.inf


if __name__ == "__main__":
    main()
