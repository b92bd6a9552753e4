"""An exported file in MLX itself: values, matmuls, whole models, and a loader of its programs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from checkpoints import matrix
from comfyui import fetch_package
from safetensors.torch import save_file
from torch import nn

from mxfp8 import kernels
from mxfp8.integrations.mlx import export_mlx
from mxfp8.kernels import layout
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.conversion.policy import Selection
from mxfp8.quant.format import marker, with_markers
from mxfp8.quant.linear import load_quantized

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
mlx_nn = importlib.import_module("mlx.nn")
np = importlib.import_module("numpy")

MODE = {"group_size": 32, "bits": 8, "mode": "mxfp8"}


def write_codes(path: Path, codes: torch.Tensor, scales: torch.Tensor) -> tuple:
    """A file of one layer "a" with these codes and row-major scales; returns (qdata, tiled)."""
    rows, cols = codes.shape
    qdata = torch.zeros(layout.padded_shape(rows, cols), dtype=torch.uint8)
    qdata[:rows] = codes
    tiled = layout.tile(scales)
    qdata = qdata.view(torch.float8_e4m3fn)
    metadata = with_markers({}, {"a": marker((rows, cols), "BF16")})
    save_file({"a.weight": qdata, "a.weight_scale": tiled}, path, metadata)
    return qdata, tiled


def load(folder: Path) -> dict:
    """The arrays of an exported folder, by the files that its index names."""
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    arrays = {}
    for name in sorted(set(index["weight_map"].values())):
        arrays |= mx.load(str(folder / name))
    assert arrays.keys() == index["weight_map"].keys()
    return arrays


def numpy(array):
    return np.array(array.astype(mx.float32))


@pytest.fixture
def every_code(tmp_path):
    """Every code but NaN under scales from the least to the greatest, in sizes that are padded."""
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    codes = codes.repeat(82)[: 130 * 160].reshape(130, 160)
    scales = (torch.arange(130 * 5) * 37 % 255).to(torch.uint8).reshape(130, 5)
    assert {0, 254} <= set(scales.flatten().tolist())
    qdata, tiled = write_codes(tmp_path / "a.safetensors", codes, scales)
    export_mlx(tmp_path / "a.safetensors", tmp_path / "mlx")
    return kernels.dequantize(qdata, tiled, torch.float32, shape=(130, 160)), load(tmp_path / "mlx")


def test_mlx_dequantizes_to_the_same_bits(every_code):
    expected, arrays = every_code
    assert (arrays["a.weight"].dtype, arrays["a.weight"].shape) == (mx.uint32, (130, 40))
    assert (arrays["a.scales"].dtype, arrays["a.scales"].shape) == (mx.uint8, (130, 5))
    found = mx.dequantize(arrays["a.weight"], arrays["a.scales"], dtype=mx.float32, **MODE)
    assert np.array_equal(np.array(found).view(np.int32), expected.numpy().view(np.int32))


def test_mlx_multiplies_by_the_same_values(tmp_path):
    save_file({"a.weight": matrix(96, 256)}, tmp_path / "source.safetensors")
    convert_file(tmp_path / "source.safetensors", tmp_path / "a.safetensors")
    export_mlx(tmp_path / "a.safetensors", tmp_path / "mlx")
    arrays, x = load(tmp_path / "mlx"), matrix(8, 256, torch.float32, seed=1)
    weight = mx.dequantize(arrays["a.weight"], arrays["a.scales"], dtype=mx.float32, **MODE)
    expected = x.double().numpy() @ np.array(weight).astype(np.float64).T
    found = numpy(
        mx.quantized_matmul(mx.array(x.numpy()), arrays["a.weight"], arrays["a.scales"], **MODE)
    )
    # Sums of 256 products in float32, in any order.
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


class Block(nn.Module):
    """A transformer's block, written once for torch and once, below, for MLX."""

    def __init__(self, width: int = 96, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width, bias=False)
        self.odd = nn.Linear(width, 33)  # its output feeds rows that are no multiple of 32
        self.even = nn.Linear(33, width)

    def forward(self, x):
        y = self.norm1(x)
        parts = [f(y).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
                 for f in (self.query, self.key, self.value)]  # fmt: skip
        y = nn.functional.scaled_dot_product_attention(*parts)
        x = x + self.out(y.transpose(-3, -2).flatten(-2))
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return x + self.even(self.odd(x).tanh())


class MLXBlock(mlx_nn.Module):
    def __init__(self, width: int = 96, heads: int = 4):
        super().__init__()
        self.heads, linear = heads, mlx_nn.Linear
        self.norm1, self.norm2 = mlx_nn.LayerNorm(width), mlx_nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (linear(width, width) for _ in range(4))
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width, bias=False)
        self.odd, self.even = linear(width, 33), linear(33, width)

    def __call__(self, x):
        y = self.norm1(x)
        parts = [f(y).reshape(*x.shape[:-1], self.heads, -1).swapaxes(-3, -2)
                 for f in (self.query, self.key, self.value)]  # fmt: skip
        scale = (x.shape[-1] // self.heads) ** -0.5
        y = mx.fast.scaled_dot_product_attention(*parts, scale=scale)
        x = x + self.out(y.swapaxes(-3, -2).reshape(*x.shape))
        x = x + self.down(mlx_nn.gelu(self.up(self.norm2(x))))
        return x + self.even(mx.tanh(self.odd(x)))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        return self.layers[1](self.layers[0](x))


class MLXBlocks(mlx_nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [MLXBlock(), MLXBlock()]

    def __call__(self, x):
        return self.layers[1](self.layers[0](x))


def test_a_model_gives_the_same_output_in_mlx(tmp_path):
    torch.manual_seed(0)
    ours = Blocks().eval()
    save_file(ours.state_dict(), tmp_path / "source.safetensors")
    keep_up = Selection(preset="none", exclude=r"layers\.0\.up")
    convert_file(tmp_path / "source.safetensors", tmp_path / "a.safetensors", keep_up)
    load_quantized(ours, tmp_path / "a.safetensors")
    result = export_mlx(tmp_path / "a.safetensors", tmp_path / "mlx")
    assert (result.layers, result.dequantized) == (15, ["layers.0.even", "layers.1.even"])

    theirs, arrays = MLXBlocks(), load(tmp_path / "mlx")
    config = json.loads((tmp_path / "mlx" / "config.json").read_text("utf-8"))
    assert config == {"quantization": MODE}
    mlx_nn.quantize(  # as mlx-lm's load_model does
        theirs,
        **config["quantization"],
        class_predicate=lambda path, _: f"{path}.scales" in arrays,
    )
    theirs.load_weights([*arrays.items()], strict=True)
    quantized = [m for _, m in theirs.named_modules() if isinstance(m, mlx_nn.QuantizedLinear)]
    assert len(quantized) == 13

    x = torch.randn(2, 10, 96)
    with torch.no_grad(), kernels.use_backend("eager"):
        expected = ours(x).numpy()
    found = numpy(theirs(mx.array(x.numpy())))
    # Both compute in float32 from the same weights; sums run in another order.
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


# ---- Z-Image in mlx-vlm ----------------------------------------------------------------------

MLX_VLM = "0.7.10"
DIM, CAPTION = 256, 96  # two heads of 128, whose rotary embedding is Z-Image's


def z_image(prefix: str = "") -> dict[str, torch.Tensor]:
    """A small Z-Image model under ComfyUI's names; its linears keep the variance of their input."""
    state, seeds = {}, iter(range(1000))

    def linear(name: str, rows: int, cols: int, bias: bool = True) -> None:
        weight = matrix(rows, cols, torch.float32, next(seeds)) / cols**0.5
        state[f"{name}.weight"] = weight.bfloat16()
        if bias:
            state[f"{name}.bias"] = matrix(1, rows, seed=next(seeds))[0] / 50

    linear("x_embedder", DIM, 64)
    linear("cap_embedder.1", DIM, CAPTION)
    linear("t_embedder.mlp.0", 1024, 256)
    linear("t_embedder.mlp.2", 256, 1024)
    linear("final_layer.linear", 64, DIM)
    linear("final_layer.adaLN_modulation.1", DIM, 256)
    for name, size in (("cap_embedder.0", CAPTION), ("norm_final", DIM)):
        state[f"{name}.weight"] = 1 + matrix(1, size, seed=next(seeds))[0] / 10
    for token in ("x_pad_token", "cap_pad_token"):
        state[token] = matrix(1, DIM, seed=next(seeds))
    for kind in ("layers", "noise_refiner", "context_refiner"):
        for block in (f"{kind}.0", f"{kind}.1"):
            linear(f"{block}.attention.qkv", 3 * DIM, DIM, bias=False)
            linear(f"{block}.attention.out", DIM, DIM, bias=False)
            for part, rows, cols in (("w1", 640, DIM), ("w2", DIM, 640), ("w3", 640, DIM)):
                linear(f"{block}.feed_forward.{part}", rows, cols, bias=False)
            for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                state[f"{block}.{norm}.weight"] = 1 + matrix(1, DIM, seed=next(seeds))[0] / 10
            for norm in ("q_norm", "k_norm"):
                state[f"{block}.attention.{norm}.weight"] = torch.ones(128).bfloat16()
            if kind != "context_refiner":
                linear(f"{block}.adaLN_modulation.0", 4 * DIM, 256)
    return {prefix + key: tensor for key, tensor in state.items()}


@pytest.fixture
def exported(tmp_path):
    """(MXFP8 file, folder) of a Z-Image model whose file also has a VAE."""
    state = z_image("model.diffusion_model.") | {"vae.decoder.conv_in.weight": torch.ones(4, 4)}
    save_file(state, tmp_path / "source.safetensors")
    convert_file(tmp_path / "source.safetensors", tmp_path / "a.safetensors")
    (tmp_path / "Z").mkdir()
    result = export_mlx(tmp_path / "a.safetensors", tmp_path / "Z" / "transformer")
    assert (result.renamed, result.layers, result.dequantized) == ("Z-Image", 30, [])
    assert "left out: 1 tensor beside the diffusion model" in "".join(result.notes)
    return tmp_path / "a.safetensors", tmp_path / "Z" / "transformer"


def test_z_image_gets_separate_q_k_and_v_and_its_sizes(exported):
    _, folder = exported
    arrays, model = load(folder), z_image()
    assert not [key for key in arrays if "norm_final" in key or key.startswith("vae")]
    loaded = {}
    for key in ("attention.qkv", "attention.out"):
        weight = model[f"layers.1.{key}.weight"]
        loaded[key] = kernels.dequantize(
            *kernels.quantize(weight), torch.float32, shape=weight.shape
        )
    parts = loaded["attention.qkv"].chunk(3)
    expected = {f"to_{name}": part for name, part in zip("qkv", parts, strict=True)}
    expected["to_out.0"] = loaded["attention.out"]
    for name, weight in expected.items():
        name = f"layers.1.attention.{name}"
        found = mx.dequantize(
            arrays[f"{name}.weight"], arrays[f"{name}.scales"], dtype=mx.float32, **MODE
        )
        assert np.array_equal(np.array(found), weight.numpy()), name
    config = json.loads((folder / "config.json").read_text("utf-8"))
    sizes = ("dim", "n_layers", "n_refiner_layers", "n_heads", "intermediate_size", "cap_feat_dim")
    assert [config[size] for size in sizes] == [DIM, 2, 2, 2, 640, CAPTION]
    assert (config["in_channels"], config["quantization"]) == (16, MODE)


@pytest.mark.long  # fetches mlx-vlm, 3 MB, without what it requires
def test_mlx_vlm_loads_z_image_and_computes_with_it(exported, monkeypatch):
    monkeypatch.syspath_prepend(str(fetch_package("mlx-vlm", MLX_VLM)))
    weights = importlib.import_module("mlx_vlm.models.z_image.weights")
    configs = importlib.import_module("mlx_vlm.models.z_image.config")
    transformers = importlib.import_module("mlx_vlm.models.z_image.transformer")
    _, folder = exported
    fields = json.loads((folder / "config.json").read_text("utf-8"))
    config = configs.ZImageConfig(configs.ZImageTransformerConfig.from_dict(fields))
    model = weights.load_transformer(folder.parent, config)
    assert model.quantization_config == MODE

    plain = transformers.ZImageTransformer(config.transformer)
    arrays = load(folder)
    for name in [key.removesuffix(".scales") for key in arrays if key.endswith(".scales")]:
        codes, scales = arrays.pop(f"{name}.weight"), arrays.pop(f"{name}.scales")
        arrays[f"{name}.weight"] = mx.dequantize(codes, scales, dtype=mx.bfloat16, **MODE)
    plain.load_weights([*arrays.items()], strict=True)  # no key is missing or left over
    mx.random.seed(0)
    inputs = mx.random.normal((1, 16, 1, 16, 16)), mx.array([0.3]), mx.random.normal((1, 20, 96))
    expected, found = numpy(plain(*inputs)), numpy(model(*inputs))
    # Both compute in float32 from the same weights; sums run in another order.
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.long
def test_mlx_vlm_loads_the_text_encoder_of_z_image(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(fetch_package("mlx-vlm", MLX_VLM)))
    weights = importlib.import_module("mlx_vlm.models.z_image.weights")
    configs = importlib.import_module("mlx_vlm.models.z_image.config")
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=512, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128, head_dim=16, rope_theta=1e6,
    )  # fmt: skip
    ours = transformers.Qwen3Model(config).eval()
    state = {f"model.{key}": tensor for key, tensor in ours.state_dict().items()}
    save_file(state, tmp_path / "source.safetensors")
    convert_file(tmp_path / "source.safetensors", tmp_path / "a.safetensors", Selection("none"))
    config.save_pretrained(tmp_path)
    (tmp_path / "Z").mkdir()
    folder, saved = tmp_path / "Z" / "text_encoder", tmp_path / "config.json"
    assert export_mlx(tmp_path / "a.safetensors", folder, config=saved).layers == 21

    fields = json.loads((folder / "config.json").read_text("utf-8"))
    text_encoder = configs.ZImageTextEncoderConfig.from_dict(fields)
    theirs = weights.load_text_encoder(
        folder.parent, configs.ZImageConfig(text_encoder=text_encoder)
    )
    load_quantized(nn.ModuleDict({"model": ours}), tmp_path / "a.safetensors")
    tokens = torch.randint(0, 512, (1, 12))
    with torch.no_grad(), kernels.use_backend("eager"):
        expected = ours(input_ids=tokens, output_hidden_states=True).hidden_states[-2].numpy()
    mask = mx.ones((1, 12), dtype=mx.int32)
    found = numpy(theirs(mx.array(tokens.numpy()), mask, output_penultimate=True))
    # Both compute in float32 from the same weights; sums run in another order.
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
