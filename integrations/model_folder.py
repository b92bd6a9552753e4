"""Convert a model's folder to an MXFP8 folder that diffusers and transformers load.

    mxfp8 convert Z-Image-Turbo Z-Image-Turbo-MXFP8 --format diffusers

Tensors keep their names. Which of them become MXFP8 is decided for the model under ComfyUI's names,
where these are known, so a folder and a file of one model have the same layers in MXFP8; of other
models, the linear layers of the blocks become MXFP8, less what every preset keeps. Of a pipeline,
the transformer is converted and everything else is copied, so the result loads by itself and can be
published. Weights beside a pipeline's folders are left out: they are the same model again, for
other programs.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..quant import format
from ..quant.container.folder import FolderWriter, ModelFile
from ..quant.container.header import SUFFIXES, FormatError, nbytes, quoted, read_json
from ..quant.conversion import policy
from ..quant.conversion.calibration import Calibration, check_model, fingerprint
from ..quant.conversion.convert import check_conversion, convert, plan_source
from ..quant.conversion.policy import Decision, Plan, Selection
from ..quant.conversion.stored import layer_markers, stored_tensors
from ..quant.format import MARKER, SCALE, WEIGHT, bare
from ..quant.progress import Progress
from ..quant.reports.conversion import Report
from ..quant.sources import diffusers
from ..quant.sources.file import Part, PartSource, StoredSource
from ..quant.sources.open import MODEL_FOLDERS, PICKLES, open_stored
from .config import MXFP8Config

CONFIG = "config.json"
PIPELINE = "model_index.json"
_MAX_CONFIG = 1 << 20  # bytes
_MAX_FILE = 10_000_000_000  # bytes of tensors in one file, as diffusers writes them
_WEIGHTS = (*SUFFIXES, *PICKLES, ".msgpack", ".h5", ".onnx", ".gguf")
_IN_BLOCKS = re.compile(r"(^|\.)\w*(blocks?|layers?)\.\d+\.")


@dataclass(frozen=True)
class ModelFolder:
    """A folder to convert.

    Attributes:
        folder: as given: a pipeline's, or a model's.
        model: the model's; the same, or the one folder in it to convert.
        config: its config.json.
    """

    folder: Path
    model: Path
    config: Mapping

    @property
    def stem(self) -> str:
        """The name of the model's files, which the library looks for."""
        return "diffusion_pytorch_model" if "_class_name" in self.config else "model"

    def open(self) -> StoredSource:
        """The model's tensors, as `open_stored` gives them; named as the folder is."""
        source = open_stored(self.model)
        source.name = self.folder.resolve().name
        return source


def open_folder(path) -> ModelFolder:
    """Find the model to convert in a folder.

    Raises:
        FormatError: it is no folder of a model or a pipeline, has several models to convert, or is
            quantized already.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FormatError(
            f"{folder.name}: --format diffusers converts a folder with {CONFIG} or {PIPELINE}, "
            "since a single file has no configuration; leave --format out to get a file for ComfyUI"
        )
    model = folder
    if (folder / PIPELINE).is_file():
        inner = [p for p in sorted(folder.iterdir()) if MODEL_FOLDERS.match(p.name) and p.is_dir()]
        if len(inner) != 1:
            found = ", ".join(quoted(p.name) for p in inner) or "none"
            raise FormatError(
                f"{folder.resolve().name}: a pipeline is converted if it has one transformer or "
                f"UNet; this one has: {found}. Give the folder of one model"
            )
        model = inner[0]
    config = _read_config(model / CONFIG)
    if "quantization_config" in config:
        raise FormatError(
            f"{model.resolve().name}: quantized already, as {CONFIG} says; convert its original"
        )
    return ModelFolder(folder, model, config)


def _read_config(path: Path) -> dict:
    if not path.is_file():
        raise FormatError(
            f"{path.resolve().parent.name}: there is no {path.name} in this folder; give the "
            "folder of a diffusers or transformers model, or of a pipeline"
        )
    return read_json(path, _MAX_CONFIG)


def convert_folder(
    path,
    target,
    selection: Selection = policy.DEFAULT,
    *,
    progress: Progress | None = None,
    device: str | None = None,
    calibration: Calibration | None = None,
    held_out: Calibration | None = None,
    max_file: int = _MAX_FILE,
) -> Report:
    """Convert a folder to a new folder, which appears whole or not at all.

    Args:
        path: a model's folder, with config.json; or a pipeline's, with model_index.json.
        target: must not exist, or be an empty folder.
        selection, progress, device, calibration, held_out: as of `convert.convert_file`; a
            calibration may have been made in ComfyUI or with the library's own model.
        max_file: bytes of tensors in one file.

    Raises:
        FormatError: it is no such folder, damaged, or already quantized.
        ValueError: a weight holds NaN or Inf, no layer would be quantized, or a calibration is
            another model's.
        OSError: reading or writing failed. In every case there is no target then.
    """
    folder = open_folder(path)
    with folder.open() as source:
        plan = plan_folder(source, selection)
        calibration, held_out = (with_own_names(one, source) for one in (calibration, held_out))
        return convert_planned(
            folder, source, target, plan, progress=progress, device=device,
            calibration=calibration, held_out=held_out, max_file=max_file,
        )  # fmt: skip


def convert_planned(
    folder: ModelFolder,
    source: StoredSource,
    target,
    plan: Plan,
    *,
    max_file: int = _MAX_FILE,
    **options,
) -> Report:
    """Carry out a plan for a folder. Options as of `convert.convert`; errors as above."""
    writer = functools.partial(folder_writer, folder, source, target, plan, max_file)
    return convert(source, target, plan, writer=writer, **options)


def check_folder(folder: ModelFolder, source: StoredSource, target, plan: Plan, device) -> None:
    """Raise what `convert_folder` would before it writes a byte; calibrations apart."""
    writer = functools.partial(folder_writer, folder, source, target, plan, _MAX_FILE)
    check_conversion(source, target, plan, False, device, writer)


def plan_folder(source: StoredSource, selection: Selection = policy.DEFAULT) -> Plan:
    """A plan for tensors with diffusers' or transformers' names, which they keep."""
    parts = _comfy_parts(source)
    if parts is None:
        plan = plan_source(source, selection, for_comfyui=False)
        if plan.architecture is None and selection.preset == policy.AUTO:
            plan = replace(plan, decisions=tuple(map(_kept_outside, plan.decisions)))
        return plan
    plan = plan_source(PartSource(source, parts), selection, for_comfyui=False)
    decided = {p.key: decision for decision in plan.decisions for p in parts[decision.key]}
    decisions = []
    for key, (dtype, shape) in source.tensors.items():
        decisions.append(replace(decided[key], key=key, dtype=dtype, shape=tuple(shape)))
    return replace(plan, decisions=tuple(decisions))


def with_own_names(calibration: Calibration | None, source: StoredSource) -> Calibration | None:
    """A calibration with the names of a folder's layers, where it has ComfyUI's.

    A layer of ComfyUI's model may be several here, such as q, k and v. These get the same inputs,
    so each has the statistics of the whole.

    Raises:
        ValueError: it is another model's, or ComfyUI's names of this model's layers are not known.
    """
    if calibration is None:
        return None
    own = {bare(key) for key in source.tensors}
    other = next((name for name in calibration.layers if bare(name) + WEIGHT not in own), None)
    if other is None:
        return calibration
    parts = _comfy_parts(source)
    if parts is None:
        raise ValueError(
            f"{source.name}: the calibration has a layer {quoted(other)}, which this model lacks. "
            "If that is its name in ComfyUI, convert the model's file for ComfyUI, or calibrate "
            "the library's model (docs/library.md); else the calibration is another model's"
        )
    check_model(calibration, PartSource(source, parts))
    layers, rows = {}, {}
    for key, joined in parts.items():
        moments = key.endswith(WEIGHT) and calibration.of(key.removesuffix(WEIGHT))
        for part in joined if moments else ():
            name = bare(part.key.removesuffix(WEIGHT))
            layers[name] = moments
            rows[name] = source.tensors[part.key][1], source.rows(part.key, 0, 1)[0]
    model = fingerprint((name, *row) for name, row in rows.items())
    return replace(calibration, layers=layers, model=model, sensitivity=None)


def _comfy_parts(source: StoredSource) -> dict[str, tuple[Part, ...]] | None:
    """ComfyUI's tensors -> the parts they are made of; None if they have the same names there, or
    ComfyUI cannot read these."""
    try:
        renamed = diffusers.comfy_names(source.name, source.tensors)
    except FormatError:
        return None
    return None if renamed is None else renamed[1]


def _kept_outside(decision: Decision) -> Decision:
    included = decision.reason.startswith(policy.INCLUDED)
    if not decision.quantize or included or _IN_BLOCKS.search(decision.key):
        return decision
    reason = f"{policy.OUTSIDE}: embedders and final layers stay"
    return replace(decision, quantize=False, reason=reason)


def folder_writer(
    folder: ModelFolder, source: StoredSource, target, plan: Plan, max_file: int, tick
) -> FolderWriter:
    """What writes the converted folder."""
    inside = "" if folder.model == folder.folder else f"{folder.model.name}/"
    shards = _shards(plan, max_file)
    names = [f"{folder.stem}.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        names = [f"{folder.stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    markers = layer_markers(plan)
    models = []
    for name, tensors in zip(names, shards, strict=True):
        layers = [t[0].removesuffix(MARKER) for t in tensors if t[0].endswith(MARKER)]
        metadata = {**source.metadata, "format": "pt"}
        metadata = format.with_markers(metadata, {layer: markers[layer] for layer in layers})
        models.append(ModelFile(inside + name, tuple(tensors), metadata))
    texts = {inside + CONFIG: _config(folder, plan)}
    writer = FolderWriter(target, models, texts, dict(_copies(folder)), tick)
    if len(shards) > 1:
        homes = {t[0]: name for name, part in zip(names, shards, strict=True) for t in part}
        size = sum(tensor.nbytes for tensor in writer.tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": homes}
        texts[f"{inside}{folder.stem}.safetensors.index.json"] = json.dumps(index, indent=2)
    return writer


def _shards(plan: Plan, max_file: int) -> list[list[tuple]]:
    """The tensors of each file; those of a layer are in one."""
    groups: dict[str, list[tuple]] = {}
    for tensor in stored_tensors(plan):
        layer = tensor[0]
        for suffix in (WEIGHT, SCALE, MARKER):
            layer = layer.removesuffix(suffix)
        groups.setdefault(layer, []).append(tensor)
    shards, size = [[]], 0
    for group in groups.values():
        more = sum(nbytes(dtype, shape) for _, dtype, shape in group)
        if shards[-1] and size + more > max_file:
            shards.append([])
            size = 0
        shards[-1] += group
        size += more
    return shards


def _config(folder: ModelFolder, plan: Plan) -> str:
    """The model's config.json with the entry by which both libraries know what to do."""
    quantized = {decision.layer for decision in plan.quantized}
    kept = [
        decision.layer
        for decision in plan.decisions
        if decision.key.endswith(WEIGHT)
        and len(decision.shape) == 2
        and decision.layer not in quantized
    ]
    entry = MXFP8Config(modules_to_not_convert=kept).to_dict()
    return json.dumps({**folder.config, "quantization_config": entry}, indent=2) + "\n"


def _copies(folder: ModelFolder) -> Iterator[tuple[str, Path]]:
    """(name in the new folder, file) of everything that is not the converted model's weights."""
    for path in _files(folder.folder):
        name = path.relative_to(folder.folder)
        beside_model = path.parent == folder.model
        at_top = path.parent == folder.folder
        is_weight = path.suffix.lower() in _WEIGHTS or ".index." in path.name
        if (beside_model or at_top) and is_weight:
            continue
        if beside_model and path.name == CONFIG:
            continue
        yield name.as_posix(), path


def _files(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """The files of a folder and those below, by links too; hidden ones are left out.

    Args:
        above: the folders that it is in, into which no link is followed.
    """
    above |= {folder.resolve()}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and path.resolve() not in above:
            yield from _files(path, above)
        elif path.is_file():
            yield path
