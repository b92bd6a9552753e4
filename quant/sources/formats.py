"""Every format of quantized weights that is known, and every kind of file: one row each.

What a file is rejected by and what Inspect says of it both come from here. A row says how a format
is recognized, and who can run it. Rejected: asking the libraries themselves, of which no user has
all, and of which some run code when they open a file.

The facts were read in November 2026, in ComfyUI 0.20.1, 0.30.0 and 0.38.1, comfy-kitchen 0.2.40 and
the projects that `source` names. 0.20.1 is the oldest ComfyUI that was looked at; most of what it
reads is older.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_FLOATS = "F32 F16 BF16"

_COMFYUI = "https://github.com/Comfy-Org/ComfyUI/blob/master/comfy/quant_ops.py"
_KITCHEN = "https://github.com/Comfy-Org/comfy-kitchen"
_CONVERT_TO_QUANT = "https://github.com/silveroxides/convert_to_quant"
_BITSANDBYTES = "https://huggingface.co/docs/bitsandbytes/main/en/reference/nn/linear4bit"
_NUNCHAKU = "https://github.com/nunchaku-tech/nunchaku"
_MLX = "https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html"

_BLACKWELL = (
    "NVIDIA RTX 50, B200 and B300 multiply it directly; other devices unpack it on every step"
)
_FP8_GPUS = (
    "NVIDIA from RTX 40 on, AMD RX 9000 and MI350 multiply it directly; other devices unpack it on "
    "every step"
)
_INT_GPUS = (
    "NVIDIA from RTX 20 on (with torch for CUDA 13), AMD RX 7000 and 9000 multiply it directly; "
    "elsewhere it is slow"
)
_CAST = "any; weights are unpacked on every step, unless ComfyUI runs with --fast fp8_matrix_mult"
_APPLE = "Apple's, in MLX"
_QUANTOPS = "ComfyUI-QuantOps (no longer maintained)"
_BNB_NODES = "ComfyUI_bnb_nf4_fp4_Loaders"
_BNB_GPUS = "NVIDIA; weights are unpacked on every step"


@dataclass(frozen=True)
class Format:
    """One format of quantized weights.

    Attributes:
        name: as users know it.
        bits: per weight, scales included; None if files differ.
        made_by: the tools that usually write it.
        gpus: what multiplies it directly, and what happens elsewhere.
        source: where the facts are from.
        comfyui: the first version of ComfyUI known to run it without a node pack, or None.
        nodes: the node pack that runs it, if ComfyUI does not; None if we know none.
        marker: its name in ComfyUI's markers; convrot: whether they must ask for rotation.
        scales: names that a marked layer must have beside its weight, "a|b" for either.
        tensors: what shows it without a marker, in one of several ways: names of a layer's tensors
            -> their dtypes, or "" for any. The first holds the codes.
        code_bits: bits per weight in the tensor of codes; None if files differ.
        words: how many U32 of codes share a scale, where dtypes do not tell.
        whole: whether it is said of a model, not of one layer.
        pickle: what torch files with it mention.
        method: its `quant_method` in a config.json.
    """

    name: str
    bits: float | None
    made_by: str
    gpus: str
    source: str
    comfyui: str | None = None
    nodes: str | None = None
    marker: str | None = None
    convrot: bool = False
    scales: tuple[str, ...] = ()
    tensors: tuple[Mapping[str, str], ...] = ()
    code_bits: int | None = None
    words: int | None = None
    whole: bool = False
    pickle: bytes | None = None
    method: str | None = None


# In the order of precedence: the first row that fits a layer counts.
FORMATS = (
    Format(
        "MXFP8", 8.25, "this pack, ComfyUI, convert_to_quant",
        "any with this pack, by 8-bit matmuls on most (docs/hardware.md); stock ComfyUI multiplies "
        "it on NVIDIA RTX 50, B200 and B300, and unpacks it on every step elsewhere",
        _COMFYUI, comfyui="0.20.1", marker="mxfp8", scales=("weight_scale",), code_bits=8,
        tensors=({"weight": "F8_E4M3", "weight_scale": "U8 F8_E8M0"},),
    ),
    Format(
        "hybrid MXFP8", 8.25, "convert_to_quant", "NVIDIA from RTX 40 on", _CONVERT_TO_QUANT,
        nodes=_QUANTOPS, marker="hybrid_mxfp8", code_bits=8,
        scales=("weight_scale", "weight_scalar"),
    ),
    Format(
        "NVFP4", 4.5, "ComfyUI, convert_to_quant, NVIDIA ModelOpt", _BLACKWELL, _COMFYUI,
        comfyui="0.20.1", marker="nvfp4", scales=("weight_scale", "weight_scale_2"), code_bits=4,
        tensors=(
            {"weight": "U8", "weight_scale": "F8_E4M3"}, {"weight": "U8", "weight_scale_2": ""},
        ), method="modelopt",
    ),
    Format(
        "INT8 with ConvRot", 8, "ComfyUI, convert_to_quant, ComfyUI-INT8-Fast", _INT_GPUS,
        _COMFYUI, comfyui="0.27", marker="int8_tensorwise", convrot=True, code_bits=8,
        scales=("weight_scale",),
    ),
    Format(
        "W4A8 (4 bits for INT8 matmuls)", 4.5, "comfy-kitchen, Comfy-Org, Kijai", _INT_GPUS,
        "https://github.com/Comfy-Org/ComfyUI/pull/15308", comfyui="0.31",
        marker="asym_w4a8_int8", scales=("weight_s_rel", "weight_s_channel"), code_bits=4,
        tensors=({"weight": "I8", "weight_s_rel": ""},),
    ),
    Format(
        "AWQ in ComfyUI's form (W4A16)", 4.5, "Comfy-Org",
        "any; comfy-kitchen's kernels unpack weights in the matmul", _KITCHEN, comfyui="0.38.1",
        marker="awq_w4a16", scales=("weight_scale", "weight_zero|weight_zeros"), code_bits=4,
        tensors=({"weight": "I8", "weight_zeros": ""}, {"weight": "I8", "weight_zero": ""}),
    ),
    Format(
        "SVDQuant in ComfyUI's form (W4A4)", None, "comfy-kitchen", _INT_GPUS,
        "https://github.com/Comfy-Org/ComfyUI/pull/13580",
        nodes="the open pull request 13580", marker="svdquant_w4a4",
        scales=("weight_scale", "weight_proj_down", "weight_proj_up", "weight_smooth_factor"),
        tensors=({"weight": "I8", "weight_proj_down": ""},), code_bits=4,
    ),
    Format(
        "INT8", 8, "ComfyUI, convert_to_quant, OneTrainer, ComfyUI-INT8-Fast", _INT_GPUS, _COMFYUI,
        comfyui="0.27", marker="int8_tensorwise", scales=("weight_scale",), code_bits=8,
        tensors=({"weight": "I8", "weight_scale": _FLOATS},),
    ),
    Format(
        "INT8 in blocks", 8, "convert_to_quant", "NVIDIA, with Triton", _CONVERT_TO_QUANT,
        nodes=_QUANTOPS, marker="int8_blockwise", scales=("weight_scale",), code_bits=8,
    ),
    Format(
        "INT4 with ConvRot", 4, "ComfyUI, convert_to_quant", _INT_GPUS, _COMFYUI, comfyui="0.28",
        marker="convrot_w4a4", scales=("weight_scale",), code_bits=4,
    ),
    Format(
        "NF4 (bitsandbytes)", None, "bitsandbytes, diffusers, Forge", _BNB_GPUS, _BITSANDBYTES,
        nodes=_BNB_NODES, tensors=({"weight": "", "weight.quant_state.bitsandbytes__nf4": ""},),
        code_bits=4, method="bitsandbytes", pickle=b"cbitsandbytes",
    ),
    Format(
        "FP4 (bitsandbytes)", None, "bitsandbytes, diffusers, Forge", _BNB_GPUS, _BITSANDBYTES,
        nodes=_BNB_NODES, tensors=({"weight": "", "weight.quant_state.bitsandbytes__fp4": ""},),
        code_bits=4,
    ),
    Format(
        "4 bits (bitsandbytes)", None, "bitsandbytes", _BNB_GPUS, _BITSANDBYTES, nodes=_BNB_NODES,
        tensors=({"weight": "", "weight.absmax": ""},), code_bits=4,
    ),
    Format(
        "INT8 (bitsandbytes)", 8, "bitsandbytes, diffusers", "NVIDIA, in diffusers",
        "https://huggingface.co/docs/bitsandbytes/main/en/reference/nn/linear8bit",
        tensors=({"weight": "", "SCB": ""},), code_bits=8,
    ),
    Format(
        "SVDQuant FP4 (Nunchaku)", None, "Nunchaku, DeepCompressor",
        "NVIDIA RTX 50 only; for other cards get the INT4 file", _NUNCHAKU,
        nodes="ComfyUI-nunchaku", tensors=({"qweight": "", "wscales": "F8_E4M3"},), code_bits=4,
    ),
    Format(
        "AWQ (Nunchaku)", 4.5, "Nunchaku, DeepCompressor", "NVIDIA from RTX 20 on", _NUNCHAKU,
        nodes="ComfyUI-nunchaku", tensors=({"qweight": "", "wzeros": ""},), code_bits=4,
    ),
    Format(
        "SVDQuant INT4 (Nunchaku)", None, "Nunchaku, DeepCompressor",
        "NVIDIA RTX 20 to 40; for RTX 50 get the FP4 file", _NUNCHAKU, nodes="ComfyUI-nunchaku",
        tensors=({"qweight": "", "wscales": ""},), code_bits=4, method="svdquant",
    ),
    Format(
        "GPTQ", None, "GPTQModel, AutoGPTQ", "NVIDIA and AMD, in transformers or vLLM",
        "https://github.com/ModelCloud/GPTQModel", tensors=({"qweight": "I32", "g_idx": ""},),
        method="gptq",
    ),
    Format(
        "GPTQ or AWQ", None, "AutoAWQ, GPTQModel", "NVIDIA and AMD, in transformers or vLLM",
        "https://github.com/casper-hansen/AutoAWQ", tensors=({"qweight": ""}, {"qzeros": ""}),
        method="awq",
    ),
    Format(
        "HQQ", None, "HQQ", "NVIDIA and AMD, in transformers", "https://github.com/dropbox/hqq",
        tensors=({"W_q": ""},), method="hqq",
    ),
    Format(
        "Quanto", None, "optimum-quanto, diffusers",
        "any, in diffusers; weights are unpacked on every step",
        "https://github.com/huggingface/optimum-quanto", method="quanto",
        tensors=({"weight._data": ""}, {"weight._data._data": ""}), pickle=b"coptimum.quanto",
    ),
    Format(
        "compressed-tensors", None, "llm-compressor", "NVIDIA and AMD, in vLLM",
        "https://github.com/vllm-project/compressed-tensors", tensors=({"weight_packed": ""},),
        method="compressed-tensors",
    ),
    Format(
        "torchao", None, "torchao, diffusers", "those that its kind of weight needs, in diffusers",
        "https://github.com/pytorch/ao/tree/main/torchao/prototype/safetensors",
        tensors=({"_weight_qdata": ""},), method="torchao", pickle=b"ctorchao",
    ),
    Format(
        "block-scaled FP8", 8, "DeepSeek, transformers", "NVIDIA from RTX 40 on, in transformers",
        "https://huggingface.co/docs/transformers/quantization/finegrained_fp8", code_bits=8,
        tensors=({"weight": "F8_E4M3", "weight_scale_inv": ""},), method="fp8",
    ),
    Format(
        "MXFP8 in MLX's form", 8.25, "MLX, this pack (mxfp8 export)", _APPLE, _MLX, code_bits=8,
        words=8, tensors=({"weight": "U32", "scales": "U8"},),
    ),
    Format(
        "MXFP4 in MLX's form", 4.25, "MLX", _APPLE, _MLX, code_bits=4, words=4,
        tensors=({"weight": "U32", "scales": "U8"},),
    ),
    Format(
        "NVFP4 in MLX's form", 4.5, "MLX", _APPLE, _MLX, code_bits=4, words=2,
        tensors=({"weight": "U32", "scales": "U8"},),
    ),
    Format(
        "MLX's integers", None, "MLX, mflux", _APPLE, _MLX,
        tensors=({"weight": "U32", "scales": ""},),
    ),
    Format(
        "scaled FP8", 8, "ComfyUI before its markers, Kijai (fp8_scaled)", _FP8_GPUS, _COMFYUI,
        comfyui="0.20.1", tensors=({"scaled_fp8": ""},), whole=True, code_bits=8,
    ),
    Format(
        "scaled FP8 (E4M3)", 8, "ComfyUI, convert_to_quant, Kijai (fp8_scaled)", _FP8_GPUS,
        _COMFYUI, comfyui="0.20.1", marker="float8_e4m3fn", scales=("weight_scale",), code_bits=8,
        tensors=(
            {"weight": "F8_E4M3", "scale_weight": ""},
            {"weight": "F8_E4M3", "weight_scale": _FLOATS},
        ),
    ),
    Format(
        "scaled FP8 (E5M2)", 8, "ComfyUI, convert_to_quant, Kijai (fp8_scaled)", _FP8_GPUS,
        _COMFYUI, comfyui="0.20.1", marker="float8_e5m2", scales=("weight_scale",), code_bits=8,
        tensors=(
            {"weight": "F8_E5M2", "scale_weight": ""},
            {"weight": "F8_E5M2", "weight_scale": _FLOATS},
        ),
    ),
    Format(
        "FP8 (E4M3) with a scale per row", 8, "convert_to_quant", "NVIDIA from RTX 40 on",
        _CONVERT_TO_QUANT, nodes=_QUANTOPS, marker="float8_e4m3fn_rowwise",
        scales=("weight_scale",), code_bits=8,
    ),
    Format(
        "FP8 (E4M3) in blocks", 8, "convert_to_quant", "NVIDIA from RTX 40 on", _CONVERT_TO_QUANT,
        nodes=_QUANTOPS, marker="float8_e4m3fn_blockwise", scales=("weight_scale",), code_bits=8,
    ),
    Format(
        "FP8 (E4M3)", 8, "ComfyUI and others, by a plain cast", _CAST, _COMFYUI, comfyui="0.20.1",
        tensors=({"weight": "F8_E4M3"},), code_bits=8,
    ),
    Format(
        "FP8 (E5M2)", 8, "ComfyUI and others, by a plain cast", _CAST, _COMFYUI, comfyui="0.20.1",
        tensors=({"weight": "F8_E5M2"},), code_bits=8,
    ),
    # Codes with nothing beside them that would tell more.
    *(
        Format(
            name, bits, "unknown", "none that we know of", "", code_bits=bits,
            tensors=({"weight": dtype},),
        )
        for name, bits, dtype in (
            ("E8M0 scales", 8, "F8_E8M0"),
            ("FP6 (E2M3)", 6, "F6_E2M3"), ("FP6 (E3M2)", 6, "F6_E3M2"), ("FP4", 4, "F4"),
            ("INT8", 8, "I8"), ("packed integers", None, "U8"),
        )
    ),
)  # fmt: skip

GGUF = Format(
    "GGUF", None, "llama.cpp, stable-diffusion.cpp, ComfyUI-GGUF's convert.py",
    "any; weights are unpacked on every step",
    "https://github.com/ggml-org/ggml/blob/master/docs/gguf.md", nodes="ComfyUI-GGUF",
    method="gguf",
)  # fmt: skip


def marked(conf: Mapping) -> Format | None:
    """The format that a marker names, or None if it is not known."""
    inner = conf.get("params")
    rotated = bool(conf.get("convrot") or (isinstance(inner, dict) and inner.get("convrot")))
    rows = [row for row in FORMATS if row.marker and row.marker == conf.get("format")]
    return next((row for row in rows if rotated or not row.convrot), None)


def named(name: str) -> Format | None:
    """The first format of this name, or whose markers give it."""
    rows = (*FORMATS, GGUF)
    found = (row for row in rows if name == row.name or (name == row.marker and not row.convrot))
    return next(found, None)


@dataclass(frozen=True)
class FileKind:
    """A kind of file that is no safetensors file.

    Attributes:
        start: expression for its first bytes.
        text: what it is, and what to do.
        broken: whether such a file is a mishap and no model.
    """

    name: str
    start: bytes
    text: str
    broken: bool = False


_TAKE = "convert the BF16, FP16 or FP32 original, as .safetensors"
_TORCH = "which can run code when read: take the model as .safetensors"
KINDS = (
    FileKind("GGUF", rb"GGUF", f"a GGUF file, quantized already; {_TAKE}"),
    FileKind("GGML", rb"GGML|ggml|lmgg|tjgg|fmgg", f"a GGML file, quantized already; {_TAKE}"),
    FileKind(
        "torch", rb"PK\x03\x04",
        f"a zip archive, such as a .ckpt, .pt, .pth or .bin of torch, {_TORCH}",
    ),
    FileKind(
        "pickle", rb"\x80[\x02-\x05][^\0]", f"a pickle, such as an old .ckpt, .pt or .bin, {_TORCH}"
    ),
    FileKind("ONNX", rb"\x08[\x01-\x20][\x12\x1a\x22\x2a\x32\x3a\x42]", f"an ONNX file; {_TAKE}"),
    FileKind("HDF5", rb"\x89HDF\r\n", f"an HDF5 file (.h5); {_TAKE}"),
    FileKind("NumPy", rb"\x93NUMPY", f"a NumPy array (.npy); {_TAKE}"),
    FileKind(
        "archive", rb"\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|.{257}ustar",
        "an archive; unpack it first",
    ),
    FileKind(
        "Git LFS pointer", rb"version https://git-lfs",
        "a Git LFS pointer; fetch the model with git lfs pull", broken=True,
    ),
    FileKind(
        "web page", rb"\s*<(!DOCTYPE|!doctype|html|HTML|\?xml)",
        "a web page; download the model again", broken=True,
    ),
    FileKind(
        "JSON", rb"\s*\{\s*[\"}]", "a JSON file; give the model, or the index of its parts",
        broken=True,
    ),
    FileKind(
        "zeros", rb"\0{512}", "zeros where the header should be; the download is not complete",
        broken=True,
    ),
)  # fmt: skip
START = 512  # bytes that show the kind of a file


def file_kind(start: bytes) -> FileKind | None:
    """The kind of a file with these first bytes; None for safetensors and unknown ones."""
    # A safetensors file begins with its header's length, 8 bytes of any content, and "{".
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32:
        return None
    return next((kind for kind in KINDS if re.match(kind.start, start, re.DOTALL)), None)
