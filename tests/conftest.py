"""One real ComfyUI for all tests that talk to it, with small models and a few test nodes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from comfyui import KINDS, TESTS, Server, make_models
from hypothesis import HealthCheck, settings
from mocked_card import describe
from quantized_files import plain
from safetensors.torch import save_file

from mxfp8.kernels import device_facts, dispatch
from mxfp8.quant.cli import main
from mxfp8.quant.conversion.convert import convert_file

# No test fails because other programs slow this machine down.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


@pytest.fixture(scope="session")
def comfy(tmp_path_factory):
    """A server with tiny Flux, Flux.2 and Wan models: in BF16, MXFP8, and that dequantized."""
    base = tmp_path_factory.mktemp("comfyui")
    make_models(base, *KINDS, "ltxv", "checkpoint", "vae", "lora")
    models = base / "models"
    for kind in KINDS:
        folder = models / "diffusion_models"
        target = folder / f"{kind}-mxfp8.safetensors"
        convert_file(folder / f"{kind}.safetensors", target)
        save_file(plain(target), folder / f"{kind}-plain.safetensors")
    checkpoint = models / "checkpoints" / "checkpoint.safetensors"
    convert_file(checkpoint, checkpoint.with_name("checkpoint-mxfp8.safetensors"))
    with Server(base, (TESTS / "comfy_nodes" / "mxfp8_test_nodes",)) as server:
        yield server


@pytest.fixture
def run(capsys):
    """Runs the command in this process: (exit status, stdout, stderr)."""

    def run(*words):
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def forget():
    """Clears the cached choices of backends, before and after a test that changes what can be
    chosen; call it to clear them in between."""
    dispatch.forget()
    yield dispatch.forget
    dispatch.forget()


@pytest.fixture
def prefer(monkeypatch, forget):
    """prefer(name, **changes): make a backend take fast linears on the CPU, of the rows it is for.

    Its weight counts as prepared in one pass, so that `kernels.linear` runs it as well.
    """

    def insert(name: str, **changes) -> None:
        backend = dispatch.named(name)
        steps = tuple(replace(step, one_pass=True) for step in backend.preparers)
        changes = {"preparers": steps, "automatic": True, "test": None} | changes
        record = replace(backend, unsupported_reason=lambda problem: None, **changes)
        others = tuple(b for b in dispatch.BACKENDS if b.name != name)
        monkeypatch.setattr(dispatch, "BACKENDS", (record, *others))
        forget()

    return insert


@pytest.fixture
def card(monkeypatch, forget):
    """card(version, triton=reason or None, ...): simulate a GPU and what is installed.

    `mocked_card.describe` with why comfy-kitchen's kernels do not run; they are absent unless told
    otherwise.
    """
    backends = dispatch.BACKENDS

    def insert(version, *rest, kitchen="needs comfy-kitchen", **options):
        def step(given):
            by_kitchen = given.name.startswith("kitchen")
            return replace(given, unsupported_reason=lambda _: kitchen) if by_kitchen else given

        describe(version, monkeypatch, *rest, **options)
        changed = tuple(
            replace(
                step(backend),
                preparers=tuple(map(step, backend.preparers)),
                quantizers=tuple(map(step, backend.quantizers)),
            )
            for backend in backends
        )
        monkeypatch.setattr(dispatch, "BACKENDS", changed)

    return insert


# Rooms whose tests share a server, and files that take minutes.
SERVER_ROOMS = ("tests/in_comfyui/", "tests/web/")
SLOW = ("tests/release/test_versions.py", "tests/kernels/test_triton.py")


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Who gets which tests where pytest-xdist has workers: a room that talks to a server is for one
    of them, so that its server starts once and its tests keep their order; other files, slow ones
    first, for whoever is free."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return next((room for room in SERVER_ROOMS if file.startswith(room)), file)

        def _assign_work_unit(self, node) -> None:
            for scope in (*SERVER_ROOMS, *SLOW):
                if scope in self.workqueue:
                    self.workqueue.move_to_end(scope, last=False)
                    break
            super()._assign_work_unit(node)

    return Scheduling(config, log)


def pytest_ignore_collect(collection_path) -> bool | None:
    """Kernels run on a GPU, or in the interpreter that `test_triton.py` starts. torch's row-wise
    FP8 runs where torch has it on the CPU: 2.13 does, 2.11 does not."""
    if collection_path.match("tests/kernels/triton"):
        import torch

        return not (torch.cuda.is_available() or device_facts.interpreted()) or None
    if collection_path.match("tests/kernels/test_torch_fp8.py"):
        return not _multiplies_fp8_by_row() or None
    return None


def _multiplies_fp8_by_row() -> bool:
    import torch

    codes, scale = torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(codes, codes.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium. For no longer: while it runs, Playwright's event loop is the thread's,
    and tests that have one of their own fail."""
    from browser import chromium

    with chromium() as started:
        yield started
