"""The texts that users see, in English and in Chinese, and which translations are out of date.

    make locales                                   writes locales/en and lists what to translate
    make locales UNCHANGED="web/docs/MXFP8InspectFile.md ..."
                                                   the Chinese of these still fits their new English

English texts stand in the nodes' schemas, in the settings of web/*.js, in calls of `t` in web/*.mjs
and of `say` in Python, and in presets.json; locales/en is made from what a real ComfyUI and its
page say of the first two, and from the others. Chinese ones stand in locales/zh, and the help page
web/docs/NODE.md in web/docs/NODE/zh.md. tests/web/translated.json keeps a hash of both texts per
translation: if only the English one is another now, the Chinese one is out of date.

Keys are those of ComfyUI's page (`nodeDefs.NODE.inputs.NAME.tooltip`), or the path of a help page.
The first part of a key is its file in locales/, or one of `MAIN`, which are in main.json. After
`VIEW` comes the English text itself.
https://docs.comfy.org/custom-nodes/i18n
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path

from mxfp8.quant.conversion import policy
from mxfp8.quant.reports import verdict

ROOT = Path(__file__).resolve().parents[2]
LOCALES = ROOT / "locales"
PAGES = ROOT / "web" / "docs"
RECORD = ROOT / "tests" / "web" / "translated.json"
VIEW = "mxfp8"  # the texts of web/language.mjs
MAIN = ("settingsCategories", VIEW)
# Quotes the lists of text encoders of the ComfyUI that runs: in English, the node's own text stays.
QUOTING = ("nodeDefs.MXFP8LoadTextEncoder.description",)
# A call of `t` with a text, in JavaScript; one with anything else cannot be translated.
_TRANSLATED = re.compile(r"""\bt\(\s*("(?:[^"\\]|\\.)*")""")
# What the page's message compiler (vue-i18n) takes as syntax.
SYNTAX = re.compile(r"[{}@|]")


def node_texts(nodes: dict[str, dict]) -> dict[str, str]:
    """The texts of nodes, as /object_info describes them."""
    found = {}
    for name, info in nodes.items():
        node = f"nodeDefs.{name}"
        found[f"{node}.display_name"] = info["display_name"]
        found[f"{node}.description"] = info["description"]
        for part in ("required", "optional"):
            for key, (_, options) in info["input"].get(part, {}).items():
                found[f"{node}.inputs.{key}.name"] = options.get("display_name") or key
                found[f"{node}.inputs.{key}.tooltip"] = options["tooltip"]
        outputs = zip(info["output_name"], info["output_tooltips"] or (), strict=True)
        for index, (output, tooltip) in enumerate(outputs):
            found[f"{node}.outputs.{index}.name"] = output
            found[f"{node}.outputs.{index}.tooltip"] = tooltip
    return found


def page_texts(page) -> dict[str, str]:
    """The texts of this pack's settings."""
    settings = page.evaluate(
        """() => app.extensions.filter((e) => e.name.startsWith("mxfp8."))
            .flatMap((e) => e.settings ?? [])
            .map(({ id, name, tooltip, category }) => ({ id, name, tooltip, category }))"""
    )
    found = {}
    for setting in settings:
        key = "settings." + setting["id"].replace(".", "_")
        found[f"{key}.name"] = setting["name"]
        found[f"{key}.tooltip"] = setting["tooltip"]
        found |= {f"settingsCategories.{name}": name for name in setting["category"][:2]}
    return found


def view_texts() -> dict[str, str]:
    """The texts of calls of `t` in web/ and of `say` in Python, words of verdicts, and presets."""
    said = [word.word for word in (*verdict.LATENTS, *verdict.WEIGHTS)]
    said += policy.preset_titles().values()
    for path in sorted(ROOT.joinpath("web").glob("*.*js")):
        if path.name != "language.mjs":
            said += map(json.loads, _TRANSLATED.findall(path.read_text(encoding="utf-8")))
    for folder in ("quant", "nodes"):
        for path in sorted(ROOT.joinpath(folder).rglob("*.py")):
            said += _said(path)
    return {f"{VIEW}.{text}": text for text in sorted(set(said), key=str.lower)}


def _said(path: Path) -> list[str]:
    """The first arguments of calls of `say`."""
    source = path.read_text(encoding="utf-8")
    if "say(" not in source:
        return []
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        ast.literal_eval(call.args[0])
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "say"
    ]


def texts_of(info: dict[str, dict], page) -> dict[str, str]:
    """All English texts but the help pages.

    Args:
        info: what /object_info says of this pack's nodes.
    """
    return node_texts(info) | page_texts(page) | view_texts()


def help_pages(language: str) -> dict[str, str]:
    """The help pages, under the English one's path."""
    paths = PAGES.glob("*.md" if language == "en" else f"*/{language}.md")
    names = {path: path.stem if language == "en" else path.parent.name for path in paths}
    return {f"web/docs/{n}.md": p.read_text(encoding="utf-8") for p, n in sorted(names.items())}


def stored(language: str) -> dict[str, str]:
    """The texts in locales/."""

    def flat(texts: dict, prefix: str) -> dict[str, str]:
        found = {}
        for key, value in texts.items():
            if isinstance(value, dict):
                found |= flat(value, f"{prefix}{key}.")
            else:
                found[prefix + key] = value
        return found

    found = {}
    for path in sorted((LOCALES / language).glob("*.json")):
        prefix = "" if path.stem == "main" else f"{path.stem}."
        found |= flat(json.loads(path.read_text(encoding="utf-8")), prefix)
    return found


def store(language: str, texts: dict[str, str]) -> None:
    """Write texts to locales/, in the order they come in, and nothing else into that folder."""
    files: dict[str, dict] = {}
    for key, text in texts.items():
        file = file_of(key)
        at = files.setdefault(file, {})
        first, _, rest = key.partition(".")
        *outer, last = [first, rest] if first == VIEW else key.removeprefix(f"{file}.").split(".")
        for part in outer:
            at = at.setdefault(part, {})
        at[last] = text
    folder = LOCALES / language
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.json"):
        path.unlink()
    for file, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / f"{file}.json").write_text(text + "\n", encoding="utf-8")


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def pair(english: str, chinese: str) -> str:
    """What the record keeps of a translation."""
    return f"{short_hash(english)} {short_hash(chinese)}"


def file_of(key: str) -> str:
    """The file of a key in locales/LANGUAGE, without its suffix."""
    first = key.split(".")[0]
    return "main" if first in MAIN else first


def place(key: str) -> str:
    """Where the Chinese text of a key is."""
    if key.endswith(".md"):
        return f"{key.removesuffix('.md')}/zh.md"
    return f"locales/zh/{file_of(key)}.json"


def problems(english: dict, chinese: dict, record: dict) -> list[str]:
    """A line for each Chinese text that is missing, left over or out of date."""
    found = []
    for key in sorted(english.keys() | chinese.keys() | record.keys()):
        text, recorded = english.get(key), record.get(key, "").split()
        said = "" if text is None or key.endswith(".md") else f": {text!r}"
        if key not in chinese:
            fault = f"has no translation; add it to {place(key)}{said}" if text else "is gone"
        elif text is None:
            fault = f"is no text any more; remove it from {place(key)}"
        elif recorded and recorded[0] != short_hash(text):
            fault = f"is another text now; update it in {place(key)}{said}"
        elif recorded != pair(text, chinese[key]).split():
            fault = "was translated; `make locales` records it"
        else:
            continue
        found.append(f"{key} {fault}")
    return found


def renewed(english: dict, chinese: dict, record: dict, unchanged=()) -> dict[str, str]:
    """The record, with translations that are new, changed or among `unchanged`."""
    result = {}
    for key in sorted(english.keys() & chinese.keys()):
        now = short_hash(chinese[key])
        if key in unchanged or key not in record or record[key].split()[1] != now:
            result[key] = pair(english[key], chinese[key])
        else:
            result[key] = record[key]
    return result


def read_record() -> dict[str, str]:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def main(unchanged: list[str]) -> int:
    from browser import ComfyPage, chromium
    from comfyui import Server

    with tempfile.TemporaryDirectory() as base, Server(Path(base)) as server:
        info = server.get("/object_info")
        nodes = {n: i for n, i in info.items() if i["python_module"].endswith(".ComfyUI-MXFP8")}
        with chromium() as browser:
            shown = ComfyPage(browser, server, nodes2=False)
            texts = texts_of(nodes, shown.page)
    store("en", {key: text for key, text in texts.items() if key not in QUOTING})
    english = texts | help_pages("en")
    if unknown := sorted(set(unchanged) - english.keys()):
        print(f"no such text: {', '.join(unknown)}")
        return 2
    chinese = stored("zh") | help_pages("zh")
    record = renewed(english, chinese, read_record(), unchanged)
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    left = problems(english, chinese, record)
    print("\n".join(left) if left else f"{len(english)} texts and pages, all translated")
    return bool(left)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
