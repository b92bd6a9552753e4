"""From a file to a model, built by stock ComfyUI: checked first, its markers made whole.

Stock reads each of the forms a file can have in some of its loaders only. Markers in the header are
lost on checkpoints and text encoders whose tensors have a prefix that the header leaves out, and
the layers then run raw codes; scales as F8_E8M0, which its own save nodes write, cannot be read
under dynamic VRAM, the default on NVIDIA. So a file that has MXFP8 layers is read here and handed
to stock with a marker tensor for every layer, under the name that its tensors have, and scales that
are tiled. All other files take stock's own way entirely.

What deep clones are made from (`cached_patcher_init`) is registered as stock's loaders do it: the
first argument is the path, or the paths.
"""

from __future__ import annotations

from pathlib import Path

import comfy.memory_management
import comfy.sd
import comfy.utils
import safetensors.torch
import torch
from comfy.quant_ops import QUANT_ALGOS

from ...kernels import layout
from ...quant import format
from ...quant.checks import scan
from ...quant.container.header import quoted
from ...quant.format import MARKER, Header
from ..host.paths import is_safetensors


def formats() -> tuple[str, ...]:
    """What a marker may name: MXFP8, and whatever this ComfyUI knows."""
    return format.MXFP8, *(name for name in QUANT_ALGOS if name != format.MXFP8)


def check_file(path: Path, order: str = format.AUTO) -> list[str]:
    """Refuse a damaged or inconsistent MXFP8 file before it is loaded; returns warnings.

    Formats are those that this ComfyUI knows; `order` as for `quant.scan.check_file`.

    Raises:
        FormatError: from `quant.scan.check_file`.
        RuntimeError: this ComfyUI's comfy-kitchen does not know MXFP8.
    """
    if not is_safetensors(path):
        return []
    warnings = scan.check_file(path, formats(), order)
    if format.MXFP8 not in QUANT_ALGOS and format.read_header(path).layers:
        raise RuntimeError(
            f"{path.name} is MXFP8, which the comfy-kitchen of this ComfyUI is too old for; "
            "install what ComfyUI's requirements.txt asks for"
        )
    return warnings


def read_header(path: str) -> Header | None:
    """The header of a file with MXFP8 layers; None for any other, which is stock's to load."""
    if not is_safetensors(Path(path)):
        return None
    header = format.read_header(path)
    return header if header.layers or header.experts else None


def read_state(header: Header, scales: str = format.AUTO) -> tuple[dict[str, torch.Tensor], dict]:
    """(state dict, metadata) of a file, for stock's functions that take a state dict.

    Args:
        scales: "row-major" brings the scales of MXFP8 layers into tiled order; otherwise they are
            taken as they are.
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
            scan.refuse_nan_scales(header.path.name, layer, 0, tiled)
            state[layer.scale.name] = tiled
    kept = {k: v for k, v in (metadata or {}).items() if k != format.QUANTIZATION_METADATA}
    return state, kept


def _needs_library(header: Header) -> bool:
    """Whether stock's reader for dynamic VRAM, which gives tensors that are read late, would fail.

    It knows no E8M0. The safetensors library does, and reads the file at once.
    """
    return comfy.memory_management.aimdo_enabled and any(
        tensor.dtype == "F8_E8M0" for tensor in header.tensors.values()
    )


def load_diffusion_model(path: str, scales: str = format.AUTO, disable_dynamic: bool = False):
    """A ModelPatcher for the diffusion model in a file; `scales` as for `read_state`.

    Raises:
        FormatError: what the file marks as MXFP8 is no linear layer of the model.
        RuntimeError: stock does not recognize the model.
    """
    header = read_header(path)
    if header is None:
        return comfy.sd.load_diffusion_model(path, disable_dynamic=disable_dynamic)
    state, metadata = read_state(header, scales)
    patcher = comfy.sd.load_diffusion_model_state_dict(
        state, metadata=metadata, disable_dynamic=disable_dynamic
    )
    if patcher is None:
        raise _unknown(path)
    check_modules(header, patcher.model)
    patcher.cached_patcher_init = (load_diffusion_model, (path, scales))
    return patcher


def load_checkpoint(path: str, embeddings: list[str], disable_dynamic: bool = False, **parts: bool):
    """(ModelPatcher, CLIP, VAE) of a checkpoint, each None where it has none.

    Args:
        embeddings: folders of textual inversions.
        parts: stock's output_model, output_clip and output_vae.

    Raises:
        as `load_diffusion_model`.
    """
    options = {"embedding_directory": embeddings, "disable_dynamic": disable_dynamic, **parts}
    header = read_header(path)
    if header is None:
        return comfy.sd.load_checkpoint_guess_config(path, **options)[:3]
    state, metadata = read_state(header)
    found = comfy.sd.load_state_dict_guess_config(state, metadata=metadata, **options)
    if found is None:
        raise _unknown(path)
    model, clip, vae, _ = found
    built = [model and model.model, clip and clip.cond_stage_model]
    check_modules(header, *filter(None, built))
    for part, kind in ((model, "model"), (clip, "clip"), (vae, "vae")):
        patcher = part if kind == "model" else getattr(part, "patcher", None)
        if patcher is not None:
            patcher.cached_patcher_init = (_checkpoint_part, (path, embeddings, kind))
    return model, clip, vae


def _checkpoint_part(path: str, embeddings: list[str], kind: str, disable_dynamic: bool = False):
    """The patcher of one part of a checkpoint, loaded afresh."""
    kinds = ("model", "clip", "vae")
    wanted = {f"output_{k}": k == kind for k in kinds}
    loaded = load_checkpoint(path, embeddings, disable_dynamic, **wanted)
    part = loaded[kinds.index(kind)]
    return part if kind == "model" else part.patcher


def load_text_encoder(
    paths: list[str], embeddings: list[str], kind, options: dict, disable_dynamic: bool = False
):
    """A CLIP from one to four files, as stock's `load_clip`; kind is a comfy.sd.CLIPType.

    Raises:
        FormatError: as `load_diffusion_model`.
    """
    settings = {
        "embedding_directory": embeddings,
        "clip_type": kind,
        "model_options": options,
        "disable_dynamic": disable_dynamic,
    }
    headers = [read_header(path) for path in paths]
    if not any(headers):
        return comfy.sd.load_clip(paths, **settings)
    states = [
        _stock_state(path) if header is None else read_state(header)[0]
        for path, header in zip(paths, headers, strict=True)
    ]
    clip = comfy.sd.load_text_encoder_state_dicts(states, **settings)
    for header in filter(None, headers):
        check_modules(header, clip.cond_stage_model)
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
        f"{Path(path).name}: ComfyUI does not recognize this model; it is damaged, of another kind "
        "than this loader is for, or needs a newer ComfyUI"
    )


# Those of diffusion models, and of text encoders in checkpoints.
_PREFIXES = (
    "text_encoders.",
    "cond_stage_model.",
    "conditioner.embedders.0.",
    "conditioner.embedders.1.",
    *format.PREFIXES,
)


def check_modules(header: Header, *models: torch.nn.Module) -> None:
    """Check that what a file marks as MXFP8 became MXFP8 linears of these models.

    A model uses codes as they are where it has no quantized layer: in an embedding, a convolution
    or a bare parameter. Its file does not show which those are; the model that came of it does.

    Raises:
        FormatError: it did not.
    """
    by_leaf: dict[str, list] = {}
    for model in models:
        for name, module in model.named_modules():
            if getattr(module, "weight", None) is not None:
                by_leaf.setdefault(name.rpartition(".")[2], []).append((name, module))
    for layer in header.layers.values():
        prefix = next(p for p in _PREFIXES if layer.name.startswith(p))
        bare = layer.name.removeprefix(prefix)
        found = [
            module
            for name, module in by_leaf.get(bare.rpartition(".")[2], [])
            if f".{name}".endswith(f".{bare}")
        ]
        if found and not any(getattr(m, "quant_format", None) == format.MXFP8 for m in found):
            raise format.FormatError(
                f"{header.path.name}: {quoted(layer.name)} {list(layer.shape)} is MXFP8 in this "
                f"file, but a {type(found[0]).__name__} in the model, which would take raw codes "
                "for weights; convert the original again with this pack"
            )
