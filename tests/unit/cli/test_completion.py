"""Completion, in the shells themselves."""

import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner.base.errors import ConfigError
from simpletuner.cli import completion, main, queueing
from simpletuner.config.flavours import FLAVOURS
from simpletuner.config.run import OPTION_NAMES

Ask = Callable[..., list[str]]

HOSTILE = "$(touch ran) `touch ran`;touch ran"
"""A name that a careless script would run."""

CASES: dict[str, tuple[str, set[str]]] = {
    "commands": ("", {*main.COMMANDS, "help"}),
    "a command": ("tr", {"train"}),
    "verbs": ("run st", {"start", "stop"}),
    "verbs of a verb": ("run queue ", {*queueing.FORMS}),
    "shells": ("completion ", {"bash", "zsh", "fish"}),
    "help on commands": ("help che", {"checkpoint"}),
    "own flags": ("plan --v", {"--vram"} | {f"--{name}" for name in OPTION_NAMES if name.startswith("v")}),
    "flags of one verb": ("checkpoint delete --y", {"--yes"}),
    "options": ("train --lora_r", {"--lora_rank"}),
    "options behind a verb": ("run start --lora_r", {"--lora_rank"}),
    "choices": ("train --model_flavour ", set(FLAVOURS)),
    "names of optimizers": ("train --optimizer prod", {"prodigy"}),
    "booleans": ("train --use_ema t", {"true"}),
    "a flag behind a switch": ("train --use_ema --lora_r", {"--lora_rank"}),
    "examples": ("train --example ", {"tiny-lora"}),
    "runs": ("run show o", {"output/one", "output/deep/two"}),
    "runs to delete": ("run delete output/d", {"output/deep/two"}),
    "runs to draw with": ("sample --run output/o", {"output/one"}),
    "environments": ("train --env c", {"cats"}),
}
"""What is typed after `simpletuner`, and what is offered."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with environments and runs, and the script of each shell. Read only."""
    root = tmp_path_factory.mktemp("workspace")
    for folder in ("config/cats", f"config/{HOSTILE}", "config/not one", "output/one", "output/deep/two"):
        (root / folder).mkdir(parents=True)
    for file in ("config/cats/config.json", f"config/{HOSTILE}/config.toml"):
        (root / file).touch()
    for run in ("one", "deep/two"):
        (root / "output" / run / "events.jsonl").touch()
    for shell in completion.FORMS:
        (root / shell).write_text(completion.script(shell))
    return root


def answered(*command: str, folder: Path) -> list[str]:
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stderr == ""
    return ended.stdout.splitlines()


def in_bash(folder: Path, *words: str) -> list[str]:
    """What bash's function offers for the last word; "" begins a new one."""
    code = 'source ./bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _simpletuner; printf "%s\\n" "${COMPREPLY[@]}"'
    return list(filter(None, answered("bash", "--norc", "-c", code, "bash", *words, folder=folder)))


@pytest.mark.parametrize(("typed", "offered"), CASES.values(), ids=CASES)
def test_bash_offers(workspace: Path, typed: str, offered: set[str]) -> None:
    assert set(in_bash(workspace, "simpletuner", *typed.split(" "))) == offered


def test_bash_splits_a_flag_from_its_value(workspace: Path) -> None:
    assert in_bash(workspace, "simpletuner", "train", "--model_flavour", "=", "d") == ["dev"]
    assert in_bash(workspace, "simpletuner", "train", "--model_flavour", "=") == list(FLAVOURS)


def test_names_are_offered_and_never_run(workspace: Path) -> None:
    quoted = in_bash(workspace, "simpletuner", "train", "--env", "$")
    assert len(quoted) == 1
    assert answered("bash", "-c", f"printf %s {quoted[0]}", folder=workspace) == [HOSTILE]
    if shutil.which("fish"):
        assert HOSTILE in "\n".join(in_fish(workspace, "train --env "))
    assert not (workspace / "ran").exists()


def in_fish(folder: Path, typed: str) -> list[str]:
    lines = answered("fish", "--no-config", "-c", f"source ./fish; complete -C'simpletuner {typed}'", folder=folder)
    return [line.partition("\t")[0] for line in lines]


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
@pytest.mark.parametrize(("typed", "offered"), CASES.values(), ids=CASES)
def test_fish_offers(workspace: Path, typed: str, offered: set[str]) -> None:
    assert set(in_fish(workspace, typed)) == offered


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_keeps_a_flag_before_its_value(workspace: Path) -> None:
    assert in_fish(workspace, "train --model_flavour=d") == ["--model_flavour=dev"]


def typed_into(shell: list[str], folder: Path, typed: list[str], until: str) -> str:
    """What a shell at a terminal shows, once `until` is among it."""
    ours, theirs = pty.openpty()
    environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "TERM": "dumb", "PS1": "> "}
    process = subprocess.Popen(
        shell, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=environ, start_new_session=True
    )
    os.close(theirs)
    shown = b""
    try:
        deadline = time.monotonic() + 60
        for line in typed:
            os.write(ours, line.encode())
        while until.encode() not in shown and time.monotonic() < deadline:
            shown += os.read(ours, 4096)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return shown.decode(errors="replace")


AT_A_TERMINAL = {
    "bash": (["bash", "--norc", "-i"], "source ./bash"),
    "zsh": (["zsh", "-f", "-i"], "autoload -U compinit; compinit -u -D; source ./zsh"),
}


@pytest.mark.parametrize("shell", AT_A_TERMINAL)
def test_a_terminal_completes_what_is_typed(workspace: Path, shell: str) -> None:
    """Each tab has one thing to offer."""
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    command, begin = AT_A_TERMINAL[shell]
    lines = [
        f"{begin}\n",
        "simpletuner() { echo GOT: $* END; }\n",
        "simpletuner tr\t--env c\t--lora_r\t8 --model_flavour=d\t--use_ema t\t\n",
        "simpletuner che\tdel\t--y\toutput/o\t\n",
        "echo DO''NE\n",
    ]
    shown = typed_into(command, workspace, lines, "DONE")
    assert "GOT: train --env cats --lora_rank 8 --model_flavour=dev --use_ema true END" in shown
    assert "GOT: checkpoint delete --yes output/one END" in shown


def test_the_script_starts_nothing_of_this_program() -> None:
    for shell in completion.FORMS:
        text = completion.script(shell)
        assert "@" not in text.replace('"$@"', "").replace("[@]", "")
        assert "python" not in text
        assert "$(simpletuner" not in text


def test_printing_a_script_loads_no_torch() -> None:
    code = (
        "import sys; from simpletuner.cli.main import main; code = main(['completion', 'bash']);"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.endswith("complete -F _simpletuner simpletuner\n\n")


def test_a_shell_must_be_named() -> None:
    with pytest.raises(ConfigError, match=r"completion: nothing to do: expected bash, zsh or fish\."):
        completion.run([])
    with pytest.raises(ConfigError, match="tcsh: no such command"):
        completion.run(["tcsh"])
