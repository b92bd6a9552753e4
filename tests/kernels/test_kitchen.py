"""comfy-kitchen's kernels: numbers by its functions in plain torch, and where compiled ones run."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.backends.eager.quantization import quantize_int8_rowwise
from comfyui import fetch_package

from mxfp8.kernels import layout, records, self_test
from mxfp8.kernels.backends import kitchen, reference
from mxfp8.kernels.records import Problem

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "mocked_card.py"
VERSIONS = ("0.2.8", "0.2.17", "0.2.40")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


oracle = functools.partial(reference.matmul, "rotated_int8", "rotated_int8")


def error(actual, expected) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def by_eager():
    with comfy_kitchen.use_backend("eager"):
        yield


# ---- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("slab", [1 << 24, 128 * 512])
@pytest.mark.parametrize("rows", [96, 300])
def test_weights_are_prepared_as_by_the_oracle(rows, slab, by_eager, monkeypatch):
    monkeypatch.setattr(kitchen, "_SLAB", slab)
    weight = normal(rows, 512) * torch.exp2(torch.arange(rows) % 40 - 20.0)[:, None]
    weight[1] = 0
    stored = reference.quantize(weight)
    codes, scale = kitchen.prepare_weight(*stored)
    expected, expected_scale = reference.to_rotated_int8(*stored)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    different = (codes.int() - expected.int()).abs()
    assert different.max() <= 1 and different.float().mean() < 1e-4  # ties


def test_a_kernel_that_prepares_weights_wrongly_is_found_out(by_eager, monkeypatch):
    (step,) = (step for step in records._WEIGHT_TO_INT8 if step.name == "kitchen")
    assert step.test(torch.device("cpu"), torch.bfloat16) is None
    registry = SimpleNamespace(get_implementation=lambda *_, **__: lambda w, _: as_on_cuda(w))
    monkeypatch.setattr(kitchen, "_registry", lambda: registry)
    assert step.test(torch.device("cpu"), torch.bfloat16) is None

    def unrotated(weight, group):
        return quantize_int8_rowwise(weight)

    registry.get_implementation = lambda *_, **__: unrotated
    assert step.test(torch.device("cpu"), torch.bfloat16) == "it prepares weights wrongly"


def test_weights_may_be_stored_without_padding(by_eager):
    qdata, scale = reference.quantize(normal(65, 256))
    whole = kitchen.prepare_weight(qdata, scale)
    cut = kitchen.prepare_weight(qdata[:65], scale)
    assert all(torch.equal(a, b[:65]) for a, b in zip(cut, whole, strict=True))


@pytest.mark.parametrize("on_cuda", [False, True])
def test_nan_and_overflow_in_a_weight_make_their_rows_nan(on_cuda, by_eager, monkeypatch):
    if on_cuda:  # where they would come out finite
        registry = SimpleNamespace(get_implementation=lambda *_, **__: lambda w, _: as_on_cuda(w))
        monkeypatch.setattr(kitchen, "_registry", lambda: registry)
    qdata, scale = reference.quantize(normal(32, 256))
    qdata.view(torch.uint8)[3, 7] = 0x7F
    row_major = layout.untile(scale, 32, 8)
    row_major[5, 2] = 0xFF
    row_major[9] = 254  # values up to 448 * 2**127
    _, row_scale = kitchen.prepare_weight(qdata, layout.tile(row_major))
    assert row_scale.isnan().nonzero().flatten().tolist() == [3, 5, 9]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("M", [0, 1, 5, 70])
def test_the_product_is_the_oracle_s(M, dtype, by_eager):
    x, bias = normal(M, 512, seed=1).to(dtype), normal(90, seed=2).to(dtype)
    prepared = reference.to_rotated_int8(*reference.quantize(normal(90, 512)))
    out = kitchen.matmul((x,), prepared, bias, dtype, 90)
    assert out.shape == (M, 90) and out.dtype == dtype
    if M:
        quantized = reference.quantize_rotated_int8(x)
        expected = oracle(quantized, prepared, bias, torch.float64, 90)
        bound = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
        assert error(out, expected) < bound
        without = kitchen.matmul((x,), prepared, None, dtype, 90)
        assert error(without, expected - bias.double()) < bound


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("shape", [(64, 256), (33, 70), (1, 32)])
def test_mxfp8_inputs_have_the_bits_of_the_oracle(shape, dtype, by_eager, monkeypatch):
    quantize = comfy_kitchen.quantize_mxfp8

    def contiguous_only(x, pad_32x):  # as the compiled kernel
        assert x.is_contiguous()
        return quantize(x, pad_32x)

    monkeypatch.setattr(comfy_kitchen, "quantize_mxfp8", contiguous_only)
    x = normal(*shape).to(dtype)
    x[0, :32] = 0
    for source in (x, x.t().contiguous().t()):
        got = kitchen.quantize_mxfp8(source)
        for part, expected in zip(got, reference.quantize(x), strict=True):
            assert part.shape == expected.shape and part.dtype == expected.dtype
            assert torch.equal(part.view(torch.uint8), expected.view(torch.uint8))


def as_on_cuda(x):
    """Its CUDA quantizer (int8_linear.cu, quantize_int8_rowwise_convrot64_kernel) in torch."""
    value = reference.rotate(x).float()
    amax = value.abs().nan_to_num(nan=0, posinf=torch.inf).amax(-1, keepdim=True)
    amax = amax.clamp_max(torch.finfo(x.dtype).max)
    scale = (amax / 127).clamp_min(1e-30)
    quotient = (value.to(x.dtype).float() / scale.to(x.dtype).float()).to(x.dtype)
    code = quotient.float().nan_to_num(nan=-128).round().clamp(-128, 127).to(torch.int8)
    return code, scale


@pytest.mark.parametrize("K", [256, 3840])
def test_rounding_on_cuda_stays_within_what_self_tests_allow(K):
    weight, x = normal(96, K), normal(256, K, seed=1).bfloat16()
    prepared = reference.to_rotated_int8(*reference.quantize(weight))
    codes, scale = as_on_cuda(x)
    quantized_on_cuda = codes, scale.squeeze(-1)
    out, expected = (
        oracle(quantized, prepared, None, torch.float64, 96)
        for quantized in (quantized_on_cuda, reference.quantize_rotated_int8(x))
    )
    exact = x.double() @ reference.dequantize_exact(*reference.quantize(weight), 96, K).t()
    assert 7e-3 < error(out, expected) < 1e-2  # `self_test._EXACT`
    assert error(out, exact) < 1.08 * error(expected, exact)


def test_large_float16_values_do_not_overflow_on_cuda():
    x = torch.full((1, 256), 60000.0, dtype=torch.float16)  # rotated: 16 times as large
    codes, scale = as_on_cuda(x)
    assert scale.isfinite().all() and codes.max() == 127


def as_on_cuda_mxfp8(x):
    """Its CUDA quantizer (quantize_mxfp8.cu) in torch, for whole tiles."""
    blocks = x.float().unflatten(1, (-1, layout.BLOCK))
    ratio = blocks.abs().nan_to_num(nan=0, posinf=torch.inf).amax(-1) / 448
    mantissa, exponent = torch.frexp(ratio)  # rounded up to a power of two
    byte = (exponent - (mantissa == 0.5).int() + 127).clamp(0, 254)
    byte = torch.where(ratio == 0, 0, torch.where(ratio.isinf(), 254, byte)).to(torch.uint8)
    factor = ((254 - byte.int()) << 23).view(torch.float32)
    scaled = (blocks * factor[..., None]).nan_to_num(nan=-448).clamp(-448, 448)
    return scaled.flatten(1).to(torch.float8_e4m3fn), layout.tile(byte)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_its_mxfp8_on_cuda_passes_the_self_test(dtype):
    test = self_test.quantizer(as_on_cuda_mxfp8, tiny=False)
    assert test(torch.device("cpu"), dtype) is None
    # Tiny blocks get scale byte 0 there, which is the same value.
    x = (normal(32, 128) * 2.0**-130).bfloat16()
    got, expected = as_on_cuda_mxfp8(x), reference.quantize(x)
    assert got[1][:32].max() == 0 and expected[1][:32].max() == 1
    values = [reference.dequantize_exact(*stored, 32, 128) for stored in (got, expected)]
    assert error(*values) < 0.1


# ---- where it runs ---------------------------------------------------------------------------


@functools.cache
def reasons() -> dict[str, dict[str, dict[str, str | None]]]:
    """Version -> card -> problem -> why the compiled kernels do not take it."""
    here = Path(comfy_kitchen.__file__).parents[1]
    folders = {version: fetch_package("comfy-kitchen", version) for version in VERSIONS}
    folders["installed"] = here
    command = [sys.executable, SCRIPT, *folders.values()]
    path = os.pathsep.join(sys.path)
    output = subprocess.run(
        list(map(str, command)), env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = json.loads(output.splitlines()[-1])
    return {version: found[str(folder)] for version, folder in folders.items()}


INT8_VERSIONS = (*VERSIONS[1:], "installed")


@pytest.mark.slow
def test_it_needs_a_version_with_int8():
    for found in reasons()["0.2.8"].values():
        assert "0.2.15 or later; this is 0.2.8" in found["K = 3840"]
    assert reasons()["0.2.8"]["NVIDIA GeForce RTX 3090"]["mxfp8"] is None


@pytest.mark.slow
@pytest.mark.parametrize("version", INT8_VERSIONS)
def test_which_cards_it_runs_on(version):
    found = reasons()[version]
    takes = {card for card, reason in found.items() if reason["K = 3840"] is None}
    has_hip = version != "0.2.17"
    amd = {"AMD Radeon RX 7900 XTX"} if has_hip else set()
    assert takes == {"NVIDIA GeForce RTX 2060", "NVIDIA GeForce RTX 3090"} | amd
    expected = {
        "Tesla V100": "capability 7.5; this one has 7.0",
        "NVIDIA GeForce GTX 1660 Ti": "GTX 1660 Ti has none",
        "NVIDIA A100, cu128": "a torch for CUDA 13 (cu130); this one is for CUDA 12.8",
        "AMD Radeon RX 6800": "no int8_linear; this is gfx1030" if has_hip else "has none",
        "AMD Instinct MI300X": "gfx942" if has_hip else "0.2.17 has none",
    }
    for card, words in expected.items():
        assert words in found[card]["K = 3840"], card
    if has_hip:
        assert "float16" in found["AMD Radeon RX 7900 XTX"]["float16"]
    assert found["NVIDIA GeForce RTX 3090"]["float16"] is None


@pytest.mark.slow
@pytest.mark.parametrize("version", INT8_VERSIONS)
def test_which_inputs_it_quantizes_in_one_pass(version):
    found = reasons()[version]

    def taken(card):
        return [K for K in (384, 3840, 4096, 10240, 16640) if found[card][f"K = {K}"] is None]

    assert taken("NVIDIA GeForce RTX 3090") == [3840, 4096, 10240]
    turing = [3840, 4096] if version == "0.2.40" else [3840]  # whose blocks became smaller
    assert taken("NVIDIA GeForce RTX 2060") == turing
    assert "K is 384" in found["NVIDIA GeForce RTX 3090"]["K = 384"]


@pytest.fixture
def importing(monkeypatch):
    """importing(error): importing comfy-kitchen raises it."""

    def fail(error):
        def import_module(name):
            raise error

        monkeypatch.setattr(kitchen, "import_module", import_module)

    kitchen._import_error.cache_clear()
    yield fail
    kitchen._import_error.cache_clear()


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (ModuleNotFoundError(name="comfy_kitchen"), "pip install comfy-kitchen"),
        (ModuleNotFoundError("no x", name="x"), "does not import here (ModuleNotFoundError: no x)"),
        (OSError("cublas"), "does not import here (OSError: cublas)"),
    ],
)
def test_why_it_does_not_import_is_kept(failure, words, importing):
    problem = Problem(torch.device("cuda", 0), torch.bfloat16)
    importing(failure)
    for reason in (kitchen.unsupported_reason, kitchen.quantize_mxfp8_unsupported_reason):
        assert words in reason(problem)
    importing(AssertionError("asked twice"))
    assert words in kitchen.unsupported_reason(problem)


def test_no_memory_to_import_it_is_not_a_verdict(importing):
    problem = Problem(torch.device("cuda", 0), torch.bfloat16)
    importing(MemoryError())
    with pytest.raises(MemoryError):
        kitchen.unsupported_reason(problem)
    importing(ModuleNotFoundError(name="comfy_kitchen"))
    assert "pip install" in kitchen.unsupported_reason(problem)
