"""MXFP8Linear in ordinary torch modules, down to a sentence encoder with real trained weights."""

from __future__ import annotations

import minilm
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

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
    qdata, scale = reference.quantize(linear.weight.detach())
    wanted = reference.linear(x.reshape(-1, 70), qdata, scale, linear.bias, 50, 70)
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
    codes = model[0].weight.clone()
    model.half().bfloat16()
    assert torch.equal(model[0].weight, codes)
    assert model(torch.randn(4, 70).bfloat16()).dtype == torch.bfloat16


def test_nothing_is_replaced_when_a_weight_is_not_finite():
    model = network()
    model[2].weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"'2' \[33, 50\] holds NaN or Inf"):
        quantize_linears(model)
    assert isinstance(model[0], nn.Linear)


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
