"""From a file to a model built by stock ComfyUI, checked first and with its markers complete.

Each of stock's loaders reads only some of the forms that a file can have. Markers in the header are
lost on checkpoints and text encoders whose tensors have a prefix that the header leaves out, and
the layers then run raw codes. Scales as F8_E8M0, which stock's own save nodes write, cannot be read
under dynamic VRAM, the default on NVIDIA. So a file with MXFP8 layers is read here and given to
stock with a marker tensor for every layer, under the name that its tensors have, and with tiled
scales. Stock loads all other files by itself.

What deep clones are made from (`cached_patcher_init`) is registered as stock's loaders do it: the
first argument is the path, or the paths. A load passes on the header that `check_file` read; a
clone, whose file was checked, reads it again.
"""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.memory_management
import comfy.model_management
import comfy.sd
import comfy.utils
import safetensors.torch
import torch
from comfy.quant_ops import QUANT_ALGOS
from comfy.sd import llama_detect

from ...kernels import layout
from ...quant import format
from ...quant.checks import scan
from ...quant.format import MARKER, Header
from ...quant.sources.file import FileSource
from ..host.float8 import check_float8
from ..host.paths import is_safetensors
from .raw_codes import check_layers

logger = logging.getLogger(__name__)

_DIFFUSION_MODEL = "model.diffusion_model."  # prefix of its tensors in a checkpoint


def formats() -> tuple[str, ...]:
    """Formats that a marker may name: MXFP8, and those that this ComfyUI knows."""
    return format.MXFP8, *(name for name in QUANT_ALGOS if name != format.MXFP8)


def check_file(path: Path, order: str = format.AUTO) -> tuple[Header | None, list[str]]:
    """Refuse a damaged or inconsistent MXFP8 file before it is loaded; warnings are logged.

    Args:
        order: as for `quant.checks.scan.check_source`.

    Returns:
        The file's header, None if it is no safetensors file, and warnings.

    Raises:
        FormatError: from `quant.checks.scan.check_source`.
        RuntimeError: this ComfyUI's comfy-kitchen does not know MXFP8.
    """
    if not is_safetensors(path):
        return None, []
    with FileSource(path) as source:
        warnings = scan.check_source(source, formats(), order)
    for warning in warnings:
        logger.warning("MXFP8: %s", warning)
    if format.MXFP8 not in QUANT_ALGOS and source.header.layers:
        raise RuntimeError(
            f"{path.name} is MXFP8, which the comfy-kitchen of this ComfyUI is too old for; "
            "install the packages in ComfyUI's requirements.txt"
        )
    return source.header, warnings


def _mxfp8_header(path: str, header: Header | None) -> Header | None:
    """The header of a file with MXFP8 layers, read unless given; None for any other file."""
    if header is None and is_safetensors(Path(path)):
        header = format.read_header(path)
    return header if header and (header.layers or header.experts) else None


def read_state(header: Header, scales: str = format.AUTO) -> tuple[dict[str, torch.Tensor], dict]:
    """(state dict, metadata) of a file, for stock's functions that take a state dict.

    Args:
        scales: "row-major" if the scales of MXFP8 layers must be brought into tiled order.
    """
    path = str(header.path)
    if _needs_library(header):
        state, metadata = safetensors.torch.load_file(path), dict(header.metadata)
    else:
        state, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    for name, conf in header.markers.items():
        marker = bytearray(format.marker_bytes(conf))
        state[name + MARKER] = torch.frombuffer(marker, dtype=torch.uint8)
    if scales == "row-major":
        for layer in header.layers.values():
            rows, blocks = layer.weight.shape[0], layer.weight.shape[1] // layout.BLOCK
            scale = state[layer.scale.name].view(torch.uint8)
            tiled = layout.tile(scale[:rows, :blocks])
            scan.check_scales(header.path.name, layer, 0, tiled)
            state[layer.scale.name] = tiled
    metadata = {k: v for k, v in (metadata or {}).items() if k != format.QUANTIZATION_METADATA}
    return state, metadata


def _needs_library(header: Header) -> bool:
    """Whether stock's reader for dynamic VRAM, which reads tensors lazily, would fail.

    It does not know E8M0. The safetensors library does, and reads the whole file at once.
    """
    return comfy.memory_management.aimdo_enabled and any(
        tensor.dtype == "F8_E8M0" for tensor in header.tensors.values()
    )


def load_diffusion_model(
    path: str,
    scales: str = format.AUTO,
    disable_dynamic: bool = False,
    header: Header | None = None,
):
    """A ModelPatcher for the diffusion model in a file.

    Args:
        scales: as for `read_state`.
        header: the file's, if it was read already.

    Raises:
        FormatError: what the file marks as MXFP8 is not a linear layer of the model.
        ValueError: the device that it would compute on has no float8.
        RuntimeError: stock does not recognize the model.
    """
    header = _mxfp8_header(path, header)
    if header is None:
        return comfy.sd.load_diffusion_model(path, disable_dynamic=disable_dynamic)
    check_float8(comfy.model_management.get_torch_device(), header.path.name)
    state, metadata = read_state(header, scales)
    patcher = comfy.sd.load_diffusion_model_state_dict(
        state, metadata=metadata, disable_dynamic=disable_dynamic
    )
    if patcher is None:
        raise _unknown(path)
    check_layers(header, patcher.model)
    patcher.cached_patcher_init = (load_diffusion_model, (path, scales))
    return patcher


def load_checkpoint(
    path: str,
    embeddings: list[str],
    disable_dynamic: bool = False,
    header: Header | None = None,
    **parts: bool,
):
    """(ModelPatcher, CLIP, VAE) of a checkpoint, each None where it has none.

    Args:
        embeddings: folders of textual inversions.
        header: the file's, if it was read already.
        parts: stock's output_model, output_clip and output_vae.

    Raises:
        as `load_diffusion_model`.
    """
    options = {"embedding_directory": embeddings, "disable_dynamic": disable_dynamic, **parts}
    header = _mxfp8_header(path, header)
    if header is None:
        return comfy.sd.load_checkpoint_guess_config(path, **options)[:3]
    if any(name.startswith(_DIFFUSION_MODEL) for name in (*header.layers, *header.experts)):
        check_float8(comfy.model_management.get_torch_device(), header.path.name)
    state, metadata = read_state(header)
    loaded = comfy.sd.load_state_dict_guess_config(state, metadata=metadata, **options)
    if loaded is None:
        raise _unknown(path)
    model, clip, vae, _ = loaded
    for part in (
        getattr(model, "model", None),
        getattr(clip, "cond_stage_model", None),
        getattr(vae, "first_stage_model", None),
    ):
        if isinstance(part, torch.nn.Module):
            check_layers(header, part)
    for part, kind in ((model, "model"), (clip, "clip"), (vae, "vae")):
        patcher = part if kind == "model" else getattr(part, "patcher", None)
        if patcher is not None:
            patcher.cached_patcher_init = (_checkpoint_part, (path, embeddings, kind))
    return model, clip, vae


def _checkpoint_part(path: str, embeddings: list[str], kind: str, disable_dynamic: bool = False):
    """The patcher of one part of a checkpoint, newly loaded."""
    kinds = ("model", "clip", "vae")
    wanted = {f"output_{k}": k == kind for k in kinds}
    parts = load_checkpoint(path, embeddings, disable_dynamic, **wanted)
    part = parts[kinds.index(kind)]
    return part if kind == "model" else part.patcher


def load_text_encoder(
    paths: list[str],
    embeddings: list[str],
    kind: comfy.sd.CLIPType,
    options: dict,
    disable_dynamic: bool = False,
    headers: list[Header | None] | None = None,
):
    """A CLIP from one to four files, as stock's `load_clip`.

    Args:
        headers: the files', if they were read already.

    Raises:
        FormatError, ValueError: as `load_diffusion_model`.
    """
    settings = {
        "embedding_directory": embeddings,
        "clip_type": kind,
        "model_options": options,
        "disable_dynamic": disable_dynamic,
    }
    headers = list(map(_mxfp8_header, paths, headers or [None] * len(paths)))
    if not any(headers):
        return comfy.sd.load_clip(paths, **settings)
    device = options.get("load_device", comfy.model_management.text_encoder_device())
    for header in filter(None, headers):
        check_float8(device, header.path.name)
    states = [
        _stock_state(path) if header is None else read_state(header)[0]
        for path, header in zip(paths, headers, strict=True)
    ]
    # Stock asks the first language model only whether it is quantized (ACE-Step 1.5 has two).
    states.sort(key=lambda state: "llama_quantization_metadata" not in llama_detect([state]))
    clip = comfy.sd.load_text_encoder_state_dicts(states, **settings)
    for header in filter(None, headers):
        check_layers(header, clip.cond_stage_model)
    clip.patcher.cached_patcher_init = (_text_encoder, (paths, embeddings, kind, options))
    return clip


def _stock_state(path: str) -> dict[str, torch.Tensor]:
    """The state dict of a file without MXFP8 layers, as stock's `load_clip` reads it."""
    state, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    return comfy.utils.convert_old_quants(state, model_prefix="", metadata=metadata)[0]


def _text_encoder(*arguments, **options):
    return load_text_encoder(*arguments, **options).patcher


def _unknown(path: str) -> RuntimeError:
    return RuntimeError(
        f"{Path(path).name}: ComfyUI does not recognize this model; it is damaged, not of the kind "
        "that this loader is for, or needs a newer ComfyUI"
    )
