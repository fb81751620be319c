"""What a command declares, and what it gets for a command line."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from simpletuner.base.errors import ConfigError, Problem
from simpletuner.cli.arguments import Flag, Positional, flag_rows, parse_command, refuse_extra, verb_of


def size(text: str) -> int:
    if text == "forbidden":
        raise ConfigError.of("--max-size: a size of its own kind")
    return int(text)


@dataclass(frozen=True)
class Closed:
    """A command that takes nothing but its own flags."""

    folder: str = Positional(convert=str.upper).default("")
    max_size: int = Flag("the largest\nside", "PX", convert=size, expects="a whole number").default(8)
    root: tuple[str, ...] = Flag("one more", "FOLDER", is_repeatable=True).default(())
    open: bool = Flag("show it").default(False)

    def problems(self) -> Iterator[Problem]:
        if self.open and self.max_size == 0:
            yield Problem("--open with --max-size 0")


@dataclass(frozen=True)
class Open:
    """A command that options of `train` follow."""

    run: str = Positional(verbs=("show", "stop")).default("")
    out: str = Flag("", "FOLDER", follows="a folder").default("here")
    wait: bool = Flag("until it is done", verbs=("stop",)).default(False)
    json: bool = Flag("one object").default(False)
    train_options: tuple[str, ...] = ()


def problems(form: type[Closed] | type[Open], *arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_command(form, arguments)
    return list(map(str, caught.value.problems))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", Closed()),
        ("a --max-size 3", Closed("A", 3)),
        ("--max-size=-3 --open a", Closed("A", -3, open=True)),
        ("--root a --root=b=c --root=", Closed(root=("a", "b=c", ""))),
    ],
)
def test_a_closed_command_gets_its_values(line: str, expected: Closed) -> None:
    assert parse_command(Closed, line.split()) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--max-szie 3", ["--max-szie: no such flag. Did you mean --max-size?"]),
        ("a b", ["b: no such flag. See --help."]),
        ("--open=1", ["--open=1: no such flag. Did you mean --open?"]),
        ("--max-size", ["--max-size: nothing follows it: expected a value."]),
        ("--max-size --open", ["--max-size: nothing follows it: expected a value."]),
        ("--max-size x", ["--max-size = 'x': expected a whole number."]),
        ("--max-size forbidden", ["--max-size: a size of its own kind."]),
        ("--max-size 1 --max-size 2", ["--max-size is given 2 times: expected once."]),
        (
            "--max-size x --root --opn --max-size y",
            [
                "--root: nothing follows it: expected a value.",
                "--opn: no such flag. Did you mean --open?",
                "--max-size is given 2 times: expected once.",
                "--max-size = 'y': expected a whole number.",
            ],
        ),
    ],
)
def test_a_closed_command_refuses_all_mistakes_at_once(line: str, expected: list[str]) -> None:
    words = line.split()
    # The unknown flag takes no value with it: what follows is a word, of which one is welcome.
    assert problems(Closed, *words) == expected


def test_flags_are_checked_together_after_each_alone() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_command(Closed, ["--open", "--max-size=0", "--rot"], check=Closed.problems)
    found = [problem.found for problem in caught.value.problems]
    assert found == ["--rot: no such flag", "--open with --max-size 0"]


@pytest.mark.parametrize(
    ("verb", "line", "expected"),
    [
        ("show", "a --lora_rank 8 --json", Open(run="a", json=True, train_options=("--lora_rank", "8"))),
        ("show", "--lora_rank 8 a", Open(run="a", train_options=("--lora_rank", "8"))),
        ("show", "--out a --out b", Open(out="b")),
        ("show", "--wait --json=1 --out=", Open(out="", train_options=("--wait", "--json=1"))),
        ("show", "-- a b", Open(run="b", train_options=("--", "a"))),
        ("stop", "--wait a b", Open(run="a", wait=True, train_options=("b",))),
        ("start", "a --use_ema b", Open(train_options=("a", "--use_ema", "b"))),
        # The word does not become the value of --use_ema.
        ("start", "--use_ema --json b", Open(json=True, train_options=("b", "--use_ema"))),
    ],
)
def test_an_open_command_leaves_the_rest_to_train(verb: str, line: str, expected: Open) -> None:
    assert parse_command(Open, line.split(), verb) == expected


def test_an_open_command_needs_a_value_too() -> None:
    assert problems(Open, "--out", "--json") == ["--out: nothing follows it: expected a folder."]


def test_what_no_option_of_train_may_follow() -> None:
    refuse_extra((), "simpletuner run list")
    with pytest.raises(
        ConfigError, match=r"^simpletuner run list: a --b is not understood\. See `simpletuner run list --"
    ):
        refuse_extra(("a", "--b"), "simpletuner run list")


def test_a_carriage_return_behind_a_value_makes_no_folder() -> None:
    expected = "expected text without control characters. Save the script or file it comes from with Unix line endings."
    assert problems(Open, "show", "--out", "here\r") == [f"--out = 'here\\r': {expected}"]


def test_help_has_a_row_for_each_flag() -> None:
    assert flag_rows([Closed]) == {
        "--max-size PX": "the largest\nside",
        "--root FOLDER": "one more",
        "--open": "show it",
    }
    both = [label.split()[0] for label in flag_rows([Open, Closed])]
    assert both == ["--wait", "--json", "--max-size", "--root", "--open"]


def test_the_verb_comes_first() -> None:
    assert verb_of("dataset", ["scan", "x"], ("scan", "show")) == "scan"
    with pytest.raises(ConfigError, match=r"^simpletuner dataset: nothing to do: expected scan or show\. See `simpl"):
        verb_of("dataset", [], ("scan", "show"))
    with pytest.raises(ConfigError, match=r"^simpletuner run x: no such command: expected one of them\.$"):
        verb_of("run", ["x"], ("start", "work"), "one of them")
    with pytest.raises(ConfigError, match=r"run strat: no such command.* Did you mean simpletuner run start\?$"):
        verb_of("run", ["strat"], ("start", "work"))
