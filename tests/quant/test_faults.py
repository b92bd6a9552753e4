"""Faults: whatever happens, the target is absent or whole, and the next run succeeds.

Every fault here is a real one, but for those that Linux cannot produce (marked below): children are
killed, disks are small file systems, limits are the system's.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from checkpoints import load, matrix, raw
from safetensors.torch import save_file
from warm import Warm

from mxfp8 import kernels
from mxfp8.quant.cli import main
from mxfp8.quant.container import part_file
from mxfp8.quant.container.part_file import SUFFIX, create_part_file
from mxfp8.quant.container.writer import Writer
from mxfp8.quant.conversion.convert import convert, convert_file, plan_source
from mxfp8.quant.sources.file import FileSource

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
NOBODY = 65534
OLD = b"what was there before"

pytestmark = pytest.mark.skipif(os.name == "nt", reason="faults are made with POSIX means")


@pytest.fixture(scope="module")
def warm():
    with Warm() as parent:
        yield parent


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """10 slabs to quantize and some pieces to copy, 48 MB."""
    path = tmp_path_factory.mktemp("source") / "source.safetensors"
    tensors = {f"blocks.{i}.lin.weight": matrix(1024, 2048, seed=i) for i in range(10)}
    tensors |= {"norm.weight": matrix(1, 2048)[0], "kept.weight": matrix(1024, 3072).view(3, 2, -1)}
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> bytes:
    """The bytes of its conversion."""
    target = tmp_path_factory.mktemp("whole") / "target.safetensors"
    convert_file(source, target)
    return target.read_bytes()


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "target.safetensors"


def names(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def assert_absent_or_whole(target, whole, before: bytes | None) -> None:
    """The target is as it was, or the finished file."""
    content = target.read_bytes() if target.exists() else None
    assert content in (before, whole)


def unfinished(folder) -> bool:
    """Whether a part file is there."""
    return any(name.endswith(".part") for name in names(folder))


def kill_at_random_moments(warm, source, whole, target, rounds: int) -> None:
    """Kill, look, run again, look; every other round over a file that exists.

    Half of the moments are from anywhere in a run, half from when the part file is there.
    """
    moment = random.Random(rounds)
    seconds, interrupted = 0.3, 0
    for index in range(rounds):
        before = OLD if index % 2 else None
        target.unlink(missing_ok=True)
        if before:
            target.write_bytes(before)
        start = time.monotonic()
        child = warm.start("convert", source, target, "--overwrite")
        if index % 4 < 2:
            while not unfinished(target.parent) and time.monotonic() - start < seconds:
                time.sleep(0.001)
        time.sleep(seconds * moment.random())
        os.kill(child, signal.SIGKILL)
        status = warm.wait(child).status
        assert status in (0, -signal.SIGKILL)
        assert_absent_or_whole(target, whole, before)
        interrupted += unfinished(target.parent)

        start = time.monotonic()
        assert warm.run("convert", source, target, "--overwrite").status == 0
        seconds = (seconds + 1.1 * (time.monotonic() - start)) / 2
        assert (names(target.parent), target.read_bytes()) == ([target.name], whole)
    assert interrupted >= rounds / 6  # else this test would show little


@pytest.mark.slow
def test_kill_at_50_random_moments(warm, source, whole, target):
    kill_at_random_moments(warm, source, whole, target, 50)


@pytest.mark.long
def test_kill_at_200_random_moments(warm, source, whole, target):
    kill_at_random_moments(warm, source, whole, target, 200)


# Every step from the first byte to the name: (function, call).
STEPS = [
    ("mxfp8.quant.container.part_file._create", 1),
    ("mxfp8.quant.container.part_file._lock", 1),
    ("mxfp8.quant.container.writer._pwrite", 1),
    ("mxfp8.quant.container.writer._pwrite", 2),
    ("mxfp8.quant.container.writer._pwrite", 12),
    ("os.fsync", 1),
    ("mxfp8.quant.container.writer.Writer._compare", 3),
    ("os.link", 1),
    ("mxfp8.quant.container.writer.sync_folder", 1),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("step", "call"), STEPS)
def test_kill_at_every_step_to_a_new_file(warm, source, whole, target, step, call, when):
    killed = warm.run("convert", source, target, at=(step, call, when, signal.SIGKILL))
    assert killed.status == -signal.SIGKILL
    assert_absent_or_whole(target, whole, None)
    assert len(names(target.parent)) <= 2
    done = target.exists()
    again = warm.run("convert", source, target)
    assert (again.status, "--overwrite replaces it" in again.output) == (int(done), done)
    assert (names(target.parent), target.read_bytes()) == ([target.name], whole)


@pytest.mark.parametrize("when", ["before", "after"])
def test_kill_at_the_moment_of_replacing(warm, source, whole, target, when):
    target.write_bytes(OLD)
    at = ("os.replace", 1, when, signal.SIGKILL)
    assert warm.run("convert", source, target, "--overwrite", at=at).status == -signal.SIGKILL
    assert target.read_bytes() == (OLD if when == "before" else whole)
    assert warm.run("convert", source, target, "--overwrite").status == 0
    assert (names(target.parent), target.read_bytes()) == ([target.name], whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("step", "call"),
    [
        ("mxfp8.quant.container.part_file._create", 1),
        ("mxfp8.kernels.quantize_and_measure", 3),
        ("mxfp8.quant.container.writer.Writer._compare", 2),
        ("os.replace", 1),
    ],
)
def test_a_signal_to_end_leaves_everything_as_it_was(
    warm, source, whole, target, step, call, number
):
    target.write_bytes(OLD)
    ended = warm.run("convert", source, target, "--overwrite", at=(step, call, "before", number))
    assert (ended.status, ended.output.strip()) == (
        128 + number,
        "mxfp8 convert: interrupted; nothing unfinished was left behind",
    )
    assert (names(target.parent), target.read_bytes()) == ([target.name], OLD)


def interrupt_at_random_moments(warm, source, whole, target, rounds: int) -> None:
    """However an interrupt meets the threads, the command ends."""
    moment = random.Random(rounds)
    for _ in range(rounds):
        child = warm.start("convert", source, target)
        time.sleep(0.3 * moment.random())
        os.kill(child, moment.choice([signal.SIGINT, signal.SIGTERM]))
        hung = threading.Timer(300, os.kill, (child, signal.SIGKILL))
        hung.start()
        status = warm.wait(child).status
        hung.cancel()
        assert status != -signal.SIGKILL
        assert_absent_or_whole(target, whole, None)
        target.unlink(missing_ok=True)
    assert warm.run("convert", source, target).status == 0
    assert (names(target.parent), target.read_bytes()) == ([target.name], whole)


@pytest.mark.slow
def test_interrupts_at_40_random_moments(warm, source, whole, target):
    interrupt_at_random_moments(warm, source, whole, target, 40)


@pytest.mark.long
def test_interrupts_at_500_random_moments(warm, source, whole, target):
    interrupt_at_random_moments(warm, source, whole, target, 500)


def test_a_second_interrupt_does_not_cut_the_cleaning_short(source, tmp_path, monkeypatch):
    """Threads must have ended before the file is closed, however often the user asks."""
    interrupts, stopped = [KeyboardInterrupt, KeyboardInterrupt], []

    def sleep(seconds):
        if interrupts and threading.current_thread() is threading.main_thread():
            raise interrupts.pop()
        original(seconds)

    def slow(*arguments):
        original(0.2)
        while stopped and interrupts:  # the threads are at work when the caller waits for them
            original(0.001)
        return quantize(*arguments)

    def stop(*_):
        stopped.append(True)
        raise RuntimeError

    original, quantize = time.sleep, kernels.quantize_and_measure
    monkeypatch.setattr("mxfp8.kernels.quantize_and_measure", slow)
    monkeypatch.setattr(time, "sleep", sleep)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        convert_file(source, tmp_path / "target", progress=stop)
    assert interrupts == []
    assert threading.active_count() == before
    assert names(tmp_path) == []


@contextlib.contextmanager
def mounted(folder: Path, *options: str):
    """A file system of its own at `folder`, in memory."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


needs_root = pytest.mark.skipif(not ROOT, reason="mounting, and becoming another user, need root")


@needs_root
def test_a_disk_that_is_too_small_is_refused_at_once(warm, source, whole, tmp_path):
    with mounted(tmp_path / "disk", "-o", "size=20m") as disk:
        ended = warm.run("convert", source, disk / "target.sft")
        assert ended.status == 1
        assert ended.output == (
            f"mxfp8 convert: error: {disk / 'target.sft'}: the disk has 0.02 GB free and the file "
            "needs 0.03 GB; make room, or choose another folder\n"
        )
        assert names(disk) == []


@needs_root
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_that_fills_up_meanwhile(source, whole, tmp_path, monkeypatch, capsys, overwrite):
    monkeypatch.setattr("mxfp8.quant.conversion.convert._BUDGET", 1)  # one slab after the other
    with mounted(tmp_path / "disk", "-o", "size=32m") as disk:
        target = disk / "target.sft"
        if overwrite:
            target.write_bytes(OLD)

        def fill(*_):
            with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass

        with pytest.raises(OSError, match=r"the disk is full; make room for 0\.03 GB") as caught:
            convert_file(source, target, overwrite=overwrite, progress=fill)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(target))
        (disk / "filler").unlink()
        assert names(disk) == ["target.sft"] * overwrite
        assert not overwrite or target.read_bytes() == OLD
        assert main(["convert", str(source), str(target), "--overwrite"]) == 0
        assert (names(disk), target.read_bytes()) == (["target.sft"], whole)


def test_a_limit_on_the_size_of_files(warm, source, target):
    ended = warm.run("convert", source, target, limits={"RLIMIT_FSIZE": 10**7})
    assert ended.status == 1
    assert f"{target}: a file of 0.03 GB is over a limit of the file system" in ended.output
    assert names(target.parent) == []


class BadPlace(io.FileIO):
    """Made up: a disk that cannot read one stretch of a file."""

    def readinto(self, buffer):
        if self.begin < self.tell() < self.end:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().readinto(buffer)


@pytest.mark.parametrize("bad", ["blocks.3.lin.weight", "kept.weight"])
def test_a_place_that_cannot_be_read(source, target, monkeypatch, bad):
    monkeypatch.setattr("mxfp8.quant.conversion.convert._SLAB", 1 << 18)
    with (
        FileSource(source) as opened,
        pytest.raises(OSError, match="check the file and its disk") as e,
    ):
        opened._file.close()
        opened._file = BadPlace(source)
        info = opened.header.tensors[bad]
        opened._file.begin, opened._file.end = info.begin, info.end
        convert(opened, target, plan_source(opened))
    assert (e.value.errno, e.value.filename) == (errno.EIO, source.name)
    assert f"reading {bad!r} failed (Input/output error)" in str(e.value)
    assert names(target.parent) == []


def test_a_disk_that_cannot_sync(source, target, monkeypatch):
    """Made up: the file systems here never fail to."""

    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="writing failed; check the disk"):
        convert_file(source, target)
    assert names(target.parent) == []


def test_a_pipe_or_folder_is_no_source(warm, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        child = warm.start("convert", tmp_path / name, tmp_path / "target.sft")
        timer = threading.Timer(300, os.kill, (child, signal.SIGKILL))
        timer.start()
        ended = warm.wait(child)
        timer.cancel()
        assert (ended.status, ended.output[:22]) == (1, "mxfp8 convert: error: ")
        assert "Traceback" not in ended.output
    assert names(tmp_path) == ["pipe"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """Slabs of 128 MB, so that memory can run out at many places."""
    path = tmp_path_factory.mktemp("wide") / "wide.safetensors"
    save_file({"wide.weight": torch.ones(256, 1 << 18)}, path)
    return path


@pytest.mark.parametrize("megabytes", [0, 100, 258, 262, 266, 270, 280, 290, 300])
def test_too_little_memory(warm, wide, target, megabytes):
    """However much is missing, and wherever: a sentence, and nothing left; or it was enough."""
    ended = warm.run("convert", wide, target, limits={"RLIMIT_AS": -(megabytes << 20) - 1})
    assert "Traceback" not in ended.output
    if ended.status:
        assert (ended.status, "out of memory" in ended.output) == (1, True), ended.output
        assert names(target.parent) == []
    assert ended.status == 1 or megabytes > 258


def test_enough_memory(warm, wide, target):
    assert warm.run("convert", wide, target, limits={"RLIMIT_AS": -(1 << 30)}).status == 0


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_memory_of_any_kind(source, target, monkeypatch, error):
    def fail(slab):
        raise error

    monkeypatch.setattr("mxfp8.kernels.quantize_and_measure", fail)
    with pytest.raises(MemoryError, match=r"source\.safetensors: out of memory .* close other"):
        convert_file(source, target)
    assert names(target.parent) == []


@needs_root
def test_a_read_only_file_system(warm, source, tmp_path):
    with mounted(tmp_path / "disk", "-o", "size=64m") as disk:
        (disk / "old.sft").write_bytes(OLD)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for name in ("new.sft", "old.sft"):
            ended = warm.run("convert", source, disk / name, "--overwrite")
            said = (
                f"mxfp8 convert: error: {disk}: this folder is on a file system that is read-only"
            )
            assert (ended.status, ended.output.startswith(said)) == (1, True), ended.output
        assert (names(disk), (disk / "old.sft").read_bytes()) == (["old.sft"], OLD)


def test_a_folder_without_permission(warm, source):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        folder = Path(folder)
        shutil.copy(source, folder / "source")
        (folder / "closed").mkdir()
        for path in (folder, folder / "source", folder / "closed"):
            path.chmod(0o555)
        ended = warm.run(
            "convert", folder / "source", folder / "closed" / "x.sft", user=NOBODY if ROOT else None
        )
        said = f"mxfp8 convert: error: {folder / 'closed'}: no permission to write in this folder"
        assert (ended.status, ended.output.startswith(said)) == (1, True), ended.output
        assert names(folder / "closed") == []
        folder.chmod(0o755)


def test_no_folder(warm, source, tmp_path):
    ended = warm.run("convert", source, tmp_path / "no" / "target.sft")
    assert (
        ended.output
        == f"mxfp8 convert: error: {tmp_path / 'no'}: there is no such folder; make it first\n"
    )
    assert (ended.status, names(tmp_path)) == (1, [])


def test_a_name_that_is_too_long(warm, source, tmp_path):
    ended = warm.run("convert", source, tmp_path / ("x" * 250 + ".sft"))
    assert (ended.status, "this name is too long; shorten it" in ended.output) == (1, True)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("make", "words"),
    [(Path.mkdir, "this is a folder"), (os.mkfifo, "this is not an ordinary file")],
)
def test_what_is_no_file_is_never_replaced(warm, source, target, make, words):
    make(target)
    ended = warm.run("convert", source, target, "--overwrite")
    assert (ended.status, words in ended.output) == (1, True), ended.output
    assert names(target.parent) == [target.name]


def test_a_target_that_is_open_elsewhere_is_replaced_and_its_reader_keeps_the_old(
    warm, source, whole, target
):
    target.write_bytes(OLD)
    with target.open("rb") as reader:
        assert warm.run("convert", source, target, "--overwrite").status == 0
        assert reader.read() == OLD
    assert target.read_bytes() == whole


def test_windows_will_not_replace_what_is_open(source, target, monkeypatch, capsys):
    """Made up after Windows, where it has not been run."""

    def refuse(*_):
        raise PermissionError(errno.EACCES, "The process cannot access the file")

    target.write_bytes(OLD)
    monkeypatch.setattr(os, "replace", refuse)
    assert main(["convert", str(source), str(target), "--overwrite"]) == 1
    assert "close the program that has it open" in capsys.readouterr().err
    assert (names(target.parent), target.read_bytes()) == ([target.name], OLD)


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_conversions_to_one_target_the_second_is_refused(
    warm, source, whole, target, overwrite
):
    options = ["--overwrite"] * overwrite
    if overwrite:
        target.write_bytes(OLD)
    at = ("mxfp8.quant.container.writer._pwrite", 5, "before", signal.SIGSTOP)
    first = warm.start("convert", source, target, *options, at=at)
    try:
        assert warm.wait(first).status == -signal.SIGSTOP
        for _ in range(2):
            second = warm.run("convert", source, target, *options)
            assert second.status == 1
            assert f"{target}: another conversion is writing this file; wait" in second.output
        assert len(names(target.parent)) == 1 + overwrite
    finally:
        os.kill(first, signal.SIGCONT)
    assert warm.wait(first).status == 0
    assert (names(target.parent), target.read_bytes()) == ([target.name], whole)


def test_conversions_to_other_targets_in_the_same_folder_go_on(warm, source, whole, target):
    at = ("mxfp8.quant.container.writer._pwrite", 5, "before", signal.SIGSTOP)
    first = warm.start("convert", source, target, at=at)
    try:
        assert warm.wait(first).status == -signal.SIGSTOP
        other = target.with_name("other.sft")
        assert warm.run("convert", source, other).status == 0
    finally:
        os.kill(first, signal.SIGCONT)
    assert warm.wait(first).status == 0
    assert other.read_bytes() == target.read_bytes() == whole


@pytest.mark.parametrize("left", [False, True])
def test_of_many_writers_at_once_exactly_one_succeeds(target, left):
    part = target.with_name(target.name + SUFFIX)
    for _ in range(20):
        together, files, refused = threading.Barrier(6), [], []
        if left:
            part.write_bytes(OLD)

        def write(together=together, files=files, refused=refused):
            together.wait()
            try:
                files.append(create_part_file(target))
            except OSError as error:
                refused.append(error.errno)

        threads = [threading.Thread(target=write) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(files), refused) == (1, [errno.EBUSY] * 5)
        ((path, file),) = files
        assert (path, names(target.parent), path.read_bytes()) == (part, [part.name], b"")
        file.close()
        path.unlink()


def write_one_byte(target) -> None:
    with Writer(target, [("a", "U8", (1,))], {}) as writer:
        writer.write("a", b"a")


def test_only_what_a_dead_writer_left_is_deleted(target):
    part = target.name + SUFFIX
    others = [f"{target.name}.part", f"{part}.bak", f"a{part}", f"{target.name}2{SUFFIX}"]
    for name in (part, *others):
        target.with_name(name).write_bytes(OLD)
    write_one_byte(target)
    assert names(target.parent) == sorted([*others, target.name])


def test_a_finished_file_survives_the_part_file_that_is_a_second_name_for_it(target):
    """What a writer leaves that dies after the file has its name and before the part file went."""
    target.write_bytes(OLD)
    os.link(target, target.with_name(target.name + SUFFIX))
    with pytest.raises(FileExistsError):
        write_one_byte(target)
    assert (names(target.parent), target.read_bytes()) == ([target.name], OLD)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("other")])
def test_something_else_under_the_name_of_a_part_file_is_kept(target, make):
    make(target.with_name(target.name + SUFFIX))
    with pytest.raises(OSError, match=f"'{target.name}{SUFFIX}' is in the way"):
        write_one_byte(target)
    assert names(target.parent) == [target.name + SUFFIX]


def test_a_file_system_without_locks_keeps_what_may_be_alive(target, monkeypatch):
    """Made up: the file systems here have locks."""

    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(part_file.fcntl, "flock", refuse)
    part = target.with_name(target.name + SUFFIX)
    part.write_bytes(OLD)
    with pytest.raises(OSError, match="cannot tell whether a conversion is writing it; delete it"):
        write_one_byte(target)
    assert part.read_bytes() == OLD
    part.unlink()
    write_one_byte(target)
    assert names(target.parent) == [target.name]


def test_a_file_taken_for_dead_before_it_was_locked(target, monkeypatch):
    """Another writer may come between creating and locking, and takes the file for a leftover."""

    def too_late(descriptor):
        (path,) = target.parent.iterdir()
        path.unlink()
        path.write_bytes(OLD)  # the other's
        return lock(descriptor)

    lock = part_file._lock
    monkeypatch.setattr(part_file, "_lock", too_late)
    with pytest.raises(OSError, match="another conversion is writing this file"):
        create_part_file(target)
    assert names(target.parent) == [target.name + SUFFIX]


def test_a_leftover_that_another_writer_replaced_meanwhile_is_not_deleted(target, monkeypatch):
    """Between opening and locking it: the lock is on the old file, the name is of the new one."""

    def too_late(descriptor):
        monkeypatch.undo()
        part.unlink()
        others.append(create_part_file(target))
        return lock(descriptor)

    part, others, lock = target.with_name(target.name + SUFFIX), [], part_file._lock
    part.write_bytes(OLD)
    monkeypatch.setattr(part_file, "_lock", too_late)
    with pytest.raises(OSError, match="another conversion is writing this file"):
        create_part_file(target)
    assert names(target.parent) == [part.name]
    others[0][1].close()


def test_a_model_named_like_a_part_file_is_neither_source_nor_target_of_that_name(tmp_path):
    source = tmp_path / f"out.safetensors{SUFFIX}"
    save_file({"a.weight": matrix(32, 64)}, source)
    before = source.read_bytes()
    with pytest.raises(ValueError, match="would replace the source"):
        convert_file(source, tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="is for unfinished files; give another name"):
        write_one_byte(tmp_path / f"a{SUFFIX}")
    assert (names(tmp_path), source.read_bytes()) == ([source.name], before)


@pytest.mark.parametrize("ending", ["cancelled", "published"])
def test_a_writer_whose_part_file_was_deleted_leaves_the_next_one_alone(target, ending):
    """Someone deletes it; the next writer of this target has a part file of the same name."""
    first, second = (Writer(target, [("a", "U8", (1,))], {}) for _ in range(2))
    first.__enter__()
    first.write("a", b"a")
    first.part_file.unlink()
    with second:
        second.write("a", b"a")
        if ending == "cancelled":
            first.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        else:
            with pytest.raises(OSError, match="was deleted while it was written"):
                first._publish()
            first._discard()
    assert names(target.parent) == [target.name]


def test_an_interrupt_after_the_file_has_its_name_is_an_interrupt(target, monkeypatch):
    def interrupted(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("mxfp8.quant.container.writer.sync_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_one_byte(target)
    assert names(target.parent) == [target.name]


@pytest.fixture
def shared():
    """A folder that another user may enter, with a small model in it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        save_file({"a.weight": matrix(32, 64)}, folder / "source")
        (folder / "source").chmod(0o644)
        (folder / "out").mkdir()
        yield folder


@needs_root
def test_a_folder_that_can_be_written_but_not_read_gets_the_file(warm, shared):
    (shared / "out").chmod(0o333)
    ended = warm.run("convert", shared / "source", shared / "out" / "new.sft", user=NOBODY)
    assert ended.status == 0, ended.output
    assert names(shared / "out") == ["new.sft"]


@needs_root
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666])
def test_what_another_user_left_in_a_shared_folder_is_named(warm, shared, mode):
    part = shared / "out" / f"new.sft{SUFFIX}"
    part.write_bytes(b"")
    part.chmod(mode)
    (shared / "out").chmod(0o1777)  # as /tmp: only its owner may delete a file
    ended = warm.run("convert", shared / "source", shared / "out" / "new.sft", user=NOBODY)
    assert ended.status == 1
    assert f"'new.sft{SUFFIX}' is in the way" in ended.output
    assert names(shared / "out") == [part.name]


def test_windows_deletes_what_nobody_holds(target, monkeypatch):
    """The path for Windows, which has not been run there: an open file cannot be deleted."""
    monkeypatch.setattr(part_file, "fcntl", None)
    part = target.with_name(target.name + SUFFIX)
    part.write_bytes(OLD)
    path, file = create_part_file(target)
    assert (names(target.parent), path.read_bytes()) == ([part.name], b"")

    def held(self, missing_ok=False):
        raise PermissionError(errno.EACCES, "The process cannot access the file")

    monkeypatch.setattr(Path, "unlink", held)
    with pytest.raises(OSError, match="another conversion is writing this file"):
        create_part_file(target)
    assert names(target.parent) == [part.name]
    file.close()


def test_the_file_has_the_tensors_of_its_source(source, whole, tmp_path):
    """That what the rounds above call whole is a conversion."""
    (tmp_path / "whole").write_bytes(whole)
    tensors, kept = load(tmp_path / "whole")[0], load(source)[0]["kept.weight"]
    assert raw(tensors["kept.weight"]) == raw(kept)
    assert sum(key.endswith(".comfy_quant") for key in tensors) == 10
