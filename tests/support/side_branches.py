"""LoRAs beside a weight against ComfyUI's merging of them; run as a process of its own.

    python tests/support/side_branches.py COMFYUI

Prints JSON: {"exact": {case: error as a share of what is allowed}, ...}; see the functions.
"""

from __future__ import annotations

import json
import random

import comfyui_modules  # noqa: F401  (starts ComfyUI)

# isort: split
import comfy.lora
import comfy.utils
import comfy.weight_adapter as stock
import torch
from lora_kinds import KINDS, lora_file
from torch.nn import functional

from mxfp8.nodes.runtime.adapters import build, merged_by_stock
from mxfp8.nodes.runtime.side_branch import ADDING, Hadamard

N, K, M = 96, 64, 80
KEY = "layer.weight"
GENERATOR = torch.Generator().manual_seed(0)
PLACES = {
    "whole": (None, None),
    "rows": ((0, 32, 48), None),
    "columns": ((1, 16, 32), None),
    "halves swapped": (None, comfy.utils.swap_scale_shift),
    "rows, halves swapped": ((0, 32, 48), comfy.utils.swap_scale_shift),
    "columns reversed": (None, lambda delta: delta.flip(1)),
}
STRENGTHS = (1.0, -0.7, 0.01)


def random_tensor(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


WEIGHT = random_tensor(N, K) / 8
BIAS = random_tensor(N) / 8


def loaded(kind: str, shape=(N, K), seed: int = 1, change=None, **options):
    """What ComfyUI makes of a LoRA file of this kind, for the weight or its bias."""
    weight = WEIGHT if shape == (N, K) else random_tensor(*shape) / 8
    file = lora_file({"layer.weight": weight}, kind, seed=seed, **options)
    for name in list(file):
        if change is not None:
            file[name] = change(file[name])
    (patch,) = comfy.lora.load_lora(file, {"diffusion_model.layer": KEY}).values()
    return patch


def patch(value, strength=1.0, place="whole", strength_model=1.0):
    return (strength, value, strength_model, *PLACES[place])


def shape_of(place: str):
    offset, _ = PLACES[place]
    shape = [N, K]
    if offset is not None:
        shape[offset[0]] = offset[2]
    return tuple(shape)


def ours(patches, x, dtype, bias=(), weight=WEIGHT):
    """(branch, the layer's output) with the base's weight in x's dtype."""
    assert merged_by_stock(patches, weight.shape) == 0
    b = BIAS[: len(weight)]
    branch = build(patches, list(bias), weight.clone, b, KEY, weight.shape, dtype, 2**30)
    w, b = weight.to(x.dtype), b.to(x.dtype)
    return branch, branch.add_to(functional.linear(branch.adjust_input(x), w, b), x)


def expected(patches, x, bias=(), weight=WEIGHT):
    """(the patched layer's output, what the patches changed of it) by ComfyUI, in float64."""
    base = BIAS[: len(weight)].double()
    originals = {KEY: ((weight.double(),),), "layer.bias": ((base,),)}
    w, b = (
        comfy.lora.calculate_weight(list(patched), tensor.double(), key, torch.float32, originals)
        for patched, tensor, key in ((patches, weight, KEY), (bias, base.clone(), "layer.bias"))
    )
    out = functional.linear(x.double(), w, b)
    return out, out - functional.linear(x.double(), weight.double(), base)


def share(out, wanted, effect, of_effect: float, of_layer: float) -> float:
    """The error as a share of what is allowed of the patches' effect, and of the layer itself."""
    assert float(effect.norm()) > 0, "ComfyUI did not apply it"
    allowed = of_effect * effect.norm() + of_layer * (wanted - effect).norm()
    return float((out.double() - wanted).norm() / allowed)


def cases():
    """name -> (patches, patches of the bias)"""
    for kind in KINDS:
        for place, (_, function) in PLACES.items():
            if (kind == "diff_b" and place != "whole") or (kind == "set" and function is not None):
                continue  # ComfyUI gives `set` no function
            for strength in STRENGTHS:
                one = [patch(loaded(kind, shape_of(place), norm=0.05), strength, place)]
                yield f"{kind}, {place}, {strength}", ([], one) if kind == "diff_b" else (one, [])
        if kind == "diff_b":
            continue
        for place in ("whole", "columns"):
            value = loaded(kind, shape_of(place), norm=0.05)
            yield f"{kind}, {place}, strength_model", ([patch(value, 0.6, place, 0.8)], [])
    for name, value in special().items():
        for strength in STRENGTHS:
            yield f"{name}, {strength}", ([patch(value, strength)], [])
    chance = random.Random(0)
    for count in (2, 3, 6):
        for _ in range(16):
            patches, names = [], []
            for seed in range(count):
                kind, place = chance.choice(KINDS), chance.choice(list(PLACES))
                if kind == "diff_b" or (kind == "set" and chance.random() < 0.5):
                    kind = "lora"
                rank = 7 if kind == "loha" else 4  # held by its own factors, not as one product
                value = loaded(kind, shape_of(place), seed, norm=0.05, rank=rank)
                strength, whole = chance.choice((1.0, -0.7, 0.3)), chance.choice((1.0, 1.0, 0.9))
                patches.append(patch(value, strength, place, whole))
                names.append(f"{kind} {place}")
            yield "; ".join(names), (patches, [patch(loaded("diff_b", norm=0.05))])


def exact():
    """case -> share of the allowed error. Also that each patch's bytes are those of the branch.

    In float32 factors and vectors are rounded (2^-24 each), and so is the layer. In float64 only
    what scales or turns the layer is rounded with it; the rest is as exact as its effect is small.
    A low rank that was found in a dense delta may miss 2^-20 of it.
    """
    results, square = {}, random_tensor(K, K) / 8
    for old in (False, True):  # the layouts of GLoRA look alike here
        patches, x = [patch(glora((K, K), old))], random_tensor(M, K)
        _, out = ours(patches, x, torch.float32, weight=square)
        found = expected(patches, x, weight=square)
        results[f"glora, square, old layout: {old}"] = share(out, *found, 2**-19, 2**-22)
    # Both ways in which a LoHa runs that is held by its factors, in one slab and in many.
    slab = Hadamard.SLAB
    for columns, rank in ((1024, 9), (K, 16)):
        weight, x = random_tensor(N, columns) / 8, random_tensor(M, columns).double()
        patches = [patch(loaded("loha", (N, columns), rank=rank, norm=0.05))]
        for Hadamard.SLAB in (slab, 1):
            branch, out = ours(patches, x, torch.float64, weight=weight)
            assert isinstance(branch.steps[0], Hadamard)
            found = expected(patches, x, weight=weight)
            name = f"loha, {columns} columns, slabs of {Hadamard.SLAB}"
            results[name] = share(out, *found, 2**-19, 0.0)
    Hadamard.SLAB = slab
    for name, (patches, bias) in cases():
        for dtype in (torch.float32, torch.float64):
            x = random_tensor(2, M // 2, K).to(dtype)
            branch, out = ours(patches, x, dtype, bias)
            wanted, effect = expected(patches, x, bias)
            scaling = any(not isinstance(step, ADDING) for step in branch.steps)
            rounds = dtype == torch.float32 or scaling or branch.columns is not None
            of_layer = 2**-22 if rounds else 0.0
            results[f"{name}, {dtype}"] = share(out, wanted, effect, 2**-19, of_layer)
        problems = [applied.problem for applied in branch.applied if applied.problem]
        assert not problems, (name, problems)
        held = sum(part.nbytes for part in branch.parameters())
        if scaling and not bias:  # what takes back the scaling of the bias is no patch's
            held -= branch.bias.nbytes
        assert held == sum(applied.nbytes for applied in branch.applied), (name, branch.applied)
    return results


def rounded():
    """case -> share of the error that rounding to BF16 or FP16 allows.

    A rounding is off by 0.4 of the largest error (2^-8, 2^-11), root mean square. Of the effect
    there are three, of two factors and the hidden values; of the layer four: its own, scales or
    rotations, the sum and the bias.
    """
    results = {}
    for dtype, unit in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        weight = WEIGHT.to(dtype).float()
        for kind in KINDS:
            if kind == "diff_b":
                continue
            for strength in (1.0, 0.01):
                rank = 16 if kind == "loha" else 4
                patches = [patch(loaded(kind, norm=0.05, rank=rank), strength)]
                x = random_tensor(M, K).to(dtype)
                _, out = ours(patches, x, dtype, weight=weight)
                wanted, effect = expected(patches, x, weight=weight)
                results[f"{kind}, {strength}, {dtype}"] = share(out, wanted, effect, unit, unit)
    # Without the layer itself: its rounding would hide that of small factors.
    unit, nothing = 2**-11, torch.zeros(N, K)
    up, down = random_tensor(N, 4) * 1e4, random_tensor(4, K) * 1e-10
    tiny = {
        "lora": stock.LoRAAdapter(set(), (up, down, None, None, None, None)),
        "lokr": stock.LoKrAdapter(set(), (
            random_tensor(8, 8) * 1e4, random_tensor(12, 8) * 1e-10, None, *[None] * 6,
        )),
        "loha": stock.LoHaAdapter(set(), (
            random_tensor(N, 12) * 1e4, random_tensor(12, K) * 1e-10, None,
            random_tensor(N, 12) * 1e4, random_tensor(12, K) * 1e-5, *[None] * 3,
        )),
        "diff": ("diff", (random_tensor(N, K) * 1e-6,)),
    }  # fmt: skip
    for name, value in tiny.items():
        x = (random_tensor(M, K) * 1000).half()
        branch = build([patch(value)], [], nothing.clone, None, KEY, (N, K), torch.float16, 2**30)
        out = branch.add_to(torch.zeros(M, N, dtype=torch.float16), x)
        w = comfy.lora.calculate_weight([patch(value)], nothing.double(), KEY)
        wanted = functional.linear(x.double(), w)
        # Of a LoHa seven values are rounded: four factors, their two products, and the delta.
        of_effect = unit * (1.5 if name == "loha" else 1)
        results[f"small {name}, FP16"] = share(out, wanted, wanted, of_effect, 0.0)
    return results


def glora(shape, old: bool):
    n, k = shape
    parts = (k, 4), (4, k), (n, 4), (4, k)
    a1, a2, b1, b2 = (random_tensor(*part) / 16 for part in parts)
    parts = (a2, a1, b2, b1) if old else (a1, a2, b1, b2)
    return stock.GLoRAAdapter(set(), (*parts, 3.0, None))


def special():
    """Variants that the files above do not have."""
    rows, columns = WEIGHT.norm(dim=1, keepdim=True) * 1.1, WEIGHT.norm(dim=0, keepdim=True) * 0.9

    def dora(kind, scale, index):
        value = loaded(kind, norm=0.05)
        weights = list(value.weights)
        weights[index] = scale
        return type(value)(set(), tuple(weights))

    values = {}
    for kind, index in (("loha", 7), ("lokr", 8), ("glora", 5), ("oft", 3), ("boft", 3)):
        values[f"{kind}, scaled by row"] = dora(kind, rows, index)
        values[f"{kind}, scaled by column"] = dora(kind, columns, index)
    blocks = random_tensor(12, 8, 8) / 64
    values["oft, constrained"] = stock.OFTAdapter(set(), (blocks, None, 0.1, None))
    values["oft, constrained, scaled"] = stock.OFTAdapter(set(), (blocks, None, 0.1, rows))
    butterfly = random_tensor(3, 24, 4, 4) / 64
    values["boft, constrained"] = stock.BOFTAdapter(set(), (butterfly, None, 0.1, None))
    values["boft, constrained, scaled"] = stock.BOFTAdapter(set(), (butterfly, None, 0.1, rows))
    rescale = torch.linspace(0.9, 1.1, N)[:, None]
    values["boft, constrained, rescaled, scaled"] = stock.BOFTAdapter(
        set(), (butterfly, rescale, 0.1, rows)
    )
    rescale = torch.linspace(0.9, 1.1, K)[None]
    values["boft, columns rescaled"] = stock.BOFTAdapter(set(), (butterfly, rescale, 0.0, None))
    wide = loaded("loha", norm=0.05, rank=16)
    for name, scale in (("row", rows), ("column", columns)):
        weights = (*wide.weights[:7], scale)
        values[f"loha of rank 16, scaled by {name}"] = stock.LoHaAdapter(set(), weights)
    parts = [random_tensor(*shape) / 8 for shape in ((8, 2), (2, 8), (12, 2), (2, 8))]
    values["lokr of two products"] = stock.LoKrAdapter(set(), (
        None, None, None, *parts, None, None,
    ))  # fmt: skip
    values["glora of the old layout"] = glora((N, K), old=True)
    values["glora with alpha"] = glora((N, K), old=False)
    tucker = [random_tensor(*shape) / 8 for shape in ((3, N), (3, K), (3, N), (3, K))]
    cores = random_tensor(2, 3, 3, 1, 1)
    values["loha, tucker"] = stock.LoHaAdapter(set(), (
        *tucker[:2], 2.0, *tucker[2:], cores[0], cores[1], None,
    ))  # fmt: skip
    wide = [random_tensor(*shape) / 8 for shape in ((N, 7), (7, K), (N, 7), (7, K))]
    values["loha of a large rank"] = stock.LoHaAdapter(set(), (
        wide[0], wide[1], None, wide[2], wide[3], None, None, None,
    ))  # fmt: skip
    values["lokr, a convolution's"] = stock.LoKrAdapter(set(), (
        random_tensor(8, 8) / 64, random_tensor(12, 2, 2, 2), None, *[None] * 6,
    ))  # fmt: skip
    values["lokr of other blocks"] = stock.LoKrAdapter(set(), (
        random_tensor(8, 12) / 64, random_tensor(8, 8), None, *[None] * 6,
    ))  # fmt: skip
    values["lora, 1x1 kernels"] = loaded(
        "lora", norm=0.05, change=lambda part: part[..., None, None]
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        values[f"lora in {dtype}"] = loaded("lora", change=lambda part, d=dtype: part.to(d))
    low = random_tensor(N, 3) @ random_tensor(3, K) / 64
    values["diff of rank 3"] = ("diff", (low,))
    values["diff by itself"] = (random_tensor(N, K) / 64,)
    values["model as LoRA"] = ("model_as_lora", (WEIGHT + random_tensor(N, K) / 64,))
    values["diff with padding that is not needed"] = ("diff", (low, {"pad_weight": True}))
    return values


def misfits():
    """case -> [patches at the front that stock merges, kinds, problems]"""
    other = random_tensor(N + 32, K)
    cases = {
        "diff": [patch(("diff", (other,)))],
        "set": [patch(("set", (other,)))],
        "model as LoRA": [patch(("model_as_lora", (other,)))],
        "boft without alpha": [patch(stock.BOFTAdapter(set(), (
            random_tensor(1, 24, 4, 4), None, None, None,
        )))],
        "slice": [(1.0, loaded("lora"), 1.0, (0, 64, 64), None)],
    }  # fmt: skip
    for kind in KINDS:
        if kind not in ("diff", "diff_b", "set"):
            cases[kind] = [patch(loaded(kind, (N + 32, K)))]
    results = {}
    for name, patches in cases.items():
        # Around it, patches that fit: they apply as if it were not there.
        around = [patch(loaded("dora_rows", norm=0.05)), patch(loaded("glora", norm=0.05))]
        x = random_tensor(M, K)
        branch, out = ours([around[0], *patches, around[1]], x, torch.float32)
        wanted, effect = expected(around, x)
        assert share(out, wanted, effect, 2**-21, 2**-22) <= 1, name
        results[name] = [applied.problem for applied in branch.applied]

    bias = [patch(("diff", (random_tensor(N + 32),))), patch(("set", (random_tensor(N + 32),)))]
    branch, out = ours([], random_tensor(M, K), torch.float32, bias)
    results["bias"] = [applied.problem for applied in branch.applied]
    assert branch.bias is None
    return results


def errors_of_the_machine():
    """case -> whether `build` let an error rise that is not the LoRA's"""

    def lost_device(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def no_memory(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    def rises(patches, weight=WEIGHT.clone, bias=()):
        try:
            build(patches, list(bias), weight, BIAS, KEY, (N, K), torch.float32, 2**30)
        except RuntimeError as error:
            return "fit" not in str(error)
        return False

    results = {}
    for kind in ("glora", "dora_rows", "dora_columns"):
        for make in (lost_device, no_memory):
            results[f"{kind}, {make.__name__}"] = rises([patch(loaded(kind))], make)
    for kind in ("lora", "diff", "lokr", "loha", "glora", "dora_rows", "oft"):
        results[f"{kind}, function"] = rises([(1.0, loaded(kind), 1.0, None, no_memory)])
    bias = [(1.0, loaded("diff_b"), 1.0, None, no_memory)]
    results["bias, function"] = rises([], bias=bias)
    return results


def left_to_stock():
    """case -> patches at the front of the list that only ComfyUI's merging can apply"""
    lora = patch(loaded("lora"))
    weights = list(lora[1].weights)
    weights[5] = [N, 2 * K]
    padded = ("diff", (random_tensor(N, 2 * K), {"pad_weight": True}))

    class Other(stock.LoRAAdapter):
        pass

    values = {
        "another model": [(WEIGHT, lambda weight, **_: weight)],
        "reshape": stock.LoRAAdapter(set(), tuple(weights)),
        "padding": padded,
        "another class": Other(set(), lora[1].weights),
        "unknown type": ("other", (WEIGHT,)),
        "three parts": ("diff", (WEIGHT,), None),
    }
    results = {
        name: merged_by_stock([lora, patch(value), lora], (N, K)) for name, value in values.items()
    }
    results["beside"] = merged_by_stock([lora, lora], (N, K))
    results["convolution"] = merged_by_stock([lora, lora], (N, K, 1, 1))
    return results


def running():
    """What runs: shapes, in place, gradients, compilation, other dtypes; raises if one is wrong."""
    kinds = [kind for kind in KINDS if kind != "diff_b"]
    patches = [patch(loaded(kind, norm=0.05)) for kind in kinds if kind != "set"]
    patches.append(patch(loaded("lora", shape_of("rows"), norm=0.05), 1.0, "rows"))
    patches.append(patch(loaded("loha", norm=0.05, rank=16)))
    bias = [patch(loaded("diff_b", norm=0.05))]
    with torch.inference_mode():  # as ComfyUI runs nodes
        branch, _ = ours(patches, random_tensor(M, K), torch.float32, bias)
        again, _ = ours(patches, random_tensor(M, K), torch.float32, bias)
    for one, other in zip(branch.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)

    x = random_tensor(M, K)
    base = random_tensor(M, N)
    whole = branch.add_to(base.clone(), x)
    for shape in ((M,), (2, M // 2), (4, 1, M // 4)):
        shaped = branch.add_to(base.clone().view(*shape, N), x.view(*shape, K))
        assert torch.equal(shaped.view(M, N), whole)
    assert torch.allclose(branch.add_to(base[0].clone(), x[0]), whole[0], atol=1e-5)
    assert torch.equal(branch.add_to(base.clone(), x.T.contiguous().T), whole)
    assert branch.add_to(base[:0].clone(), x[:0]).shape == (0, N)
    out = base.clone()
    assert branch.add_to(out, x).data_ptr() == out.data_ptr() and torch.equal(out, whole)
    strided = base.clone().T.contiguous().T
    assert torch.equal(branch.add_to(strided, x), whole)

    for dtype, close in ((torch.bfloat16, 0.1), (torch.float64, 1e-4)):
        other = branch.add_to(base.to(dtype), x.to(dtype))
        assert other.dtype == dtype and torch.allclose(other.float(), whole, atol=close)

    leaf, start = x.clone().requires_grad_(), base.clone().requires_grad_()
    out = branch.add_to(start, leaf)
    assert torch.equal(start, base) and torch.allclose(out, whole, atol=1e-5)
    seed = random_tensor(M, N)
    out.backward(seed)
    constant = branch.add_to(torch.zeros(N), torch.zeros(K))
    matrix = branch.add_to(torch.zeros(K, N), torch.eye(K)) - constant  # D.T
    assert torch.allclose(leaf.grad, seed @ matrix.T, atol=1e-4)
    stages = branch.add_to(torch.eye(N), torch.zeros(N, K)) - constant  # P.T
    assert torch.allclose(start.grad, seed @ stages.T, atol=1e-4)

    torch._dynamo.reset()
    compiled = torch.compile(branch.add_to, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(base.clone(), x), whole, atol=1e-5)


def sizes():
    """Bytes of one or more LoRAs in BF16, and when dense deltas are too large."""
    loras = [patch(loaded("lora", seed=seed)) for seed in range(8)]
    branch, _ = ours(loras, random_tensor(1, K).bfloat16(), torch.bfloat16)
    own = sum(part.numel() * 2 for _, value, *_ in loras for part in value.weights[:2])
    diff = [patch(("diff", (random_tensor(N, K),)))]
    halves = [patch(loaded("lora", shape_of("rows")), 1.0, "rows") for _ in range(3)]
    split, _ = ours(halves, random_tensor(1, K).bfloat16(), torch.bfloat16)

    arguments = [], WEIGHT.clone, None, KEY, (N, K), torch.bfloat16

    def fits(limit):
        return build(diff, *arguments, limit) is not None

    def held_and_own(value):
        branch = build([patch(value)], *arguments, 2**30)
        held = sum(part.nbytes for part in branch.parameters())
        own = sum(2 * part.numel() for part in value.weights if isinstance(part, torch.Tensor))
        beyond = branch.dense_nbytes
        limited = [build([patch(value)], *arguments, limit) for limit in (beyond, beyond - 1)]
        return [held, own, beyond, [other is not None for other in limited]]

    return {
        "eight": [sum(part.nbytes for part in branch.parameters()), own],
        "modules": len(list(branch.modules())) - 2,  # but the branch and its list of ups
        "slices": [sum(part.nbytes for part in split.parameters()), 3 * 2 * 4 * (48 + K)],
        "own": [
            held_and_own(loaded("loha", rank=16)),
            held_and_own(loaded("lokr")),
            held_and_own(special()["lokr of two products"]),
        ],
        "larger": [held_and_own(loaded("loha", rank=4))],
        "dense": [fits(N * K * 2), fits(N * K * 2 - 1)],
    }


def main() -> None:
    running()
    with torch.inference_mode():
        answers = {
            "exact": exact(),
            "rounded": rounded(),
            "misfits": misfits(),
            "errors_of_the_machine": errors_of_the_machine(),
            "left_to_stock": left_to_stock(),
            "sizes": sizes(),
        }
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
