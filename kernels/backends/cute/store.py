"""The epilogue of the CuTe kernels: adds the bias in float32, rounds once, masks the tails.

Compiled, never run on a GPU (`mx`).
"""

import cutlass
from cutlass import Float32, Int64, cute


@cute.jit
def store(out, bias, values, row, column, M, N, HAS_BIAS: cutlass.Constexpr):
    """Write float32 values of consecutive columns into out [M, N] at (row, column); bias: [N].

    One vector store if N is a multiple of their count, which keeps rows aligned; else one each.
    """
    count = cutlass.const_expr(cute.size(values))
    rounded = cute.make_rmem_tensor(count, out.dtype)
    for i in cutlass.range_constexpr(count):
        value = values[i]
        if cutlass.const_expr(HAS_BIAS):
            value += Float32((bias + (column + i if column + i < N else N - 1)).load())
        rounded[i] = value.to(out.dtype)
    start = out + (Int64(row) * N + column)
    size = cutlass.const_expr(count * out.dtype.width // 8)
    aligned = cute.make_ptr(out.dtype, start.toint(), out.memspace, assumed_align=size)
    vector = cute.make_tensor(aligned, cute.make_layout(count))
    if row < M:
        if N % count == 0:
            if column < N:
                cute.autovec_copy(rounded, vector)
        else:
            for i in cutlass.range_constexpr(count):
                if column + i < N:
                    (start + i).store(rounded[i])
