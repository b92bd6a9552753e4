"""MXFP8 x MXFP8 on GeForce Blackwell (sm_120a, sm_121a), in CuTe DSL. Compiled, never run.

One thread block of 8 warps computes 128 x 128 results by `mma.sync` with block scales: the tensor
cores multiply 16 x 32 codes by 32 x 8 and apply a power of two per row and column. `cp.async`
brings codes and scales into shared memory, in a ring of three stages of 128 columns of K.

A stage holds, at `A_AT` to `B_SCALE_AT`: the codes of A, then of B, 128 rows of 128 bytes; then
the scales of 128 rows by 4 blocks of each, which the tiled order (`layout`) stores in 512
contiguous bytes. In a row of codes the 16-byte chunk c is stored at `c ^ row % 8`, so that the 8
rows that one phase of `ldmatrix` reads are in different banks.

Which values each thread of a warp holds is in the PTX ISA, "Matrix fragments for mma.m16n8k32" and
"Block scaling": of the scales, thread t supplies row `t % 2 * 8 + t // 4` of A and column `t // 4`
of B. The four blocks of a row are one 32-bit word of the tiled order, of which the instruction
selects a byte, so a word is read once for four products.

Rejected: the scale layouts of `cutlass.utils` (the same words, which four lines describe), TMA (a
producer thread and barriers, in place of eight copies per thread), a persistent grid.

https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-block-scaling
"""

import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.memory import SmemAllocator

from .store import store

THREADS = 256
TILE = 128  # rows of A, rows of B and columns of K in a stage
STAGES = 3
SCALES = 512  # bytes of scales of 128 rows by 4 blocks
A_AT, B_AT = 0, TILE * TILE
A_SCALE_AT = B_AT + TILE * TILE
B_SCALE_AT = A_SCALE_AT + SCALES
STAGE = B_SCALE_AT + SCALES
SHARED = STAGES * STAGE  # 101,376 bytes, the most that a thread block can have

_COPY = "cp.async.cg.shared.global [{$r0}], [{$r1}], 16, {$r2};"
_WORD = "ld.shared.b32 {$w0}, [{$r0}];"
_MATRICES = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];"
_MULTIPLY = (
    "mma.sync.aligned.kind::mxf8f6f4.block_scale.scale_vec::1X.m16n8k32.row.col"
    ".f32.e4m3.e4m3.f32.ue8m0 {{$w0}, {$w1}, {$w2}, {$w3}}, {{$r0}, {$r1}, {$r2}, {$r3}}, "
    "{{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}}, {$r10}, {BYTE, 0}, {$r11}, {BYTE, 0};"
)


def chunk_at(row, chunk):
    """Offset of a 16-byte chunk of a row of codes in a stage."""
    return row * TILE + ((chunk ^ (row & 7)) << 4)


def scale_word_at(row):
    """Offset of the word with the four scales of a row of 128, in tiled order."""
    return ((row & 31) << 4) + ((row >> 5) << 2)


def a_row(lane):
    """The row of A (of 16) and the half of 32 codes that a lane addresses for `ldmatrix`."""
    return lane & 15, lane >> 4


def b_row(lane):
    """As `a_row`, for 16 rows of B: two operands of 8 rows."""
    return (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1


def a_scale_row(lane):
    """The row of 16 whose scale a lane supplies; lanes with bit 1 set are ignored."""
    return ((lane & 1) << 3) + (lane >> 2)


@cute.jit
def fetch_codes(to, codes, rows, K, first_row, first, thread):
    """Load codes [128, 128] at (first_row, first) of [rows, K]; zeros beyond the matrix."""
    for i in cutlass.range_constexpr(TILE * TILE // 16 // THREADS):
        row, chunk = (thread + i * THREADS) >> 3, thread & 7
        inside = (first_row + row < rows) & (first + chunk * 16 < K)
        offset = Int64(first_row + row) * K + first + chunk * 16 if inside else Int64(0)
        size = Int32(16) if inside else Int32(0)
        cute.arch.inline_ptx(
            _COPY, read_only_args=[to + chunk_at(row, chunk), codes.toint() + offset, size]
        )


@cute.jit
def fetch(
    to, a, a_scale, b, b_scale, a_rows, b_rows, K, tiles, tile_row, tile_column, step, thread
):
    """Load the codes and scales of step `step` of K into the stage at `to`."""
    fetch_codes(to + A_AT, a, a_rows, K, tile_row * TILE, step * TILE, thread)
    fetch_codes(to + B_AT, b, b_rows, K, tile_column * TILE, step * TILE, thread)
    if thread < 2 * SCALES // 16:
        byte = (thread & 31) << 4
        if thread < SCALES // 16:
            source = a_scale.toint() + (Int64(tile_row) * tiles + step) * SCALES + byte
            cute.arch.inline_ptx(_COPY, read_only_args=[to + A_SCALE_AT + byte, source, Int32(16)])
        else:
            source = b_scale.toint() + (Int64(tile_column) * tiles + step) * SCALES + byte
            cute.arch.inline_ptx(_COPY, read_only_args=[to + B_SCALE_AT + byte, source, Int32(16)])


@cute.jit
def multiply(total, stage, warp_row, warp_column, lane):
    """Add the products of a stage to total [4, 4, 4], the 64 x 32 results of a warp."""
    a_words, b_words = [], []
    for i in cutlass.range_constexpr(4):
        at = scale_word_at(warp_row + i * 16 + a_scale_row(lane))
        a_words.append(_read(_WORD, stage + A_SCALE_AT + at, 1))
        at = scale_word_at(warp_column + i * 8 + (lane >> 2))
        b_words.append(_read(_WORD, stage + B_SCALE_AT + at, 1))
    for block in cutlass.range_constexpr(4):
        x, w = [], []
        for i in cutlass.range_constexpr(4):
            row, half = a_row(lane)
            at = chunk_at(warp_row + i * 16 + row, block * 2 + half)
            x.append(_read(_MATRICES, stage + A_AT + at, 4))
        for j in cutlass.range_constexpr(2):
            row, half = b_row(lane)
            at = chunk_at(warp_column + j * 16 + row, block * 2 + half)
            four = _read(_MATRICES, stage + B_AT + at, 4)
            w += [four[:2], four[2:]]
        for i in cutlass.range_constexpr(4):
            for j in cutlass.range_constexpr(4):
                before = [total[i, j, e] for e in range(4)]
                after = cute.arch.inline_ptx(
                    _MULTIPLY.replace("BYTE", str(block)),
                    write_only_types=[Float32] * 4,
                    read_only_args=[*x[i], *w[j], *before, a_words[i], b_words[j]],
                )
                for e in cutlass.range_constexpr(4):
                    total[i, j, e] = after[e]


def _read(ptx, address, count):
    return cute.arch.inline_ptx(ptx, write_only_types=[Int32] * count, read_only_args=[address])


@cute.kernel
def kernel(
    a, a_scale, b, b_scale, bias, out, a_rows: Int32, b_rows: Int32, K: Int32, tiles: Int32,
    M: Int32, N: Int32, HAS_BIAS: cutlass.Constexpr,
):  # fmt: skip
    """The first M x N of A [a_rows, K] @ B [b_rows, K].T + bias; `tiles`: of scales along K."""
    tile_row, tile_column, _ = cute.arch.block_idx()
    thread, _, _ = cute.arch.thread_idx()
    lane, warp = thread & 31, thread >> 5
    warp_row, warp_column = (warp & 1) * 64, (warp >> 1) * 32
    shared = SmemAllocator().allocate(SHARED, 128).toint()
    total = cute.make_rmem_tensor((4, 4, 4), Float32)
    total.fill(0.0)
    operands = (a, a_scale, b, b_scale, a_rows, b_rows, K, tiles, tile_row, tile_column)
    for step in cutlass.range_constexpr(STAGES - 1):
        if step < tiles:
            fetch(shared + step * STAGE, *operands, Int32(step), thread)
        cute.arch.cp_async_commit_group()
    for step in cutlass.range(tiles, unroll=1):
        cute.arch.cp_async_wait_group(STAGES - 2)  # this step has arrived
        cute.arch.sync_threads()  # for all warps, and all have read the stage that is filled next
        ahead = step + STAGES - 1
        if ahead < tiles:
            fetch(shared + ahead % STAGES * STAGE, *operands, ahead, thread)
        cute.arch.cp_async_commit_group()  # empty ones at the end keep the count of groups
        multiply(total, shared + step % STAGES * STAGE, warp_row, warp_column, lane)
    for i in cutlass.range_constexpr(4):
        for j in cutlass.range_constexpr(4):
            for half in cutlass.range_constexpr(2):
                pair = cute.make_rmem_tensor(2, Float32)
                for e in cutlass.range_constexpr(2):
                    pair[e] = total[i, j, half * 2 + e]
                row = tile_row * TILE + warp_row + i * 16 + half * 8 + (lane >> 2)
                column = tile_column * TILE + warp_column + j * 8 + (lane & 3) * 2
                store(out, bias, pair, row, column, M, N, HAS_BIAS)


@cute.jit
def launch(
    a: cute.Pointer, a_scale: cute.Pointer, b: cute.Pointer, b_scale: cute.Pointer,
    bias: cute.Pointer, out: cute.Pointer, a_rows: Int32, b_rows: Int32, K: Int32, tiles: Int32,
    M: Int32, N: Int32, stream, HAS_BIAS: cutlass.Constexpr,
):  # fmt: skip
    """Host code: a grid of one thread block per result tile."""
    grid = (cute.ceil_div(M, TILE), cute.ceil_div(N, TILE), 1)
    kernel(a, a_scale, b, b_scale, bias, out, a_rows, b_rows, K, tiles, M, N, HAS_BIAS).launch(
        grid=grid, block=(THREADS, 1, 1), smem=SHARED, stream=stream
    )
