"""The matrix instructions and tensor memory of `ptx_machine`, as the PTX ISA has them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LANES = np.arange(32)
SHARED_AT = 1 << 16  # where shared memory starts, in its own space


def _values() -> tuple[np.ndarray, np.ndarray]:
    """What the 256 codes of E4M3 and of E8M0 stand for."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    e4m3 = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    e4m3 = np.where((byte & 127) == 127, np.nan, np.where(byte & 128, -e4m3, e4m3))
    return e4m3, np.where(byte == 255, np.nan, 2.0 ** (byte - 127.0))


E4M3, E8M0 = _values()


def one(taken: np.ndarray) -> int:
    """The thread that executes what one thread is to execute."""
    assert taken.sum() == 1, "one thread of a warp"
    return int(np.flatnonzero(taken)[0])


@dataclass
class TensorMap:
    """What a tensor map describes: boxes of codes [rows, K], rows in the 128-byte swizzle."""

    codes: np.ndarray
    box: tuple[int, int] = (128, 128)


class Matrices:
    """The part of `ptx_machine.Block` that multiplies, and fills what is multiplied."""

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
        """A copy by the tensor memory accelerator: bytes as they are, or a box of a matrix."""
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
            given = [int(self.read(warp, o.strip("[]"))[lane]) for o in operands[:6]]
            add = bool(self.read(warp, operands[6], "pred")[lane])
            self.happen(lambda: self.multiply(*given, add), not self.eager)

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
        """128 rows by N by 32 codes, E4M3, an E8M0 scale for each row of both."""
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
