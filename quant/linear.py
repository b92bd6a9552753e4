"""An MXFP8 linear layer for any torch module, and loading a converted file into a module.

    model = BertModel(config)
    load_quantized(model, "model-mxfp8.safetensors")     # or: quantize_linears(model)

The state dict of such a module is the stock file format, key for key: `weight` in float8_e4m3fn,
`weight_scale`, `comfy_quant`, `bias`. So what `safetensors.torch.save_file(model.state_dict())`
writes loads in ComfyUI, and what the converter writes loads here.

Codes are held as uint8, because `module.half()` converts every floating-point buffer and would turn
float8 codes into half precision. Rejected: a tensor subclass as the weight, which has to implement
every operator that torch has or will have; a module implements one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch import nn

from .. import kernels
from ..kernels import layout
from . import format
from .checks import scan
from .sources.file import HEADER_DTYPES, FileSource

logger = logging.getLogger(__name__)

_MARKER = format.MARKER.removeprefix(".")


class MXFP8Linear(nn.Module):
    """y = x @ W.T + bias with W [N, K] stored as MXFP8, N = out_features, K = in_features.

    Args:
        precision: "auto", "exact" or "fast", as for `kernels.linear`; "exact" if the marker asks
            for full precision.
        dtype: of the weight before it was quantized, for the marker, and of the bias.
    """

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
        self.precision = precision
        self.marker = format.marker((out_features, in_features), HEADER_DTYPES[dtype])
        stored = layout.padded_shape(out_features, in_features)
        scales = layout.scale_shape(out_features, in_features)
        self.register_buffer("weight", torch.zeros(stored, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.zeros(scales, dtype=torch.uint8, device=device))
        zeros = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        self.register_parameter("bias", zeros if bias else None)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, precision: str = "auto") -> MXFP8Linear:
        """Quantize an nn.Linear, rounding to nearest.

        Raises:
            ValueError: its weight holds NaN or Inf.
        """
        weight, bias = linear.weight, linear.bias
        result = cls._like(linear, precision)
        qdata, scale = kernels.quantize(weight)
        if (scale == layout.E8M0_NAN).any():
            raise ValueError(f"weight {list(weight.shape)} holds NaN or Inf; MXFP8 cannot store it")
        result.weight, result.weight_scale = qdata.view(torch.uint8), scale
        if bias is not None:
            result.bias = nn.Parameter(bias.clone(), requires_grad=bias.requires_grad)
        return result

    @classmethod
    def _like(cls, linear: nn.Linear, precision: str) -> MXFP8Linear:
        """A layer of zeros that can take the place of an nn.Linear."""
        return cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            precision=precision,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exact = self.marker.get("full_precision_matrix_mult", False)
        return kernels.linear(
            x,
            self.weight,
            self.weight_scale,
            self.bias,
            shape=(self.out_features, self.in_features),
            precision="exact" if exact else self.precision,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, precision={self.precision}"
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].view(torch.float8_e4m3fn)
        encoded = bytearray(format.marker_bytes(self.marker))
        destination[prefix + _MARKER] = torch.frombuffer(encoded, dtype=torch.uint8)

    def _load_from_state_dict(self, state, prefix, *args):
        state = dict(state)
        for name in ("weight", "weight_scale"):
            if prefix + name in state:
                state[prefix + name] = state[prefix + name].view(torch.uint8)
        encoded = state.pop(prefix + _MARKER, None)
        if encoded is not None:
            self.marker = json.loads(bytes(encoded.tolist()))
        super()._load_from_state_dict(state, prefix, *args)


def quantize_linears(
    module: nn.Module,
    select: Callable[[str, nn.Linear], bool] = lambda name, linear: True,
    precision: str = "auto",
) -> list[str]:
    """Replace the nn.Linear layers inside a module by MXFP8 ones, in place.

    Args:
        select: (name, layer) -> whether to quantize it.

    Returns:
        The names of the layers replaced.

    Raises:
        ValueError: a weight holds NaN or Inf; nothing was replaced.
    """
    linears = [
        (name, layer)
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear and name and select(name, layer)
    ]
    for name, layer in linears:
        if not layer.weight.isfinite().all():
            shape = list(layer.weight.shape)
            raise ValueError(f"{name!r} {shape} holds NaN or Inf; MXFP8 cannot store it")
    for name, layer in linears:  # one at a time: memory holds one layer twice
        module.set_submodule(name, MXFP8Linear.from_linear(layer, precision))
    return [name for name, _ in linears]


def load_quantized(module: nn.Module, path, *, prefix: str = "", precision: str = "auto"):
    """Load an MXFP8 file into a module: layers that the file marks become MXFP8Linear.

    Args:
        prefix: of the file's keys, before the module's ("model.diffusion_model.", say).

    Returns:
        The missing and the unexpected keys, as `load_state_dict` does.

    Raises:
        FormatError: the file is damaged or lost its markers (`scan.check_file`), has no MXFP8
            layer, or marks a layer that is not an nn.Linear of its shape.
    """
    with FileSource(path) as source:
        for warning in scan.check_source(source):
            logger.warning("MXFP8: %s", warning)
    header = source.header
    if not header.layers:
        raise format.FormatError(
            f"{header.path.name}: none of its layers is MXFP8; use load_state_dict, or convert it"
        )
    modules = dict(module.named_modules())
    layers = {}
    for layer in header.layers.values():
        if not layer.name.startswith(prefix):
            continue
        name = layer.name.removeprefix(prefix)
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear) or not layer.holds(linear.weight.shape):
            there = "nothing" if linear is None else repr(linear)
            raise format.FormatError(
                f"{header.path.name}: {layer.name!r} is an MXFP8 linear of shape "
                f"{list(layer.shape)}; the module has {there} there"
            )
        layers[name] = MXFP8Linear._like(linear, precision)
        layers[name].marker = dict(layer.conf)
    state = load_file(path)
    for name, layer in layers.items():
        module.set_submodule(name, layer)
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return module.load_state_dict(state, strict=False)
