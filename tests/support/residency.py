"""What a small Flux holds and computes while ComfyUI loads, patches, saves and unloads it fast.

    python tests/support/residency.py COMFYUI FOLDER

Prints a JSON object: what was checked -> whether it holds, or the figures that a test looks at.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import logging
import os
import weakref
from collections import Counter
from dataclasses import replace

from comfyui_modules import FOLDER

# isort: split
import comfy.hooks
import comfy.model_management
import comfy.patcher_extension
import comfy.sd
import torch
from comfy.quant_ops import QuantizedTensor
from graphs import difference
from lora_families import FAMILIES, build, pair, run
from lora_kinds import linears, lora_file
from safetensors.torch import load_file

from mxfp8 import kernels
from mxfp8.kernels import device_facts, dispatch
from mxfp8.kernels.backends import int8
from mxfp8.nodes.host.unloading import free_memory, unload_all_models
from mxfp8.nodes.models import fingerprints
from mxfp8.nodes.models.sampling import wrap_layers
from mxfp8.nodes.models.save import save_model
from mxfp8.nodes.runtime import lora, preparing, slot, values
from mxfp8.nodes.runtime.cache import model_state
from mxfp8.nodes.runtime.patch import PREFIX, accelerate, check_scales
from mxfp8.nodes.runtime.prepared import PreparedWeight, stored_weight

KIND, CONFIG, INPUTS = FAMILIES["Flux"]
INPUTS = {**INPUTS, "x": (1, 16, 32, 32), "context": (1, 70, 64)}  # 256 and 70 rows
LORAS_BESIDE = "MXFP8_LORAS_BESIDE_WEIGHTS"
made = Counter()  # weights that were prepared, by form


def count_prepared() -> None:
    prepare = kernels.prepare_weight

    def counting(path, qdata, scale):
        made[path.weight_form] += 1
        return prepare(path, qdata, scale)

    kernels.prepare_weight = counting


def output(patcher) -> torch.Tensor:
    return run(patcher, INPUTS)


def layers(patcher) -> dict[str, torch.nn.Module]:
    modules = patcher.model.named_modules()
    return {n: m for n, m in modules if isinstance(getattr(m, "weight", 0), QuantizedTensor)}


def forms(patcher) -> dict[str, str]:
    return {name: getattr(m.weight, "form", "stored") for name, m in layers(patcher).items()}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def codes(patcher) -> dict[str, tuple]:
    """The stored bytes of every layer, as they are now."""
    weights = {name: stored_weight(module.weight) for name, module in layers(patcher).items()}
    return {name: (raw(w._qdata), raw(w._params.scale)) for name, w in weights.items()}


def same_state(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(raw(a[k]) == raw(b[k]) for k in a if a[k].numel())


def with_lora(patcher, file: dict, strength: float):
    return comfy.sd.load_lora_for_models(patcher, None, file, strength, 0)[0]


class Flux:
    """One model in memory, and its patchers: stock's, exact and fast."""

    def __init__(self):
        exact, _, plain = pair(KIND, CONFIG)
        self.stock = exact.parent
        self.exact, self.fast = exact, accelerate(self.stock, "fast")
        self.codes = codes(exact)
        self.state = {k: v.clone() for k, v in exact.model.state_dict().items()}
        state = {f"diffusion_model.{k}": v for k, v in linears(plain).items()}
        state = {k: v for k, v in state.items() if k.removesuffix(".weight") in self.codes}
        self.lora = lora_file(state, "lora", 0.1, seed=3)
        self.of_exact, self.of_fast = output(exact), output(self.fast)
        self.few = [n for n in self.codes if n.endswith((".lin", "in_layer", "out_layer"))]

    def as_fast(self) -> bool:
        """Whether the model holds what it does when it runs fast, and computes the same."""
        again = torch.equal(output(self.fast), self.of_fast)
        others = {n for n, form in forms(self.fast).items() if form != "rotated_int8"}
        return again and others == set(self.few) and codes(self.fast) == self.codes

    def as_exact(self) -> bool:
        """Whether it holds what it does when it runs exact: on a CPU, unpacked weights as well."""
        held = set(forms(self.fast).values())
        return held <= {"stored", "bf16"} and codes(self.fast) == self.codes

    def as_stored(self) -> bool:
        return set(forms(self.fast).values()) == {"stored"} and codes(self.fast) == self.codes


def precisions(flux: Flux):
    yield "fast is off exact by", difference(flux.of_fast, flux.of_exact)
    yield "layers with few rows are exact", flux.as_fast() and len(flux.few) > 3
    before = made.total()
    yield "loaded again", flux.as_fast() and made.total() == before
    yield "exact after fast", torch.equal(output(flux.exact), flux.of_exact) and flux.as_exact()
    yield "fast after exact", flux.as_fast()
    stock = output(flux.stock)
    yield "stock after fast", difference(stock, flux.of_exact) < 1e-5 and flux.as_stored()
    yield "fast after stock", flux.as_fast()
    clone = flux.fast.clone()
    before = made.total()
    yield "a clone", torch.equal(output(clone), flux.of_fast) and made.total() == before


def saving(flux: Flux):
    comfy.model_management.unload_all_models()
    save_model(flux.fast, FOLDER / "before.safetensors", {}, lambda *_: None)
    marks = [f(flux.fast) for f in (fingerprints.of_mxfp8, fingerprints.of_linears)]
    flux.as_fast()
    yield "state dict", same_state(flux.fast.model.state_dict(), flux.state)
    for_saving = flux.fast.model_state_dict_for_saving()
    yield "stock's state to save", same_state({k: v.to("cpu") for k, v in for_saving.items()},
                                              flux.state)  # fmt: skip
    save_model(flux.fast, FOLDER / "loaded.safetensors", {}, lambda *_: None)
    files = [load_file(FOLDER / f"{name}.safetensors") for name in ("before", "loaded")]
    yield "a saved file", same_state(*files)
    now = [f(flux.fast) for f in (fingerprints.of_mxfp8, fingerprints.of_linears)]
    yield "fingerprints", now == marks and None not in marks
    dense = {f"{n}.weight": stored_weight(m.weight).dequantize()
             for n, m in layers(flux.fast).items()}  # fmt: skip
    state = flux.fast.model_state_dict()
    yield "values", all(torch.equal(state[key], dense[key]) for key in dense)
    values.show(flux.fast.model, {})
    state = flux.fast.model.state_dict()
    values.hide(flux.fast.model)
    yield (
        "values while it is sampled",
        all(torch.equal(state[key] + 0, dense[key]) for key in dense),
    )
    check_scales(flux.fast.model)  # raises
    yield "still fast", flux.as_fast()


def unloading(flux: Flux):
    flux.as_fast()
    size = flux.fast.loaded_size()
    freed = flux.fast.partially_unload(torch.device("cpu"), size // 10)
    kinds = Counter(forms(flux.fast).values())
    yield "a part is given back", 0 < freed < size and kinds["rotated_int8"] > 0
    gone = [n for n, m in layers(flux.fast).items() if not m.comfy_patched_weights]
    as_codes = {forms(flux.fast)[n] for n in gone} == {"stored"}
    yield "as codes", as_codes and codes(flux.fast) == flux.codes
    yield "from stock's backup", not any(f"{n}.weight" in flux.fast.backup for n in gone)
    yield "loaded again whole", flux.as_fast()
    comfy.model_management.unload_all_models()
    yield "unloaded", flux.as_stored() and not flux.fast.backup
    yield "loaded anew", flux.as_fast()


def failing(flux: Flux):
    """Preparing is interrupted, or runs out of memory."""
    interrupt = comfy.model_management.InterruptProcessingException()
    check = "throw_exception_if_processing_interrupted"
    with_one = with_lora(flux.fast, flux.lora, 0.8)
    modules = layers(flux.fast).values()
    tried = len({(tuple(linear.weight.shape), linear.bias is None) for linear in modules})
    dispatch.forget()
    for patcher, owner, name, error, passes in (
        (flux.fast, comfy.model_management, check, interrupt, 1),  # while shapes are tried
        (flux.fast, comfy.model_management, check, interrupt, tried + 3),
        (with_one, comfy.model_management, check, interrupt, tried + 3),
        (flux.fast, kernels, "prepare_weight", MemoryError(), 3),
    ):
        for before in (flux.exact, None):  # in stock's loading, or after it had nothing to load
            comfy.model_management.unload_all_models()
            if before is not None:
                output(before)
            calls = iter([None] * passes + [error])
            kept = getattr(owner, name)

            def failing_later(*arguments, calls=calls, kept=kept):
                raised = next(calls)
                if raised is not None:
                    raise raised
                return kept(*arguments)

            setattr(owner, name, failing_later)
            try:
                comfy.model_management.load_models_gpu([patcher])
            except BaseException as raised:
                failed = raised is error
            setattr(owner, name, kept)
            what = f"{type(error).__name__} {passes} {patcher is with_one} {before is None}"
            yield f"{what}: fails", failed
            if passes == 1 and before is not None:
                yield f"{what}: the rest is not tried", len(dispatch._tried) == 1
            unloaded = flux.stock.model.current_weight_patches_uuid is None and not flux.fast.backup
            yield f"{what}: unloaded", flux.as_stored() and unloaded
            yield f"{what}: fast", flux.as_fast()
            yield f"{what}: exact", torch.equal(output(flux.exact), flux.of_exact)


def loras(flux: Flux):
    exact, fast = with_lora(flux.exact, flux.lora, 0.8), with_lora(flux.fast, flux.lora, 0.8)
    wanted, got = output(exact), output(fast)
    yield "a LoRA's effect", difference(wanted, flux.of_exact)
    yield "fast with a LoRA is off exact by", difference(got, wanted)
    tensors = [m.weight._qdata.data_ptr() for m in layers(fast).values()]
    before = made.total()
    other = output(with_lora(flux.fast, flux.lora, 0.4))
    unmoved = [m.weight._qdata.data_ptr() for m in layers(fast).values()] == tensors
    yield "another strength prepares nothing", unmoved and made.total() == before
    yield "and has an effect", difference(other, got) > 1e-3
    half = exact.clone()
    half.add_object_patch("manual_cast_dtype", torch.bfloat16)
    comfy.model_management.load_models_gpu([half])
    yield "a LoRA after one in bfloat16", torch.equal(output(exact), wanted)
    yield "without the LoRA", flux.as_fast()


def merging(flux: Flux):
    os.environ[LORAS_BESIDE] = "0"
    exact, fast = with_lora(flux.exact, flux.lora, 0.8), with_lora(flux.fast, flux.lora, 0.8)
    wanted = output(exact)
    merged = codes(exact)
    saved = {k: v.clone() for k, v in exact.model.state_dict().items()}
    yield "exact keeps the merged codes", merged != flux.codes
    got = output(fast)
    yield "fast on a merged LoRA is off exact by", difference(got, wanted)
    prepared = [n for n, m in layers(fast).items() if isinstance(m.weight, PreparedWeight)]
    yield "the form is of the merged weight", len(prepared) > 5 and codes(fast) == merged
    yield (
        "the backup is the original",
        all(raw(fast.backup[f"{n}.weight"].weight._qdata) == flux.codes[n][0] for n in prepared),
    )
    yield "the merged state", same_state(fast.model.state_dict(), saved)
    fast.partially_unload(torch.device("cpu"), fast.loaded_size() // 10)
    waiting = [n for n, m in layers(fast).items() if m.weight_function]
    yield (
        "partly unloaded",
        len(waiting) > 0 and all(codes(fast)[n] == flux.codes[n] for n in waiting),
    )
    yield "and loaded", torch.equal(output(fast), got)
    del os.environ[LORAS_BESIDE]
    yield "without the merged LoRA", flux.as_fast()


def hooks(flux: Flux):
    """A hook's LoRA that is merged into weights, of the exact and of the fast model."""
    os.environ[LORAS_BESIDE] = "0"
    group = comfy.hooks.create_hook_lora(flux.lora, 0.8, 0)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    hooked = []
    for patcher in (flux.exact.clone(), flux.fast.clone()):
        output(patcher)
        patcher.register_all_hook_patches(group, target)
        comfy.model_management.load_models_gpu([patcher])
        before = {n: m.weight for n, m in layers(patcher).items()}
        for _ in range(2):  # merged, then from the cache
            patcher.apply_hooks(group)
            hooked.append(codes(patcher))
            patcher.apply_hooks(None)
        patcher.forced_hooks = group
        comfy.model_management.load_models_gpu([patcher])  # which prepares none of them
        hooked.append(codes(patcher))
        patcher.forced_hooks = None
        comfy.model_management.load_models_gpu([patcher])
        after = {n: m.weight for n, m in layers(patcher).items()}
        yield (
            f"{len(hooked)} as before hooks",
            all(
                type(after[n]) is type(before[n]) and raw(after[n]._qdata) == raw(before[n]._qdata)
                for n in before
            ),
        )
        patcher.clean_hooks()
    comfy.model_management.unload_all_models()
    comfy.model_management.load_models_gpu([patcher])
    module = layers(patcher)[flux.few[0]]
    for hooks in (group, None):  # its first call is one with hooks
        patcher.apply_hooks(hooks)
        module.forward(torch.randn(3, module.in_features))
    yield "few rows are exact after hooks", forms(patcher)[flux.few[0]] != "rotated_int8"
    patcher.clean_hooks()
    del os.environ[LORAS_BESIDE]
    yield "hooks start from the codes", all(h == hooked[0] for h in hooked)
    yield "hooks merge something", hooked[0] != flux.codes
    yield "after hooks", flux.as_fast()


def other_models(flux: Flux):
    def fresh(disable_dynamic: bool = False):
        return build(KIND, CONFIG, {
            k.removeprefix("diffusion_model."): v.clone() for k, v in flux.state.items()
        })  # fmt: skip

    flux.as_fast()
    original = flux.fast.clone()
    original.cached_patcher_init = fresh, ()
    clone = original.clone(force_deepcopy=True)
    yield "a deep clone", torch.equal(output(clone), flux.of_fast)
    yield (
        "of its own",
        not any(
            a.weight is b.weight
            for a, b in zip(layers(clone).values(), layers(flux.fast).values(), strict=True)
        ),
    )
    yield "leaves the other", flux.as_fast()


def compiled(flux: Flux):
    flux.as_fast()
    module = next(m for n, m in layers(flux.fast).items() if n not in flux.few)
    x = torch.randn(100, module.in_features)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return self.inner(x) + 1

    layer = Layer()
    torch._dynamo.reset()
    once = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        yield "compiled", difference(once(x), layer(x)) < 1e-6
    torch._dynamo.reset()
    comfy.model_management.unload_all_models()
    comfy.model_management.load_models_gpu([flux.fast])
    asked = torch.compile(lambda x: x + torch.compiler.is_compiling(), backend="eager")
    seen = []

    def call(interrupted: bool):
        seen.append(asked(torch.zeros(1)).item())
        if interrupted:
            raise comfy.model_management.InterruptProcessingException

    wrapped = comfy.patcher_extension.WrapperExecutor.new_class_executor(
        call, flux.fast.model, [preparing.judge_uncompiled]
    )
    for interrupted in (True, False, False):
        with contextlib.suppress(comfy.model_management.InterruptProcessingException):
            wrapped.execute(interrupted)
    yield "uncompiled until a call ends", seen == [0, 0, 1]
    torch._dynamo.reset()


def limits(flux: Flux):
    """Memory is short; a form changes every weight too much; a layer is marked."""
    comfy.model_management.unload_all_models()
    kept, preparing.RESERVE = preparing.RESERVE, 1 << 60
    yield "without memory", torch.equal(output(flux.fast), flux.of_exact) and flux.as_stored()
    preparing.RESERVE = kept
    yield "with memory again", flux.as_fast()
    comfy.model_management.unload_all_models()
    kept, preparing.MAX_CHANGE = preparing.MAX_CHANGE, 0.0
    yield "changed too much", torch.equal(output(flux.fast), flux.of_exact) and flux.as_exact()
    changes = model_state(flux.fast.model).changes
    yield "changes", [min(changes.values()), max(changes.values())]
    preparing.MAX_CHANGE = kept
    comfy.model_management.unload_all_models()
    yield "changed little", flux.as_fast()
    module = next(m for n, m in layers(flux.fast).items() if n not in flux.few)
    module._full_precision_mm_config = True
    output(flux.fast)
    yield "marked full precision", getattr(module.weight, "form", "") != "rotated_int8"
    module._full_precision_mm_config = False
    yield "no longer marked", flux.as_fast()


def unpacked(flux: Flux):
    """Exact in bfloat16 on a CPU that multiplies it."""
    kept, device_facts.cpu_multiplies = device_facts.cpu_multiplies, lambda dtype: True
    dispatch.forget()
    patcher = flux.exact.clone()
    patcher.set_model_compute_dtype(torch.bfloat16)
    comfy.model_management.load_models_gpu([patcher])
    yield "as bfloat16", set(forms(patcher).values()) == {"bf16"} and codes(patcher) == flux.codes
    same = []
    for module in layers(patcher).values():
        x = torch.randn(3, module.in_features).bfloat16()
        weight, bias = stored_weight(module.weight).dequantize(), module.bias
        bias = bias if bias is None else bias.bfloat16()
        wanted = torch.nn.functional.linear(x, weight.bfloat16(), bias)
        same.append(torch.equal(module.forward(x), wanted))
    yield "the same outputs", all(same)
    kept_reserve = preparing.RESERVE
    comfy.model_management.unload_all_models()
    comfy.model_management.load_models_gpu([flux.fast])
    preparing.RESERVE = 1 << 60
    for _ in range(2):  # layers with few rows get their codes back, then find no memory
        output(flux.fast)
    preparing.RESERVE = kept_reserve
    yield "few rows stay exact once there was no memory for bfloat16", flux.as_fast()
    output(flux.exact)
    preparing.RESERVE = 1 << 60
    output(flux.fast)
    preparing.RESERVE = kept_reserve
    prepared = {name for name, form in forms(flux.fast).items() if form == "rotated_int8"}
    yield "a smaller form needs no memory", prepared == flux.codes.keys() - set(flux.few)
    device_facts.cpu_multiplies = kept
    dispatch.forget()
    yield "fast again", flux.as_fast()


def slots(flux: Flux):
    """The rules of `slot` on a layer as stock leaves it after it copied its codes to a slot."""
    path = kernels.execution_path(torch.device("cpu"), torch.float32, "fast", prepare="once")
    for shape in ((70, 256), (1, 64), (129, 4096)):
        weight = torch.randn(shape, dtype=torch.bfloat16)
        stored = QuantizedTensor.from_float(weight, "TensorCoreMXFP8Layout")
        stored = torch.nn.Parameter(stored, requires_grad=False)
        module = torch.nn.Module()
        module.weight, module._v_signature = stored, object()
        module._v_weight = stored.clone()
        wanted = kernels.prepare_weight(path, stored._qdata, stored._params.scale)
        inside = module._v_weight._qdata.data_ptr(), module._v_weight._params.scale.data_ptr()
        got = slot.prepare_in_slot(module, module._v_weight, path)
        yield (
            f"in place {shape}",
            (
                got is module._v_weight
                and got.form == "rotated_int8"
                and got.stored is stored
                and all(raw(a) == raw(b) for a, b in zip(got.tensors, wanted, strict=True))
                and tuple(t.data_ptr() for t in got.tensors) == inside
            ),
        )
        yield f"once {shape}", slot.prepare_in_slot(module, got, path) is got
        slot.refault(module, "rotated_int8")
        yield f"valid {shape}", module._v_signature is not None
        slot.refault(module, "stored")
        yield f"no longer valid {shape}", module._v_signature is None
        module._v_weight = stored.clone()
        yield (
            f"without a slot {shape}",
            (slot.prepare_in_slot(module, module._v_weight, path) is module._v_weight),
        )
        module._v_signature = object()
        buffer = stored.clone()
        yield f"in a buffer {shape}", slot.prepare_in_slot(module, buffer, path) is buffer
        module.weight_lowvram_function = object()
        yield f"with a patch {shape}", type(
            slot.prepare_in_slot(module, module._v_weight, path)
        ) is QuantizedTensor  # fmt: skip


def refused(flux: Flux):
    """A kernel that fails at the shape of some layers, which is tried before they are loaded."""
    record = dispatch.named("int8")
    prepared = [m for name, m in layers(flux.fast).items() if name not in flux.few]
    ((shape, _),) = Counter(tuple(m.weight.shape) for m in prepared).most_common(1)

    def matmul(quantized, prepared, bias, dtype, N):
        if tuple(prepared[0].shape) == shape:
            raise RuntimeError("an illegal instruction")
        return record.matmul(quantized, prepared, bias, dtype, N)

    kept = dispatch.BACKENDS
    dispatch.BACKENDS = tuple(replace(b, matmul=matmul) if b is record else b for b in kept)
    for exact_first in (True, False):  # then stock has nothing to load
        dispatch.forget()
        comfy.model_management.unload_all_models()
        if exact_first:
            output(flux.exact)
        yield f"is close {exact_first}", difference(output(flux.fast), flux.of_exact) < 0.02
    modules = layers(flux.fast)
    held = {modules[n].weight.shape for n, f in forms(flux.fast).items() if f == "rotated_int8"}
    yield "no INT8 there", shape not in held
    yield "INT8 elsewhere", len(held) > 0
    dispatch.BACKENDS = kept
    dispatch.forget()
    comfy.model_management.unload_all_models()
    yield "fast afterwards", flux.as_fast()


def garbage(flux: Flux):
    """Models in a reference cycle, as a failed node leaves them, collected while others unload."""

    def check(unload) -> bool:
        output(flux.exact)
        dead = pair(KIND, CONFIG)[0]
        last = flux.fast.clone()
        last.add_callback(comfy.patcher_extension.CallbacksMP.ON_DETACH, lambda *_: gc.collect())
        output(dead)
        output(last)
        cycle = [dead] * 10  # models with more references are unloaded later
        cycle.append(cycle)
        del dead, cycle
        unload()
        return not comfy.model_management.loaded_models()

    gc.disable()
    yield "unload_all_models", check(unload_all_models)
    yield "free_memory", check(lambda: free_memory(1 << 60, flux.fast.load_device))
    gc.enable()


def freed(flux: Flux):
    """Models that nobody holds any more are freed as a whole, without a garbage collection."""

    def watched(_, plain):
        layers = [name.removeprefix(PREFIX) for name in flux.codes]
        return wrap_layers(plain, layers, lambda _, __, forward: lambda x: forward(x), print)

    def refused(exact, _):
        """With a LoRA that cannot be baked in."""
        up, down = (f"{next(iter(flux.codes))}.lora_{part}.weight" for part in ("up", "down"))
        patcher = with_lora(exact, {up: torch.ones(7, 4), down: torch.ones(4, 5)}, 1.0)
        try:
            save_model(patcher, FOLDER / "refused.safetensors", {}, None)
        except ValueError:
            return patcher

    kinds = {
        "exact": lambda exact, _: exact,
        "fast": lambda exact, _: accelerate(exact.parent, "fast"),
        "fast, unloaded": lambda exact, _: accelerate(exact.parent, "fast"),
        "with a LoRA": lambda exact, _: with_lora(exact, flux.lora, 1.0),
        "watched while it is sampled": watched,
        "not saved": refused,
    }
    gc.disable()
    for name, make in kinds.items():
        exact, plain, _ = pair(KIND, CONFIG)
        patcher = make(exact, plain)
        output(patcher)
        if "unloaded" in name:
            unload_all_models()
        modules = [weakref.ref(module) for module in patcher.model.modules()]
        del exact, plain, patcher
        yield name, all(module() is None for module in modules)
    gc.enable()

    original = pair(KIND, CONFIG)[0]
    patcher = original.clone()
    patcher.parent, patcher.model = None, copy.copy(original.model)  # which has the same linears
    patcher = accelerate(patcher, "exact")
    freed_model = weakref.ref(original.model)
    output(patcher)
    forwards = [module.forward for module in layers(patcher).values()]
    del original
    now = [module.forward for module in layers(patcher).values()]
    yield "not the linears of a copy", freed_model() is None and forwards == now


def main() -> None:
    logging.disable(logging.WARNING)
    lora.DENSE_SHARE = 1
    int8.cpu_instructions = lambda: ("VNNI",)  # slow where it has none, but right
    count_prepared()
    results = {}
    with torch.inference_mode():  # as ComfyUI runs nodes
        flux = Flux()
        parts = (precisions, saving, unloading, failing, loras, merging, hooks, other_models,
                 compiled, limits, unpacked, slots, refused, garbage, freed)  # fmt: skip
        for part in parts:
            results[part.__name__] = dict(part(flux))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
