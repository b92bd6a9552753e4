"""What stands beside the weights of a model, and what ComfyUI accounts for it."""

import gc
import json
from pathlib import Path

import comfy.model_management
import torch
from comfy.quant_ops import QuantizedTensor


class TestBranches:
    """Of a model once `samples` are there: its layers with branches and how many those are, the
    branches that live in this process, a checksum of its codes, the models that ComfyUI has loaded
    with their bytes, and resident memory."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "run", ("LATENT",), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "samples": ("LATENT",)}}

    def run(self, model, samples):
        gc.collect()
        modules = list(model.model.modules())
        counts = [len(m.mxfp8_branches) for m in modules if hasattr(m, "mxfp8_branches")]
        weights = [
            m.weight for m in modules if isinstance(getattr(m, "weight", 0), QuantizedTensor)
        ]
        loaded = comfy.model_management.current_loaded_models
        result = {
            "layers": len(counts),
            "branches": sum(counts),
            "alive": sum(type(o).__name__ == "SideBranch" for o in gc.get_objects()),
            "codes": hash(tuple(w._qdata.view(torch.uint8).numpy().tobytes() for w in weights)),
            "loaded": [
                [type(m.model.model).__name__, m.model_memory(), m.model_loaded_memory()]
                for m in loaded if m.model is not None
            ],
            "resident": int(Path("/proc/self/statm").read_text().split()[1]) * 4096,
        }  # fmt: skip
        return {"ui": {"result": [json.dumps(result)]}, "result": (samples,)}


class TestPartlyUnloaded:
    """`samples`, after ComfyUI took back half of the memory of the LoRAs beside weights."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "run", ("LATENT",), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",)}}

    def run(self, samples):
        (side,) = (
            m for m in comfy.model_management.current_loaded_models
            if type(m.model.model).__name__ == "MXFP8Adapters"
        )  # fmt: skip
        before = side.model_loaded_memory()
        assert not side.model_unload(before // 2), "all of it"
        freed = before - side.model_loaded_memory()
        return {"ui": {"result": [freed / before]}, "result": (samples,)}


NODES = {node.__name__: node for node in (TestBranches, TestPartlyUnloaded)}
