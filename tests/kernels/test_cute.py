"""The CuTe kernels without a GPU: compiled, inspected, and their PTX executed on the CPU.

`ptx_machine` executes it, instruction by instruction, by the PTX ISA. Whether a GPU does the same
is for the backend's self-test to find.
"""

from __future__ import annotations

import re
import subprocess
import sys
import types
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

from mxfp8 import kernels
from mxfp8.kernels import aot, device_facts, dispatch, layout, self_test
from mxfp8.kernels.backends import reference
from mxfp8.kernels.backends.cute import mx
from mxfp8.kernels.records import Problem

DEVICE = torch.device("cuda", 0)
LINEAR = Problem(DEVICE, torch.bfloat16, "fast")
DISASSEMBLED = ("sm_100a", "sm_120a")  # which the tools in Triton's wheel can read
BLOCKS_PER_SM = {"sm_100a": 2, "sm_120a": 1}
MATRIX = {"sm_100a": "UTCQMMA", "sm_103a": "UTCQMMA", "sm_120a": "QMMA", "sm_121a": "QMMA"}
REGISTERS = 65_536  # of an SM
RESERVED = 1_024  # bytes of shared memory that each block takes besides its own


@pytest.fixture
def dsl():
    """Skips without CuTe DSL; CI has it."""
    if mx.dsl_unsupported_reason() is not None:
        pytest.skip(mx.dsl_unsupported_reason())


@cache
def compiled(arch: str, dtype: torch.dtype = torch.bfloat16, bias: bool = True):
    return mx.compile_for(arch, dtype, bias)


def disassembled(cubin: bytes, folder: Path, option: str) -> str:
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], check=True, capture_output=True, text=True).stdout


def code_of(sass: str) -> Counter:
    """Instructions of machine code, each with how often it is there."""
    line = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)"
    return Counter(re.findall(line, sass, re.MULTILINE))


# ---- what was compiled ----------------------------------------------------------------------


@pytest.mark.parametrize("arch", MATRIX)
def test_every_matrix_instruction_applies_block_scales(arch, dsl, tmp_path):
    made = compiled(arch)
    names = re.findall(r"\b(?:mma|wgmma|tcgen05\.mma)\.[\w.:]+", made.ptx)
    assert len(names) == (4 if MATRIX[arch] == "UTCQMMA" else 64)
    assert all("kind::mxf8f6f4.block_scale.scale_vec::1X" in name for name in names)
    if arch in DISASSEMBLED:
        code = code_of(disassembled(made.cubin, tmp_path, "-sass"))
        assert {name.partition(".")[0] for name in code if "MMA" in name} == {MATRIX[arch]}


@pytest.mark.parametrize("arch", DISASSEMBLED)
def test_nothing_spills_and_the_blocks_fit_on_an_sm(arch, dsl, tmp_path):
    made = compiled(arch)
    code = code_of(disassembled(made.cubin, tmp_path, "-sass"))
    assert sum(code.values()) > 500
    assert not [name for name in code if name.startswith(("LDL", "STL"))]
    usage = disassembled(made.cubin, tmp_path, "-res-usage")
    registers, local = (int(re.search(rf"{n}:(\d+)", usage)[1]) for n in ("REG", "LOCAL"))
    assert local == 0
    blocks = BLOCKS_PER_SM[arch]
    assert blocks * made.threads * registers <= REGISTERS
    limit = aot.SHARED[int(arch[3:-1])]
    assert made.shared <= limit
    assert blocks * (made.shared + RESERVED) <= limit + RESERVED


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("arch", DISASSEMBLED)
def test_no_type_of_result_spills(arch, dtype, dsl, tmp_path):
    made = compiled(arch, dtype, dtype == torch.float16)
    assert "LOCAL:0" in disassembled(made.cubin, tmp_path, "-res-usage")
    code = code_of(disassembled(made.cubin, tmp_path, "-sass"))
    assert not [name for name in code if name.startswith(("LDL", "STL"))]


def test_datacenter_cards_fetch_by_their_memory_accelerator(dsl, tmp_path):
    code = code_of(disassembled(compiled("sm_100a").cubin, tmp_path, "-sass"))
    codes = sum(n for name, n in code.items() if name.startswith("UTMALDG"))
    scales = sum(n for name, n in code.items() if name.startswith("UBLKCP"))
    assert (codes, scales) == (2, 2)
    assert not [name for name in code if name.startswith("LDGSTS")]


def test_descriptors_are_those_of_the_librarys_own_atom(dsl, tmp_path):
    """Of matrices, scales and instructions: literals in its PTX, or the terms of a sum."""
    import cute_atom

    from mxfp8.kernels.backends.cute import sm100 as ours

    theirs = set(map(int, re.findall(r"\b\d{8,}\b", cute_atom.ptx(tmp_path))))
    assert ours.descriptor(1024, True) in theirs
    assert ours.descriptor(128, False) in theirs
    first = ours.instruction(0)
    assert first in theirs
    for block in (1, 2, 3):
        assert ours.instruction(block) - first in theirs
        assert ours.descriptor(1024, True) + block * 32 // 16 in theirs


def test_the_layouts_of_shared_memory(dsl):
    """On the host, by the functions that the kernel for GeForce computes its addresses with."""
    from mxfp8.kernels.backends.cute import sm120 as kernel

    words = [kernel.scale_word_at(row) for row in range(128)]
    tiled = layout.tile(torch.arange(512).reshape(128, 4)).reshape(512)
    for row, at in enumerate(words):
        assert tiled[at : at + 4].tolist() == [row * 4 + block for block in range(4)]
    at = [kernel.chunk_at(row, chunk) for row in range(128) for chunk in range(8)]
    assert sorted(at) == list(range(0, kernel.TILE * kernel.TILE, 16))
    for chunk in range(8):  # 8 rows that are read together: each in banks of its own
        assert len({kernel.chunk_at(row, chunk) % 128 for row in range(8)}) == 8
    for rows in (kernel.a_row, kernel.b_row):
        assert len({rows(lane) for lane in range(32)}) == 32


# ---- what its PTX computes ------------------------------------------------------------------


def problem(M, N, K, dtype, bias):
    """x and weight as they are stored, the weight's rows without padding; bias; the oracle's."""
    generator = torch.Generator().manual_seed(M + N + K)
    x, weight = (torch.randn(rows, K, generator=generator) for rows in (M, N))
    x[0, :32] *= 64
    x[M // 2] = 0
    quantized_input, stored = reference.quantize(x), reference.quantize(weight)
    added = torch.randn(N, generator=generator).to(dtype) if bias else None
    operands = quantized_input, stored, added if added is None else added.float()
    expected = reference.matmul("stored", "mxfp8", *operands, torch.float32, N)[:M]
    return quantized_input, (stored[0][:N], stored[1]), added, expected.double()


def run(ptx, arch, quantized_input, weight, bias, dtype, M, N, eager=False):
    """Every block of the grid, one after the other: [M, N] of `dtype`."""
    from ptx_machine import Block, Memory, TensorMap

    memory = Memory()
    out = torch.full((M, N), torch.nan, dtype=dtype)
    bias = torch.empty(0, dtype=dtype) if bias is None else bias
    operands = (*quantized_input, *weight)
    a, a_scale, b, b_scale = (part.view(torch.uint8).numpy() for part in operands)
    bias, result = (memory.add(part.view(torch.uint8).numpy()) for part in (bias, out))
    tiles = a_scale.shape[1] // 4
    if MATRIX[arch] == "UTCQMMA":  # a tensor map, and where in it, for each matrix
        arguments = [TensorMap(a), 0, memory.add(a_scale), TensorMap(b), 0, memory.add(b_scale)]
        arguments += [bias, result, tiles, M, N]
    else:
        arguments = [memory.add(part) for part in (a, a_scale, b, b_scale)]
        arguments += [bias, result, a.shape[0], b.shape[0], a.shape[1], tiles, M, N]
    made = compiled(arch)
    for row in range(-(-M // 128)):
        for column in range(-(-N // 128)):
            block = Block(ptx, memory, arguments, (row, column), made.threads, made.shared, eager)
            block.run()
    return out.double()


# Rounding of a result; of float32, that of sums of K products in another order.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}


def wrong(actual, expected, dtype) -> float:
    """The largest error, of what it may be."""
    allowed = expected.abs() * ROUNDING[dtype] + 1e-6 * expected.abs().amax(1, keepdim=True) + 1e-6
    return float(((actual - expected).abs() / allowed).nan_to_num(torch.inf).max())


CASES = [
    (130, 33, 416, torch.float32, False, False),  # more steps than stages, all sizes with tails
    (5, 70, 160, torch.bfloat16, True, True),
    (40, 136, 96, torch.float16, True, False),  # rows of results that are stored whole
]


@pytest.mark.parametrize(("M", "N", "K", "dtype", "bias", "eager"), CASES)
@pytest.mark.parametrize("arch", DISASSEMBLED)
def test_the_compiled_kernel_computes_what_the_oracle_does(arch, M, N, K, dtype, bias, eager, dsl):
    quantized_input, weight, added, expected = problem(M, N, K, dtype, bias)
    ptx = compiled(arch, dtype, bias).ptx
    actual = run(ptx, arch, quantized_input, weight, added, dtype, M, N, eager)
    assert wrong(actual, expected, dtype) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("M", "N", "K", "dtype", "bias"),
    [*(c[:5] for c in CASES), (300, 400, 4096, torch.float32, True)],
)
def test_a_card_computes_what_the_oracle_does(M, N, K, dtype, bias):
    reason = mx.unsupported_reason(LINEAR) if torch.cuda.is_available() else "needs a CUDA GPU"
    if reason is not None:
        pytest.skip(reason)
    *operands, added, expected = problem(M, N, K, dtype, bias)
    operands = ([part.to(DEVICE) for part in parts] for parts in operands)
    added = added if added is None else added.to(DEVICE)
    actual = mx.matmul(*operands, added, dtype, M, N)
    assert wrong(actual.cpu().double(), expected, dtype) <= 1


# What is broken -> the architecture, what is in the PTX, and what instead.
FLAWS = {
    "a stage is not waited for": (
        "sm_120a",
        "cp.async.wait_group \t1;",
        "cp.async.wait_group \t2;",
    ),
    "other warps are not waited for": ("sm_120a", "bar.sync \t0;", ""),
    "scales of a wrong block": ("sm_120a", "{2, 0}", "{3, 0}"),
    "scales of another wrong block": ("sm_100a", "1218445344", "1755316272"),
    "rows too near": ("sm_100a", "4611756662049538048", "4611721477677449216"),
    "codes are not waited for": ("sm_100a", ", 33792;", ", 1024;"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_in_a_kernel_is_found(flaw, dsl):
    """The machine is strict enough to rely on."""
    arch, before, after = FLAWS[flaw]
    M, N, K, dtype = 40, 33, 160, torch.float32
    quantized_input, weight, _, expected = problem(M, N, K, dtype, False)
    ptx = compiled(arch, dtype, False).ptx
    assert before in ptx
    try:
        actual = run(ptx.replace(before, after), arch, quantized_input, weight, None, dtype, M, N)
    except (AssertionError, RuntimeError):
        return
    assert wrong(actual, expected, dtype) > 100


# ---- when it runs ---------------------------------------------------------------------------


@pytest.mark.parametrize("capability", mx.ARCHITECTURES)
def test_blackwell_is_supported(capability, card, dsl):
    card(capability)
    assert mx.unsupported_reason(LINEAR) is None


@pytest.mark.parametrize("capability", [(9, 0), (8, 9), (11, 0), (12, 2), (13, 0), (20, 0), None])
def test_every_other_card_is_unsupported_with_what_it_is(capability, card):
    card(capability)
    actual = "this one has {}.{}".format(*capability) if capability else "this is cuda"
    assert mx.unsupported_reason(LINEAR) == (
        f"needs NVIDIA Blackwell, compute capability 10.0, 10.3, 12.0 or 12.1; {actual}"
    )


@pytest.fixture
def package(monkeypatch):
    """package(module or None): what `import cutlass` finds."""
    mx.dsl_unsupported_reason.cache_clear()
    yield lambda module: monkeypatch.setitem(sys.modules, "cutlass", module)
    mx.dsl_unsupported_reason.cache_clear()


def test_without_the_package_it_says_what_to_install(package, card):
    card((12, 0))
    package(None)
    assert mx.unsupported_reason(LINEAR) == "needs CuTe DSL: pip install nvidia-cutlass-dsl"


def test_an_old_package_is_unsupported(package, monkeypatch):
    old = types.ModuleType("cutlass")
    old.__version__, old.__path__ = "4.2.0", []
    package(old)
    monkeypatch.setitem(sys.modules, "cutlass.cute", types.ModuleType("cutlass.cute"))
    assert mx.dsl_unsupported_reason() == "CuTe DSL 4.2.0 is too old; 4.8 or later works"


def test_a_broken_package_is_unsupported_with_its_error(package):
    package(types.ModuleType("cutlass"))  # no package: nothing can be in it
    assert "CuTe DSL" in mx.dsl_unsupported_reason()


def test_it_never_runs_unless_it_is_named(card, monkeypatch):
    card((12, 0))
    backend = dispatch.named("cute_mx")
    assert not backend.automatic
    monkeypatch.setattr(mx, "dsl_unsupported_reason", lambda: None)
    tested = []

    def verdict(name, test, device, dtype):
        tested.append(name)
        return None, True

    monkeypatch.setattr(self_test, "verdict", verdict)
    listed = {status.name: status for status in kernels.list_backends(DEVICE)}
    assert "use_backend" in listed["cute_mx"].reason
    assert "cute_mx" not in tested and "torch_mx" in tested


def test_importing_the_package_does_not_import_cutlass():
    code = (
        "import sys, mxfp8.kernels.ops, mxfp8.kernels.backends.cute.mx; "
        "print('cutlass' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


# ---- its arguments --------------------------------------------------------------------------

STORED = reference.quantize(torch.randn(40, 96, generator=torch.Generator().manual_seed(0)))
OTHER = reference.quantize(torch.randn(40, 160, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("quantized_input", "weight", "dtype", "M", "N", "message"),
    [
        (
            STORED,
            OTHER,
            torch.bfloat16,
            40,
            40,
            "x has 96 columns, the weight 160: they must match",
        ),
        (STORED, STORED, torch.bfloat16, 65, 40, "x has 64 rows, fewer than the 65"),
        (STORED, STORED, torch.float64, 40, 40, "BFloat16, Float16, Float32, not torch.float64"),
        (STORED, (STORED[0], STORED[1][:, :3]), torch.bfloat16, 40, 40, "scales have shape"),
        ((STORED[0][:, :90], STORED[1]), STORED, torch.bfloat16, 40, 40, "a multiple of 32"),
    ],
)
def test_operands_that_do_not_match_raise(quantized_input, weight, dtype, M, N, message):
    with pytest.raises(ValueError, match=message):
        mx.matmul(quantized_input, weight, None, dtype, M, N)


def test_an_unknown_architecture_raises_with_its_name():
    with pytest.raises(
        ValueError, match="no CuTe kernel for 'sm_90a'; there are kernels for sm_100a"
    ):
        mx.compile_for("sm_90a")


def test_a_kernel_gets_addresses_that_are_aligned_then_sizes(monkeypatch, dsl):
    import cutlass.torch

    monkeypatch.setattr(device_facts, "capability", lambda device: (12, 0))  # of the CPU's tensors
    called = []
    monkeypatch.setattr(mx, "_compile", lambda *what: lambda *given: called.append((what, given)))
    monkeypatch.setattr(cutlass.torch, "current_stream", lambda: "stream")
    monkeypatch.setattr(mx, "_pointers", lambda addresses, dtype: list(addresses))
    weight = torch.empty(64 * 96 + 1, dtype=torch.uint8)[1:].view(64, 96)  # at an odd address
    out = mx.matmul(STORED, (weight, STORED[1]), None, torch.float16, 40, 33)
    [(what, given)] = called
    assert what == ("sm_120a", torch.float16, False)
    assert given[0] == STORED[0].data_ptr() and given[1] == STORED[1].data_ptr()
    assert all(address % 16 == 0 for address in given[:6])
    assert given[5] == out.data_ptr()
    assert given[6:] == (64, 64, 96, 1, 40, 33, "stream")
    assert out.shape == (40, 33) and out.dtype == torch.float16
