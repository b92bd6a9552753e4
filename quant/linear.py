"""An MXFP8 linear layer for any torch module, and loading a converted file into a module.

    model = BertModel(config)
    load_quantized(model, "model-mxfp8.safetensors")     # or: quantize_linears(model)

The state dict of such a module is the stock file format, key for key: `weight` in float8_e4m3fn,
`weight_scale`, `comfy_quant`, `bias`. So what `safetensors.torch.save_file(model.state_dict())`
writes loads in ComfyUI, and what the converter writes loads here.

The codes are the buffer `qdata`, held as uint8, because `module.half()` converts every
floating-point buffer. The attribute `weight` is the dequantized weight (`lazy_weight`), because
some modules read it instead of calling the layer: T5 its dtype, TransformerEncoderLayer in eval
mode its values. Rejected: a tensor subclass that computes with codes, which has to implement every
operator that torch has or will have; a module implements one.

Only layers whose type is nn.Linear are replaced. A subclass does more (LoRA) or is never called
(`out_proj` of MultiheadAttention); weight_norm and pruning compute the weight from other tensors; a
tied weight stays in memory for the other module. A layer is replaced by changing its class, as
torch's parametrizations do, so all its names, its hooks and whoever holds it still refer to it.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from safetensors.torch import load_file
from torch import nn

from .. import kernels
from ..kernels import layout
from . import format
from .checks import scan
from .container.header import parse_object, quoted
from .lazy_weight import LazyWeight
from .sources.file import TORCH_DTYPES, FileSource

logger = logging.getLogger(__name__)

_MARKER = format.MARKER.removeprefix(".")
_FLOATS = {TORCH_DTYPES[name]: name for name in format.FLOATS}
_SCALES = [TORCH_DTYPES[name] for name in format.SCALES]


class MXFP8Linear(nn.Module):
    """y = x @ W.T + bias with W [N, K] stored as MXFP8, N = out_features, K = in_features.

    Args:
        precision: "auto", "exact" or "fast", as for `kernels.linear`; "exact" if the marker asks
            for full precision.
        dtype: of the weight before it was quantized, for the marker, and of the bias.
    """

    read_only = "the weight of an MXFP8Linear cannot be written; change an nn.Linear, then quantize"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        precision: str = "auto",
        device=None,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        _check_dtype(f"a layer of shape {list(self.shape)}", dtype)
        zeros = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        self.register_parameter("bias", zeros if bias else None)
        self._add_codes(precision, device, dtype)

    def _add_codes(self, precision: str, device, dtype: torch.dtype) -> None:
        """Give it what an nn.Linear does not have; the codes are zeros."""
        self.precision = precision
        self.marker = format.marker(self.shape, _FLOATS[dtype])
        stored, scales = layout.padded_shape(*self.shape), layout.scale_shape(*self.shape)
        self.register_buffer("qdata", torch.zeros(stored, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.zeros(scales, dtype=torch.uint8, device=device))
        # Empty. `module.to(dtype)` converts it, as it would convert the weight: the dtype to show.
        like = torch.empty(0, dtype=dtype, device=device)
        self.register_buffer("like", like, persistent=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, precision: str = "auto") -> MXFP8Linear:
        """A new layer from an nn.Linear, rounded to nearest.

        Raises:
            ValueError: MXFP8 cannot store its weight.
        """
        weight, bias = linear.weight.detach(), linear.bias
        _check_weight("weight", weight)
        result = cls(
            linear.in_features,
            linear.out_features,
            bias is not None,
            precision=precision,
            device=weight.device,
            dtype=weight.dtype,
        )
        result._quantize(weight)
        if bias is not None:
            result.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return result

    def _quantize(self, weight: torch.Tensor) -> None:
        qdata, self.weight_scale = kernels.quantize(weight)
        self.qdata = qdata.view(torch.uint8)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.out_features, self.in_features

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight [N, K], for reading."""
        if torch.compiler.is_compiling():  # a graph drops what nothing reads
            return self.dequantize(self.like.dtype)
        return LazyWeight(self)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, K] in a floating-point dtype."""
        rounded = dtype if dtype in _FLOATS else torch.float32
        return kernels.dequantize(self.qdata, self.weight_scale, rounded, self.shape).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_nested:  # the kernels take one matrix
            return nn.functional.linear(x, self.dequantize(x.dtype), self.bias)
        exact = self.marker.get("full_precision_matrix_mult", False)
        return kernels.linear(
            x,
            self.qdata,
            self.weight_scale,
            self.bias,
            shape=self.shape,
            precision="exact" if exact else self.precision,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, precision={self.precision}"
        )

    def __setattr__(self, name, value):
        if name == "weight":
            raise AttributeError(self.read_only)
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        qdata = destination.pop(f"{prefix}qdata")
        destination[f"{prefix}weight"] = qdata.view(torch.float8_e4m3fn)
        encoded = bytearray(format.marker_bytes(self.marker))
        destination[prefix + _MARKER] = torch.frombuffer(encoded, dtype=torch.uint8)

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        state = dict(state)
        names = ("weight", "weight_scale", _MARKER)
        given = {name: state.pop(prefix + name) for name in names if prefix + name in state}
        try:
            marker = self._checked_marker({**given, "bias": state.get(f"{prefix}bias")})
        except ValueError as error:
            errors.append(f"MXFP8 layer {prefix.removesuffix('.')!r}: {error}")
            return
        self.marker = marker
        if "weight" in given:
            state[f"{prefix}qdata"] = self._padded(given["weight"].view(torch.uint8))
            state[f"{prefix}weight_scale"] = given["weight_scale"].view(torch.uint8)
        keys: list[str] = []
        super()._load_from_state_dict(state, prefix, metadata, strict, keys, unexpected, errors)
        missing += [f"{prefix}weight" if key == f"{prefix}qdata" else key for key in keys]

    def _padded(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes with all rows of padding, which a file may leave out."""
        absent = len(self.qdata) - len(codes)
        return nn.functional.pad(codes, (0, 0, 0, absent)) if absent else codes

    def _checked_marker(self, given: Mapping[str, torch.Tensor | None]) -> dict:
        """The marker that comes with tensors of a state dict; without one, the marker it has.

        Raises:
            ValueError: they do not belong to an MXFP8 layer of this shape.
        """
        weight, scale, bias = (given.get(name) for name in ("weight", "weight_scale", "bias"))
        if weight is not None and weight.dtype != torch.float8_e4m3fn:
            raise ValueError(
                f"weight is {weight.dtype} {list(weight.shape)}, not float8_e4m3fn "
                f"{list(self.qdata.shape)}; load plain weights first, then quantize the module"
            )
        if scale is not None and scale.dtype not in _SCALES:
            raise ValueError(f"weight_scale is {scale.dtype}; it must be uint8 or float8_e8m0fnu")
        if (weight is None) != (scale is None):
            raise ValueError("it takes weight and weight_scale together, and one is missing")
        if weight is not None:
            layout.true_shape(weight.shape, self.shape)
            layout.check_scale(weight.shape, scale.shape)
        if None not in (bias, self.bias) and bias.shape != self.bias.shape:
            raise ValueError(f"bias has shape {list(bias.shape)}; it must be [{len(self.bias)}]")
        marker = given.get(_MARKER)
        if marker is None:
            return self.marker
        conf = read_marker(_MARKER, marker)
        shape = list(self.shape)
        format.layer_shape(_MARKER, self.qdata, {"orig_shape": shape, **conf})
        if conf.get("orig_shape", shape) != shape:
            raise ValueError(f"{_MARKER} has orig_shape {conf['orig_shape']}, not {shape}")
        return conf


def read_marker(where: str, tensor: torch.Tensor) -> dict:
    """The JSON in a marker's tensor.

    Raises:
        FormatError: it is not a marker, or one of another format.
    """
    if tensor.dtype != torch.uint8 or tensor.ndim != 1:
        raise format.FormatError(f"{where} is {tensor.dtype} {list(tensor.shape)}, not 1-D uint8")
    conf = parse_object(where, bytes(tensor.tolist()))
    if conf.get("format") != format.MXFP8:
        raise format.FormatError(
            f"{where} has the format {quoted(conf.get('format'))}, not {format.MXFP8!r}; convert "
            "the model's original with `mxfp8 convert`"
        )
    return conf


def quantize_linears(
    module: nn.Module,
    select: Callable[[str, nn.Linear], bool] = lambda name, linear: True,
    precision: str = "auto",
) -> list[str]:
    """Make the nn.Linear layers of a module MXFP8Linear, in place.

    Args:
        select: (name, layer) -> whether to quantize it. Subclasses of nn.Linear, tied weights and
            weights that are computed from other tensors are never quantized.

    Returns:
        The names of these layers; of a layer that has several names, the first.

    Raises:
        ValueError: MXFP8 cannot store a weight; nothing was changed.
    """
    tied = tied_weights(module)
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if is_replaceable(layer, tied) and select(name, layer)
    }
    for name, layer in layers.items():
        _check_weight(repr(name), layer.weight.detach())
    for layer in layers.values():  # one at a time: memory holds one layer twice
        weight = layer.weight.detach()
        replace(layer, precision, weight.device, weight.dtype)
        layer._quantize(weight)
    return list(layers)


def tied_weights(module: nn.Module) -> set[int]:
    """The ids of the parameters that several modules hold."""
    holders = Counter(id(p) for m in module.modules() for p in m.parameters(recurse=False))
    return {key for key, count in holders.items() if count > 1}


def is_replaceable(layer: nn.Module, tied: set[int]) -> bool:
    """Whether an MXFP8Linear does all that this layer does."""
    plain = type(layer) is nn.Linear and layer._parameters.keys() == {"weight", "bias"}
    return plain and id(layer.weight) not in tied


def replace(
    linear: nn.Linear, precision: str, device, dtype: torch.dtype, kind: type | None = None
) -> None:
    """Turn an nn.Linear into an MXFP8Linear, or a `kind` of it, of zeros with the same bias."""
    del linear.weight
    linear.__class__ = kind or MXFP8Linear
    linear._add_codes(precision, device, dtype)


def _check_weight(name: str, weight: torch.Tensor) -> None:
    """Raise ValueError unless MXFP8 can store a weight."""
    where = f"{name} {list(weight.shape)}"
    _check_dtype(where, weight.dtype)
    if weight.is_meta:
        raise ValueError(f"{where} is on the meta device; load its values first")
    if weight.numel() == 0:
        return
    largest = float(torch.stack(weight.aminmax()).abs().max())  # aminmax makes no copy
    if not math.isfinite(largest):
        raise ValueError(f"{where} holds NaN or Inf; MXFP8 cannot store it")
    # E4M3 has four significant bits: it rounds 31/32 of a power of two up to that power.
    limit = math.ldexp(31 / 32, math.frexp(torch.finfo(weight.dtype).max)[1])
    if largest >= limit:
        raise ValueError(
            f"{where} holds {largest:.4g}, which MXFP8 rounds to more than {weight.dtype} can "
            f"hold; its values must be below {limit:.4g}"
        )


def _check_dtype(where: str, dtype: torch.dtype) -> None:
    if dtype not in _FLOATS:
        raise ValueError(
            f"{where} is {dtype}; MXFP8 takes float32, float16 or bfloat16. Convert it, or leave "
            "it out"
        )


def load_quantized(module: nn.Module, path, *, prefix: str = "", precision: str = "auto"):
    """Load an MXFP8 file into a module: layers that the file marks become MXFP8Linear.

    A marked layer that `quantize_linears` would not quantize gets the dequantized values instead.
    A module on the meta device gets the file's tensors, with the dtypes they have there.

    Args:
        prefix: of the file's keys, before the module's ("model.diffusion_model.", say).

    Returns:
        The missing and the unexpected keys, as `load_state_dict` does.

    Raises:
        FormatError: the file is damaged or lost its markers (`scan.check_source`), has quantized
            layers of another kind, or none under the prefix, or does not fit the module. Nothing
            was changed.
    """
    with FileSource(path) as source:
        for warning in scan.check_source(source, formats=(format.MXFP8,)):
            logger.warning("MXFP8: %s", warning)
    header = source.header
    file = header.path.name
    if header.experts:
        raise format.FormatError(f"{file}: {next(iter(header.experts))!r} is a bank of experts")
    marked = {
        name.removeprefix(prefix): layer
        for name, layer in header.layers.items()
        if name.startswith(prefix)
    }
    if not marked:
        under = f" under {prefix!r}" if prefix else ""
        raise format.FormatError(
            f"{file}: none of its layers{under} is MXFP8; use load_state_dict, or convert it"
        )
    modules = dict(module.named_modules(remove_duplicate=False))
    tied = tied_weights(module)
    linears = {name: _linear_for(file, layer, modules.get(name)) for name, layer in marked.items()}
    replaced = {name for name, linear in linears.items() if is_replaceable(linear, tied)}
    for name in sorted(replaced):
        _check_dtype(f"{name!r} of the module", linears[name].weight.dtype)
    state = {k.removeprefix(prefix): v for k, v in load_file(path).items() if k.startswith(prefix)}
    plain = module.state_dict()
    for key in sorted(state.keys() & plain.keys() - {f"{name}.weight" for name in marked}):
        if state[key].shape != plain[key].shape:
            raise format.FormatError(
                f"{file}: {prefix + key!r} has shape {list(state[key].shape)}; the module's has "
                f"{list(plain[key].shape)}"
            )

    dtypes = {str(dtype): dtype for dtype in _FLOATS}
    for name, layer in marked.items():
        linear, key = linears[name], f"{name}.weight"
        dtype = dtypes.get(str(layer.conf.get("orig_dtype")), torch.bfloat16)
        state.pop(f"{name}.{_MARKER}", None)  # `conf` holds the header's part of it, too
        if name not in replaced:
            scale = state.pop(f"{name}.weight_scale")
            state[key] = kernels.dequantize(state[key], scale, dtype, linear.weight.shape)
            continue
        if type(linear) is nn.Linear:  # not under its second name
            like = torch.empty(0, dtype=dtype) if linear.weight.is_meta else linear.weight
            replace(linear, precision, like.device, like.dtype)
        linear.marker = dict(layer.conf)
    on_meta = any(tensor.is_meta for tensor in plain.values())
    return module.load_state_dict(state, strict=False, assign=on_meta)


def _linear_for(file: str, layer: format.Layer, there: nn.Module | None) -> nn.Linear:
    """The module's layer that can hold a file's MXFP8 layer; FormatError if it cannot."""
    what = f"{file}: {layer.name!r} is an MXFP8 linear of shape {list(layer.shape)}; the module"
    if not isinstance(there, nn.Linear) or not layer.holds(there.weight.shape):
        raise format.FormatError(f"{what} has {'nothing' if there is None else repr(there)} there")
    if "weight" not in there._parameters:
        raise format.FormatError(
            f"{what} computes the weight there from other tensors (weight_norm, pruning or another "
            "parametrization); remove that, then load"
        )
    return there
