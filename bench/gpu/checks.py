"""Checks that every kernel is correct at real shapes, against the oracle and float64.

Casts and row-wise scaling must match plain torch on the same device bit for bit, on a whole matrix,
and the oracle (`reference`, on the CPU) on its first and last rows. Matmuls are compared with
float64 within a bound. The memory that results are written to is filled with NaN before, every
matmul runs twice, and every check has data of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from gpu.clock import reason
from gpu.paths import Method, all_methods, exact_weight, fast_backends, relative
from gpu.shapes import numbers, weight

from mxfp8 import kernels
from mxfp8.kernels import layout
from mxfp8.kernels.backends import eager, fp8_rowwise, reference
from mxfp8.kernels.dispatch import choose_step, named

_SLAB = 128  # rows at either end that the oracle computes: a whole tile of scales
_EXACT = {torch.bfloat16: 2.5e-3, torch.float16: 5e-4}  # roundings are 2**-9 and 2**-12


@dataclass(frozen=True)
class Check:
    """`run` returns a description of what is wrong, or None."""

    name: str
    shape: tuple[int, ...]
    run: Callable[[], str | None]

    def result(self) -> dict:
        try:
            wrong = self.run()
        except Exception as error:  # the other checks still run
            wrong = reason(error)
        return {"check": self.name, "shape": list(self.shape), "wrong": wrong}


def same_bits(out: torch.Tensor, expected: torch.Tensor) -> str | None:
    """What differs, or None; all NaN are equal."""
    if out.shape != expected.shape or out.dtype != expected.dtype:
        return f"{out.dtype} {list(out.shape)}, not {expected.dtype} {list(expected.shape)}"
    out = out.to(expected.device)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    different = out.view(bits) != expected.view(bits)
    if expected.dtype.is_floating_point and expected.element_size() > 1:
        different &= ~(out.isnan() & expected.isnan())
    if not different.any():
        return None
    first = different.nonzero()[0].tolist()
    values = [t.view(bits)[tuple(first)].item() for t in (out, expected)]
    return f"{int(different.sum())} differ, the first at {first}: bits {values[0]}, not {values[1]}"


def close(out: torch.Tensor, expected: torch.Tensor, bound: float) -> str | None:
    """What is wrong with an output, given the expected one in float64, or None.

    `bound` limits the relative norm of the error. A single value may have an error of 8 times the
    bound, in units of the outputs' root mean square; a misplaced or missing value has one unit.
    """
    if not out.isfinite().all():
        first = (~out.isfinite()).nonzero()[0].tolist()
        return f"{int((~out.isfinite()).sum())} not finite, the first at {first}"
    error = relative(out, expected)
    if error > bound:
        return f"relative error {error:.2e}, over {bound:.1e}"
    allowed = 2.0**-8 * expected.abs() + 8 * bound * expected.square().mean().sqrt()
    wrong = (out.double() - expected).abs() > allowed
    if wrong.any():
        first = wrong.nonzero()[0].tolist()
        values = out[tuple(first)].item(), expected[tuple(first)].item()
        return f"{int(wrong.sum())} far off, the first at {first}: {values}"
    return None


def poison(device: torch.device, *sizes: int) -> None:
    """Leave NaN, in every dtype, in the memory that results of these sizes will be given."""
    blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device=device) for size in sizes]
    del blocks


def _random_bytes(device, *size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(0, 256, size, dtype=torch.uint8, device=device, generator=generator)


def hard_values(device, rows: int, cols: int, dtype=torch.bfloat16, seed: int = 0):
    """Rows of all magnitudes, with zeros, subnormals, infinities and NaN in some blocks."""
    x = numbers(device, rows, cols, seed=seed, dtype=torch.float32)
    spread = torch.arange(rows, device=device).remainder(61).sub(30) * 4.0
    x *= torch.exp2(spread)[:, None]
    x[1 % rows] = 0
    x[2 % rows, : cols // 2] = -0.0
    special = [float("inf"), float("-inf"), float("nan"), 448.0, 2.0**-130, 1e-45, 3e38, 2.0**-119]
    for at, value in enumerate(special):
        x[(5 + 3 * at) % rows, (7 + 32 * at) % cols] = value
    x[-1, -1] = -448.0
    return x.to(dtype)


def checks(device: torch.device, quick: bool, shapes) -> Iterator[Check]:
    """All checks, those of casts first."""
    for at, (N, K) in enumerate(shapes):
        dtypes = (torch.bfloat16, torch.float16, torch.float32) if at < 2 else (torch.bfloat16,)
        for dtype in dtypes:
            kind = str(dtype).removeprefix("torch.")
            yield Check(f"dequantize to {kind}", (N, K), partial(_dequantize, device, N, K, dtype))
            yield Check(f"quantize {kind}", (N, K), partial(_quantize, device, N, K, dtype))
        yield Check("to_rowwise", (N, K), partial(_to_rowwise, device, N, K))
    yield from _quantize_rowwise_checks(device, quick)
    yield from _exact_checks(device, quick)
    yield from _rowwise_checks(device, quick)
    yield from _block_checks(device, quick)
    yield from _error_checks(device, quick)


def _slabs(rows: int) -> list[tuple[int, int]]:
    """The first and the last rows, each from the start of a tile of scales."""
    return [(0, min(rows, _SLAB)), ((rows - 1) // _SLAB * _SLAB, rows)]


def _dequantize(device, N: int, K: int, dtype) -> str | None:
    code = _random_bytes(device, N, K).view(torch.float8_e4m3fn)
    scale = _random_bytes(device, *layout.scale_shape(N, K), seed=1)
    expected = eager.dequantize(code, scale, dtype, N, K)
    poison(device, expected.nbytes)
    out = kernels.dequantize(code, scale, dtype)
    wrong = same_bits(out, expected)
    for r0, r1 in _slabs(N):
        oracle = reference.dequantize(code[r0:r1].cpu(), scale[r0:].cpu(), dtype, r1 - r0, K)
        wrong = wrong or same_bits(out[r0:r1].cpu(), oracle)
    return wrong


def _quantize(device, N: int, K: int, dtype) -> str | None:
    x = hard_values(device, N, K, dtype)
    expected = eager.quantize(x)
    poison(device, *(t.nbytes for t in expected))
    out = kernels.quantize(x)
    wrong = next(filter(None, map(same_bits, out, expected)), None)
    for r0, r1 in _slabs(N):
        oracle = reference.quantize(x[r0:r1].cpu())
        scale = out[1][r0 : layout.round_up(r1, layout.TILE_ROWS)]
        wrong = wrong or same_bits(out[0][r0:r1].cpu(), oracle[0][: r1 - r0])
        wrong = wrong or same_bits(scale.cpu(), oracle[1])
    return wrong


def _to_rowwise(device, N: int, K: int) -> str | None:
    code = _random_bytes(device, N, K).view(torch.float8_e4m3fn)
    scale = _random_bytes(device, *layout.scale_shape(N, K), seed=1)
    scale[: layout.TILE_ROWS] = scale[: layout.TILE_ROWS].remainder(24) + 100  # as in weights
    expected = fp8_rowwise.to_rowwise(code, scale)
    poison(device, *(t.nbytes for t in expected))
    out = choose_step(named("torch_fp8").preparers, device, torch.bfloat16).run(code, scale)
    wrong = next(filter(None, map(same_bits, out, expected)), None)
    for r0, r1 in _slabs(N):
        oracle = reference.to_rowwise(code[r0:r1].cpu(), scale[r0:].cpu())
        wrong = wrong or same_bits(out[0][r0:r1].cpu(), oracle[0])
        wrong = wrong or same_bits(out[1][r0:r1].cpu(), oracle[1])
    return wrong


def _quantize_rowwise_checks(device, quick: bool) -> Iterator[Check]:
    sizes = ((1, 96), (33, 100)) if quick else (
        (1, 3072), (77, 3840), (4096, 3072), (4096, 15360), (1000, 10240), (333, 1000), (64, 13824),
    )  # fmt: skip
    for at, (M, K) in enumerate(sizes):
        dtypes = (torch.bfloat16, torch.float16, torch.float32) if at < 2 else (torch.bfloat16,)
        for dtype in dtypes:
            kind = str(dtype).removeprefix("torch.")
            yield Check(f"quantize_rowwise {kind}", (M, K),
                        partial(_quantize_rowwise, device, M, K, dtype))  # fmt: skip


def _quantize_rowwise(device, M: int, K: int, dtype) -> str | None:
    x = hard_values(device, M, K, dtype)
    expected = fp8_rowwise.quantize_rowwise(x)
    poison(device, *(t.nbytes for t in expected))
    out = choose_step(named("torch_fp8").quantizers, device, dtype).run(x)
    wrong = next(filter(None, map(same_bits, out, expected)), None)
    oracle = reference.quantize_rowwise(x[:_SLAB].cpu())
    for part, expected_part in zip(out, oracle, strict=True):
        wrong = wrong or same_bits(part[:_SLAB].cpu(), expected_part)
    return wrong


def _exact_checks(device, quick: bool) -> Iterator[Check]:
    shapes = ((96, 256), (50, 100)) if quick else ((3840, 3840), (3072, 15360), (1000, 1000))
    counts = (1, 3, 64, 70) if quick else (1, 2, 5, 8, 16, 17, 31, 32, 33, 48, 64, 65, 300)
    for N, K in shapes:
        for M in counts:
            dtypes = list(_EXACT) if M in (1, 16, 33) else [torch.bfloat16]
            for dtype in dtypes:
                kind = str(dtype).removeprefix("torch.")
                yield Check(f"linear exact {kind}", (M, N, K),
                            partial(_exact, device, M, N, K, dtype, M % 2 == 1))  # fmt: skip


def _exact(device, M: int, N: int, K: int, dtype, biased: bool) -> str | None:
    seed = M * 31 + N
    qdata, scale = kernels.quantize(weight(device, N, K, seed))
    x = numbers(device, M, K, seed=seed + 1, dtype=dtype)
    bias = numbers(device, N, seed=seed + 2, dtype=dtype) if biased else None
    expected = x.double() @ exact_weight(qdata, scale)[:N, :K].t()
    if biased:
        expected += bias.double()

    def run():
        return kernels.linear(x, qdata, scale, bias, shape=(N, K), precision="exact")

    return _twice(device, run, expected, _EXACT[dtype])


def _twice(device, run: Callable[[], torch.Tensor], expected, bound: float) -> str | None:
    outputs = []
    for _ in range(2):
        poison(device, expected.numel() * 2)
        outputs.append(run())
    wrong = close(outputs[0], expected, bound)
    if wrong is None and not torch.equal(*outputs):
        wrong = "two runs on the same inputs differ"
    return wrong


def _rowwise_checks(device, quick: bool) -> Iterator[Check]:
    """Every row-wise scaled matmul that runs here; K and columns that are not multiples of a tile
    as well."""
    shapes = ((96, 256),) if quick else ((3840, 3840), (3072, 15360), (10240, 3840), (13824, 5120))
    counts = (70,) if quick else (16, 65, 256, 1000, 4096)
    tails = ((70, 96, 160),) if quick else ((77, 1056, 1056), (513, 3104, 96))
    for name, backend in fast_backends(device, "rowwise_fp8")[0].items():
        for N, K in shapes:
            for M in counts:
                run = partial(_rowwise_matmul, device, M, N, K, backend.matmul, M != 256)
                yield Check(f"FP8 matmul, {name}", (M, N, K), run)
        for M, N, K in tails:
            run = partial(_rowwise_matmul, device, M, N, K, backend.matmul, True, 24)
            yield Check(f"FP8 matmul, {name}, tails", (M, N, K), run)


def _error_checks(device, quick: bool) -> Iterator[Check]:
    M, N, K = (70, 96, 256) if quick else (1024, 3840, 3840)
    for name, method in all_methods(device).items():
        if method.precision == "fast" and not method.shares:
            for kind in ("normal", "heavy-tailed", "column outliers"):
                run = partial(_against_native, device, M, N, K, kind, method)
                yield Check(f"{name} against native MX x MX, {kind} activations", (M, N, K), run)


def _block_checks(device, quick: bool) -> Iterator[Check]:
    """Every block-scaled matmul that runs here: tails in M, N and K, and real shapes."""
    small = ((33, 70, 100), (70, 50, 160))
    large = () if quick else ((65, 3840, 3840), (1000, 10240, 3840), (4096, 3072, 15360))
    for name, backend in fast_backends(device, "mxfp8")[0].items():
        for M, N, K in small:
            for dtype in (torch.bfloat16, torch.float16):
                run = partial(_within_bound, device, M, N, K, backend.matmul, dtype)
                yield Check(f"block matmul, {name}", (M, N, K), run)
        for M, N, K in large:
            yield Check(f"block matmul, {name}", (M, N, K),
                        partial(_block_matmul, device, M, N, K, backend.matmul))  # fmt: skip


def _within_bound(device, M: int, N: int, K: int, matmul, dtype) -> str | None:
    """Every value is within `reference.block_bound`, with rows of all magnitudes."""
    x = numbers(device, M, K, seed=M, dtype=torch.float32)
    x *= torch.exp2(numbers(device, M, 1, seed=M + 1, scale=3.0, dtype=torch.float32))
    bias = numbers(device, N, seed=3, dtype=dtype)
    operands = reference.quantize(x.to(dtype)), reference.quantize(weight(device, N, K, M))
    poison(device, M * N * 2)
    out = matmul(*operands, bias, dtype, N)[:M]
    if out.shape != (M, N) or out.dtype != dtype:
        return f"{out.dtype} {list(out.shape)}"
    expected, allowed = reference.block_bound(*operands, bias, dtype, M, N)
    error = (out.cpu().double() - expected).abs()
    wrong = ~(error <= allowed)
    if not wrong.any():
        return None
    first = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{int(wrong.sum())} beyond the bound, the first at {list(first)}: "
        f"error {error[first].item():.2e}, allowed {allowed[first].item():.2e}"
    )


def _block_matmul(device, M: int, N: int, K: int, matmul) -> str | None:
    """Real shapes, against float64 on the same codes; tensor cores keep 25 bits of each term."""
    quantized_input = kernels.quantize(numbers(device, M, K, seed=M))
    stored = kernels.quantize(weight(device, N, K, seed=M + 1))
    expected = exact_weight(*quantized_input)[:M] @ exact_weight(*stored)[:N].t()

    def run():
        return matmul(quantized_input, stored, None, torch.bfloat16, N)[:M]

    return _twice(device, run, expected, 2.5e-3 + K / 32 * 2.0**-24)


def _rowwise_matmul(device, M, N, K, matmul, biased: bool, padding: int = 0) -> str | None:
    """The FP8 matmul alone, against float64 on the same codes.

    Hopper truncates a sum to 14 bits, once for every 32 products: the bound allows half of the last
    bit for each of these, and the rounding to BF16.
    """
    x, w = numbers(device, M, K, seed=M), weight(device, N, K, seed=M + 1)
    a, a_scale = fp8_rowwise.quantize_rowwise(x)
    b, b_scale = fp8_rowwise.to_rowwise(*eager.quantize(w))
    columns = N - padding
    bias = numbers(device, columns, seed=3) if biased else None
    x, w = a.double() * a_scale.double()[:, None], b.double() * b_scale.double()[:, None]
    expected = (x @ w.t())[:, :columns] + (bias.double() if biased else 0)

    def run():
        return matmul((a, a_scale), (b, b_scale), bias, torch.bfloat16, columns)

    return _twice(device, run, expected, 2.5e-3 + K / 32 * 2.0**-15)


def _against_native(device, M: int, N: int, K: int, kind: str, method: Method) -> str | None:
    """The output error is at most that of MXFP8 activations, which Blackwell multiplies.

    Both against float64 with the stored weights; 2% are allowed for the random draw.
    """
    x = numbers(device, M, K, dtype=torch.float32)
    if kind == "heavy-tailed":
        x *= torch.exp2(numbers(device, M, K, seed=5, scale=1.5, dtype=torch.float32))
    elif kind == "column outliers":
        x[:, :: K // 8] *= 50
    x = x.bfloat16()
    plain = weight(device, N, K, 9)
    stored = exact_weight(*kernels.quantize(plain))
    expected = x.double() @ stored.t()
    native = relative(exact_weight(*eager.quantize(x))[:M] @ stored.t(), expected)
    out = method.run(x, method.store(plain), None)
    error = relative(out, expected)
    return None if error <= 1.02 * native else f"error {error:.3e}, native {native:.3e}"
