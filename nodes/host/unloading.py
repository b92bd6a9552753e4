"""Unloading models while some of them are garbage.

A node that fails leaves its models in a reference cycle: ComfyUI keeps the traceback in a variable
of a frame that the traceback holds. Python's garbage collector takes them at some later moment, and
ComfyUI then drops them from its list of loaded models. If that is while it unloads the models of
that list by their indices, it fails with "list index out of range". So they are collected first,
which also frees their memory.
"""

from __future__ import annotations

import gc

import comfy.model_management
import torch


def unload_all_models() -> None:
    """Unload every model from every device, and give back the memory that torch holds unused."""
    gc.collect()
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def free_memory(nbytes: int, device: torch.device) -> None:
    """Unload models from a device until it has so many bytes free, or none is left."""
    gc.collect()
    comfy.model_management.free_memory(nbytes, device)
