"""The pages that ComfyUI has had: of its oldest supported version, the pinned one, the newest."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import pytest
from browser import NEWEST_PAGE
from comfyui import Server, fetch_package
from versions import ends

PAGES = ("oldest", "pinned", "newest")


@pytest.fixture(scope="session")
def with_page(comfy, tmp_path_factory) -> Callable[[str], Server]:
    """A function: the server with one of PAGES, which is started when it is first asked for."""
    started = {"pinned": comfy}
    with contextlib.ExitStack() as servers:

        def serve(name: str) -> Server:
            if name not in started:
                version = NEWEST_PAGE if name == "newest" else oldest_page()
                page = fetch_package("comfyui-frontend-package", version)
                base = tmp_path_factory.mktemp(name)
                (base / "models").symlink_to(comfy.base / "models")
                static = page / "comfyui_frontend_package" / "static"
                server = Server(base, arguments=("--front-end-root", str(static)))
                started[name] = servers.enter_context(server)
            return started[name]

        yield serve


@pytest.fixture(scope="module", params=PAGES)
def served(request, with_page) -> Server:
    return with_page(request.param)


def oldest_page() -> str:
    text = (ends()[1].release.path / "requirements.txt").read_text(encoding="utf-8")
    return re.search(r"^comfyui-frontend-package==(\S+)", text, re.MULTILINE)[1]
