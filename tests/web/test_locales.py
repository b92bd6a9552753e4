"""Texts in other languages: none is missing, left over, or older than the English it translates.

`make locales` writes what can be written, and lists the rest: tests/support/translations.py.
"""

from __future__ import annotations

import re
import urllib.request

import pytest
import translations
from browser import ComfyPage
from markdown_it import MarkdownIt

pytestmark = pytest.mark.comfy

CODE = re.compile(r"`([^`]+)`")
BOLD = re.compile(r"\*\*([^*]+)\*\*")


@pytest.fixture(scope="module")
def english(comfy, browser) -> dict[str, str]:
    """Every English text of nodes, settings and help pages."""
    info = comfy.get("/object_info")
    nodes = {n: i for n, i in info.items() if i["python_module"] == "custom_nodes.ComfyUI-MXFP8"}
    shown = ComfyPage(browser, comfy, nodes2=False)
    texts = translations.texts_of(nodes, shown.page)
    shown.close()
    assert len(nodes) > 10
    return texts | translations.help_pages("en")


@pytest.fixture(scope="module")
def chinese() -> dict[str, str]:
    return translations.stored("zh") | translations.help_pages("zh")


def test_locales_en_has_the_texts_of_the_code(english):
    code = {k: t for k, t in english.items() if not k.endswith(".md")}
    for key in translations.QUOTING:
        del code[key]
    assert translations.stored("en") == code, "run `make locales`"


def test_every_text_is_in_chinese_and_newer_than_its_english(english, chinese):
    left = translations.problems(english, chinese, translations.read_record())
    assert not left, "\n".join(["to do, then `make locales`:", *left])


def test_comfyui_serves_both(comfy, chinese):
    served = comfy.get("/i18n")
    for language in ("en", "zh"):
        titles = {
            name: node["display_name"]
            for name, node in served[language]["nodeDefs"].items()
            if name.startswith("MXFP8")
        }
        stored = translations.stored(language)
        assert titles == {
            key.split(".")[1]: text
            for key, text in stored.items()
            if key.startswith("nodeDefs.") and key.endswith(".display_name")
        }
    url = f"{comfy.url}/extensions/ComfyUI-MXFP8/docs/MXFP8InspectFile/zh.md"
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert answer.read().decode() == chinese["web/docs/MXFP8InspectFile.md"]


def test_texts_hold_nothing_that_the_page_takes_as_syntax():
    for language in ("en", "zh"):
        for key, text in translations.stored(language).items():
            assert text and not translations.SYNTAX.search(text), key


def test_values_in_texts_are_the_same_in_both(english, chinese):
    for key, text in english.items():
        if key.startswith(f"{translations.VIEW}."):
            names = [sorted(re.findall(r"\[\w+\]", x)) for x in (text, chinese[key])]
            assert names[0] == names[1], key


def test_every_text_of_the_view_can_be_found():
    """`t` and `say` are called with the text itself; only `t` of a verdict's part is not."""
    for path in (translations.ROOT / "web").glob("*.*js"):
        if path.name == "language.mjs":
            continue
        calls = re.findall(r"\bt\((?!\s*\")[^)]*\)", path.read_text(encoding="utf-8"))
        assert calls == (["t(text, values)"] if path.name == "document.mjs" else []), path.name


def test_a_node_is_found_by_mxfp8_in_chinese_too(chinese):
    titles = [t for k, t in chinese.items() if k.endswith(".display_name")]
    assert all(title.endswith(" (MXFP8)") for title in titles)
    assert len(set(titles)) == len(titles)


def test_a_chinese_page_is_built_as_the_english_one(english, chinese):
    for key, page in translations.help_pages("zh").items():
        original = english[key]
        for pattern in (r"^#+ ", r"^- ", r"!\[[^\]]+\](\([^)]+\))", r"(?<!!)\[[^\]]+\](\([^)]+\))"):
            found, wanted = (re.findall(pattern, text, re.MULTILINE) for text in (page, original))
            assert found == wanted, f"{key}: {pattern}"
        assert set(CODE.findall(page)) == set(CODE.findall(original)), key
        node = f"nodeDefs.{key.split('/')[-1].removesuffix('.md')}"
        # Markdown leaves ** as it is between some letters and punctuation.
        shown = re.sub(r"<code>.*?</code>", "", MarkdownIt().render(page))
        assert not re.search(r"[*`]", shown), key
        assert page.startswith(f"# {chinese[f'{node}.display_name']}\n"), key
        slots = {t for k, t in chinese.items() if re.match(rf"{node}\.\w+\.\w+\.name$", k)}
        assert slots <= set(BOLD.findall(page)), key


# What `problems` and `renewed` make of two texts whose translations were recorded.
OLD = {"a.b": "One", "a.c": "Two"}
ZH = {"a.b": "\u4e00", "a.c": "\u4e8c"}
RECORD = translations.renewed(OLD, ZH, {})


@pytest.mark.parametrize(
    ("english", "chinese", "said"),
    [
        (OLD, ZH, []),
        (OLD | {"a.d": "Three"}, ZH, ["a.d has no translation"]),
        (OLD | {"a.c": "2"}, ZH, ["a.c is another text now"]),
        ({"a.b": "One"}, ZH, ["a.c is no text any more"]),
        ({"a.b": "One"}, {"a.b": "\u4e00"}, ["a.c is gone"]),
        (OLD, ZH | {"a.c": "\u4e24"}, ["a.c was translated"]),
        (OLD | {"a.d": "Three"}, ZH | {"a.d": "\u4e09"}, ["a.d was translated"]),
    ],
    ids=["none", "missing", "changed", "removed", "gone", "renewed", "added"],
)
def test_what_is_to_be_done_is_said_by_key(english, chinese, said):
    found = translations.problems(english, chinese, RECORD)
    assert len(found) == len(said)
    assert all(line.startswith(words) for line, words in zip(found, said, strict=True))


def test_a_record_is_renewed_when_the_translation_was():
    new = OLD | {"a.b": "1", "a.c": "2"}
    both = ZH | {"a.c": "\u4e24"}
    record = translations.renewed(new, both, RECORD)
    assert [line.split()[0] for line in translations.problems(new, both, record)] == ["a.b"]
    record = translations.renewed(new, both, RECORD, unchanged=["a.b"])
    assert translations.problems(new, both, record) == []
