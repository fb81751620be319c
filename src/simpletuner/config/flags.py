"""The flags of `simpletuner train`: one for each option, and the selectors, which name the files to read.

A boolean accepts `--flag`, `--flag true` and `--flag=false`. Faulty flags are reported together with the problems of
the files.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from simpletuner.base.commandline import command_text, split_arguments
from simpletuner.base.errors import Problem
from simpletuner.config.given import GivenValue
from simpletuner.config.paths import stray_text
from simpletuner.config.values import value_text

LIKE = "like"
"""The selector that `cli.like` reads before the configuration is loaded."""
SELECTORS = {
    "config": "read this file: config.json or config.toml",
    "env": "read config/NAME/",
    "example": "train an example that comes with the program, such as tiny-lora",
    LIKE: "use the options that this LoRA or model was trained with; give datasets and paths when asked, or as flags",
}
"""Flags that select where options are read from; they are not options themselves."""


@dataclass
class ParsedFlags:
    """Parsed flags of a command line."""

    options: dict[str, GivenValue] = field(default_factory=dict)
    selectors: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def parse(arguments: Sequence[str], repeatable: Collection[str] = ()) -> ParsedFlags:
    """Parse the flags in `arguments`. Values are checked later, together with those of the other sources.

    If a flag is repeated, its last value counts; a `repeatable` flag has a tuple of all its values, and is placed after
    the other flags.
    """
    flags = ParsedFlags()
    repeated: dict[str, list[str]] = {}
    for argument in split_arguments(arguments):
        name, value = argument.name, argument.value
        if name is None or argument.typed[0] == "--":
            flags.problems += map(_stray, argument.typed)
        elif name in repeatable:
            repeated.setdefault(name, []).append(value or "")
        elif name not in SELECTORS:
            flags.options[name] = GivenValue(True if value is None else value, "flag", f"--{name}")
        elif value:
            flags.selectors[name] = value
            stray = stray_text(f"--{name}", value, is_path=True)
            flags.problems += [] if stray is None else [stray]
        else:
            flags.problems.append(Problem(f"--{name} has no value", "a name or path after it"))
    flags.options |= {name: GivenValue(tuple(values), "flag", f"--{name}") for name, values in repeated.items()}
    return flags


def _stray(word: str) -> Problem:
    key, equals, value = word.lstrip("-").partition("=")
    if equals and key in SELECTORS:
        return Problem(
            value_text(word), "a flag that begins with --", f"Did you mean {command_text(f'--{key}', value)}?"
        )
    if word.endswith((".json", ".toml", ".yaml", ".yml")):
        return Problem(
            value_text(word), "a flag that begins with --", f"Did you mean {command_text('--config', word)}?"
        )
    return Problem(value_text(word), "a flag that begins with --")
