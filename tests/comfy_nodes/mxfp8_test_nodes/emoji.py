"""A text encoder and a VAE for the trained model of bench/emoji, so that stock nodes use it."""

import sys
from pathlib import Path

import comfy.latent_formats

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench" / "emoji"))

import pictures


class _TextEncoder:
    """What CLIPTextEncode calls. Each line of a text is a prompt: a batch."""

    def tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def encode_from_tokens_scheduled(self, prompts: list[str]) -> list:
        context, pooled = pictures.encode(prompts)
        return [[context, {"pooled_output": pooled}]]


class _Pixels:
    """What VAEDecode calls."""

    def decode(self, samples):
        return pictures.pixels(comfy.latent_formats.Flux().process_in(samples))


class TestEmojiTextEncoder:
    """MiniLM as the model of bench/emoji was trained with it."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "load", ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def load(self):
        return (_TextEncoder(),)


class TestEmojiVAE(TestEmojiTextEncoder):
    """Latents of that model to pixels, exactly."""

    RETURN_TYPES = ("VAE",)

    def load(self):
        return (_Pixels(),)


NODES = {node.__name__: node for node in (TestEmojiTextEncoder, TestEmojiVAE)}
