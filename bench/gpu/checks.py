"""Is every kernel right at real shapes? Against the oracle and wide arithmetic on the device.

Casts, the fold and the token quantizer must give the bits of plain torch on the same device, on all
of a matrix, and of the oracle (`kernels/reference.py`, on the CPU) on its first and last rows.
Products are held to float64 within a bound. Memory that results come to lie in is filled with NaN
before, every product is computed twice, and data are fresh for every check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from gpu.clock import reason
from gpu.paths import block_backends, exact_weight, fast_unsupported_reason, relative
from gpu.shapes import numbers, weight

from mxfp8 import kernels
from mxfp8.kernels import device_facts, layout
from mxfp8.kernels.backends import eager, fp8_rowwise, reference

_SLAB = 128  # rows that the oracle does at either end: a whole tile of scales
_EXACT = {torch.bfloat16: 2.5e-3, torch.float16: 5e-4}  # roundings are 2**-9 and 2**-12


@dataclass(frozen=True)
class Check:
    """`run` returns what is wrong, or None."""

    name: str
    shape: tuple[int, ...]
    run: Callable[[], str | None]

    def result(self) -> dict:
        try:
            wrong = self.run()
        except Exception as error:  # the other checks shall still be made
            wrong = reason(error)
        return {"check": self.name, "shape": list(self.shape), "wrong": wrong}


def same_bits(found: torch.Tensor, wanted: torch.Tensor) -> str | None:
    """What differs, or None; one NaN is as good as another."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}"
    found = found.to(wanted.device)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[wanted.element_size()]
    different = found.view(bits) != wanted.view(bits)
    if wanted.dtype.is_floating_point and wanted.element_size() > 1:
        different &= ~(found.isnan() & wanted.isnan())
    if not different.any():
        return None
    first = different.nonzero()[0].tolist()
    values = [t.view(bits)[tuple(first)].item() for t in (found, wanted)]
    return f"{int(different.sum())} differ, the first at {first}: bits {values[0]}, not {values[1]}"


def close(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> str | None:
    """What is wrong with an output, given in float64 what is wanted, or None.

    `bound` is of the relative norm of the error. A single value may be 8 of it off, in units of
    the outputs' root mean square: a misplaced or missing one is one such unit off.
    """
    if not found.isfinite().all():
        first = (~found.isfinite()).nonzero()[0].tolist()
        return f"{int((~found.isfinite()).sum())} not finite, the first at {first}"
    off = (found.double() - wanted).abs()
    allowed = 2.0**-8 * wanted.abs() + 8 * bound * wanted.square().mean().sqrt()
    error = relative(found, wanted)
    if error > bound:
        return f"relative error {error:.2e}, over {bound:.1e}"
    if (off > allowed).any():
        first = (off > allowed).nonzero()[0].tolist()
        values = found[tuple(first)].item(), wanted[tuple(first)].item()
        return f"{int((off > allowed).sum())} far off, the first at {first}: {values}"
    return None


def poison(device: torch.device, *sizes: int) -> None:
    """Leave NaN, in every type, in the memory that results of these bytes come to lie in."""
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
    """All of them, those of casts first."""
    for at, (N, K) in enumerate(shapes):
        dtypes = (torch.bfloat16, torch.float16, torch.float32) if at < 2 else (torch.bfloat16,)
        for dtype in dtypes:
            kind = str(dtype).removeprefix("torch.")
            yield Check(f"dequantize to {kind}", (N, K), partial(_dequantize, device, N, K, dtype))
            yield Check(f"quantize {kind}", (N, K), partial(_quantize, device, N, K, dtype))
        if fast_unsupported_reason(device) is None:
            yield Check("to_rowwise", (N, K), partial(_fold, device, N, K))
    yield from _tokens_checks(device, quick)
    yield from _exact_checks(device, quick)
    if fast_unsupported_reason(device) is None:
        yield from _fast_checks(device, quick)
    yield from _block_checks(device, quick)


def _slabs(rows: int) -> list[tuple[int, int]]:
    """The first rows and the last, each from where a tile of scales begins."""
    return [(0, min(rows, _SLAB)), ((rows - 1) // _SLAB * _SLAB, rows)]


def _dequantize(device, N: int, K: int, dtype) -> str | None:
    code = _random_bytes(device, N, K).view(torch.float8_e4m3fn)
    scale = _random_bytes(device, *layout.scale_shape(N, K), seed=1)
    wanted = eager.dequantize(code, scale, dtype, N, K)
    poison(device, wanted.nbytes)
    found = kernels.dequantize(code, scale, dtype)
    wrong = same_bits(found, wanted)
    for r0, r1 in _slabs(N):
        oracle = reference.dequantize(code[r0:r1].cpu(), scale[r0:].cpu(), dtype, r1 - r0, K)
        wrong = wrong or same_bits(found[r0:r1].cpu(), oracle)
    return wrong


def _quantize(device, N: int, K: int, dtype) -> str | None:
    x = hard_values(device, N, K, dtype)
    wanted = eager.quantize(x)
    poison(device, *(t.nbytes for t in wanted))
    found = kernels.quantize(x)
    wrong = next(filter(None, map(same_bits, found, wanted)), None)
    for r0, r1 in _slabs(N):
        oracle = reference.quantize(x[r0:r1].cpu())
        scale = found[1][r0 : layout.round_up(r1, layout.TILE_ROWS)]
        wrong = wrong or same_bits(found[0][r0:r1].cpu(), oracle[0][: r1 - r0])
        wrong = wrong or same_bits(scale.cpu(), oracle[1])
    return wrong


def _fold(device, N: int, K: int) -> str | None:
    code = _random_bytes(device, N, K).view(torch.float8_e4m3fn)
    scale = _random_bytes(device, *layout.scale_shape(N, K), seed=1)
    scale[: layout.TILE_ROWS] = scale[: layout.TILE_ROWS].remainder(24) + 100  # as weights have it
    wanted = fp8_rowwise.to_rowwise_eager(code, scale)
    poison(device, *(t.nbytes for t in wanted))
    found = fp8_rowwise.to_rowwise(code, scale)
    wrong = next(filter(None, map(same_bits, found, wanted)), None)
    for r0, r1 in _slabs(N):
        oracle = reference.to_rowwise(code[r0:r1].cpu(), scale[r0:].cpu())
        wrong = wrong or same_bits(found[0][r0:r1].cpu(), oracle[0])
        wrong = wrong or same_bits(found[1][r0:r1].cpu(), oracle[1])
    return wrong


def _tokens_checks(device, quick: bool) -> Iterator[Check]:
    sizes = ((1, 96), (33, 100)) if quick else (
        (1, 3072), (77, 3840), (4096, 3072), (4096, 15360), (1000, 10240), (333, 1000), (64, 13824),
    )  # fmt: skip
    for at, (M, K) in enumerate(sizes):
        dtypes = (torch.bfloat16, torch.float16, torch.float32) if at < 2 else (torch.bfloat16,)
        for dtype in dtypes:
            kind = str(dtype).removeprefix("torch.")
            yield Check(f"quantize_rowwise {kind}", (M, K), partial(_tokens, device, M, K, dtype))


def _tokens(device, M: int, K: int, dtype) -> str | None:
    x = hard_values(device, M, K, dtype)
    wanted = fp8_rowwise.quantize_rowwise_eager(x)
    poison(device, *(t.nbytes for t in wanted))
    found = fp8_rowwise.quantize_rowwise(x)
    wrong = next(filter(None, map(same_bits, found, wanted)), None)
    oracle = reference.quantize_rowwise(x[:_SLAB].cpu())
    for got, bits in zip(found, oracle, strict=True):
        wrong = wrong or same_bits(got[:_SLAB].cpu(), bits)
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
    wanted = x.double() @ exact_weight(qdata, scale)[:N, :K].t()
    if biased:
        wanted += bias.double()

    def run():
        return kernels.linear(x, qdata, scale, bias, shape=(N, K), precision="exact")

    return _twice(device, run, wanted, _EXACT[dtype])


def _twice(device, run: Callable[[], torch.Tensor], wanted, bound: float) -> str | None:
    outputs = []
    for _ in range(2):
        poison(device, wanted.numel() * 2)
        outputs.append(run())
    wrong = close(outputs[0], wanted, bound)
    if wrong is None and not torch.equal(*outputs):
        wrong = "two runs on the same inputs differ"
    return wrong


def _fast_checks(device, quick: bool) -> Iterator[Check]:
    shapes = ((96, 256),) if quick else ((3840, 3840), (3072, 15360), (10240, 3840), (13824, 5120))
    products = {}
    if fp8_rowwise.torch_multiplies(device, torch.bfloat16):
        products["torch._scaled_mm"] = _by_torch
    if device_facts.triton_unsupported_reason() is None and (
        device.type == "cuda" or device_facts.interpreted()
    ):
        products["triton"] = _by_triton
    if device.type != "cuda":
        products["plain torch"] = fp8_rowwise.scaled_matmul
    for N, K in shapes:
        for M in (70,) if quick else (16, 65, 256, 1000, 4096):
            for name, product in products.items():
                yield Check(f"FP8 matmul, {name}", (M, N, K),
                            partial(_product, device, M, N, K, product, M != 256))  # fmt: skip
    if "triton" in products:  # K and columns that are no multiple of a tile
        for M, N, K in ((70, 96, 160),) if quick else ((77, 1056, 1056), (513, 3104, 96)):
            yield Check("FP8 matmul, triton, tails", (M, N, K),
                        partial(_product, device, M, N, K, _by_triton, True, 24))  # fmt: skip
    for kind in ("normal", "heavy-tailed", "column outliers"):
        M, N, K = (70, 96, 256) if quick else (1024, 3840, 3840)
        yield Check(f"fast against native MX x MX, {kind} activations", (M, N, K),
                    partial(_against_native, device, M, N, K, kind))  # fmt: skip


def _block_checks(device, quick: bool) -> Iterator[Check]:
    """Of every block-scaled matmul that runs here: with tails in M, N and K, and real shapes."""
    small = ((33, 70, 100), (70, 50, 160))
    large = () if quick else ((65, 3840, 3840), (1000, 10240, 3840), (4096, 3072, 15360))
    for name, matmul in block_backends(device)[0].items():
        for M, N, K in small:
            for dtype in (torch.bfloat16, torch.float16):
                yield Check(f"block matmul, {name}", (M, N, K),
                            partial(_bounded, device, M, N, K, matmul, dtype))  # fmt: skip
        for M, N, K in large:
            yield Check(f"block matmul, {name}", (M, N, K),
                        partial(_blocks, device, M, N, K, matmul))  # fmt: skip


def _bounded(device, M: int, N: int, K: int, matmul, dtype) -> str | None:
    """Every value within `reference.block_bound`, rows of all sizes."""
    x = numbers(device, M, K, seed=M, dtype=torch.float32)
    x *= torch.exp2(numbers(device, M, 1, seed=M + 1, scale=3.0, dtype=torch.float32))
    bias = numbers(device, N, seed=3, dtype=dtype)
    tokens, stored = reference.quantize(x.to(dtype)), reference.quantize(weight(device, N, K, M))
    poison(device, M * N * 2)
    found = matmul(tokens, stored, bias, dtype, M, N)
    if found.shape != (M, N) or found.dtype != dtype:
        return f"{found.dtype} {list(found.shape)}"
    wanted, allowed = reference.block_bound(tokens, stored, bias, dtype, M, N)
    off = (found.cpu().double() - wanted).abs()
    wrong = ~(off <= allowed)
    if not wrong.any():
        return None
    first = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{int(wrong.sum())} beyond the bound, the first at {list(first)}: "
        f"{off[first].item():.2e} off, allowed {allowed[first].item():.2e}"
    )


def _blocks(device, M: int, N: int, K: int, matmul) -> str | None:
    """Real sizes, against float64 on the same codes; tensor cores keep 25 bits beside the sum."""
    tokens = kernels.quantize(numbers(device, M, K, seed=M))
    stored = kernels.quantize(weight(device, N, K, seed=M + 1))
    wanted = exact_weight(*tokens)[:M] @ exact_weight(*stored)[:N].t()

    def run():
        return matmul(tokens, stored, None, torch.bfloat16, M, N)

    return _twice(device, run, wanted, 2.5e-3 + K / 32 * 2.0**-24)


def _by_torch(a, a_scale, b, b_scale, bias, dtype, columns):
    out = torch._scaled_mm(
        a, b.t(), scale_a=a_scale[:, None], scale_b=b_scale[None, :], bias=bias, out_dtype=dtype,
        use_fast_accum=True,
    )  # fmt: skip
    return out[:, :columns]


def _by_triton(*arguments):
    from mxfp8.kernels.backends.triton import fp8_gemm

    return fp8_gemm.matmul(*arguments)


def _product(device, M, N, K, product, biased: bool, padding: int = 0) -> str | None:
    """The FP8 matmul alone, against float64 on the same codes.

    Hopper keeps 14 bits of a sum and cuts the rest off, once for every 32 products: the bound has
    half of the last bit for each of these, and the rounding to BF16.
    """
    x, w = numbers(device, M, K, seed=M), weight(device, N, K, seed=M + 1)
    a, a_scale = fp8_rowwise.quantize_rowwise_eager(x)
    b, b_scale = fp8_rowwise.to_rowwise_eager(*eager.quantize(w))
    columns = N - padding
    bias = numbers(device, columns, seed=3) if biased else None
    wanted = (a.double() * a_scale.double()[:, None]) @ (b.double() * b_scale.double()[:, None]).t()
    wanted = wanted[:, :columns] + (bias.double() if biased else 0)

    def run():
        return product(a, a_scale, b, b_scale, bias, torch.bfloat16, columns)

    return _twice(device, run, wanted, 2.5e-3 + K / 32 * 2.0**-15)


def _against_native(device, M: int, N: int, K: int, kind: str) -> str | None:
    """The output's error must be no larger than that of activations in MXFP8, as Blackwell has it.

    Both against float64 with the stored weights; 2% for the draw of the numbers.
    """
    x = numbers(device, M, K, dtype=torch.float32)
    if kind == "heavy-tailed":
        x *= torch.exp2(numbers(device, M, K, seed=5, scale=1.5, dtype=torch.float32))
    elif kind == "column outliers":
        x[:, :: K // 8] *= 50
    x = x.bfloat16()
    qdata, scale = kernels.quantize(weight(device, N, K, 9))
    stored = exact_weight(qdata, scale)
    wanted = x.double() @ stored.t()
    native = relative(exact_weight(*eager.quantize(x))[:M] @ stored.t(), wanted)
    if device.type == "cuda":
        found = kernels.linear(x, qdata, scale, precision="fast")
    else:
        found = fp8_rowwise.linear(x, qdata, scale, None, N, K)
    error = relative(found, wanted)
    return None if error <= 1.02 * native else f"error {error:.3e}, native {native:.3e}"
