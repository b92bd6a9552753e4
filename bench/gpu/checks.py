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
from gpu.methods import Method, Weight, exact_weight, ours, relative
from gpu.shapes import numbers, weight

from mxfp8 import kernels
from mxfp8.kernels import layout
from mxfp8.kernels.backends import eager, fp8_rowwise, reference
from mxfp8.kernels.dispatch import choose_step, named
from mxfp8.kernels.memory import is_out_of_memory
from mxfp8.kernels.records import Problem, Step

_SLAB = 128  # rows at either end that the oracle computes: a whole tile of scales
_ROUNDED = {torch.bfloat16: 2.5e-3, torch.float16: 5e-4}  # roundings are 2**-9 and 2**-12
# comfy-kitchen rotates and quantizes x inside its matmul: 1.05e-2 from the exact product.
_OTHERWISE = 1.5e-2
_KINDS = {
    "mxfp8": "block", "rowwise_fp8": "FP8", "rowwise_fnuz": "FP8", "rotated_int8": "INT8",
    None: "exact",
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """`run` returns a description of what is wrong, or None."""

    name: str
    shape: tuple[int, ...]
    run: Callable[[], str | None]

    def result(self) -> dict:
        """Raises only what says that memory ran out."""
        try:
            wrong = self.run()
        except Exception as error:  # the other checks still run
            if is_out_of_memory(error):
                raise
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
    """All checks: a matmul by every backend, casts, then more matmuls."""
    yield from _matmul_checks(device, *(((70, 96, 256),) if quick else ((1000, 3840, 3840),)))
    for at, (N, K) in enumerate(shapes):
        dtypes = (torch.bfloat16, torch.float16, torch.float32) if at < 2 else (torch.bfloat16,)
        for dtype in dtypes:
            kind = str(dtype).removeprefix("torch.")
            yield Check(f"dequantize to {kind}", (N, K), partial(_dequantize, device, N, K, dtype))
            yield Check(f"quantize {kind}", (N, K), partial(_quantize, device, N, K, dtype))
        yield Check("to_rowwise", (N, K), partial(_to_rowwise, device, N, K))
    yield from _quantize_rowwise_checks(device, quick)
    yield from _int8_checks(device, quick)
    yield from _error_checks(device, quick)
    tails = ((33, 70, 96), (70, 50, 160)) if quick else ((77, 1050, 1056), (513, 3100, 96))
    counts = (1, 3, 64) if quick else (2, 5, 8, 16, 17, 31, 32, 33, 48, 64, 65)
    sizes = shapes[:1] if quick else ((3840, 3840), (1000, 992))
    few = [(M, *size) for M in counts for size in sizes]
    real = () if quick else (
        (1, 3072, 15360), (4096, 3072, 15360), (256, 10240, 3840), (4096, 13824, 5120),
    )  # fmt: skip
    yield from _matmul_checks(device, *tails, *few, *real)


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


def _int8_checks(device, quick: bool) -> Iterator[Check]:
    """Every step that makes rotated INT8, of inputs and of weights."""
    sizes = ((33, 256), (5, 96)) if quick else (
        (1, 3072), (77, 3840), (4096, 15360), (1000, 10240), (10240, 3840), (13824, 5120),
    )  # fmt: skip
    backend = named("int8")
    for M, K in sizes:
        problem = Problem(device, torch.bfloat16, "fast", shape=(M, K))
        for kind, steps in (("quantize", backend.quantizers), ("to", backend.preparers)):
            for step in steps:
                if step.unsupported_reason(problem) is None:
                    run = partial(_int8, device, M, K, step, kind == "to")
                    yield Check(f"{kind}_int8, {step.name}", (M, K), run)


def _int8(device, M: int, K: int, step: Step, stored: bool) -> str | None:
    """The oracle's first and last rows but for ties: sums are in another order."""
    x = numbers(device, M, K, seed=M, dtype=torch.float32)
    x *= torch.exp2(numbers(device, M, 1, seed=M + 1, scale=3.0, dtype=torch.float32))
    if device.type == "cuda":  # CPUs rotate bfloat16 in bfloat16
        x = x.bfloat16()
    given = kernels.quantize(x) if stored else (x,)
    poison(device, M * K, 4 * M)
    codes, scale = step.run(*given)
    for r0, r1 in _slabs(M):
        value = exact_weight(*given)[r0:r1] if stored else x[r0:r1]
        expected, wanted = (t.to(device) for t in reference.quantize_rotated_int8(value))
        off = (codes[r0:r1].int() - expected.int()).abs()
        if off.max() > 1 or off.double().mean() > 1e-3:
            return f"codes are up to {int(off.max())} off, {off.double().mean():.1e} on average"
        if not torch.allclose(scale[r0:r1], wanted, rtol=1e-5, atol=0):
            return "scales are off"
    return None


def _matmul_checks(device, *problems: tuple[int, int, int]) -> Iterator[Check]:
    """Every backend that takes a problem; a bias where M is odd."""
    for M, N, K in problems:
        for method in ours(device, M, (N, K))[0]:
            form = method.path.input_form or (method.form if method.precision == "fast" else None)
            name = f"{_KINDS[form]} matmul, {method.name}"
            for dtype in _ROUNDED:
                if dtype == torch.bfloat16 or (form is None and method.form == "stored"):
                    run = partial(_matmul, device, M, N, K, method, form, dtype)
                    yield Check(name, (M, N, K), run)
                if form == "mxfp8" and M * N < 1 << 16:
                    run = partial(_within_bound, device, M, N, K, method.backend.matmul, dtype)
                    yield Check(f"{name}, every value", (M, N, K), run)


def _matmul(device, M: int, N: int, K: int, method: Method, form, dtype) -> str | None:
    """The matmul alone, against float64 on the same operands."""
    x = numbers(device, M, K, seed=M, dtype=dtype)
    bias = numbers(device, N, seed=3, dtype=dtype) if M % 2 else None
    codes = kernels.quantize(weight(device, N, K, seed=M + 1))
    prepared = kernels.prepare_weight(method.path, *codes)
    given = kernels.quantize_input(method.path, x)
    inside = method.path.quantizer is None and method.precision == "fast"
    taken = _value((reference.rotate(x),) if inside else given)[:M]
    expected = taken @ _value(prepared)[:N, : taken.shape[1]].t()
    if bias is not None:
        expected += bias.double()

    def run():
        return method.backend.matmul(given, prepared, bias, dtype, N)[:M]

    return _twice(device, run, expected, _OTHERWISE if inside else _bound(form, K, dtype))


def _bound(form: str | None, K: int, dtype: torch.dtype) -> float:
    """The rounding of the result, and what the sums lose.

    Blackwell keeps 25 bits of each term. Hopper truncates a sum of E4M3 products to 14 bits, once
    for every 32: half of the last bit for each of these.
    """
    lost = {"mxfp8": 2.0**-24, "rowwise_fp8": 2.0**-15}.get(form, 0.0)
    return _ROUNDED[dtype] + K / 32 * lost


def _value(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A quantized matrix, or a plain one, in float64."""
    if len(tensors) == 1:
        return tensors[0].double()
    code, scale = tensors
    return exact_weight(code, scale) if scale.ndim == 2 else code.double() * scale.double()[:, None]


def _twice(device, run: Callable[[], torch.Tensor], expected, bound: float) -> str | None:
    outputs = []
    for _ in range(2):
        poison(device, expected.numel() * 2)
        outputs.append(run())
    wrong = close(outputs[0], expected, bound)
    if wrong is None and not torch.equal(*outputs):
        wrong = "two runs on the same inputs differ"
    return wrong


def _error_checks(device, quick: bool) -> Iterator[Check]:
    M, N, K = (70, 96, 256) if quick else (1024, 3840, 3840)
    for method in ours(device, M, (N, K))[0]:
        if method.precision == "fast":
            for kind in ("normal", "heavy-tailed", "column outliers"):
                run = partial(_against_native, device, M, N, K, kind, method)
                name = f"{method.name} against native MX x MX, {kind} activations"
                yield Check(name, (M, N, K), run)


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
    plain = Weight(weight(device, N, K, 9))
    stored = exact_weight(*plain.codes)
    expected = x.double() @ stored.t()
    native = relative(exact_weight(*eager.quantize(x))[:M] @ stored.t(), expected)
    out = method.run(x, plain.form(method), None)
    error = relative(out, expected)
    return None if error <= 1.02 * native else f"error {error:.3e}, native {native:.3e}"
