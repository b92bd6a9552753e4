"""Compile every Triton kernel for a GPU that need not be there, and show what came out.

    python -m mxfp8.kernels.aot --arch 90            a table
    python -m mxfp8.kernels.aot --arch 90 --json     [{"kernel", "config", "registers", ...}, ...]
    python -m mxfp8.kernels.aot --arch 100 --one     the last configuration of each kernel only

Kernels are compiled down to machine code with the types, constants and options that they are
launched with (`builds`), then disassembled by the tools in Triton's wheel: which matrix
instructions are there, how many registers, whether any spill to local memory, how much shared
memory. `spills` counts loads from and stores to local memory (AMD: scratch). Not every Triton knows
every architecture; what it says of one that it does not know is raised as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .backends.triton import cast, fp8_gemm, mx, rowwise, w8a16

# Shared memory that a program can have, in bytes, per architecture.
SHARED = {75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
SHARED |= {103: SHARED[100], 110: SHARED[100], 120: SHARED[86], 121: SHARED[86], "gfx950": 163_840}
_CODE, _SCALE = "*u8", "*u8"
_OPTIONS = ("num_warps", "num_stages")
_ANY = ("M", "tiles")  # sizes that are often no multiples of 16
# A line of SASS: its address in a comment, then maybe a predicate, then the instruction.
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", re.MULTILINE)
_USAGE = re.compile(r"REG:(\d+)")
_MATRIX = re.compile(r"[HQIU][A-Z]*MMA|[HQI]MMA|HGMMA|QGMMA|v_mfma_")
_AMD_INSTRUCTION = re.compile(r"^\s+([sv]_\w+|(?:buffer|global|scratch|ds)_\w+)\b", re.MULTILINE)
_AMD_REGISTERS = re.compile(r"\.vgpr_count:\s*(\d+)")
_SCALE_COPY = re.compile(r"\btcgen05\.cp\.")
Arch = int | str  # compute capability times 10, or the name of an AMD architecture


@dataclass(frozen=True)
class Build:
    """A kernel with what it is compiled from: a Triton type for each argument, or a constant.

    Attributes:
        types: argument -> type; pointers and sizes ("i32") count as multiples of 16, as those of
            models are, but for the number of rows of x and of tiles.
        constants: of the kernel, and Triton's num_warps and num_stages.
    """

    kernel: object
    config: str
    types: dict[str, str]
    constants: dict[str, object]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@dataclass(frozen=True)
class Binary:
    """What a kernel became: see the module.

    Attributes:
        block_scaled: whether its matrix instructions apply scales.
        scale_copies: copies of scales from shared to tensor memory (`tcgen05.cp`).
    """

    kernel: str
    config: str
    registers: int
    spills: int
    shared: int
    block_scaled: bool
    scale_copies: int
    instructions: dict[str, int]

    @property
    def matrix(self) -> dict[str, int]:
        """Matrix instructions by their short name."""
        found = Counter()
        for name, count in self.instructions.items():
            if _MATRIX.match(name):
                found[name.partition(".")[0]] += count  # AMD's names have no point
        return dict(found)


def builds(arch: Arch) -> Iterator[Build]:
    """Every kernel that runs on an architecture, in each configuration it is launched in."""
    amd = isinstance(arch, str)
    hardware = {"HARDWARE": not amd and arch >= 89}
    floats = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
    tile = {"R": cast.ROWS, "C": cast.COLUMNS, "num_warps": cast.WARPS}
    sizes = dict.fromkeys(("rows", "cols", "stored", "tiles"), "i32")
    matrix = {"code_ptr": _CODE, "scale_ptr": _SCALE}
    for name, pointer in floats.items():
        yield Build(
            cast.dequantize_kernel, name,
            matrix | {"out_ptr": pointer} | sizes, tile | hardware,
        )  # fmt: skip
        strides = {"row_stride": "i32", "padded_rows": "i32"}
        yield Build(
            cast.quantize_kernel, name,
            {"x_ptr": pointer} | matrix | sizes | strides, tile | hardware | {"column_stride": 1},
        )  # fmt: skip
        if name == "fp32":
            continue
        linear = {"x_ptr": pointer, "bias_ptr": pointer, "out_ptr": pointer} | matrix | sizes
        one_row = w8a16.ONE_ROW | hardware | {"HAS_BIAS": True}
        yield Build(w8a16.one_row_kernel, name, linear, one_row)
        if not amd and arch < 80:  # Triton has no matrix instructions of Turing's
            continue
        for most, config in w8a16.SMALL_M:
            yield Build(
                w8a16.small_m_kernel, f"{name}, M <= {most}",
                linear | {"M": "i32", "x_stride": "i32"}, config | hardware | {"HAS_BIAS": True},
            )  # fmt: skip
    if not amd:
        yield from _fast_builds(arch, floats, hardware)
    if amd or arch >= 100:
        yield from _block_scaled_builds(arch)


def _fast_builds(arch: int, floats: dict[str, str], hardware: dict) -> Iterator[Build]:
    """What activations in FP8 need."""
    sizes = {"rows": "i32", "stored": "i32", "tiles": "i32"}
    fold = {"code_ptr": "*u8", "scale_ptr": "*u8", "folded_ptr": "*u8", "row_scale_ptr": "*fp32"}
    yield Build(rowwise.rowwise_weight_kernel, "", fold | sizes, rowwise.FOLD | hardware)
    row = {"code_ptr": "*u8", "scale_ptr": "*fp32"}
    sizes = {"cols": "i32", "row_stride": "i32", "stored": "i32"}
    for name in ("bf16", "fp16"):
        for stored in (3840, 15360):
            yield Build(
                rowwise.rowwise_input_kernel, f"{name}, K = {stored}",
                {"x_ptr": floats[name]} | row | sizes,
                rowwise.rowwise_input_config(stored) | hardware,
            )  # fmt: skip
    if arch < 89:
        return
    kernel = fp8_gemm.tma_kernel if arch == 90 else fp8_gemm.copy_kernel
    scales = {"a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32"}
    sizes = dict.fromkeys(("M", "N", "K", "columns"), "i32")
    for most, config in fp8_gemm.CONFIGS[90 if arch == 90 else 89]:
        for name, pointer in floats.items():
            if name != "bf16" and most == 1 << 31:  # `config_for`
                continue
            if arch == 90:
                tiles = {"a": (config["BM"], config["BK"]), "b": (config["BN"], config["BK"])}
                operands = {n: f"tensordesc<fp8e4nv[{r}, {c}]>" for n, (r, c) in tiles.items()}
            else:
                operands = {"a_ptr": "*fp8e4nv", "b_ptr": "*fp8e4nv"}
            out = {"bias_ptr": pointer, "out_ptr": pointer}
            yield Build(
                kernel, f"{name}, M <= {most}" if most < 1 << 31 else f"{name}, any M",
                operands | scales | out | sizes, config | {"HAS_BIAS": True},
            )  # fmt: skip


def _block_scaled_builds(arch: Arch) -> Iterator[Build]:
    """What Blackwell and gfx950 multiply: activations and weights in MXFP8."""
    names = "rows columns K tiles row_stride column_stride out_rows out_columns"
    tma = isinstance(arch, int) and mx.uses_tma(arch)
    for small_m, config in zip((True, False), mx.CONFIGS[100 if tma else 120], strict=True):
        tiles = {"a": (config["BA"], config["BK"]), "b": (config["BB"], config["BK"])}
        for name, pointer in (("bf16", "*bf16"), ("fp16", "*fp16")):
            operands = {
                n: f"tensordesc<fp8e4nv[{r}, {c}]>" if tma else "*fp8e4nv"
                for n, (r, c) in tiles.items()
            }
            scales = {
                f"{n}_scale": f"tensordesc<u8[{r // 128}, {c // 128}, 2, 256]>"
                if tma and r % 128 == 0
                else "*u8"
                for n, (r, c) in tiles.items()
            }
            types = operands | scales | {"bias_ptr": pointer, "out_ptr": pointer}
            types |= dict.fromkeys(names.split(), "i32")
            constants = config | {"HAS_BIAS": True, "TRANSPOSED": small_m, "TMA": tma}
            unit = "row_stride" if small_m else "column_stride"
            del types[unit]
            rows = f"M <= {mx.SMALL_M}" if small_m else "any M"
            yield Build(mx.mx_kernel, f"{name}, {rows}", types, constants | {unit: 1})


def last_of_each(found: Iterable[Build]) -> list[Build]:
    """One configuration of each kernel: the last, which is the largest."""
    return list({build.name: build for build in found}.values())


def compile_kernel(build: Build, arch: Arch):
    """Compile one kernel for `arch`; returns Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    constants = {n: v for n, v in build.constants.items() if n not in _OPTIONS}
    signature = {n: build.types.get(n, "constexpr") for n in names}
    unknown = (build.types.keys() | constants) - set(names)
    missing = {n for n in names if signature[n] == "constexpr"} - constants.keys()
    if unknown or missing:
        raise ValueError(f"{build.name}: unknown {sorted(unknown)}, missing {sorted(missing)}")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n not in _ANY and (signature[n] == "i32" or signature[n].startswith("*"))
    }
    source = ASTSource(build.kernel, signature, constants, aligned)
    options = {n: v for n, v in build.constants.items() if n in _OPTIONS}
    amd = isinstance(arch, str)
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options=options)


def inspect(build: Build, arch: Arch) -> Binary:
    """Compile one kernel for `arch` and disassemble it."""
    compiled = compile_kernel(build, arch)
    if isinstance(arch, str):
        return _inspect_amd(build, compiled)
    asm = compiled.asm
    shared = compiled.metadata.shared
    return disassemble(asm["cubin"], asm["ptx"], build.name, build.config, shared)


def disassemble(cubin: bytes, ptx: str, kernel: str, config: str, shared: int) -> Binary:
    """What a binary for NVIDIA's cards holds, whatever compiled it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "-res-usage", path)
        sass = _run("cuobjdump", "-sass", path)
    instructions = Counter(_INSTRUCTION.findall(sass))
    spills = sum(n for name, n in instructions.items() if name.startswith(("LDL", "STL")))
    return Binary(
        kernel, config, max(map(int, _USAGE.findall(usage))), spills, shared,
        "block_scale" in ptx, len(_SCALE_COPY.findall(ptx)), dict(sorted(instructions.items())),
    )  # fmt: skip


def _inspect_amd(build: Build, compiled) -> Binary:
    """From the assembly that AMD's compiler writes."""
    text = compiled.asm["amdgcn"]
    instructions = Counter(_AMD_INSTRUCTION.findall(text))
    spills = sum(n for name, n in instructions.items() if name.startswith("scratch_"))
    registers = max(map(int, _AMD_REGISTERS.findall(text)))
    return Binary(
        build.name, build.config, registers, spills, compiled.metadata.shared,
        "v_mfma_scale_" in text, 0, dict(sorted(instructions.items())),
    )  # fmt: skip


def _run(tool: str, *arguments) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    ended = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True)
    if ended.returncode:  # a disassembler may be older than the compiler beside it
        raise RuntimeError(f"{tool} failed: {ended.stderr.strip()}")
    return ended.stdout


def _arch(word: str) -> Arch:
    return int(word) if word.isdigit() else word


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mxfp8.kernels.aot", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--arch", type=_arch, required=True, choices=list(SHARED))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", action="store_true", help="one configuration of each kernel")
    arguments = parser.parse_args(argv)
    wanted = list(builds(arguments.arch))
    if arguments.one:
        wanted = last_of_each(wanted)
    binaries = [inspect(build, arguments.arch) for build in wanted]
    if arguments.json:
        json.dump([asdict(binary) for binary in binaries], sys.stdout, indent=1)
        print()
        return 0
    print(f"{'kernel':24}{'config':20}{'registers':>10}{'spills':>8}{'shared':>9}  matrix")
    for b in binaries:
        matrix = ", ".join(f"{n} {c}" for n, c in sorted(b.matrix.items()))
        print(f"{b.kernel:24}{b.config:20}{b.registers:10}{b.spills:8}{b.shared:9}  {matrix}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
