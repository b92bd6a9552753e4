"""Whether ComfyUI uses the codes of MXFP8 layers as weights, in a model that stock built.

Stock builds some parts of models without quantized layers, and renames, splits or reshapes some
tensors without their markers. It then loads the codes as plain weights, without an error. Where the
file is known, its layers are found in the model by the codes of one row. Layers that the model
lacks, such as those of parts that were not asked for, do no harm unless they are what a layer of it
should have been. Where the file is not known, or the model is to be quantized or saved, the rule
that made the codes tells them from weights (see `quant.checks.scan`).

Rejected: finding layers by name, which stock changes in many ways, and asking whether a module can
be quantized, which misses markers that were lost.
"""

from __future__ import annotations

import os

import torch
from comfy.quant_ops import QuantizedTensor

from ...kernels.layout import BLOCK
from ...quant import format
from ...quant.checks import scan
from ...quant.container.header import quoted
from ...quant.format import Header
from ...quant.sources.file import as_bytes
from ..runtime.prepared import stored_weight

_SAMPLE = 256  # codes of a row by which a layer is known
_ROWS_SAMPLE = 1 << 12  # values by which codes are told from weights


def check_layers(header: Header, model: torch.nn.Module, remedy: str = "") -> None:
    """Check that no layer of an MXFP8 file became a plain weight of a model, and that the model
    has a weight in each layer that one of the file's fits.

    Args:
        remedy: what may help, for the message.

    Raises:
        FormatError: a plain weight holds a layer's codes, a layer has another shape in the model
            than its marker says, or the model lacks it and has one of its shape without a weight.
    """
    layers = _by_sample(header)
    rows = {row for row, _ in layers}  # mostly the first alone
    plain: dict[str, str] = {}  # layer -> where its codes are
    lacking = dict(header.layers)
    for name, module in model.named_modules() if layers else ():
        for parameter in module.parameters(recurse=False):
            same = [
                layer for row in rows for layer in layers.get((row, _sample(parameter, row)), [])
            ]
            if isinstance(parameter, QuantizedTensor):
                _check_shape(header, same, module)
                for layer in same:
                    lacking.pop(layer.name, None)
            else:
                plain |= {layer.name: f"{name!r}, a {type(module).__name__}" for layer in same}
    if not plain:
        _check_weightless(header, list(lacking.values()), model)
        return
    first = next(iter(plain))
    more = f" and {len(plain) - 1} more" if len(plain) > 1 else ""
    prefix = os.path.commonprefix(list(plain))  # noqa: RUF071 (of names, not paths)
    advice = "use the original of this file, which is not quantized"
    if not all(layer.startswith(prefix) for layer in header.layers):
        advice = f"convert the original again, excluding {quoted(f'^{prefix}')}"
    raise format.FormatError(
        f"{header.path.name}: MXFP8 layer {quoted(first)}{more} would be used as raw codes by this "
        f"{type(model).__name__} ({plain[first]}): ComfyUI does not run this part quantized; "
        f"{remedy}{advice}"
    )


def _check_shape(header: Header, layers: list[format.Layer], module: torch.nn.Module) -> None:
    """Check the shape of an MXFP8 linear that is one of these layers of a file; they are equal."""
    shape = [getattr(module, "out_features", 0), getattr(module, "in_features", 0)]
    if layers and module.weight.ndim == 2 and not any(layer.holds(shape) for layer in layers):
        layer = layers[0]
        raise format.FormatError(
            f"{header.path.name}: MXFP8 layer {quoted(layer.name)} is {list(layer.shape)}, but "
            f"{shape} in the model that ComfyUI takes this file for; convert the original again, "
            f"excluding {quoted(f'^{layer.name}')}"
        )


def _check_weightless(header: Header, lacking: list[format.Layer], model: torch.nn.Module) -> None:
    """Check that none of these layers, which a model lacks, fits a linear of it without a weight.

    Stock only logs that a weight is missing, and such a linear fails when it runs. Not every one
    does, so those that no layer fits are left to stock.
    """
    for name, module in model.named_modules() if lacking else ():
        if not hasattr(module, "in_features") or getattr(module, "weight", None) is not None:
            continue
        shape = [module.out_features, module.in_features]
        for layer in lacking:
            if layer.holds(shape):
                raise format.FormatError(
                    f"{header.path.name}: MXFP8 layer {quoted(layer.name)} {shape} is not in this "
                    f"{type(model).__name__}, whose layer {quoted(name)} of that shape gets no "
                    f"weight from the file; {format.AGAIN}"
                )


def _by_sample(header: Header) -> dict[tuple[int, bytes], list[format.Layer]]:
    """The MXFP8 layers and banks of experts of a file by the number of a row and its sample.

    It is the first row whose sample is not zero: zeros are zeros without their scales too. Layers
    may be equal.
    """
    found: dict[tuple[int, bytes], list[format.Layer]] = {}
    with header.path.open("rb", buffering=0) as file:
        for layer in (*header.layers.values(), *header.experts.values()):
            size = layer.weight.nbytes // layer.weight.shape[0]
            for row in range(layer.weight.shape[0]):
                file.seek(layer.weight.begin + row * size)
                sample = file.read(min(size, _SAMPLE))
                if any(sample):
                    codes = torch.frombuffer(bytearray(sample), dtype=torch.float8_e4m3fn)
                    found.setdefault((row, _rounded(codes)), []).append(layer)
                    break
    return found


def _sample(parameter: torch.Tensor, row: int) -> bytes:
    """A row's sample of a parameter whose values are codes; of any other, bytes that fit none."""
    quantized = isinstance(parameter, QuantizedTensor)
    value = stored_weight(parameter)._qdata if quantized else parameter.detach()
    if not _is_matrix(value) or row >= len(value):
        return b""
    return _rounded(value[row].reshape(-1)[:_SAMPLE].cpu())


def _rounded(codes: torch.Tensor) -> bytes:
    """Codes in E5M2, the coarsest dtype that ComfyUI casts weights to (--fp8_e5m2-text-enc)."""
    return bytes(as_bytes(codes.float().to(torch.float8_e5m2)))


def _is_matrix(value: torch.Tensor) -> bool:
    return value.is_floating_point() and value.ndim > 1 and value.numel() > 0 and not value.is_meta


def check_weights(model: torch.nn.Module) -> None:
    """Check that no plain weight of a model looks like MXFP8 codes.

    Only those in ComfyUI's and torch's own modules: those of others may know how to read them.

    Raises:
        ValueError: one does.
    """
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] not in ("comfy", "torch"):
            continue
        for parameter in module.parameters(recurse=False):
            if not isinstance(parameter, QuantizedTensor) and _holds_codes(parameter.detach()):
                raise ValueError(
                    f"{quoted(name)} {list(parameter.shape)} of this {type(model).__name__} holds "
                    "MXFP8 codes, which ComfyUI uses as weights; load its file with a loader of "
                    "this pack, which tells what is wrong"
                )


def _holds_codes(value: torch.Tensor) -> bool:
    """Whether a sample of the first rows are MXFP8 codes, by `scan.is_marked`."""
    if not _is_matrix(value) or value[0].numel() % BLOCK:
        return False
    rows = -(-_ROWS_SAMPLE // value[0].numel())
    sample = value[:rows].reshape(-1)[:_ROWS_SAMPLE].cpu()
    code = sample.to(torch.float8_e4m3fn)
    return torch.equal(code.float(), sample.float()) and scan.is_marked(code.view(torch.uint8))
