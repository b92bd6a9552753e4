"""One Z-Image block and one Flux double block, end to end, with every method of `methods`.

The linears, their shapes and the operations around them are those of the models; weights are
random. Z-Image keeps its modulation in BF16, as its conversion preset does. Times are those of
eager mode, which ComfyUI runs; the error is against float32 with the original weights, so it
includes the error of quantizing the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from gpu.clock import reason
from gpu.methods import Method, Weight, relative, the_chosen
from gpu.rows import Bench, row
from gpu.shapes import numbers, weight
from torch.nn.functional import linear

from mxfp8 import kernels

_HEAD = 128
Layers = dict[str, tuple[Weight, torch.Tensor | None]]


class Linears:
    """The linears of a block by name, run by one method."""

    def __init__(self, block: Block, layers: Layers, method: Method, one_row: Method):
        """
        Args:
            one_row: runs the layers of one row if the method is one of ours.
        """
        self.method = method
        self.layers = {}
        for name, (kept, bias) in layers.items():
            used = one_row if method.path is not None and name in block.vectors else method
            if name in block.kept:
                self.layers[name] = linear, kept.plain, bias
            else:
                self.layers[name] = used.run, kept.form(used), bias

    def __call__(self, name: str, x: torch.Tensor, *quantized) -> torch.Tensor:
        run, stored, bias = self.layers[name]
        return run(x, stored, bias, *quantized)

    def pair(self, first: str, second: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Two linears with the same input, which ours quantize once."""
        path = self.method.path
        shared = () if path is None else (kernels.quantize_input(path, x),)
        return self(first, x, *shared), self(second, x, *shared)


@dataclass(frozen=True)
class Block:
    """A transformer block.

    Attributes:
        shapes: (N, K) of its linears by name.
        kept: linears that stay in BF16.
        vectors: linears whose input has one row: modulations.
    """

    name: str
    width: int
    shapes: dict[str, tuple[int, int]]
    biased: bool
    kept: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()

    def layers(self, device, dtype=torch.bfloat16) -> Layers:
        """Random weights and biases."""
        layers = {}
        for seed, (name, (N, K)) in enumerate(self.shapes.items()):
            bias = numbers(device, N, seed=seed, scale=0.02).to(dtype) if self.biased else None
            layers[name] = Weight(weight(device, N, K, seed).to(dtype)), bias
        return layers

    def inputs(self, device, tokens: int, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def forward(self, linear: Linears, inputs: dict) -> torch.Tensor:
        raise NotImplementedError


class ZImage(Block):
    """Attention and a SwiGLU feed-forward, modulated by a vector of 256."""

    @classmethod
    def make(cls, shrink: int) -> ZImage:
        width, hidden = max(_HEAD, 3840 // shrink // _HEAD * _HEAD), 10240 // shrink
        shapes = {
            "adaLN": (4 * width, 256), "qkv": (3 * width, width), "out": (width, width),
            "w1": (hidden, width), "w2": (width, hidden), "w3": (hidden, width),
        }  # fmt: skip
        return cls("Z-Image block", width, shapes, False, ("adaLN",))

    def inputs(self, device, tokens, dtype=torch.bfloat16):
        x = numbers(device, 1, tokens, self.width)
        return {"x": x.to(dtype), "c": numbers(device, 1, 256, seed=1).to(dtype)}

    def forward(self, linear, inputs):
        x = inputs["x"]
        modulation = linear("adaLN", inputs["c"]).unsqueeze(1).chunk(4, -1)
        scale, gate, scale_ffn, gate_ffn = modulation
        qkv = linear("qkv", _rms(x) * (1 + scale))
        x = x + gate.tanh() * _rms(linear("out", _attention(qkv)))
        a, b = linear.pair("w1", "w3", _rms(x) * (1 + scale_ffn))
        return x + gate_ffn.tanh() * _rms(linear("w2", F.silu(a) * b))


class Flux(Block):
    """Two streams, image and 512 tokens of text, that attend to each other."""

    TEXT = 512

    @classmethod
    def make(cls, shrink: int) -> Flux:
        width = max(_HEAD, 3072 // shrink // _HEAD * _HEAD)
        of_stream = {
            "mod": (6 * width, width), "qkv": (3 * width, width), "proj": (width, width),
            "mlp.0": (4 * width, width), "mlp.2": (width, 4 * width),
        }  # fmt: skip
        shapes = {f"{s}.{n}": size for s in ("img", "txt") for n, size in of_stream.items()}
        return cls("Flux double block", width, shapes, True, vectors=("img.mod", "txt.mod"))

    def inputs(self, device, tokens, dtype=torch.bfloat16):
        text = min(self.TEXT, tokens)
        sizes = {"img": (1, tokens, self.width), "txt": (1, text, self.width), "c": (1, self.width)}
        return {
            name: numbers(device, *size, seed=seed).to(dtype)
            for seed, (name, size) in enumerate(sizes.items())
        }

    def forward(self, linear, inputs):
        streams, c = {name: inputs[name] for name in ("txt", "img")}, F.silu(inputs["c"])
        modulations, parts = {}, []
        for name, x in streams.items():
            shift, scale, *rest = linear(f"{name}.mod", c).unsqueeze(1).chunk(6, -1)
            modulations[name] = rest
            parts.append(linear(f"{name}.qkv", _norm(x) * (1 + scale) + shift))
        attended = _attention(torch.cat(parts, 1))
        lengths = [x.shape[1] for x in streams.values()]
        for (name, x), part in zip(streams.items(), attended.split(lengths, 1), strict=True):
            gate, shift, scale, gate_mlp = modulations[name]
            x = x + gate * linear(f"{name}.proj", part)
            hidden = linear(f"{name}.mlp.0", _norm(x) * (1 + scale) + shift)
            hidden = F.gelu(hidden, approximate="tanh")
            streams[name] = x + gate_mlp * linear(f"{name}.mlp.2", hidden)
        return torch.cat(list(streams.values()), 1)


def _rms(x):
    return F.rms_norm(x, x.shape[-1:], eps=1e-5)


def _norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _attention(qkv: torch.Tensor) -> torch.Tensor:
    """[1, tokens, 3 * width] -> [1, tokens, width], heads of 128; q and k are rotated."""
    tokens = qkv.shape[1]
    q, k, v = qkv.reshape(1, tokens, 3, -1, _HEAD).permute(2, 0, 3, 1, 4)
    q, k = _rotate(_rms(q)), _rotate(_rms(k))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(1, tokens, -1)


def _rotate(x: torch.Tensor) -> torch.Tensor:
    position = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
    frequency = torch.arange(_HEAD // 2, device=x.device, dtype=torch.float32)
    angle = position[:, None] * torch.exp2(frequency * (-13.0 * 2 / _HEAD))
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def measure(bench: Bench, block: Block, tokens: int) -> Iterator[tuple[dict, dict]]:
    """(row, peak memory) of every method; N and K of a row are null."""
    device = bench.device
    dense, *others = bench.methods(tokens)
    one_row = the_chosen(device, 1)["exact"]
    wide = Linears(block, block.layers(device, torch.float32), dense, one_row)
    expected = block.forward(wide, block.inputs(device, tokens, torch.float32))
    expected = expected.to("cpu", torch.float32)
    del wide
    inputs = block.inputs(device, tokens)
    layers = block.layers(device)
    runs, peaks, errors = {}, {}, {}
    methods = {method.name: method for method in (dense, *others)}
    for name, method in methods.items():
        bench.clock.check()
        try:
            linears = Linears(block, layers, method, one_row)
            block.forward(linears, inputs)
            kept = sum(_nbytes(stored) for _, stored, _ in linears.layers.values())
            outputs: list[torch.Tensor] = []
            peak = bench.clock.peak_bytes(
                lambda b=linears, outputs=outputs: outputs.append(block.forward(b, inputs))
            )
            errors[name] = relative(outputs[0].to("cpu", torch.float32), expected)
        except (RuntimeError, ValueError) as error:  # out of memory too
            bench.left_out.append(f"{block.name}, {name}: {reason(error)}")
            continue
        runs[name] = lambda i, b=linears: block.forward(b, inputs)
        peaks[name] = None if peak is None else peak + kept
    spent = bench.time(block.name, runs, graph=False)
    columns = {"bf16_us": spent.get("bf16"), "stock_us": spent.get("stock")}
    for name, us in spent.items():
        result = row(block.name, methods[name], tokens, None, None, us, **columns,
                     error=errors[name])  # fmt: skip
        yield result, {"op": block.name, "method": name, "M": tokens, "peak_bytes": peaks[name]}


def _nbytes(stored) -> int:
    """Bytes of a tensor, of a quantized one's parts, or of several."""
    if isinstance(stored, tuple):
        return sum(map(_nbytes, stored))
    if hasattr(stored, "_qdata"):
        return _nbytes((stored._qdata, stored._params.scale))
    return stored.nbytes


BLOCKS = {"Z-Image": ZImage.make, "Flux": Flux.make}
