"""What ComfyUI does with the layers of every model class: quant/conversion/architectures.json.

    python bench/architectures.py [--check] [--json FILE]

Every class of comfy.supported_models is built on torch's meta device, from the configurations in
tests/support/model_configs.py, with operations of our own in place of the quantizing ones. For each
matrix in a file of that class, this shows whether loading brings the weight, its scales and its
marker to one layer made by those operations; if not, the layer is `plain`, as are matrices of the
file beside the model. Detection and loading run on tensors that note whose shapes they read: those
layers are `identifying`.

Writes the table; with --check, exits with 1 if it differs. --json writes, per class, the tensors of
its file and the layers that run quantized. Takes 13 s on one core.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "quant" / "conversion" / "architectures.json"
sys.path.insert(0, str(ROOT / "tests" / "support"))

import torch  # noqa: E402
from comfyui import import_modules  # noqa: E402
from model_configs import BESIDE, IN_MEMORY, METADATA, as_stored, configs  # noqa: E402

from mxfp8.quant.conversion import architectures  # noqa: E402

WEIGHT, SCALE, MARKER = ".weight", ".weight_scale", ".comfy_quant"
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Asked:
    """What became known of one class; names are those in its files."""

    kind: str
    tensors: dict[str, tuple[int, ...]]
    linear: list[str]
    plain: list[str]
    identifying: list[str]

    def without(self, prefix: str) -> Asked:
        """The same with layers' names as in the table."""
        plain, identifying = (
            [name.removeprefix(prefix) for name in names]
            for names in (self.plain, self.identifying)
        )
        return replace(self, plain=plain, identifying=identifying)


class _Shape:
    """A tensor's shape that notes when it is read."""

    def __init__(self, key: str, shape: tuple[int, ...], readers: set[str]):
        self._key, self._shape, self._readers = key, shape, readers

    @property
    def shape(self) -> tuple[int, ...]:
        self._readers.add(self._key)
        return self._shape

    @property
    def ndim(self) -> int:
        return len(self._shape)

    def size(self, dim: int) -> int:
        return self.shape[dim]


class _Noting(torch.Tensor):
    """A tensor that notes when its shape is read from Python."""

    @property
    def shape(self) -> torch.Size:
        if hasattr(self, "note"):  # not on what is made of it
            self.note()
        return super().shape


def _noting(tensor: torch.Tensor, key: str, readers: set[str]) -> _Noting:
    result = tensor.as_subclass(_Noting)
    result.note = lambda: readers.add(key)
    return result


def models() -> list[type]:
    """ComfyUI's model classes, in the order of its detection."""
    import_modules()
    import comfy.supported_models

    logging.disable(logging.ERROR)
    warnings.filterwarnings("ignore")
    return comfy.supported_models.models


def ask(kind: type, config: Mapping) -> Asked:
    """Build a class, detect a file of it, and follow the file's matrices into the model."""
    import comfy.model_detection
    import comfy.ops

    class Operations(comfy.ops.disable_weight_init):
        class Linear(comfy.ops.disable_weight_init.Linear):
            pass

    name = kind.__name__
    config = kind({**config, **kind.unet_config})
    config.custom_operations = Operations
    beside = {k: torch.empty(shape) for k, shape in BESIDE.get(name, {}).items()}
    device = "cpu" if name in IN_MEMORY else "meta"
    model = config.get_model(dict(beside), "", device=device).diffusion_model
    quantizing = {n for n, m in model.named_modules() if type(m) is Operations.Linear}
    stored = as_stored(name, {k: v.to("meta") for k, v in model.state_dict().items()})

    readers: set[str] = set()
    shapes = {k: _Shape(k, tuple(v.shape), readers) for k, v in {**stored, **beside}.items()}
    found = comfy.model_detection.model_config_from_unet(shapes, "", metadata=METADATA.get(name))
    if type(found) is not kind:
        raise AssertionError(f"{name} is detected as {type(found).__name__}")
    config.process_unet_state_dict({k: _noting(v, k, readers) for k, v in stored.items()})

    layers, others = (
        [k.removesuffix(WEIGHT) for k, v in state.items() if k.endswith(WEIGHT) and v.ndim == 2]
        for state in (stored, beside)
    )
    linear = sorted(_arriving(config, stored, layers, quantizing))
    return Asked(
        name,
        {k: tuple(v.shape) for k, v in stored.items()},
        linear,
        sorted({*layers, *others} - set(linear)),
        sorted(k.removesuffix(WEIGHT) for k in readers if k.removesuffix(WEIGHT) in linear),
    )


def _arriving(config, stored: Mapping, layers: list[str], quantizing: set[str]) -> Iterable[str]:
    """The layers that loading brings, with scales and marker, to one quantizing layer."""
    try:
        return _follow(config, stored, layers, quantizing)
    except Exception:  # a change of some layer's tensors that markers do not survive: find it
        result = []
        for layer in layers:
            try:
                result += _follow(config, stored, [layer], quantizing)
            except Exception:
                continue
        return result


def _follow(config, stored: Mapping, layers: list[str], quantizing: set[str]) -> list[str]:
    given = dict(stored)
    for layer in layers:
        rows, cols = stored[layer + WEIGHT].shape
        given[layer + SCALE] = torch.empty(rows, cols // 32 + 1, device="meta")
        given[layer + MARKER] = torch.empty(99, device="meta")
    before = dict(given)
    places = {id(v): k for k, v in config.process_unet_state_dict(given).items()}
    result = []
    for layer in layers:
        ends = {
            places.get(id(before[layer + part]), part).removesuffix(part)
            for part in (WEIGHT, SCALE, MARKER)
        }
        if len(ends) == 1 and ends <= quantizing:
            result.append(layer)
    return result


def patterns(layers: Iterable[str]) -> list[str]:
    """Names, those that differ in numbers alone as one with "#" for the numbers that differ."""
    groups: dict[str, list[list[str]]] = {}
    for layer in layers:
        groups.setdefault(NUMBER.sub("#", layer), []).append(layer.split("."))
    return sorted(
        ".".join(part[0] if len(set(part)) == 1 else "#" for part in zip(*names, strict=True))
        for names in groups.values()
    )


def table(asked: Iterable[Asked]) -> dict:
    """The table as it stands, with what the classes showed."""
    known: dict[str, list[Asked]] = {}
    for found in asked:
        detected = architectures.detect(found.tensors)
        if detected is None:
            raise AssertionError(f"{found.kind} fits no row of {TABLE.name}; write one")
        known.setdefault(detected[0].name, []).append(found.without(detected[1]))
    content = json.loads(TABLE.read_text(encoding="utf-8"))
    for row in content["architectures"]:
        if row.get("blocks"):  # else a text encoder
            parts = known.get(row["name"], [])
            row["classes"] = list(dict.fromkeys(part.kind for part in parts))
            row["plain"] = patterns({x for part in parts for x in part.plain})
            row["identifying"] = patterns({x for part in parts for x in part.identifying})
    return content


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if the table differs")
    parser.add_argument("--json", type=Path, help="what each class showed")
    arguments = parser.parse_args()

    asked = [ask(kind, config) for kind in models() for config in configs(kind.__name__)]
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(x) for x in asked]), encoding="utf-8")
    text = json.dumps(table(asked), indent=1) + "\n"
    if arguments.check:
        same = text == TABLE.read_text(encoding="utf-8")
        print(f"{TABLE.name} {'is' if same else 'is not'} what ComfyUI shows")
        return 0 if same else 1
    TABLE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
