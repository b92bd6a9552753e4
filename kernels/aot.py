"""Compile every Triton kernel for a GPU that need not be present, and inspect the machine code.

    python -m mxfp8.kernels.aot --arch 90            a table
    python -m mxfp8.kernels.aot --arch 90 --json     [{"kernel", "config", "registers", ...}, ...]
    python -m mxfp8.kernels.aot --arch 100 --one     the last configuration of each kernel only

Kernels are compiled with the types, constants and options that they are launched with (`builds`),
then disassembled by the tools in Triton's wheel: which matrix instructions they use, how many
registers, whether any spill to local memory, how much shared memory. `spills` counts loads from and
stores to local memory (AMD: scratch). Not every version of Triton knows every architecture; its
error for one that it does not know is raised unchanged.
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

import torch

from .backends.triton import cast, gemm, int8, mx, rowwise, w8a16

# Bytes of shared memory that a program can use, by architecture.
SHARED = {75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
SHARED |= {103: SHARED[100], 110: SHARED[100], 120: SHARED[86], 121: SHARED[86], "gfx950": 163_840}
SHARED |= dict.fromkeys(("gfx942", "gfx1100", "gfx1201"), 65_536)
_OPTIONS = ("num_warps", "num_stages")
_UNALIGNED = ("M", "tiles")  # sizes that are often not multiples of 16
_FLOATS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
# A line of SASS: the address in a comment, an optional predicate, the instruction.
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", re.MULTILINE)
_USAGE = re.compile(r"REG:(\d+)")
_MATRIX = re.compile(r"[HQIU][A-Z]*MMA|[HQI]MMA|HGMMA|QGMMA|v_mfma_|v_wmma_")
_AMD_INSTRUCTION = re.compile(r"^\s+([sv]_\w+|(?:buffer|global|scratch|ds)_\w+)\b", re.MULTILINE)
_AMD_REGISTERS = re.compile(r"\.vgpr_count:\s*(\d+)")
_SCALE_COPY = re.compile(r"\btcgen05\.cp\.")
Arch = int | str  # compute capability times 10, or the name of an AMD architecture


@dataclass(frozen=True)
class Build:
    """A kernel and the specialization to compile: a Triton type for each argument, or a constant.

    Attributes:
        types: argument -> type. Pointers and sizes ("i32") are taken to be multiples of 16, as in
            models, except for the sizes in `_UNALIGNED`.
        constants: the kernel's constexpr arguments, and Triton's num_warps and num_stages.
        variant: tells builds of a kernel apart that serve different backends.
    """

    kernel: object
    config: str
    types: dict[str, str]
    constants: dict[str, object]
    variant: str = ""

    @property
    def name(self) -> str:
        name = self.kernel.fn.__name__
        return f"{name} ({self.variant})" if self.variant else name


@dataclass(frozen=True)
class Binary:
    """What a kernel compiled to; see the module docstring.

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
        """Matrix instructions by mnemonic, without modifiers."""
        counts = Counter()
        for name, count in self.instructions.items():
            if _MATRIX.match(name):
                counts[name.partition(".")[0]] += count  # AMD's mnemonics have no point
        return dict(counts)


def builds(arch: Arch) -> Iterator[Build]:
    """Every kernel that runs on an architecture, in each configuration it is launched in."""
    amd = isinstance(arch, str)
    hardware = {"HARDWARE": not amd and arch >= 89}
    tile = {"R": cast.ROWS, "C": cast.COLUMNS, "num_warps": cast.WARPS} | hardware
    matrix = {"code_ptr": "*u8", "scale_ptr": "*u8"} | _sizes("rows cols stored tiles")
    for name, pointer in _FLOATS.items():
        yield Build(cast.dequantize_kernel, name, matrix | {"out_ptr": pointer}, tile)
        types = matrix | {"x_ptr": pointer} | _sizes("row_stride padded_rows")
        yield Build(cast.quantize_kernel, name, types, tile | {"column_stride": 1})
        if name == "fp32":
            continue
        types = matrix | {"x_ptr": pointer, "bias_ptr": pointer, "out_ptr": pointer}
        constants = hardware | {"HAS_BIAS": True}
        yield Build(w8a16.one_row_kernel, name, types, w8a16.ONE_ROW | constants)
        if not amd and arch < 80:  # Triton does not use Turing's matrix instructions
            continue
        types = types | _sizes("M x_stride")
        for largest, config in w8a16.small_m_configs(arch):
            yield Build(w8a16.small_m_kernel, f"{name}, M <= {largest}", types, config | constants)
    yield from _int8_builds(arch, hardware)
    if not amd or arch == "gfx942":
        yield from _rowwise_builds(arch, hardware)
    if arch == "gfx950" or (not amd and arch >= 100):
        yield from _block_scaled_builds(arch)


def _int8_builds(arch: Arch, hardware: dict) -> Iterator[Build]:
    """The kernels of `int8`."""
    types = dict.fromkeys(("code_ptr", "scale_ptr"), "*u8") | _sizes("stored tiles")
    types |= {"out_ptr": "*i8", "row_scale_ptr": "*fp32"}
    yield Build(int8.rotated_weight_kernel, "", types, int8.config_for(3840) | hardware)
    types = {"code_ptr": "*i8", "scale_ptr": "*fp32"} | _sizes("cols row_stride")
    for name in ("bf16", "fp16"):
        for cols in (3840, 15360):
            yield Build(
                int8.rotated_input_kernel, f"{name}, K = {cols}",
                types | {"x_ptr": _FLOATS[name]}, int8.config_for(cols),
            )  # fmt: skip
    types = dict.fromkeys(("row_scale_ptr", "column_scale_ptr"), "*fp32")
    types |= {"sum_ptr": "*i32"} | _sizes("rows columns stride")
    if arch in (75, 80, 86, 89):  # where no FP8 comes before it
        for name in ("bf16", "fp16"):
            outputs = {"bias_ptr": _FLOATS[name], "out_ptr": _FLOATS[name]}
            constants = int8.SCALING | {"HAS_BIAS": True}
            yield Build(int8.scale_kernel, name, types | outputs, constants)
    if isinstance(arch, str) or arch >= 80:
        yield from _matmul_builds(arch, torch.int8)


def _rowwise_builds(arch: Arch, hardware: dict) -> Iterator[Build]:
    """The kernels of `fp8_rowwise`."""
    types = dict.fromkeys(("code_ptr", "scale_ptr", "out_ptr"), "*u8") | {"row_scale_ptr": "*fp32"}
    types |= _sizes("rows stored tiles")
    fnuz = arch == "gfx942"
    hardware = hardware | {"FNUZ": fnuz}
    yield Build(rowwise.rowwise_weight_kernel, "", types, rowwise.WEIGHT_CONFIG | hardware)
    types = {"code_ptr": "*u8", "scale_ptr": "*fp32"} | _sizes("cols row_stride stored")
    for name in ("bf16", "fp16"):
        for stored in (3840, 15360):
            yield Build(
                rowwise.rowwise_input_kernel, f"{name}, K = {stored}",
                types | {"x_ptr": _FLOATS[name]}, rowwise.rowwise_input_config(stored) | hardware,
            )  # fmt: skip
    if fnuz or arch >= 89:
        codes = torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn
        yield from _matmul_builds(arch, codes)


def _matmul_builds(arch: Arch, codes: torch.dtype) -> Iterator[Build]:
    """The matmul of codes with a scale per row, in every tile that is launched."""
    integer, tma = codes == torch.int8, gemm.uses_tma(arch)
    code = {torch.int8: "i8", torch.float8_e4m3fnuz: "fp8e4b8"}.get(codes, "fp8e4nv")
    types = {"a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32"} | _sizes("M N K columns")
    for name in ("bf16", "fp16") if integer else _FLOATS:  # FP8 is what multiplies float32
        for largest, config in gemm.configs_for(arch, codes):
            rows = {"a": config["BM"], "b": config["BN"]}
            operands = {n: _codes(code, count, config["BK"], tma) for n, count in rows.items()}
            yield Build(
                gemm.rowwise_matmul_kernel,
                f"{name}, any M" if largest == gemm.ANY else f"{name}, M <= {largest}",
                operands | types | dict.fromkeys(("bias_ptr", "out_ptr"), _FLOATS[name]),
                config | {"HAS_BIAS": True, "INTEGER": integer, "TMA": tma},
                "INT8" if integer else "",
            )


def _block_scaled_builds(arch: Arch) -> Iterator[Build]:
    """The block-scaled matmul of Blackwell and gfx950: x and weight in MXFP8."""
    tma = isinstance(arch, int) and mx.uses_tma(arch)
    sizes = _sizes("rows columns K tiles row_stride column_stride out_rows out_columns")
    for small_m, config in zip((True, False), mx.CONFIGS[100 if tma else 120], strict=True):
        operands = {}
        for name, rows in (("a", config["BA"]), ("b", config["BB"])):
            operands[name] = _codes("fp8e4nv", rows, config["BK"], tma)
            box = f"tensordesc<u8[{rows // 128}, {config['BK'] // 128}, 2, 256]>"
            operands[f"{name}_scale"] = box if tma and rows % 128 == 0 else "*u8"
        unit_stride = "row_stride" if small_m else "column_stride"
        constants = config | {"HAS_BIAS": True, "TRANSPOSED": small_m, "TMA": tma, unit_stride: 1}
        types = {name: kind for name, kind in sizes.items() if name != unit_stride} | operands
        rows = f"M <= {mx.SMALL_M}" if small_m else "any M"
        for name in ("bf16", "fp16"):
            outputs = {"bias_ptr": _FLOATS[name], "out_ptr": _FLOATS[name]}
            yield Build(mx.mx_kernel, f"{name}, {rows}", types | outputs, constants)


def _sizes(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "i32")


def _codes(dtype: str, rows: int, columns: int, tma: bool) -> str:
    """The type of an operand in 8 bits: a tensor descriptor with TMA, else a pointer."""
    return f"tensordesc<{dtype}[{rows}, {columns}]>" if tma else f"*{dtype}"


def last_of_each(all_builds: Iterable[Build]) -> list[Build]:
    """One configuration of each kernel: the last, which is the largest."""
    return list({build.name: build for build in all_builds}.values())


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
        if n not in _UNALIGNED and (signature[n] == "i32" or signature[n].startswith("*"))
    }
    source = ASTSource(build.kernel, signature, constants, aligned)
    options = {n: v for n, v in build.constants.items() if n in _OPTIONS}
    amd = isinstance(arch, str)
    lanes = 64 if amd and arch.startswith("gfx9") else 32  # CDNA's; RDNA's waves have 32
    target = GPUTarget("hip" if amd else "cuda", arch, lanes)
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
    """Disassemble a binary for an NVIDIA GPU, whichever compiler it comes from."""
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
    """As `disassemble`, from the assembly of AMD's compiler."""
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
    process = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True)
    if process.returncode:  # a disassembler may be older than the compiler beside it
        raise RuntimeError(f"{tool} failed: {process.stderr.strip()}")
    return process.stdout


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
    selected = list(builds(arguments.arch))
    if arguments.one:
        selected = last_of_each(selected)
    binaries = [inspect(build, arguments.arch) for build in selected]
    if arguments.json:
        print(json.dumps([asdict(binary) for binary in binaries], indent=1))
        return 0
    print(f"{'kernel':30}{'config':20}{'registers':>10}{'spills':>8}{'shared':>9}  matrix")
    for b in binaries:
        matrix = ", ".join(f"{name} x {count}" for name, count in sorted(b.matrix.items()))
        print(f"{b.kernel:30}{b.config:20}{b.registers:10}{b.spills:8}{b.shared:9}  {matrix}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
