"""Runs of the command in forked children of a process that has torch already: 20 ms instead of 2 s.
Or of scripts that use ComfyUI's modules, which take 10 s of CPU time to import.

    python tests/support/warm.py FOLDER [COMFYUI]     (by `Warm`, in lines of JSON)

A child can be told to send itself a signal at the n-th call of a function, so that a test can kill,
stop or interrupt it exactly there, or to live under limits of memory, file size or permission.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit status, negative for a signal, and what it printed."""

    status: int
    output: str


class Warm:
    """The parent process, a context manager.

    Args:
        comfyui: where ComfyUI is, to run scripts; else it is the command that runs.
    """

    def __init__(self, comfyui: Path | None = None):
        self._comfyui = [] if comfyui is None else [comfyui]

    def __enter__(self) -> Warm:
        self._folder = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._folder.name, *self._comfyui],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout.readline() == '"ready"\n'
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def _ask(self, **request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, *words, at=None, limits=None, user=None) -> int:
        """Start `mxfp8 words...` or `python words...`; returns the process id.

        Args:
            at: (function, n, "before" or "after", signal): what the child does to itself.
            limits: {name in `resource`: value}; a negative RLIMIT_AS is what may be added to the
                memory that the child begins with.
            user: id to become.
        """
        words = [str(word) for word in words]
        return self._ask(do="start", words=words, at=at, limits=limits or {}, user=user)

    def wait(self, child: int) -> Ended:
        """Wait for a child to end or to be stopped (status -SIGSTOP)."""
        status = self._ask(do="wait", child=child)
        output = Path(self._folder.name, str(child))  # missing if it was killed right away
        text = output.read_text() if output.exists() else ""
        if status != -signal.SIGSTOP:
            output.unlink(missing_ok=True)  # another child may get its number
        return Ended(status, text)

    def run(self, *words, **how) -> Ended:
        """`start` and `wait`."""
        return self.wait(self.start(*words, **how))


def _serve(folder: str, *comfyui: str) -> None:
    import torch

    # No threads of torch's own: they would not survive the fork.
    torch.set_num_threads(1)
    main = _scripts(*comfyui) if comfyui else _command()
    _answer("ready")
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "start":
            child = os.fork()
            if child == 0:
                _be(main, folder, request)
            answer = child
        else:
            _, status = os.waitpid(request["child"], os.WUNTRACED)
            stopped = os.WIFSTOPPED(status)
            answer = -os.WSTOPSIG(status) if stopped else os.waitstatus_to_exitcode(status)
        _answer(answer)


def _command():
    from mxfp8.kernels import sqnr
    from mxfp8.quant import cli
    from mxfp8.quant.conversion import convert

    assert sqnr and convert
    return cli.main


def _scripts(comfyui: str):
    sys.argv = ["main.py", "--cpu"]
    sys.path.insert(0, comfyui)
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd

    assert comfy.sd

    def run(words: list[str]) -> int:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


def _answer(value) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _be(main, folder: str, request: dict) -> None:
    """The child: becomes what was asked for, runs the command, never returns."""
    status = 99
    try:
        output = os.open(Path(folder, str(os.getpid())), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
        if request["at"]:
            _signal_oneself(*request["at"])
        _limit(request["limits"])
        if request["user"] is not None:
            os.setgid(request["user"])
            os.setuid(request["user"])
        with contextlib.suppress(SystemExit):
            status = main(request["words"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _signal_oneself(function: str, n: int, when: str, number: int) -> None:
    """Have the n-th call of a function come with a signal, before or after it."""
    import pkgutil

    owner_name, _, name = function.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    original = getattr(owner, name)
    calls = 0

    def counted(*arguments, **more):
        nonlocal calls
        calls += 1
        mine = calls == n
        if mine and when == "before":
            os.kill(os.getpid(), number)
        result = original(*arguments, **more)
        if mine and when == "after":
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, counted)


def _limit(limits: dict[str, int]) -> None:
    import resource

    for name, value in limits.items():
        if name == "RLIMIT_AS" and value < 0:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            value = pages * os.sysconf("SC_PAGE_SIZE") - value
        resource.setrlimit(getattr(resource, name), (value, value))


if __name__ == "__main__":
    _serve(*sys.argv[1:])
