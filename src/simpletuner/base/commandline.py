"""Command lines, read and printed: the one place that knows how a flag takes its value and how a word is quoted."""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class CommandArgument:
    """A flag with its value, or a word that belongs to no flag."""

    typed: tuple[str, ...]
    """As it was typed: `--name=value`, `--name` and `value`, `--name` alone, or the word."""
    name: str | None
    """The flag's name without its dashes; None for a word."""
    value: str | None
    """None for a flag without a value, and for a word."""


def split_arguments(
    arguments: Sequence[str], takes_value: Callable[[str], bool] = lambda _: True
) -> Iterator[CommandArgument]:
    """Yield the flags and words of `arguments`, in order.

    The word after a flag is its value, unless that word begins with `--`, or `takes_value` is false for the flag's
    name. `--name=value` always has a value, which may be empty.
    """
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            yield CommandArgument((word,), None, None)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        if equals:
            yield CommandArgument((word,), name, value)
        elif rest and not rest[0].startswith("--") and takes_value(name):
            following = rest.pop(0)
            yield CommandArgument((word, following), name, following)
        else:
            yield CommandArgument((word,), name, None)


def command_text(*words: object) -> str:
    """A command as a user types it: `words` joined, each quoted for the shell where it needs to be."""
    return shlex.join(map(str, words))


def flag(name: str, value: object) -> str:
    """`--name=value`, not quoted, for a value of JSON: numbers with commas between, objects and other lists as JSON,
    booleans as true and false.
    """
    if isinstance(value, list) and all(isinstance(item, int | float) for item in value):
        value = ",".join(map(str, value))
    return f"--{name}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"


def with_flags(
    arguments: Sequence[str], values: Mapping[str, object], aliases: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """`arguments` with a flag for each of `values` at the end, in place of those of the same name or an alias of it."""
    replaced = {*values, *(alias for alias, name in aliases.items() if name in values)}
    kept = [word for argument in split_arguments(arguments) if argument.name not in replaced for word in argument.typed]
    return [*kept, *(flag(name, value) for name, value in values.items())]
