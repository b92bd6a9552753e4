"""A PTX interpreter for one thread block, on the CPU: the instructions that the CuTe kernels use.

Each instruction follows the PTX ISA (https://docs.nvidia.com/cuda/parallel-thread-execution/), the
matrix instructions included, and nothing here knows how the kernels are written: a correct result
means that addresses, fragments, scales, barriers and predicates are correct. It cannot show that a
GPU and its assembler follow the ISA, nor how fast they are.

Memory is strict. Global memory is what the test provides; access beyond it raises. Shared and
tensor memory start as 0xFF, which is NaN in E4M3, E8M0 and float32. Asynchronous operations
complete as late as they may, or at once: late copies (and early multiplications) expose a missing
wait, early copies (and late multiplications) a buffer that is filled while it is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

_SIZE = {"b8": 1, "b16": 2, "u16": 2, "s16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4}
_SIZE |= {"b64": 8, "pred": 1, "u64": 8, "s64": 8, "bf16": 2, "f16": 2}
_COMPARE = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip


LANES = np.arange(32)
SHARED_AT = 1 << 16  # where shared memory starts, in its own space


def _values() -> tuple[np.ndarray, np.ndarray]:
    """The values of the 256 codes of E4M3 and of E8M0."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    e4m3 = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    e4m3 = np.where((byte & 127) == 127, np.nan, np.where(byte & 128, -e4m3, e4m3))
    return e4m3, np.where(byte == 255, np.nan, 2.0 ** (byte - 127.0))


E4M3, E8M0 = _values()


def one(taken: np.ndarray) -> int:
    """The lane that executes an instruction for a single thread."""
    assert taken.sum() == 1, "one thread of a warp"
    return int(np.flatnonzero(taken)[0])


@dataclass
class TensorMap:
    """A tensor map: boxes of codes [rows, K], in the 128-byte swizzle."""

    codes: np.ndarray
    box: tuple[int, int] = (128, 128)


class Memory:
    """Global memory: the arrays that a test provides, each at an address of its own."""

    def __init__(self):
        self.pieces: list[np.ndarray] = []

    def add(self, array: np.ndarray) -> int:
        """Add an array's bytes; returns their address, a multiple of 2**32."""
        self.pieces.append(array.reshape(-1).view(np.uint8))
        return len(self.pieces) << 32

    def at(self, address: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The array that holds the addresses, and indices into it: [addresses, size]."""
        index = int(address[0] >> 32)
        data, first = self.pieces[index - 1], address - (index << 32)
        if first.min() < 0 or first.max() > len(data) - size:
            raise IndexError(f"{size} bytes from {first} of piece {index}, of {len(data)} bytes")
        if (first % min(size, 32)).any():
            raise IndexError(f"{size} bytes from {first} of piece {index} are not aligned")
        return data, first[:, None] + np.arange(size)


@dataclass
class Instruction:
    guard: str | None
    name: list[str]
    operands: list[str]
    text: str


@dataclass
class Warp:
    """32 threads: registers by name, a program counter per thread."""

    index: int
    registers: dict[str, np.ndarray] = field(default_factory=dict)
    at: np.ndarray = field(default_factory=lambda: np.zeros(32, np.int64))
    open_copies: list = field(default_factory=list)
    groups: list = field(default_factory=list)


def parse(ptx: str) -> tuple[list[Instruction], dict[str, list[int]], list[str]]:
    """Instructions, the positions of labels among them, and the names of the parameters."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    start = re.search(r"^\{", ptx, re.MULTILINE).start()
    parameters = re.findall(r"\.param [^\n]*?(\w+_param_\d+)", ptx[:start])
    instructions, labels = [], {}
    for piece in ptx[start + 1 : ptx.rindex("}")].split(";"):
        text = " ".join(piece.split()).lstrip("{} ")
        while match := re.match(r"(\$?\w+): ?(?!:)", text):
            labels.setdefault(match[1], []).append(len(instructions))
            text = text[match.end() :].lstrip("{} ")
        if not text or text.startswith("."):
            continue
        guard = re.match(r"@(!?%?\w+) ", text)
        name, _, operands = text[guard.end() if guard else 0 :].partition(" ")
        split = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands)
        split = [operand.strip() for operand in split]
        instructions.append(Instruction(guard and guard[1], name.split("."), split, text))
    return instructions, labels, parameters


class Block:
    """One thread block, at `place` in the grid.

    Args:
        parameters: of the kernel, in order: addresses of `memory`, integers, or a TensorMap.
        eager: whether copies happen at once and multiplications late, or the other way round.
    """

    def __init__(self, ptx, memory, parameters, place, threads, shared, eager=False):
        self.program, self.labels, names = parse(ptx)
        assert len(names) == len(parameters), names
        self.parameters = dict(zip(names, parameters, strict=True))
        self.memory, self.place, self.eager = memory, place, eager
        self.shared = np.full(shared, 0xFF, np.uint8)
        self.tensor = np.full((128, 512), 0xFFFFFFFF, np.uint32)  # a lane a row
        self.warps = [Warp(i) for i in range(threads // 32)]
        self.barriers: dict[int, list[int]] = {}  # address -> [expected, pending, bytes, phase]
        self.pending: list = []

    def run(self) -> None:
        """Run all warps to the end, each until it has to wait before the next one's turn."""
        running = {warp.index: self.steps(warp) for warp in self.warps}
        waiting: dict[int, tuple] = {}
        while running:
            moved = False
            for index in list(running):
                if index in waiting and not waiting[index][1]():
                    continue
                waiting.pop(index, None)
                moved = True
                waiting[index] = next(running[index], None)
                if waiting[index] is None:
                    del running[index], waiting[index]
            if moved:
                continue
            if len(waiting) == len(running) and {what for what, _ in waiting.values()} == {"bar"}:
                waiting = {}
            elif self.pending:
                self.pending.pop(0)()
            else:
                raise RuntimeError(f"all wait: {[what for what, _ in waiting.values()]}")

    def steps(self, warp):
        """Run a warp; yields (what it waits for, a function: whether that has happened)."""
        end = len(self.program)
        while (here := warp.at.min()) < end:
            active = warp.at == here
            instruction = self.program[here]
            name, operands, guard = instruction.name, instruction.operands, instruction.guard
            taken = active
            if guard:
                wanted = self.read(warp, guard.lstrip("!"), "pred").astype(bool)
                taken = active & (wanted ^ guard.startswith("!"))
            warp.at[active] += 1
            if name[0] == "bra":
                warp.at[taken] = min(self.labels[operands[0]], key=lambda at: abs(at - here))
            elif name[0] == "ret":
                warp.at[taken] = end
            elif name[0] == "bar" and name[1] == "sync":
                assert taken.all(), "a barrier that some threads of a warp do not reach"
                yield "bar", lambda: False
            elif name[0] == "mbarrier" and name[1] == "try_wait":
                yield self.waits(warp, operands)
                self.write(warp, operands[0], np.ones(32), "pred", taken)
            elif taken.any():
                try:
                    getattr(self, "do_" + name[0])(warp, name, operands, taken)
                except Exception as error:
                    raise RuntimeError(f"warp {warp.index}: {instruction.text}") from error

    # Operands.

    def read(self, warp, operand, kind="b64"):
        """The value of an operand in every lane: bits, signed integers or floats."""
        bits = warp.registers.get(operand)
        if bits is None:
            bits = warp.registers[operand] = self.constant(warp, operand)
        if kind == "pred":
            return bits
        size = _SIZE[kind]
        if size < 8:
            bits = bits & np.uint64((1 << 8 * size) - 1)
        if kind[0] == "s":
            return bits.astype(f"u{size}").view(f"i{size}").astype(np.int64)
        if kind == "f32":
            return bits.astype(np.uint32).view(np.float32)
        if kind == "bf16":
            return (bits.astype(np.uint32) << 16).view(np.float32)
        if kind == "f16":
            return bits.astype(np.uint16).view(np.float16).astype(np.float32)
        return bits

    def constant(self, warp, operand):
        special = {
            "%tid.x": warp.index * 32 + LANES, "%ctaid.x": self.place[0],
            "%ctaid.y": self.place[1], "__dynamic_shmem__0": SHARED_AT,
        }  # fmt: skip
        if operand in special:
            value = special[operand]
        elif operand.startswith("0f"):
            value = int(operand[2:], 16)
        elif operand in self.parameters:  # of a tensor map: what the copy finds it by
            value = list(self.parameters).index(operand)
        else:
            value = int(operand, 0) & (1 << 64) - 1
        return np.broadcast_to(np.asarray(value, np.uint64), 32)

    def write(self, warp, operand, values, kind, taken):
        if np.shape(values) != (32,):
            values = np.broadcast_to(values, 32)
        if kind == "f32":
            values = values.astype(np.float32).view(np.uint32)
        elif kind == "bf16":
            bits = values.astype(np.float32).view(np.uint32)
            bits = np.where(np.isnan(values), 0x7FFF0000, bits).astype(np.int64)
            values = bits + 0x7FFF + (bits >> 16 & 1) >> 16
        elif kind == "f16":
            values = values.astype(np.float16).view(np.uint16)
        values = values.astype(np.uint64)
        if kind != "pred" and _SIZE[kind] < 8:
            values = values & np.uint64((1 << 8 * _SIZE[kind]) - 1)
        if not taken.all():
            before = warp.registers.get(operand)
            values = np.where(taken, values, 0 if before is None else before)
        warp.registers[operand] = values

    def address(self, warp, operand):
        base, _, offset = operand.strip("[]").partition("+")
        return self.read(warp, base).astype(np.int64) + int(offset or 0)

    def vector(self, operand):
        return [part.strip() for part in operand.strip("{}").split(",")]

    def in_shared(self, address, size):
        """Shared memory, and indices into it: [addresses, size]."""
        first = np.asarray(address).astype(np.int64).reshape(-1) - SHARED_AT
        assert first.min() >= 0 and first.max() <= len(self.shared) - size, first
        assert not (first % min(size, 16)).any(), f"shared memory at {first} is not aligned"
        return self.shared, first[:, None] + np.arange(size)

    # Arithmetic.

    def do_mov(self, warp, name, operands, taken):
        half = {"b64": "b32", "b32": "b16"}.get(name[-1])
        bits = np.uint64(_SIZE[name[-1]] * 4)
        if operands[1].startswith("{"):
            low, high = (self.read(warp, part, half) for part in self.vector(operands[1]))
            self.write(warp, operands[0], low | high << bits, name[-1], taken)
        elif operands[0].startswith("{"):
            whole = self.read(warp, operands[1], name[-1])
            for i, part in enumerate(self.vector(operands[0])):
                self.write(warp, part, whole >> np.uint64(i) * bits, half, taken)
        else:
            self.write(warp, operands[0], self.read(warp, operands[1]), "b64", taken)

    def binary(self, warp, operands, kind, taken, function):
        a, b = (self.read(warp, o, kind) for o in operands[1:3])
        self.write(warp, operands[0], function(a, b), kind, taken)

    def do_add(self, warp, name, operands, taken):
        if name[-1] in ("bf16", "f16") and "f32" in name:  # mixed: f32 + 16 bits
            a = self.read(warp, operands[1], name[-1])
            self.write(warp, operands[0], a + self.read(warp, operands[2], "f32"), "f32", taken)
        else:
            self.binary(warp, operands, name[-1], taken, np.add)

    def do_or(self, warp, name, operands, taken):
        self.binary(warp, operands, name[-1], taken, np.bitwise_or)

    def do_xor(self, warp, name, operands, taken):
        self.binary(warp, operands, name[-1], taken, np.bitwise_xor)

    def do_and(self, warp, name, operands, taken):
        self.binary(warp, operands, name[-1], taken, np.bitwise_and)

    def do_not(self, warp, name, operands, taken):
        value = self.read(warp, operands[1], name[-1])
        flipped = 1 - value if name[-1] == "pred" else ~value
        self.write(warp, operands[0], flipped, name[-1], taken)

    def do_neg(self, warp, name, operands, taken):
        self.write(warp, operands[0], -self.read(warp, operands[1], name[-1]), name[-1], taken)

    def do_shl(self, warp, name, operands, taken):
        self.binary(warp, operands, name[-1], taken, np.left_shift)

    def do_shr(self, warp, name, operands, taken):
        self.binary(warp, operands, name[-1], taken, np.right_shift)

    def do_mul(self, warp, name, operands, taken):
        a, b = (self.read(warp, o, name[-1]) for o in operands[1:3])
        wide = {"s32": "s64", "u32": "u64"}[name[-1]] if "wide" in name else name[-1]
        self.write(warp, operands[0], a * b, wide, taken)

    def do_mad(self, warp, name, operands, taken):
        a, b, c = (self.read(warp, o, name[-1]) for o in operands[1:4])
        self.write(warp, operands[0], a * b + c, name[-1], taken)

    def do_setp(self, warp, name, operands, taken):
        kind = name[-1] if name[-1][0] != "b" else "u" + name[-1][1:]
        a, b = (self.read(warp, o, kind) for o in operands[1:3])
        self.write(warp, operands[0], _COMPARE[name[1]](a, b), "pred", taken)

    def do_selp(self, warp, name, operands, taken):
        chosen = self.read(warp, operands[3], "pred").astype(bool)
        a, b = (self.read(warp, o) for o in operands[1:3])
        self.write(warp, operands[0], np.where(chosen, a, b), "b64", taken)

    def do_cvt(self, warp, name, operands, taken):
        to, come = name[-2:]
        if to in ("bf16x2", "f16x2"):  # the first operand goes into the upper half
            for part, operand in (("upper half", operands[1]), ("lower half", operands[2])):
                self.write(warp, part, self.read(warp, operand, come), to[:-2], taken)
            upper, lower = (warp.registers[part] for part in ("upper half", "lower half"))
            self.write(warp, operands[0], upper << np.uint64(16) | lower, "b32", taken)
        else:
            assert len(operands) == 2, name
            self.write(warp, operands[0], self.read(warp, operands[1], come), to, taken)

    def do_shfl(self, warp, name, operands, taken):
        assert name[1:3] == ["sync", "idx"] and taken.all(), name
        value = self.read(warp, operands[1], "b32")
        source = self.read(warp, operands[2], "b32").astype(np.int64)
        self.write(warp, operands[0].partition("|")[0], value[source], "b32", taken)

    def do_cvta(self, warp, name, operands, taken):
        self.write(warp, operands[0], self.read(warp, operands[1]), "b64", taken)

    # Memory.

    def do_ld(self, warp, name, operands, taken):
        kind = name[-1]
        if name[1] == "param":
            value = self.parameters[operands[1].strip("[]")]
            self.write(warp, operands[0], np.uint64(value), kind, taken)
            return
        into, size = self.vector(operands[0]), _SIZE[kind]
        where = self.in_shared if name[1] == "shared" else self.memory.at
        data, at = where(self.address(warp, operands[1])[taken], len(into) * size)
        values = np.zeros((32, len(into)), f"u{size}")
        values[taken] = data[at].view(f"u{size}")
        for i, part in enumerate(into):
            self.write(warp, part, values[:, i], f"b{8 * size}", taken)

    def do_st(self, warp, name, operands, taken):
        size = _SIZE[name[-1]]
        parts = [self.read(warp, o).astype(f"u{size}") for o in self.vector(operands[1])]
        values = np.stack(parts, 1)[taken].view(np.uint8)
        where = self.in_shared if name[1] == "shared" else self.memory.at
        data, at = where(self.address(warp, operands[0])[taken], values.shape[1])
        data[at] = values

    def do_cp(self, warp, name, operands, taken):
        if name[2] == "commit_group":
            warp.groups.append(warp.open_copies)
            warp.open_copies = []
        elif name[2] == "wait_group":
            while len(warp.groups) > int(operands[0]):
                for copy in warp.groups.pop(0):
                    copy()
        elif name[2] == "bulk":
            self.bulk(warp, name, operands, taken)
        else:
            to, source = (self.address(warp, o)[taken] for o in operands[:2])
            whole = self.read(warp, operands[3], "b32")[taken] == 16
            assert (self.read(warp, operands[3], "b32")[taken][~whole] == 0).all()

            def copy():
                _, at = self.in_shared(to, 16)
                self.shared[at] = 0
                if whole.any():
                    data, there = self.memory.at(source[whole], 16)
                    self.shared[at[whole]] = data[there]

            if self.eager:
                copy()
            else:
                warp.open_copies.append(copy)

    def happen(self, action, at_once):
        if at_once:
            action()
        else:
            self.pending.append(action)

    # Barriers.

    def waits(self, warp, operands):
        address = int(self.address(warp, operands[1])[0])
        parity = int(self.read(warp, operands[2], "b32")[0])
        return f"mbarrier {address}", lambda: self.barriers[address][3] & 1 != parity

    def arrive(self, address, count, size):
        """Count arrivals and expected bytes; a phase completes when none are left."""
        barrier = self.barriers[address]
        barrier[1] -= count
        barrier[2] += size
        assert barrier[1] >= 0
        if barrier[1] == 0 and barrier[2] == 0:
            barrier[1] = barrier[0]
            barrier[3] += 1

    def do_mbarrier(self, warp, name, operands, taken):
        lane = one(taken)
        if name[1] == "init":
            count = int(self.read(warp, operands[1])[lane])
            self.barriers[int(self.address(warp, operands[0])[lane])] = [count, count, 0, 0]
        else:
            assert name[1:3] == ["arrive", "expect_tx"], name
            size = int(self.read(warp, operands[2])[lane])
            self.arrive(int(self.address(warp, operands[1])[lane]), 1, size)

    def do_fence(self, warp, name, operands, taken):
        pass

    def do_bar(self, warp, name, operands, taken):
        assert name[1:] == ["warp", "sync"] and taken.all(), name

    def do_elect(self, warp, name, operands, taken):
        assert taken.all(), "elected among some threads of a warp"
        self.write(warp, operands[0].partition("|")[2], LANES == 0, "pred", taken)

    # Matrices of a warp.

    def do_ldmatrix(self, warp, name, operands, taken):
        assert taken.all() and name[3:5] == ["m8n8", "x4"], name
        data, at = self.in_shared(self.address(warp, operands[1]), 16)
        words = data[at].view(np.uint32)  # [4 * 8 rows, 4]: lane = row * 4 + word
        for i, register in enumerate(self.vector(operands[0])):
            self.write(warp, register, words[8 * i : 8 * i + 8].reshape(32), "b32", taken)

    def do_mma(self, warp, name, operands, taken):
        """m16n8k32, E4M3, one E8M0 scale per row of A and column of B."""
        text = ".".join(name)
        assert taken.all() and "block_scale.scale_vec::1X.m16n8k32.row.col" in text, text
        assert text.endswith("f32.e4m3.e4m3.f32.ue8m0"), text
        row, quad = LANES >> 2, LANES & 3

        def codes(register):
            words = self.read(warp, register, "b32").astype(np.uint32)
            return E4M3[words.view(np.uint8).reshape(32, 4)]

        a, b, c = np.zeros((16, 32)), np.zeros((8, 32)), np.zeros((16, 8), np.float32)
        at = (quad * 4)[:, None] + np.arange(4)
        for i, register in enumerate(self.vector(operands[1])):
            a[(row + i % 2 * 8)[:, None], i // 2 * 16 + at] = codes(register)
        for i, register in enumerate(self.vector(operands[2])):
            b[row[:, None], i * 16 + at] = codes(register)
        for i, register in enumerate(self.vector(operands[3])):
            c[row + i // 2 * 8, quad * 2 + i % 2] = self.read(warp, register, "f32")
        scales = []
        for operand, select in ((operands[4], operands[5]), (operands[6], operands[7])):
            byte, thread = map(int, self.vector(select))
            assert thread == 0
            words = self.read(warp, operand.strip("{}"), "b32").astype(np.uint32)
            scales.append(E8M0[words.view(np.uint8).reshape(32, 4)[:, byte]])
        a_scale, b_scale = np.zeros(16), np.zeros(8)
        asked = LANES[quad < 2]  # threads 0 and 1 of four: row, and row + 8
        a_scale[(asked >> 2) + (asked & 1) * 8] = scales[0][asked]
        b_scale[:] = scales[1][::4]  # thread 0 of four
        d = (c + (a * a_scale[:, None]) @ (b * b_scale[:, None]).T).astype(np.float32)
        for i, register in enumerate(self.vector(operands[0])):
            self.write(warp, register, d[row + i // 2 * 8, quad * 2 + i % 2], "f32", taken)

    # The tensor memory accelerator.

    def bulk(self, warp, name, operands, taken):
        """A copy by the tensor memory accelerator: plain bytes, or a box of a matrix."""
        lane = one(taken)
        to = int(self.address(warp, operands[0])[lane])
        if "tensor" in name:
            index, column, row = self.vector(
                operands[1].replace("[", "").replace("]", "").replace("{", "")
            )
            tensor = list(self.parameters.values())[int(self.read(warp, index)[lane])]
            column, row = (int(self.read(warp, c, "s32")[lane]) for c in (column, row))
            barrier, (rows, columns) = operands[2], tensor.box
            values = np.zeros((rows, columns), np.uint8)
            part = tensor.codes[row : row + rows, column : column + columns]
            values[: part.shape[0], : part.shape[1]] = part
            at = to + np.arange(rows * columns)
            at ^= (at >> 7 & 7) << 4  # the 128-byte swizzle, of addresses
            assert to % 1024 == 0
        else:
            size, barrier = int(self.read(warp, operands[2])[lane]), operands[3]
            data, there = self.memory.at(self.address(warp, operands[1])[[lane]], size)
            values, at = data[there], to + np.arange(size)
        barrier = int(self.address(warp, barrier)[lane])

        def copy():
            self.shared[at - SHARED_AT] = values.reshape(-1)
            self.arrive(barrier, 0, -values.size)

        self.happen(copy, self.eager)

    # Tensor memory.

    def do_tcgen05(self, warp, name, operands, taken):
        if name[1] in ("fence::before_thread_sync", "fence::after_thread_sync"):
            return
        if name[1] in ("alloc", "dealloc", "relinquish_alloc_permit", "ld", "wait::ld"):
            assert taken.all(), name
            lane = 0
        else:
            lane = one(taken)
        if name[1] == "alloc":
            assert int(self.read(warp, operands[1])[0]) == 256
            data, at = self.in_shared(self.address(warp, operands[0])[:1], 4)
            data[at] = np.array([[0, 1, 0, 0]], np.uint8)  # from column 256
        elif name[1] == "ld":
            self.load(warp, name, operands, taken)
        elif name[1] == "commit":
            barrier = int(self.address(warp, operands[0])[lane])
            self.happen(lambda: self.arrive(barrier, 1, 0), not self.eager)
        elif name[1] == "cp":
            assert name[3:] == ["32x128b", "warpx4"], name
            to, source = (int(self.read(warp, o.strip("[]"))[lane]) for o in operands)
            self.happen(lambda: self.copy_scales(to, source), not self.eager)
        elif name[1] == "mma":
            assert ".".join(name[3:]) == "kind::mxf8f6f4.block_scale.scale_vec::1X", name
            values = [int(self.read(warp, o.strip("[]"))[lane]) for o in operands[:6]]
            add = bool(self.read(warp, operands[6], "pred")[lane])
            self.happen(lambda: self.multiply(*values, add), not self.eager)

    def load(self, warp, name, operands, taken):
        assert name[2:] == ["sync", "aligned", "32x32b", "x32", "b32"], name
        address = int(self.address(warp, operands[1])[0])
        lanes, column = address >> 16, address & 0xFFFF
        assert lanes == warp.index % 4 * 32, "a warp reads its own lanes"
        for i, register in enumerate(self.vector(operands[0])):
            self.write(warp, register, self.tensor[lanes + LANES, column + i], "b32", taken)

    def matrix(self, descriptor, rows, width, pitch):
        """Bytes [rows, width] that a matrix descriptor points at."""
        start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
        assert descriptor >> 46 & 7 == 1 and descriptor >> 49 & 15 == 0
        swizzled = {0: False, 2: True}[descriptor >> 61]
        row, k = np.arange(rows)[:, None], np.arange(width)
        at = start + (row >> 3) * stride + (row & 7) * pitch + k
        if swizzled:
            at = at ^ (at >> 7 & 7) << 4
        return self.shared[at - SHARED_AT]

    def copy_scales(self, to, descriptor):
        words = np.ascontiguousarray(self.matrix(descriptor, 32, 16, 16)).view(np.uint32)
        for part in range(4):
            self.tensor[part * 32 + LANES, to : to + 4] = words

    def multiply(self, to, a, b, instruction, a_scale, b_scale, add):
        """128 x N x 32: E4M3 codes, an E8M0 scale per row of both."""
        columns, rows = (instruction >> 17 & 63) << 3, (instruction >> 24 & 31) << 4
        other = instruction & ~(63 << 17 | 31 << 24 | 3 << 29 | 3 << 4)
        assert rows == 128 and other == 1 << 23, "E4M3 by E4M3, K-major, scales in E8M0"
        values = []
        for source, scale, count, byte in (
            (a, a_scale, rows, instruction >> 29 & 3), (b, b_scale, columns, instruction >> 4 & 3),
        ):  # fmt: skip
            at = np.arange(count)
            words = self.tensor[at % 32, scale + at // 32]
            assert (words == self.tensor[96 + at % 32, scale + at // 32]).all(), "for all warps"
            scales = E8M0[words >> np.uint32(8 * byte) & np.uint32(255)]
            codes = self.matrix(source, count, 32, 128)
            values.append(E4M3[codes] * scales[:, None])
        product = values[0] @ values[1].T
        place = self.tensor[:rows, to : to + columns]
        before = place.view(np.float32) if add else 0
        place[:] = (before + product).astype(np.float32).view(np.uint32)
