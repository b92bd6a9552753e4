"""MXFP8 layers of a model that diffusers or transformers builds and fills.

Both build a model without values, let a quantizer replace layers, and then set one tensor after the
other by its name in the file. So a layer here takes the file's tensors by name and becomes usable
when it has them all, in whatever order, from whatever file of several.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping

import torch
from safetensors.torch import load_file
from torch import nn

from ..kernels import layout
from ..quant import format
from ..quant.checks import scan
from ..quant.container.header import FormatError, quoted
from ..quant.format import MARKER, SCALE, WEIGHT, Header
from ..quant.lazy_weight import LazyWeight
from ..quant.linear import MXFP8Linear, is_replaceable, read_marker, replace, tied_weights
from ..quant.sources.file import HEADER_DTYPES, TORCH_DTYPES, FileSource
from .config import MXFP8Config
from .stacked_rows import MXFP8Rows

logger = logging.getLogger(__name__)

LEAVES = tuple(suffix.removeprefix(".") for suffix in (WEIGHT, SCALE, MARKER))
_WEIGHT, _SCALE, _MARKER = LEAVES
_DTYPES = {name: TORCH_DTYPES[dtype] for dtype, name in format.FLOATS.items()}
_NONE = "none of its layers is MXFP8; load it as a plain file, or convert it with `mxfp8 convert`"
_NO_OFFLOAD = (
    "cannot offload MXFP8 layers one by one (sequential offload, or a device_map with 'cpu' or "
    "'disk'); to save GPU memory, use enable_model_cpu_offload() of the pipeline, or group "
    "offloading: enable_group_offload(), or diffusers.hooks.apply_group_offloading(encoder, ...)"
)
EMPTY_FOLDER = (
    "no MXFP8 layer in this folder; convert the original with `mxfp8 convert FOLDER NEW --format "
    "diffusers`, or load this one without MXFP8Config; if its config.json has a "
    "quantization_config, remove that"
)
_CHECK = "check that the model's files are complete and belong to this class and config"
_receiving = threading.Lock()  # diffusers may read the files of a folder in several threads


class LoadedLinear(MXFP8Linear, nn.Linear):
    """An MXFP8Linear that is filled by name. PEFT adapts it, because it is an nn.Linear."""

    read_only = (
        "the weight of an MXFP8 layer cannot be written. A LoRA runs beside it and need not be "
        "fused: call unfuse_lora(), because fuse_lora() may have changed other layers already. To "
        "change the weight, call the model's dequantize() first"
    )
    _is_hf_initialized = True  # for transformers, as below

    def _add_codes(self, precision: str, device, dtype: torch.dtype) -> None:
        super()._add_codes(precision, device, dtype)
        for name in ("qdata", "weight_scale"):  # group offloading by a stream puts no buffer back
            self._set_codes(name, self._buffers.pop(name))
        self.like = torch.empty(0, dtype=dtype)  # never without values: it has none
        self.name = ""
        self.received: dict[str, torch.Tensor] = {}

    @property
    def weight(self) -> torch.Tensor:
        weight = super().weight
        if isinstance(weight, LazyWeight):
            weight._is_param = self.qdata.is_meta  # diffusers counts the elements of parameters
            weight._is_hf_initialized = True  # transformers writes random values to others
        return weight

    @property
    def comfy_quant(self) -> nn.Parameter:
        """The marker as the file has it."""
        encoded = bytearray(format.marker_bytes(self.marker))
        return nn.Parameter(torch.frombuffer(encoded, dtype=torch.uint8), requires_grad=False)

    def __setattr__(self, name, value):
        if name in LEAVES and self.qdata.is_meta:
            self.add_tensor(name, value)
            return
        if name == "_hf_hook" and getattr(value, "offload", False):
            raise ValueError(f"accelerate {_NO_OFFLOAD}")
        super().__setattr__(name, value)

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor of the file: "weight", "weight_scale" or "comfy_quant"."""
        if tensor.dtype in _DTYPES.values():
            # Some versions convert even codes, if they keep the layer in float32; that is exact.
            codes = tensor.to(torch.float8_e4m3fn if name == _WEIGHT else torch.uint8)
            tensor = codes if torch.equal(codes.to(tensor.dtype), tensor) else tensor
        with _receiving:
            self.received[name] = tensor.detach()
            is_last = self.received.keys() == set(LEAVES)
        if is_last:
            self.fill_from_file()

    def fill_from_file(self) -> None:
        """Use what was received.

        Raises:
            ValueError: the tensors are not those of an MXFP8 layer of this shape, or not all.
        """
        given, self.received = self.received, {}
        try:
            marker = self._checked_marker(given)
            if _WEIGHT not in given:
                raise ValueError("the files have no weight for it")
            codes, scales = (given[name].view(torch.uint8) for name in (_WEIGHT, _SCALE))
            if (scales == layout.E8M0_NAN).any():
                raise ValueError("a scale is byte 255 (NaN), so it is damaged")
        except ValueError as error:
            raise ValueError(f"MXFP8 layer {self.name!r}: {error}; {_CHECK}") from error
        self._fill(self._padded(codes), scales, marker)

    def fill_from_rows(self, rows: MXFP8Rows, device) -> None:
        """Use a matrix that a loader may have made of the file's."""
        codes, scales = rows.stored()
        name = HEADER_DTYPES[_DTYPES.get(rows.marker.get("orig_dtype"), torch.bfloat16)]
        marker = {**rows.marker, **format.marker(self.shape, name)}
        self.like = torch.empty(0, dtype=rows.dtype)
        self._fill(codes.to(device), scales.to(device), marker)

    def _fill(self, codes: torch.Tensor, scales: torch.Tensor, marker: Mapping) -> None:
        self._set_codes("qdata", codes)
        self._set_codes("weight_scale", scales)
        self.marker = dict(marker)

    def _set_codes(self, name: str, codes: torch.Tensor) -> None:
        parameter = nn.Parameter(codes, requires_grad=False)
        parameter._is_hf_initialized = True
        self.register_parameter(name, parameter)


def replace_linears(
    model: nn.Module, names: Iterable[str], precision: str, dtype: torch.dtype
) -> set[str]:
    """Make linear layers of a model without values MXFP8; returns those that are.

    The others are not plain linear layers, or share their weight.
    """
    tied, done = tied_weights(model), set()
    modules = dict(model.named_modules())
    for name in names:
        layer = modules.get(name)
        if layer is not None and is_replaceable(layer, tied):
            replace(layer, precision, torch.device("meta"), dtype, LoadedLinear)
            layer.name = name
            done.add(name)
    return done


def read_layers(
    where: str, state: Mapping[str, torch.Tensor], markers: Mapping[str, Mapping] | None = None
) -> dict[str, torch.Tensor]:
    """A file's tensors, each MXFP8 layer as one (`MXFP8Rows`).

    Args:
        where: what to call the file in errors.
        markers: of its layers, from its header and its tensors; default: those in its tensors.

    Raises:
        FormatError: it has no MXFP8 layer, or one whose tensors do not fit together.
    """
    if any(isinstance(tensor, MXFP8Rows) for tensor in state.values()):
        return dict(state)
    if markers is None:
        markers = {
            key.removesuffix(MARKER): read_marker(f"{where}: {quoted(key)}", tensor)
            for key, tensor in state.items()
            if key.endswith(MARKER)
        }
    result = {key: tensor for key, tensor in state.items() if not key.endswith(MARKER)}
    for name, marker in markers.items():
        result[name + WEIGHT] = _rows(f"{where}: MXFP8 layer {quoted(name)}", name, result, marker)
        del result[name + SCALE]
    _check_unmarked(where, result)
    if not markers:
        raise FormatError(f"{where}: {_NONE}")
    return result


def read(path, prefix: str = "") -> dict[str, torch.Tensor]:
    """An MXFP8 file as a state dict, each of its MXFP8 layers checked and as one tensor.

    Diffusers before 0.42 needs this: `from_single_file(read(path), ...)`. With any version it also
    reads markers that only the file's header has.

    Args:
        prefix: of the tensors to take, which they lose ("model.diffusion_model.", say).

    Raises:
        FormatError: the file is damaged, lost its markers, or has no MXFP8 layer.
        OSError: it cannot be read.
    """
    header = checked_header(path)
    state = read_layers(header.path.name, load_file(path), header.markers)
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def checked_header(path) -> Header:
    """The header of an MXFP8 file that can run outside of ComfyUI; errors as for `read`."""
    with FileSource(path) as source:
        header = source.header
        header.check_layers((format.MXFP8,))
        scan.check_unmarked(source)
    if bank := next(iter(header.experts), None):
        raise FormatError(
            f"{source.name}: {quoted(bank)} is a bank of experts, which only ComfyUI runs"
        )
    if not header.layers:
        raise FormatError(f"{source.name}: {_NONE}")
    return header


def _rows(where: str, name: str, state: Mapping[str, torch.Tensor], marker: Mapping) -> MXFP8Rows:
    weight, scale = state.get(name + WEIGHT), state.get(name + SCALE)
    for suffix, tensor, dtypes in (
        (WEIGHT, weight, ("F8_E4M3",)),
        (SCALE, scale, format.SCALES),
    ):
        if tensor is None:
            raise FormatError(f"{where}: there is no tensor {quoted(name + suffix)}")
        if tensor.dtype not in [TORCH_DTYPES[dtype] for dtype in dtypes] or tensor.ndim != 2:
            raise FormatError(
                f"{where}: {quoted(name + suffix)} is {tensor.dtype} {list(tensor.shape)}; it must "
                f"be 2-D {' or '.join(dtypes)}; {format.AGAIN}"
            )
    shape = format.layer_shape(where, weight, marker)
    try:
        layout.check_scale(weight.shape, scale.shape)
    except ValueError as error:
        raise FormatError(f"{where}: {error}; {format.AGAIN}") from error
    dtype = _DTYPES.get(marker.get("orig_dtype"), torch.bfloat16)
    rows = MXFP8Rows.from_stored(weight, scale, shape, dtype, marker)
    if (rows.scales == layout.E8M0_NAN).any():
        raise FormatError(f"{where}: a scale is byte 255 (NaN): it is damaged; {format.AGAIN}")
    return rows


def _check_unmarked(where: str, state: Mapping[str, torch.Tensor]) -> None:
    """Raise FormatError for codes with block scales but without a marker."""
    for key, tensor in state.items():
        scale = state.get(key.removesuffix(WEIGHT) + SCALE) if key.endswith(WEIGHT) else None
        if tensor.dtype != torch.float8_e4m3fn or scale is None or scale.dtype != torch.uint8:
            continue
        raise FormatError(
            f"{where}: {quoted(key)} {list(tensor.shape)} has MXFP8 scales, but no marker among "
            "the tensors. If the file's header has the markers, give diffusers what `read(path)` "
            f"returns instead of the path; if they are lost, {format.REPAIR} rebuilds them"
        )


def check_filled(
    model: nn.Module,
    is_empty: Callable[[str, nn.Parameter], bool] = lambda name, parameter: parameter.is_meta,
) -> list[str]:
    """Check that a model got all its values; returns the names of its MXFP8 layers.

    Args:
        is_empty: (name, parameter) -> whether it got none, where the library left no other sign.

    Raises:
        ValueError: a layer or a parameter did not.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoadedLinear)}
    for layer in layers.values():
        if layer.qdata.is_meta:
            layer.fill_from_file()
    empty = [name for name, parameter in model.named_parameters() if is_empty(name, parameter)]
    if empty:
        raise ValueError(
            f"{type(model).__name__}: the files lack {len(empty)} of its tensors, of which the "
            f"first is {empty[0]!r}; {_CHECK}"
        )
    return list(layers)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError for a dtype in which a model cannot be loaded."""
    if dtype not in _DTYPES.values():
        raise ValueError(
            f"dtype={dtype} with MXFP8Config: it is the dtype of the inputs and of the layers that "
            "are not MXFP8; give torch.bfloat16, torch.float16 or torch.float32"
        )


def check_offload(device_map) -> None:
    """Raise ValueError for a map that has accelerate load layers one by one for each call."""
    places = set(map(str, device_map.values())) if isinstance(device_map, dict) else set()
    if places & {"cpu", "disk"} and len(places) > 1:
        raise ValueError(
            f"device_map places layers on {', '.join(sorted(places))}, and accelerate {_NO_OFFLOAD}"
        )


def set_precision(model: nn.Module, precision: str) -> None:
    """Choose how the MXFP8 layers of a loaded model run: "auto", "exact" or "fast".

    Raises:
        ValueError: it is none of these.
    """
    MXFP8Config(precision)
    for layer in model.modules():
        if isinstance(layer, LoadedLinear):
            layer.precision = precision


def restore(model: nn.Module) -> None:
    """Make a model's MXFP8 layers nn.Linear again, with the dequantized weights."""
    for layer in model.modules():
        if isinstance(layer, LoadedLinear):
            weight = layer.dequantize(layer.like.dtype)
            del layer.qdata, layer.weight_scale, layer.like
            del layer.received, layer.precision, layer.marker, layer.name
            layer.__class__ = nn.Linear
            layer.weight = nn.Parameter(weight, requires_grad=False)
