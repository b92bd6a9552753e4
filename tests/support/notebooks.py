"""The notebooks of docs/notebooks: their cells, and a run of them with other parameters.

A run happens in an environment of its own, which sees the tests' packages and in which the notebook
may install. Repositories and the Hugging Face Hub are local: a notebook's addresses are parameters.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import http.server
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from pack import ROOT, environment

FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
COMMIT = "0" * 40  # of the local hub's files; it has no history


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """Id -> source of every code cell, in order."""
    return {cell.id: cell.source for cell in notebook.cells if cell.cell_type == "code"}


def with_parameters(notebook: nbformat.NotebookNode, values: dict) -> nbformat.NotebookNode:
    """A copy with a cell behind the one tagged `parameters` that assigns other values; as papermill
    does it, no cell is changed.

    Raises:
        ValueError: the tagged cell does not assign one of these names.
    """
    notebook = copy.deepcopy(notebook)
    tagged = (i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", ()))
    (index,) = tagged
    known: dict = {}
    exec(notebook.cells[index].source, known)  # noqa: S102
    if unknown := values.keys() - known.keys():
        raise ValueError(f"the cell of parameters assigns no {sorted(unknown)}")
    source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(source))
    return notebook


def execute(notebook: nbformat.NotebookNode, folder: Path, variables: dict[str, str]) -> None:
    """Run all cells in a folder, by a kernel of a new environment; outputs go into the notebook.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    python, _ = environment(folder / "venv")
    kernel = folder / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    kernel.write_text(
        json.dumps({
            "argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "", "language": "python",
            "env": {"PATH": path, "PYTHONPATH": "", **variables},
        }),
        encoding="utf-8",
    )  # fmt: skip
    work = folder / "work"
    work.mkdir()
    previous = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = str(folder / "jupyter")
    try:
        NotebookClient(
            notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": work}}
        ).execute()
    finally:
        del os.environ["JUPYTER_PATH"]
        if previous is not None:
            os.environ["JUPYTER_PATH"] = previous


def printed(notebook: nbformat.NotebookNode, cell: str) -> str:
    """What a cell printed to standard output; progress goes to standard error."""
    (found,) = (c for c in notebook.cells if c.id == cell)
    return "".join(output.text for output in found.outputs if output.get("name") == "stdout")


def repository(files: Path, target: Path, tag: str | None = None) -> str:
    """A git repository with one commit, of the files that git has or would add in a folder.

    Returns:
        Its address.
    """
    identity = "-c", "user.name=tests", "-c", "user.email=tests@localhost"
    git = "git", "-c", "safe.directory=*", *identity, "--git-dir", target, "--work-tree", files
    tagging = [["tag", tag]] if tag else []
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "Files"], *tagging):
        subprocess.run(list(map(str, [*git, *command])), cwd=files, check=True)
    return target.as_uri()


class _HubHandler(http.server.SimpleHTTPRequestHandler):
    """Serves OWNER/NAME/resolve/main/FILE with what huggingface_hub wants to know of a file."""

    def end_headers(self) -> None:
        self.send_header("ETag", f'"{hashlib.sha256(self.path.encode()).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        super().end_headers()

    def log_message(self, *_) -> None:
        pass


@contextlib.contextmanager
def hub(folder: Path) -> Iterator[str]:
    """The address of a Hugging Face Hub that has the files of a folder."""
    handler = partial(_HubHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
