"""Publishing: the registry's own checks of the pack, and an install as ComfyUI-Manager does it.

`comfy node pack` makes the archive that `comfy node publish` would send. ComfyUI-Manager's code
unpacks it and installs its requirements into a virtual environment of its own, in which the tests'
packages can be imported but not changed, and a real ComfyUI starts from there. Unlike the other
tests' server, it has no package `mxfp8` to fall back on, and neither tests nor bench.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from comfyui import REGISTRY_FOLDER, ROOT, TESTS, Server, cache, comfyui_path
from pack import SOURCES, environment

WORKFLOWS = ROOT / ".github" / "workflows"
ROOMS = ("kernels", "quant", "integrations", "nodes")


def node_ids() -> set[str]:
    """What nodes/extension.py registers, read from the source: it imports ComfyUI."""
    tree = ast.parse((ROOT / "nodes" / "extension.py").read_text(encoding="utf-8"))
    (nodes,) = (n.value for n in tree.body if isinstance(n, ast.AnnAssign))
    return {element.id for element in nodes.elts}


def setting(name: str) -> str:
    """A string in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(rf'^{name} = "(.+)"$', text, re.MULTILINE)[1]


@pytest.fixture(scope="module")
def tools() -> Path:
    """A folder with the packages of registry.txt, to come first on PYTHONPATH."""
    wanted = TESTS / "registry.txt"
    folder = cache() / f"registry-{hashlib.sha256(wanted.read_bytes()).hexdigest()[:16]}"
    if not folder.is_dir():
        cache().mkdir(parents=True, exist_ok=True)
        fresh = folder.with_suffix(".fresh")
        shutil.rmtree(fresh, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--target", fresh]
        subprocess.run([*command, "-r", wanted], check=True)
        fresh.rename(folder)
    return folder


def run(*command, tools: Path, cwd: Path, python=sys.executable) -> str:
    """The output of a tool, run in a home folder of its own."""
    variables = {
        "PYTHONPATH": str(tools), "HOME": str(cwd.parent), "COMFYUI_PATH": str(comfyui_path()),
        "PYTHONDONTWRITEBYTECODE": "", "NO_COLOR": "1", "COLUMNS": "200",
    }  # fmt: skip
    done = subprocess.run(
        [python, *command], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def comfy_cli(command: str, tools: Path, cwd: Path) -> str:
    skip = "--skip-prompt", "--no-enable-telemetry"
    return run("-m", "comfy_cli", *skip, "node", command, tools=tools, cwd=cwd)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The files that git has or would add, in a repository of their own."""
    git = "git", "-c", "safe.directory=*"
    listed = subprocess.check_output(
        [*git, "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, text=True
    )
    folder = tmp_path_factory.mktemp("publishing") / "checkout"
    for name in filter(lambda name: (ROOT / name).is_file(), listed.rstrip("\0").split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def archive(checkout, tools) -> Path:
    """What the registry would get."""
    comfy_cli("pack", tools, checkout)
    return checkout / "node.zip"


@pytest.fixture(scope="module")
def unpacked(archive, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
    return folder


def test_comfy_cli_has_nothing_to_say_against_publishing(checkout, tools):
    output = comfy_cli("validate", tools, checkout)
    assert "All validation checks passed successfully" in output
    assert "arning" not in output, output


def test_comfy_test_finds_nothing_in_the_archive(unpacked, tools):
    """Its levels "syntax" and "javascript": what breaks Windows, or other packs in the browser."""
    found = json.loads(
        run("-m", "comfy_test", "lint", "--strict", "--json", ".", tools=tools, cwd=unpacked)
    )
    assert found["passed"], found["results"]
    assert found["results"]["javascript"]["summary"] == {"errors": 0, "warnings": 0}


def test_the_archive_holds_what_comfyui_reads_and_no_more(archive, unpacked):
    with zipfile.ZipFile(archive) as opened:
        names = {info.filename for info in opened.infolist() if not info.is_dir()}
    assert {name.split("/")[0] for name in names if "/" in name} == {
        *ROOMS, "web", "locales", "example_workflows", "subgraphs",
    }  # fmt: skip
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"} <= names
    # Thus test_security.py has looked at all of it.
    assert {name for name in names if name.endswith(".py")} == {
        str(path.relative_to(ROOT)) for path in SOURCES
    }
    assert archive.stat().st_size < 2**20


def test_the_package_takes_along_every_file_of_its_rooms():
    """`pip install .` copies Python files, and of the others those that pyproject.toml names."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.search(r"^packages = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)[1]
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    names = {f"mxfp8.{'.'.join(f.relative_to(ROOT).parts)}": f for f in folders}
    assert sorted(ast.literal_eval(packages)) == sorted(["mxfp8", *names])
    for name, folder in names.items():
        assert (folder / "__init__.py").is_file(), name
        data = re.search(rf'^"{name}" = (\[.*\])$', text, re.MULTILINE)
        others = {p.name for p in folder.iterdir() if p.is_file() and p.suffix != ".py"}
        patterns = ast.literal_eval(data[1]) if data else []
        assert others == {p.name for pattern in patterns for p in folder.glob(pattern)}, name
    for room in ROOMS:  # and no file lies outside these packages
        inner = {p.parent for p in (ROOT / room).rglob("*") if p.is_file()}
        assert {f for f in inner if f.name != "__pycache__"} <= folders


def test_the_icon_is_what_the_registry_takes():
    assert setting("Icon").endswith("/main/docs/icon.png")
    image = (ROOT / "docs" / "icon.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", image[16:24]) == (400, 400)


def test_the_web_folder_is_declared_once():
    """ComfyUI would load its scripts for [tool.comfy] web and for WEB_DIRECTORY."""
    assert 'WEB_DIRECTORY = "./web"' in (ROOT / "__init__.py").read_text(encoding="utf-8")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (section,) = re.findall(r"^\[tool\.comfy\]\n(.*?)^\[", text, re.MULTILINE | re.DOTALL)
    assert "PublisherId" in section and not re.search(r"^web\b", section, re.MULTILINE)


def steps(workflow: str) -> list[dict]:
    jobs = yaml.safe_load((WORKFLOWS / workflow).read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job.get("steps", [])]


@pytest.mark.parametrize("path", sorted(WORKFLOWS.iterdir()), ids=lambda path: path.name)
def test_a_workflow_may_only_read_and_runs_pinned_actions(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in content["jobs"].values())
    used = [step["uses"] for step in steps(path.name) if "uses" in step]
    assert used
    assert [name for name in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", name)] == []


@pytest.mark.parametrize(
    ("before", "changed"),
    [("0.0.9", "true"), ("0.1.0", "false"), (None, "true")],
    ids=["another version", "the same version", "a first push"],
)
def test_a_push_publishes_when_it_changes_the_version(tmp_path, before, changed):
    (step,) = (step for step in steps("publish.yml") if step.get("id") == "compare")
    git = "git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"
    subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)
    for version in [before or "0.0.9", "0.1.0"]:
        (tmp_path / "pyproject.toml").write_text(
            f'[project]\nname = "mxfp8"\nversion = "{version}"\n[tool.ruff]\ntarget-version = "a"\n'
        )
        subprocess.run([*git, "add", "."], cwd=tmp_path, check=True)
        commit = [*git, "commit", "-q", "--allow-empty", "-m", version]
        subprocess.run(commit, cwd=tmp_path, check=True)
    output = tmp_path / "output"
    variables = {"GITHUB_OUTPUT": str(output), "BEFORE": "HEAD~1" if before else "0" * 40}
    subprocess.run(
        ["bash", "-e", "-c", step["run"]], cwd=tmp_path, check=True, stderr=subprocess.DEVNULL,
        env={**os.environ, **variables},
    )  # fmt: skip
    assert output.read_text() == f"changed={changed}\n"


# ComfyUI-Manager's command line prepares what it forbids and renames; then its own code unpacks an
# archive and installs what it asks for. Prints the installed packages before and after each.
INSTALL = """
import json, sys
import cm_cli.__main__ as cli
from comfyui_manager.common import manager_util

def installed():
    return manager_util.get_installed_packages(renew=True)

cli.cmd_ctx.set_user_directory(sys.argv[1])
results = [installed()]
for archive, folder in zip(sys.argv[2::2], sys.argv[3::2]):
    assert manager_util.extract_package_as_zip(archive, folder)
    assert cli.unified_manager.execute_install_script("mxfp8", folder, instant_execution=True)
    results.append(installed())
print("\\n" + json.dumps(results))
"""


@dataclass(frozen=True)
class Installed:
    """A base folder of ComfyUI into which ComfyUI-Manager has put the pack."""

    base: Path
    python: Path
    packages: list[dict[str, str]]  # before, after the pack, after one with a requirement


def greedy_pack(folder: Path) -> Path:
    """An archive whose requirements.txt asks for a package, on a line between others."""
    wheel = folder / "asked_for-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        info = "asked_for-1.0.dist-info"
        made.writestr("asked_for.py", "")
        made.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: asked-for\nVersion: 1.0\n")
        made.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        made.writestr(f"{info}/RECORD", "")
    archive = folder / "greedy.zip"
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("requirements.txt", f"# a comment\n\n{wheel}\n")
    return archive


@pytest.fixture(scope="module")
def installed(archive, tools, tmp_path_factory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    base = folder / "base"
    target = base / "custom_nodes" / REGISTRY_FOLDER
    greedy = folder / "greedy"
    for made in (target, greedy, folder / "user"):
        made.mkdir(parents=True)
    python, site_packages = environment(folder / "venv")
    before = sorted(site_packages.iterdir())
    output = run(
        "-c", INSTALL, folder / "user", archive, target, greedy_pack(folder), greedy,
        tools=tools, cwd=folder / "user", python=python,
    )  # fmt: skip
    added = {path.name for path in set(site_packages.iterdir()) - set(before)}
    assert {name for name in added if not name.startswith(("asked_for", "__pycache__"))} == set()
    return Installed(base, python, json.loads(output.splitlines()[-1]))


@pytest.mark.comfy
def test_an_install_by_the_manager_changes_no_package(installed):
    before, after, after_another = installed.packages
    assert after == before
    assert before["torch"] == importlib.metadata.version("torch")
    # The comparison sees what a line of requirements.txt installs.
    assert set(after_another) - set(before) == {"asked_for"}


@pytest.fixture(scope="module")
def server(installed):
    with Server(installed.base, python=installed.python) as started:
        yield started


@pytest.mark.comfy
def test_comfyui_starts_with_the_installed_pack_and_lists_every_node(server):
    log = server.log.read_text(errors="replace")
    assert re.search(rf" seconds: \S+/{REGISTRY_FOLDER}$", log, re.MULTILINE), log
    for complaint in ("IMPORT FAILED", "Traceback", "Unable to parse pyproject.toml"):
        assert complaint not in log, log
    ours = {
        name: node for name, node in server.get("/object_info").items()
        if node["python_module"] == f"custom_nodes.{REGISTRY_FOLDER}"
    }  # fmt: skip
    assert set(ours) == node_ids()
    torch = server.get("/system_stats")["system"]["pytorch_version"]
    assert torch.split("+")[0] == importlib.metadata.version("torch").split("+")[0]


@pytest.mark.comfy
def test_the_browser_gets_the_packs_script_and_templates(server):
    scripts = [name for name in server.get("/extensions") if REGISTRY_FOLDER in name.lower()]
    assert scripts == [f"/extensions/{REGISTRY_FOLDER}/mxfp8.js"]
    examples = ROOT / "example_workflows"
    names = {path.stem for path in examples.glob("*.json")}
    assert names
    assert set(server.get("/workflow_templates")[REGISTRY_FOLDER]) == names
    for path in examples.iterdir():
        assert path.stem in names, f"{path.name} belongs to no example"
        url = f"{server.url}/api/workflow_templates/{REGISTRY_FOLDER}/{quote(path.name)}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert answer.read() == path.read_bytes()


# ComfyUI as it is when it comes to custom nodes; then, each in a fork of its own, the pack.
START = """
import asyncio, os, sys, time

comfyui, pack = sys.argv[1:3]
sys.argv = [os.path.join(comfyui, "main.py"), "--cpu"]
sys.path.insert(0, comfyui)
import comfy.options
comfy.options.enable_args_parsing()
import nodes
begin = time.process_time()
asyncio.run(nodes.init_builtin_extra_nodes())
print("ComfyUI", time.process_time() - begin, flush=True)
for _ in range(7):
    if not (child := os.fork()):
        begin = time.process_time()
        assert asyncio.run(nodes.load_custom_node(pack))
        print("MXFP8", time.process_time() - begin, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.comfy
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_the_pack_starts_in_a_sixth_of_the_time_of_comfyuis_own_extra_nodes(installed, tools):
    """Of their CPU time, as other programs slow the clock: 0.3 s where those take 1.9 s. The median
    of seven starts. The first compiles the pack to bytecode, which the others find."""
    pack = installed.base / "custom_nodes" / REGISTRY_FOLDER
    output = run(
        "-c", START, comfyui_path(), pack,
        tools=tools, cwd=installed.base, python=installed.python,
    )  # fmt: skip
    stock, *times = map(float, re.findall(r"^(?:ComfyUI|MXFP8) (\S+)$", output, re.MULTILINE))
    assert len(times) == 7
    assert statistics.median(times) <= stock / 6, (stock, times)
