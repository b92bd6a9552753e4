from . import reference


def prepare_weight(qdata, scale):
    return reference.to_rotated_int8(qdata, scale)


def quantize_input(x):
    return reference.quantize_rotated_int8(x)


def matmul(quantized, prepared, bias, dtype, N):
    return reference.rotated_int8_matmul(quantized, prepared, bias, dtype, N)


def unsupported_reason(problem):
    return None if problem.device.type == "cpu" else "cpu only"
