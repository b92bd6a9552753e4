"""Small files in other quantized formats, written by their own libraries, for the tests.

    pip install bitsandbytes gguf "mlx[cpu]" optimum-quanto torchao    (beside comfy-kitchen)
    python bench/quantized_files.py

Writes tests/quant/fixtures/quantized_files.json: for each library that is installed, the headers
of what it writes for one layer of [256, 512], and small GGUF and torch files whole, in base64. What
other libraries wrote before stays. No weight is of interest, so none is kept.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

TARGET = Path(__file__).parent.parent / "tests" / "quant" / "fixtures" / "quantized_files.json"
LAYER = "blocks.0.lin"
SHAPE = 256, 512


def linear() -> nn.Module:
    """One linear layer in BF16, under the layer's name."""
    module = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"lin": nn.Linear(512, 256)})])})
    return module.to(torch.bfloat16)


def comfy_kitchen(save) -> None:
    from comfy_kitchen import tensor as layouts

    kinds = {
        "float8_e4m3fn": ("TensorCoreFP8Layout", {}, {}),
        "mxfp8": ("TensorCoreMXFP8Layout", {}, {}),
        "nvfp4": ("TensorCoreNVFP4Layout", {}, {}),
        "int8_tensorwise": ("TensorWiseINT8Layout", {"per_channel": True}, {}),
        "int8_tensorwise, convrot": (
            "TensorWiseINT8Layout", {"per_channel": True, "convrot": True}, {"convrot": True},
        ),
        "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", {}, {}),
        "asym_w4a8_int8": ("AsymW4A8Int8Layout", {}, {}),
    }  # fmt: skip
    for name, (layout, options, marker) in kinds.items():
        if hasattr(layouts, layout):  # of its version
            kind = getattr(layouts, layout)
            codes, params = kind.quantize(torch.randn(SHAPE, dtype=torch.bfloat16), **options)
            tensors = kind.state_dict_tensors(codes, params)
            conf = {"format": name.split(",")[0], **marker}
            save(name, {f"{LAYER}.weight{k}": v for k, v in tensors.items()}, {}, conf)


def bitsandbytes(save) -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    def quantized(layer) -> dict[str, torch.Tensor]:
        layer.load_state_dict(nn.Linear(512, 256).state_dict())
        return {f"{LAYER}.{k}": v for k, v in layer.to("cpu").state_dict().items()}

    for kind in ("nf4", "fp4"):
        save(kind, quantized(Linear4bit(512, 256, quant_type=kind)))
    save("int8", quantized(Linear8bitLt(512, 256, has_fp16_weights=False)))


def torchao(save) -> None:
    from torchao import quantization
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    for name in ("Float8WeightOnlyConfig", "Int8WeightOnlyConfig", "IntxWeightOnlyConfig"):
        model = linear()
        quantization.quantize_(model, getattr(quantization, name)())
        save(name, *flatten_tensor_state_dict(model.state_dict()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        small = nn.Sequential(nn.Linear(32, 32))
        quantization.quantize_(small, quantization.Int8WeightOnlyConfig())
        torch.save(small.state_dict(), path)
        save.file("torch.save", path)


def optimum_quanto(save) -> None:
    from optimum import quanto

    for kind in ("qint8", "qint4", "qfloat8"):
        model = linear()
        quanto.quantize(model, weights=getattr(quanto, kind))
        quanto.freeze(model)
        save(kind, model.state_dict())


def mlx(save) -> None:
    import mlx.core as mx

    for name, options in {
        "affine": {"bits": 4, "group_size": 64},
        "mxfp8": {"mode": "mxfp8", "bits": 8, "group_size": 32},
        "mxfp4": {"mode": "mxfp4", "bits": 4, "group_size": 32},
        "nvfp4": {"mode": "nvfp4", "bits": 4, "group_size": 16},
    }.items():
        parts = mx.quantize(mx.random.normal(SHAPE), **options)
        names = (f"{LAYER}.{leaf}" for leaf in ("weight", "scales", "biases"))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            mx.save_safetensors(str(path), dict(zip(names, parts)), {"format": "mlx"})  # noqa: B905
            save.header(name, path)


def gguf(save) -> None:
    import gguf as library

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        writer = library.GGUFWriter(path, "flux")
        writer.add_name("a small model")
        writer.add_quantized_by("its tests")
        writer.add_array("tokens", ["a", "b"])
        for name, kind in {"q": "Q4_0", "k": "Q8_0", "v": "Q5_1"}.items():
            kind = library.GGMLQuantizationType[kind]
            data = library.quants.quantize(torch.randn(32, 64).numpy(), kind)
            writer.add_tensor(f"double_blocks.0.{name}.weight", data, raw_dtype=kind)
        writer.add_tensor("double_blocks.0.norm.scale", torch.ones(64).numpy())
        for write in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{write}_to_file")()
        writer.close()
        save.file("flux", path)


class Saved:
    """Collects what one library writes."""

    def __init__(self, files: dict, library: str):
        self.files, self.library = files, library

    def __call__(self, name: str, tensors, metadata=None, marker: dict | None = None) -> None:
        state = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
        if marker is not None:
            text = json.dumps(marker).encode()
            state[f"{LAYER}.comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            save_file(state, path, metadata)
            self.header(name, path)
        if marker is not None:
            self.files[self._key(name)]["marker"] = marker

    def header(self, name: str, path: Path) -> None:
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        self.files[self._key(name)] = {"header": header}

    def file(self, name: str, path: Path) -> None:
        self.files[self._key(name)] = {"file": base64.b64encode(path.read_bytes()).decode()}

    def _key(self, name: str) -> str:
        return f"{self.library} {importlib.metadata.version(self.library)}: {name}"


LIBRARIES: dict[str, Callable[[Saved], None]] = {
    "comfy-kitchen": comfy_kitchen, "bitsandbytes": bitsandbytes, "torchao": torchao,
    "optimum-quanto": optimum_quanto, "mlx": mlx, "gguf": gguf,
}  # fmt: skip


def main() -> None:
    files = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else {}
    for library, write in LIBRARIES.items():
        try:
            importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            print(f"{library} is not installed; what it wrote before stays")
            continue
        files = {k: v for k, v in files.items() if not k.startswith(f"{library} ")}
        write(Saved(files, library))
    text = json.dumps(dict(sorted(files.items())), indent=1)
    TARGET.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
