"""Every form an MXFP8 file may have, through each loader, against stock where stock is right."""

from __future__ import annotations

import json

import pytest
import torch
from bad_files import Draft
from comfy_kitchen.tensor import QuantizedTensor
from comfyui import PromptError, make_models
from graphs import SAME, Graph, difference, ours, run
from graphs import quantized as quantized_model
from quantized_files import make_row_major, write

from mxfp8 import kernels
from mxfp8.kernels import layout
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.format import read_header

pytestmark = pytest.mark.comfy

PREFIX = "model.diffusion_model."
MARKERS = "_quantization_metadata"
LAYER, WIDE = "double_blocks.0.img_attn.proj", "double_blocks.0.img_mlp.2"


# ---- forms of a file -------------------------------------------------------------------------


def header_only(d: Draft) -> None:
    d.tensors = {k: v for k, v in d.tensors.items() if not k.endswith(".comfy_quant")}


def tensors_only(d: Draft) -> None:
    del d.metadata[MARKERS]


def prefixed(d: Draft, header: bool = True) -> None:
    """All tensors under a prefix; the header's names have it too, or not."""
    d.tensors = {PREFIX + k: v for k, v in d.tensors.items()}
    if header:
        layers = json.loads(d.metadata[MARKERS])["layers"]
        d.metadata[MARKERS] = json.dumps({"layers": {PREFIX + k: v for k, v in layers.items()}})


def prefixed_header_only(d: Draft) -> None:
    header_only(d)
    prefixed(d, header=False)


def e8m0(d: Draft) -> None:
    for name, tensor in d.tensors.items():
        if name.endswith(".weight_scale"):
            tensor[0] = "F8_E8M0"


def saved_by_comfyui(d: Draft) -> None:
    """As its save nodes write it: E8M0 scales, marker tensors without shapes, no header."""
    e8m0(d)
    tensors_only(d)
    for name in d.tensors:
        if name.endswith(".comfy_quant"):
            text = b'{"format": "mxfp8"}'
            d.tensors[name] = ["U8", [len(text)], text]


def unknown_fields(d: Draft) -> None:
    d.mark(LAYER, learned={"by": "someone", "rounds": [1, 2.5, None]}, version="9")


def full_precision(d: Draft) -> None:
    d.mark(LAYER, full_precision_matrix_mult=True)


def no_shapes(d: Draft) -> None:
    for layer in json.loads(d.metadata[MARKERS])["layers"]:
        d.mark(layer, orig_shape=None, orig_dtype=None, group_size=None)


def scale_zero(d: Draft) -> None:
    """A block of zeros, and one of 2**-127 times its codes, which stock takes for zero."""
    rows, cols = d.tensors[f"{LAYER}.weight"][1]
    scale = torch.frombuffer(bytearray(d.tensors[f"{LAYER}.weight_scale"][2]), dtype=torch.uint8)
    plain = layout.untile(scale.view(d.tensors[f"{LAYER}.weight_scale"][1]), rows, cols // 32)
    plain[0, :2] = 0
    d.tensors[f"{LAYER}.weight_scale"][2] = layout.tile(plain).numpy().tobytes()
    codes = d.tensors[f"{LAYER}.weight"]
    codes[2] = bytes(32) + codes[2][32:]


FORMS = {
    "both markers": lambda d: None,
    "header markers only": header_only,
    "tensor markers only": tensors_only,
    "prefixed": prefixed,
    "prefixed, header without": lambda d: prefixed(d, header=False),
    "prefixed, header only and without": prefixed_header_only,
    "E8M0 scales": e8m0,
    "saved by ComfyUI": saved_by_comfyui,
    "unknown fields": unknown_fields,
    "full precision": full_precision,
    "markers without shapes": no_shapes,
    "scale byte 0": scale_zero,
}


def sampled(comfy, models: dict, kind: str = "flux") -> dict:
    graph = Graph()
    saved = {
        name: graph.save_latent(graph.sample(load(graph), kind)) for name, load in models.items()
    }
    return run(comfy, graph, saved)


@pytest.fixture(scope="module")
def expected(comfy):
    """The latent of the file as the converter wrote it."""
    return sampled(comfy, {"stock": lambda g: g.loader("flux-mxfp8.safetensors")})["stock"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_latent_of_the_original_and_of_stock(comfy, expected, form):
    file = write(comfy, form, FORMS[form])
    latent = sampled(comfy, {"ours": lambda g: ours(g, file), "stock": lambda g: g.loader(file)})
    assert difference(latent["ours"], latent["stock"]) < SAME
    if form != "scale byte 0":  # which changes the weights
        assert difference(latent["ours"], expected) < SAME


def test_what_comfyuis_own_node_saves_loads(comfy, expected):
    graph = Graph()
    graph.add("ModelSave", model=graph.loader("flux-mxfp8.safetensors"), filename_prefix="stock")
    comfy.run(graph)
    (path,) = (comfy.base / "output").glob("stock_*.safetensors")
    target = comfy.base / "models" / "diffusion_models" / "saved-by-stock.safetensors"
    target.write_bytes(path.read_bytes())
    latent = sampled(comfy, {"ours": lambda g: ours(g, target.name)})
    assert difference(latent["ours"], expected) < SAME


def test_a_full_precision_layer_stays_one_when_it_is_saved_again(comfy):
    graph = Graph()
    model = ours(graph, write(comfy, "full precision", full_precision))
    graph.add("MXFP8SaveModel", model=model, filename_prefix="diffusion_models/full")
    comfy.run(graph)
    (path,) = (comfy.base / "output" / "diffusion_models").glob("full_*.safetensors")
    layers = read_header(path).layers.values()
    assert [layer.name for layer in layers if layer.full_precision] == [LAYER]


# ---- checkpoints -----------------------------------------------------------------------------


def checkpoint_header_only(d: Draft) -> None:
    """Markers in the header only, without the prefix: stock runs raw codes."""
    header_only(d)
    layers = json.loads(d.metadata[MARKERS])["layers"]
    bare = {k.removeprefix(PREFIX): v for k, v in layers.items()}
    d.metadata[MARKERS] = json.dumps({"layers": bare})


@pytest.mark.parametrize("edit", [header_only, tensors_only, e8m0, checkpoint_header_only])
def test_checkpoints_load_in_every_form(comfy, edit):
    file = write(comfy, edit.__name__, edit, "checkpoints", "checkpoint-mxfp8")
    graph = Graph()
    good = graph.add("CheckpointLoaderSimple", ckpt_name="checkpoint-mxfp8.safetensors")
    mine = graph.add("MXFP8LoadCheckpoint", checkpoint_name=file, precision="exact")
    clones = {how: graph.add("TestClone", model=mine, how=how)
              for how in ("force_deepcopy", "deepclone_multigpu")}  # fmt: skip
    models = {"good": good, "mine": mine, **clones}
    if edit is not checkpoint_header_only:
        models["stock"] = graph.add("CheckpointLoaderSimple", ckpt_name=file)
    latent = run(comfy, graph, {n: graph.save_latent(graph.sample(m, "flux"))
                               for n, m in models.items()})  # fmt: skip
    for name in models:
        assert difference(latent[name], latent["good"]) < SAME, name


# ---- other formats in the same file ----------------------------------------------------------


def quantized(weight: torch.Tensor, kind: str) -> tuple[dict, dict]:
    """A weight in another of stock's formats: suffix -> tensor, and its marker."""
    marker = {"format": kind}
    if kind.startswith("float8"):
        dtype = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}[kind]
        scale = weight.abs().max() / torch.finfo(dtype).max
        return {"weight": (weight / scale).to(dtype), "weight_scale": scale}, marker
    names = {"nvfp4": "TensorCoreNVFP4Layout", "int8_tensorwise": "TensorWiseINT8Layout",
             "convrot_w4a4": "TensorCoreConvRotW4A4Layout"}  # fmt: skip
    state = QuantizedTensor.from_float(weight, names[kind]).state_dict("weight")
    return state, marker


HEADER = {torch.uint8: "U8", torch.int8: "I8", torch.float32: "F32",
          torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["float8_e4m3fn", "float8_e5m2", "nvfp4", "int8_tensorwise", "convrot_w4a4"]
)
def test_layers_in_other_formats_pass_through_to_stock(comfy, kind):
    def mix(d: Draft) -> None:
        rows, cols = d.tensors[f"{WIDE}.weight"][1]
        weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)) * cols**-0.5
        state, marker = quantized(weight, kind)
        for part in ("weight", "weight_scale"):
            del d.tensors[f"{WIDE}.{part}"]
        for part, tensor in state.items():
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            d.tensors[f"{WIDE}.{part}"] = [HEADER[tensor.dtype], list(tensor.shape), data]
        d.mark_tensor(json.dumps(marker).encode(), WIDE)
        d.mark_header(marker, WIDE)

    file = write(comfy, kind, mix)
    latent = sampled(comfy, {"ours": lambda g: ours(g, file), "stock": lambda g: g.loader(file)})
    assert difference(latent["ours"], latent["stock"]) < SAME


@pytest.mark.parametrize("name", ["flux", "plain-fp8"])
def test_a_file_without_mxfp8_loads_as_stock_loads_it_with_a_notice(comfy, name):
    def cast(d: Draft) -> None:
        for tensor in d.tensors.values():
            if len(tensor[1]) == 2:
                value = torch.frombuffer(bytearray(tensor[2]), dtype=torch.bfloat16)
                tensor[0] = "F8_E4M3"
                tensor[2] = value.to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes()

    file = write(comfy, name, cast if name != "flux" else lambda d: None, source="flux")
    before = comfy.log.read_text(errors="replace").count("no layer of this Flux is MXFP8")
    latent = sampled(comfy, {"ours": lambda g: ours(g, file), "stock": lambda g: g.loader(file)})
    assert difference(latent["ours"], latent["stock"]) == 0
    after = comfy.log.read_text(errors="replace").count("no layer of this Flux is MXFP8")
    assert after == before + 1


# ---- the order of scales ---------------------------------------------------------------------


def test_row_major_scales_warn_and_an_input_settles_it(comfy, expected):
    file = write(comfy, "row-major", make_row_major)
    before = comfy.log.read_text(errors="replace").count("its scales look row-major")
    latent = sampled(comfy, {
        "auto": lambda g: ours(g, file),
        "tiled": lambda g: ours(g, file, scales="tiled"),
        "row-major": lambda g: ours(g, file, scales="row-major"),
        "accelerated": lambda g: g.add(
            "MXFP8Accelerate", model=ours(g, file, scales="row-major"), precision="exact"
        ),
        "clone": lambda g: g.add("TestClone", model=ours(g, file, scales="row-major"),
                                 how="force_deepcopy"),
    })  # fmt: skip
    assert difference(latent["row-major"], expected) < SAME
    assert difference(latent["accelerated"], expected) < SAME
    assert difference(latent["clone"], expected) < SAME
    assert difference(latent["auto"], latent["tiled"]) == 0
    assert difference(latent["auto"], expected) > 1e-2
    after = comfy.log.read_text(errors="replace").count("its scales look row-major")
    assert after == before + 1


def test_a_nan_scale_is_found_in_either_order(comfy):
    def spoil(d: Draft) -> None:
        make_row_major(d)
        scale = d.tensors[f"{LAYER}.weight_scale"]
        scale[2] = scale[2][:8] + bytes([255]) + scale[2][9:]

    file = write(comfy, "row-major NaN", spoil)
    graph = Graph()
    graph.save_latent(graph.sample(ours(graph, file, scales="row-major"), "flux"))
    with pytest.raises(PromptError, match="row 2, block 0 is byte 255"):
        comfy.run(graph)


# ---- padding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 40), (33, 64), (129, 132), (128, 31), (64, 64)])
@pytest.mark.parametrize("stored", ["padded", "true rows"])
def test_padded_layers_decode_as_in_stock(shape, stored):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    qdata, scale = kernels.quantize(weight)
    if stored == "true rows":
        qdata = qdata[: shape[0]].contiguous()
    layout_name = "TensorCoreMXFP8Layout"
    params = QuantizedTensor.from_float(weight, layout_name)._params.__class__(
        scale=scale.view(torch.float8_e8m0fnu), orig_dtype=torch.float32, orig_shape=shape
    )
    decoded = kernels.dequantize(qdata, scale, torch.float32, shape)
    assert torch.equal(decoded, QuantizedTensor(qdata, layout_name, params).dequantize())


def test_a_model_with_padded_columns_samples_as_in_stock(comfy):
    """A Wan whose feed-forward is 260 wide; the layer whose rows tell that stays as it is, in a
    file and in the graph."""
    make_models(comfy.base, "wan260")
    source = comfy.base / "models" / "diffusion_models" / "wan260.safetensors"
    target = source.with_name("wan260-mxfp8.safetensors")
    convert_file(source, target)
    layers = read_header(target).layers
    layer = layers["blocks.0.ffn.2"]
    assert (layer.shape, layer.weight.shape) == ((128, 260), (128, 288))
    assert "blocks.0.ffn.0" not in layers
    models = {
        "ours": lambda g: ours(g, target.name),
        "stock": lambda g: g.loader(target.name),
        "in the graph": lambda g: quantized_model(g, g.loader(source.name)),
    }
    latent = sampled(comfy, models, "wan")
    assert difference(latent["ours"], latent["stock"]) < SAME
    assert difference(latent["in the graph"], latent["stock"]) < SAME
