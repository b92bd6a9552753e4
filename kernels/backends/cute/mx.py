"""Block-scaled matmul in CuTe DSL: MXFP8 times MXFP8 by kernels of our own. Compiled, never run.

`cute_mx_sm100` is the kernel for data center Blackwell, `cute_mx_sm120` the one for GeForce, each a
page that says what the hardware does; this module compiles and launches them. They have never been
on a GPU. Tests compile them, and run their PTX on the CPU, instruction by instruction: that shows
right addresses, layouts, scales, barriers and tails, if the PTX ISA was read right. So this backend
runs only when it is named, after its self-test on the card.

The package `nvidia-cutlass-dsl` has a license of NVIDIA's own, and is large: it is optional, and
not imported before it is asked for. A kernel is compiled once for each type of result.

Rejected: the GEMMs of NVIDIA's examples, tuned, and each longer than all of this; who wants that
speed has cuBLASLt (`torch_mx`).

https://docs.nvidia.com/cutlass has the language.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module

import torch

from ... import device_facts, layout
from .. import fp8_rowwise

OLDEST = (4, 8)  # of the package; earlier ones were never tried
# Compute capability -> what it is compiled for, and by which module.
ARCHITECTURES = {
    (10, 0): ("sm_100a", "sm100"),
    (10, 3): ("sm_103a", "sm100"),
    (12, 0): ("sm_120a", "sm120"),
    (12, 1): ("sm_121a", "sm120"),
}
DTYPES = {torch.bfloat16: "BFloat16", torch.float16: "Float16", torch.float32: "Float32"}
_ALIGNMENT = 16  # bytes, of every matrix
_MOST_COLUMNS = 65_535 * 128  # blocks in a grid's second dimension


@dataclass(frozen=True)
class Compiled:
    """A kernel as it was compiled.

    Attributes:
        config: what it was compiled for, in words.
        shared: bytes of shared memory that it is launched with; the machine code does not say.
    """

    kernel: str
    config: str
    ptx: str
    cubin: bytes
    shared: int
    threads: int


@cache
def dsl_unsupported_reason() -> str | None:
    """Why there is no CuTe DSL here, or None."""
    # Another package is called cutlass too; it has no cute.
    return device_facts.package_unsupported_reason(
        "CuTe DSL", "nvidia-cutlass-dsl", OLDEST, "cutlass", "cutlass.cute"
    )


def unsupported_reason(problem) -> str | None:
    """Why this cannot run, or None (`dispatch.Problem`)."""
    reason = fp8_rowwise.activations_unsupported_reason(replace(problem, small_m=False))
    if reason is not None:
        return reason
    if device_facts.capability(problem.device) not in ARCHITECTURES:
        *most, last = (f"{major}.{minor}" for major, minor in ARCHITECTURES)
        have = device_facts.described(problem.device)
        return f"needs NVIDIA Blackwell, compute capability {', '.join(most)} or {last}; {have}"
    return dsl_unsupported_reason()


def compile_for(arch: str, dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> Compiled:
    """Compile the kernel of an architecture, to look at; no GPU is needed.

    Args:
        arch: one of those in `ARCHITECTURES`, as "sm_100a".
        dtype: of results and bias: bfloat16, float16 or float32.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = _compile(arch, dtype, bias, f"--keep-ptx --keep-cubin --dump-dir {folder}")
        ptx, cubin = made.__ptx__, made.__cubin__
    module = _module(arch)
    config = f"{str(dtype).removeprefix('torch.')}, {'bias' if bias else 'no bias'}"
    name = module.__name__.rpartition(".")[2]
    return Compiled(name, config, ptx, cubin, module.SHARED, module.THREADS)


def _module(arch: str):
    modules = dict(ARCHITECTURES.values())
    if arch not in modules:
        raise ValueError(f"no CuTe kernel for {arch!r}; there are some for {', '.join(modules)}")
    return import_module(f".{modules[arch]}", __package__)


@cache
def _compile(arch: str, dtype: torch.dtype, bias: bool, options: str = ""):
    """What launches the kernel of an architecture.

    It can be launched where that is the architecture of the GPU, or what CUTE_DSL_ARCH says.
    """
    module = _module(arch)
    from cutlass import Int32, cute
    from cutlass.cute.runtime import make_fake_stream

    pointers = _pointers([_ALIGNMENT] * 6, dtype)
    return cute.compile(
        module.launch, *pointers, *[Int32(1)] * 6, make_fake_stream(), bias,
        options=f"--gpu-arch {arch} {options}",
    )  # fmt: skip


def _pointers(addresses, dtype: torch.dtype) -> list:
    """CuTe pointers: four to bytes, then bias and results."""
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import make_ptr

    types = [cutlass.Uint8] * 4 + [getattr(cutlass, DTYPES[dtype])] * 2
    return [
        make_ptr(kind, address, cute.AddressSpace.gmem, assumed_align=_ALIGNMENT)
        for kind, address in zip(types, addresses, strict=True)
    ]


def check(a, a_scale, b, b_scale, dtype: torch.dtype, M: int, N: int) -> None:
    """Raise ValueError unless the kernels take these: see `matmul`."""
    for name, codes, scale, used in (("x", a, a_scale, M), ("the weight", b, b_scale, N)):
        if codes.ndim != 2 or codes.shape[1] % layout.BLOCK or codes.shape[1] == 0:
            raise ValueError(f"{name} has shape {list(codes.shape)}; columns go by blocks of 32")
        if codes.shape[0] < used:
            raise ValueError(f"{name} has {codes.shape[0]} rows; {used} are asked for")
        layout.check_scale(codes.shape, scale.shape)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"x has {a.shape[1]} columns, the weight {b.shape[1]}: they must match")
    if dtype not in DTYPES:
        raise ValueError(f"CuTe kernels give {', '.join(DTYPES.values())}, not {dtype}")
    if N > _MOST_COLUMNS:
        raise ValueError(f"the weight has {N} rows; a grid holds {_MOST_COLUMNS}")


def matmul(tokens, weight, bias, dtype: torch.dtype, M: int, N: int) -> torch.Tensor:
    """x [M, K] @ W[N, K].T + bias from their stored forms, rounded once. [M, N] of `dtype`.

    Args:
        tokens, weight: (qdata, tiled scale), padded as `ops.quantize` pads; rows may be stored
            without padding.
        bias: [N] of `dtype`, or None.
    """
    check(*tokens, *weight, dtype, M, N)
    out = torch.empty(M, N, dtype=dtype, device=tokens[0].device)
    if out.numel() == 0:
        return out
    from cutlass.torch import current_stream

    given = [_aligned(part) for part in (*tokens, *weight, out if bias is None else bias)]
    (rows, K), columns, tiles = tokens[0].shape, weight[0].shape[0], tokens[1].shape[1] // 4
    arch, _ = ARCHITECTURES[device_facts.capability(out.device)]
    run = _compile(arch, dtype, bias is not None)
    addresses = [part.data_ptr() for part in (*given, out)]
    with device_facts.on_device(out):
        run(*_pointers(addresses, dtype), rows, columns, K, tiles, M, N, current_stream())
    return out


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous; a copy where it starts within 16 bytes, as a slice may."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor
