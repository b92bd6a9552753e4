"""README and docs: what a reader may paste runs, in the order in which it stands there.

Blocks marked ```python and ```bash run; the latter hold `mxfp8` commands, which must end with
status 0. ```console and ```text mark what is not run: installing, Windows, a GPU, output.
"""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bad_files import draft
from diffusers_names import rename, zimage_state
from model_folders import write_shards
from safetensors.torch import save_file
from torch import nn

from mxfp8.quant.budget.probing import probe_module
from mxfp8.quant.cli import main
from mxfp8.quant.conversion.calibration import calibrate
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.linear import quantize_linears

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
RUN, NOT_RUN = ("python", "bash"), ("console", "text", "json", "mermaid")


def blocks(text: str) -> list[tuple[int, str, str]]:
    """(number of the first line, language, content) of every fenced block."""
    return [
        (
            text.count("\n", 0, match.start(3)) + 1,
            match[2],
            re.sub(rf"(?m)^{match[1]}", "", match[3]),
        )
        for match in FENCE.finditer(text)
    ]


def commands(content: str) -> list[list[str]]:
    """The words of each command of a shell block."""
    lines = content.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with the files that commands in the documents read."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).eval()
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    inputs = [{"input": torch.randn(64, 256)} for _ in range(4)]
    sensitivity = probe_module(module, inputs, lambda m, batch: m(**batch), ["0", "2"])
    found = replace(calibrate(module, inputs), sensitivity=sensitivity)
    found.save(tmp_path / "calibration.safetensors")
    convert_file(tmp_path / "model.safetensors", tmp_path / "model-mxfp8.safetensors")
    lost = draft(tmp_path / "model-mxfp8.safetensors")
    lost.unmark()
    (tmp_path / "lost-markers.safetensors").write_bytes(lost.encode())
    index = "diffusion_pytorch_model.safetensors.index.json"
    parts = tmp_path / "Z-Image-Turbo"
    write_shards(parts / "transformer", rename("zimage", zimage_state()), index=index)
    (parts / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    (parts / "transformer" / "config.json").write_text(
        '{"_class_name": "ZImageTransformer2DModel"}'
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_diffusers(folder: Path) -> None:
    """A Z-Image pipeline's transformer and text encoder, which their libraries can build."""
    import transformers
    from diffusers_models import KINDS, write  # 10 s to import, for one document

    kind, parts = KINDS["Z-Image"], folder / "Z-Image-Turbo"
    files = write(kind, folder)
    files.mxfp8.rename(folder / "z-image-turbo-mxfp8.safetensors")
    shutil.rmtree(parts / "transformer")
    model = kind.cls.from_single_file(str(files.original), config=str(folder))
    model.save_pretrained(parts / "transformer")
    config = transformers.Qwen3Config(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    encoder = transformers.Qwen3Model(config).to(torch.bfloat16)
    encoder.save_pretrained(parts / "text_encoder")
    quantize_linears(encoder)
    state = {f"model.{key}": value.clone() for key, value in encoder.state_dict().items()}
    save_file(state, folder / "qwen_3_4b-mxfp8.safetensors")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_shows_runs_as_pasted(document, folder):
    text = document.read_text(encoding="utf-8")
    if "import diffusers" in text or "from diffusers" in text:
        write_diffusers(folder)
    found = blocks(text)
    assert 2 * len(found) == len(re.findall(r"(?m)^ *```", text)), "a block is not closed"
    namespace: dict = {"__name__": "__main__"}
    for line, language, content in found:
        where = f"{document.name}:{line}"
        if language == "python":
            # As many empty lines before it as in the document, for the traceback.
            code = compile("\n" * (line - 1) + content, document, "exec")
            exec(code, namespace)  # noqa: S102
        elif language == "bash":
            for words in commands(content):
                assert words[0] == "mxfp8", f"{where}: only mxfp8 runs here, not {words[0]}"
                assert main(words[1:]) == 0, f"{where}: {shlex.join(words)}"
        else:
            assert language in NOT_RUN, f"{where}: mark the block {RUN} or {NOT_RUN}"
            hidden = re.search(r"(?m)^(mxfp8 |from mxfp8|import mxfp8)", content)
            assert not hidden, f"{where}: mark what can run {RUN}"


def anchors(text: str) -> set[str]:
    """What links can name in a document: its headings, as GitHub names them."""
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "document",
    [*DOCUMENTS, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))],
    ids=lambda path: path.name,
)
def test_links_between_documents_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:", link):
            name, _, anchor = link.partition("#")
            target = document.parent / name if name else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_documents_have_such_blocks():
    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    languages = [language for text in texts for _, language, _ in blocks(text)]
    assert all(languages.count(language) >= 5 for language in RUN)


def test_blocks_are_found_with_their_lines_and_words():
    shell = "  ```bash\n  mxfp8 convert a \\\n    'b c'  # d\n  # e\n  ```\n"
    found = blocks("a\n```python\nx = 1\n```\n- b\n" + shell)
    assert found == [
        (3, "python", "x = 1\n"),
        (7, "bash", "mxfp8 convert a \\\n  'b c'  # d\n# e\n"),
    ]
    assert commands(found[1][2]) == [["mxfp8", "convert", "a", "b c"]]
