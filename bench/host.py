"""What a linear costs the host in ComfyUI, on every backend, beside what stock spends there.

    python bench/host.py [--rounds 500] [--only WAY] [--profile] [--check] [--json FILE]

A GPU waits for the host where its kernels are short, so that microseconds of Python count. Here the
kernels do nothing: launches of Triton's, torch's matmuls, and the functions of comfy-kitchen and of
plain torch return a result that was there before. What is left is the host's work: the forward in
the real ComfyUI, on a layer that stands on the device, under inference_mode. No GPU is needed:
tensors are on the CPU, and the choice of a backend is told which one runs.

    form              of the weight (kernels/records.py); all but "stored" were prepared before
    us                our forward
    stock_us          what stock cannot do without: its `cast_bias_weight`, and comfy-kitchen's
                      dispatch of the functions that run such a layer
    over_us           the difference, at most BOUND
    stock_forward_us  stock's whole forward

A figure is the least over rounds that take turns: what another process takes only adds to it.
Results go to bench/results/host.json. --check exits with 1 if the bound fails.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import gc
import json
import pstats
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from unittest.mock import patch

from cpu import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "host.json"
BOUND = 25.0  # microseconds
ROWS, SIZE = 96, 32  # of x; N and K
RANK = 16


@dataclass(frozen=True)
class Way:
    """A layer as it runs on some machine.

    Attributes:
        rows: of x.
        layers: that are given the same x, one after the other; figures are per layer.
        lora: whether a LoRA of rank 16 runs beside it.
        blackwell: whether stock quantizes the input too.
    """

    backend: str
    precision: str
    rows: int = ROWS
    layers: int = 1
    lora: bool = False
    blackwell: bool = False

    @property
    def name(self) -> str:
        more = ", 3 siblings" * (self.layers > 1) + ", LoRA" * self.lora
        return f"{self.precision}: {self.backend}{more}"


WAYS = (
    Way("triton", "exact"),
    Way("triton_w8a16", "exact", rows=1),
    Way("eager", "exact"),
    Way("torch_bf16", "exact"),
    Way("torch_mx", "fast", blackwell=True),
    Way("kitchen_int8", "fast"),
    Way("triton_int8", "fast"),
    Way("torch_fp8", "fast"),
    Way("triton_fp8", "fast"),
    Way("torch_int8", "fast"),
    Way("int8", "fast"),
    Way("torch_mx", "fast", layers=3, blackwell=True),
    Way("torch_fp8", "fast", layers=3),
    Way("triton", "exact", lora=True),
    Way("torch_fp8", "fast", lora=True),
)


@contextlib.contextmanager
def no_launches(way: Way) -> Iterator[None]:
    """Kernels do nothing, and the backend of a way is chosen."""
    import comfy_kitchen.backends.eager as stock
    import torch
    from comfy.quant_ops import QuantizedTensor
    from torch.nn import functional
    from triton.runtime import jit

    from mxfp8.kernels import dispatch
    from mxfp8.kernels.backends import eager

    flat = torch.empty(way.rows, SIZE, dtype=torch.bfloat16)
    results = {1: flat[0], 2: flat, 3: flat[None]}  # by the rank of x
    weight = torch.empty(SIZE, SIZE, dtype=torch.bfloat16)
    code = torch.empty(SIZE * (1 + (way.rows - 1) // SIZE), SIZE, dtype=torch.float8_e4m3fn)
    scale = torch.empty(128, 4, dtype=torch.float8_e8m0fnu)
    linear = functional.linear

    def dense_linear(x, weight, bias=None):
        return results[x.ndim] if type(weight) is not QuantizedTensor else linear(x, weight, bias)

    def gives(result) -> Callable:
        return lambda *_, **__: result

    def reason(_, what, problem) -> str | None:
        if isinstance(what, dispatch.Backend):
            chosen = what.name in (way.backend, "eager")
        else:
            chosen = not (what.name == "triton" and way.backend == "int8")
        return None if chosen else "another is measured"

    int8, padded = dispatch.named("int8"), flat.new_empty(code.shape)
    replaced = [
        patch.object(jit.KernelInterface, "__getitem__", gives(gives(None))),
        patch.object(torch, "_int_mm", gives(padded)),
        patch.object(torch, "_scaled_mm", gives(flat)),
        patch.object(torch, "_scaled_mm_v2", gives(padded), create=True),
        patch.object(functional, "linear", dense_linear),
        patch.object(torch.Tensor, "addmm_", lambda self, *_, **__: self),
        patch.object(eager, "dequantize", gives(weight)),
        patch.dict(vars(int8), matmul=gives(flat)),
        patch.dict(vars(int8.quantizers[-1]), run=gives((flat, flat))),
        patch.object(stock, "int8_linear", gives(flat)),
        patch.object(stock, "quantize_mxfp8", gives((code, scale))),
        patch.object(stock, "dequantize_mxfp8", gives(weight)),
        patch.object(stock, "scaled_mm_mxfp8", gives(padded)),
        patch.object(dispatch._Verdicts, "reason", reason),
    ]
    with contextlib.ExitStack() as stack:
        for replacement in replaced:
            stack.enter_context(replacement)
        dispatch.forget()
        try:
            yield
        finally:
            dispatch.forget()


def layers(way: Way, ours: bool) -> list:
    """Linears of a model as ComfyUI builds and loads them; they have one block as their owner."""
    import comfy.ops
    import torch

    from mxfp8.nodes.runtime import cache, forward
    from mxfp8.nodes.runtime.prepared import PreparedWeight

    operations = comfy.ops.mixed_precision_ops({}, torch.bfloat16)
    block = torch.nn.Module()
    for name in ("to_q", "to_k", "to_v")[: way.layers]:
        module = operations.Linear(SIZE, SIZE, device="cpu")
        module.weight = torch.nn.Parameter(mxfp8_weight(), requires_grad=False)
        module.bias.requires_grad_(False)
        module.quant_format, module.layout_type = "mxfp8", "TensorCoreMXFP8Layout"
        module._full_precision_mm = not way.blackwell
        setattr(block, name, module)
    found = list(block.children())
    if not ours:
        return found
    cache.attach(block, found)
    for module in found:
        path = forward.wanted_path(module, way.precision, torch.device("cpu"), torch.bfloat16)
        codes = module.weight._qdata
        form = {
            "stored": None,
            "bf16": (codes.to(torch.bfloat16),),
            "rotated_int8": (codes.to(torch.int8), torch.ones(SIZE)),
            "rowwise_fp8": (codes.clone(), torch.ones(SIZE)),
        }[path.weight_form]
        if form is not None:
            prepared = PreparedWeight.of(module.weight, path.weight_form, form)
            module.weight = torch.nn.Parameter(prepared, requires_grad=False)
        if way.lora:
            module.mxfp8_branches = (branch(),)
        cache.model_state(module).called.add(module)
        check(way, module)
        module.forward = MethodType(forward.FORWARDS[way.precision], module)
    return found


def check(way: Way, module) -> None:
    """That the forward of a layer runs the backend of its way."""
    import torch

    from mxfp8 import kernels
    from mxfp8.nodes.runtime import forward

    problem = torch.device("cpu"), torch.bfloat16
    assert forward.left_to_stock(module, way.precision, *problem) is None
    form, _ = forward.form_and_tensors(module.weight)
    precision, shape = way.precision if form == "stored" else "auto", (SIZE, SIZE)
    path = kernels.execution_path(*problem, precision, way.rows, shape, weight_form=form)
    assert path.backend == way.backend, path


def mxfp8_weight():
    """A weight as ComfyUI holds it."""
    import torch
    from comfy.quant_ops import QuantizedTensor, get_layout_class

    codes = torch.zeros(SIZE, SIZE, dtype=torch.float8_e4m3fn)
    scale = torch.zeros(128, 4, dtype=torch.float8_e8m0fnu)
    name = "TensorCoreMXFP8Layout"
    params = get_layout_class(name).Params(scale, torch.bfloat16, (SIZE, SIZE))
    return QuantizedTensor(codes, name, params)


def branch():
    """A LoRA as it runs beside a layer."""
    import torch

    from mxfp8.nodes.runtime.side_branch import LowRank, SideBranch

    up, down = torch.zeros(SIZE, RANK), torch.zeros(RANK, SIZE)
    low_rank = [LowRank(up, down, (0, SIZE), 0)]
    return SideBranch(
        (SIZE, SIZE), (), [], None, low_rank, [], None, None, torch.bfloat16, 0
    )  # fmt: skip


def without_the_rest(way: Way, module) -> Callable:
    """What stock cannot do without for a layer: the cast, and comfy-kitchen's dispatch."""
    import comfy.ops
    import comfy_kitchen
    from torch.nn import functional

    codes, scale = module.weight._qdata, module.weight._params.scale

    def call(x):
        weight, bias, stream = comfy.ops.cast_bias_weight(
            module, None, module.weight.dtype, x.device, x.dtype, True, x.dtype, True
        )
        if way.blackwell:
            x_q, x_scale = comfy_kitchen.quantize_mxfp8(x[0], pad_32x=False)
            comfy_kitchen.scaled_mm_mxfp8(x_q, codes, x_scale, scale, bias, x.dtype)
        else:
            functional.linear(x, comfy_kitchen.dequantize_mxfp8(codes, scale, x.dtype), bias)
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)

    return call


def contestants(way: Way) -> dict[str, Callable]:
    """Figure -> one call of its layers."""
    import torch

    x = torch.zeros(1, way.rows, SIZE, dtype=torch.bfloat16)
    stock = layers(way, ours=False)
    calls = {
        "us": [module.forward for module in layers(way, ours=True)],
        "stock_us": [without_the_rest(way, module) for module in stock],
        "stock_forward_us": [module.forward for module in stock],
    }

    def call_of(functions):
        def call():
            for function in functions:
                function(x)

        return call

    return {name: call_of(functions) for name, functions in calls.items()}


def least(calls: dict[str, Callable], rounds: int, repeat: int = 10) -> dict[str, float]:
    """Microseconds of a call, the least over rounds in which all take turns."""
    seconds = dict.fromkeys(calls, float("inf"))
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                call()  # caches hold what the others used
                start = time.perf_counter()
                for _ in range(repeat):
                    call()
                seconds[name] = min(seconds[name], (time.perf_counter() - start) / repeat)
    finally:
        gc.enable()
    return {name: 1e6 * value for name, value in seconds.items()}


def measure(way: Way, rounds: int) -> dict:
    """A row of the results."""
    import torch

    from mxfp8.kernels import dispatch

    with torch.inference_mode(), no_launches(way):
        figures = least(contestants(way), rounds)
    figures = {name: us / way.layers for name, us in figures.items()}
    figures["over_us"] = figures["us"] - figures["stock_us"]
    form = dispatch.named(way.backend).weight_form
    return {"way": way.name, "form": form, **{name: round(us, 1) for name, us in figures.items()}}


def profile(way: Way) -> None:
    """Print where the time goes."""
    import torch

    with torch.inference_mode(), no_launches(way):
        call = contestants(way)["us"]
        call()
        with cProfile.Profile() as profiler:
            for _ in range(2000):
                call()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--only", metavar="WAY", help="of the names in the results")
    parser.add_argument("--profile", action="store_true", help="print where the time goes instead")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the bound fails")
    parser.add_argument("--json", metavar="FILE", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    ways = [way for way in WAYS if arguments.only in (None, way.name)]
    if not ways:
        names = "; ".join(way.name for way in WAYS)
        parser.error(f"no way is called {arguments.only!r}; it must be one of: {names}")
    if not arguments.json.parent.is_dir():
        parser.error(f"{arguments.json.parent} is not a folder")
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from comfyui import import_modules

    import_modules()
    import torch

    torch.set_num_threads(1)
    if arguments.profile:
        for way in ways:
            profile(way)
        return 0
    rows = []
    for way in ways:
        rows.append(measure(way, arguments.rounds))
        row = rows[-1]
        print(
            f"{row['way']:28} {row['us']:6.1f} us, stock {row['stock_us']:5.1f} "
            f"(its forward {row['stock_forward_us']:5.1f}): {row['over_us']:+.1f}"
        )
    failed = [row["way"] for row in rows if row["over_us"] > BOUND]
    print(f"bound {BOUND:g} us: {'FAILS for ' + '; '.join(failed) if failed else 'holds'}")
    if arguments.only is None:
        from comfyui_version import __version__

        where = {**machine(1), "comfyui": __version__}
        result = {"machine": where, "rounds": arguments.rounds, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"results: {arguments.json}")
    return int(arguments.check and bool(failed))


if __name__ == "__main__":
    sys.exit(main())
