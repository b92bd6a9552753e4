"""What a conversion may cost: 0.5 GB of memory above torch, whatever the model and the machine.

Memory is the peak resident size of a process of its own, as the system counts it. The files are
sparse: they are read as zeros, which take the same way as any values.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import matrix
from safetensors.torch import save_file

from mxfp8.kernels import sqnr, use_backend
from mxfp8.quant.container.pipeline import Pipeline, cores
from mxfp8.quant.conversion import convert as converting
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.format import read_header

ALLOWED = 0.5e9  # bytes above a process that has only imported torch

MODEL = {f"blocks.{i}.weight": matrix(700, 300 + i, seed=i) for i in range(6)}
MODEL |= {"norm.weight": matrix(1, 70)[0], "kept.weight": matrix(64, 512).reshape(64, 8, 64)}


def sparse(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> Path:
    """A file of zeros that takes no time to write: {name: (dtype, shape)}."""
    header, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = torch.Size(shape).numel() * {"BF16": 2, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return path


PEAK = """
from pathlib import Path
print([line.split()[1] for line in Path("/proc/self/status").read_text().splitlines()
       if line.startswith("VmHWM")][0])
"""


def peak(code: str, *words) -> int:
    """Bytes of memory a process of its own had at most."""
    command = [sys.executable, "-c", code + PEAK, *map(str, words)]
    return 1024 * int(subprocess.check_output(command, text=True).split()[-1])


@functools.cache
def torch_alone() -> int:
    return peak("import torch")


def above_torch(source: Path, target: Path) -> int:
    """What a conversion takes in memory, beyond what importing torch takes."""
    code = "import sys; from mxfp8.quant.cli import main; assert main(sys.argv[1:]) == 0"
    words = ("convert", source, target, "--preset", "none", "--device", "cpu")
    return peak(code, *words) - torch_alone()


linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc"
)


def blocks(count: int) -> dict:
    """Layers of Z-Image, 78 MB each."""
    return {f"layers.{i}.w1.weight": ("BF16", [10240, 3840]) for i in range(count)}


@pytest.mark.slow
@linux
@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param(blocks(13), id="1 GB"),
        pytest.param({"wide.weight": ("F32", [512, 1 << 18])}, id="rows of 1 MB"),
        pytest.param(blocks(51), id="4 GB", marks=pytest.mark.long),
        pytest.param({"a.weight": ("BF16", [196608, 3840])}, id="1.5 GB at once"),
        pytest.param(
            {"a.weight": ("F32", [98304, 3840, 1]), "b.weight": ("F32", [64, 64])},
            id="1.5 GB kept",
            marks=pytest.mark.long,
        ),
    ],
)
def test_memory_is_bounded_whatever_the_model(tmp_path, tensors):
    source = sparse(tmp_path / "source.safetensors", tensors)
    assert above_torch(source, tmp_path / "target.sft") <= ALLOWED
    matrices = {name for name, (_, shape) in tensors.items() if len(shape) == 2}
    layers = read_header(tmp_path / "target.sft").layers
    assert {f"{name}.weight" for name in layers} == matrices


def test_rows_that_do_not_fit_are_refused_by_name(tmp_path):
    source = sparse(tmp_path / "source", {"a.weight": ("BF16", [2, (1 << 18) + 1])})
    with pytest.raises(ValueError, match=r"'a\.weight' has rows of 262145 values.*exclude"):
        convert_file(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_any_number_of_cores_gives_the_same_bytes_and_report(tmp_path, monkeypatch, count):
    save_file(MODEL, tmp_path / "source")
    monkeypatch.setattr(converting, "_SLAB", 1 << 15)
    reports = [convert_file(tmp_path / "source", tmp_path / "first")]
    monkeypatch.setattr(converting, "cores", lambda: count)
    reports.append(convert_file(tmp_path / "source", tmp_path / "second"))
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert reports[0].layers == reports[1].layers


def test_a_device_by_name_gives_the_same_bytes(tmp_path):
    save_file(MODEL, tmp_path / "source")
    convert_file(tmp_path / "source", tmp_path / "first")
    convert_file(tmp_path / "source", tmp_path / "second", device="cpu")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.gpu
def test_an_accelerator_gives_the_bytes_of_the_cpu(tmp_path):
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator")
    save_file(MODEL, tmp_path / "source")
    reports = [
        convert_file(tmp_path / "source", tmp_path / name, device=device)
        for name, device in (("first", "cpu"), ("second", None))
    ]
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    for one, other in zip(*(report.quantized for report in reports), strict=True):
        assert one.sqnr_db == pytest.approx(other.sqnr_db, rel=1e-6)


@pytest.mark.parametrize("device", ["nonsense", "cpu:x", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(tmp_path, device):
    save_file(MODEL, tmp_path / "source")
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used here"):
        convert_file(tmp_path / "source", tmp_path / "target", device=device)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("found", "used"), [(None, "cpu"), ("mps", "cpu"), ("cuda", "cuda")])
def test_the_accelerator_that_torch_has_is_used(monkeypatch, found, used):
    device = None if found is None else torch.device(found)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: device)
    assert converting.find_device(None) == torch.device(used)


def test_slabs_are_quantized_where_they_are_sent(tmp_path, monkeypatch):
    """No accelerator here: what is checked is that every slab goes through the device."""
    sent = []

    def to(self, device):
        sent.append((device, self.shape))
        return original(self, device)

    original = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", to)
    save_file(MODEL, tmp_path / "source")
    convert_file(tmp_path / "source", tmp_path / "target", device="cpu")
    assert sorted(shape for device, shape in sent if device == torch.device("cpu")) == sorted(
        tensor.shape for key, tensor in MODEL.items() if key.startswith("blocks")
    )


def test_a_backend_that_measures_afterwards_gives_the_same():
    x = matrix(70, 130)
    at_once = sqnr.quantize_and_measure(x)
    with use_backend("reference"):
        afterwards = sqnr.quantize_and_measure(x)
    for one, other in zip(at_once[:2], afterwards[:2], strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    for one, other in zip(at_once[2:], afterwards[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=2**-18, atol=0)


def test_the_threads_of_torch_are_as_before(tmp_path):
    """set_num_threads in a worker also sets what new threads begin with."""
    save_file(MODEL, tmp_path / "source")
    before, after = torch.get_num_threads(), []
    convert_file(tmp_path / "source", tmp_path / "target")
    thread = threading.Thread(target=lambda: after.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (torch.get_num_threads(), after) == (before, [before])


def test_workers_leave_torch_one_thread_each(tmp_path, monkeypatch):
    seen = set()

    def watched(x):
        seen.add((threading.current_thread(), torch.get_num_threads()))
        return original(x)

    original = sqnr.quantize_and_measure
    monkeypatch.setattr("mxfp8.kernels.quantize_and_measure", watched)
    save_file(MODEL, tmp_path / "source")
    convert_file(tmp_path / "source", tmp_path / "target")
    assert {count for _, count in seen} == {1}
    assert threading.main_thread() not in {thread for thread, _ in seen}


@dataclass
class Sized:
    """A job for a pipeline."""

    size: int
    number: int = 0


def test_a_pipeline_keeps_its_budget_and_the_order():
    lock, in_flight, most = threading.Lock(), [], []

    def work(job):
        with lock:
            in_flight.append(job.size)
            most.append(sum(in_flight))
        time.sleep(0.001 * (job.size % 5))
        with lock:
            in_flight.remove(job.size)
        return -job.size

    sizes = [(7 * i) % 40 + 1 for i in range(60)]
    with Pipeline(work, 8, 50) as pipeline:
        results = [(job.size, result) for job, result in pipeline.run(map(Sized, sizes))]
    assert results == [(size, -size) for size in sizes]
    assert max(most) <= 50


def test_a_pipeline_works_on_jobs_that_fit_at_once():
    together = threading.Barrier(2, timeout=300)
    with Pipeline(lambda job: together.wait(), 2, 10) as pipeline:
        results = [result for _, result in pipeline.run(map(Sized, (5, 5)))]
    assert sorted(results) == [0, 1]


def test_a_pipeline_takes_one_job_over_its_budget():
    with Pipeline(lambda job: job.size, 2, 10) as pipeline:
        results = [result for _, result in pipeline.run(map(Sized, (100, 3, 100)))]
    assert results == [100, 3, 100]


@pytest.mark.parametrize("where", ["work", "caller", "jobs"])
def test_an_error_stops_a_pipeline_and_its_threads(where):
    before, started = threading.active_count(), []

    def jobs():
        for number in range(1000):
            if where == "jobs" and number == 5:
                raise RuntimeError
            yield Sized(1, number)

    def work(job):
        started.append(job)
        if where == "work" and job.number == 3:
            raise RuntimeError
        time.sleep(0.002)

    with pytest.raises(RuntimeError), Pipeline(work, 2, 10) as pipeline:
        for job, _ in pipeline.run(jobs()):
            if where == "caller" and job.number == 5:
                raise RuntimeError
    assert threading.active_count() == before
    assert len(started) < 30


def test_errors_of_a_pipeline_are_freed_without_a_garbage_collection():
    """Their tracebacks hold jobs, slabs of a model, and what the jobs are from: the model."""
    failed = weakref.WeakSet()

    class FailedError(RuntimeError):
        def __init__(self):
            failed.add(self)

    def work(job):
        time.sleep(0.01)  # so that several are running
        raise FailedError

    gc.collect()
    gc.disable()
    try:
        with Pipeline(work, 4, 10) as pipeline:
            list(pipeline.run([Sized(1) for _ in range(8)]))
    except FailedError:
        del pipeline
    left = len(failed)
    gc.enable()
    assert left == 0


def test_a_thread_that_cannot_begin_is_an_error_not_a_wait():
    def fail():
        raise RuntimeError("can't start new thread")

    with (
        pytest.raises(RuntimeError, match="can't start"),
        Pipeline(lambda job: None, 2, 10, fail) as pipeline,
    ):
        list(pipeline.run([Sized(1)] * 5))


def test_cores_are_those_this_process_may_use():
    assert 1 <= cores() <= os.cpu_count()
