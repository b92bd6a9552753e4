"""A block-scaled matmul with CuTe's own atom and layouts, compiled for comparison with ours."""

import cutlass
from cutlass import Float8E4M3FN, Float8E8M0FNU, Float32, Int32, cute
from cutlass.cute.nvgpu import OperandMajorMode, tcgen05
from cutlass.cute.runtime import make_fake_stream
from cutlass.memory import SmemAllocator
from cutlass.utils import blackwell_helpers, blockscaled_layout

TILE = (128, 128, 128)


@cute.kernel
def kernel(
    mma: cute.TiledMma,
    codes: cute.ComposedLayout,
    a_scales: cute.Layout,
    b_scales: cute.Layout,
):
    memory = SmemAllocator()
    a, b = (memory.allocate_tensor(Float8E4M3FN, codes.outer, 1024, codes.inner) for _ in range(2))
    scales = memory.allocate_tensor(Float8E8M0FNU, a_scales, 128)
    a, b = mma.make_fragment_A(a), mma.make_fragment_B(b)
    start = cute.make_ptr(Float32, Int32(0), cute.AddressSpace.tmem, assumed_align=16)
    layout = mma.make_fragment_C(mma.partition_shape_C(TILE[:2])).layout
    total = cute.make_tensor(start, layout)
    views = []
    for column, layouts, make in (
        (128, a_scales, blockscaled_layout.make_tmem_layout_sfa),
        (132, b_scales, blockscaled_layout.make_tmem_layout_sfb),
    ):
        layout = make(mma, TILE, 32, cute.slice_(layouts, (None, None, None, 0)))
        views.append(cute.make_tensor(cute.recast_ptr(start + column, dtype=Float8E8M0FNU), layout))
    copy = cute.make_copy_atom(tcgen05.Cp4x32x128bOp(tcgen05.CtaGroup.ONE), Float8E8M0FNU)
    copy = tcgen05.make_s2t_copy(copy, cute.filter_zeros(views[0]))
    thread = copy.get_slice(0)
    source = thread.partition_S(cute.filter_zeros(scales))
    source = tcgen05.get_s2t_smem_desc_tensor(copy, source)[None, None, None, None, 0]
    cute.copy(copy, source, thread.partition_D(cute.filter_zeros(views[0])))
    for block in cutlass.range_constexpr(4):
        at = (None, None, block)
        mma.set(tcgen05.Field.ACCUMULATE, block > 0)
        mma.set(tcgen05.Field.SFA, views[0][at].iterator)
        mma.set(tcgen05.Field.SFB, views[1][at].iterator)
        cute.gemm(mma, total, a[(*at, 0)], b[(*at, 0)], total)


@cute.jit
def launch(stream):
    atom = tcgen05.MmaMXF8F6F4Op(
        Float8E4M3FN, Float8E4M3FN, (128, 128, 32), tcgen05.CtaGroup.ONE,
        tcgen05.OperandSource.SMEM, OperandMajorMode.K, OperandMajorMode.K,
    )  # fmt: skip
    mma = cute.make_tiled_mma(atom)
    codes = blackwell_helpers.make_smem_layout_a(mma, TILE, Float8E4M3FN, 1)
    scales = (
        blockscaled_layout.make_smem_layout_sfa(mma, TILE, 32, 1),
        blockscaled_layout.make_smem_layout_sfb(mma, TILE, 32, 1),
    )
    kernel(mma, codes, *scales).launch(grid=(1, 1, 1), block=(32, 1, 1), stream=stream)


def ptx(folder) -> str:
    options = f"--gpu-arch sm_100a --keep-ptx --dump-dir {folder}"
    return cute.compile(launch, make_fake_stream(), options=options).__ptx__
