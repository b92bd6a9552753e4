"""Linears in Triton: exact ones for few rows, and row-wise scaling with its FP8 matmul."""

from __future__ import annotations

import re

import pytest
import torch
from arithmetic import all_magnitudes

from mxfp8.kernels import device_facts, dispatch, layout, records, self_test
from mxfp8.kernels.backends import fp8_rowwise, reference
from mxfp8.kernels.backends.triton import exact, gemm, rowwise, w8a16

DTYPES = (torch.float16, torch.bfloat16)
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
# Of a sum, as a share of the sum of its terms' sizes: float32; FP8 tensor cores add with 14 bits.
SUMMING, SUMMING_FP8 = 2.0**-20, 2.0**-12


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stored_weight(rows, cols, seed=0):
    spread = torch.exp2(normal(rows, 1, seed=seed + 1) * 3)
    return reference.quantize(normal(rows, cols, seed=seed) * spread * cols**-0.5)


def close(actual, x, weight, bias, dtype, summing=SUMMING) -> bool:
    """Whether this is x [M, K] @ weight [N, K].T + bias, rounded once, sums as exact as stated."""
    x, weight = x.cpu().double(), weight.cpu().double()
    bias = 0.0 if bias is None else bias.cpu().double()
    expected, size = x @ weight.t() + bias, x.abs() @ weight.abs().t()
    smallest = torch.finfo(dtype).smallest_normal  # below, a rounding is a share of this
    allowed = expected.abs().clamp_min(smallest) * ROUNDING[dtype] + size * summing
    return actual.dtype == dtype and bool(
        ((actual.cpu().double() - expected).abs() <= allowed).all()
    )


def plain(stored, rows, cols):
    return reference.dequantize_exact(*stored, rows, cols)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(1, 33, 100), (1, 256, 512), (1, 8, 1057), (2, 70, 130), (17, 64, 256), (33, 40, 31),
     (64, 129, 384)],
)  # fmt: skip
def test_few_rows_are_exact(M, N, K, dtype, bias, decoding, device):
    stored = [part.to(device) for part in stored_weight(N, K)]
    x, b = normal(M, K, seed=7, dtype=dtype), normal(N, seed=8, dtype=dtype) if bias else None
    on_device = None if b is None else b.to(device)
    actual = w8a16.linear(x.to(device), *stored, on_device, N, K)
    weight = plain(stored, N, K)
    if M > 1:  # on tensor cores, float16 rounds what lies below 2**-14
        weight = weight.to(dtype)
    assert close(actual, x, weight, b, dtype)


def test_few_rows_are_exact_in_the_tiles_of_rdna(device, monkeypatch):
    monkeypatch.setattr(w8a16, "architecture", lambda _: "gfx1100")
    stored = [part.to(device) for part in stored_weight(70, 224)]
    for M in (2, 17, 33):
        x = normal(M, 224, seed=7).half()
        actual = w8a16.linear(x.to(device), *stored, None, 70, 224)
        assert close(actual, x, plain(stored, 70, 224).half(), None, torch.float16)


def test_few_rows_take_rows_of_a_larger_tensor_and_rows_stored_without_padding(device):
    qdata, scale = stored_weight(33, 96)
    stored = qdata[:33].contiguous().to(device), scale.to(device)
    for x in (normal(5, 200)[:, 7:103], normal(96, 5).t(), normal(10, 96)[::2]):
        x = x.half().to(device)
        actual = w8a16.linear(x, *stored, None, 33, 96)
        assert close(actual, x, plain((qdata, scale), 33, 96), None, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
def test_many_rows_are_exact(dtype, device):
    stored = [part.to(device) for part in stored_weight(70, 96)]
    x = normal(100, 96, dtype=dtype)
    actual = exact.unpacking((x.to(device),), stored, None, dtype, 70)
    assert close(actual, x, plain(stored, 70, 96), None, dtype)


def equal(actual, expected) -> bool:
    """Equal codes and equal scales, NaN included."""
    codes, scales = zip(actual, expected, strict=True)
    return torch.equal(*(c.cpu().view(torch.uint8) for c in codes)) and torch.equal(
        *(s.cpu().nan_to_num(-1.0) for s in scales)
    )


@pytest.mark.parametrize("shape", [(32, 32), (70, 130), (257, 2080), (96, 1)])
def test_a_rowwise_weight_has_the_bits_of_the_oracle(shape, decoding, device):
    rows, cols = shape
    spread = torch.exp2(normal(rows, -(-cols // 32), seed=3) * 8).repeat_interleave(32, 1)
    qdata, scale = reference.quantize(normal(rows, cols) * spread[:, :cols])
    byte = layout.untile(scale, qdata.shape[0], qdata.shape[1] // 32).clone()
    byte[0, 0], byte[1], byte[2, -1] = layout.E8M0_NAN, 0, layout.E8M0_MAX
    code = qdata.view(torch.uint8).clone()
    code[3, :5], code[4, 0] = 0x7F, 0xFF
    stored = code.view(torch.float8_e4m3fn), layout.tile(byte)
    padding = layout.untile(stored[1], *stored[1].shape).clone()
    padding[:, byte.shape[1] :] = 200  # which no one reads
    stored = stored[0], layout.tile(padding)
    on_device = [part.to(device) for part in stored]
    assert equal(rowwise.to_rowwise(*on_device), reference.to_rowwise(*stored))
    assert equal(rowwise.to_rowwise_fnuz(*on_device), reference.to_rowwise_fnuz(*stored))
    assert equal(fp8_rowwise.to_rowwise(*stored), reference.to_rowwise(*stored))


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
@pytest.mark.parametrize("shape", [(1, 1), (33, 100), (9, 4095), (5, 15360)])
def test_a_rowwise_input_has_the_bits_of_the_oracle(shape, dtype, decoding, device):
    x = all_magnitudes(*shape, dtype)
    assert equal(rowwise.quantize_rowwise(x.to(device)), reference.quantize_rowwise(x))
    assert equal(rowwise.quantize_rowwise_fnuz(x.to(device)), reference.quantize_rowwise_fnuz(x))
    assert equal(fp8_rowwise.quantize_rowwise(x), reference.quantize_rowwise(x))


def test_every_code_is_the_same_value_in_the_form_of_mi300(decoding, device):
    """With any scale; -0 becomes 0, and both NaNs the one that E4M3fnuz has."""
    code = torch.arange(256, dtype=torch.uint8).repeat(32, 1).view(torch.float8_e4m3fn)
    scale = layout.tile(torch.arange(100, 132, dtype=torch.uint8)[:, None].repeat(1, 8))
    codes, row_scale = rowwise.to_rowwise_fnuz(code.to(device), scale.to(device))
    assert codes.dtype == torch.float8_e4m3fnuz
    value = codes.cpu().float() * row_scale.cpu()[:, None]
    expected = reference.dequantize(code, scale, torch.float32, 32, 256)
    torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)
    assert not torch.signbit(value[:, 0x80]).any()


def check_matmul(M, N, K, dtype, bias, columns, device):
    """A scaled matmul, rows and columns of all magnitudes, is that of its operands."""
    a, a_scale = reference.quantize_rowwise(normal(M, K, seed=1))
    b, b_scale = reference.to_rowwise(*stored_weight(N, K, seed=2))
    a_scale = a_scale * torch.exp2(normal(M, seed=3) * 4)
    added = normal(columns, seed=4, dtype=dtype) if bias else None
    parts = [t.to(device) for t in (a, a_scale, b.contiguous(), b_scale)]
    on_device = None if added is None else added.to(device)
    actual = gemm.matmul(*parts, on_device, dtype, columns)
    x = a.double() * a_scale.double()[:, None]
    weight = (b.double() * b_scale.double()[:, None])[:columns]
    summing = SUMMING if device_facts.interpreted() else SUMMING_FP8
    assert close(actual, x, weight, added, dtype, summing)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(
    ("M", "N", "K", "columns"),
    [(1, 32, 32, 32), (70, 160, 96, 160), (200, 96, 320, 70), (130, 288, 128, 288)],
)
@pytest.mark.parametrize(("dtype", "bias"), [(torch.bfloat16, True), (torch.float32, False)])
def test_the_fp8_matmul_is_that_of_its_operands(
    M, N, K, columns, dtype, bias, tma, device, monkeypatch
):
    if device_facts.interpreted():
        monkeypatch.setattr(gemm, "architecture", lambda _: 90 if tma else 89)
    elif tma != (device_facts.capability(device)[0] == 9):
        pytest.skip("tiles by TMA need compute capability 9, by copies another")
    check_matmul(M, N, K, dtype, bias, columns, device)


def test_several_programs_and_groups_of_tiles_cover_the_output(device, monkeypatch):
    if device_facts.interpreted():
        monkeypatch.setattr(gemm, "architecture", lambda _: 89)
        monkeypatch.setattr(gemm, "multiprocessors", lambda _: 3)
    check_matmul(1300, 544, 64, torch.float32, True, 544, device)


# Of what Triton does: the verdicts that decide whether it is used on this device.
TESTS = {
    f"{form} {kind}": step.test
    for form, kind, steps in (
        ("mxfp8", "weight", records.QUANTIZERS),
        ("stored", "weight", records.DEQUANTIZERS),
        *((b.weight_form, "weight", b.preparers) for b in records.BACKENDS),
        *((b.input_form, "input", b.quantizers) for b in records.BACKENDS),
    )
    for step in steps
    if step.name == "triton"
}
NAMED = "triton_fnuz", "triton", "triton_w8a16", "triton_fp8", "triton_int8", "torch_int8"
TESTS |= {n: dispatch.named(n).test for n in NAMED}


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("name", TESTS)
def test_self_tests_pass(name, dtype, device):
    if name in NAMED and not device_facts.interpreted():
        reason = dispatch.named(name).unsupported_reason(records.Problem(device, dtype))
        if reason is not None:
            pytest.skip(reason)
    assert TESTS[name](device, dtype) is None


def test_self_tests_name_what_is_wrong(device, monkeypatch):
    test = dispatch.named("triton_w8a16").test
    right = w8a16.linear
    monkeypatch.setattr(w8a16, "linear", lambda *a: right(*a) * 1.1)
    reason = test(device, torch.bfloat16)
    assert re.fullmatch(r"with 1 rows, its result is (9\.\de-02|1\.0e-01) off", reason)
    monkeypatch.setattr(rowwise, "to_rowwise", fp8_rowwise.quantize_rowwise)
    prepares = TESTS["rowwise_fp8 weight"]
    reason, final = self_test.verdict("triton", prepares, device, torch.float32)
    assert reason.startswith("its self-test failed (TypeError: ") and final
