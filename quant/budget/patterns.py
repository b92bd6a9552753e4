"""Short regular expressions that match exactly some of a model's keys, to copy into `--exclude`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a block
_WORD = re.compile(r"[^.]+|\.")


def patterns(chosen: Iterable[str], keys: Iterable[str]) -> tuple[str, ...]:
    """Expressions of which one or more, searched for, match in every chosen key and in no other.

    Keys that differ in one block number become one expression: "layers\\.(3|29)\\.attention\\.qkv".

    Args:
        chosen: some of `keys`, which are a model's tensors.
    """
    keys = list(keys)
    wanted = set(chosen)
    numbers: dict[tuple[str, str], list[str]] = {}  # (before, after) -> numbers
    for key in keys:
        if key in wanted:
            before, number, after = _split(key)
            numbers.setdefault((before, after), []).append(number)
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}  # parts that have the same numbers
    for (before, after), found in numbers.items():
        alike.setdefault((before, tuple(found)), []).append(after)
    every: dict[str, set[str]] = {}
    for key in keys:
        before, number, _ = _split(key)
        every.setdefault(before, set()).add(number)
    result = []
    for (before, found), after in alike.items():
        whole = bool(found[0]) and set(found) == every[before]
        middle = r"\d+" if whole and len(found) > 1 else _any(found)
        bare = re.escape(before) + middle + _any(after)
        # Without anchors where that is exact, as such expressions are usually written.
        result.append(bare if _matched(bare, keys) <= wanted else f"^{bare}$")
    return tuple(result)


def _split(key: str) -> tuple[str, str, str]:
    """Text before the first block number, the number, and the text after it."""
    match = _NUMBER.search(key)
    return (key[: match.start()], match[0], key[match.end() :]) if match else (key, "", "")


def _any(texts: Iterable[str]) -> str:
    """An expression for any of some texts, what all begin and end with in front and behind."""
    texts = list(texts)
    if len(texts) == 1:
        return re.escape(texts[0])
    words = [_WORD.findall(text) for text in texts]
    front = _shared(words)
    back = _shared([one[front:][::-1] for one in words])
    middle = [one[front : len(one) - back] for one in words]
    choices = "|".join(re.escape("".join(one)) for one in middle)
    before, after = words[0][:front], words[0][len(words[0]) - back :]
    return f"{re.escape(''.join(before))}({choices}){re.escape(''.join(after))}"


def _shared(words: list[list[str]]) -> int:
    """How many words all lists begin with."""
    alike = (len(set(column)) == 1 for column in zip(*words, strict=False))
    return sum(itertools.takewhile(bool, alike))


def _matched(pattern: str, keys: Iterable[str]) -> set[str]:
    return {key for key in keys if re.search(pattern, key)}
