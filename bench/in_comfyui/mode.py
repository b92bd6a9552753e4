"""One mode of the benchmark: ComfyUI as its main.py starts it, in a process of its own.

    python bench/in_comfyui/mode.py JOB.json

The job names the mode, the folders of ComfyUI and the models, and the file for the rows, which is
replaced after each row, so that a crash loses none before it.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import working_copy

# Most that ours may differ from BF16, in units of stock's difference. Exact has stock's weights and
# its own rounding; 8-bit inputs, which stock too has on some cards, have about the weights' error.
BOUNDS = {"exact": 1.25, "fast": 2.0}
VARIANTS = ("bf16", "stock", "fast", "exact")
_WORKSPACES = 256 << 20  # bytes that libraries keep after their first use


def start(comfyui: str, options: list[str]) -> bool:
    """ComfyUI as main.py initializes it; returns whether dynamic VRAM runs.

    It runs unless an option, the platform or a missing comfy-aimdo prevents it.
    """
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
        return False
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
        self.used = 0

    def run(self, patcher, inputs: dict):
        """(latent, seconds per step)."""
        import comfy.sample

        latent, text = inputs["latent"], [[inputs["context"], {}]]
        if "pooled" in inputs:
            text[0][1]["pooled_output"] = inputs["pooled"]
        noise, steps = comfy.sample.prepare_noise(latent, 7), self.job["steps"]
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

    if variant == "bf16":
        return comfy.sd.load_diffusion_model(_file(job, f"{model}.safetensors"))
    path = _file(job, f"{model}-mxfp8.safetensors")
    if variant == "stock":
        return comfy.sd.load_diffusion_model(path)
    return accelerate(load_diffusion_model(path), variant)


def prepare(job: dict, model: str, patcher):
    """Apply what the mode adds, as ComfyUI's nodes do: a LoRA, torch.compile."""
    import comfy.sd
    import comfy.utils

    if job["lora"]:
        lora = comfy.utils.load_torch_file(_file(job, f"{model}-lora.safetensors"))
        patcher, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)
        if not patcher.patches:
            raise RuntimeError("the LoRA has no effect")
    if job["compile"]:
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        patcher = patcher.clone(disable_dynamic=True)
        options = {"guard_filter_fn": _no_options}
        set_torch_compile_wrapper(model=patcher, backend="inductor", options=options)
    return patcher


def _no_options(guards):
    return ["transformer_options" not in guard.name for guard in guards]


def _file(job: dict, name: str) -> str:
    return str(Path(job["models"]) / name)


def difference(a, b) -> float:
    """Relative difference of two latents."""
    return float((a - b).norm() / b.norm())


def variant_row(job: dict, sampler: Sampler, model: str, variant: str, latents: dict) -> dict:
    """Load and sample one variant, and compare it with those before it."""
    from safetensors.torch import load_file

    sampler.fresh()
    before = sampler.allocated()
    inputs = load_file(_file(job, f"{model}-inputs.safetensors"))
    patcher = prepare(job, model, load(job, model, variant))
    latents[variant], _ = sampler.run(patcher, inputs)  # which compiles kernels
    again, spent = sampler.run(patcher, inputs)
    # The node for torch.compile turns it off.
    row = {"model": model, "variant": variant, "dynamic_vram": patcher.is_dynamic()}
    row |= {"seconds_per_step": round(spent, 5), **sampler.memory()}
    row |= {"model_bytes": patcher.model_size(), "loaded_bytes": patcher.loaded_size()}
    wrong = []
    if not again.isfinite().all():
        wrong.append("the latent is not finite")
    if difference(again, latents[variant]) > 1e-5:
        wrong.append(f"a second run differs by {difference(again, latents[variant]):.1e}")
    unit = difference(latents["stock"], latents["bf16"]) if "stock" in latents else None
    row |= {"quantized_by": unit, "difference": difference(again, latents["bf16"]), "bound": None}
    if variant in BOUNDS:
        row["bound"] = BOUNDS[variant] * unit
        if not row["difference"] <= row["bound"]:
            wrong.append(f"{row['difference']:.2e} from bf16, bound {row['bound']:.2e}")
    if job["reload"]:
        wrong.append(_reload(sampler, patcher, inputs, latents[variant], before))
    return row | {"wrong": "; ".join(filter(None, wrong)) or None}


def _reload(sampler: Sampler, patcher, inputs: dict, latent, before) -> str | None:
    """Unload the model, check that its memory is free again, and sample once more."""
    sampler.fresh()
    left = sampler.allocated()
    again, _ = sampler.run(patcher, inputs)
    if difference(again, latent) > 1e-5:
        return f"after a reload the latent differs by {difference(again, latent):.1e}"
    if left is not None and left > before + _WORKSPACES:
        return f"{(left - before) / 1e6:.0f} MB stay allocated after unloading"
    return None


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sampler = Sampler(job, start(job["comfyui"], job["options"]))
    import torch

    rows, report = [], Path(job["report"])
    with torch.inference_mode():
        for model in job["of"]:
            latents: dict = {}
            for variant in VARIANTS:
                row = variant_row(job, sampler, model, variant, latents)
                rows.append({"mode": job["mode"], **row})
                part = report.with_suffix(".part")
                part.write_text(json.dumps(rows), encoding="utf-8")
                part.replace(report)
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
