"""Block-scaled matmul in CuTe DSL: MXFP8 x MXFP8 by kernels of our own. Compiled, never run.

`sm100` is the kernel for data center Blackwell, `sm120` the one for GeForce; this module compiles
and launches them. They have never run on a GPU. Tests compile them and execute their PTX on the
CPU, instruction by instruction, which checks addresses, layouts, scales, barriers and tails against
our reading of the PTX ISA. So this backend runs only when it is named, after a self-test on the
card.

The package `nvidia-cutlass-dsl` has a license of NVIDIA's own and is large, so it is optional and
not imported until the backend is used. A kernel is compiled once per dtype of the result.

Rejected: the tuned GEMMs of NVIDIA's examples, each longer than all of this; for that speed there
is cuBLASLt (`torch_mx`).

https://docs.nvidia.com/cutlass documents the language.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch

from ... import device_facts, layout

OLDEST = (4, 8)  # version of the package; earlier ones were never tried
# Compute capability -> (the architecture to compile for, the kernel's module).
ARCHITECTURES = {
    (10, 0): ("sm_100a", "sm100"),
    (10, 3): ("sm_103a", "sm100"),
    (12, 0): ("sm_120a", "sm120"),
    (12, 1): ("sm_121a", "sm120"),
}
DTYPES = {torch.bfloat16: "BFloat16", torch.float16: "Float16", torch.float32: "Float32"}
_ALIGNMENT = 16  # bytes, of every matrix
_MAX_N = 65_535 * 128  # the limit of a grid's second dimension, in tiles of 128


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    Attributes:
        config: dtype of the result, and whether there is a bias.
        shared: bytes of dynamic shared memory at launch, which the machine code does not state.
    """

    kernel: str
    config: str
    ptx: str
    cubin: bytes
    shared: int
    threads: int


@cache
def dsl_unsupported_reason() -> str | None:
    """Why CuTe DSL cannot be used here, or None."""
    # There is another package called cutlass, which has no cute.
    return device_facts.package_unsupported_reason(
        "CuTe DSL", "nvidia-cutlass-dsl", OLDEST, "cutlass", "cutlass.cute"
    )


def unsupported_reason(problem) -> str | None:
    """Why this cannot run, or None (`records.Problem`)."""
    if device_facts.capability(problem.device) not in ARCHITECTURES:
        *most, last = (f"{major}.{minor}" for major, minor in ARCHITECTURES)
        card = f"NVIDIA Blackwell, compute capability {', '.join(most)} or {last}"
        return device_facts.needs(card, problem.device)
    return dsl_unsupported_reason()


def compile_for(arch: str, dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> Compiled:
    """Compile the kernel of an architecture for inspection; needs no GPU.

    Args:
        arch: an architecture of `ARCHITECTURES`, such as "sm_100a".
        dtype: of results and bias: bfloat16, float16 or float32.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = _compile(arch, dtype, bias, f"--keep-ptx --keep-cubin --dump-dir {folder}")
        ptx, cubin = compiled.__ptx__, compiled.__cubin__
    module = _module(arch)
    config = f"{str(dtype).removeprefix('torch.')}, {'bias' if bias else 'no bias'}"
    name = module.__name__.rpartition(".")[2]
    return Compiled(name, config, ptx, cubin, module.SHARED, module.THREADS)


def _module(arch: str):
    modules = dict(ARCHITECTURES.values())
    if arch not in modules:
        raise ValueError(f"no CuTe kernel for {arch!r}; there are kernels for {', '.join(modules)}")
    return import_module(f".{modules[arch]}", __package__)


@cache
def _compile(arch: str, dtype: torch.dtype, bias: bool, options: str = ""):
    """The compiled launcher of an architecture's kernel.

    It can be launched if that is the architecture of the GPU, or of CUTE_DSL_ARCH.
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
    """CuTe pointers: four to bytes (codes and scales of x and weight), then bias and result."""
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import make_ptr

    types = [cutlass.Uint8] * 4 + [getattr(cutlass, DTYPES[dtype])] * 2
    return [
        make_ptr(kind, address, cute.AddressSpace.gmem, assumed_align=_ALIGNMENT)
        for kind, address in zip(types, addresses, strict=True)
    ]


def check(a, a_scale, b, b_scale, dtype: torch.dtype, M: int, N: int) -> None:
    """Raise ValueError unless the kernels take these operands (see `matmul`)."""
    for name, codes, scale, rows in (("x", a, a_scale, M), ("the weight", b, b_scale, N)):
        if codes.ndim != 2 or codes.shape[1] % layout.BLOCK or codes.shape[1] == 0:
            raise ValueError(
                f"{name} has shape {list(codes.shape)}; it must be [rows, a multiple of 32]"
            )
        if codes.shape[0] < rows:
            raise ValueError(f"{name} has {codes.shape[0]} rows, fewer than the {rows} asked for")
        layout.check_scale(codes.shape, scale.shape)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"x has {a.shape[1]} columns, the weight {b.shape[1]}: they must match")
    if dtype not in DTYPES:
        raise ValueError(f"CuTe kernels return {', '.join(DTYPES.values())}, not {dtype}")
    if N > _MAX_N:
        raise ValueError(f"the weight has {N} rows; the kernels take at most {_MAX_N}")


def matmul(quantized_input, weight, bias, dtype: torch.dtype, M: int, N: int) -> torch.Tensor:
    """x [M, K] @ W[N, K].T + bias from their stored forms, rounded once. [M, N] of `dtype`.

    Args:
        quantized_input, weight: (qdata, tiled scale), padded as `ops.quantize` pads; rows may be
            stored without padding.
        bias: [N] of `dtype`, or None.
    """
    check(*quantized_input, *weight, dtype, M, N)
    x_q, x_scale = quantized_input
    out = torch.empty(M, N, dtype=dtype, device=x_q.device)
    if out.numel() == 0:
        return out
    from cutlass.torch import current_stream

    operands = [_aligned(t) for t in (x_q, x_scale, *weight, out if bias is None else bias)]
    (rows, K), columns, tiles = x_q.shape, weight[0].shape[0], x_scale.shape[1] // 4
    arch, _ = ARCHITECTURES[device_facts.capability(out.device)]
    run = _compile(arch, dtype, bias is not None)
    addresses = [tensor.data_ptr() for tensor in (*operands, out)]
    with device_facts.on_device(out):
        run(*_pointers(addresses, dtype), rows, columns, K, tiles, M, N, current_stream())
    return out


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and at a multiple of 16 bytes; a slice is copied if need be."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor
