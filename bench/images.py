"""What each weight format, and each way to multiply it, changes in a small image model's pictures.

    python bench/images.py [--pairs N] [--only ROW ...] [--model FILE] [--json FILE] [--check]

The model is tests/models/emoji.safetensors, a trained Flux of 5.9 million parameters in BF16
(bench/emoji), sampled by the real ComfyUI in 20 Euler steps at CFG 1. The reference computes it in
float32. In every other row the linears that a conversion quantizes, and only they, have forwards
of a format; the rest stays float32, so what differs is due to weights and inputs alone.

    nearest/FORM, calibrated/FORM    files of convert_file, by the oracle in each form of forms.py.
                                     Modulations are exact in all of them: they get one row for
                                     each picture, and ComfyUI's layers run such inputs exact
    bf16/bf16                        the original file, all of it computed in BF16: what any
                                     16-bit GPU changes. It quantizes nothing
    fp8_scaled, fp8_cast             E4M3 with one scale for a tensor, and without
    int8_convrot                     comfy-kitchen's INT8, made of the BF16 weights
    q8_0                             GGUF's, by the PyPI package gguf, if that is installed
    nvfp4                            E2M1 in blocks of 16

Forms are computed by `fast_linear_in`. On four pictures of another training, SNR by the oracle
itself was the same to 2e-5 dB in exact and to 0.006 in INT8; in MXFP8 and FP8 it was 0.03 to 0.3 dB
off. There a sum's last bit decides how inputs round, and pictures follow: changes of inputs by 1e-6
moved the mean of these four by 0.2 dB as well. Intervals over all pictures are wider than that.

After the slash is what inputs become: `exact`, nothing, or what stock ComfyUI makes of them on
cards that multiply the format: E4M3 with the scale 1 (`fp8`), INT8 rotated with a scale for each
row (`int8`), NVFP4 with a scale for each picture (`nvfp4`); in modulations too, as in stock.

Calibrated on every other of the prompts that the model was trained on, each with a seed; measured
on the others, and on the 16 that it was not trained on, each with another seed. For every picture:
SNR of the latent (dB), PSNR (dB) and SSIM of the pixels; a row has their means, with a 95%
interval by bootstrap over the pictures, and the mean differences from nearest/exact,
calibrated/exact and nearest with the same inputs. These are paired: both rows have the same
pictures.

LPIPS is not measured: lpips 0.1.4 and torchmetrics 1.9 bring its last layers only and piq 0.8 and
pyiqa 0.1.16 none; the network below them is downloaded on first use.

Results go to bench/results/images.json; with --json the rows alone go to that file instead. --check
exits with 1 where calibrated rounding is not ahead of rounding to nearest by as much as BOUNDS say.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from cpu import machine
from formats import gguf, kitchen
from forms import EXACT, FORMS, fast_linear_in
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent / "emoji"))

from pictures import HELD_OUT, NAMES, encode, pixels, sample

from mxfp8.quant.conversion.calibration import Calibration, calibrate
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.format import SCALE, WEIGHT, read_header
from mxfp8.quant.reports import metrics
from mxfp8.quant.reports.comparison import FEWEST, mean_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "images.json"
MODEL = ROOT / "tests" / "models" / "emoji.safetensors"

FIRST_SEED = {"calibration": 0, "test": 1000}
BATCH = 72  # pictures that are sampled together
KNOWN = len(NAMES) - HELD_OUT
CALIBRATION, TEST = NAMES[:KNOWN:2], NAMES[1:KNOWN:2] + NAMES[KNOWN:]
FIGURES = "latent_snr_db", "psnr_db", "ssim"
NEAREST, CALIBRATED = "nearest", "calibrated"
CALIBRATIONS = {  # file -> prompts, and how many seeds each of them gets
    CALIBRATED: (len(CALIBRATION), 1),
    "calibrated_8_prompts": (8, 1),
    "calibrated_8_seeds": (1, 8),
}

BOUNDS = (  # row, base, the least that its latent SNR is higher, in dB: of the interval's low end
    ("calibrated/exact", "nearest/exact", 4.0),
    ("calibrated/mxfp8", "nearest/mxfp8", 1.0),
    ("calibrated/rowwise_fp8", "nearest/rowwise_fp8", 1.5),
    ("calibrated/rotated_int8", "nearest/rotated_int8", 3.0),
)

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Pairs:
    """Prompts, each with the noise that ComfyUI draws of a seed for one picture."""

    context: torch.Tensor
    pooled: torch.Tensor
    noise: torch.Tensor

    @classmethod
    def of(cls, prompts: list[str], first_seed: int) -> Pairs:
        """Seeds follow the first."""
        import comfy.sample

        empty = torch.zeros(1, 16, 16, 16)
        noise = [comfy.sample.prepare_noise(empty, first_seed + i) for i in range(len(prompts))]
        return cls(*encode(prompts), torch.cat(noise))

    def batches(self) -> Iterable[tuple[torch.Tensor, ...]]:
        parts = (values.split(BATCH) for values in (self.context, self.pooled, self.noise))
        return zip(*parts, strict=True)

    def sample(self, model) -> torch.Tensor:
        """Latents."""
        return torch.cat([sample(model, *batch) for batch in self.batches()])


@dataclass(frozen=True)
class Stored:
    """A layer of an MXFP8 file."""

    qdata: torch.Tensor
    scale: torch.Tensor
    shape: tuple[int, int]


class Subject:
    """A model in ComfyUI, in float32, with layers that can get other forwards."""

    def __init__(self, path: Path):
        self.path = path
        self.model = self._load(torch.float32)
        self.network = self.model.model.diffusion_model

    def _load(self, dtype: torch.dtype):
        import comfy.sd

        model = comfy.sd.load_diffusion_model(str(self.path), model_options={"dtype": dtype})
        if dtype != torch.float32:  # ComfyUI's choice on a CPU
            model.set_model_compute_dtype(dtype)
        return model

    def in_bf16(self):
        """The same file, computed in BF16."""
        return self._load(torch.bfloat16)

    def layer(self, name: str) -> torch.nn.Linear:
        return self.network.get_submodule(name)

    def with_forwards(self, forwards: dict[str, Forward]):
        """The model with other forwards of some layers."""
        clone = self.model.clone()
        for name, forward in forwards.items():
            clone.add_object_patch(f"diffusion_model.{name}.forward", forward)
        return clone

    def convert(self, calibration: Calibration | None = None) -> dict[str, Stored]:
        """The layers of the file's conversion."""
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "mxfp8.safetensors"
            convert_file(self.path, target, calibration=calibration)
            layers, state = read_header(target).layers, load_file(target)
        return {
            name: Stored(state[name + WEIGHT], state[name + SCALE], layer.shape)
            for name, layer in layers.items()
        }

    def calibrate(self, layers: Iterable[str], pairs: Pairs) -> Calibration:
        """Of some layers."""
        return calibrate(
            self.network,
            pairs.batches(),
            lambda _, batch: sample(self.model, *batch),
            lambda name, _: name in layers,
        )


def formed(subject: Subject, file: dict[str, Stored], form: str) -> dict[str, Forward]:
    """Forwards of a file's layers in a form."""

    def forward(name: str, stored: Stored) -> Forward:
        arguments = stored.qdata, stored.scale, stored.shape, subject.layer(name).bias
        exact, fast = (fast_linear_in(f, *arguments) for f in (EXACT, form))
        return lambda x: exact(x) if x.ndim == 2 else fast(x)

    return {name: forward(name, stored) for name, stored in file.items()}


@dataclass(frozen=True)
class Rival:
    """A format by its own library.

    Attributes:
        weight: [N, K] -> what `linear` takes for it.
        inputs: of a picture, [M, K] -> their values in the format.
    """

    weight: Callable[[torch.Tensor], torch.Tensor]
    inputs: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, layer: torch.nn.Linear) -> Forward:
        weight, bias = self.weight(layer.weight), layer.bias

        def forward(x: torch.Tensor) -> torch.Tensor:
            if self.inputs is not None:
                pictures = x.reshape(len(x), -1, x.shape[-1])
                x = torch.stack([self.inputs(picture) for picture in pictures]).reshape(x.shape)
            return torch.nn.functional.linear(x, weight, bias)

        return forward


def rivals() -> dict[str, Rival]:
    """Row -> rival."""
    from comfy_kitchen.tensor import QuantizedTensor

    def convrot(weight: torch.Tensor) -> torch.Tensor:
        """`linear` quantizes the inputs of this one."""
        options = {"per_channel": True, "convrot": True, "convrot_groupsize": 256}
        return QuantizedTensor.from_float(weight, "TensorWiseINT8Layout", **options)

    def values(layout: str, **options) -> Callable[[torch.Tensor], torch.Tensor]:
        convert = kitchen(layout, **options)
        return lambda x: convert(x.contiguous(), None)

    fp8, nvfp4 = "TensorCoreFP8E4M3Layout", "TensorCoreNVFP4Layout"  # ComfyUI's
    scaled, four_bits = (values(layout, scale="recalculate") for layout in (fp8, nvfp4))
    found = {
        "fp8_scaled/exact": Rival(scaled),
        "fp8_scaled/fp8": Rival(scaled, values(fp8)),
        "fp8_cast/exact": Rival(lambda weight: weight.to(torch.float8_e4m3fn).float()),
        "int8_convrot/int8": Rival(convrot),
        "q8_0/exact": Rival(lambda weight: gguf("Q8_0")(weight, None)),
        "nvfp4/exact": Rival(four_bits),
        "nvfp4/nvfp4": Rival(four_bits, values(nvfp4)),
    }
    if importlib.util.find_spec("gguf") is None:
        del found["q8_0/exact"]
    return found


def spread(prompts: list[str], count: int) -> list[str]:
    """So many of them, as far apart as they can be."""
    return [prompts[i * len(prompts) // count] for i in range(count)]


def rows(subject: Subject) -> dict[str, Callable]:
    """Row -> function that gives its model."""
    nearest = subject.convert()

    @cache
    def layers(file: str) -> dict[str, Stored]:
        if file == NEAREST:
            return nearest
        count, seeds = CALIBRATIONS[file]
        pairs = Pairs.of(spread(CALIBRATION, count) * seeds, FIRST_SEED["calibration"])
        return subject.convert(subject.calibrate(nearest, pairs))

    def ours(file: str, form: str):
        return subject.with_forwards(formed(subject, layers(file), form))

    def rival(one: Rival):
        return subject.with_forwards({name: one.forward(subject.layer(name)) for name in nearest})

    pairs = [(file, form) for form in FORMS for file in (NEAREST, CALIBRATED)]
    pairs += [(file, EXACT) for file in CALIBRATIONS if file != CALIBRATED]
    return {
        **{f"{file}/{form}": partial(ours, file, form) for file, form in pairs},
        "bf16/bf16": subject.in_bf16,
        **{name: partial(rival, one) for name, one in rivals().items()},
    }


def compare(reference: torch.Tensor, latents: torch.Tensor) -> dict[str, list[float]]:
    """Figure -> its value for every picture.

    Raises:
        ValueError: a picture is the reference's, bit for bit, or is not finite.
    """
    found: dict[str, list[float]] = {figure: [] for figure in FIGURES}
    for one, other in zip(reference, latents, strict=True):
        images = (pixels(latent[None]) for latent in (one, other))
        values = metrics.snr_db(one, other), *metrics.quality(*images)
        if None in values:
            raise ValueError("a picture is identical to the reference's, or not finite")
        for figure, value in zip(FIGURES, values, strict=True):
            found[figure].append(value)
    return found


def summary(found: dict[str, list[float]]) -> dict:
    """Figure -> mean, and `interval`: figure -> [low, high]."""
    means = {figure: mean_of(values) for figure, values in found.items()}
    return {
        **{figure: mean.mean for figure, mean in means.items()},
        "interval": {figure: [mean.low, mean.high] for figure, mean in means.items()},
    }


def minus(found: dict[str, list[float]], base: dict[str, list[float]]) -> dict[str, list[float]]:
    return {
        figure: [a - b for a, b in zip(values, base[figure], strict=True)]
        for figure, values in found.items()
    }


def bases(name: str) -> tuple[str, str, str]:
    """The rows that a row is compared with, those that are measured before it."""
    return f"{NEAREST}/{EXACT}", f"{CALIBRATED}/{EXACT}", f"{NEAREST}/{name.partition('/')[2]}"


def measure(
    models: dict[str, Callable], reference: torch.Tensor, pairs: Pairs
) -> Iterable[tuple[str, dict]]:
    """(row, its figures) of each model in turn."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, load in models.items():
        found[name] = compare(reference, pairs.sample(load()))
        others = [base for base in bases(name) if base in found and base != name]
        differences = {base: summary(minus(found[name], found[base])) for base in others}
        yield name, summary(found[name]) | {"difference": differences}


HEADER = """\
| weights/inputs | latent SNR, dB | PSNR, dB | SSIM \
| SNR - nearest/exact | - calibrated/exact | - nearest/same inputs |
|---|---|---|---|---|---|---|"""


def line(name: str, row: dict) -> str:
    """Of the Markdown table."""
    digits = {"latent_snr_db": 1, "psnr_db": 1, "ssim": 5}
    cells = [with_interval(row, figure, digits[figure]) for figure in FIGURES]
    for base in bases(name):
        versus = row["difference"].get(base)
        cells.append(with_interval(versus, FIGURES[0], 1, "+") if versus else "")
    return f"| {name} | " + " | ".join(cells) + " |"


def with_interval(row: dict, figure: str, digits: int, sign: str = "") -> str:
    low, high = row["interval"][figure]
    return f"{row[figure]:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def misses(found: dict[str, dict]) -> list[str]:
    """Bounds that rows which were measured do not keep, in words."""
    lines = []
    for name, base, least in BOUNDS:
        versus = found.get(name, {}).get("difference", {}).get(base)
        if versus and (low := versus["interval"]["latent_snr_db"][0]) < least:
            lines.append(f"{name} - {base}: from {low:+.2f} dB on, at least {least:+g}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=len(TEST), help="of a prompt and a seed")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="as nearest/exact")
    parser.add_argument("--model", type=Path, default=MODEL, help="another training's weights")
    parser.add_argument("--json", type=Path, help="write the rows there, and nothing else")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound fails")
    arguments = parser.parse_args()
    count = arguments.pairs
    if not FEWEST <= count <= len(TEST):
        parser.error(f"--pairs {count}: at most {len(TEST)}, the prompts to test on, and at least "
                     f"{FEWEST}, for intervals")  # fmt: skip

    from comfyui import import_modules

    import_modules()
    logging.disable(logging.WARNING)
    with torch.inference_mode():
        subject = Subject(arguments.model)
        models = rows(subject)
        if unknown := set(arguments.only or ()) - set(models):
            parser.error(f"--only {' '.join(sorted(unknown))}: rows are {' '.join(models)}")
        if "q8_0/exact" not in models:
            print("q8_0 is left out: it needs the PyPI package gguf\n")
        chosen = {name: models[name] for name in arguments.only or models}
        pairs = Pairs.of(spread(TEST, count), FIRST_SEED["test"])
        reference = pairs.sample(subject.model)
        print(HEADER)
        found = {}
        for name, row in measure(chosen, reference, pairs):
            found[name] = row
            print(line(name, row), flush=True)
    missed = misses(found)
    print("\n".join(["", *(f"missed: {one}" for one in missed)]))
    save(arguments.json, arguments.model, count, found)
    return int(arguments.check and bool(missed))


def save(rows_only: Path | None, model: Path, pairs: int, found: dict[str, dict]) -> None:
    if rows_only is not None:
        rows_only.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    import comfyui_version

    about = machine(torch.get_num_threads()) | {"comfyui": comfyui_version.__version__}
    document = {
        "machine": about,
        "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "pairs": pairs,
        "figures": found,
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
