"""Plain-torch MXFP8 on a CPU against comfy-kitchen's eager kernels and a dense BF16 linear.

    python bench/cpu.py [--rounds 7] [--threads 2] [--only NAME] [--check] [--json FILE]

"paths" are linears with the weight prepared once in the form that runs,
against dense BF16 and stock's way, which unpacks the weight on every call.

The last measurement is a layer with LoRAs of rank 32 in sum, in the real ComfyUI: beside the
weight, and in stock's ways: merged before, merged on the fly as in offloaded layers, and bypass.

In each round all contestants run in turn, so that a change in the machine's speed affects all of
them; a figure is the median over the rounds of the ratio within a round. Results go to
bench/results/cpu.json. --check exits with 1 if one of the bounds below fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu.json"

WEIGHT = 3840, 10240  # N, K: the largest weight of Z-Image
LINEAR = 4096, 3840, 3840  # M, N, K
RANK, LORA = 32, "linear, LoRA"
PATHS = "paths"
SHAPES = (3840, 3840), (10240, 3840)  # N, K

# (measurement, contestant, rival, bound on time / rival's time)
BOUNDS = (
    ("quantize", "mxfp8", "comfy-kitchen", 1 / 4),
    ("dequantize", "mxfp8", "comfy-kitchen", 1 / 3),
    ("linear", "mxfp8", "dense BF16", 1.10),
    (LORA, "mxfp8", "without LoRA", 1.06),
    (LORA, "four of rank 8", "mxfp8", 1.03),
)

# precision -> M -> bound on time / dense BF16's, where the CPU has INT8 instructions
PATH_BOUNDS = {"fast": {1: 0.70, 64: 0.90, 4096: 1.05}, "exact": {1: 1.15}}


def measurements() -> dict[str, dict[str, Callable]]:
    """Measurement -> contestant -> the call to time."""
    import torch
    from comfy_kitchen.backends.eager import quantization as stock

    from mxfp8 import kernels

    torch.manual_seed(0)
    weight = torch.randn(WEIGHT).mul_(0.02).bfloat16()
    qdata, scale = kernels.quantize(weight)
    stock_qdata, stock_scale = stock.quantize_mxfp8(weight, pad_32x=True)
    assert torch.equal(qdata.view(torch.uint8), stock_qdata.view(torch.uint8))
    assert torch.equal(scale, stock_scale.view(torch.uint8).view(scale.shape))

    rows, cols, depth = LINEAR
    x = torch.randn(rows, depth).bfloat16()
    dense = torch.randn(cols, depth).mul_(0.02).bfloat16()
    layer, layer_scale = kernels.quantize(dense)
    unpacked = stock_scale.view(torch.float8_e8m0fnu)
    layer_unpacked = layer_scale.view(torch.float8_e8m0fnu)

    def stock_linear():
        """What stock ComfyUI does on every forward on cards before Blackwell."""
        values = stock.dequantize_mxfp8(layer, layer_unpacked, torch.bfloat16)
        return torch.nn.functional.linear(x, values)

    return {
        "quantize": {
            "mxfp8": lambda: kernels.quantize(weight),
            "comfy-kitchen": lambda: stock.quantize_mxfp8(weight, pad_32x=True),
        },
        "dequantize": {
            "mxfp8": lambda: kernels.dequantize(qdata, scale, torch.bfloat16),
            "comfy-kitchen": lambda: stock.dequantize_mxfp8(qdata, unpacked, torch.bfloat16),
        },
        "linear": {
            "mxfp8": lambda: kernels.linear(x, layer, layer_scale, precision="exact"),
            "dense BF16": lambda: torch.nn.functional.linear(x, dense),
            "comfy-kitchen": stock_linear,
        },
        LORA: lora_contestants(x, layer, layer_scale),
    }


def lora_contestants(x, qdata, scale) -> dict[str, Callable]:
    """A diffusion model that is one layer, in BF16: with LoRAs of rank 32 in sum, and without."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from comfyui import import_modules

    import_modules()
    import comfy.lora
    import comfy.model_management
    import comfy.ops
    import torch
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher
    from comfy.weight_adapter import BypassInjectionManager

    from mxfp8.nodes.runtime.patch import accelerate
    from mxfp8.quant import format

    device, (N, K) = torch.device("cpu"), qdata.shape
    marker = bytearray(format.marker_bytes(format.marker((N, K), "BF16")))
    state = {
        "layer.weight": qdata,
        "layer.weight_scale": scale,
        "layer.comfy_quant": torch.frombuffer(marker, dtype=torch.uint8),
    }
    operations = comfy.ops.mixed_precision_ops(disabled={"mxfp8"})  # as on a device without MXFP8

    class OneLayer(BaseModel):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.layer, self.manual_cast_dtype = operations.Linear(K, N, bias=False), None

        def get_dtype(self):
            return torch.bfloat16

    def stock() -> ModelPatcher:
        model = OneLayer()
        model.load_state_dict(dict(state))
        return ModelPatcher(model, device, device)

    def lora(rank: int) -> dict:
        parts = {"up": torch.randn(N, rank) * 1e-3, "down": torch.randn(rank, K)}
        file = {f"layer.lora_{name}.weight": part for name, part in parts.items()}
        return comfy.lora.load_lora(file, {"layer": "layer.weight"})

    def forward(patcher, *ranks: int, offloaded: bool = False) -> Callable:
        for rank in ranks:
            patcher.add_patches(lora(rank))
        if offloaded:
            patcher.patch_model(device, lowvram_model_memory=1)
        else:
            comfy.model_management.load_models_gpu([patcher])
        return lambda: patcher.model.layer(x)

    bypassed, manager = stock(), BypassInjectionManager()
    manager.add_adapter("layer.weight", lora(RANK)["layer.weight"])
    bypassed.set_injections("lora", manager.create_injections(bypassed.model))
    return {
        "mxfp8": forward(accelerate(stock(), "exact"), RANK),
        "four of rank 8": forward(accelerate(stock(), "exact"), *[RANK // 4] * 4),
        "without LoRA": forward(accelerate(stock(), "exact")),
        "stock, merged": forward(stock(), RANK),
        "stock, on the fly": forward(stock(), RANK, offloaded=True),
        "stock, bypass": forward(bypassed),
    }


def path_rows(rounds: int) -> list[dict]:
    """A row per shape, M and precision: how it runs, how long it takes, and its error."""
    import torch
    from comfy_kitchen.backends.eager import quantization as stock
    from torch.nn.functional import linear

    from mxfp8 import kernels

    torch.manual_seed(0)
    rows = []
    for N, K in SHAPES:
        dense = torch.randn(N, K).mul_(0.02).bfloat16()
        qdata, scale = kernels.quantize(dense)
        unpacked = scale.view(torch.float8_e8m0fnu)
        whole = kernels.dequantize(qdata, scale, torch.float32).double()
        for M in PATH_BOUNDS["fast"]:
            x = torch.randn(M, K).bfloat16()
            paths = {
                precision: kernels.execution_path(
                    x.device, x.dtype, precision, M, (N, K), prepare="once"
                )
                for precision in PATH_BOUNDS
            }
            prepared = {p: kernels.prepare_weight(path, qdata, scale) for p, path in paths.items()}
            calls = {
                p: partial(kernels.linear_prepared, paths[p], x, prepared[p], None, N)
                for p in paths
            }
            seconds = time_rounds(
                {
                    **calls,
                    "bf16": lambda x=x, dense=dense: linear(x, dense),
                    "stock": lambda x=x, q=qdata, s=unpacked: linear(
                        x, stock.dequantize_mxfp8(q, s, torch.bfloat16)
                    ),
                },
                rounds,
                1 if M > 64 else 20,
            )
            product = x.double() @ whole.t()
            for precision, path in paths.items():
                error = (calls[precision]().double() - product).norm() / product.norm()
                medians = {n: 1000 * statistics.median(s) for n, s in seconds.items()}
                rows.append(
                    {
                        "op": "linear",
                        "precision": precision,
                        "form": path.weight_form,
                        "backend": path.backend,
                        "M": M,
                        "N": N,
                        "K": K,
                        "ms": round(medians[precision], 3),
                        "bf16_ms": round(medians["bf16"], 3),
                        "stock_ms": round(medians["stock"], 3),
                        "vs_bf16": round(ratio(seconds, precision, "bf16"), 3),
                        "error": float(f"{error:.3g}"),
                    }
                )
                print(f"{PATHS:11}", rows[-1])
    return rows


def failed_paths(rows: list[dict]) -> int:
    """Rows that exceed `PATH_BOUNDS`, each printed with its verdict."""
    failed = 0
    for row in rows:
        bound = PATH_BOUNDS[row["precision"]].get(row["M"])
        if bound is not None:
            failed += row["vs_bf16"] > bound
            state = "holds" if row["vs_bf16"] <= bound else "FAILS"
            what = f"{row['precision']} as {row['form']}, {row['M']} x {row['K']} x {row['N']}"
            print(f"{what}: {row['vs_bf16']:.3f} of dense BF16, bound {bound:.2f}: {state}")
    return failed


def time_rounds(
    contestants: dict[str, Callable], rounds: int, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds per contestant and round, after one uncounted round.

    The order changes from round to round: a call is slower after one that left other memory in the
    caches and the allocator.

    Args:
        calls: in a row, as a model's layers run one after the other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    draw = random.Random(0)
    for index in range(rounds + 1):
        for name in draw.sample(list(contestants), len(contestants)):
            start = time.perf_counter()
            for _ in range(calls):
                contestants[name]()
            if index:
                seconds[name].append((time.perf_counter() - start) / calls)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, rival: str) -> float:
    """Median over rounds of a contestant's time divided by its rival's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[rival], strict=True))


def flags() -> list[str]:
    """Which of the instructions that matter here the CPU has."""
    import torch

    asked = {
        "AVX512_VNNI": "_is_vnni_supported",
        "AVX512_BF16": "_is_avx512_bf16_supported",
        "AMX": "_is_amx_tile_supported",
    }
    return [name for name, ask in asked.items() if getattr(torch.cpu, ask, bool)()]


def machine(threads: int) -> dict[str, str | int | list[str]]:
    """The machine and the versions that a results file names."""
    import torch

    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ] if Path("/proc/cpuinfo").exists() else [platform.processor()]  # fmt: skip
    packages = ("torch", "comfy-kitchen", "mxfp8")
    return {
        "cpu": names[0],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "flags": flags(),
        "cores": os.cpu_count() or 0,
        "threads": threads,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", metavar="NAME", help="measure this one; results of others stay")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound fails")
    parser.add_argument("--json", metavar="FILE", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    results = arguments.json
    result = json.loads(results.read_text("utf-8")) if results.exists() else {"figures": {}}
    where = {"machine": machine(arguments.threads), "rounds": arguments.rounds}
    failed = 0
    with torch.inference_mode():
        timed = (
            {
                name: time_rounds(contestants, arguments.rounds)
                for name, contestants in measurements().items()
                if arguments.only in (None, name)
            }
            if arguments.only != PATHS
            else {}
        )
        if arguments.only in (None, PATHS):
            result |= where | {"rows": path_rows(arguments.rounds)}
            failed += failed_paths(result["rows"])
    for name, seconds in timed.items():
        medians = {n: round(1000 * statistics.median(s), 1) for n, s in seconds.items()}
        ratios = {f"vs {n}": round(ratio(seconds, "mxfp8", n), 3) for n in seconds if n != "mxfp8"}
        result["figures"][name] = {**where, "milliseconds": medians, "time ratio": ratios}
        print(f"{name:11}", ", ".join(f"{n} {m} ms" for n, m in medians.items()))
    for name, contestant, rival, bound in BOUNDS:
        if name not in timed:
            continue
        measured = ratio(timed[name], contestant, rival)
        failed += measured > bound
        state = "holds" if measured <= bound else "FAILS"
        print(f"{name:11} {measured:.3f} of the time of {rival}, bound {bound:.2f}: {state}")
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"results: {results}")
    return int(arguments.check and failed > 0)


if __name__ == "__main__":
    sys.exit(main())
