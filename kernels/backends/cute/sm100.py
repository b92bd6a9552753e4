"""MXFP8 x MXFP8 on data center Blackwell (sm_100a, sm_103a), in CuTe DSL. Compiled, never run.

One thread block of 4 warps computes 128 x 128 results. Warp 0 loads through the tensor memory
accelerator (TMA); warp 1 issues the matrix instructions (`tcgen05.mma`, which applies block scales)
that accumulate in tensor memory; all four warps store the results, one row per thread. Two thread
blocks share an SM, so that one multiplies while the other stores. Shared memory holds a ring of
stages of 128 columns of K: `full` barriers count the bytes that have arrived, `empty` barriers the
multiplications that have read them.

Layouts:

* Codes: 128 rows of 128 bytes in the 128-byte swizzle, which TMA writes and the matrix descriptor
  names. 8 rows are 1,024 bytes; the next block of 32 along K is 32 bytes further.
* Scales: 128 rows by 4 blocks, 512 contiguous bytes as the tiled order (`layout`) stores them: 32
  rows of 16 bytes. `tcgen05.cp` copies them to four columns of tensor memory, once for the lanes of
  each warp, so row r is in lane `r % 32`, column `r // 32`, and byte c is block c. That is what the
  multiplication expects of one scale per 32 values; the instruction descriptor selects the byte.
* Tensor memory: columns 0 to 127 are results, one row per lane; then 4 columns of scales of A, 4 of
  B.

TMA fills rows and columns beyond the matrices with zeros; results beyond them are not stored.
Scales beyond K are stored padding, and zero.

Rejected: the layout algebra of `cutlass.utils` for scales (six views of 512 bytes), whose
descriptors are the same (a test compares); tiles of 256 columns, clusters, a persistent grid: first
it has to run.

https://docs.nvidia.com/cuda/parallel-thread-execution/#tcgen05-block-scaling, "Matrix descriptor",
"Instruction descriptor"
"""

import cutlass
from cutlass import Float32, Int32, Int64, Uint8, cute
from cutlass.cute.nvgpu import cpasync, tcgen05
from cutlass.memory import SmemAllocator

from .store import store

THREADS = 128
TILE = 128  # rows of A, rows of B and columns of K in a stage
STAGES = 3
CODES = TILE * TILE
SCALES = 512  # bytes of scales of 128 rows by 4 blocks
SWIZZLE = (3, 4, 3)  # address bits 4 to 6 are XORed with bits 7 to 9
A_AT, B_AT = 0, STAGES * CODES
A_SCALE_AT = 2 * STAGES * CODES
B_SCALE_AT = A_SCALE_AT + STAGES * SCALES
BARRIERS_AT = B_SCALE_AT + STAGES * SCALES  # full, empty, done; then tensor memory's address
SHARED = BARRIERS_AT + (2 * STAGES + 1) * 8 + 8
COLUMNS = 256  # of tensor memory; 136 are used
A_SCALE_COLUMN, B_SCALE_COLUMN = TILE, TILE + 4

_BULK = (
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
    "[{$r0}], [{$r1}], {$r2}, [{$r3}];"
)
_COPY_SCALES = "tcgen05.cp.cta_group::1.32x128b.warpx4 [{$r0}], {$r1};"
_MULTIPLY = (
    "{.reg .pred more; setp.ne.b32 more, {$r6}, 0; "
    "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale.scale_vec::1X "
    "[{$r0}], {$r1}, {$r2}, {$r3}, [{$r4}], [{$r5}], more;}"
)
_READ = (
    "tcgen05.ld.sync.aligned.32x32b.x32.b32 {"
    + ", ".join(f"{{$w{i}}}" for i in range(32))
    + "}, [{$r0}]; tcgen05.wait::ld.sync.aligned;"
)
_WORD = "ld.shared.b32 {$w0}, [{$r0}];"
_AFTER = "tcgen05.fence::after_thread_sync;"
_BEFORE = "tcgen05.fence::before_thread_sync;"


def descriptor(stride: int, swizzled: bool) -> int:
    """A matrix descriptor without its address; groups of 8 rows are `stride` bytes apart.

    Bit 16 sets the leading-dimension stride, which a single swizzled row, or 16 bytes, does not
    use; NVIDIA's code sets 1.
    """
    return 1 << 16 | stride >> 4 << 32 | 1 << 46 | (2 if swizzled else 0) << 61


def instruction(block: int) -> int:
    """The instruction descriptor: E4M3 x E4M3, E8M0 scales in byte `block`, 128 x 128 results."""
    return block << 4 | TILE >> 3 << 17 | 1 << 23 | TILE >> 4 << 24 | block << 29


def _at(address, stride, swizzled):
    return Int64(address >> 4) | Int64(descriptor(stride, swizzled))


@cute.jit
def fetch(shared, full, empty, a_atom, a_from, a_to, b_atom, b_from, b_to, a_scale, b_scale, tiles):
    """Load every step of K into the ring of stages; run by one warp."""
    for step in cutlass.range(tiles, unroll=1):
        stage, phase = step % STAGES, step // STAGES & 1
        cute.arch.mbarrier_wait(empty + stage, phase ^ 1)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(full + stage, 2 * CODES + 2 * SCALES)
            for to, source in ((A_SCALE_AT, a_scale), (B_SCALE_AT, b_scale)):
                cute.arch.inline_ptx(
                    _BULK,
                    read_only_args=[
                        shared + to + stage * SCALES, source + Int64(step) * SCALES,
                        Int32(SCALES), (full + stage).toint(),
                    ],
                )  # fmt: skip
        cute.copy(a_atom, a_from[None, step], a_to[None, stage], tma_bar_ptr=full + stage)
        cute.copy(b_atom, b_from[None, step], b_to[None, stage], tma_bar_ptr=full + stage)


@cute.jit
def multiply(shared, memory, full, empty, done, tiles):
    """Multiply and accumulate every step of K; run by one warp. `memory`: tensor memory."""
    a_scale, b_scale = memory + A_SCALE_COLUMN, memory + B_SCALE_COLUMN
    for step in cutlass.range(tiles, unroll=1):
        stage, phase = step % STAGES, step // STAGES & 1
        cute.arch.mbarrier_wait(full + stage, phase)
        with cute.arch.elect_one():
            cute.arch.inline_ptx(_AFTER)
            for to, at in ((a_scale, A_SCALE_AT), (b_scale, B_SCALE_AT)):
                source = _at(shared + at + stage * SCALES, 128, False)
                cute.arch.inline_ptx(_COPY_SCALES, read_only_args=[to, source])
            for block in cutlass.range_constexpr(4):
                at = stage * CODES + block * 32
                a = _at(shared + A_AT + at, 1024, True)
                b = _at(shared + B_AT + at, 1024, True)
                add = step if block == 0 else Int32(1)
                cute.arch.inline_ptx(
                    _MULTIPLY,
                    read_only_args=[memory, a, b, Int32(instruction(block)), a_scale, b_scale, add],
                )
            tcgen05.commit(empty + stage)
    with cute.arch.elect_one():
        tcgen05.commit(done)


@cute.kernel
def kernel(
    a_atom: cute.CopyAtom, a_codes: cute.Tensor, a_scale, b_atom: cute.CopyAtom,
    b_codes: cute.Tensor, b_scale, bias, out, tiles: Int32, M: Int32, N: Int32,
    HAS_BIAS: cutlass.Constexpr,
):  # fmt: skip
    """The first M x N of A @ B.T + bias; `tiles`: tiles of scales along K."""
    tile_row, tile_column, _ = cute.arch.block_idx()
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(thread >> 5)
    memory_at = SmemAllocator().allocate(SHARED, 1024)
    shared = memory_at.toint()
    full = cute.recast_ptr(memory_at + BARRIERS_AT, dtype=Int64)
    empty, done = full + STAGES, full + 2 * STAGES
    start = cute.recast_ptr(memory_at + SHARED - 8, dtype=Int32)
    if warp == 0:
        with cute.arch.elect_one():
            for i in cutlass.range_constexpr(2 * STAGES + 1):
                cute.arch.mbarrier_init(full + i, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.alloc_tmem(COLUMNS, start)
        cute.arch.relinquish_tmem_alloc_permit()
        cute.arch.inline_ptx(_BEFORE)
    cute.arch.sync_threads()
    cute.arch.inline_ptx(_AFTER)
    memory = cute.arch.inline_ptx(_WORD, write_only_types=[Int32], read_only_args=[start.toint()])
    if warp == 0:
        views = []
        for at, codes, tile, atom in (
            (A_AT, a_codes, tile_row, a_atom), (B_AT, b_codes, tile_column, b_atom),
        ):  # fmt: skip
            pointer = cute.recast_ptr(memory_at + at, cute.make_swizzle(*SWIZZLE), Uint8)
            stages = cute.make_layout((TILE, TILE, STAGES), stride=(TILE, 1, CODES))
            to = cute.group_modes(cute.make_tensor(pointer, stages), 0, 2)
            source = cute.group_modes(cute.local_tile(codes, (TILE, TILE), (tile, None)), 0, 2)
            to, source = cpasync.tma_partition(atom, 0, cute.make_layout(1), to, source)
            views += [atom, source, to]
        a_from = a_scale.toint() + Int64(tile_row) * tiles * SCALES
        b_from = b_scale.toint() + Int64(tile_column) * tiles * SCALES
        fetch(shared, full, empty, *views, a_from, b_from, tiles)
    if warp == 1:
        multiply(shared, memory, full, empty, done, tiles)
    cute.arch.sync_warp()
    cute.arch.mbarrier_wait(done, 0)
    cute.arch.inline_ptx(_AFTER)
    for part in cutlass.range_constexpr(TILE // 32):
        loaded = cute.arch.inline_ptx(
            _READ,
            write_only_types=[Float32] * 32,
            read_only_args=[memory + (warp << 21) + part * 32],  # from bit 16: the lane, 32 a warp
        )
        for eight in cutlass.range_constexpr(4):
            values = cute.make_rmem_tensor(8, Float32)
            for i in cutlass.range_constexpr(8):
                values[i] = loaded[eight * 8 + i]
            column = tile_column * TILE + part * 32 + eight * 8
            store(out, bias, values, tile_row * TILE + thread, column, M, N, HAS_BIAS)
    cute.arch.inline_ptx(_BEFORE)
    cute.arch.sync_threads()
    if warp == 0:
        cute.arch.inline_ptx(_AFTER)
        cute.arch.dealloc_tmem(cute.arch.retrieve_tmem_ptr(Float32, 16, start), COLUMNS)


@cute.jit
def launch(
    a: cute.Pointer, a_scale: cute.Pointer, b: cute.Pointer, b_scale: cute.Pointer,
    bias: cute.Pointer, out: cute.Pointer, a_rows: Int32, b_rows: Int32, K: Int32, tiles: Int32,
    M: Int32, N: Int32, stream, HAS_BIAS: cutlass.Constexpr,
):  # fmt: skip
    """Host code: tensor maps of both matrices, and a grid of one thread block per result tile."""
    swizzled = cute.make_composed_layout(
        cute.make_swizzle(*SWIZZLE), 0, cute.make_layout((TILE, TILE), stride=(TILE, 1))
    )
    loads = []
    for codes, rows in ((a, a_rows), (b, b_rows)):
        width = cute.assume(K, 32)
        matrix = cute.make_tensor(codes, cute.make_layout((rows, width), stride=(width, 1)))
        op = cpasync.CopyBulkTensorTileG2SOp()
        loads.append(cpasync.make_tiled_tma_atom(op, matrix, swizzled, (TILE, TILE)))
    (a_atom, a_codes), (b_atom, b_codes) = loads
    grid = (cute.ceil_div(M, TILE), cute.ceil_div(N, TILE), 1)
    kernel(
        a_atom, a_codes, a_scale, b_atom, b_codes, b_scale, bias, out, tiles, M, N, HAS_BIAS
    ).launch(grid=grid, block=(THREADS, 1, 1), smem=SHARED, stream=stream)
