"""MXFP8Linear in ordinary torch modules, down to a sentence encoder with real trained weights."""

from __future__ import annotations

import copy
import io
import json
import pickle

import minilm
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from mxfp8.kernels.backends import reference
from mxfp8.quant.cli import main
from mxfp8.quant.format import FormatError, read_header
from mxfp8.quant.linear import MXFP8Linear, load_quantized, quantize_linears


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 50), nn.GELU(), nn.Linear(50, 33, bias=False))


def test_it_computes_what_the_oracle_computes():
    linear = nn.Linear(70, 50)
    ours = MXFP8Linear.from_linear(linear, precision="exact")
    x = torch.randn(2, 3, 70)
    stored = reference.quantize(linear.weight.detach())
    flat = x.reshape(-1, 70)
    wanted = reference.matmul("stored", None, (flat,), stored, linear.bias, x.dtype, 50)
    assert torch.allclose(ours(x).reshape(-1, 50), wanted, rtol=0, atol=1e-5)


def test_its_state_dict_is_the_stock_file_format(tmp_path):
    model = network()
    assert quantize_linears(model) == ["0", "2"]
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    layers = read_header(tmp_path / "model.safetensors").layers
    assert {name: layer.shape for name, layer in layers.items()} == {"0": (50, 70), "2": (33, 50)}

    other = network()
    assert not any(load_quantized(other, tmp_path / "model.safetensors"))
    x = torch.randn(4, 70)
    assert torch.equal(other(x), model(x))
    other = network()
    quantize_linears(other)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(x), model(x))


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    model = network()
    quantize_linears(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"'0' is an MXFP8 linear of shape \[50, 70\]"):
        load_quantized(nn.Sequential(nn.Linear(70, 51)), tmp_path / "model.safetensors")


def test_a_file_without_markers_or_layers_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(128, 64, bias=False))
    quantize_linears(model)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("comfy_quant")}
    save_file(state, tmp_path / "lost.safetensors")
    fresh = nn.Sequential(nn.Linear(128, 64, bias=False))
    with pytest.raises(FormatError, match="holds MXFP8 codes, but no marker says so"):
        load_quantized(fresh, tmp_path / "lost.safetensors")
    save_file(fresh.state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(FormatError, match="none of its layers is MXFP8; use load_state_dict"):
        load_quantized(fresh, tmp_path / "plain.safetensors")


def test_a_change_of_dtype_leaves_the_codes_alone():
    model = network()
    quantize_linears(model, lambda name, _: name == "0")
    codes = model[0].qdata.clone()
    model.half().bfloat16()
    assert torch.equal(model[0].qdata, codes)
    assert model(torch.randn(4, 70).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "last, message",
    [
        (lambda linear: linear.weight.data[3].fill_(torch.nan), "holds NaN or Inf"),
        (lambda linear: linear.weight.data[3].fill_(3.4e38), "rounds to more than torch.float32"),
        (lambda linear: linear.half().weight.data[3].fill_(-63488), "more than torch.float16"),
        (lambda linear: linear.double(), "is torch.float64"),
        (lambda linear: linear.to("meta"), "on the meta device"),
    ],
)
def test_nothing_is_replaced_when_a_weight_cannot_be_stored(last, message):
    model = network()
    last(model[2])
    with pytest.raises(ValueError, match=rf"'2' \[33, 50\] .*{message}"):
        quantize_linears(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_largest_weight_it_takes_stays_finite(dtype):
    """248/256 of the power that overflows is coded as 256/256, any value below it as 240/256."""
    power = 2.0 ** (16 if dtype == torch.float16 else 128)
    limit = torch.tensor(248 / 256 * power, dtype=dtype)
    linear = nn.Linear(32, 32, dtype=dtype)
    linear.weight.data[0, 0] = torch.nextafter(limit, torch.zeros_like(limit))
    assert float(MXFP8Linear.from_linear(linear).weight[0, 0]) == 240 / 256 * power
    linear.weight.data[0, 0] = limit
    with pytest.raises(ValueError, match="rounds to more"):
        MXFP8Linear.from_linear(linear)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_inputs_gives_its_bias():
    model = nn.Sequential(nn.Linear(0, 4))
    assert quantize_linears(model) == ["0"]
    assert torch.equal(model(torch.ones(2, 0)), model[0].bias.expand(2, 4))


def test_gradients_reach_the_input_and_the_bias():
    linear = nn.Linear(70, 50)
    ours = MXFP8Linear.from_linear(linear)
    x = torch.randn(4, 70, requires_grad=True)
    ours(x).sum().backward()
    weight = reference.dequantize(*reference.quantize(linear.weight.detach()), x.dtype, 50, 70)
    assert torch.allclose(x.grad, weight.sum(0).expand(4, -1), atol=1e-4)
    assert torch.equal(ours.bias.grad, torch.full((50,), 4.0))


def test_a_marker_that_asks_for_full_precision_makes_it_exact():
    ours = MXFP8Linear.from_linear(nn.Linear(64, 32), precision="fast")
    ours.marker["full_precision_matrix_mult"] = True
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr(
            "mxfp8.quant.linear.kernels.linear", lambda *_, precision, **__: seen.append(precision)
        )
        ours(torch.randn(1, 64))
    assert seen == ["exact"]


# ---- modules that read the weight ---------------------------------------------------------------

SIZES = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 128}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {"vocab_size": 50, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
GATED = {**T5, "feed_forward_proj": "gated-gelu"}
X = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(18).reshape(2, 9)
PADDING = torch.arange(7) >= torch.tensor([[5], [7], [3]])


def encoder(**options) -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not layer.norm_first)


def nested(model: nn.Module) -> torch.Tensor:
    return model(torch.nested.nested_tensor([X[0, :3], X[1, :5]])).to_padded_tensor(0.0)


def padded(model: nn.Module) -> torch.Tensor:
    return model(X.to(next(model.parameters()).dtype), src_key_padding_mask=PADDING)


def jagged(model: nn.Module) -> torch.Tensor:
    rows = torch.nested.nested_tensor([X[0, :3], X[1, :5]], layout=torch.jagged)
    return model(rows).values()


def hidden(model: nn.Module) -> torch.Tensor:
    return model(TOKENS)[0]


def t5_decoder(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits


MODELS = {
    "encoder": (encoder, lambda m: m(X)),
    "encoder, padding": (encoder, padded),
    "encoder, norm first": (lambda: encoder(norm_first=True, activation="gelu"), lambda m: m(X)),
    "encoder, nested": (encoder, nested),
    "encoder layer": (lambda: encoder().layers[0], lambda m: m(X)),
    "encoder layer, odd heads": (
        lambda: nn.TransformerEncoderLayer(64, 1, 128, batch_first=True),
        lambda m: m(X),
    ),
    "transformer": (lambda: nn.Transformer(64, 4, 1, 1, 128, batch_first=True), lambda m: m(X, X)),
    "linear, nested": (lambda: nn.Sequential(nn.Linear(64, 32)), nested),
    "linear, jagged": (lambda: nn.Sequential(nn.Linear(64, 32)), jagged),
    "T5": (lambda: transformers.T5EncoderModel(transformers.T5Config(**GATED)), hidden),
    "UMT5": (lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**T5)), hidden),
    "T5 decoder": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
        t5_decoder,
    ),
    "BERT": (lambda: transformers.BertModel(transformers.BertConfig(**SIZES)), hidden),
    "Llama": (lambda: transformers.LlamaModel(transformers.LlamaConfig(**SIZES)), hidden),
    "CLIP": (
        lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**SIZES, eos_token_id=49)),
        hidden,
    ),
}


def pair(name: str, dtype: torch.dtype = torch.float32):
    """A model in eval mode, the same quantized, and what runs either."""
    torch.manual_seed(0)
    make, run = MODELS[name]
    original = make().eval().to(dtype)
    quantized = copy.deepcopy(original)
    assert quantize_linears(quantized, precision="exact")
    return original, quantized, run


def with_values_of(quantized: nn.Module, original: nn.Module) -> nn.Module:
    """The original with the values that MXFP8 gives its weights."""
    result = copy.deepcopy(original)
    for name, layer in quantized.named_modules():
        if isinstance(layer, MXFP8Linear):
            result.get_submodule(name).weight.data = layer.dequantize(layer.like.dtype)
    return result


def off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_its_dequantized_weights_compute(name, mode):
    original, quantized, run = pair(name)
    with mode():
        actual, expected, exact = map(
            run, (quantized, original, with_values_of(quantized, original))
        )
    assert off(actual, exact) < 1e-5
    assert 1e-4 < off(actual, expected) < 0.08  # a few layers of 0.03


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["encoder, padding", "T5", "UMT5", "T5 decoder"])
def test_half_precision_models_stay_in_half_precision(name, dtype):
    original, quantized, run = pair(name, dtype)
    with torch.no_grad():
        actual, expected = run(quantized), run(original)
    assert actual.dtype == expected.dtype == dtype
    assert off(actual, expected) < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder", "T5"])
def test_models_compile_to_one_graph(name):
    _, quantized, run = pair(name)
    torch.compiler.reset()  # other shapes before make these symbols, which torch's encoder cannot
    with torch.no_grad():
        compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
        assert off(run(compiled), run(quantized)) < 1e-5


def test_the_weight_has_the_dtype_of_the_module_and_its_values_have_a_gradient():
    linear = nn.Linear(70, 50)
    layer = MXFP8Linear.from_linear(linear)
    expected = reference.dequantize(
        *reference.quantize(linear.weight.detach()), torch.float32, 50, 70
    )
    assert torch.equal(layer.weight.clone(), expected)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        layer.to(dtype)
        assert layer.weight.dtype == layer.weight.clone().dtype == dtype
    assert layer.to("meta").weight.is_meta
    x = torch.randn(4, 70, requires_grad=True)
    nn.functional.linear(x, MXFP8Linear.from_linear(linear).weight).sum().backward()
    assert torch.allclose(x.grad, expected.sum(0).expand(4, -1), atol=1e-4)


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.data.normal_(),
        lambda layer: nn.init.xavier_uniform_(layer.weight),
        lambda layer: setattr(layer.weight, "data", torch.zeros(50, 70)),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(50, 70))),
        lambda layer: torch._foreach_mul_([layer.weight], 2),
        lambda layer: torch.zeros(50, 70, out=layer.weight),
        lambda layer: layer.weight.__setitem__(slice(None), 0),
    ],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_whoever_writes_the_weight_is_told(write, mode):
    layer = MXFP8Linear.from_linear(nn.Linear(70, 50))
    codes = layer.qdata.clone()
    with mode(), pytest.raises((RuntimeError, AttributeError), match="cannot be written"):
        nn.Sequential(layer).apply(lambda m: write(m) if hasattr(m, "weight") else None)
    assert torch.equal(layer.qdata, codes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_inputs_that_are_no_activations_are_refused(dtype):
    layer = MXFP8Linear.from_linear(nn.Linear(70, 50))
    with pytest.raises(ValueError, match=f"x is {dtype}; it must be one of float32"):
        layer(torch.ones(2, 70, dtype=dtype))


# ---- which layers are replaced, and what still refers to them -----------------------------------


class LoRA(nn.Linear):
    """As adapters are often written: a subclass that adds to the result."""

    def forward(self, x):
        return super().forward(x) + 0.1 * x.sum(-1, keepdim=True)


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 64), nn.Linear(64, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(TOKENS)) + x.sum()


SPECIAL = {
    "subclass": lambda: nn.Sequential(LoRA(64, 50)),
    "tied": TiedHead,
    "weight_norm": lambda: nn.Sequential(weight_norm(nn.Linear(64, 50))),
    "parametrized": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 50))),
    "pruned": lambda: nn.Sequential(prune.l1_unstructured(nn.Linear(64, 50), "weight", 0.5)),
    "pruned bias": lambda: nn.Sequential(prune.l1_unstructured(nn.Linear(64, 50), "bias", 0.5)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", SPECIAL)
def test_a_layer_that_is_more_than_a_linear_is_left_alone(name):
    model = SPECIAL[name]()
    before = model(X)
    assert quantize_linears(model) == []
    assert torch.equal(model(X), before)


def test_all_names_and_hooks_of_a_layer_stay():
    """A layer in two places, in a list, with a hook, with a forward of its own; a whole model."""
    torch.manual_seed(0)
    shared, seen = nn.Linear(64, 64), []
    shared.register_forward_hook(lambda *arguments: seen.append(arguments))
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}).eval()
    listed, bias = [shared], shared.bias
    assert quantize_linears(model) == ["a"]
    assert model["a"] is model["b"][0] is listed[0] is shared
    assert isinstance(shared, MXFP8Linear) and shared.bias is bias and not shared.training
    shared(X)
    assert len(seen) == 1

    adapted = nn.Sequential(nn.Linear(64, 50))
    before = adapted[0].forward
    adapted[0].forward = lambda x: 2 * before(x)
    quantize_linears(adapted)
    assert torch.allclose(adapted(X), 2 * MXFP8Linear.forward(adapted[0], X), atol=1e-5)

    whole = nn.Linear(64, 50)
    expected = MXFP8Linear.from_linear(whole)(X)
    assert quantize_linears(whole) == [""]
    assert torch.equal(whole(X), expected)


def test_its_bias_can_be_parametrized_and_its_weight_cannot():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    layer = MXFP8Linear.from_linear(nn.Linear(64, 50))
    expected = layer(X) + layer.bias
    parametrize.register_parametrization(layer, "bias", Double())
    assert torch.allclose(layer(X), expected, atol=1e-5)
    with pytest.raises(ValueError, match="does not have a parameter"):
        parametrize.register_parametrization(layer, "weight", Double())


# ---- copies, and state dicts --------------------------------------------------------------------


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assigned(model: nn.Module) -> nn.Module:
    result = copy.deepcopy(model).to("meta")
    result.load_state_dict(model.state_dict(), assign=True)
    return result


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved, assigned]
)
def test_a_copy_computes_the_same(copied):
    model = network()
    quantize_linears(model)
    x = torch.randn(4, 70)
    assert torch.equal(copied(model)(x), model(x))


def marker(**changes) -> torch.Tensor:
    conf = {"format": "mxfp8", "group_size": 32, "orig_shape": [50, 70], **changes}
    return torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("weight", torch.zeros(50, 70), r"weight is torch.float32 \[50, 70\].*load plain weights"),
        ("weight", torch.zeros(64, 96, dtype=torch.int8), "weight is torch.int8"),
        ("weight", torch.zeros(64, 96, dtype=torch.float8_e5m2), "weight is torch.float8_e5m2"),
        ("weight", torch.zeros(96, 96, dtype=torch.float8_e4m3fn), r"\[96, 96\]"),
        ("weight_scale", torch.zeros(128, 4, dtype=torch.int8), "weight_scale is torch.int8"),
        ("weight_scale", torch.zeros(64, 3, dtype=torch.uint8), r"scales have shape \[64, 3\]"),
        ("weight_scale", None, "together"),
        ("bias", torch.zeros(64), r"bias has shape \[64\]"),
        ("comfy_quant", torch.zeros(9), "not 1-D uint8"),
        ("comfy_quant", torch.zeros(9, dtype=torch.uint8), "is not JSON"),
        ("comfy_quant", marker(format="nvfp4"), "'nvfp4'"),
        ("comfy_quant", marker(group_size=16), "group_size"),
        ("comfy_quant", marker(orig_shape=[51, 70]), r"\[51, 70\]"),
        ("comfy_quant", marker(orig_shape="all"), "orig_shape"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_change_nothing(name, value, message):
    model, other = network(), network()
    quantize_linears(model)
    quantize_linears(other)
    other[0].qdata.fill_(1)
    state = {**other.state_dict(), f"0.{name}": value}
    if value is None:
        del state[f"0.{name}"]
    before = copy.deepcopy(model[0].state_dict())
    with pytest.raises(RuntimeError, match=rf"MXFP8 layer '0': .*{message}"):
        model.load_state_dict(state)
    after = model[0].state_dict()
    assert all(torch.equal(after[key].view(-1), before[key].view(-1)) for key in before)


def test_rows_may_come_without_their_padding():
    model, other = network(), network()
    quantize_linears(model)
    quantize_linears(other)
    state = model.state_dict()
    state["0.weight"] = state["0.weight"][:50]
    state["0.weight_scale"] = state["0.weight_scale"].view(torch.float8_e8m0fnu)
    other[0].qdata.fill_(1)
    other.load_state_dict(state)
    x = torch.randn(4, 70)
    assert torch.equal(other(x), model(x))


def test_what_is_missing_has_the_names_of_the_file():
    model = network()
    quantize_linears(model)
    missing, unexpected = model.load_state_dict({"0.other": torch.ones(1)}, strict=False)
    names = {"0.weight", "0.weight_scale", "0.bias", "2.weight", "2.weight_scale"}
    assert (set(missing), unexpected) == (names, ["0.other"])


# ---- files --------------------------------------------------------------------------------------


def converted(model: nn.Module, folder, conf=None, leave_out=()):
    """A file in which every linear of a model is MXFP8, as the converter would write it."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            codes = MXFP8Linear.from_linear(layer).state_dict()
            state.update({f"{name}.{key}": value for key, value in codes.items()})
    state = {name: value for name, value in state.items() if name not in leave_out}
    metadata = {"_quantization_metadata": json.dumps({"layers": conf})} if conf else None
    save_file(state, folder / "model.safetensors", metadata)
    return folder / "model.safetensors"


@pytest.mark.parametrize(
    "make, leave_out",
    [
        (lambda: nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), ()),  # has an out_proj
        (lambda: nn.Sequential(LoRA(64, 50), nn.Linear(50, 32)), ()),
        (TiedHead, ()),
        (TiedHead, ["embedding.weight"]),
    ],
)
def test_a_layer_that_is_more_than_a_linear_gets_the_values_of_the_file(make, leave_out, tmp_path):
    original, loaded = make().eval(), make().eval()
    missing, unexpected = load_quantized(
        loaded, converted(original, tmp_path, leave_out=leave_out), precision="exact"
    )
    assert (missing, unexpected) == (list(leave_out), [])
    for name, layer in original.named_modules():
        kept = type(layer) is not nn.Linear or make is TiedHead
        assert type(loaded.get_submodule(name)) is (type(layer) if kept else MXFP8Linear)
    for layer in original.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = MXFP8Linear.from_linear(layer).dequantize(torch.float32)
    with torch.no_grad():
        assert off(loaded(X), original(X)) < 1e-5


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", ["weight_norm", "parametrized", "pruned"])
def test_a_file_does_not_fit_a_weight_that_is_computed(name, tmp_path):
    path, model = converted(nn.Sequential(nn.Linear(64, 50)), tmp_path), SPECIAL[name]()
    before = model(X)
    with pytest.raises(FormatError, match="computes the weight there from other tensors"):
        load_quantized(model, path)
    assert torch.equal(model(X), before)


def test_a_module_on_the_meta_device_gets_the_tensors_of_the_file(tmp_path):
    model = encoder().bfloat16().eval()
    path = converted(model, tmp_path)
    with torch.device("meta"):
        loaded = encoder().eval()
    assert not any(load_quantized(loaded, path)[0])
    assert loaded.layers[0].linear1.weight.dtype == torch.bfloat16
    load_quantized(model, path)
    with torch.no_grad():
        assert torch.equal(padded(loaded), padded(model))


@pytest.mark.parametrize("names", ["a", "b", "ab"])
def test_a_layer_with_two_names_is_loaded_under_either(names, tmp_path):
    original, shared = MXFP8Linear.from_linear(nn.Linear(64, 64)), nn.Linear(64, 64)
    state = original.state_dict()
    state = {f"{name}.{key}": value.clone() for name in names for key, value in state.items()}
    save_file(state, tmp_path / "model.safetensors")
    model = nn.ModuleDict({"a": shared, "b": shared})
    load_quantized(model, tmp_path / "model.safetensors")
    assert model["a"] is model["b"] is shared
    assert torch.equal(shared(X), original(X))


def test_a_flag_in_the_header_alone_counts(tmp_path):
    conf = {"0": {"format": "mxfp8", "full_precision_matrix_mult": True}}
    model = nn.Sequential(nn.Linear(64, 50))
    load_quantized(model, converted(model, tmp_path, conf))
    assert model[0].marker["full_precision_matrix_mult"] is True


@pytest.mark.parametrize(
    "change, options, message",
    [
        (lambda state: state.update({"2.bias": torch.zeros(60)}), {}, r"'2.bias' has shape \[60\]"),
        (lambda state: None, {"prefix": "model."}, "none of its layers under 'model.' is MXFP8"),
        (
            lambda state: state.update({"2.comfy_quant": marker(format="float8_e4m3fn")}),
            {},
            "'2' is marked as 'float8_e4m3fn'",
        ),
        (
            lambda state: state.update({
                "2.weight": torch.zeros(2, 64, 64, dtype=torch.float8_e4m3fn),
                "2.weight_scale": torch.ones(2, 128, 4, dtype=torch.uint8),
                "2.comfy_quant": marker(num_experts=2, orig_shape=[2, 64, 64]),
            }),
            {},
            "'2' is a bank of experts",
        ),
    ],
)  # fmt: skip
def test_a_file_that_fits_in_part_is_refused_and_changes_nothing(
    change, options, message, tmp_path
):
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    path = converted(model, tmp_path)
    state = load_file(path)
    change(state)
    save_file(state, path)
    before = model(X)
    with pytest.raises(FormatError, match=message):
        load_quantized(model, path, **options)
    assert torch.equal(model(X), before)


def test_a_module_in_double_precision_is_refused_and_stays(tmp_path):
    model = network()
    path = converted(model, tmp_path)
    model[2].double()
    with pytest.raises(ValueError, match=r"'2' of the module is torch\.float64"):
        load_quantized(model, path)
    assert type(model[0]) is nn.Linear


def test_real_trained_weights_keep_their_embeddings(tmp_path):
    """MiniLM through the command: 1 - cosine of its embeddings, mean, at most 3e-3."""
    target = tmp_path / "minilm-mxfp8.safetensors"
    assert main(["convert", str(minilm.WEIGHTS), str(target)]) == 0
    batch = minilm.batch()
    original, quantized = minilm.trained(), minilm.untrained()
    missing, unexpected = load_quantized(quantized, target, precision="exact")
    assert set(missing) == set(original.state_dict()) - set(load_file(minilm.WEIGHTS))
    assert unexpected == ["embeddings.position_ids"]  # a buffer that transformers dropped
    assert sum(isinstance(m, MXFP8Linear) for m in quantized.modules()) == 37
    distance = 1 - (minilm.embed(original, batch) * minilm.embed(quantized, batch)).sum(-1)
    print(f"mean 1 - cosine {distance.mean():.2e}, largest {distance.max():.2e}")
    assert 1e-5 < distance.mean() < 3e-3
