"""One mode of the benchmark: ComfyUI as its main.py starts it, in a process of its own.

    python bench/in_comfyui/mode.py JOB.json

The job names the mode, the folders of ComfyUI and the models, and the file for the rows, which is
rewritten after each row, so that a crash loses none before it.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import working_copy

SAME = 0.25  # of the change by quantizing the weights: rounding is far below, a bug above
FAST = 2.0  # in the same unit: 8-bit activations have about the error of the weights
LAYER = 6e-2  # relative error of a fast layer's output
_WORKSPACES = 256 << 20  # bytes that libraries keep after their first use


def start(comfyui: str, options: list[str]) -> bool:
    """ComfyUI as main.py initializes it; returns whether dynamic VRAM runs."""
    sys.path.insert(0, comfyui)
    sys.argv = ["main.py", *options]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy_aimdo.control
    from comfy.cli_args import args, enables_dynamic_vram

    if enables_dynamic_vram():
        try:
            comfy_aimdo.control.init(
                simple_vram_headroom=None, nvml_pressure=not args.disable_nvml_pressure
            )
        except (TypeError, AttributeError):  # comfy-aimdo before 0.4.11
            comfy_aimdo.control.init()
    import cuda_malloc  # noqa: F401  chooses torch's allocator, before torch is imported

    working_copy.load()
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sd

    management = comfy.model_management
    wanted = enables_dynamic_vram() and management.is_nvidia() and not management.is_wsl()
    if not wanted:
        return False
    devices = management.get_all_torch_devices()
    headroom = int(getattr(args, "vram_headroom", 0) * 1024**3)
    try:
        ready = comfy_aimdo.control.init_devices((d.index, headroom) for d in devices)
    except TypeError:
        ready = comfy_aimdo.control.init_devices(d.index for d in devices)
    if not ready:
        raise RuntimeError("comfy-aimdo does not work here: no dynamic VRAM")
    comfy_aimdo.control.set_log_warning()
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    return True


class Sampler:
    """Samples a model, and measures time and memory."""

    def __init__(self, job: dict, dynamic: bool):
        import torch

        self.job, self.dynamic = job, dynamic
        self.cuda = torch.cuda.is_available() and job["device"] != "cpu"
        generator = torch.Generator().manual_seed(4)
        self.text = torch.randn(1, 77, 1024, generator=generator) * 0.3
        self.used = 0

    def latent(self):
        import torch

        side = self.job["side"]
        return torch.zeros(1, 16, side, side)

    def run(self, patcher, steps: int):
        """(latent, seconds per step)."""
        import comfy.sample

        latent = self.latent()
        noise = comfy.sample.prepare_noise(latent, 7)
        text = [[self.text, {}]]
        self.wait()
        start = time.perf_counter()
        out = comfy.sample.sample(
            patcher, noise, steps, 1.0, "euler", "simple", text, text, latent, seed=7,
            callback=self._see_memory, disable_pbar=True,
        )  # fmt: skip
        self.wait()
        spent = (time.perf_counter() - start) / steps
        self._after_node()
        return out.float().cpu(), spent

    def _after_node(self) -> None:
        """What ComfyUI does after a node under dynamic VRAM."""
        if not self.dynamic:
            return
        import comfy.model_management
        import comfy.model_prefetch
        import comfy_aimdo.model_vbar

        comfy.model_management.reset_cast_buffers()
        comfy.model_prefetch.cleanup_prefetch_queues()
        comfy_aimdo.model_vbar.vbars_reset_watermark_limits()

    def _see_memory(self, *_) -> None:
        if self.cuda:
            import torch

            free, total = torch.cuda.mem_get_info()
            self.used = max(self.used, total - free)

    def wait(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def fresh(self) -> None:
        """Unload everything, and start counting memory."""
        import comfy.model_management

        comfy.model_management.unload_all_models()
        gc.collect()
        comfy.model_management.cleanup_models_gc()
        comfy.model_management.soft_empty_cache()
        self.used = 0
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()

    def allocated(self) -> int | None:
        if not self.cuda:
            return None
        import torch

        return torch.cuda.memory_allocated()

    def memory(self) -> dict:
        """Peaks in bytes: of torch's allocator, and of the whole device at the end of each step.

        Dynamic VRAM keeps weights outside torch's allocator.
        """
        if not self.cuda:
            return {"peak_torch_bytes": None, "peak_device_bytes": None}
        import torch

        return {
            "peak_torch_bytes": torch.cuda.max_memory_allocated(),
            "peak_device_bytes": self.used,
        }


def load(job: dict, model: str, variant: str):
    """A patcher: "bf16" and "stock" by ComfyUI's loader, "exact" and "fast" by ours."""
    import comfy.sd

    from mxfp8.nodes.models.load import load_diffusion_model
    from mxfp8.nodes.runtime.patch import accelerate

    folder = Path(job["models"])
    if variant == "bf16":
        return comfy.sd.load_diffusion_model(str(folder / f"{model}.safetensors"))
    path = str(folder / f"{model}-mxfp8.safetensors")
    if variant == "stock":
        return comfy.sd.load_diffusion_model(path)
    return accelerate(load_diffusion_model(path), variant)


def prepare(job: dict, model: str, patcher, sampler: Sampler):
    """Apply what the mode adds: a LoRA, torch.compile, less memory than the model needs."""
    import comfy.sd
    import comfy.utils

    if job["lora"]:
        lora = comfy.utils.load_torch_file(str(Path(job["models"]) / f"{model}-lora.safetensors"))
        if job["lora"] == "merged":
            patcher, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)
            effects = patcher.patches
        else:
            patcher, _ = comfy.sd.load_bypass_lora_for_models(patcher, None, lora, 1.0, 0.0)
            effects = patcher.injections
        if not effects:
            raise RuntimeError("the LoRA has no effect")
    if job["compile"]:  # as the node TorchCompileModel does it
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        patcher = patcher.clone(disable_dynamic=True)
        options = {"guard_filter_fn": _no_options}
        set_torch_compile_wrapper(model=patcher, backend="inductor", options=options)
    if job["part"]:
        _leave_room(patcher, sampler.latent().shape, job["part"])
    return patcher


def _no_options(guards):
    return ["transformer_options" not in guard.name for guard in guards]


def _leave_room(patcher, shape, share: float) -> None:
    """Make ComfyUI believe that only a share of the model fits the memory."""
    import comfy.model_management as management

    needed = max(0.8 * 1024**3, patcher.model.memory_required(list(shape)))
    free = management.get_free_memory(patcher.load_device)
    management.EXTRA_RESERVED_VRAM = int(free - needed - share * patcher.model_size())


def layers(patcher, precision: str) -> str | None:
    """Every MXFP8 linear against stock's forward on one input; what is wrong, or None.

    Exact: within one rounding. Fast: within `LAYER`; few rows within one rounding, but on a weight
    that is prepared.
    """
    import comfy.model_management
    import torch

    from mxfp8.nodes.runtime.forward import mxfp8_linears
    from mxfp8.nodes.runtime.prepared import PreparedWeight

    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    generator = torch.Generator().manual_seed(0)
    dtype = patcher.model.get_dtype_inference()
    for name, module in mxfp8_linears(patcher.model):
        if type(module).forward is getattr(module.forward, "__func__", None):
            return f"{name} runs stock's forward"
        for rows in (1, 5, 256):
            x = torch.randn(1, rows, module.in_features, generator=generator)
            x = x.to(patcher.load_device, dtype)
            ours, stock = module.forward(x).float(), type(module).forward(module, x).float()
            reach = x.float().abs() @ module.weight.dequantize().float().abs().t()
            allowed = torch.finfo(dtype).eps * stock.abs() + reach * 2.0**-18
            worst = ((ours - stock).abs() / allowed).max().item()
            error = ((ours - stock).norm() / stock.norm()).item()
            prepared = isinstance(module.weight, PreparedWeight)
            fast = precision == "fast" and (rows > 64 or prepared)
            if fast and not error <= LAYER:
                return f"{name}, {rows} rows: error {error:.2e}"
            if not fast and not worst <= 1:
                return f"{name}, {rows} rows: {worst:.2f} roundings off"
    return None


def difference(a, b) -> float:
    """Relative difference of two latents."""
    return float((a - b).norm() / b.norm())


class Rows:
    """The rows of a mode, written to its file after each."""

    def __init__(self, job: dict):
        self.job, self.rows = job, []

    def add(self, **row) -> None:
        self.rows.append({"mode": self.job["mode"], **row})
        Path(self.job["report"]).write_text(json.dumps(self.rows), encoding="utf-8")


def variant_row(job: dict, sampler: Sampler, model: str, variant: str, latents: dict) -> dict:
    """Load and sample one variant, and compare it with those before it."""
    sampler.fresh()
    before = sampler.allocated()
    patcher = prepare(job, model, load(job, model, variant), sampler)
    latents[variant], _ = sampler.run(patcher, job["steps"])  # which compiles kernels
    again, spent = sampler.run(patcher, job["steps"])
    row = {"model": model, "variant": variant, "seconds_per_step": round(spent, 5)}
    row |= sampler.memory()
    size = patcher.model_size()
    row |= {"model_bytes": size, "loaded_bytes": patcher.loaded_size()}
    wrong = []
    if not again.isfinite().all():
        wrong.append("the latent is not finite")
    if difference(again, latents[variant]) > 1e-5:
        wrong.append(f"a second run differs by {difference(again, latents[variant]):.1e}")
    if job["part"] and sampler.cuda and not 0 < row["loaded_bytes"] < size:
        wrong.append("not loaded in part")
    unit = difference(latents["stock"], latents["bf16"]) if "stock" in latents else None
    row |= {"quantized_by": unit, "difference": None, "bound": None}
    if variant in ("exact", "fast"):
        against = "stock" if variant == "exact" else "bf16"
        row["difference"] = difference(latents[variant], latents[against])
        row["bound"] = (SAME if variant == "exact" else FAST) * unit
        if not row["difference"] <= row["bound"]:
            wrong.append(f"{row['difference']:.2e} from {against}, bound {row['bound']:.2e}")
        if job["layers"]:
            wrong.append(layers(patcher, variant))
    if job["reload"]:
        wrong.append(_reload(sampler, patcher, latents[variant], before, job["steps"]))
    return row | {"wrong": "; ".join(filter(None, wrong)) or None}


def _reload(sampler: Sampler, patcher, latent, before, steps: int) -> str | None:
    """Unload the model, check that its memory is free again, and sample once more."""
    sampler.fresh()
    left = sampler.allocated()
    again, _ = sampler.run(patcher, steps)
    if difference(again, latent) > 1e-5:
        return f"after a reload the latent differs by {difference(again, latent):.1e}"
    if left is not None and left > before + _WORKSPACES:
        return f"{(left - before) / 1e6:.0f} MB stay allocated after unloading"
    return None


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    dynamic = start(job["comfyui"], job["options"])
    if job["dynamic"] and not dynamic:
        raise RuntimeError("dynamic VRAM did not start")
    import torch

    rows, sampler = Rows(job), Sampler(job, dynamic)
    failed = 0
    with torch.inference_mode():
        for model in job["of"]:
            latents: dict = {}
            for variant in ("bf16", "stock", "exact", "fast"):
                row = variant_row(job, sampler, model, variant, latents)
                failed += row["wrong"] is not None
                rows.add(**row)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
