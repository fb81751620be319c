"""Split and print command lines. Only this module knows how flags take values and how words are quoted."""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class CommandArgument:
    """A flag with its value, or a word that is not a flag's value."""

    typed: tuple[str, ...]
    """The words as typed: `--name=value`, `--name` and `value`, `--name` alone, or the word."""
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
    remaining = list(arguments)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--"):
            yield CommandArgument((word,), None, None)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        if equals:
            yield CommandArgument((word,), name, value)
        elif remaining and not remaining[0].startswith("--") and takes_value(name):
            following = remaining.pop(0)
            yield CommandArgument((word, following), name, following)
        else:
            yield CommandArgument((word,), name, None)


def command_text(*words: object) -> str:
    """A command as a user types it: `words` joined, quoted for the shell where necessary."""
    return shlex.join(map(str, words))


def flag(name: str, value: object) -> str:
    """`--name=value`, unquoted, for a JSON value: text as it is, lists of numbers with commas, other values as JSON."""
    if isinstance(value, list) and all(isinstance(item, int | float) for item in value):
        value = ",".join(map(str, value))
    return f"--{name}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"


def with_flags(
    arguments: Sequence[str], values: Mapping[str, object], aliases: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """`arguments` without the flags of `values` and their aliases, followed by one flag for each of `values`."""
    replaced = {*values, *(alias for alias, name in aliases.items() if name in values)}
    other_words = [
        word for argument in split_arguments(arguments) if argument.name not in replaced for word in argument.typed
    ]
    return [*other_words, *(flag(name, value) for name, value in values.items())]
