"""The page of a model hub about an MXFP8 file: a README.md with metadata that the hub reads.

Every figure in it comes from the file: its header and its bytes, and the reports that it carries or
that are given with it. What nobody measured is not in it, and what only the author knows (the
license, the original) stays a marked place to fill in. Its front matter follows
https://huggingface.co/docs/hub/model-cards#model-card-metadata, with the library that the hub gives
to ComfyUI's files.

Names and sentences from a file are a stranger's text, and are escaped.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ..kernels import layout
from ..quant.checks.inspect import OTHER_WEIGHTS, Inspection, inspect_file
from ..quant.container.header import FormatError, one_line, parse_object, quoted
from ..quant.conversion import architectures, policy, text_encoders
from ..quant.format import Header, bare, read_header
from ..quant.progress import Progress
from ..quant.reports import document
from ..quant.reports.comparison import Comparison, interval
from ..quant.reports.conversion import KEPT, MXFP8, LayerReport, Report
from ..quant.reports.metadata import note_on_seeds
from ..quant.reports.units import format_count, format_size
from ..quant.sources.diffusers import has_diffusers_names
from .config import Method

KEY = "mxfp8_card"
PACK = "https://github.com/mxfp8/ComfyUI-MXFP8"
_HUB = "https://huggingface.co/"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)  # a model's name on the hub
_LICENSES = ("modelspec.license", "license")  # entries of a file's metadata that may name it
_YAML_WORDS = ("true", "false", "yes", "no", "on", "off", "y", "n", "null")  # no strings there
_MOST_ROWS = 40  # of a table; a preset keeps about ten kinds of layers
_LONGEST = 1000  # letters of a name or sentence; expressions of presets have some hundred
_VAES = ("first_stage_model.", "vae.", "audio_vae.")

_INSTALL = f'pip install "mxfp8[diffusers] @ git+{PACK}"'
_WAN = (
    r"(patch_embedding|text_embedding|time_embedding|time_projection|img_emb\.proj|head)\..+"
    r"|blocks\.\d+\.(modulation|(self_attn|cross_attn|ffn|norm3)\..+)"
)
# (architecture, diffusers' class, expression for all keys of its files) of what
# `integrations.diffusers` loads from one file; the first row that fits counts. A class drops layers
# that it does not know, and an architecture may have variants that diffusers has no class for.
_DIFFUSERS = (
    ("Z-Image", "ZImageTransformer2DModel", r"(?!dec_net\.).+"),  # dec_net: in pixel space
    ("Flux.1", "FluxTransformer2DModel", ".+"),
    ("Flux.2", "Flux2Transformer2DModel", ".+"),
    ("Qwen-Image", "QwenImageTransformer2DModel", ".+"),
    ("Wan", "WanTransformer3DModel", _WAN),
    ("Wan", "WanVACETransformer3DModel", rf"{_WAN}|vace_(patch_embedding|blocks)\..+"),
    (
        "Wan",
        "WanAnimateTransformer3DModel",
        rf"{_WAN}|(pose_patch_embedding|face_adapter|face_encoder|motion_encoder)\..+",
    ),
)
# Diffusers guesses a configuration that is not given: of Flux.2 and Wan 2.2 often another model's,
# of Qwen-Image that of Stable Diffusion.
_NO_CONFIG = '    config="OWNER/NAME",  # TO FILL IN: the original in Diffusers\' form'
_LIBRARY_FILE = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors")
_MAX_CONFIG = 10_000_000  # bytes


@dataclass(frozen=True)
class Card:
    """A page.

    Attributes:
        text: Markdown with YAML front matter.
        missing: what its author has to fill in, in words.
        warnings: what its author should look at; they stand at its end, in a comment.
    """

    file: str
    text: str
    missing: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> str:
        """Versioned JSON."""
        return document.write(KEY, asdict(self))


def make_card(
    path,
    *,
    report: Report | None = None,
    base: str | None = None,
    license: str | None = None,
    progress: Progress | None = None,
) -> Card:
    """Write the page about an MXFP8 file, which is read to its last byte.

    Args:
        path: of a safetensors file with MXFP8 layers.
        report: of its conversion; default: the one in the file, if any.
        base: the original, as "owner/name" on the hub or as a URL.
        license: the hub's name of the license, such as "apache-2.0".
        progress: called after every slab.

    Raises:
        FormatError: it is no MXFP8 file, one with problems, or one for diffusers or transformers.
        ValueError: the report is another file's.
        OSError: it cannot be read.
    """
    path = Path(path)
    inspection = inspect_file(path, progress=progress)
    if inspection.problems:
        raise FormatError(
            f"{inspection.problems[0]}; a file with problems is not to be published "
            "(`mxfp8 inspect` lists them)"
        )
    if not inspection.mxfp8:
        raise FormatError(
            f"{path.name}: no layer is MXFP8; a card is for MXFP8 files, which `mxfp8 convert` "
            "makes of originals"
        )
    header = read_header(path)
    if _is_for_library(header):
        raise FormatError(
            f"{path.name}: it is in the form that diffusers and transformers load; a card is for a "
            "file that ComfyUI loads. Convert the original without --format, and give that file"
        )
    problem = _other_layers(inspection, report or inspection.report)
    if problem is not None and report is not None:
        raise ValueError(f"{problem}; give the report of the conversion that wrote this file")
    if problem is not None:
        inspection.warnings.append(problem)
        inspection.report = None
    if OTHER_WEIGHTS in inspection.warnings:
        inspection.comparison = None
    return _Page(header, inspection, report, base, license).card()


def hub_name(base: str) -> str | None:
    """ "owner/name" of a model on the hub, given as that or as its URL; None for other URLs.

    Raises:
        ValueError: it is neither.
    """
    name = base.removeprefix(_HUB).rstrip("/")
    if _REPOSITORY.fullmatch(name):
        return name
    if re.fullmatch(r"https?://[^\s<>()\"']+", base):
        return None
    raise ValueError(f"{base!r} is neither owner/name nor a URL")


def _is_for_library(header: Header) -> bool:
    """Whether a file is what `mxfp8 convert --format diffusers` writes.

    Its tensors show it, or where their names are the same in ComfyUI or unknown, the config.json
    beside it.
    """
    if has_diffusers_names(header.tensors):
        return True
    config = header.path.parent / "config.json"
    if not _LIBRARY_FILE.fullmatch(header.path.name) or not config.is_file():
        return False
    if config.stat().st_size > _MAX_CONFIG:
        return False
    try:
        entry = parse_object(config.name, config.read_bytes()).get("quantization_config")
    except FormatError:
        return False
    return isinstance(entry, dict) and entry.get("quant_method") == Method.MXFP8.value


def _other_layers(inspection: Inspection, report: Report | None) -> str | None:
    """That a report is not on this file's layers, in words; else None.

    A checkpoint may have the report of its diffusion model alone, and one of several text encoders
    that of all of them.
    """
    if report is None:
        return None
    reported = {bare(x.name): layout.padded_shape(*x.shape) for x in report.quantized}
    for layer in inspection.mxfp8:
        shape, said = layout.padded_shape(*layer.shape), reported.get(bare(layer.name))
        beside = said is None and layer.name.startswith(text_encoders.PREFIXES)
        if said != shape and not beside:
            return (
                f"the report is another file's: MXFP8 layer {quoted(layer.name)} is {list(shape)} "
                f"in {inspection.file} and {'none' if said is None else list(said)} in the "
                "report, padded to whole blocks"
            )
    return None


class _Page:
    """The sections of a page, each as lines of Markdown."""

    def __init__(
        self,
        header: Header,
        inspection: Inspection,
        report: Report | None,
        base: str | None,
        license: str | None,
    ):
        self.header = header
        self.inspection = inspection
        self.report = report or inspection.report
        self.comparison: Comparison | None = inspection.comparison
        self.base = base
        self.repository = None if base is None else hub_name(base)
        self.license = license or next(
            (header.metadata[key] for key in _LICENSES if header.metadata.get(key)), None
        )
        self.detected = architectures.detect(header.tensors)
        self.model = inspection.architecture

    def card(self) -> Card:
        sections = (
            self._front_matter(), self._about(), self._layers(), self._error(),
            self._requirements(), self._comfyui(), self._diffusers(), self._mlx(), self._made(),
            self._warnings(),
        )  # fmt: skip
        lines = [section for section in map(list, sections) if section]
        text = "\n\n".join(map("\n".join, lines)) + "\n"
        known = {"the license": self.license, "the original (base_model)": self.base}
        missing = tuple(name for name, value in known.items() if value is None)
        if self.base is not None and _NO_CONFIG in text:
            missing += ("the original in Diffusers' form (config)",)
        return Card(self.inspection.file, text, missing, tuple(self.inspection.warnings))

    def _front_matter(self) -> Iterator[str]:
        yield "---"
        if self.license is None:
            yield "license:  # TO FILL IN: the original's, such as apache-2.0"
        else:
            yield f"license: {_yaml(self.license)}"
        if self.base is None:
            yield "base_model:  # TO FILL IN: the original, as owner/name"
        elif self.repository is not None:
            yield f"base_model: {_yaml(self.repository)}"
        if self.base is None or self.repository is not None:
            yield "base_model_relation: quantized"
        yield "library_name: diffusion-single-file"
        yield from ("tags:", "- mxfp8", "- comfyui", "- diffusion-single-file", "---")

    def _about(self) -> Iterator[str]:
        inspection, report = self.inspection, self.report
        name = self.header.path.stem
        yield from (f"# {_text(name)}", "")
        of = _text(self.model) if self.model else "A model"
        if self.base is not None:
            link = self.base if self.repository is None else _HUB + self.repository
            of = f"[{_text(self.repository or self.base)}]({link})"
        yield (
            f"{of} in MXFP8: 8-bit E4M3 weights with one power-of-two scale (E8M0) per block of "
            "32, in ComfyUI's file format."
        )
        yield from ("", "| | |", "|---|---|")
        yield f"| file | {_code(inspection.file)} |"
        size = format_size(inspection.bytes)
        stored = sum(tensor.nbytes for tensor in self.header.tensors.values())
        if report is not None and report.bytes_after == stored:  # else it is on a part, or on more
            share = 100 * report.bytes_after / report.bytes_before
            size += f", {share:.1f}% of the original's {format_size(report.bytes_before)}"
        yield f"| size | {size} |"
        kept = sum(layer.decision == KEPT for layer in inspection.layers)
        others = len(inspection.layers) - kept - len(inspection.mxfp8)
        counts = [format_count(len(inspection.mxfp8), "MXFP8 layer")]
        counts += [format_count(kept, "matrix", "matrices") + " kept"] if kept else []
        counts += [f"{others} in other formats"] if others else []
        yield f"| weights | {', '.join(counts)} |"
        if self.model:
            yield f"| architecture | {_text(self.model)} |"
        if report is not None:
            how = "rounded to nearest" if report.calibration is None else "calibrated rounding"
            yield f"| conversion | {how}, preset {_code(report.preset)} |"
        if report is not None and report.chosen is not None:
            yield f"| layers chosen by | {_text(report.chosen.summary())} |"

    def _layers(self) -> Iterator[str]:
        yield from ("## What is not MXFP8", "")
        report = self.report
        kept = [layer for layer in self.inspection.layers if layer.decision != MXFP8]
        if not kept:
            yield "Every matrix of the model is MXFP8; the rest is as in the original."
            return
        reasons = {bare(x.name): x.reason.replace(repr(x.name), "it") for x in _layers(report)}
        if report is not None and report.chosen is not None:  # their shares are too many rows
            target = f"kept for the target {report.chosen.target}"
            reasons |= dict.fromkeys(map(bare, report.chosen.layers), target)
        rows = _grouped(
            (
                x.name,
                x.dtype if x.decision == KEPT else x.decision,
                reasons.get(bare(x.name), "not in the report" if report else ""),
            )
            for x in kept
        )
        columns = ("layers", "stored as", "why") if report else ("layers", "stored as")
        yield f"| {' | '.join(columns)} |"
        yield f"|{'---|' * len(columns)}"
        for name, dtype, reason in rows[:_MOST_ROWS]:
            cells = (_code(name), _text(dtype), *([_text(reason)] if report else []))
            yield f"| {' | '.join(cells)} |"
        if len(rows) > _MOST_ROWS:
            yield from ("", f"... and {len(rows) - _MOST_ROWS} more kinds of layers.")
        yield ""
        if report is None:
            yield from ("The file does not say why these were kept.", "")
        yield "Biases, norms, and everything else that is not a matrix are as in the original."

    def _error(self) -> Iterator[str]:
        report, comparison = self.report, self.comparison
        yield from ("## Measured error", "")
        if report is None and comparison is None:
            yield from ("None is stored in the file.", "")
            yield (
                "<!-- Give --report with the conversion's report, or save the model with its "
                "comparison, and write this page again. -->"
            )
            return
        if report is not None:
            yield from _weight_error(report)
        if comparison is not None:
            yield from _output_error(comparison)
        if note := note_on_seeds(report, comparison):
            yield f"- Note: {_text(note)}"

    def _requirements(self) -> Iterator[str]:
        yield from ("## Requirements", "")
        fact = next(fact for fact in self.inspection.explained if fact.name == "MXFP8")
        yield (
            f"ComfyUI {fact.comfyui} or later reads the file as it is. It multiplies in MXFP8 on "
            "NVIDIA RTX 50, B200 and B300; on other GPUs it unpacks the weights at every step. "
            f"[ComfyUI-MXFP8]({PACK}) has [kernels for other cards]"
            f"({PACK}/blob/main/docs/hardware.md). The weights take "
            f"{format_size(self.inspection.bytes)}."
        )

    def _comfyui(self) -> Iterator[str]:
        folder, node, ours = self._place()
        yield from ("## ComfyUI", "")
        yield (
            f"Put {_code(self.inspection.file)} into {_code(f'ComfyUI/models/{folder}')} and load "
            f"it with **{node}**, or, with ComfyUI-MXFP8 installed, with **{ours}**, which also "
            "checks it."
        )

    def _place(self) -> tuple[str, str, str]:
        """(folder of ComfyUI, its loader, ours) for this file."""
        whole = (*_VAES, *text_encoders.PREFIXES)
        if any(key.startswith(whole) for key in self.header.tensors):
            return "checkpoints", "Load Checkpoint", "Load Checkpoint (MXFP8)"
        if self.detected is not None and not self.detected[0].classes:
            return "text_encoders", "Load CLIP", "Load Text Encoder (MXFP8)"
        return "diffusion_models", "Load Diffusion Model", "Load Diffusion Model (MXFP8)"

    def _diffusers(self) -> Iterator[str]:
        kind = self._diffusers_class()
        if kind is None:
            return
        yield from ("## Diffusers", "")
        yield (
            "Diffusers alone would run the codes as if they were the weights. These lines load the "
            "file correctly:"
        )
        yield from ("", *_fenced("console", [_INSTALL]), "")
        pipeline = self.repository is not None
        _, prefix = self.detected
        file = [self.inspection.file, *([prefix] if prefix else [])]
        arguments = ", ".join(json.dumps(text, ensure_ascii=False) for text in file)
        lines = [
            "import torch",
            f"from diffusers import {'DiffusionPipeline, ' * pipeline}{kind}",
            "",
            "from mxfp8.integrations.diffusers import MXFP8Config, read",
            "",
            f"transformer = {kind}.from_single_file(",
            f"    read({arguments}),",
            f"    config={json.dumps(self.repository)}," if pipeline else _NO_CONFIG,
            '    subfolder="transformer",',
            "    quantization_config=MXFP8Config(),",
            "    torch_dtype=torch.bfloat16,",
            ")",
        ]
        if pipeline:
            lines += [
                "pipeline = DiffusionPipeline.from_pretrained(",
                f"    {json.dumps(self.repository)},",
                "    transformer=transformer,",
                "    torch_dtype=torch.bfloat16,",
                ")",
            ]
        yield from _fenced("python", lines)
        if kind == "WanTransformer3DModel":
            yield ""
            yield (
                "Wan 2.2 14B has two models, each in a file of its own. The one for low noise is "
                "the pipeline's `transformer_2`."
            )

    def _diffusers_class(self) -> str | None:
        """The class that loads this file with all its layers, or None."""
        if self.detected is None or self._place()[0] != "diffusion_models":
            return None
        architecture, prefix = self.detected
        keys = [key.removeprefix(prefix) for key in self.header.tensors]
        for name, kind, expression in _DIFFUSERS:
            if name == architecture.name and all(re.fullmatch(expression, key) for key in keys):
                return kind
        return None

    def _mlx(self) -> Iterator[str]:
        yield from ("## MLX", "")
        folder = f"{self.header.path.stem}-mlx"
        command = ["mxfp8", "export", self.inspection.file, "--mlx", folder]
        yield from ("This writes the same codes and scales as a folder for MLX:", "")
        yield from (*_fenced("console", [_line(command)]), "")
        loader = "mlx-vlm loads the folder as its transformer. " if self.model == "Z-Image" else ""
        yield f"{loader}It has been checked with MLX's CPU build, but not on a Mac."

    def _made(self) -> Iterator[str]:
        yield from ("## How it was made", "")
        report = self.report
        if report is None:
            yield f"With a tool that writes ComfyUI's MXFP8 format, such as [mxfp8]({PACK})."
            return
        in_workflow = report.target in ("MODEL", "CLIP")
        source = "ORIGINAL.safetensors" if in_workflow else report.source
        target = self.inspection.file
        if in_workflow:
            yield (
                f"With a Quantize node of [ComfyUI-MXFP8]({PACK}). This command makes the same "
                "decisions from the original's file:"
            )
        else:
            yield f"With [mxfp8]({PACK}):"
        verification = ["mxfp8", "verify", target, "--source", source]
        commands = [_conversion(report, source, target), _line(verification)]
        yield from ("", *_fenced("console", commands))
        if report.calibration is not None:
            about = report.calibrated_on
            yield from (
                "",
                f"The rounding was {_text(about)}; the report does not name the calibration files.",
            )

    def _warnings(self) -> Iterator[str]:
        for warning in self.inspection.warnings:
            yield f"<!-- TO CHECK: {_short(warning).replace('--', '- -')} -->"


def _layers(report: Report | None) -> tuple[LayerReport, ...]:
    return report.layers if report else ()


def _weight_error(report: Report) -> Iterator[str]:
    if report.sqnr_db is None:
        yield "- Weights: MXFP8 holds them exactly."
    else:
        layers = format_count(len(report.quantized), "MXFP8 layer")
        yield (
            f"- Weights: SQNR {report.sqnr_db:.2f} dB over {layers}, "
            "10 log10(sum x² / sum (x' - x)²)."
        )
    worst = report.worst
    if worst is not None:
        yield f"- Worst layer: {_code(worst.name)}, {worst.sqnr_db:.2f} dB."
    for line in report.output_errors():
        yield f"- {_text(line[0].upper() + line[1:])}."


def _output_error(comparison: Comparison) -> Iterator[str]:
    """What was measured on the same seeds, and how."""
    yield f"- Samples of the same seeds: {_text(comparison.verdict.text)}."
    means = (
        ("Latent SNR", "dB", comparison.latent_snr_db),
        ("Image PSNR", "dB", comparison.psnr_db),
        ("Image SSIM", "", comparison.ssim),
    )
    yield from (f"- {name}: {interval(mean, unit)}." for name, unit, mean in means if mean)
    setting = comparison.setting
    versions = ", ".join(f"{name} {v}" for name, v in setting.versions.items())
    yield (
        f"- Setting: {format_count(len(comparison.seeds), 'seed')}, {_text(str(setting))}; "
        f"{_text(comparison.title())}; on {_text(setting.device)} with {_text(versions)}."
    )
    if comparison.floor is not None:
        yield from (f"- {_text(x[0].upper() + x[1:])}." for x in comparison.floor.lines())


def _conversion(report: Report, source: str, target: str) -> str:
    """The command that makes the same decisions as a report's conversion."""
    words = ["mxfp8", "convert", source, target]
    outside = any(layer.reason.startswith(policy.OUTSIDE) for layer in report.layers)
    if report.preset in policy.presets() and not outside:  # else "auto" chose it
        words += ["--preset", report.preset]
    for option, expressions in (("--include", report.include), ("--exclude", report.exclude)):
        for expression in (expressions or "").splitlines():
            words += [option, expression]
    chosen = report.chosen
    if chosen is not None and report.calibration is not None:
        words += ["--target", chosen.target]
    elif chosen is not None:
        for expression in chosen.exclude:
            words += ["--exclude", expression]
    if report.calibration is not None:
        words += ["--calibration", "CALIBRATION.safetensors"]
        if "held_out" in report.calibration:
            words += ["--held-out", "HELD_OUT.safetensors"]
    return _line(words)


def _line(words: Iterable[str]) -> str:
    """A command for a POSIX shell, on one line."""
    return shlex.join(word if word.isprintable() else quoted(word) for word in words)


# ---- Markdown --------------------------------------------------------------------------------


def _grouped(layers: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """(names, dtype, reason) of layers that differ in the number of their block alone.

    Their name is given as "layers.(22-29).adaLN_modulation.0".
    """
    groups: dict[tuple[str, str, str, str], list[int]] = {}
    for name, dtype, reason in layers:
        match = re.match(r"(.*?\.|)(\d{1,6})(\..*|)$", name)
        start, number, end = match.groups() if match else (name, "", "")
        key = (start, end, dtype, reason) if match else (name, "", dtype, reason)
        groups.setdefault(key, []).extend([int(number)] if match else [])
    rows = []
    for (start, end, dtype, reason), numbers in groups.items():
        ranges = _ranges(sorted(numbers))
        middle = f"({ranges})" if len(numbers) > 1 else ranges
        rows.append((f"{start}{middle}{end}", dtype, reason))
    return rows


def _ranges(numbers: list[int]) -> str:
    """Sorted numbers in words: "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _fenced(language: str, lines: Iterable[str]) -> list[str]:
    return [f"```{language}", *(one_line(line).replace("```", "'''") for line in lines), "```"]


def _code(text: str) -> str:
    """A text as code, also in a table."""
    return f"`{_short(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _text(text: str) -> str:
    """A text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", _short(text))


def _short(text: str) -> str:
    """A text on one line, without its end if that is far."""
    return one_line(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")


def _yaml(text: str) -> str:
    """A text as a YAML string: as it is where that is safe, else as JSON, which YAML includes."""
    safe = re.fullmatch(r"[A-Za-z][\w./-]*", text, re.ASCII) and text.lower() not in _YAML_WORDS
    return text if safe else json.dumps(_short(text), ensure_ascii=False)
