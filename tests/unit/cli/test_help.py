"""Help: no wider than the terminal, no Markdown, what matters first."""

import re
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module

import pytest

from simpletuner.base.errors import ConfigError
from simpletuner.cli import main
from simpletuner.cli.help import ESSENTIALS, forms_of, requested_help, train_help
from simpletuner.cli.printing import fitted, plain, rows_text
from simpletuner.config.options.offload import OffloadOptions
from simpletuner.config.run import OPTION_NAMES

OF_FORMS = [name for name in main.COMMANDS if name not in ("train", "sample")]
"""Commands with flags of their own; the others take the options of a configuration."""

Helper = Callable[..., str]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Helper:
    def of(*arguments: str) -> str:
        assert main.main(arguments) == 0
        return capsys.readouterr().out

    return of


@pytest.mark.parametrize("columns", ["60", "300"])
@pytest.mark.parametrize("command", main.COMMANDS)
def test_help_fits_the_terminal_and_has_no_markdown(
    printed: Helper, monkeypatch: pytest.MonkeyPatch, command: str, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = printed(command, "--help") + (printed("train", "--help", "all") if command == "train" else "")
    # A word longer than the line, such as the name of an option, is left whole.
    wide = [line for line in text.splitlines() if len(line) > int(columns) and len(line.split()) > 1]
    assert [line for line in wide if max(map(len, line.split())) < int(columns) - 15] == []
    assert max(map(len, text.splitlines())) <= 100
    assert re.findall(r"\]\(|`", text) == []
    assert text.startswith("usage: simpletuner ")


@pytest.mark.parametrize("command", OF_FORMS)
def test_a_commands_own_flags_come_and_those_of_train_are_only_named(printed: Helper, command: str) -> None:
    text = printed(command, "--help")
    assert "--lora_rank" not in text
    forms = forms_of(import_module(f"simpletuner.cli.{command}").FORMS)
    takes_options = any(each.name == "train_options" for form in forms for each in fields(form))
    assert ("the options of 'train'" in text) is takes_options
    if takes_options:
        assert text.index("  --json") < text.index("the options of 'train'")


def test_help_on_train_begins_with_what_most_configurations_set_and_names_all(printed: Helper) -> None:
    text = printed("train", "--help")
    assert set(ESSENTIALS) <= set(OPTION_NAMES)
    assert len(text.splitlines()) < 200
    begin, end = text.index("Options that most"), text.index(f"All {len(OPTION_NAMES)} options")
    assert [name for name in ESSENTIALS if f"\n  --{name}: " not in text[begin:end]] == []
    named = set(re.findall(r"\w+", text[end:]))
    assert set(OPTION_NAMES) <= named


def test_a_word_after_help_finds_the_options_about_it(printed: Helper) -> None:
    assert printed("train", "--help", "lora_rank") == printed("train", "--help=--lora-rank")
    assert printed("help", "train", "lora_rank").startswith("  --lora_rank: a whole number of at least 1 (default 16)")
    assert "--flux_lora_target" in printed("train", "--help", "lora")
    every = printed("train", "--help", "all")
    assert all(f"\n  --{name}: " in every for name in OPTION_NAMES)
    offload = str(OffloadOptions.__doc__).rstrip(".")
    assert printed("train", "--help", offload.lower()).startswith(offload)


def test_a_word_that_no_option_is_about_is_a_mistake_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"--help lora_rnak: no option matches\. Did you mean --help lora_rank"):
        train_help("", "lora_rnak")
    with pytest.raises(ConfigError, match="zebra: no option matches"):
        train_help("", "zebra")


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["--help"], ""),
        (["--a", "-h"], ""),
        (["--help", "--json"], ""),
        (["--help", "rank"], "rank"),
        (["--help=rank"], "rank"),
        (["--a"], None),
    ],
)
def test_help_is_asked_for(arguments: list[str], asked: str | None) -> None:
    assert requested_help(arguments) == asked


def test_help_of_a_verb_says_what_that_verb_takes(printed: Helper) -> None:
    stop = printed("run", "stop", "--help")
    assert stop == printed("help", "run", "stop") == printed("run", "--help", "stop")
    assert "--wait" in stop
    assert "--follow " not in stop
    assert "  start " not in stop
    assert "--devices" in printed("run", "queue", "--help")
    assert "--step" not in printed("checkpoint", "list", "--help")


@pytest.mark.parametrize("command", OF_FORMS)
def test_every_command_says_what_it_takes_after_each_verb(printed: Helper, command: str) -> None:
    verbs = [verb for verb in import_module(f"simpletuner.cli.{command}").FORMS if verb]
    text = printed("help", command)
    assert [verb for verb in verbs if verb not in text] == []
    for verb in verbs:
        assert f"  {verb} " in printed(command, verb, "--help")


def test_links_and_code_are_words() -> None:
    assert plain("see [full training](full.md)") == "see full training (docs/full.md)"
    assert plain("[plan.md](plan.md) says") == "docs/plan.md says"
    assert plain("[here](#there), [a](https://b.c/d)") == "here, a (https://b.c/d)"
    assert plain("`lora_rank`, `no` and `--env`, `a b`, `.txt`") == "lora_rank, 'no' and --env, 'a b', .txt"
    assert plain('`""` starts over') == '"" starts over'


def test_rows_stand_above_each_other_where_it_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "44")
    assert rows_text({"--a-rather-long-flag FOLDER": "what it is"}) == "  --a-rather-long-flag FOLDER\n      what it is"
    assert fitted("  start   " + "word " * 9).splitlines() == [
        "  start   word word word word word word word",
        " " * 10 + "word word",
    ]
