"""Rotated INT8 in Triton: the oracle's codes but for ties, and exact sums of them."""

from __future__ import annotations

import pytest
import torch
from arithmetic import all_magnitudes
from distributions import heavy, normal

from mxfp8.kernels import device_facts, layout
from mxfp8.kernels.backends import reference
from mxfp8.kernels.backends.triton import gemm, int8

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_codes(actual, value) -> None:
    """Those of rotated values, except where rounding in float32 decides a tie.

    A sum of 256 is 1e-6 off, or 1e-4 of a step.
    """
    codes, scale = [t.cpu() for t in actual]
    expected, expected_scale = reference.quantize_rotated_int8(value)
    assert codes.dtype == torch.int8 and codes.is_contiguous()
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0, equal_nan=True)
    off = codes != expected
    steps = (reference.rotate(value) / expected_scale.double()[:, None])[off].abs()
    assert (steps - steps.floor() - 0.5).abs().max() < 1e-3 if off.any() else True
    assert (codes.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", [heavy, "all magnitudes"])
@pytest.mark.parametrize("shape", [(9, 768), (3, 3840), (2, 15360), (3, 384), (9, 96), (7, 32)])
def test_an_input_has_the_codes_of_the_oracle(shape, kind, dtype, device):
    x = kind(*shape).to(dtype) if callable(kind) else all_magnitudes(*shape, dtype)
    check_codes(int8.quantize_input(x.to(device)), x)


def test_a_row_that_is_not_finite_is_nan_and_the_others_stay(device):
    x = normal(7, 512)
    x[1, 5], x[2, 300], x[3, 511], x[4] = torch.nan, torch.inf, -torch.inf, 0
    x[5, 256:] = 3e38 * reference.hadamard(256)[3].sign()  # overflows when rotated
    x[6] = 3e38  # does not, though the sum of a group would
    codes, scale = int8.quantize_input(x.to(device))
    assert scale.isnan().tolist() == [False, True, True, True, False, True, False]
    assert not codes[1:6].any()
    check_codes((codes, scale), x)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_largest_float16_does_not_overflow(dtype, device):
    x = torch.full((3, 512), 65504.0)
    x[1] = 65504 * normal(512).sign()
    x[2, 256:] = 65504 * reference.hadamard(256)[3].sign()
    codes, scale = int8.quantize_input(x.to(dtype).to(device))
    check_codes((codes, scale), x.to(dtype))
    assert scale[2] > 65504 * 15 / 127


def test_an_input_may_have_any_strides(device):
    x = normal(20, 768).bfloat16()
    wide = torch.zeros(40, 900, dtype=x.dtype)
    wide[::2, 77:845] = x
    for strided in (wide[::2, 77:845], x.t().contiguous().t()):
        check_codes(int8.quantize_input(strided.to(device)), x)


def blocks_of_all_scales(N, K, seed=0):
    """Blocks from E8M0's smallest scale on, in each row 64 powers of two wide."""
    powers = torch.arange(N * K // 32).view(N, K // 32) % 64 + torch.arange(N)[:, None] - 130
    return normal(N, K) * torch.exp2(powers.float()).repeat_interleave(32, 1)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((32, 32), normal),
        ((130, 96), blocks_of_all_scales),
        ((3, 384), blocks_of_all_scales),
        ((3, 768), blocks_of_all_scales),
        ((3, 15360), heavy),
    ],
)
def test_a_weight_has_the_codes_of_the_oracle(shape, kind, decoding, device):
    qdata, scale = reference.quantize(kind(*shape))
    byte = layout.untile(scale, *scale.shape).clone()
    byte[1, 0] = layout.E8M0_NAN
    byte[:, shape[1] // 32 :] = 200  # which no one reads
    code = qdata.view(torch.uint8).clone()
    code[2, 5] = 0xFF
    stored = code.view(torch.float8_e4m3fn), layout.tile(byte)
    prepared = int8.prepare_weight(*(part.to(device) for part in stored))
    check_codes(prepared, reference.dequantize_exact(*stored, *stored[0].shape))
    assert prepared[1].isnan().nonzero().flatten().tolist() == [1, 2]


def test_rows_may_be_stored_without_padding(device):
    qdata, scale = reference.quantize(normal(33, 256))
    actual = int8.prepare_weight(qdata[:33].contiguous().to(device), scale.to(device))
    check_codes(actual, reference.dequantize_exact(qdata, scale, 33, 256))


def operands(M, N, K):
    """Codes of any size with scales of many, of x and of W."""
    pair = []
    for rows, seed, unit in ((M, 1, 2.0**-14), (N, 2, 1.0)):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(-127, 128, (rows, K), dtype=torch.int8, generator=generator)
        pair.append((codes, torch.exp2(2 * normal(rows, seed=seed)) * unit))
    return pair


def check_matmul(matmul, M, N, K, dtype, columns, bias, device) -> None:
    """Sums are exact; scaled and added to in float32, to 2**-24 each, and rounded once."""
    pair = operands(M, N, K)
    added = normal(columns, seed=3).to(dtype) if bias else None
    on_device = [tuple(t.to(device) for t in tensors) for tensors in pair]
    out = matmul(*on_device, None if added is None else added.to(device), dtype, columns)
    assert out.shape == (M, columns) and out.dtype == dtype
    (x, x_scale), (weight, weight_scale) = pair
    size = (x.long() @ weight.long().t()) * x_scale.double()[:, None] * weight_scale.double()
    size = size[:, :columns]
    expected = size if added is None else size + added.double()
    smallest = torch.finfo(dtype).smallest_normal
    bound = 2.0**-22 * (size.abs() + expected.abs())
    bound += torch.finfo(dtype).eps / 2 * expected.abs().clamp_min(smallest)
    assert ((out.cpu() - expected).abs() <= bound).all()


MATMULS = {"triton": int8.matmul, "torch": int8.matmul_by_torch}


@pytest.mark.parametrize("matmul", MATMULS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("M", "N", "K", "columns"),
    [(1, 32, 32, 32), (70, 160, 96, 160), (200, 96, 320, 70), (130, 257, 4096, 257), (3, 9, 64, 1)],
)
def test_sums_are_exact_and_rounded_once(M, N, K, columns, bias, dtype, matmul, device):
    check_matmul(MATMULS[matmul], M, N, K, dtype, columns, bias, device)


@pytest.mark.parametrize("M", [1, 17, 40])
def test_torch_multiplies_matrices_that_are_padded_as_it_needs_them(M, device, monkeypatch):
    """More than 16 rows, and N in multiples of 8, on Turing of 32."""
    multiply = torch._int_mm

    def int_mm(a, b):
        assert a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[1] % 32 == 0
        return multiply(a, b)

    monkeypatch.setattr(torch, "_int_mm", int_mm)
    check_matmul(int8.matmul_by_torch, M, 41, 64, torch.bfloat16, 41, True, device)


@pytest.mark.parametrize("arch", [80, 90, "gfx942", "gfx1100"])
def test_tiles_of_every_gpu_cover_the_output(arch, device, monkeypatch):
    if not device_facts.interpreted():
        pytest.skip("tiles of other GPUs run in the interpreter")
    monkeypatch.setattr(gemm, "architecture", lambda _: arch)
    monkeypatch.setattr(gemm, "multiprocessors", lambda _: 3)
    for M in (40, 150, 700):
        check_matmul(int8.matmul, M, 544, 96, torch.bfloat16, 540, True, device)


@pytest.mark.parametrize("shape", [(0, 64), (5, 0)])
def test_empty_matrices_are_no_trouble(shape, device):
    x = torch.zeros(shape, device=device)
    codes, scale = int8.quantize_input(x) if shape[1] else (x.to(torch.int8), x.new_ones(5))
    weight = torch.zeros(32, shape[1], dtype=torch.int8, device=device), x.new_ones(32)
    for matmul in MATMULS.values() if shape[1] else ():
        assert matmul((codes, scale), weight, None, torch.bfloat16, 32).shape == (shape[0], 32)
