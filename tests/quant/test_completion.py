"""The completion scripts: in bash itself; zsh and fish, where they are installed, read theirs."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from mxfp8.quant import cli
from mxfp8.quant.conversion import policy

SHELLS = ("bash", "zsh", "fish")


@pytest.fixture
def script(capsys):
    def script(shell: str) -> str:
        assert cli.main(["completion", shell]) == 0
        return capsys.readouterr().out

    return script


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    listed = " ".join(f"'{word}'" for word in words)
    code = f"{script}\nCOMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; _mxfp8\n"
    code += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no bash")
def test_bash_completes_commands_options_and_values(script):
    bash = script("bash")
    assert completed(bash, "mxfp8", "conv") == ["convert"]
    assert {"inspect", "batch", "--version"} <= set(completed(bash, "mxfp8", ""))
    assert completed(bash, "mxfp8", "convert", "a", "--over") == ["--overwrite"]
    assert completed(bash, "mxfp8", "convert", "--preset", "") == policy.presets()
    assert completed(bash, "mxfp8", "repair", "--scales", "t") == ["tiled"]
    assert completed(bash, "mxfp8", "repair", "a", "") == []  # then bash offers files
    assert completed(bash, "mxfp8", "completion", "") == [*SHELLS]
    assert completed(bash, "mxfp8", "completion", "--j") == ["--json"]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_names_every_command_and_option(script, shell):
    text = script(shell)
    (action,) = (a for a in cli.parser()._actions if a.choices)
    for name, parser in action.choices.items():
        assert name in text
        for option in (o for a in parser._actions for o in a.option_strings if o[:2] == "--"):
            assert (f"-l {option[2:]} " if shell == "fish" else option) in text


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_can_be_read_by_its_shell(script, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    done = subprocess.run([shell, "-n"], input=script(shell), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
