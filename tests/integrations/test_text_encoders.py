"""Text encoders in MXFP8 in transformers: single files, folders, adapters and errors."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
import transformers
from accelerate import cpu_offload
from checkpoints import load as load_tensors
from diffusers.hooks import apply_group_offloading
from diffusers_models import distance
from peft import LoraConfig
from quantized_files import plain
from safetensors.torch import save_file

from mxfp8.integrations.layers import LoadedLinear, replace_linears
from mxfp8.integrations.model_folder import convert_folder
from mxfp8.integrations.transformers import from_single_file
from mxfp8.quant.format import FormatError
from mxfp8.quant.linear import MXFP8Linear, quantize_linears

IDS = torch.arange(12)[None]
QWEN3 = transformers.Qwen3Config(
    vocab_size=100, hidden_size=160, intermediate_size=260, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=80,
)  # fmt: skip
T5 = transformers.T5Config(
    vocab_size=100, d_model=160, d_kv=80, d_ff=260, num_layers=2, num_heads=2,
    feed_forward_proj="gated-gelu",
)  # fmt: skip
QWEN_VL = transformers.Qwen2_5_VLConfig(  # Qwen-Image's
    text_config={
        "vocab_size": 100, "hidden_size": 160, "intermediate_size": 260, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 16, 16],
        },
    },
    vision_config={
        "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
        "out_hidden_size": 160,
    },
)  # fmt: skip
ENCODERS = {
    "Qwen3": (transformers.Qwen3Model, QWEN3, "model."),  # ComfyUI's files have the whole model
    "T5": (transformers.T5EncoderModel, T5, ""),
}


def quantized(model) -> set[str]:
    return {name for name, layer in model.named_modules() if isinstance(layer, LoadedLinear)}


def output(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, output_hidden_states=True).hidden_states[-1].float()


def write(name: str, path, dtype):
    """An MXFP8 file of a random encoder, with the names that ComfyUI's files have."""
    cls, config, prefix = ENCODERS[name]
    torch.manual_seed(0)
    model = cls(config).to(dtype)
    quantize_linears(model)
    save_file({prefix + k: v.clone() for k, v in model.state_dict().items()}, path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_a_single_file_and_a_folder_give_the_model_of_the_dequantized_weights(
    name, dtype, tmp_path
):
    cls, config, prefix = ENCODERS[name]
    path = tmp_path / "encoder.safetensors"
    write(name, path, dtype)
    model = from_single_file(cls, path, config, precision="exact", dtype=dtype)
    assert len(quantized(model)) == 14 and model.dtype == dtype
    state = {k.removeprefix(prefix): v.to(dtype) for k, v in plain(path).items()}
    wanted = cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    if name == "T5" and dtype == torch.float16:  # which keeps this layer in float32
        layer = model.encoder.block[0].layer[1].DenseReluDense.wo
        assert layer.weight.dtype == torch.float32
    # Values below FP16's normal range are rounded in the reference, but not by our kernel.
    rounding = 2e-3 if dtype == torch.float16 else 0
    assert distance(output(model), output(wanted)) <= rounding

    for size in ("10GB", "100KB"):
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        saved = json.loads((tmp_path / size / "config.json").read_text())
        assert saved["quantization_config"]["quant_method"] == "mxfp8"
        again = cls.from_pretrained(tmp_path / size, dtype=dtype, device_map="cpu")
        assert quantized(again) == quantized(model)
        assert torch.equal(output(again), output(model))
    again.dequantize()
    assert not quantized(again)
    again.save_pretrained(tmp_path / "plain")
    assert not quantized(cls.from_pretrained(tmp_path / "plain", dtype=dtype))
    assert distance(output(again), output(model)) <= rounding


@pytest.mark.parametrize("name", ENCODERS)
def test_a_converted_folder_loads(name, tmp_path):
    cls, config, _ = ENCODERS[name]
    torch.manual_seed(0)
    original = cls(config).to(torch.bfloat16).eval()
    original.save_pretrained(tmp_path / "original", max_shard_size="100KB")
    (tmp_path / "original" / "tokenizer.json").write_text("{}")
    report = convert_folder(tmp_path / "original", tmp_path / "new", max_file=200_000)
    assert (tmp_path / "new" / "tokenizer.json").is_file()
    assert (tmp_path / "new" / "model.safetensors.index.json").is_file()
    model = cls.from_pretrained(tmp_path / "new", dtype=torch.bfloat16)
    assert quantized(model) == {layer.name for layer in report.quantized}
    assert len(quantized(model)) >= 7
    assert 0.001 < distance(output(model), output(original)) < 0.1  # seven rounded layers in a row


@pytest.mark.parametrize("cls", [
    transformers.Qwen2_5_VLForConditionalGeneration, transformers.Qwen2_5_VLModel,
])  # fmt: skip
def test_a_folder_whose_tensors_transformers_renames_loads(cls, tmp_path):
    torch.manual_seed(0)
    whole = transformers.Qwen2_5_VLForConditionalGeneration(QWEN_VL).to(torch.bfloat16).eval()
    whole.save_pretrained(tmp_path / "original")
    names, _ = load_tensors(tmp_path / "original" / "model.safetensors")
    assert "model.layers.0.mlp.up_proj.weight" in names  # not model.language_model.layers...
    report = convert_folder(tmp_path / "original", tmp_path / "new")
    model = cls.from_pretrained(tmp_path / "new", dtype=torch.bfloat16)
    assert len(quantized(model)) == len(report.quantized) >= 7
    wanted = cls.from_pretrained(tmp_path / "original", dtype=torch.bfloat16)
    given = output(model)
    assert 0.001 < distance(given, output(wanted)) < 0.1
    model.save_pretrained(tmp_path / "again")
    again = cls.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert quantized(again) == quantized(model)
    assert torch.equal(output(again), given)


def test_an_encoder_loads_from_a_folder_of_the_whole_model(tmp_path):
    torch.manual_seed(0)
    whole = transformers.T5ForConditionalGeneration(T5).to(torch.bfloat16)
    whole.save_pretrained(tmp_path / "original")
    convert_folder(tmp_path / "original", tmp_path / "new")
    whole = type(whole).from_pretrained(tmp_path / "new", dtype=torch.bfloat16)
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "new", dtype=torch.bfloat16)
    assert len(quantized(encoder)) == 14 < len(quantized(whole))
    assert torch.equal(output(encoder), output(whole.encoder))


def test_a_single_file_takes_the_config_of_an_mxfp8_folder(tmp_path):
    cls, config, _ = ENCODERS["Qwen3"]
    write("Qwen3", tmp_path / "x.safetensors", torch.bfloat16)
    model = from_single_file(cls, tmp_path / "x.safetensors", config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "folder")
    saved = transformers.AutoConfig.from_pretrained(tmp_path / "folder")
    again = from_single_file(cls, tmp_path / "x.safetensors", saved, dtype=torch.bfloat16)
    assert quantized(again) == quantized(model) and saved.quantization_config is not None


def test_markers_of_the_header_alone_are_read(tmp_path):
    cls, config, _ = ENCODERS["T5"]
    write("T5", tmp_path / "all.safetensors", torch.bfloat16)
    state, _ = load_tensors(tmp_path / "all.safetensors")
    markers = {k.removesuffix(".comfy_quant"): json.loads(bytes(v.tolist()))
               for k, v in state.items() if k.endswith(".comfy_quant")}  # fmt: skip
    unmarked = {k: v for k, v in state.items() if not k.endswith(".comfy_quant")}
    entry = {"_quantization_metadata": json.dumps({"layers": markers})}
    save_file(unmarked, tmp_path / "header.safetensors", entry)
    models = [
        from_single_file(cls, tmp_path / name, config, dtype=torch.bfloat16)
        for name in ("all.safetensors", "header.safetensors")
    ]
    assert torch.equal(output(models[0]), output(models[1]))


def test_peft_adapts_mxfp8_layers(tmp_path):
    cls, config, _ = ENCODERS["Qwen3"]
    write("Qwen3", tmp_path / "x.safetensors", torch.bfloat16)
    model = from_single_file(cls, tmp_path / "x.safetensors", config, dtype=torch.bfloat16)
    before = output(model)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model.add_adapter(adapter)
    assert distance(output(model), before) > 0.01
    loss = model(IDS).last_hidden_state.float().square().mean()
    loss.backward()
    trained = [p for n, p in model.named_parameters() if "lora" in n]
    assert len(trained) == 8 and all(p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_offloaded_in_groups_and_not_layer_by_layer(name, tmp_path):
    cls, config, _ = ENCODERS[name]
    write(name, tmp_path / "x.safetensors", torch.bfloat16)

    def load(**options):
        return from_single_file(cls, tmp_path / "x.safetensors", config, **options)

    model, cpu = load(), torch.device("cpu")
    wanted = output(model)
    apply_group_offloading(model, cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(output(model), wanted)
    with pytest.raises(ValueError, match=r"one by one.*diffusers\.hooks\.apply_group_offloading"):
        cpu_offload(load(), execution_device=cpu)
    with pytest.raises(ValueError, match=r"places layers on 0, cpu, .*one by one"):
        load(device_map={"": 0, "layers" if name == "Qwen3" else "encoder": "cpu"})


def test_codes_that_a_library_converted_are_codes_again():
    """As transformers 5.0 converts those of layers that it keeps in float32."""

    def fill(state: dict[str, torch.Tensor]):
        with torch.device("meta"):
            model = torch.nn.Sequential(torch.nn.Linear(64, 40, bias=False))
        replace_linears(model, ["0"], "exact", torch.float32)
        for name, tensor in state.items():
            setattr(model[0], name, tensor)
        return model[0]

    linear = torch.nn.Linear(64, 40, bias=False)
    quantized = MXFP8Linear.from_linear(linear)
    stored = quantized.state_dict()
    filled = fill({name: tensor.float() for name, tensor in stored.items()})
    assert torch.equal(filled.qdata, quantized.qdata)
    assert torch.equal(filled.weight_scale, quantized.weight_scale)
    assert filled.marker == quantized.marker
    with pytest.raises(ValueError, match="not float8_e4m3fn"):
        fill({**stored, "weight": linear.weight.detach()})


def test_a_version_before_5_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)  # it has none
    monkeypatch.delitem(sys.modules, "mxfp8.integrations.transformers")
    with pytest.raises(ImportError, match="need version 5 of it, or newer"):
        importlib.import_module("mxfp8.integrations.transformers")


def test_what_does_not_fit_is_rejected_by_name(tmp_path):
    cls, config, _ = ENCODERS["Qwen3"]
    path = tmp_path / "x.safetensors"
    write("Qwen3", path, torch.bfloat16)
    with pytest.raises(ValueError, match=r"T5EncoderModel has no linear layer 'model\.layers\.0"):
        from_single_file(transformers.T5EncoderModel, path, T5, dtype=torch.bfloat16)
    other = transformers.Qwen3Config(**{**QWEN3.to_dict(), "intermediate_size": 320})
    with pytest.raises(
        ValueError, match=r"MXFP8 layer 'layers\.0\.mlp\.down_proj': .*\[160, 320\]"
    ):
        from_single_file(cls, path, other, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype=torch\.float64.*give torch\.bfloat16"):
        from_single_file(cls, path, config, dtype=torch.float64)
    with pytest.raises(TypeError, match="AutoModel is no model's class"):
        from_single_file(transformers.AutoModel, path, config)
    model = cls(config)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "plain.safetensors")
    with pytest.raises(FormatError, match=r"plain.safetensors: none of its layers is MXFP8"):
        from_single_file(cls, tmp_path / "plain.safetensors", config)
    state, metadata = load_tensors(path)
    del state["model.layers.1.input_layernorm.weight"], state["model.norm.weight"]
    save_file(state, tmp_path / "short.safetensors", metadata)
    with pytest.raises(
        ValueError, match=r"the files lack 2 of its tensors.*first is 'layers\.1\.input"
    ):
        from_single_file(cls, tmp_path / "short.safetensors", config, dtype=torch.bfloat16)


@pytest.mark.parametrize("lost", ["norm.weight", "layers.1.self_attn.q_proj.bias"])
def test_a_folder_without_all_weights_is_rejected_by_name(lost, tmp_path):
    """Of a plain layer, or an MXFP8 one; a head may be new where the folder is of another class."""
    config = transformers.Qwen2Config(**{**QWEN3.to_dict(), "model_type": "qwen2"})
    torch.manual_seed(0)
    transformers.Qwen2Model(config).to(torch.bfloat16).save_pretrained(tmp_path / "original")
    convert_folder(tmp_path / "original", tmp_path / "new")
    with_head = transformers.Qwen2ForSequenceClassification
    model = with_head.from_pretrained(tmp_path / "new", dtype=torch.bfloat16)
    assert len(quantized(model)) == 14
    model.save_pretrained(tmp_path / "headed")

    def remove(folder: str, key: str) -> None:
        path = tmp_path / folder / "model.safetensors"
        state, metadata = load_tensors(path)
        del state[key]
        save_file(state, path, metadata)

    remove("new", lost)
    remove("headed", "score.weight")
    classes = (transformers.Qwen2Model, "new"), (with_head, "new"), (with_head, "headed")
    for cls, folder in classes:
        named = "score.weight" if folder == "headed" else lost
        with pytest.raises(ValueError, match=f"the files lack 1 of its tensors.*{named}"):
            cls.from_pretrained(tmp_path / folder, dtype=torch.bfloat16)


def test_a_class_says_what_its_files_may_lack(tmp_path, monkeypatch):
    config = transformers.Qwen2Config(**{**QWEN3.to_dict(), "model_type": "qwen2"})
    transformers.Qwen2Model(config).to(torch.bfloat16).save_pretrained(tmp_path / "original")
    convert_folder(tmp_path / "original", tmp_path / "new")
    path = tmp_path / "new" / "model.safetensors"
    state, metadata = load_tensors(path)
    del state["norm.weight"]
    save_file(state, path, metadata)
    monkeypatch.setattr(transformers.Qwen2Model, "_keys_to_ignore_on_load_missing", ["^norm"])
    model = transformers.Qwen2Model.from_pretrained(tmp_path / "new", dtype=torch.bfloat16)
    assert len(quantized(model)) == 14


def test_tied_weights_are_not_missing(tmp_path):
    tied = transformers.Qwen3Config(**{**QWEN3.to_dict(), "tie_word_embeddings": True})
    write("Qwen3", tmp_path / "x.safetensors", torch.bfloat16)
    cls = transformers.Qwen3ForCausalLM
    model = from_single_file(cls, tmp_path / "x.safetensors", tied, dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
