"""`mxfp8 completion`: a script that completes the command's words in bash, zsh or fish.

It is made from the parser and static: nothing runs when Tab is pressed. Rejected: argcomplete,
which starts Python at every Tab; shtab, which knows no fish.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..reports import document
from . import Answer, command
from .terminal import show_as_it_is

_COMPLETION = "mxfp8_completion"


def add(commands) -> None:
    completion = command(
        commands,
        "completion",
        lambda arguments: _complete(arguments.shell, commands.choices),
        "print a script that completes this command in a shell",
    )
    completion.add_argument("shell", choices=_SCRIPTS, help="the shell that reads the script")


def _complete(shell: str, parsers: dict[str, argparse.ArgumentParser]) -> Answer:
    script = "\n".join(_SCRIPTS[shell](parsers))
    fields = {"shell": shell, "script": script}
    return Answer(lambda: show_as_it_is(script), lambda: document.write(_COMPLETION, fields))


def _options(parser: argparse.ArgumentParser) -> Iterator[tuple[list[str], argparse.Action]]:
    """(names, action) of each option."""
    for action in parser._actions:
        if action.option_strings:
            yield action.option_strings, action


def _words(parser: argparse.ArgumentParser) -> list[str]:
    """What may stand where an argument does, if that is not a file."""
    positional = [action for action in parser._actions if not action.option_strings]
    return [str(word) for action in positional for word in action.choices or ()]


def _choices(action: argparse.Action) -> str:
    return " ".join(map(str, action.choices or ()))


def _takes_value(action: argparse.Action) -> bool:
    return action.nargs != 0


def _bash(parsers: dict[str, argparse.ArgumentParser]) -> Iterator[str]:
    yield from (
        "_mxfp8() {",
        "    local current=${COMP_WORDS[COMP_CWORD]} words=",
        "    if ((COMP_CWORD == 1)); then",
        f'        words="{" ".join(parsers)} --help --version"',
        '    else case "${COMP_WORDS[1]} ${COMP_WORDS[COMP_CWORD - 1]} $current" in',
    )
    for name, parser in parsers.items():
        for options, action in _options(parser):
            if _takes_value(action):
                patterns = " | ".join(f'"{name} {option} "*' for option in options)
                yield f'        {patterns}) words="{_choices(action)}" ;;'
        names = [option for options, _ in _options(parser) for option in options]
        yield f'        "{name} "*" -"*) words="{" ".join(names)}" ;;'
        if words := _words(parser):
            yield f'        "{name} "*) words="{" ".join(words)}" ;;'
    yield from (
        "    esac fi",
        '    COMPREPLY=($(compgen -W "$words" -- "$current"))',
        "}",
        "complete -o default -F _mxfp8 mxfp8  # files, where no word fits",
    )


def _quoted(text: str) -> str:
    """Within single quotes of zsh and fish."""
    return text.replace("\\", "\\\\").replace("'", "'\\''")


def _zsh(parsers: dict[str, argparse.ArgumentParser]) -> Iterator[str]:
    yield from (
        "#compdef mxfp8",
        "_mxfp8() {",
        "    local context state state_descr line",
        "    typeset -A opt_args",
        "    _arguments -C '1: :->command' '*:: :->arguments' && return",
        "    if [[ $state == command ]]; then",
        "        local -a commands=(",
    )
    for name, parser in parsers.items():
        yield f"            '{name}:{_quoted(parser.description)}'"
    yield from (
        "        )",
        "        _describe command commands",
        "        return",
        "    fi",
        "    case $words[1] in",
    )
    for name, parser in parsers.items():
        specs = []
        for options, action in _options(parser):
            text = _quoted(action.help or "").translate(str.maketrans({"[": "(", "]": ")"}))
            value = ""
            if _takes_value(action):
                value = f":value:({_choices(action)})" if action.choices else ":value:_files"
            repeated = "*" if isinstance(action, argparse._AppendAction) else ""
            specs += [f"'{repeated}{option}[{text}]{value}'" for option in options]
        words = _words(parser)
        specs.append(f"'*:value:({' '.join(words)})'" if words else "'*:file:_files'")
        yield f"        {name}) _arguments {' '.join(specs)} ;;"
    yield from ("    esac", "}", "compdef _mxfp8 mxfp8")


def _fish(parsers: dict[str, argparse.ArgumentParser]) -> Iterator[str]:
    for name, parser in parsers.items():
        about = _quoted(parser.description)
        yield f"complete -c mxfp8 -n __fish_use_subcommand -f -a {name} -d '{about}'"
        start = f"complete -c mxfp8 -n '__fish_seen_subcommand_from {name}'"
        for options, action in _options(parser):
            names = " ".join(
                f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
                for option in options
            )
            value = ""
            if _takes_value(action):
                value = f" -x -a '{_choices(action)}'" if action.choices else " -r"
            yield f"{start} {names}{value} -d '{_quoted(action.help or '')}'"
        if words := _words(parser):
            yield f"{start} -f -a '{' '.join(words)}'"


_SCRIPTS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
