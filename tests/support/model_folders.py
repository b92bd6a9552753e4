"""Models in several files for tests, and what a conversion made of a path."""

from __future__ import annotations

import json

from checkpoints import load, raw, same
from safetensors.torch import save_file

from mxfp8.quant.conversion.convert import convert_file

INDEX = "model.safetensors.index.json"


def write_shards(folder, tensors, count=3, metadata=None, index=INDEX):
    """A model in several files with its index, as model hubs have them; returns the index."""
    folder.mkdir(parents=True, exist_ok=True)
    keys, weight_map = list(tensors), {}
    for number in range(count):
        name = f"{index.split('.')[0]}-{number + 1:05}-of-{count:05}.safetensors"
        part = {key: tensors[key] for key in keys[number::count]}
        save_file(part, folder / name, metadata or {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    total = sum(len(raw(tensor)) for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / index).write_text(json.dumps(content))
    return folder / index


def converted(source, **options):
    """Tensors and metadata of the conversion of a path."""
    target = source.parent / f"{source.name}-out"
    convert_file(source, target, **options)
    return load(target)


def parsed(metadata):
    """Metadata with its markers as an object: layers may come in any order."""
    return {**metadata, "_quantization_metadata": json.loads(metadata["_quantization_metadata"])}


def equal(found, wanted) -> bool:
    return found.keys() == wanted.keys() and all(same(found[k], wanted[k]) for k in wanted)
