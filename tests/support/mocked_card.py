"""A graphics card that is not there, as torch and comfy-kitchen describe it.

    python tests/support/mocked_card.py FOLDER...

tells, as JSON, why `kernels/backends/kitchen.py` does not run, for every version of comfy-kitchen
in FOLDERs, card and problem. The registry and its constraints are real.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch


@dataclass(frozen=True)
class Card:
    """Attributes:
    version: compute capability of an NVIDIA card, or architecture of an AMD card.
    torch_for: the version of CUDA or ROCm that torch is for.
    shared: bytes of shared memory that a block may ask for.
    memory: bytes, all of them free.
    """

    name: str
    version: tuple[int, int] | str
    torch_for: str = "13.0"
    shared: int = 101376
    memory: int = 24 << 30
    device: torch.device = field(default=torch.device("cuda", 0), repr=False)

    @property
    def amd(self) -> bool:
        return isinstance(self.version, str)


def install(card: Card, patch: pytest.MonkeyPatch, kitchen: bool = True) -> None:
    """Make torch, and comfy-kitchen's registry, describe a card.

    Args:
        kitchen: whether comfy-kitchen's kernels load.
    """
    major, minor = (11, 0) if card.amd else card.version
    properties = SimpleNamespace(
        name=card.name,
        major=major,
        minor=minor,
        shared_memory_per_block=65536 if card.amd else 49152,
        shared_memory_per_block_optin=card.shared,
        gcnArchName=f"{card.version}:sramecc+",
        multi_processor_count=68,
    )
    patch.setattr(torch.version, "cuda", None if card.amd else card.torch_for)
    patch.setattr(torch.version, "hip", card.torch_for if card.amd else None)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    patch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
    patch.setattr(torch.cuda, "get_device_name", lambda device=None: card.name)
    patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (card.memory, card.memory))
    forget()
    _register(card, patch, kitchen)


def describe(
    version: tuple[int, int] | str | None,
    patch: pytest.MonkeyPatch,
    triton: str | None = None,
    fails: Collection[str] = (),
    platform: str = "linux",
    name: str = "NVIDIA GeForce RTX",
) -> None:
    """Tell whoever chooses a path of a GPU and of Triton, with nothing chosen yet.

    Args:
        version: as of `Card`; None for no GPU, or none of NVIDIA's or AMD's.
        triton: why Triton does not run, or None.
        fails: backends and steps whose self-test fails; others pass theirs.
        platform: as of sys.platform.
    """
    from mxfp8.kernels import device_facts, dispatch, self_test
    from mxfp8.kernels.backends import fp8_rowwise

    def fact(value):
        return lambda device: value if device.type == "cuda" else None

    nvidia, amd = (None, version) if isinstance(version, str) else (version, None)
    patch.setattr(device_facts, "capability", fact(nvidia))
    patch.setattr(device_facts, "amd_architecture", fact(amd))
    patch.setattr(device_facts, "card_name", fact(name))
    patch.setattr(device_facts, "triton_unsupported_reason", lambda: triton)
    patch.setattr(fp8_rowwise, "sys", SimpleNamespace(platform=platform))

    def verdict(name, *_):
        return "its self-test failed" if name in fails else None, True

    patch.setattr(self_test, "verdict", verdict)
    dispatch.forget()


def forget() -> None:
    """Clear the facts of devices that are kept, for after the patches are undone too."""
    from mxfp8.kernels import device_facts
    from mxfp8.kernels.backends import kitchen

    facts = device_facts.capability, device_facts.amd_architecture, device_facts.card_name
    for fact in (*facts, kitchen._shared_memory):
        getattr(fact, "cache_clear", lambda: None)()  # a test may have replaced it


def _register(card: Card, patch: pytest.MonkeyPatch, kitchen: bool) -> None:
    """Have comfy-kitchen look for its backends again, in a registry without any but eager."""
    registry = importlib.import_module("comfy_kitchen.registry").registry
    for name in ("_backends", "_capabilities", "_constraints", "_unavailable", "_disabled"):
        value = getattr(registry, name)
        patch.setattr(registry, name, value.copy())
    for name in ("cuda", "hip", "triton"):
        registry._backends.pop(name, None)
        registry._capabilities.pop(name, None)
    registry._disabled.clear()
    version = (11, 0) if card.amd else card.version
    patch.setitem(registry.__dict__, "_compute_capability", version)
    platform = "hip" if card.amd else "cuda"
    try:
        backend = importlib.import_module(f"comfy_kitchen.backends.{platform}")
    except ModuleNotFoundError:  # an old version has none for AMD
        return
    if card.amd:
        patch.setattr(registry, "_priority", ["hip", "cuda", "triton", "eager"])
        backend._visible_gfx_arches.cache_clear()
        # Its extension needs ROCm to load.
        patch.setattr(backend, "_C", backend._C or SimpleNamespace())
    patch.setattr(backend, "_EXT_AVAILABLE", kitchen)
    patch.setattr(backend, "_CUBLASLT_AVAILABLE", kitchen, raising=False)
    patch.setattr(backend, "_EXT_ERROR", None if kitchen else "cannot open shared object file")
    backend._register()
    if not card.amd and int(card.torch_for.partition(".")[0]) < 13:
        registry.disable("cuda")  # as ComfyUI does


CARDS = (
    Card("NVIDIA GeForce RTX 2060", (7, 5), shared=65536),
    Card("NVIDIA GeForce GTX 1660 Ti", (7, 5), shared=65536),
    Card("Tesla V100", (7, 0), shared=98304),
    Card("NVIDIA GeForce RTX 3090", (8, 6)),
    Card("NVIDIA A100, cu128", (8, 0), torch_for="12.8", shared=166912),
    Card("AMD Radeon RX 7900 XTX", "gfx1100", "7.0"),
    Card("AMD Radeon RX 6800", "gfx1030", "7.0"),
    Card("AMD Instinct MI300X", "gfx942", "7.0"),
)
WIDTHS = (3840, 4096, 10240, 16640, 384)


def _reasons(card: Card) -> dict:
    from mxfp8.kernels.backends import kitchen
    from mxfp8.kernels.records import Problem

    def reason(dtype=torch.bfloat16, **problem):
        return kitchen.unsupported_reason(Problem(card.device, dtype, **problem))

    with pytest.MonkeyPatch.context() as patch:
        install(card, patch)
        found = {f"K = {K}": reason(shape=(64, K)) for K in WIDTHS}
        found["float16"] = reason(torch.float16)
        problem = Problem(card.device, torch.bfloat16)
        found["mxfp8"] = kitchen.quantize_mxfp8_unsupported_reason(problem)
    return found


def main(folders: list[str]) -> None:
    from mxfp8.kernels.backends import kitchen
    from mxfp8.kernels.records import Problem

    kitchen.unsupported_reason(Problem(torch.device("cpu"), torch.bfloat16))
    assert "comfy_kitchen" not in sys.modules  # which takes a second
    result = {}
    for folder in folders:
        read, write = os.pipe()
        if os.fork() == 0:
            sys.path.insert(0, folder)
            with os.fdopen(write, "w") as pipe:
                json.dump({card.name: _reasons(card) for card in CARDS}, pipe)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            result[folder] = json.loads(pipe.read())
        os.wait()
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
