"""Nodes that only tests use: they put a model into the states that users' workflows bring about."""

import ctypes
import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import logging
import sys
import types
from pathlib import Path

import comfy.model_management
import comfy.utils
import comfy.weight_adapter
import folder_paths
import torch
from comfy.quant_ops import QuantizedTensor
from comfy_extras.nodes_torch_compile import TorchCompileModel

from . import branches, controls, emoji, recording


class _Node:
    CATEGORY = "test"
    FUNCTION = "run"
    INPUTS: dict
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {k: v if isinstance(v, tuple) else (v,) for k, v in cls.INPUTS.items()}}


class TestWideConditioning(_Node):
    """A conditioning four times as wide."""

    INPUTS = {"conditioning": "CONDITIONING"}
    RETURN_TYPES = ("CONDITIONING",)

    def run(self, conditioning):
        return ([[text.repeat(1, 1, 4), extra] for text, extra in conditioning],)


class TestClone(_Node):
    """A clone with a model of its own."""

    INPUTS = {"model": "MODEL", "how": (["force_deepcopy", "deepclone_multigpu"],)}
    RETURN_TYPES = ("MODEL",)

    def run(self, model, how):
        if how == "force_deepcopy":
            return (model.clone(force_deepcopy=True),)
        return (model.deepclone_multigpu(),)


class _LowVRAM:
    """In front of a ModelPatcher: what its layers are given is one byte."""

    def load(self, device_to=None, lowvram_model_memory=0, full_load=False, **options):
        super().load(device_to, lowvram_model_memory=1, full_load=False, **options)
        functions = [getattr(m, "weight_function", ()) for m in self.model.modules()]
        beside = any(hasattr(module, "mxfp8_branches") for module in self.model.modules())
        assert not self.patches or any(functions) or beside, "no patch waits for its weight"


class TestLowVRAM(_Node):
    """A clone that loads as on a card with no memory to spare: patches are applied on the fly."""

    INPUTS = {"model": "MODEL"}
    RETURN_TYPES = ("MODEL",)

    def run(self, model):
        clone = model.clone()
        clone.__class__ = type("LowVRAM", (_LowVRAM, type(clone)), {})
        return (clone,)


class TestOffloadedLoras(_Node):
    """A clone whose LoRAs beside the weights are loaded as on a card with no memory to spare."""

    INPUTS = {"model": "MODEL"}
    RETURN_TYPES = ("MODEL",)

    def run(self, model):
        clone = model.clone()
        (side,) = clone.model_patches_models()
        side.__class__ = type("LowVRAM", (_LowVRAM, type(side)), {})
        return (clone,)


class TestPatch(_Node):
    """An object patch as other packs make them: a module, or a method bound to the model."""

    INPUTS = {"model": "MODEL", "kind": (["module", "method"],)}
    RETURN_TYPES = ("MODEL",)

    def run(self, model, kind):
        clone = model.clone()
        if kind == "module":
            compiled = torch.compile(clone.model.diffusion_model, backend="eager")
            clone.add_object_patch("diffusion_model", compiled)
        else:
            method = types.MethodType(type(clone.model).extra_conds, clone.model)
            clone.add_object_patch("extra_conds", method)
        return (clone,)


class TestUnload(_Node):
    """Unloads every model, then passes the samples on."""

    INPUTS = {"samples": "LATENT"}
    RETURN_TYPES = ("LATENT",)

    def run(self, samples):
        unload_all_models()
        return (samples,)


class TestEmptyAfter(_Node):
    """`like`, but not before `samples` are there."""

    INPUTS = {"samples": "LATENT", "like": "LATENT"}
    RETURN_TYPES = ("LATENT",)

    def run(self, samples, like):
        return (like,)


class TestAfter(_Node):
    """`model`, but not before `samples` are there."""

    INPUTS = {"model": "MODEL", "samples": "LATENT"}
    RETURN_TYPES = ("MODEL",)

    def run(self, model, samples):
        return (model,)


class TestMoved(_Node):
    """What loading did to a model since this node ran last: the number of its modules that ComfyUI
    loaded anew, and of weights whose codes are other objects or have other values."""

    INPUTS = {"model": "MODEL", "samples": "LATENT"}
    RETURN_TYPES = ("LATENT",)
    OUTPUT_NODE = True
    seen: list[dict] = []

    def run(self, model, samples):
        modules = [m for m in model.model.modules() if hasattr(m, "comfy_patched_weights")]
        # ComfyUI sets the mark to True when it loads a module; 1 is equal to it.
        seen = {"moved": sum(m.comfy_patched_weights is True for m in modules)}
        for module in modules:
            module.comfy_patched_weights = 1
        weights = [
            m.weight for m in modules if isinstance(getattr(m, "weight", 0), QuantizedTensor)
        ]
        seen["codes"] = [
            (id(w), hash(w._qdata.view(torch.uint8).numpy().tobytes())) for w in weights
        ]
        last = self.seen[-1] if self.seen else seen
        seen["changed"] = sum(a != b for a, b in zip(seen["codes"], last["codes"], strict=True))
        self.seen.append(seen)
        later = self.seen[1:]
        result = {
            "moved": [s["moved"] for s in later],
            "codes changed": [s["changed"] for s in later],
            "modules": len(modules),
        }
        return {"ui": {"result": [json.dumps(result)]}, "result": (samples,)}


class TestSaveTensor(_Node):
    """Writes an image, or the text of a conditioning, to output/<name>.pt."""

    INPUTS = {"tensor": "*", "name": "STRING"}
    OUTPUT_NODE = True

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def run(self, tensor, name):
        if not isinstance(tensor, torch.Tensor):
            tensor = tensor[0][0]
        folder = Path(folder_paths.get_output_directory())
        folder.mkdir(exist_ok=True)
        torch.save(tensor.clone(), folder / f"{name}.pt")
        return {}


class TestCompile(_Node):
    """The stock TorchCompileModel with any backend."""

    INPUTS = {"model": "MODEL", "backend": "STRING"}
    RETURN_TYPES = ("MODEL",)

    def run(self, model, backend):
        torch._dynamo.reset()
        return TorchCompileModel.execute(model, backend).result


class TestGraphBreaks(_Node):
    """How many graph breaks torch.compile has counted since the last call."""

    INPUTS = {"samples": "LATENT"}
    OUTPUT_NODE = True

    def run(self, samples):
        counters = torch._dynamo.utils.counters
        result = {
            "breaks": sum(counters["graph_break"].values()),
            "reasons": [str(reason)[:200] for reason in counters["graph_break"]],
            "frames": counters["frames"]["ok"],
        }
        counters.clear()
        return {"ui": {"result": [json.dumps(result)]}}


class TestLayers(_Node):
    """Every MXFP8 linear's own forward against stock's on one input, in two dtypes."""

    INPUTS = {"model": "MODEL"}
    OUTPUT_NODE = True

    def run(self, model):
        comfy.model_management.load_models_gpu([model], force_full_load=True)
        generator = torch.Generator().manual_seed(0)
        result = []
        for name, module in model.model.named_modules():
            if not isinstance(getattr(module, "weight", None), QuantizedTensor):
                continue
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(3, 5, module.in_features, generator=generator).to(dtype)
                ours, stock = module.forward(x), type(module).forward(module, x)
                reach = x.float().abs() @ module.weight.dequantize().float().abs().t()
                rounding = torch.finfo(dtype).eps * stock.float().abs() + reach * 2.0**-20
                worst = ((ours.float() - stock.float()).abs() / rounding).max().item()
                bound = module.forward.__self__ is module
                ours_by_name = module.forward.__func__.__name__
                result.append([name, str(dtype), ours_by_name, bound, worst])
        return {"ui": {"result": [json.dumps(result)]}}


class TestDigest(_Node):
    """A checksum of every tensor of a model as it was loaded."""

    INPUTS = {"model": "MODEL"}
    OUTPUT_NODE = True

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def run(self, model):
        unload_all_models()
        digest = hashlib.sha256()
        for key, value in sorted(model.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
        return {"ui": {"result": [digest.hexdigest()]}}


class TestConfig(_Node):
    """What ComfyUI took a model for, and whether each bound patch on it is bound to it."""

    INPUTS = {"model": "MODEL"}
    OUTPUT_NODE = True

    def run(self, model):
        config = model.model.model_config.unet_config
        modules = set(map(id, model.model.modules()))
        owners = [getattr(p, "__self__", None) for p in model.object_patches.values()]
        bound = all(id(owner) in modules for owner in owners if owner is not None)
        return {"ui": {"result": [json.dumps(config, default=str, sort_keys=True)],
                       "bound": [bound]}}  # fmt: skip


class TestMemory(_Node):
    """Resident memory now and its peak since the last call, in bytes; passes a model on."""

    INPUTS = {"model": "MODEL"}
    RETURN_TYPES = ("MODEL",)
    OUTPUT_NODE = True

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def run(self, model):
        gc.collect()
        lines = Path("/proc/self/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines)
        now, peak = (int(status[k].split()[0]) * 1024 for k in ("VmRSS", "VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        return {"ui": {"result": [json.dumps([now, peak])]}, "result": (model,)}


class TestFail(_Node):
    """A clone with a LoRA on every layer, of which one fails when it is merged or baked in."""

    INPUTS = {"model": "MODEL", "how": (["memory", "interrupt", "error", "nan"],)}
    RETURN_TYPES = ("MODEL",)

    def run(self, model, how):
        def fail(difference):
            if how == "memory":
                torch.empty(1 << 60, dtype=torch.uint8)
            if how == "error":
                raise RuntimeError("a patch failed")
            if how == "interrupt":
                comfy.model_management.interrupt_current_processing()
            return difference * float("nan" if how == "nan" else 1)

        clone = model.clone()
        keys = [k for k in model.model.state_dict() if "blocks" in k and k.endswith(".weight")]
        matrices = [k for k in keys if comfy.utils.get_attr(model.model, k).ndim == 2]
        for index, key in enumerate(matrices):
            shape = comfy.utils.get_attr(model.model, key).shape
            function = fail if index == len(matrices) // 2 else None
            patch = ("diff", (torch.full(shape, 0.05),))
            clone.add_patches({(key, None, function): patch})
        return (clone,)


class OtherAdapter(comfy.weight_adapter.WeightAdapterBase):
    """An adapter of another pack's, with no more than ComfyUI uses."""

    name = "other"
    weights = ()

    def calculate_weight(self, weight, *_, **__):
        return weight + 1


class TestLora(_Node):
    """A clone with one of stock's LoRA adapters on a weight, in which something goes wrong: memory
    runs out, or the result is too large for float16, in which the weight then is held. Or its
    function logs a warning and changes nothing. Or with another pack's adapter."""

    INPUTS = {"model": "MODEL", "key": "STRING", "how": (["memory", "large", "warning", "other"],)}
    RETURN_TYPES = ("MODEL",)

    def run(self, model, key, how):
        def function(difference):  # called where stock catches every exception
            if how == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            if how == "warning":
                logging.warning("a pack's own warning")
                return difference
            return difference * 1e6

        layer = comfy.utils.get_attr(model.model, key.removesuffix(".weight"))
        if how == "large":
            layer.half()
        rows, columns = layer.weight.shape
        up, down = torch.ones(rows, 4), torch.ones(4, columns)
        adapter = comfy.weight_adapter.LoRAAdapter(set(), (up, down, None, None, None, None))
        clone = model.clone()
        if how == "other":
            clone.add_patches({key: OtherAdapter()})
            return (clone,)
        clone.add_patches({(key, None, function): adapter})
        return (clone,)


class TestForward(_Node):
    """A clone whose linears misbehave: run out of memory on a call, give NaN from the first block
    on or from a call on, or huge values inside an MLP; say how many layers' moments have memory on
    a call; or whose single blocks are skipped."""

    INPUTS = {
        "model": "MODEL", "how": (["memory", "nan", "late", "huge", "moments", "skip"],),
        "call": ("INT", {"default": 0}),  # the one that fails, over all layers
    }  # fmt: skip
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def run(self, model, how, call):
        clone, calls = model.clone(), []
        if how == "skip":
            for name, _ in clone.model.diffusion_model.single_blocks.named_children():
                key = f"diffusion_model.single_blocks.{name}.forward"
                clone.add_object_patch(key, lambda x, *_, **__: x)
            return (clone,)

        def patched(name, forward):
            def run(x, *args, **options):
                calls.append(x.shape)
                if how == "memory" and len(calls) == call:
                    torch.empty(1 << 60, dtype=torch.uint8)
                if how == "moments" and len(calls) == call:
                    raise RuntimeError(f"{_reserved()} layers have memory")
                out = forward(x, *args, **options)
                if how == "nan" or (how == "late" and len(calls) >= call):
                    return out * float("nan")
                return out * 1e30 if how == "huge" and name.endswith("_mlp.0") else out

            return run

        for name, module in clone.model.named_modules():
            if isinstance(module, torch.nn.Linear) and "blocks" in name:
                method = types.MethodType(type(module).forward, module)
                clone.add_object_patch(f"{name}.forward", patched(name, method))
        return (clone,)


class TestForeignForwards(_Node):
    """A model on whose linears another forward was set, as another pack may do."""

    INPUTS = {"model": "MODEL"}
    RETURN_TYPES = ("MODEL",)

    def run(self, model):
        def forward(module, x, *_, **__):
            return type(module).forward(module, x)

        for module in model.model.modules():
            if hasattr(module, "in_features"):
                module.forward = types.MethodType(forward, module)
        return (model.clone(),)


class TestForeignForward(_Node):
    """Whose forward a layer of `model` has while another one is set on it and taken back, and the
    model, or `stock`, which shares its layers, is loaded and unloaded in between."""

    INPUTS = {"stock": "MODEL", "model": "MODEL"}
    OUTPUT_NODE = True

    def run(self, stock, model):
        name = next(n for n in model.object_patches if n.endswith(".forward"))
        layer, result = comfy.utils.get_attr(model.model, name.removesuffix(".forward")), {}

        def foreign(x):
            return original(x)

        def note(step):
            owners = {
                foreign: "foreign",
                type(layer).forward: "stock",
                model.object_patches[name].__func__: "ours",
            }
            result[step] = owners[getattr(layer.forward, "__func__", layer.forward)]

        load = comfy.model_management.load_models_gpu
        unload = unload_all_models
        unload()
        load([model])
        original, layer.forward = layer.forward, foreign
        load([model])
        note("set, loaded again")
        unload()
        note("unloaded")
        load([model])
        note("loaded again")
        layer.forward = original
        load([model])
        note("taken back, loaded again")
        unload()
        note("unloaded without it")
        load([model])
        original, layer.forward = layer.forward, foreign
        unload()
        layer.forward = original
        load([stock])
        note("set, unloaded, taken back, loaded in stock")
        load([model])
        note("loaded again in ours")
        for other in (stock.clone(), model.clone()):
            other.add_object_patch(name, foreign)
            load([other])
            note("an object patch")
            load([model])
            note(f"loaded after {len(other.object_patches)} object patches")
        return {"ui": {"result": [json.dumps(result)]}}


class TestMoments(_Node):
    """How many layers' moments are in memory once `samples` are there."""

    INPUTS = {"samples": "LATENT"}
    OUTPUT_NODE = True

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def run(self, samples):
        return {"ui": {"result": [_reserved()]}}


def _reserved() -> int:
    gc.collect()
    kind = _pack("quant.conversion.calibration").HessianAccumulator
    return sum(isinstance(o, kind) and o._hessian is not None for o in gc.get_objects())


class TestRights(_Node):
    """Takes from the thread that runs nodes the right to write where modes forbid it, as users
    have it; or gives it back. Tests may run as root, for whom modes count for nothing."""

    INPUTS = {"model": "MODEL", "drop": "BOOLEAN"}
    RETURN_TYPES = ("MODEL",)
    OUTPUT_NODE = True

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def run(self, model, drop):
        version, override = 0x20080522, 1 << 1 | 1 << 2  # DAC_OVERRIDE, DAC_READ_SEARCH
        libc = ctypes.CDLL(None, use_errno=True)
        header, data = (ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)()
        if libc.capget(header, data):
            raise OSError(ctypes.get_errno(), "capget")
        data[0] = data[0] & ~override if drop else data[0] | data[1] & override
        if libc.capset(header, data):
            raise OSError(ctypes.get_errno(), "capset")
        return (model,)


def _pack(module: str):
    """A module of the pack, as this server imported it."""
    return next(m for name, m in sys.modules.items() if name.endswith(f"ComfyUI-MXFP8.{module}"))


def unload_all_models() -> None:
    """By the pack, which a failed node before does not trip."""
    _pack("nodes.host.unloading").unload_all_models()


class TestFast(_Node):
    """Has the pack take this CPU for one that multiplies INT8, and one row for few; or for one that
    does not. Linears are fast where that is chosen: on a CPU, auto is exact."""

    INPUTS = {
        "model": "MODEL",
        "on": "BOOLEAN",
        "memory": "BOOLEAN",  # whether there is some for prepared weights
        "most_change": ("FLOAT", {"default": 1.0}),
    }
    RETURN_TYPES = ("MODEL",)
    OUTPUT_NODE = True

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def run(self, model, on, memory, most_change):
        dispatch, ops = _pack("kernels.dispatch"), _pack("kernels.ops")
        _pack("kernels.backends.int8").cpu_instructions = lambda: ("VNNI",) if on else ()
        _pack("kernels").FEW_ROWS = 1 if on else 64
        preparing = _pack("nodes.runtime.preparing")
        preparing.RESERVE, preparing.SHARE = 0 if memory else 1 << 60, 1 << 62
        preparing.MAX_CHANGE = most_change
        dispatch.forget()
        unload_all_models()
        for steps in (ops._PREPARERS, ops._QUANTIZERS):
            _count(steps, ("rotated_int8", "torch"))
        return (model,)


def _count(steps: dict, key: tuple) -> None:
    """Have a step count its calls, from 0."""
    run = getattr(steps[key].run, "counted", steps[key].run)

    def counting(*args):
        counting.calls += 1
        return run(*args)

    counting.calls, counting.counted = 0, run
    steps[key] = dataclasses.replace(steps[key], run=counting)


class TestInterrupt(_Node):
    """Interrupts ComfyUI within a call of one of the pack's functions, the `call`-th from now on.
    With 0: how often it was called after that one, and it is as before."""

    INPUTS = {"module": "STRING", "name": "STRING", "call": "INT"}
    OUTPUT_NODE = True

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def run(self, module, name, call):
        *path, name = name.split(".")
        owner = functools.reduce(getattr, path, _pack(module))
        function = getattr(owner, name)
        if not call:
            setattr(owner, name, function.interrupted)
            return {"ui": {"result": [next(function.calls) - function.call - 1]}}

        def interrupting(*args, **options):
            if next(interrupting.calls) == call:
                comfy.model_management.interrupt_current_processing()
            return function(*args, **options)

        interrupting.calls, interrupting.call = itertools.count(1), call  # counts in one step
        interrupting.interrupted = function
        setattr(owner, name, interrupting)
        return {}


class TestBackend(_Node):
    """Has the pack run everything on one backend, or again on what it chooses."""

    INPUTS = {"model": "MODEL", "name": ("STRING", {"default": ""})}
    RETURN_TYPES = ("MODEL",)
    OUTPUT_NODE = True

    def run(self, model, name):
        dispatch = _pack("kernels.dispatch")
        dispatch._forced = (dispatch.named(name),) if name else ()
        return (model,)


class TestPrepared(_Node):
    """How many layers of a model hold INT8 weights once `samples` are there, how often weights
    were prepared since the last TestFast, and how often inputs were quantized."""

    INPUTS = {"model": "MODEL", "samples": "LATENT"}
    RETURN_TYPES = ("LATENT",)
    OUTPUT_NODE = True

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def run(self, model, samples):
        ops = _pack("kernels.ops")
        weights = [getattr(module, "weight", None) for module in model.model.modules()]
        held = [getattr(weight, "form", None) == "rotated_int8" for weight in weights]
        key = "rotated_int8", "torch"
        calls = [steps[key].run.calls for steps in (ops._PREPARERS, ops._QUANTIZERS)]
        return {"ui": {"result": [sum(held), *calls]}, "result": (samples,)}


NODE_CLASS_MAPPINGS = {
    node.__name__: node
    for node in (
        TestWideConditioning, TestClone, TestLowVRAM, TestOffloadedLoras, TestPatch, TestUnload,
        TestEmptyAfter, TestAfter, TestMoved, TestSaveTensor, TestCompile, TestGraphBreaks,
        TestLayers, TestDigest, TestConfig,
        TestMemory, TestFail, TestLora, TestForward, TestMoments, TestRights, TestFast,
        TestInterrupt, TestBackend, TestPrepared, TestForeignForward, TestForeignForwards,
    )
}  # fmt: skip
NODE_CLASS_MAPPINGS |= recording.NODES | controls.NODES | branches.NODES | emoji.NODES
