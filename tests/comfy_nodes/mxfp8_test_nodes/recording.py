"""A node that notes which implementation each linear of a model really ran, and with how many rows.

Linears are told apart by hooks, implementations by the ops that torch sees and by the functions of
the backends, wrapped. What a backend report says is held against this.
"""

import dataclasses
import json
import math
import sys

from torch.utils._python_dispatch import TorchDispatchMode


def _pack(module: str):
    return next(m for name, m in sys.modules.items() if name.endswith(f"ComfyUI-MXFP8.{module}"))


class _Recorder(TorchDispatchMode):
    """What ran below each linear: {name: {"rows", "ops", "backends"}}."""

    def __init__(self):
        super().__init__()
        self.found = {}
        self.stack = []

    def note(self, kind, what):
        if self.stack:
            self.found[self.stack[-1]][kind].add(what)

    def enter_linear(self, name, x):
        entry = self.found.setdefault(name, {"rows": set(), "ops": set(), "backends": set()})
        entry["rows"].add(math.prod(x.shape[:-1]))
        self.stack.append(name)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.note("ops", str(function).removesuffix(".default"))
        return function(*args, **(kwargs or {}))


class TestRecord:
    """Samples are not made here: the model that comes out records while something samples it."""

    CATEGORY = "test"
    FUNCTION = "run"
    RETURN_TYPES = ("MODEL",)
    recorders = {}  # by name

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "name": ("STRING",)}}

    def run(self, model, name):
        recorder = self.recorders[name] = _Recorder()
        clone = model.clone()
        linears = {n: m for n, m in clone.model.named_modules() if hasattr(m, "in_features")}

        def wrapper(apply_model, arguments):
            dispatch = _pack("kernels.dispatch")
            before = dispatch.BACKENDS
            dispatch.BACKENDS = tuple(_recording(backend, recorder) for backend in before)
            hooks = []
            for key, module in linears.items():
                short = key.removeprefix("diffusion_model.")
                hooks += [
                    module.register_forward_pre_hook(
                        lambda m, x, short=short: recorder.enter_linear(short, x[0])
                    ),
                    module.register_forward_hook(lambda m, x, y: recorder.stack.pop() and None),
                ]
            try:
                with recorder:
                    return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
            finally:
                dispatch.BACKENDS = before
                for hook in hooks:
                    hook.remove()

        clone.set_model_unet_function_wrapper(wrapper)
        return (clone,)


def _recording(backend, recorder):
    """A backend whose matmul notes that it ran."""

    def matmul(*args):
        recorder.note("backends", f"{backend.name}, {backend.precision}")
        return backend.matmul(*args)

    return dataclasses.replace(backend, matmul=matmul)


class TestRecorded:
    """What was recorded under a name, once `samples` are there."""

    CATEGORY = "test"
    FUNCTION = "run"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",), "name": ("STRING",)}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def run(self, samples, name):
        found = TestRecord.recorders[name].found
        result = {n: {k: sorted(v) for k, v in entry.items()} for n, entry in found.items()}
        return {"ui": {"result": [json.dumps(result)]}}


class TestPatchLinear:
    """A clone with an object patch on the forward of one linear, as another pack might put it."""

    CATEGORY = "test"
    FUNCTION = "run"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "layer": ("STRING",)}}

    def run(self, model, layer):
        clone, name = model.clone(), f"diffusion_model.{layer}"
        module = dict(clone.model.named_modules())[name]
        clone.add_object_patch(f"{name}.forward", lambda x: type(module).forward(module, x))
        return (clone,)


NODES = {node.__name__: node for node in (TestRecord, TestRecorded, TestPatchLinear)}
