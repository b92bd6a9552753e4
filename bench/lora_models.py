"""Models and LoRAs for `lora.py`, in the real ComfyUI, whose modules can be imported by then."""

from __future__ import annotations

import hashlib
import itertools
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent / "emoji"))

from pictures import NAMES, encode, sample

from mxfp8.kernels import dequantize
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.conversion.policy import Selection
from mxfp8.quant.format import MARKER, SCALE, WEIGHT, read_header

IMAGE_MODEL = Path(__file__).resolve().parents[1] / "tests" / "models" / "emoji.safetensors"
RANK = 16
TRAINING_STEPS, TRAINING_BATCH = 40, 8
TEXTS = 32  # to measure MiniLM on, and as many others to train on
PROMPTS, TRAINING_PROMPTS = 16, 24
SAMPLER_STEPS = 8

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # layer -> down [RANK, K], up [N, RANK]


class Model:
    """A model in MXFP8 and dequantized, as state dicts that ComfyUI loads."""

    title: str
    prefix: str  # of layers' names in a LoRA file

    def __init__(self, original: Path, keep: str | None = None, added: str = ""):
        """
        Args:
            original: an unquantized file.
            keep: expression for layers that stay unquantized.
            added: in front of the file's names.
        """
        self.sha256 = hashlib.sha256(original.read_bytes()).hexdigest()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model-mxfp8.safetensors"
            convert_file(original, path, Selection(exclude=keep))
            layers = read_header(path).layers
            self.quantized = {added + key: value for key, value in load_file(path).items()}
        state = dict(self.quantized)
        self.weights = {}
        for name, layer in layers.items():
            codes, scale, _ = (state.pop(added + name + end) for end in (WEIGHT, SCALE, MARKER))
            self.weights[added + name] = dequantize(codes, scale, torch.float32, layer.shape)
        self.dequantized = state | {name + WEIGHT: w for name, w in self.weights.items()}

    def load(self, state: dict, dtype: torch.dtype):
        """What ComfyUI builds of a state dict, to compute in a dtype."""
        raise NotImplementedError

    def accelerate(self, loaded):
        """What our nodes make of it."""
        raise NotImplementedError

    def add_lora(self, loaded, lora: dict, load):
        """What a function of stock's LoRA nodes makes of it."""
        raise NotImplementedError

    def output(self, loaded) -> torch.Tensor:
        raise NotImplementedError

    def network(self, loaded) -> torch.nn.Module:
        """The module that the layers' names start from."""
        raise NotImplementedError

    def losses(self, loaded) -> Iterator[torch.Tensor]:
        """What a LoRA is trained to lower, anew for every step."""
        raise NotImplementedError


class TextEncoder(Model):
    """all-MiniLM-L6-v2 in ComfyUI's BERT, text encoder and CLIP classes.

    ComfyUI runs text encoders in float32. To see BF16, its BERT is called with that dtype.
    """

    title = "MiniLM"
    prefix = "text_encoders.clip_minilm.transformer."

    def __init__(self, texts: int = TEXTS, keep: str = "^pooler"):
        import minilm  # and transformers, which takes seconds

        super().__init__(Path(minilm.WEIGHTS), keep, added="bert.")
        self._config = minilm.untrained().config.to_dict()
        paragraphs = minilm.paragraphs()
        (self._measured,) = minilm.batches(paragraphs[:texts], size=texts)
        self._training = minilm.batches(paragraphs[texts : 2 * texts], size=TRAINING_BATCH)

    def load(self, state, dtype):
        import comfy.sd
        import comfy.utils
        from comfy.sd1_clip import SD1ClipModel, SDClipModel
        from comfy.text_encoders.bert import BertModel

        build = partial(SDClipModel, model_class=BertModel, textmodel_json_config=self._config)
        options = {"dtype": dtype}
        if markers := comfy.utils.detect_layer_quantization(state, ""):
            options["quantization_metadata"] = markers
        target = SimpleNamespace(
            params={},
            clip=partial(SD1ClipModel, clip_name="minilm", clip_model=build),
            tokenizer=lambda **_: None,
        )
        return comfy.sd.CLIP(target, model_options=options, state_dict=[dict(state)])

    def accelerate(self, loaded):
        from mxfp8.nodes.runtime.patch import accelerate_clip

        return accelerate_clip(loaded)

    def add_lora(self, loaded, lora, load):
        return load(None, loaded, lora, 0.0, 1.0)[1]

    def network(self, loaded):
        return loaded.cond_stage_model.clip_minilm.transformer

    def output(self, loaded):
        loaded.load_model()
        (dtype,) = loaded.cond_stage_model.dtypes
        return self._embed(self.network(loaded), self._measured, dtype)

    def _embed(self, network, batch, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        mask = batch["attention_mask"]
        hidden = network(batch["input_ids"], mask, dtype=dtype)[0].float()
        return torch.nn.functional.normalize((hidden * mask[..., None]).sum(1))

    def losses(self, loaded):
        """Each text is to have the embedding of the next one."""
        network = self.network(loaded)
        with torch.no_grad():
            wanted = [self._embed(network, batch).roll(1, 0) for batch in self._training]
        for batch, vectors in itertools.cycle(zip(self._training, wanted, strict=True)):
            yield (1 - (self._embed(network, batch) * vectors).sum(-1)).mean()


class ImageModel(Model):
    """The small text-to-image model of bench/emoji."""

    title = "image model"
    prefix = "diffusion_model."

    def __init__(self):
        super().__init__(IMAGE_MODEL)
        context, pooled = encode(NAMES)
        order = torch.randperm(len(NAMES), generator=torch.Generator().manual_seed(0))
        measured, training = order[:PROMPTS], order[PROMPTS:][:TRAINING_PROMPTS]
        self._measured, self._training = (
            (context[chosen], pooled[chosen]) for chosen in (measured, training)
        )

    def load(self, state, dtype):
        import comfy.sd

        options = {"dtype": dtype}
        patcher = comfy.sd.load_diffusion_model_state_dict(dict(state), model_options=options)
        if dtype != torch.float32:  # ComfyUI's choice on a CPU
            patcher.set_model_compute_dtype(dtype)
        return patcher

    def accelerate(self, loaded):
        from mxfp8.nodes.runtime.patch import accelerate

        return accelerate(loaded, "exact")

    def add_lora(self, loaded, lora, load):
        return load(loaded, None, lora, 1.0, 0.0)[0]

    def network(self, loaded):
        return loaded.model.diffusion_model

    def output(self, loaded):
        return self._sample(loaded, *self._measured)

    def _sample(self, loaded, context: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """Latents."""
        shape = len(context), 16, 16, 16
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return sample(loaded, context, pooled, noise, SAMPLER_STEPS)

    def losses(self, loaded):
        """Each prompt is to give the image of the next one."""
        with torch.inference_mode():
            original = self.load(self.dequantized, torch.float32)
            images = self._sample(original, *self._training)
        network, wanted = self.network(loaded), images.roll(1, 0).clone()
        context, pooled = self._training
        generator = torch.Generator().manual_seed(0)
        while True:
            chosen = torch.randint(len(wanted), (TRAINING_BATCH,), generator=generator)
            time = torch.randn(TRAINING_BATCH, generator=generator).sigmoid()
            image, noise = wanted[chosen], torch.randn(wanted[chosen].shape, generator=generator)
            mixed = image.lerp(noise, time[:, None, None, None])
            found = network(mixed, time, context[chosen], pooled[chosen])
            yield (found - (noise - image)).square().mean()


def random_factors(model: Model) -> Factors:
    generator = torch.Generator().manual_seed(0)
    return {
        name: tuple(torch.randn(shape, generator=generator) for shape in ((RANK, k), (n, RANK)))
        for name, (n, k) in ((name, weight.shape) for name, weight in model.weights.items())
    }


def trained_factors(model: Model) -> Factors:
    import comfy.model_management
    import comfy.utils

    loaded = model.load(model.dequantized, torch.float32)
    network = model.network(loaded).requires_grad_(False)
    factors = random_factors(model)
    for name, (down, up) in factors.items():
        down.mul_(down.shape[1] ** -0.5).requires_grad_()
        up.zero_().requires_grad_()
        comfy.utils.get_attr(network, name).register_forward_hook(
            lambda _, x, y, down=down, up=up: y + x[0] @ down.t() @ up.t()
        )
    for layer in network.modules():
        if isinstance(layer, torch.nn.LayerNorm):  # Flux adds to what it has normalized, in place
            layer.register_forward_pre_hook(lambda _, x: (x[0].clone(),))
    optimizer = torch.optim.AdamW([f for pair in factors.values() for f in pair], lr=2e-3)
    comfy.model_management.in_training = True  # else Flux's rotary embedding has no gradient
    try:
        for loss in itertools.islice(model.losses(loaded), TRAINING_STEPS):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        comfy.model_management.in_training = False
    return {name: tuple(f.detach() for f in pair) for name, pair in factors.items()}


def lora_file(model: Model, factors: Factors, norm: float) -> dict[str, torch.Tensor]:
    """A LoRA file that adds to every weight a matrix of `norm` times its norm."""
    file = {}
    for name, (down, up) in factors.items():
        scale = norm * model.weights[name].norm() / (up @ down).norm()
        file[f"{model.prefix}{name}.lora_down.weight"] = down.clone()
        file[f"{model.prefix}{name}.lora_up.weight"] = up * scale
    return file
